"""The most rows, and the least recomputation, that fit the chips of a slice."""

from collections.abc import Callable
from typing import Any

from dpo_flax.planning.estimate import Estimate

_REMATS = ('none', 'dots', 'full', 'offload')  # from the least recomputed to the least kept
_MOST_ROWS = 64  # of one chip
_GIB = 2**30


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
  best = None
  for remat in _REMATS:

    def attempt(rows: int, remat: str = remat) -> Estimate:
      changes = {'batch.rows': rows * shards, 'batch.microbatches': 1, 'model.remat': remat}
      found = estimate(**changes)
      needed = found.peak_hbm_bytes and f'{found.peak_hbm_bytes / _GIB:.2f} GiB'
      report(
        f'remat {remat}, {rows} rows a chip: {"fits" if found.fits else "does not fit"}, {needed}'
      )
      return found

    rows, found = _most_rows(attempt)
    if rows and (best is None or _work(found, rows) < _work(best[1], best[0]['rows'])):
      best = {'remat': remat, 'rows': rows}, found
  if best is None:
    raise ValueError(
      f'not one row of batch.tokens={tokens} fits a chip: plan without --search says what to change'
    )
  changes = {
    'batch.rows': best[0]['rows'] * shards,
    'batch.microbatches': 1,
    'model.remat': best[0]['remat'],
  }
  return changes, best[1]


def _work(found: Estimate, rows: int) -> float:
  return found.estimated_cycles / rows


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
  sized = {rows: one for rows, one in tried.items() if one.peak_hbm_bytes}
  capacity = next(iter(tried.values())).hbm_capacity_bytes
  fitting = sorted(rows for rows, one in sized.items() if one.fits)
  if not fitting:
    return 1
  last = fitting[-1]
  if len(fitting) == 1:
    per_row = sized[last].temp_bytes / last
  else:
    before = fitting[-2]
    per_row = (sized[last].peak_hbm_bytes - sized[before].peak_hbm_bytes) / (last - before)
  return last + int((capacity - sized[last].peak_hbm_bytes) / max(per_row, 1))
