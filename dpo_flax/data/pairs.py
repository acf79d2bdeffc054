"""Tokenized pairs and packed batches, for training loops of one's own."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dpo_flax.data import loader
from dpo_flax.data.batches.pack import LAYOUTS, Batch, PackedPair, pack_pairs
from dpo_flax.data.prepare import PreparedData

# Token ids of prompt, chosen and rejected; or a PackedPair, which may have a weight and a margin.
TokenPair = PackedPair | tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Tokenized preference pairs and the plan of their rows; `load_pairs` makes it.

  >>> from dpo_flax.assembly.library import load_pairs
  >>> pairs = load_pairs('pairs.jsonl', 'hf_llama', tokens=512, rows=8)
  >>> len(pairs), pairs.steps_per_epoch
  (585, 12)
  """

  prepared: PreparedData

  def __len__(self) -> int:
    return len(self.prepared.train)

  def __iter__(self) -> Iterator[PackedPair]:
    """Yields every pair's token ids once, in the order of the files."""
    return iter(self.prepared.train.packed_pairs(np.arange(len(self))))

  @property
  def steps_per_epoch(self) -> int:
    """The steps in which every pair is seen once, the last batch being completed from the next."""
    return loader.steps_for_epochs(self.prepared, 1.0)

  def batches(self, steps: int | None = None, *, start_step: int = 0) -> Iterator[Batch]:
    """Yields batch `start_step` and those after it: batch s is a pure function of s.

    Args:
      steps: how many; None: without end, epoch after epoch.
      start_step: the first, as after a resume.

    Yields:
      The fields of `pack.fill_batch`, NumPy arrays of `rows` rows.

    Raises:
      ValueError: a number is negative.
    """
    if start_step < 0 or (steps or 0) < 0:
      raise ValueError(f'steps={steps}, start_step={start_step}: neither can be negative')
    batches = loader.train_batches(
      self.prepared, start_step=start_step, shard_index=0, shard_count=1
    )
    with contextlib.closing(batches):
      yield from itertools.islice(batches, steps)


def pack(
  pairs: Iterable[TokenPair],
  *,
  tokens: int,
  layout: str = 'shared',
  multiple: int = 1,
) -> Batch:
  """Packs pairs of your own token ids into as few rows as they need.

  >>> batch = pack([([1, 5, 6], [7, 2], [8, 9, 2])], tokens=12)
  >>> print(batch['tokens'])
  [[1 5 6 7 2 6 8 9 2 0 0 0]]
  >>> print(batch['answer_ids'])  # the answer whose next token a position predicts; 2: none
  [[2 2 0 0 2 1 1 1 2 2 2 2]]

  Args:
    pairs: (prompt, chosen, rejected), or PackedPairs with weights and margins.
    tokens: of a row.
    layout: shared (a prompt stands once for both answers) or separate.
    multiple: empty rows make the number of rows a multiple of this.

  Returns:
    The fields of a batch (docs/design.md), NumPy arrays.

  Raises:
    ValueError: there are no pairs; one is longer than a row, has an empty part, or holds what is no
      token id.
  """
  if layout not in LAYOUTS:
    raise ValueError(f'layout={layout!r}: expected one of {", ".join(LAYOUTS)}')
  if tokens < 1 or multiple < 1:
    raise ValueError(f'tokens={tokens}, multiple={multiple}: both must be at least 1')
  packed = packed_pairs(pairs)
  if not packed:
    raise ValueError('there are no pairs to pack')
  return pack_pairs(packed, tokens=tokens, layout=layout, multiple=multiple)


def packed_pairs(pairs: Iterable[TokenPair]) -> list[PackedPair]:
  """Returns pairs of token ids as PackedPairs, each with its index.

  Raises:
    ValueError: a pair has an empty part, or holds what is no token id.
  """
  packed = []
  for index, given in enumerate(pairs):
    pair = given if isinstance(given, PackedPair) else _packed_pair(index, given)
    for name in ('prompt', 'chosen', 'rejected'):
      if not len(getattr(pair, name)):
        raise ValueError(
          f'pair {pair.index}: {name} is empty; it needs a token, if only BOS or EOS'
        )
    packed.append(pair)
  return packed


def _packed_pair(index: int, pair: Sequence[Sequence[int]]) -> PackedPair:
  if len(pair) != 3:
    raise ValueError(f'pair {index} has {len(pair)} parts: expected (prompt, chosen, rejected)')
  parts = {}
  for name, ids in zip(('prompt', 'chosen', 'rejected'), map(np.asarray, pair), strict=True):
    are_ids = ids.ndim == 1 and ids.dtype.kind in 'iu'
    if ids.size and not (are_ids and 0 <= ids.min() <= ids.max() < 2**31):
      raise ValueError(f'pair {index}: {name} is {ids!s:.60}: expected token ids, integers from 0')
    parts[name] = ids.astype(np.int32)
  return PackedPair(index, **parts)
