"""The endless sequence of rows: what each epoch sees, in which order, in which rows.

A part of weight 1 is seen once in every epoch. One of weight 2.5 is seen two and a half times; the
other half of its third pass comes in the next epoch. After any integer number of passes, each of
its pairs was seen equally often.
"""

import dataclasses
import fractions
import zlib

import numpy as np

from dpo_flax.data.batches.pack import row_lengths
from dpo_flax.data.batches.plan import RowPlan, plan_rows, reorder

_WINDOW = 1 << 16  # pairs packed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
  """How pairs are laid into rows, and rows into steps."""

  rows: int  # of a step
  tokens: int  # of a row
  pairs_per_row: int = 0  # slots; 0: the largest number the first epoch needs
  layout: str = 'shared'  # shared | separate
  pack: bool = True  # False: one pair a row
  shuffle: bool = True
  too_long: str = 'raise'  # raise | drop | truncate_prompt
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The parts of the data; they hold indices of the pairs of a side."""

  parts: tuple[np.ndarray, ...]  # of each: its pairs, int
  weights: tuple[float, ...]  # of each: passes over it in an epoch

  def epoch(self, number: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the pairs that an epoch sees, [n] int32."""
    passes = [
      self._passes(part, number, seed=seed, shuffle=shuffle) for part in range(len(self.parts))
    ]
    pairs = np.concatenate(passes).astype(np.int32)
    if shuffle and len(passes) > 1:
      return pairs[permutation(len(pairs), 'mixture', seed, number)]
    return pairs

  def _passes(self, part: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns what an epoch sees of one part: a piece of the endless sequence of passes over it."""
    pairs = self.parts[part]
    size = fractions.Fraction(self.weights[part]).limit_denominator(1_000_000) * len(pairs)
    start, end = int(epoch * size), int((epoch + 1) * size)
    pieces = [np.zeros(0, np.int32)]
    while start < end:
      number, first = divmod(start, len(pairs))
      last = min(len(pairs), first + end - start)
      salt = ('pairs', seed, number, part)
      order = permutation(len(pairs), *salt) if shuffle else np.arange(len(pairs))
      pieces.append(pairs[order[first:last]])
      start += last - first
    return np.concatenate(pieces)


@dataclasses.dataclass
class RowSchedule:
  """Every epoch's plan, one after the other."""

  lengths: np.ndarray  # [n, 3]
  mixture: Mixture
  options: RowOptions
  pairs_per_row: int = dataclasses.field(init=False)  # slots
  _plans: dict[int, RowPlan] = dataclasses.field(default_factory=dict, init=False)
  _starts: dict[int, int] = dataclasses.field(default_factory=lambda: {0: 0}, init=False)

  def __post_init__(self):
    self.pairs_per_row = self.options.pairs_per_row if self.options.pack else 1
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
    options = self.options
    order = self.mixture.epoch(epoch, seed=options.seed, shuffle=options.shuffle)
    if not len(order):
      raise ValueError(
        f'data.train: the weights of the mixture leave no pair for epoch {epoch + 1}: raise them'
      )
    plan = plan_rows(
      row_lengths(self.lengths, options.layout),
      tokens=options.tokens,
      pairs_per_row=self.pairs_per_row,
      order=order,
      window=_WINDOW if options.pack else 0,
    )
    if options.shuffle:
      return reorder(plan, permutation(len(plan), 'rows', options.seed, epoch))
    first = np.minimum.reduceat(plan.pairs, plan.starts[:-1])
    return reorder(plan, np.argsort(first, kind='stable'))


def hashed(values: np.ndarray, *salt: int | str) -> np.ndarray:
  """Returns a hash of every value, uint64: splitmix64, the same on every machine and version."""
  seed = zlib.crc32(repr(salt).encode()) * 0x9E3779B97F4A7C15 % 2**64
  x = values.astype(np.uint64) + np.uint64(seed)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def permutation(n: int, *salt: int | str) -> np.ndarray:
  """Returns a random order of 0 .. n - 1 that depends on the salt alone."""
  return np.argsort(hashed(np.arange(n), *salt), kind='stable')
