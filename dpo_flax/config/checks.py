"""What is wrong with a config: what its rows refuse, and fields that contradict each other."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dpo_flax.config.row import rows_of
from dpo_flax.config.schema import ROWS, Settings, default, get
from dpo_flax.config.sections import BatchSettings, LoraSettings
from dpo_flax.config.settings import settings_of
from dpo_flax.files.messages import SECRETS
from dpo_flax.files.paths import absolute

_SHORTEST_PAIR = 4  # tokens: one of a prompt before one of a response, twice

# Above this, DPO tends to leave the reference faster than the loss can tell.
_HIGH_LEARNING_RATES = {'lora': 5e-5, 'dora': 5e-5, 'full': 5e-6}


def validate(config: ConfigDict, *, planning: bool = False) -> Settings:
  """Returns a checked config as frozen settings, with what has only one right value put right.

  Args:
    config: the user's, which is left as it is.
    planning: whether it may lack what only a run needs: workdir, data, tokenizer and length.

  Raises:
    ValueError: a field has no legal value, or two fields contradict each other.
  """
  given = {field: get(config, field) for field in ROWS}
  _check_given(given)
  for field, row in ROWS.items():
    row.check(field, given[field])
  settings = settings_of(config)
  if mistake := next(_mistakes(settings, planning=planning), None):
    raise ValueError(mistake)
  if not settings.lora.zero_init_b:
    logging.warning(
      'lora.zero_init_b=False is overridden to True: otherwise the policy differs from the '
      'reference before the first step'
    )
    settings = settings.replace({'lora.zero_init_b': True})
  rate, method = settings.optimizer.learning_rate, settings.tuning.method
  if rate > _HIGH_LEARNING_RATES[method]:
    logging.warning(
      'optimizer.learning_rate=%g is high for DPO with method %s; above %g runs often degrade',
      *(rate, method, _HIGH_LEARNING_RATES[method]),
    )
  return settings


def validate_fields(values: Mapping[str, Any]) -> Settings:
  """Returns the default settings but for some dotted fields, each checked by its own row alone.

  This is for programs that use a part of a run; what several fields say together is `validate`'s.

  Raises:
    ValueError: a field has no legal value.
  """
  config = default()
  for field, value in values.items():
    row = ROWS[field]
    try:
      config.update_from_flattened_dict({field: row.canonical(field, value)})
    except TypeError as error:
      expected = type(get(config, field)).__name__
      raise ValueError(f'{field}={value!r}: expected a value of type {expected}') from error
    row.check(field, value)
  return settings_of(config)


def validate_rows(batch: BatchSettings, shards: int):
  """Checks that the rows of every microbatch divide evenly among the mesh's `shards` of rows.

  Raises:
    ValueError: they do not.
  """
  rows, parts = batch.rows, batch.microbatches
  if rows % (parts * shards):
    raise ValueError(
      f'batch.rows={rows} does not divide among mesh.data x mesh.fsdp = {shards} shards'
      + (f' in each of batch.microbatches={parts}' if parts > 1 else '')
      + f': make it a multiple of {parts * shards}, or change the mesh'
    )


def _check_given(given: Mapping[str, Any]):
  """Refuses what a config cannot be copied with, and what must not be written down, as it is."""
  for field, value in given.items():
    is_mapping = ROWS[field].mapping or ROWS[field].paths
    if is_mapping and isinstance(value, dict) and any('.' in str(name) for name in value):
      pairs = ', '.join(f'({name!r}, {item!r})' for name, item in value.items())
      raise ValueError(
        f'{field} is a mapping, and in a config its names cannot have dots: give pairs, ({pairs},)'
      )
    if SECRETS.search(str(value)):
      raise ValueError(
        f'{field} holds what looks like a token or password, and the config is written into '
        'checkpoints and exports. Libraries read theirs from the environment, such as HF_TOKEN.'
      )


def _mistakes(settings: Settings, *, planning: bool) -> Iterator[str]:
  """Yields what is wrong with several fields together."""
  if not planning:
    needed = {'workdir': settings.workdir, 'data.train': settings.data.train}
    for field in (field for field, value in needed.items() if not value):
      yield f'{field} is not set: give --config.{field}=...'
  yield from _weight_mistakes(settings.weight_paths(), settings.model.preset)
  if not (planning or settings.data.tokenizer or settings.initialize_from_hf):
    yield 'data.tokenizer is not set, and there is no initialize_from_hf to take it from'
  optimizer, train = settings.optimizer, settings.train
  if optimizer.spike_factor and not optimizer.max_skipped_steps:
    yield (
      f'optimizer.spike_factor={optimizer.spike_factor} skips steps: say by '
      'optimizer.max_skipped_steps how many of them in a row are too many'
    )
  steps, epochs = train.num_train_steps, train.num_epochs
  if (steps and epochs) or not (steps or epochs or planning):
    yield (
      f'give the length of the run exactly once: train.num_train_steps (now {steps}) or '
      f'train.num_epochs (now {epochs}); 0 unsets one'
    )
  if settings.workdir and re.search(r'[\[\]]', str(absolute(settings.workdir))):
    yield (
      f'workdir={settings.workdir}: Orbax takes [ and ] in a path for a pattern, and would not '
      'find its checkpoints again'
    )
  yield from _batch_mistakes(settings.batch, pack=settings.data.pack)
  adapters = ('peft_save_path', 'initialize_from_adapter', 'reference_adapter_path')
  yield from _tuning_mistakes(
    settings.tuning.method,
    settings.lora,
    settings.model.weight_dtype,
    {field: getattr(settings, field) for field in adapters},
  )


def _weight_mistakes(paths: Mapping[str, str], preset: str | None) -> Iterator[str]:
  base, merged = paths.get('initialize_from_hf'), paths.get('merge_adapter_path')
  if bool(base) == bool(preset):
    yield (
      'give the weights exactly one source, and leave the other empty (--config.model.preset=): '
      f'initialize_from_hf (a checkpoint; now {base!r}) or model.preset (random weights; now '
      f'{preset!r})'
    )
  if merged and not base:
    yield f'merge_adapter_path={merged}: random weights have no adapter; give initialize_from_hf'
  adapter, model = paths.get('reference_adapter_path'), paths.get('reference_model_path')
  if adapter and model:
    yield (
      f'reference_adapter_path={adapter} is for the base of the policy, and '
      f'reference_model_path={model} is another one: give one of them'
    )


def _batch_mistakes(batch: BatchSettings, *, pack: bool) -> Iterator[str]:
  slots, most = batch.pairs_per_row, batch.tokens // _SHORTEST_PAIR
  if slots > most:
    yield (
      f'batch.pairs_per_row={slots}: a row of batch.tokens={batch.tokens} holds at most '
      f'{most} pairs; 0 takes as many as the data need'
    )
  if slots > 1 and not pack:
    yield f'batch.pairs_per_row={slots}: with data.pack=False a row holds one pair; set it to 0'
  if batch.rows % batch.microbatches:
    yield f'batch.rows={batch.rows} is not a multiple of batch.microbatches={batch.microbatches}'


def _tuning_mistakes(
  method: str,
  lora: LoraSettings,
  weight_dtype: str,
  adapters: Mapping[str, str | None],  # field -> path
) -> Iterator[str]:
  """Yields what does not go with the way of tuning, or with an adapter to start from."""
  start = adapters['initialize_from_adapter']
  if method == 'full':
    for field, path in adapters.items():
      if path:
        yield f'{field}={path} has no meaning with tuning.method=full: unset it'
    if weight_dtype == 'int8':
      yield 'model.weight_dtype=int8: such weights cannot learn (tuning.method=full)'
    yield from _ignored(lora, 'tuning.method=full has no adapters', ('zero_init_b',))
  elif start:
    yield from _ignored(lora, f'those of {start} are kept', ('dropout', 'zero_init_b'))


def _ignored(lora: LoraSettings, why: str, but: tuple[str, ...]) -> Iterator[str]:
  """Yields the fields of the section lora that are set for nothing; `but` are left to the run."""
  for field, row in rows_of(LoraSettings).items():
    value = getattr(lora, field)
    if field not in but and value != row.canonical(field, row.default):
      yield f'lora.{field}={value!r} would be ignored: {why}. Leave it at {row.default!r}'
