"""What is wrong with a config: what its rows refuse, and fields that contradict each other."""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dpo_flax.config.row import rows_of
from dpo_flax.config.schema import ROWS, Settings, get
from dpo_flax.config.sections import (
  BatchSettings,
  LoraSettings,
  OptimizerSettings,
  TrainSettings,
)
from dpo_flax.config.settings import settings_of
from dpo_flax.files.messages import SECRETS
from dpo_flax.files.paths import absolute

_SHORTEST_PAIR = 4  # tokens: one of a prompt before one of a response, twice

# Above this, DPO tends to leave the reference faster than the loss can tell.
_HIGH_LEARNING_RATES = {'lora': 5e-5, 'dora': 5e-5, 'full': 5e-6}

# Of the lora section, what an adapter to start from leaves to the run.
_FREE_OF_ADAPTERS = ('dropout', 'zero_init_b')


def validate(config: ConfigDict, *, planning: bool = False) -> Settings:
  """Returns a checked config as frozen settings, with what has only one right value put right.

  Args:
    config: the user's, which is left as it is.
    planning: whether it may lack what only a run needs: workdir, data, tokenizer and length.

  Raises:
    ValueError: a field has no legal value, or two fields contradict each other.
  """
  given = {field: get(config, field) for field in ROWS}
  _check_names(given)
  _check_secrets(given)
  for field, row in ROWS.items():
    row.check(field, given[field])
  settings = settings_of(config)
  paths, tokenizer = settings.weight_paths(), settings.data.tokenizer
  if not planning:
    _check_required({'workdir': settings.workdir, 'data.train': settings.data.train})
  _check_weights(paths, settings.model.preset)
  if not (planning or tokenizer or settings.initialize_from_hf):
    raise ValueError(
      'data.tokenizer is not set, and there is no initialize_from_hf to take it from'
    )
  _check_skips(settings.optimizer)
  _check_length(settings.train, planning=planning)
  _check_workdir(settings.workdir)
  _check_pairs_per_row(settings.batch, pack=settings.data.pack)
  written = {'peft_save_path': settings.peft_save_path} if settings.peft_save_path else {}
  _check_tuning(
    settings.lora,
    settings.tuning.method,
    paths=paths | written,
    weight_dtype=settings.model.weight_dtype,
  )
  _check_microbatches(settings.batch)
  if not settings.lora.zero_init_b:
    logging.warning(
      'lora.zero_init_b=False is overridden to True: otherwise the policy differs from the '
      'reference before the first step'
    )
    settings = settings.replace({'lora.zero_init_b': True})
  _warn_of_high_rate(settings.optimizer.learning_rate, settings.tuning.method)
  return settings


def _warn_of_high_rate(rate: float, method: str):
  highest = _HIGH_LEARNING_RATES[method]
  if rate > highest:
    logging.warning(
      'optimizer.learning_rate=%g is high for DPO with method %s; above %g runs often degrade',
      rate,
      method,
      highest,
    )


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


def _check_names(given: Mapping[str, Any]):
  """Refuses the mappings that a config cannot be copied with."""
  for field, value in given.items():
    is_mapping = ROWS[field].mapping or ROWS[field].paths
    if is_mapping and isinstance(value, dict) and any('.' in str(name) for name in value):
      pairs = ', '.join(f'({name!r}, {item!r})' for name, item in value.items())
      raise ValueError(
        f'{field} is a mapping, and in a config its names cannot have dots: give pairs, ({pairs},)'
      )


def _check_secrets(given: Mapping[str, Any]):
  """Refuses what must not be written down, as the config is: in checkpoints, exports, messages."""
  for field, value in given.items():
    if SECRETS.search(str(value)):
      raise ValueError(
        f'{field} holds what looks like a token or password, and the config is written into '
        'checkpoints and exports. Libraries read theirs from the environment, such as HF_TOKEN.'
      )


