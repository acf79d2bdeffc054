"""Lengths -> a plan of rows; planned rows -> the arrays of a packed batch.

  shared:    [ prefix | p_last chosen... | p_last rejected... ]   prefix = prompt[:-1]
  separate:  [ prompt chosen... ] [ prompt rejected... ]

Packing is best-fit decreasing, window by window, on counts of equal lengths instead of single
pairs: one step places pairs of one length in all rows with the same contents, so that the time
grows with the number of distinct lengths, not of pairs.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

LAYOUTS = ('shared', 'separate')

Batch = dict[str, np.ndarray]


class PackedPair(NamedTuple):
  """A tokenized pair on its way into a row; ~id where a response token is no target."""

  index: int  # of the record in its source
  prompt: np.ndarray  # [P] int32
  chosen: np.ndarray  # [C] int32
  rejected: np.ndarray  # [R] int32
  pair_weight: float = 1.0
  chosen_probability: float = 1.0


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """Which pairs share a row: row i holds pairs[starts[i]:starts[i + 1]]."""

  pairs: np.ndarray  # [N] int32
  starts: np.ndarray  # [rows + 1] int64

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.pairs[self.starts[row] : self.starts[row + 1]]

  @property
  def pairs_per_row(self) -> int:
    """The largest number of pairs in a row."""
    return int(np.diff(self.starts).max(initial=0))


def row_lengths(lengths: np.ndarray, layout: str) -> np.ndarray:
  """Returns the tokens each pair takes in a row, [N], from [N, 3] prompt, chosen, rejected."""
  prompt, chosen, rejected = lengths.T
  # The shared layout holds the prompt once, and its last token once more for the second branch.
  prompts = prompt + 1 if layout == 'shared' else 2 * prompt
  return prompts + chosen + rejected


def plan_rows(
  lengths: np.ndarray,  # [N] tokens each pair takes, all <= tokens
  *,
  tokens: int,
  pairs_per_row: int = 0,  # at most; 0: any number
  order: np.ndarray | None = None,  # [N] the pairs as they enter the windows; None: 0 .. N - 1
  window: int = 1 << 16,  # pairs packed together; 0: one pair per row
) -> RowPlan:
  """Assigns every pair to one row. Pairs of a window stay together, so order survives roughly."""
  order = np.arange(len(lengths), dtype=np.int32) if order is None else order.astype(np.int32)
  if not window:
    return RowPlan(order, np.arange(len(order) + 1))
  if len(lengths):
    assert lengths.min() > 0 and lengths.max() <= tokens, 'a pair that fits no row'
  pairs, sizes = [], []
  for start in range(0, len(order), window):
    block = order[start : start + window]
    packed, counts = _pack_window(lengths[block], tokens, pairs_per_row or window)
    pairs.append(block[packed])
    sizes.append(counts)
  starts = np.zeros(sum(map(len, sizes)) + 1, np.int64)
  if pairs:
    np.cumsum(np.concatenate(sizes), out=starts[1:])
  return RowPlan(np.concatenate(pairs) if pairs else order, starts)


def reorder(plan: RowPlan, rows: np.ndarray) -> RowPlan:
  """Returns the plan with its rows in another order."""
  sizes = np.diff(plan.starts)[rows]
  starts = np.zeros(len(rows) + 1, np.int64)
  np.cumsum(sizes, out=starts[1:])
  index = np.arange(starts[-1]) + np.repeat(plan.starts[rows] - starts[:-1], sizes)
  return RowPlan(plan.pairs[index], starts)


def _pack_window(lengths: np.ndarray, tokens: int, cap: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions of the window's pairs row after row, [n], and pairs per row, [rows]."""
  groups = _pack_lengths(lengths, tokens, cap)
  contents = [np.tile(np.array(content, np.int32), rows) for content, rows in groups]
  sizes = np.concatenate([np.full(rows, len(content)) for content, rows in groups])
  slots = np.argsort(np.concatenate(contents), kind='stable')  # places of a length, all together
  packed = np.empty(len(lengths), np.int32)
  packed[slots] = np.argsort(lengths, kind='stable')  # meet the pairs of that length
  return packed, sizes


