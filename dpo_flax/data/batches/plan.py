"""Lengths -> a plan of rows: which pairs share one.

Packing is best-fit decreasing, window by window, on counts of equal lengths instead of single
pairs: one step places pairs of one length in all rows with the same contents, so that the time
grows with the number of distinct lengths, not of pairs.
"""

import dataclasses

import numpy as np


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
  pairs, sizes = [order[:0]], [np.zeros(0, np.int64)]
  for start in range(0, len(order), window):
    block = order[start : start + window]
    packed, counts = _pack_window(lengths[block], tokens, pairs_per_row or window)
    pairs.append(block[packed])
    sizes.append(counts)
  return RowPlan(np.concatenate(pairs), np.append(0, np.cumsum(np.concatenate(sizes))))


def reorder(plan: RowPlan, rows: np.ndarray) -> RowPlan:
  """Returns the plan with its rows in another order."""
  sizes = np.diff(plan.starts)[rows]
  starts = np.append(0, np.cumsum(sizes))
  index = np.arange(starts[-1]) + np.repeat(plan.starts[rows] - starts[:-1], sizes)
  return RowPlan(plan.pairs[index], starts)


def _pack_window(lengths: np.ndarray, tokens: int, cap: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions of the window's pairs row after row, [n], and pairs per row, [rows]."""
  groups = _pack_lengths(lengths, tokens, cap)
  contents = [np.tile(np.array(content, np.int32), rows) for content, rows in groups]
  sizes = np.concatenate([np.full(rows, len(content)) for content, rows in groups])
  slots = np.argsort(np.concatenate(contents), kind='stable')  # slots of a length, all together
  packed = np.empty(len(lengths), np.int32)
  packed[slots] = np.argsort(lengths, kind='stable')  # meet the pairs of that length
  return packed, sizes


def _pack_lengths(lengths: np.ndarray, tokens: int, cap: int) -> list[tuple[tuple[int, ...], int]]:
  """Returns (the lengths in a row, how many rows are filled so): best-fit decreasing."""
  found, counts = np.unique(lengths, return_counts=True)
  open_rows: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # room -> rows with that much left
  rooms = 0  # bit r is set when rows with room r are open
  done = []
  for length, count in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
    left = count
    while left:
      above = rooms >> length
      if above:
        room = length + (above & -above).bit_length() - 1  # the smallest that is large enough
        content, rows = open_rows[room].pop()
        copies, used = 1, min(rows, left)
        if used < rows:
          open_rows[room].append((content, rows - used))
        if not open_rows[room]:
          rooms &= ~(1 << room)
      else:
        room, content = tokens, ()
        copies = max(1, min(left, tokens // length, cap))
        used = left // copies
      left -= used * copies
      content += (length,) * copies
      rest = room - copies * length
      if rest and len(content) < cap:
        open_rows.setdefault(rest, []).append((content, used))
        rooms |= 1 << rest
      else:
        done.append((content, used))
  return done + [group for groups in open_rows.values() for group in groups]
