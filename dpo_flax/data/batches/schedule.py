"""The endless sequence of rows: every epoch's plan, one after the other."""

import numpy as np

from dpo_flax.data.batches.mixture import Mixture, permutation
from dpo_flax.data.batches.pack import RowPlan, plan_rows, reorder, row_lengths

_WINDOW = 1 << 16  # pairs packed together


class RowSchedule:
  """The endless sequence of rows: every epoch's plan, one after the other."""

  def __init__(
    self,
    lengths: np.ndarray,  # [n, 3]
    mixture: Mixture,
    *,
    tokens: int,  # of a row
    layout: str,
    seed: int,
    pack: bool,  # False: one pair a row
    shuffle: bool,
    pairs_per_row: int,  # slots; 0: the largest number the first epoch needs
  ):
    self._lengths, self._mixture = lengths, mixture
    self._tokens, self._layout = tokens, layout
    self._window = _WINDOW if pack else 0
    self._seed, self._shuffle = seed, shuffle
    self._plans: dict[int, RowPlan] = {}
    self._starts = {0: 0}
    self.pairs_per_row = pairs_per_row
    if not pairs_per_row:
      # As many as the first epoch needs without a cap. That plan is thrown away: the cap changes
      # how rows are packed, and an epoch must have one plan, whenever it is asked for.
      self.pairs_per_row = self._make_plan(0).pairs_per_row

  def plan(self, epoch: int) -> RowPlan:
    """Returns the rows of one epoch."""
    if epoch not in self._plans:
      plan = self._make_plan(epoch)
      for old in [e for e in self._plans if e < epoch - 1]:
        self._plans.pop(old, None)
      self._plans[epoch] = plan
    return self._plans[epoch]

  def start(self, epoch: int) -> int:
    """Returns the number of rows before an epoch."""
    if epoch not in self._starts:
      self._starts[epoch] = self.start(epoch - 1) + len(self.plan(epoch - 1))
    return self._starts[epoch]

  def row(self, i: int) -> np.ndarray:
    """Returns the pairs of row i, as places in the split."""
    epoch = max(e for e, start in list(self._starts.items()) if start <= i)
    while self.start(epoch + 1) <= i:
      epoch += 1
    return self.plan(epoch)[i - self.start(epoch)]

  def _make_plan(self, epoch: int) -> RowPlan:
    order = self._mixture.epoch(epoch, seed=self._seed, shuffle=self._shuffle)
    if not len(order):
      raise ValueError(
        f'data.train: the weights of the mixture leave no pair for epoch {epoch + 1}: raise them.'
      )
    plan = plan_rows(
      row_lengths(self._lengths, self._layout),
      tokens=self._tokens,
      pairs_per_row=self.pairs_per_row,
      order=order,
      window=self._window,
    )
    if self._shuffle:
      return reorder(plan, permutation(len(plan), 'rows', self._seed, epoch))
    first = np.minimum.reduceat(plan.pairs, plan.starts[:-1])
    return reorder(plan, np.argsort(first, kind='stable'))
