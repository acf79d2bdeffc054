"""Data files -> all that a run needs of them: tokenized, divided, planned, and counted."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpo_flax.config.named_values import named_field, named_values
from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.epochs import Epochs
from dpo_flax.data.cache.build_cache import open_or_build
from dpo_flax.data.cache.token_cache import TokenCache
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer, load_tokenizer

_SHOWN = 5  # places named in the report


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """All that a run needs of its data."""

  tokenizer: Tokenizer
  train: split.Split
  validation: split.Split | None
  train_rows: Epochs
  once: dict[str, Epochs]  # side -> rows that hold each of its pairs once: an evaluation
  pairs_per_row: int  # slots of every batch, train and validation
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


def prepare(config: ConfigDict, *, vocab_size: int) -> PreparedData:
  """Tokenizes the data or opens its cache, holds out the validation pairs and plans the rows.

  Args:
    config: the whole schema, validated.
    vocab_size: rows of the model's embedding.

  Raises:
    ValueError: for all that is wrong with the data, naming file and line.
  """
  tokenizer = _load_tokenizer(config)
  source = RecordSource(config.data.train)
  cache = _open(source, tokenizer, config, vocab_size)
  held_out, chosen = cache, None
  pairs = np.arange(len(cache), dtype=np.int32)
  held = np.zeros(len(cache), bool)
  if config.data.validation:
    held_out = _open(_validation_source(config), tokenizer, config, vocab_size)
    chosen = np.arange(len(held_out), dtype=np.int32)
  elif config.data.validation_split_fraction:
    held = split.hold_out(cache.prompts, config.data.validation_split_fraction, config.seed)
    chosen = pairs[held]
  train = _fit(cache, pairs[~held], tokenizer, config)
  validation = None if chosen is None else _fit(held_out, chosen, tokenizer, config)
  train_rows = Epochs(
    train.lengths,
    train.mixture(source.weights, source.parts),
    config,
    shuffle=config.data.shuffle,
    pairs_per_row=config.batch.pairs_per_row if config.data.pack else 1,
  )
  slots = train_rows.pairs_per_row
  report = {'train': _report(train, train_rows.plan(0), config)}
  once = {'train': _once(train, config, slots)}
  if validation:
    once['validation'] = _once(validation, config, slots)
    report['validation'] = _report(validation, once['validation'].plan(0), config)
  return PreparedData(
    tokenizer,
    train,
    validation,
    train_rows,
    once,
    pairs_per_row=slots,
    fingerprint=_fingerprint(source, cache, validation and held_out, config),
    report=report,
  )


def _load_tokenizer(config: ConfigDict) -> Tokenizer:
  path = config.data.tokenizer or config.initialize_from_hf
  if not path:
    raise ValueError('no tokenizer given: set data.tokenizer, or initialize_from_hf to have one.')
  return load_tokenizer(
    path,
    config.data.chat_template,
    variables=_mapping(config, 'template_variables'),
    history=config.data.history,
  )


def _once(pairs: split.Split, config: ConfigDict, slots: int) -> Epochs:
  """The rows in which each pair stands once, in order."""
  whole = pairs.mixture((1.0,), [0] * len(pairs.cache.files))
  return Epochs(pairs.lengths, whole, config, shuffle=False, pairs_per_row=slots)


def _validation_source(config: ConfigDict) -> RecordSource:
  if named_values(config.data.validation) is not None:
    raise ValueError(
      'data.validation gives weights, but every validation pair counts once: give a path or a list '
      'of them.'
    )
  return RecordSource(config.data.validation)


def _open(
  source: RecordSource, tokenizer: Tokenizer, config: ConfigDict, vocab_size: int
) -> TokenCache:
  directory = config.data.cache_dir or (config.workdir and f'{config.workdir}/token_cache')
  if not directory:
    raise ValueError('no place for the token cache: set workdir or data.cache_dir.')
  cache = open_or_build(
    source,
    tokenizer,
    directory=directory,
    options=FormatOptions(config.data.format, _fields(config), config.data.completions),
    bad_record=config.data.bad_record,
    workers=config.data.cache_workers,
  )
  cache.check_ids(vocab_size)
  return cache


def _mapping(config: ConfigDict, field: str) -> dict[str, Any]:
  return named_field(config, f'data.{field}', of='names', example=('a', 'b'))


def _fields(config: ConfigDict) -> dict[str, str]:
  fields = _mapping(config, 'fields')
  for ours, theirs in fields.items():
    if not isinstance(theirs, str):
      raise ValueError(f'data.fields takes {ours!r} from {theirs!r}: expected the name of a key.')
  return fields


def _fit(
  cache: TokenCache, pairs: np.ndarray, tokenizer: Tokenizer, config: ConfigDict
) -> split.Split:
  return split.fit(
    cache,
    pairs,
    tokens=config.batch.tokens,
    layout=config.data.layout,
    too_long=config.data.too_long,
    bos_id=tokenizer.bos_id,
  )


def _report(pairs: split.Split, plan: pack.RowPlan, config: ConfigDict) -> dict[str, Any]:
  tokens = int(pack.row_lengths(pairs.lengths, config.data.layout)[plan.pairs].sum())
  return {
    **dataclasses.asdict(pairs.cache.report),  # of the files, before they are divided
    'pairs': len(pairs),
    'too_long': len(pairs.dropped),
    'too_long_examples': list(pairs.dropped[:_SHOWN]),
    'truncated': len(pairs.truncated),
    'truncated_examples': list(pairs.truncated[:_SHOWN]),
    'rows': len(plan),
    'tokens': tokens,
    'padding_fraction': 1 - tokens / (len(plan) * config.batch.tokens),
    'pairs_per_row': plan.pairs_per_row,
  }


def _fingerprint(
  source: RecordSource, train: TokenCache, validation: TokenCache | None, config: ConfigDict
) -> str:
  data = config.data
  parts = [
    train.fingerprint,
    [source.weights, source.parts],
    validation and validation.fingerprint,
    [config.seed, data.validation_split_fraction, data.shuffle, data.layout, data.pack],
    [data.too_long, config.batch.rows, config.batch.tokens, config.batch.pairs_per_row],
  ]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
