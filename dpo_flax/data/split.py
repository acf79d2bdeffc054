"""Which pairs of a cache are trained on, which are held out, and what becomes of long ones."""

import dataclasses
import zlib

import numpy as np

from dpo_flax.data import pack
from dpo_flax.data.token_cache import TokenCache

_SOURCES = {'pair_weight': 'weight', 'chosen_probability': 'chosen_probability'}


@dataclasses.dataclass(frozen=True)
class Split:
  """The pairs of one side, train or validation, as places in a token cache."""

  cache: TokenCache
  pairs: np.ndarray  # [n] int32, increasing
  lengths: np.ndarray  # [n, 3] int32, with prompts as long as they are after truncation
  keep_first: bool  # a truncated prompt keeps its first token, BOS
  dropped: tuple[str, ...] = ()  # file:line of pairs too long for a row, in order
  truncated: tuple[str, ...] = ()  # file:line of pairs whose prompt is cut

  def __len__(self) -> int:
    return len(self.pairs)

  @property
  def columns(self) -> tuple[str, ...]:
    """The optional batch fields that the data has."""
    return tuple(name for name, source in _SOURCES.items() if source in self.cache.columns)

  def packed_pair(self, i: int) -> pack.PackedPair:
    """Returns the i-th pair of the split, its prompt cut as planned."""
    pair = self.pairs[i]
    prompt, chosen, rejected = self.cache[pair]
    keep = self.lengths[i, 0]
    if keep < len(prompt):
      first = prompt[: int(self.keep_first)]
      prompt = np.concatenate([first, prompt[len(prompt) - keep + len(first) :]])
    values = {name: self.cache.columns[_SOURCES[name]][pair] for name in self.columns}
    # A record without a value, among others that have one, counts as certain and as one pair.
    values = {name: 1.0 if np.isnan(value) else float(value) for name, value in values.items()}
    return pack.PackedPair(int(self.cache.records[pair]), prompt, chosen, rejected, **values)


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


def hold_out(prompts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Chooses about `fraction` of the pairs for validation, whole prompts at a time.

  Args:
    prompts: [N] uint64, equal for equal prompts.
    fraction: of the pairs, in [0, 1).
    seed: other seeds hold out other prompts.

  Returns:
    [N] bool. No prompt is on both sides, and each side has at least one.

  Raises:
    ValueError: all pairs have the same prompt.
  """
  unique, prompt, count = np.unique(prompts, return_inverse=True, return_counts=True)
  if len(unique) < 2:
    raise ValueError(
      'all pairs have the same prompt, so none can be held out without being trained on: set '
      'data.validation, or data.validation_split_fraction=0.'
    )
  order = np.argsort(hashed(unique, 'validation', seed), kind='stable')
  wanted = fraction * len(prompts)
  taken = int(np.searchsorted(np.cumsum(count[order]), wanted)) + 1
  held = np.zeros(len(unique), bool)
  held[order[: min(taken, len(unique) - 1)]] = True
  return held[prompt]


def fit(
  cache: TokenCache,
  pairs: np.ndarray,
  *,
  tokens: int,
  layout: str,
  too_long: str,
  bos_id: int | None,
) -> Split:
  """Returns the pairs as a Split, after deciding on those longer than a row.

  `drop` leaves them out. `truncate_prompt` cuts the beginning of the prompt, behind BOS: its end
  is what the response answers. Responses are never cut, so a pair whose responses leave no room for
  a prompt is dropped. Either way the places are reported.

  Raises:
    ValueError: under `raise`, naming the first pair; or if no pair is left.
  """
  lengths = cache.lengths[pairs]
  need = pack.row_lengths(lengths, layout)
  long = np.flatnonzero(need > tokens)
  places = [cache.where(pair) for pair in pairs[long]]
  if len(long) and too_long == 'raise':
    raise ValueError(
      f'{places[0]}: the pair takes {need[long[0]]} tokens in the {layout} layout, and a row has '
      f'{tokens} ({len(long)} of {len(pairs)} pairs are too long; the longest takes {need.max()}). '
      'Raise batch.tokens, or set data.too_long to drop or truncate_prompt.'
    )
  keep_first = bos_id is not None and all(cache[pair][0][0] == bos_id for pair in pairs[long])
  cut = np.zeros(len(pairs), bool)
  if too_long == 'truncate_prompt':
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
  return Split(
    cache,
    pairs[kept],
    lengths[kept],
    keep_first,
    dropped=tuple(place for place, i in zip(places, long, strict=True) if not cut[i]),
    truncated=tuple(place for place, i in zip(places, long, strict=True) if cut[i]),
  )
