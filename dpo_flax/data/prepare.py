"""Data files -> all that a run needs of them: tokenized, divided, planned, and counted."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.plan import RowPlan
from dpo_flax.data.batches.schedule import Mixture, RowOptions, RowSchedule
from dpo_flax.data.batches.split import Side
from dpo_flax.data.cache.build_cache import ReadOptions, open_or_build
from dpo_flax.data.cache.token_cache import TokenCache
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer

_SHOWN = 5  # locations named in the report


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

  def every_row(self, side: str) -> RowPlan:
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
  parts = _divide(cache, other, validation_split_fraction, rows.seed)
  sides = {name: split.fit(*part, rows, bos_id=tokenizer.bos_id) for name, part in parts.items()}
  train = sides['train']
  train_rows = RowSchedule(train.lengths, train.mixture(source.weights, source.parts), rows)
  in_order = dataclasses.replace(rows, shuffle=False, pairs_per_row=train_rows.pairs_per_row)
  one_pass = {
    name: RowSchedule(side.lengths, Mixture((np.arange(len(side)),), (1.0,)), in_order)
    for name, side in sides.items()
  }
  settings = [
    cache.fingerprint,
    [source.weights, source.parts],
    sides['validation'].cache.fingerprint if 'validation' in sides else None,
    [rows.seed, validation_split_fraction, rows.shuffle, rows.layout, rows.pack],
    [rows.too_long, rows.rows, rows.tokens, rows.pairs_per_row],
  ]
  return PreparedData(
    tokenizer,
    train,
    sides.get('validation'),
    train_rows,
    one_pass,
    rows=rows,
    fingerprint=hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
    report={
      name: _report(side, train_rows if side is train else one_pass[name])
      for name, side in sides.items()
    },
  )


def _open(
  source: RecordSource, tokenizer: Tokenizer, reading: ReadOptions, vocab_size: int
) -> TokenCache:
  cache = open_or_build(source, tokenizer, reading)
  cache.check_ids(vocab_size)
  return cache


def _divide(
  cache: TokenCache, validation: TokenCache | None, fraction: float, seed: int
) -> dict[str, tuple[TokenCache, np.ndarray]]:
  """Returns the pairs of 'train' and, where there is one, of 'validation': indices in a cache."""
  pairs = np.arange(len(cache), dtype=np.int32)
  if validation is not None:
    others = np.arange(len(validation), dtype=np.int32)
    return {'train': (cache, pairs), 'validation': (validation, others)}
  if not fraction:
    return {'train': (cache, pairs)}
  held = split.hold_out(cache.prompts, fraction, seed)
  return {'train': (cache, pairs[~held]), 'validation': (cache, pairs[held])}


def _report(pairs: Side, schedule: RowSchedule) -> dict[str, Any]:
  rows, plan = schedule.options, schedule.plan(0)
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
