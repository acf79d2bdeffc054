"""Data files -> all that a run needs of them: tokenized, divided, planned, and counted."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.epochs import Epochs
from dpo_flax.data.batches.mixture import Mixture
from dpo_flax.data.cache.build_cache import open_or_build
from dpo_flax.data.cache.token_cache import TokenCache
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer

_SHOWN = 5  # places named in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
  """How records become tokens, and where these are kept."""

  cache_dir: str
  format: FormatOptions
  bad_record: str = 'raise'  # raise | skip
  workers: int = 0  # processes that tokenize; 0: one a core, for much data


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
class PreparedData:
  """All that a run needs of its data."""

  tokenizer: Tokenizer
  train: split.Split
  validation: split.Split | None
  train_rows: Epochs
  once: dict[str, Epochs]  # side -> rows that hold each of its pairs once: an evaluation
  pairs_per_row: int  # slots of every batch, train and validation
  rows: RowOptions
  fingerprint: str  # SHA-256 of data, tokenizer, template and all settings that decide the order
  report: dict[str, dict[str, Any]]  # for 'train' and 'validation': counts, places, padding

  def every_row(self, side: str) -> pack.RowPlan:
    """Returns the rows of `every_pair`: which places of the side's split each of them holds."""
    return self.once[side].plan(0)

  def where(self, side: str, pair_index: int) -> str:
    """Returns 'file:line' of a record of side 'train' or 'validation', by its pair_index."""
    cache = getattr(self, side).cache
    pair = int(np.searchsorted(cache.records, pair_index))
    if pair == len(cache) or cache.records[pair] != pair_index:
      raise ValueError(f'no {side} pair has pair_index {pair_index}.')
    return cache.where(pair)


def prepare(
  source: RecordSource,
  tokenizer: Tokenizer,
  *,
  validation: RecordSource | None = None,  # None: held out of the source
  validation_split_fraction: float = 0.0,  # of the pairs; 0: none
  reading: ReadOptions,
  rows: RowOptions,
  vocab_size: int,
) -> PreparedData:
  """Tokenizes the data or opens its cache, holds out the validation pairs and plans the rows.

  Args:
    source: the training pairs.
    tokenizer: of the model.
    validation: the validation pairs, where they have files of their own.
    validation_split_fraction: what is held out of the source, where they have none.
    reading: how records are read.
    rows: how pairs are laid into rows.
    vocab_size: rows of the model's embedding.

  Raises:
    ValueError: for all that is wrong with the data, naming file and line.
  """
  cache = _open(source, tokenizer, reading, vocab_size)
  held_out, chosen = cache, None
  pairs = np.arange(len(cache), dtype=np.int32)
  held = np.zeros(len(cache), bool)
  if validation is not None:
    held_out = _open(validation, tokenizer, reading, vocab_size)
    chosen = np.arange(len(held_out), dtype=np.int32)
  elif validation_split_fraction:
    held = split.hold_out(cache.prompts, validation_split_fraction, rows.seed)
    chosen = pairs[held]
  train_side = _fit(cache, pairs[~held], tokenizer, rows)
  held_side = None if chosen is None else _fit(held_out, chosen, tokenizer, rows)
  train_rows = _epochs(
    train_side,
    train_side.mixture(source.weights, source.parts),
    rows,
    shuffle=rows.shuffle,
    slots=rows.pairs_per_row if rows.pack else 1,
  )
  slots = train_rows.pairs_per_row
  report = {'train': _report(train_side, train_rows.plan(0), rows)}
  once = {'train': _once(train_side, rows, slots)}
  if held_side:
    once['validation'] = _once(held_side, rows, slots)
    report['validation'] = _report(held_side, once['validation'].plan(0), rows)
  return PreparedData(
    tokenizer,
    train_side,
    held_side,
    train_rows,
    once,
    pairs_per_row=slots,
    rows=rows,
    fingerprint=_fingerprint(
      source, cache, held_side and held_out, rows, validation_split_fraction
    ),
    report=report,
  )


def _epochs(
  pairs: split.Split, mixture: Mixture, rows: RowOptions, *, shuffle: bool, slots: int
) -> Epochs:
  return Epochs(
    pairs.lengths,
    mixture,
    tokens=rows.tokens,
    layout=rows.layout,
    seed=rows.seed,
    pack=rows.pack,
    shuffle=shuffle,
    pairs_per_row=slots,
  )


def _once(pairs: split.Split, rows: RowOptions, slots: int) -> Epochs:
  """The rows in which each pair stands once, in order."""
  whole = pairs.mixture((1.0,), [0] * len(pairs.cache.files))
  return _epochs(pairs, whole, rows, shuffle=False, slots=slots)


def _open(
  source: RecordSource, tokenizer: Tokenizer, reading: ReadOptions, vocab_size: int
) -> TokenCache:
  cache = open_or_build(
    source,
    tokenizer,
    directory=reading.cache_dir,
    options=reading.format,
    bad_record=reading.bad_record,
    workers=reading.workers,
  )
  cache.check_ids(vocab_size)
  return cache


def _fit(
  cache: TokenCache, pairs: np.ndarray, tokenizer: Tokenizer, rows: RowOptions
) -> split.Split:
  return split.fit(
    cache,
    pairs,
    tokens=rows.tokens,
    layout=rows.layout,
    too_long=rows.too_long,
    bos_id=tokenizer.bos_id,
  )


def _report(pairs: split.Split, plan: pack.RowPlan, rows: RowOptions) -> dict[str, Any]:
  tokens = int(pack.row_lengths(pairs.lengths, rows.layout)[plan.pairs].sum())
  return {
    **dataclasses.asdict(pairs.cache.report),  # of the files, before they are divided
    'pairs': len(pairs),
    'too_long': len(pairs.dropped),
    'too_long_examples': list(pairs.dropped[:_SHOWN]),
    'truncated': len(pairs.truncated),
    'truncated_examples': list(pairs.truncated[:_SHOWN]),
    'rows': len(plan),
    'tokens': tokens,
    'padding_fraction': 1 - tokens / (len(plan) * rows.tokens),
    'pairs_per_row': plan.pairs_per_row,
  }


def _fingerprint(
  source: RecordSource,
  train: TokenCache,
  validation: TokenCache | None,
  rows: RowOptions,
  validation_split_fraction: float,
) -> str:
  parts = [
    train.fingerprint,
    [source.weights, source.parts],
    validation and validation.fingerprint,
    [rows.seed, validation_split_fraction, rows.shuffle, rows.layout, rows.pack],
    [rows.too_long, rows.rows, rows.tokens, rows.pairs_per_row],
  ]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