def _pack_lengths(lengths: np.ndarray, tokens: int, cap: int) -> list[tuple[list[int], int]]:
  """Returns (the lengths in a row, how many rows are filled so): best-fit decreasing."""
  found, counts = np.unique(lengths, return_counts=True)
  # room -> rows with that much left, in groups (contents as a chain, pairs in it, number of rows)
  open_rows: dict[int, list[tuple[tuple, int, int]]] = {}
  rooms = 0  # bit r is set when rows with room r are open
  done = []
  for length, count in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
    left = count
    while left:
      above = rooms >> length
      if above:
        room = length + (above & -above).bit_length() - 1  # the smallest that is large enough
        chain, n, rows = open_rows[room].pop()
        copies = 1
      else:
        room, chain, n, rows = tokens, (), 0, left
        copies = max(1, min(left, tokens // length, cap))
        rows = left // copies
      used = min(rows, left // copies)
      if above and used < rows:
        open_rows[room].append((chain, n, rows - used))
      if above and not open_rows[room]:
        rooms &= ~(1 << room)
      left -= used * copies
      group = (chain, length, copies), n + copies, used
      rest = room - copies * length
      if rest and group[1] < cap:
        open_rows.setdefault(rest, []).append(group)
        rooms |= 1 << rest
      else:
        done.append(group)
  done += [group for groups in open_rows.values() for group in groups]
  return [(_unchain(chain), rows) for chain, _, rows in done]


def _unchain(chain: tuple) -> list[int]:
  content = []
  while chain:
    chain, length, copies = chain
    content += [length] * copies
  return content[::-1]


def fill_row(pairs: Iterable[PackedPair], *, tokens: int, pairs_per_row: int, layout: str) -> Batch:
  """Returns the arrays of one row: fill_batch without its first axis."""
  batch = fill_batch([pairs], tokens=tokens, pairs_per_row=pairs_per_row, layout=layout)
  return {name: array[0] for name, array in batch.items()}


def fill_batch(
  rows: Sequence[Iterable[PackedPair]],
  *,
  tokens: int,
  pairs_per_row: int,
  layout: str,
  columns: tuple[str, ...] = (),  # of pair_weight, chosen_probability: those the data has
) -> Batch:
  """Fills B rows of T tokens and P pair slots.

  Returns:
    tokens, positions, visible_until, targets, sequence_ids [B, T] int32; loss_mask [B, T] float32;
    pair_mask [B, P] float32; pair_index [B, P] int32; each of `columns` [B, P] float32.
  """
  batch = _empty_batch(len(rows), tokens, pairs_per_row)
  for name in columns:
    batch[name] = np.ones((len(rows), pairs_per_row), np.float32)
  fill = _fill_shared if layout == 'shared' else _fill_separate
  steps = np.arange(tokens, dtype=np.int32)
  for r, row in enumerate(rows):
    views = {name: batch[name][r] for name in _TOKEN_FIELDS}
    start = 0
    for slot, pair in enumerate(row):
      start = fill(views, start, slot, pair, steps)
      batch['pair_mask'][r, slot] = 1.0
      batch['pair_index'][r, slot] = pair.index
      for name in columns:
        batch[name][r, slot] = getattr(pair, name)
  return batch


_TOKEN_FIELDS = ('tokens', 'positions', 'visible_until', 'targets', 'loss_mask', 'sequence_ids')


def _empty_batch(rows: int, tokens: int, slots: int) -> Batch:
  shape = (rows, tokens)
  visible = np.arange(1, tokens + 1, dtype=np.int32)  # padding sees itself alone
  return {
    'tokens': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
    'visible_until': np.tile(visible, (rows, 1)),
    'targets': np.zeros(shape, np.int32),
    'loss_mask': np.zeros(shape, np.float32),
    'sequence_ids': np.full(shape, 2 * slots, np.int32),
    'pair_mask': np.zeros((rows, slots), np.float32),
    'pair_index': np.full((rows, slots), -1, np.int32),
  }


def _fill_shared(row: Batch, start: int, slot: int, pair: PackedPair, steps: np.ndarray) -> int:
  prefix = len(pair.prompt) - 1
  chosen = start + prefix  # where p_last stands before chosen
  rejected = chosen + 1 + len(pair.chosen)  # and where it stands again before rejected
  end = rejected + 1 + len(pair.rejected)
  row['tokens'][start : chosen + 1] = pair.prompt
  row['tokens'][rejected] = pair.prompt[-1]
  row['positions'][start:rejected] = steps[: rejected - start]
  row['positions'][rejected:end] = steps[prefix : prefix + end - rejected]
  row['visible_until'][start:chosen] = end
  row['visible_until'][chosen:rejected] = rejected
  row['visible_until'][rejected:end] = end
  _fill_response(row, chosen + 1, 2 * slot, pair.chosen)
  _fill_response(row, rejected + 1, 2 * slot + 1, pair.rejected)
  return end


def _fill_separate(row: Batch, start: int, slot: int, pair: PackedPair, steps: np.ndarray) -> int:
  for branch, response in enumerate((pair.chosen, pair.rejected)):
    begin = start + len(pair.prompt)
    end = begin + len(response)
    row['tokens'][start:begin] = pair.prompt
    row['positions'][start:end] = steps[: end - start]
    row['visible_until'][start:end] = end
    _fill_response(row, begin, 2 * slot + branch, response)
    start = end
  return start


def _fill_response(row: Batch, begin: int, sequence: int, response: np.ndarray) -> None:
  """Writes the response's tokens from `begin`; each is the target of the position before it."""
  before = slice(begin - 1, begin - 1 + len(response))
  if response.min() >= 0:
    row['tokens'][begin : begin + len(response)] = response
    row['targets'][before] = response
    row['loss_mask'][before] = 1.0
    row['sequence_ids'][before] = sequence
    return
  target = response >= 0
  row['tokens'][begin : begin + len(response)] = np.where(target, response, ~response)
  row['targets'][before] = np.where(target, response, 0)
  row['loss_mask'][before] = target
  row['sequence_ids'][before][target] = sequence
