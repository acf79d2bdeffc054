"""Model families: how a Hugging Face config.json maps to a ModelConfig, and back."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dpo_flax.model.config import Llama3Scaling, ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """How the config.json of one `model_type` maps to a ModelConfig."""

  architecture: str  # transformers' class
  fields: Mapping[str, str]  # a field of config.json -> ours
  defaults: Mapping[str, Any]  # transformers' values of fields that config.json may leave out
  fixed: Mapping[str, Any]  # fields whose only value here is this one: another changes the maths


FAMILIES = {
  'llama': Family(
    architecture='LlamaForCausalLM',
    fields={
      'vocab_size': 'vocab_size',
      'hidden_size': 'embed_dim',
      'intermediate_size': 'mlp_dim',
      'num_hidden_layers': 'num_layers',
      'num_attention_heads': 'num_heads',
      'num_key_value_heads': 'num_kv_heads',
      'head_dim': 'head_dim',
      'rms_norm_eps': 'rms_norm_eps',
      'tie_word_embeddings': 'tie_word_embeddings',
      'initializer_range': 'initializer_range',
    },
    defaults={
      'rms_norm_eps': 1e-6,
      'tie_word_embeddings': False,
      'initializer_range': 0.02,
      'rope_theta': 10_000.0,
    },
    fixed={
      'hidden_act': 'silu',
      'attention_bias': False,
      'mlp_bias': False,
      'attention_dropout': 0.0,
      'pretraining_tp': 1,
    },
  ),
}

ROPE_FIELDS = ('rope_parameters', 'rope_theta', 'rope_scaling')

# Fields of any config.json that say nothing about log-probs.
HARMLESS_FIELDS = frozenset().union(
  ['model_type', 'architectures', '_name_or_path', 'name_or_path', 'transformers_version'],
  ['dtype', 'torch_dtype', 'use_cache', 'return_dict', 'max_position_embeddings'],
  ['bos_token_id', 'eos_token_id', 'pad_token_id', 'max_length', 'problem_type'],
  ['id2label', 'label2id', 'chunk_size_feed_forward', 'unsloth_fixed', 'unsloth_version'],
)


def from_hf_config(
  values: Mapping[str, Any],
  *,
  dtype: Any,
  weight_dtype: Any,
  remat: str,
  attention: str,
  where: str,  # the file, for messages
) -> ModelConfig:
  """Returns the architecture that a config.json describes; the other fields are the run's.

  Fields are used, known to be harmless, or refused: none is ignored.

  Raises:
    ValueError: a field is missing, malformed, or asks for something this network does not do.
  """
  family = FAMILIES.get(str(values.get('model_type')))
  if family is None:
    raise ValueError(
      f'{where}: model_type is {values.get("model_type")!r}; supported: {", ".join(FAMILIES)}'
    )
  known = HARMLESS_FIELDS.union(family.fields, ROPE_FIELDS)
  check_fields(values, known=known, fixed=family.fixed, where=where)
  given = family.defaults | {name: value for name, value in values.items() if value is not None}
  theta, scaling = _rope(given, where)
  ours = {new: _typed(given, old, new, where) for old, new in family.fields.items() if old in given}
  ours.setdefault('num_kv_heads', ours.get('num_heads'))
  if ours.get('num_heads'):
    ours.setdefault('head_dim', ours.get('embed_dim', 0) // ours['num_heads'])
  missing = [old for old, new in family.fields.items() if ours.get(new) is None]
  if missing:
    raise ValueError(f'{where}: missing {", ".join(missing)}')
  if ours['num_heads'] % ours['num_kv_heads'] or ours['head_dim'] % 2:
    raise ValueError(
      f'{where}: {ours["num_heads"]} attention heads must be a multiple of'
      f' {ours["num_kv_heads"]} key-value heads, and head_dim {ours["head_dim"]} even'
    )
  rope = {'rope_theta': theta, 'rope_scaling': scaling}
  run = {'dtype': dtype, 'weight_dtype': weight_dtype, 'remat': remat, 'attention': attention}
  return ModelConfig(**ours, **rope, **run)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that had none, readable by old and new transformers."""
  family = FAMILIES['llama']
  values = {'architectures': [family.architecture], 'model_type': 'llama'}
  values |= {old: getattr(config, new) for old, new in family.fields.items()}
  values |= family.fixed | {'rope_theta': config.rope_theta}
  values['torch_dtype'] = np.dtype(config.float_dtype).name
  if config.rope_scaling is not None:
    scaling = dataclasses.asdict(config.rope_scaling)
    values['rope_scaling'] = {'rope_type': 'llama3', **scaling}
    stretched = scaling['factor'] * scaling['original_max_position_embeddings']
    values['max_position_embeddings'] = int(stretched)
  return values


def check_fields(
  values: Mapping[str, Any], *, known: Collection[str], fixed: Mapping[str, Any], where: str
) -> None:
  """Refuses every field that is not known, not at its fixed value and not switched off.

  Raises:
    ValueError: names each such field with its value.
  """
  refused = []
  for name, value in values.items():
    # None, False and empty containers are how a config.json says that it lacks a feature.
    off = value is None or value is False or value in ([], {})
    if name in fixed and value is not None and value != fixed[name]:
      refused.append(f'{name}={value!r} (supported: {fixed[name]!r})')
    elif name not in known and name not in fixed and not off:
      refused.append(f'{name}={value!r} (unknown)')
  if refused:
    raise ValueError(f'{where}: these fields may change the result: {", ".join(refused)}')


def _typed(values: Mapping[str, Any], name: str, field: str, where: str) -> Any:
  """Returns values[name], checked against the type of ModelConfig's `field`."""
  kind = ModelConfig.__annotations__[field]
  value = values[name]
  right = isinstance(value, (int, float) if kind is float else kind)
  if not right or (kind is not bool and (isinstance(value, bool) or value <= 0)):
    expected = 'true or false' if kind is bool else f'a positive {kind.__name__}'
    raise ValueError(f'{where}: {name} is {value!r}, not {expected}')
  return kind(value)


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
  """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
  scalings = [values[name] for name in ('rope_parameters', 'rope_scaling') if values.get(name)]
  if len(scalings) > 1 or not all(isinstance(scaling, Mapping) for scaling in scalings):
    raise ValueError(f'{where}: expected one object, rope_parameters or rope_scaling: {scalings}')
  rope = dict(scalings[0]) if scalings else {}
  # Writers of old changed `type` to `rope_type`, and some wrote both.
  kinds = {rope.pop(name) for name in ('rope_type', 'type') if name in rope} or {'default'}
  theta = _typed(values | rope, 'rope_theta', 'rope_theta', where)
  rope.pop('rope_theta', None)
  if kinds == {'default'} and not rope:
    return theta, None
  if kinds != {'llama3'}:
    raise ValueError(
      f'{where}: rotary positions of type {sorted(map(str, kinds))} with {rope};'
      ' supported: default (without parameters), llama3'
    )
  expected = Llama3Scaling.__annotations__
  if set(rope) != set(expected):
    raise ValueError(f'{where}: llama3 rotary scaling has {sorted(rope)}, not {sorted(expected)}')
  if not all(isinstance(rope[name], (int, float)) and rope[name] > 0 for name in expected):
    raise ValueError(f'{where}: llama3 rotary scaling is not all positive numbers: {rope}')
  return theta, Llama3Scaling(**{name: kind(rope[name]) for name, kind in expected.items()})
