"""Data files -> all that a run needs of them: tokenized, divided, planned, and counted."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.schedule import RowSchedule
from dpo_flax.data.batches.split import Side
from dpo_flax.data.cache.build_cache import open_or_build
from dpo_flax.data.cache.token_cache import TokenCache
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer

_SHOWN = 5  # locations named in the report


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
  train: Side
  validation: Side | None
  train_rows: RowSchedule
  one_pass: dict[str, RowSchedule]  # side -> rows with each of its pairs once: an evaluation
  rows: RowOptions
  fingerprint: str  # SHA-256 of data, tokenizer, template and all settings that decide the order
  report: dict[str, dict[str, Any]]  # for 'train' and 'validation': counts, locations, padding

  @property
  def pairs_per_row(self) -> int:
    """Slots of every batch, train and validation."""
    return self.train_rows.pairs_per_row

  def every_row(self, side: str) -> pack.RowPlan:
    """Returns the rows of `every_pair`: the indices of the pairs in each of them."""
    return self.one_pass[side].plan(0)

  def where(self, side: str, pair_index: int) -> str:
    """Returns 'file:line' of a record of side 'train' or 'validation', by its pair_index."""
    cache = getattr(self, side).cache
    pair = int(np.searchsorted(cache.records, pair_index))
    if pair == len(cache) or cache.records[pair] != pair_index:
      raise ValueError(f'no {side} pair has pair_index {pair_index}')
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
  other = None if validation is None else _open(validation, tokenizer, reading, vocab_size)
  sides = _divide(cache, other, validation_split_fraction, rows, bos_id=tokenizer.bos_id)
  schedule = functools.partial(
    RowSchedule, tokens=rows.tokens, layout=rows.layout, seed=rows.seed, pack=rows.pack
  )
  train_rows = schedule(
    sides['train'].lengths,
    sides['train'].mixture(source.weights, source.parts),
    shuffle=rows.shuffle,
    pairs_per_row=rows.pairs_per_row if rows.pack else 1,
  )
  slots = train_rows.pairs_per_row
  one_pass, report = {}, {}
  for name, side in sides.items():
    unmixed = side.mixture([1.0], [0] * len(side.cache.files))
    one_pass[name] = schedule(side.lengths, unmixed, shuffle=False, pairs_per_row=slots)
    plan = (train_rows if name == 'train' else one_pass[name]).plan(0)
    report[name] = _report(side, plan, rows)
  validation_side = sides.get('validation')
  parts = [
    cache.fingerprint,
    [source.weights, source.parts],
    validation_side and validation_side.cache.fingerprint,
    [rows.seed, validation_split_fraction, rows.shuffle, rows.layout, rows.pack],
    [rows.too_long, rows.rows, rows.tokens, rows.pairs_per_row],
  ]
  return PreparedData(
    tokenizer,
    sides['train'],
    validation_side,
    train_rows,
    one_pass,
    rows=rows,
    fingerprint=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
    report=report,
  )


def _divide(
  cache: TokenCache,
  other: TokenCache | None,  # the validation pairs, where they have files of their own
  fraction: float,
  rows: RowOptions,
  *,
  bos_id: int | None,
) -> dict[str, Side]:
  """Returns 'train' and, where there is one, 'validation', after deciding on long pairs."""
  fit = functools.partial(
    split.fit, tokens=rows.tokens, layout=rows.layout, too_long=rows.too_long, bos_id=bos_id
  )
  pairs, held = np.arange(len(cache), dtype=np.int32), np.zeros(len(cache), bool)
  if other is None and fraction:
    held = split.hold_out(cache.prompts, fraction, rows.seed)
  sides = {'train': fit(cache, pairs[~held])}
  if other is not None:
    sides['validation'] = fit(other, np.arange(len(other), dtype=np.int32))
  elif fraction:
    sides['validation'] = fit(cache, pairs[held])
  return sides


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


def _report(pairs: Side, plan: pack.RowPlan, rows: RowOptions) -> dict[str, Any]:
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
