"""The endless sequence of rows: every epoch's plan, one after the other."""

import numpy as np
from ml_collections import ConfigDict

from dpo_flax.data.batches import pack
from dpo_flax.data.batches.mixture import Mixture, permutation

_WINDOW = 1 << 16  # pairs packed together


class Epochs:
  """The endless sequence of rows: every epoch's plan, one after the other."""

  def __init__(
    self,
    lengths: np.ndarray,  # [n, 3]
    mixture: Mixture,
    config: ConfigDict,
    *,
    shuffle: bool,
    pairs_per_row: int,
  ):
    self._lengths, self._mixture = lengths, mixture
    self._tokens, self._layout = config.batch.tokens, config.data.layout
    self._window = _WINDOW if config.data.pack else 0
    self._seed, self._shuffle = config.seed, shuffle
    self._plans: dict[int, pack.RowPlan] = {}
    self._starts = {0: 0}
    self.pairs_per_row = pairs_per_row
    if not pairs_per_row:
      # As many as the first epoch needs without a cap. That plan is thrown away: the cap changes
      # how rows are packed, and an epoch must have one plan, whenever it is asked for.
      self.pairs_per_row = self._make_plan(0).pairs_per_row

  def plan(self, epoch: int) -> pack.RowPlan:
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

  def _make_plan(self, epoch: int) -> pack.RowPlan:
    order = self._mixture.epoch(epoch, seed=self._seed, shuffle=self._shuffle)
    if not len(order):
      raise ValueError(
        f'data.train: the weights of the mixture leave no pair for epoch {epoch + 1}: raise them.'
      )
    plan = pack.plan_rows(
      pack.row_lengths(self._lengths, self._layout),
      tokens=self._tokens,
      pairs_per_row=self.pairs_per_row,
      order=order,
      window=self._window,
    )
    if self._shuffle:
      return pack.reorder(plan, permutation(len(plan), 'rows', self._seed, epoch))
    first = np.minimum.reduceat(plan.pairs, plan.starts[:-1])
    return pack.reorder(plan, np.argsort(first, kind='stable'))
