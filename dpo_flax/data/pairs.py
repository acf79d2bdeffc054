"""Preference files -> tokenized pairs and packed batches, for training loops of one's own."""

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_flax.data import loader
from dpo_flax.data.batches.pack import Batch, PackedPair, pack_pairs
from dpo_flax.data.prepare import PreparedData, ReadOptions, RowOptions, prepare
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import load_tokenizer

# Token ids of prompt, chosen and rejected; or a PackedPair, which may have a weight and a margin.
TokenPair = PackedPair | tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Tokenized preference pairs and the plan of their rows; `load_pairs` makes it.

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
    """
    batches = loader.train_batches(
      self.prepared, start_step=start_step, shard_index=0, shard_count=1
    )
    with contextlib.closing(batches):
      yield from itertools.islice(batches, steps)


def load_pairs(
  files: str | Sequence[str] | Mapping[str, float],
  tokenizer: str,
  *,
  tokens: int,
  rows: int,
  layout: str = 'shared',
  seed: int = 0,
  shuffle: bool = True,
  format: str = 'auto',
  fields: Mapping[str, str] | None = None,
  chat_template: str | None = None,
  template_variables: Mapping[str, Any] | None = None,
  too_long: str = 'raise',
  bad_record: str = 'raise',
  cache_dir: str | None = None,
) -> Pairs:
  """Reads and tokenizes preference files, and plans their rows.

  >>> pairs = load_pairs('pairs.jsonl', 'hf_llama', tokens=512, rows=8)
  >>> for batch in pairs.batches(steps=2):
  ...   print(batch['tokens'].shape)
  (8, 512)
  (8, 512)

  Args:
    files: a path, a glob or several; or a mixture, path -> passes over it in an epoch.
    tokenizer: a directory in Hugging Face layout, or a tokenizer file.
    tokens: of a row.
    rows: of a batch.
    layout: shared (a prompt stands once for both answers) or separate.
    seed: of the order of the pairs.
    shuffle: whether each epoch has an order of its own.
    format: of the records: auto, explicit, implicit, messages, hh, ...
    fields: keys that have other names in the records, {'chosen': 'good'}.
    chat_template: a file, or the template itself; None: the tokenizer's.
    template_variables: what the template is given besides the messages.
    too_long: what becomes of a pair longer than a row: raise, drop or truncate_prompt.
    bad_record: what becomes of a record that cannot be read: raise or skip.
    cache_dir: keeps the token ids for the next time; None: a temporary directory.

  Raises:
    ValueError: for all that is wrong with the data, naming file and line.
  """
  if isinstance(files, Mapping):
    source = RecordSource(list(files), list(files.values()))
  else:
    source = RecordSource(files)
  loaded = load_tokenizer(tokenizer, chat_template, variables=template_variables)
  directory = cache_dir or tempfile.mkdtemp(prefix='dpo_flax_tokens')
  prepared = prepare(
    source,
    loaded,
    reading=ReadOptions(
      cache_dir=directory,
      format=FormatOptions(format, dict(fields or {})),
      bad_record=bad_record,
    ),
    rows=RowOptions(
      rows=rows, tokens=tokens, layout=layout, shuffle=shuffle, too_long=too_long, seed=seed
    ),
    vocab_size=loaded.vocab_size,
  )
  pairs = Pairs(prepared)
  if not cache_dir:  # it lives as long as its tokens are read
    weakref.finalize(pairs, shutil.rmtree, directory, ignore_errors=True)
  return pairs


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
    ValueError: a pair is longer than a row, or has no prompt.
  """
  return pack_pairs(packed_pairs(pairs), tokens=tokens, layout=layout, multiple=multiple)


def packed_pairs(pairs: Iterable[TokenPair]) -> list[PackedPair]:
  """Returns pairs of token ids as PackedPairs, each with its index.

  Raises:
    ValueError: a pair has no prompt.
  """
  packed = []
  for index, given in enumerate(pairs):
    if isinstance(given, PackedPair):
      pair = given
    else:
      prompt, chosen, rejected = (np.asarray(ids, np.int32) for ids in given)
      pair = PackedPair(index, prompt, chosen, rejected)
    if not len(pair.prompt):
      raise ValueError(
        f'pair {pair.index} has no prompt: one token, such as BOS, must predict from'
      )
    packed.append(pair)
  return packed
