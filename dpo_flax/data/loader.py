"""The pipeline over the plan: batch s is a pure function of s.

The rows of a run are the epochs' plans one after the other, each with an order and a packing of its
own, from the seed and its number. Step s takes rows [s * B, (s + 1) * B), whatever the number of
hosts and workers: the step is all of the loader's state, and the last incomplete batch of an epoch
is completed from the next one.
"""

import dataclasses
import itertools
import math

import grain
import numpy as np

from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.schedule import RowSchedule
from dpo_flax.data.prepare import PreparedData

Shards = int | tuple[int, ...]  # one of the equal parts of a batch's rows, or several

_AHEAD = 4  # batches prepared before they are asked for
_ENDLESS = 1 << 50  # rows: more than any run takes


def train_batches(
  prepared: PreparedData,
  *,
  start_step: int,
  shard_index: Shards,
  shard_count: int,
  workers: int = 0,  # processes that fill rows; 0: in this one
) -> grain.DatasetIterator:
  """Returns an endless iterator over this shard's part of batch start_step, start_step + 1, ...

  Each batch is pack.fill_batch's dict of [batch.rows / shard_count, ...] arrays: the rows of the
  global batch in order, shard after shard. With several shard indices, their rows follow one
  another in that order. Close the iterator when done.
  """
  rows = _shard(prepared.rows.rows, shard_index, shard_count)
  batches = _Batches(prepared.train, prepared.train_rows, rows, start_step)
  return _iterate(batches, workers)


def validation_batches(
  prepared: PreparedData, *, shard_index: Shards, shard_count: int
) -> grain.DatasetIterator:
  """Returns an iterator over every validation pair once; the last batch ends in empty rows."""
  return every_pair(prepared, 'validation', shard_index=shard_index, shard_count=shard_count)


def every_pair(
  prepared: PreparedData, side: str, *, shard_index: Shards, shard_count: int
) -> grain.DatasetIterator:
  """Returns an iterator over every pair of a side once, in the rows of `prepared.every_row(side)`.

  The last batch ends in empty rows.
  """
  rows = _shard(prepared.rows.rows, shard_index, shard_count)
  end = len(prepared.every_row(side))
  return _iterate(_Batches(getattr(prepared, side), prepared.one_pass[side], rows, end=end))


def steps_for_epochs(prepared: PreparedData, num_epochs: float) -> int:
  """Returns the steps in which so many epochs are seen, the last batch being full."""
  fraction, complete = math.modf(num_epochs)
  rows = prepared.train_rows.start(int(complete))
  if fraction:
    rows += fraction * len(prepared.train_rows.plan(int(complete)))
  return math.ceil(rows / prepared.rows.rows)


@dataclasses.dataclass
class _Batches:
  """Batch after batch, by number: the source of the Grain pipeline."""

  pairs: split.Side
  schedule: RowSchedule
  rows: list[int]  # of the global batch: this shard's
  start: int = 0  # step of batch 0
  end: int = _ENDLESS  # rows that the schedule gives; those behind are empty

  def __len__(self) -> int:
    return math.ceil(self.end / self.schedule.options.rows)

  def __getitem__(self, index: int) -> pack.Batch:
    options = self.schedule.options
    first = (self.start + index) * options.rows
    numbers = [first + row for row in self.rows]
    nothing = np.zeros(0, np.int32)
    indices = [self.schedule.row(n) if n < self.end else nothing for n in numbers]
    pairs = iter(self.pairs.packed_pairs(np.concatenate(indices)))
    batch = pack.fill_batch(
      [list(itertools.islice(pairs, len(row))) for row in indices],
      tokens=options.tokens,
      pairs_per_row=self.schedule.pairs_per_row,
      layout=options.layout,
      columns=self.pairs.columns,
    )
    if self.pairs.reference_logps is not None:
      logps = np.zeros(batch['answer_mask'].shape, np.float32)
      for row, answers, pairs_of_row in zip(logps, batch['pairs'], indices, strict=True):
        row[answers[: len(pairs_of_row)]] = self.pairs.reference_logps[pairs_of_row]
      batch['reference_logps'] = logps
    return batch


def _iterate(batches: _Batches, workers: int = 0) -> grain.DatasetIterator:
  dataset = grain.MapDataset.source(batches).to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
  )
  if workers:
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
    dataset = dataset.mp_prefetch(options)
  return iter(dataset)


def _shard(rows: int, index: Shards, count: int) -> list[int]:
  size, rest = divmod(rows, count)
  if rest:
    raise ValueError(f'batch.rows={rows} cannot be divided among {count} hosts: make it a multiple')
  shards = (index,) if isinstance(index, int) else index
  return [row for shard in shards for row in range(shard * size, (shard + 1) * size)]
