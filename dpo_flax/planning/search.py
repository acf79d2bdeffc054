"""The most rows, and the least recomputation, that fit the chips of a slice."""

import functools
from collections.abc import Callable
from typing import Any

from dpo_flax.planning.estimate import Estimate

_REMATS = ('none', 'dots', 'full', 'offload')  # from the least recomputed to the least kept
_MOST_ROWS = 64  # of one chip


def largest(
  estimate: Callable[..., Estimate],  # of the step with fields of the config changed
  *,
  shards: int,  # of a batch's rows
  tokens: int,  # of a row, for the message
  report: Callable[[str], None],
) -> tuple[dict[str, Any], Estimate]:
  """Returns the changes to the config, and their cost, with the least work per row that fits.

  For each remat it looks for the most rows a chip can take at once. Every try is a compilation.

  Raises:
    ValueError: not even one row fits.
  """

  def changes(rows: int, remat: str) -> dict[str, Any]:
    return {'batch.rows': rows * shards, 'batch.microbatches': 1, 'model.remat': remat}

  def attempt(remat: str, rows: int) -> Estimate:
    found = estimate(**changes(rows, remat))
    needed = found.peak_hbm_bytes and f'{found.peak_hbm_bytes / 2**30:.2f} GiB'
    fits = 'fits' if found.fits else 'does not fit'
    report(f'remat {remat}, {rows} rows a chip: {fits}, {needed}')
    return found

  fitting: list[tuple[float, dict[str, Any], Estimate]] = []  # cycles of a row, changes, cost
  for remat in _REMATS:
    rows, found = _most_rows(functools.partial(attempt, remat))
    if found is not None and found.estimated_cycles is not None:
      fitting.append((found.estimated_cycles / rows, changes(rows, remat), found))
  if not fitting:
    raise ValueError(
      f'not one row of batch.tokens={tokens} fits a chip: plan without --search says what to change'
    )
  _, best, found = min(fitting, key=lambda one: one[0])
  return best, found


def _most_rows(attempt: Callable[[int], Estimate]) -> tuple[int, Estimate | None]:
  """Returns the largest number of rows that fits, and its cost; 0 and None if 1 does not."""
  tried: dict[int, Estimate] = {}
  low, high = 0, _MOST_ROWS + 1  # fits, does not fit
  rows = 1
  while high - low > 1:
    tried[rows] = attempt(rows)
    low, high = (rows, high) if tried[rows].fits else (low, rows)
    rows = min(max(_guess(tried), low + 1), high - 1)
  return low, tried.get(low)


def _guess(tried: dict[int, Estimate]) -> int:
  """Returns how many rows should fit, memory being nearly linear in them."""
  fitting = sorted(
    (rows, one.peak_hbm_bytes, one.temp_bytes or 0)
    for rows, one in tried.items()
    if one.fits and one.peak_hbm_bytes
  )
  if not fitting:
    return 1
  capacity = next(iter(tried.values())).hbm_capacity_bytes
  last, peak, temporaries = fitting[-1]
  if len(fitting) == 1:
    per_row = temporaries / last
  else:
    before, peak_before, _ = fitting[-2]
    per_row = (peak - peak_before) / (last - before)
  return last + int((capacity - peak) / max(per_row, 1))
