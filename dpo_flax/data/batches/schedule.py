"""The endless sequence of rows: every epoch's plan, one after the other."""

import dataclasses

import numpy as np

from dpo_flax.data.batches.mixture import Mixture, permutation
from dpo_flax.data.batches.pack import RowPlan, plan_rows, reorder, row_lengths

_WINDOW = 1 << 16  # pairs packed together


@dataclasses.dataclass
class RowSchedule:
  """The endless sequence of rows: every epoch's plan, one after the other."""

  lengths: np.ndarray  # [n, 3]
  mixture: Mixture
  _: dataclasses.KW_ONLY
  tokens: int  # of a row
  layout: str
  seed: int
  pack: bool  # False: one pair a row
  shuffle: bool
  pairs_per_row: int  # slots; 0: the largest number the first epoch needs
  _plans: dict[int, RowPlan] = dataclasses.field(default_factory=dict, init=False)
  _starts: dict[int, int] = dataclasses.field(default_factory=lambda: {0: 0}, init=False)

  def __post_init__(self):
    if not self.pairs_per_row:
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
    """Returns the pairs of row i, as indices into the side."""
    epoch = max(e for e, start in list(self._starts.items()) if start <= i)
    while self.start(epoch + 1) <= i:
      epoch += 1
    return self.plan(epoch)[i - self.start(epoch)]

  def _make_plan(self, epoch: int) -> RowPlan:
    order = self.mixture.epoch(epoch, seed=self.seed, shuffle=self.shuffle)
    if not len(order):
      raise ValueError(
        f'data.train: the weights of the mixture leave no pair for epoch {epoch + 1}: raise them'
      )
    plan = plan_rows(
      row_lengths(self.lengths, self.layout),
      tokens=self.tokens,
      pairs_per_row=self.pairs_per_row,
      order=order,
      window=_WINDOW if self.pack else 0,
    )
    if self.shuffle:
      return reorder(plan, permutation(len(plan), 'rows', self.seed, epoch))
    first = np.minimum.reduceat(plan.pairs, plan.starts[:-1])
    return reorder(plan, np.argsort(first, kind='stable'))
