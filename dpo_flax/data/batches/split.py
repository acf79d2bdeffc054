"""Which pairs of a cache are trained on, which are held out, and what becomes of long ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_flax.data.batches import pack
from dpo_flax.data.batches.schedule import Mixture, RowOptions, hashed
from dpo_flax.data.cache.token_cache import TokenCache


@dataclasses.dataclass(frozen=True)
class Side:
  """The pairs of one side, train or validation, as indices into a token cache."""

  cache: TokenCache
  pairs: np.ndarray  # [n] int32, increasing
  lengths: np.ndarray  # [n, 3] int32, with prompts as long as they are after truncation
  keep_first: bool  # a truncated prompt keeps its first token, BOS
  dropped: tuple[str, ...] = ()  # file:line of pairs too long for a row, in order
  truncated: tuple[str, ...] = ()  # file:line of pairs whose prompt is cut
  reference_logps: np.ndarray | None = None  # [n, 2] float32 chosen, rejected; None: not computed

  def __len__(self) -> int:
    return len(self.pairs)

  @property
  def columns(self) -> tuple[str, ...]:
    """The optional batch fields that the data has."""
    fields = pack.PackedPair._field_defaults
    return tuple(name for name in fields if _column(name) in self.cache.columns)

  def mixture(self, weights: Sequence[float], parts: Sequence[int]) -> Mixture:
    """Divides the pairs by their files; `parts` gives the part of the mixture of each file."""
    part = np.array(parts)[self.cache.file[self.pairs]]
    return Mixture(tuple(np.flatnonzero(part == i) for i in range(len(weights))), tuple(weights))

  def packed_pairs(self, indices: np.ndarray) -> list[pack.PackedPair]:
    """Returns pairs of the side, their prompts cut as planned."""
    pairs, keep = self.pairs[indices], self.lengths[indices, 0]
    prompts = self.cache.lengths[pairs, 0]
    ids = self.cache.many(pairs)
    for n in np.flatnonzero(keep < prompts):
      prompt, chosen, rejected = ids[n]
      first = prompt[: int(self.keep_first)]
      end = prompt[len(prompt) - keep[n] + len(first) :]
      ids[n] = np.concatenate([first, end]), chosen, rejected
    records = self.cache.records[pairs].tolist()
    # A record without a column has the defaults where others have it.
    values = [
      np.nan_to_num(self.cache.columns[_column(name)][pairs], nan=missing).tolist()
      if name in self.columns
      else [missing] * len(pairs)
      for name, missing in pack.PackedPair._field_defaults.items()
    ]
    return [
      pack.PackedPair(record, *pair, *value)
      for record, pair, *value in zip(records, ids, *values, strict=True)
    ]


def _column(field: str) -> str:
  """Returns the record's column behind an optional field of the batch."""
  return field.removeprefix('pair_')


def hold_out(prompts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Chooses about `fraction` of the pairs for validation, all pairs of a prompt together.

  Args:
    prompts: [N] uint64, equal for equal prompts.
    fraction: of the pairs, in [0, 1).
    seed: other seeds hold out other prompts.

  Returns:
    [N] bool. No prompt is on both sides, and each side has at least one. No more pairs are held out
    than asked for, except where the smallest prompt alone has more: then it is held out.

  Raises:
    ValueError: all pairs have the same prompt.
  """
  unique, prompt, count = np.unique(prompts, return_inverse=True, return_counts=True)
  if len(unique) < 2:
    raise ValueError(
      'all pairs have the same prompt, so none can be held out without being trained on: set '
      'data.validation, or data.validation_split_fraction=0'
    )
  order = np.argsort(hashed(unique, 'validation', seed), kind='stable')
  room = min(round(fraction * len(prompts)), len(prompts) - 1)
  held = np.zeros(len(unique), bool)
  for i, pairs in zip(order.tolist(), count[order].tolist(), strict=True):
    if pairs <= room:
      held[i], room = True, room - pairs
    if not room:
      break
  if not held.any():
    held[order[count[order].argmin()]] = True
  return held[prompt]


def fit(cache: TokenCache, pairs: np.ndarray, rows: RowOptions, *, bos_id: int | None) -> Side:
  """Returns the pairs as a Side, after deciding on those longer than a row.

  `drop` leaves them out. `truncate_prompt` cuts the beginning of the prompt, behind BOS: its end
  is what the response answers. Responses are never cut, so a pair whose responses leave no room for
  a prompt is dropped. Either way their locations are reported.

  Args:
    cache: holds the pairs.
    pairs: their indices in it, increasing.
    rows: the tokens of a row, its layout, and what becomes of long pairs.
    bos_id: what a truncated prompt keeps, where all begin with it.

  Raises:
    ValueError: under `raise`, naming the first pair; or if no pair is left.
  """
  tokens, layout = rows.tokens, rows.layout
  lengths = cache.lengths[pairs]
  need = pack.row_lengths(lengths, layout)
  long = np.flatnonzero(need > tokens)
  where = [cache.where(pair) for pair in pairs[long]]
  if len(long) and rows.too_long == 'raise':
    raise ValueError(
      f'{where[0]}: the pair takes {need[long[0]]} tokens in the {layout} layout, and a row has '
      f'{tokens} ({len(long)} of {len(pairs)} pairs are too long; the longest takes {need.max()}). '
      'Raise batch.tokens, or set data.too_long to drop or truncate_prompt.'
    )
  keep_first = bos_id is not None and all(cache[pair][0][0] == bos_id for pair in pairs[long])
  cut = np.zeros(len(pairs), bool)
  if rows.too_long == 'truncate_prompt':
    copies = 1 if layout == 'shared' else 2
    room = lengths[long, 0] - -((tokens - need[long]) // copies)
    cut[long] = room >= 1 + keep_first
    lengths[long, 0] = room
  kept = (need <= tokens) | cut
  if not kept.any():
    raise ValueError(
      f'none of {len(pairs)} pairs fits a row of {tokens} tokens; the shortest takes {need.min()}. '
      'Raise batch.tokens.'
    )
  return Side(
    cache,
    pairs[kept],
    lengths[kept],
    keep_first,
    dropped=tuple(at for at, i in zip(where, long, strict=True) if not cut[i]),
    truncated=tuple(at for at, i in zip(where, long, strict=True) if cut[i]),
  )