def _check_workdir(workdir: str | None):
  if workdir and re.search(r'[\[\]]', str(absolute(workdir))):
    raise ValueError(
      f'workdir={workdir}: Orbax takes [ and ] in a path for a pattern, and would not find its '
      'checkpoints again'
    )


def _check_pairs_per_row(batch: BatchSettings, *, pack: bool):
  slots, most = batch.pairs_per_row, batch.tokens // _SHORTEST_PAIR
  if slots > most:
    raise ValueError(
      f'batch.pairs_per_row={slots}: a row of batch.tokens={batch.tokens} holds at most '
      f'{most} pairs; 0 takes as many as the data need'
    )
  if slots > 1 and not pack:
    raise ValueError(
      f'batch.pairs_per_row={slots}: with data.pack=False a row holds one pair; set it to 0'
    )


def _check_tuning(
  lora: LoraSettings,
  method: str,
  *,
  paths: Mapping[str, str],  # of what the policy is made of and written to, by field
  weight_dtype: str,
):
  """Refuses what one way of tuning would ignore of another's."""
  start = paths.get('initialize_from_adapter')
  if method == 'full':
    for field in ('peft_save_path', 'initialize_from_adapter', 'reference_adapter_path'):
      if field in paths:
        raise ValueError(f'{field}={paths[field]} has no meaning with tuning.method=full: unset it')
    if weight_dtype == 'int8':
      raise ValueError('model.weight_dtype=int8: such weights cannot learn (tuning.method=full)')
  if method == 'full' or start:
    why = 'tuning.method=full has no adapters' if method == 'full' else f'those of {start} are kept'
    free = _FREE_OF_ADAPTERS if start else ('zero_init_b',)
    for field, row in rows_of(LoraSettings).items():
      value = getattr(lora, field)
      if field not in free and value != row.canonical(field, row.default):
        raise ValueError(
          f'lora.{field}={value!r} would be ignored: {why}. Leave it at {row.default!r}'
        )


def _check_weights(paths: Mapping[str, str], preset: str | None):
  base, merged = paths.get('initialize_from_hf'), paths.get('merge_adapter_path')
  if bool(base) == bool(preset):
    raise ValueError(
      'give the weights exactly one source, and leave the other empty (--config.model.preset=): '
      f'initialize_from_hf (a checkpoint; now {base!r}) or model.preset (random weights; now '
      f'{preset!r})'
    )
  if merged and not base:
    raise ValueError(
      f'merge_adapter_path={merged}: random weights have no adapter; give initialize_from_hf'
    )
  adapter, model = paths.get('reference_adapter_path'), paths.get('reference_model_path')
  if adapter and model:
    raise ValueError(
      f'reference_adapter_path={adapter} is for the base of the policy, and '
      f'reference_model_path={model} is another one: give one of them'
    )


def _check_required(needed: Mapping[str, Any]):
  """Refuses a run that lacks what every run needs."""
  for field, value in needed.items():
    if not value:
      raise ValueError(f'{field} is not set: give --config.{field}=...')


def _check_skips(optimizer: OptimizerSettings):
  if optimizer.spike_factor and not optimizer.max_skipped_steps:
    raise ValueError(
      f'optimizer.spike_factor={optimizer.spike_factor} skips steps: say by '
      'optimizer.max_skipped_steps how many of them in a row are too many'
    )


def _check_length(train: TrainSettings, *, planning: bool):
  steps, epochs = train.num_train_steps, train.num_epochs
  if (steps and epochs) or not (steps or epochs or planning):
    raise ValueError(
      f'give the length of the run exactly once: train.num_train_steps (now {steps}) or '
      f'train.num_epochs (now {epochs}); 0 unsets one'
    )


def _check_microbatches(batch: BatchSettings):
  if batch.rows % batch.microbatches:
    raise ValueError(
      f'batch.rows={batch.rows} is not a multiple of batch.microbatches={batch.microbatches}'
    )
