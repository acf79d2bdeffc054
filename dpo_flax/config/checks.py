"""What is wrong with a config: illegal values, and fields that contradict each other."""

import math
import re
from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from dpo_flax.config.schema import default, get
from dpo_flax.files.messages import SECRETS
from dpo_flax.files.paths import absolute

_CHOICES = {
  'tuning.method': ('lora', 'dora', 'full'),
  'model.dtype': ('bfloat16', 'float32'),
  'model.weight_dtype': ('bfloat16', 'float32', 'int8'),
  'model.remat': ('full', 'offload', 'dots', 'none'),
  'model.attention': ('auto', 'xla', 'pallas'),
  'data.format': (
    *('auto', 'explicit', 'implicit', 'messages', 'hh'),
    *('shp', 'webgpt', 'binarized', 'ultrafeedback', 'orca'),
  ),
  'data.completions': ('best_vs_worst', 'best_vs_random', 'all'),
  'data.history': ('exact', 'rendered'),
  'reference.source': ('live', 'cache'),
  'data.layout': ('shared', 'separate'),
  'data.too_long': ('raise', 'drop', 'truncate_prompt'),
  'data.bad_record': ('raise', 'skip'),
  'train.on_save_error': ('stop', 'continue'),
  'optimizer.name': ('adamw',),
  'optimizer.lr_schedule': ('cosine', 'linear', 'constant'),
}

# field -> (smallest, largest) value; None: no bound.
_RANGES = {
  'seed': (0, 2**31 - 1),
  'model.logits_chunk': (1, None),
  'lora.r': (1, 2**16),
  'lora.dropout': (0, 0.999),
  'data.validation_split_fraction': (0, 0.9),
  'data.cache_workers': (0, 1024),
  'data.workers': (0, 1024),
  'batch.rows': (1, 2**24),
  'batch.tokens': (4, 2**24),
  'batch.pairs_per_row': (0, None),
  'batch.microbatches': (1, None),
  'train.num_train_steps': (0, 2**31 - 1),
  'train.num_epochs': (0, 10**6),
  'train.log_every': (1, None),
  'train.eval_every': (0, None),
  'train.save_every': (0, None),
  'train.keep': (1, None),
  'train.grace_seconds': (1, None),
  'optimizer.warmup': (0, 1),
  'optimizer.max_grad_norm': (0, None),
  'optimizer.b1': (0, 0.9999999),
  'optimizer.b2': (0, 0.9999999),
  'optimizer.weight_decay': (0, None),
  'optimizer.max_skipped_steps': (0, None),
  'optimizer.spike_factor': (0, None),
  'hf_save_steps': (0, None),
}

_POSITIVE = (
  'lora.alpha',
  'optimizer.learning_rate',
  'optimizer.eps',
)

# A name or several, of modules or losses.
_NAMES = ('lora.target_modules', 'lora.exclude_modules', 'lora.modules_to_save', 'objective.loss')

_SHORTEST_PAIR = 4  # tokens: one of a prompt before one of a response, twice

# Above this, DPO tends to leave the reference faster than the loss can tell.
_HIGH_LEARNING_RATES = {'lora': 5e-5, 'dora': 5e-5, 'full': 5e-6}

# Of the lora section, what an adapter to start from leaves to the run.
_FREE_OF_ADAPTERS = ('dropout', 'zero_init_b')


def validate(config: ConfigDict) -> ConfigDict:
  """Returns a checked copy of `config`, with what has only one right value put right (and said).

  Raises:
    ValueError: a field has no legal value, or two fields contradict each other.
  """
  _check_names(config)
  _check_secrets(config)
  config = config.copy_and_resolve_references()
  for field, choices in _CHOICES.items():
    if get(config, field) not in choices:
      raise ValueError(f'{field}={get(config, field)!r}: expected one of {", ".join(choices)}')
  for field, (low, high) in _RANGES.items():
    _check_range(field, get(config, field), low, high)
  for field in _NAMES:
    value = get(config, field)
    several = value if isinstance(value, list | tuple | dict) else [value]
    if value is not None and not all(isinstance(name, str) for name in several):
      raise ValueError(f'{field}={value!r}: expected a name, or a list of names')
  for field in _POSITIVE:
    if not 0 < get(config, field) < math.inf:
      raise ValueError(f'{field}={get(config, field)}: must be greater than 0, and finite')
  _check_required(config)
  _check_workdir(config.workdir)
  _check_pairs_per_row(config)
  _check_tuning(config)
  if config.batch.rows % config.batch.microbatches:
    raise ValueError(
      f'batch.rows={config.batch.rows} is not a multiple of '
      f'batch.microbatches={config.batch.microbatches}'
    )
  if not config.lora.zero_init_b:
    logging.warning(
      'lora.zero_init_b=False is overridden to True: otherwise the policy differs from the '
      'reference before the first step'
    )
    config.lora.zero_init_b = True
  highest = _HIGH_LEARNING_RATES[config.tuning.method]
  if config.optimizer.learning_rate > highest:
    logging.warning(
      'optimizer.learning_rate=%g is high for DPO with method %s; above %g runs often degrade',
      config.optimizer.learning_rate,
      config.tuning.method,
      highest,
    )
  return config


def validate_rows(config: ConfigDict, shards: int):
  """Checks that the rows of every microbatch divide evenly among the mesh's `shards` of rows.

  Raises:
    ValueError: they do not.
  """
  rows, parts = config.batch.rows, config.batch.microbatches
  if rows % (parts * shards):
    raise ValueError(
      f'batch.rows={rows} does not divide among mesh.data x mesh.fsdp = {shards} shards'
      + (f' in each of batch.microbatches={parts}' if parts > 1 else '')
      + f': make it a multiple of {parts * shards}, or change the mesh'
    )


def _check_names(config: ConfigDict):
  """Refuses the mappings that a config cannot be copied with."""
  for field in (
    *('data.train', 'data.validation', 'data.fields', 'data.template_variables'),
    *('lora.rank_pattern', 'lora.alpha_pattern'),
  ):
    value = get(config, field)
    if isinstance(value, dict) and any('.' in str(name) for name in value):
      pairs = ', '.join(f'({name!r}, {item!r})' for name, item in value.items())
      raise ValueError(
        f'{field} is a mapping, and in a config its names cannot have dots: give pairs, ({pairs},)'
      )


def _check_workdir(workdir: str | None):
  if workdir and re.search(r'[\[\]]', str(absolute(workdir))):
    raise ValueError(
      f'workdir={workdir}: Orbax takes [ and ] in a path for a pattern, and would not find its '
      'checkpoints again'
    )


def _check_secrets(config: ConfigDict, prefix: str = ''):
  """Refuses what must not be written down, as the config is: in checkpoints, exports, messages."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      _check_secrets(value, f'{prefix}{name}.')
    elif SECRETS.search(str(value)):
      raise ValueError(
        f'{prefix}{name} holds what looks like a token or password, and the config is written into '
        'checkpoints and exports. Libraries read theirs from the environment, such as HF_TOKEN.'
      )


def _check_range(field: str, value: float, low: float | None, high: float | None):
  # Written so that NaN, which no comparison holds for, fails.
  inside = (low is None or value >= low) and (high is None or value <= high)
  if not (inside and math.isfinite(value)):
    bounds = f'at least {low}' if high is None else f'between {low} and {high}'
    raise ValueError(f'{field}={value}: must be {bounds}')


def _check_pairs_per_row(config: ConfigDict):
  slots, most = config.batch.pairs_per_row, config.batch.tokens // _SHORTEST_PAIR
  if slots > most:
    raise ValueError(
      f'batch.pairs_per_row={slots}: a row of batch.tokens={config.batch.tokens} holds at most '
      f'{most} pairs; 0 takes as many as the data need'
    )
  if slots > 1 and not config.data.pack:
    raise ValueError(
      f'batch.pairs_per_row={slots}: with data.pack=False a row holds one pair; set it to 0'
    )


def _check_tuning(config: ConfigDict):
  """Refuses what one way of tuning would ignore of another's."""
  method, start = config.tuning.method, config.initialize_from_adapter
  if method == 'full':
    _check_unset(config, ('peft_save_path', 'initialize_from_adapter', 'reference_adapter_path'))
    if config.model.weight_dtype == 'int8':
      raise ValueError('model.weight_dtype=int8: such weights cannot learn (tuning.method=full)')
  if method == 'full' or start:
    why = 'tuning.method=full has no adapters' if method == 'full' else f'those of {start} are kept'
    free = _FREE_OF_ADAPTERS if start else ('zero_init_b',)
    usual = default().lora
    for field, value in config.lora.items():
      if field not in free and value != usual[field]:
        raise ValueError(
          f'lora.{field}={value!r} would be ignored: {why}. Leave it at {usual[field]!r}'
        )
  if config.merge_adapter_path and not config.initialize_from_hf:
    raise ValueError(
      f'merge_adapter_path={config.merge_adapter_path}: random weights have no adapter; give '
      'initialize_from_hf'
    )
  if config.reference_adapter_path and config.reference_model_path:
    raise ValueError(
      f'reference_adapter_path={config.reference_adapter_path} is for the base of the policy, and '
      f'reference_model_path={config.reference_model_path} is another one: give one of them'
    )


def _check_unset(config: ConfigDict, fields: Sequence[str]):
  for field in fields:
    if config[field]:
      raise ValueError(f'{field}={config[field]} has no meaning with tuning.method=full: unset it')


def _check_required(config: ConfigDict):
  for field in ('workdir', 'data.train'):
    if not get(config, field):
      raise ValueError(f'{field} is not set: give --config.{field}=...')
  if bool(config.initialize_from_hf) == bool(config.model.preset):
    raise ValueError(
      'give the weights exactly one source, and leave the other empty (--config.model.preset=): '
      'initialize_from_hf (a checkpoint; now '
      f'{config.initialize_from_hf!r}) or model.preset (random weights; now '
      f'{config.model.preset!r})'
    )
  if not config.initialize_from_hf and not config.data.tokenizer:
    raise ValueError(
      'data.tokenizer is not set, and there is no initialize_from_hf to take it from'
    )
  if config.optimizer.spike_factor and not config.optimizer.max_skipped_steps:
    raise ValueError(
      f'optimizer.spike_factor={config.optimizer.spike_factor} skips steps: say by '
      'optimizer.max_skipped_steps how many of them in a row are too many'
    )
  if bool(config.train.num_train_steps) == bool(config.train.num_epochs):
    raise ValueError(
      'give the length of the run exactly once: train.num_train_steps (now '
      f'{config.train.num_train_steps}) or train.num_epochs (now {config.train.num_epochs}); 0 '
      'unsets one'
    )
