"""A Hugging Face config.json -> ModelConfig, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_flax.huggingface.families import FAMILIES, Family
from dpo_flax.huggingface.fields import check_fields, typed
from dpo_flax.huggingface.rope_json import FULL, ROPE_FIELDS, SLIDING, read_rope, rope_fields
from dpo_flax.model.config import AttentionType, ModelConfig

# A field of config.json -> of ModelConfig, in every family.
FIELDS = {
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
}
SOFTCAPS = {
  'attn_logit_softcapping': 'attention_softcap',
  'final_logit_softcapping': 'logits_softcap',
}
BIASES = {
  'attention_bias': frozenset(['q_proj', 'k_proj', 'v_proj', 'o_proj']),
  'mlp_bias': frozenset(['gate_proj', 'up_proj', 'down_proj']),
}
ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}

# Fields of any config.json that do not change log-probs.
HARMLESS_FIELDS = frozenset().union(
  ['model_type', 'architectures', '_name_or_path', 'name_or_path', 'transformers_version'],
  ['dtype', 'torch_dtype', 'use_cache', 'return_dict', 'max_position_embeddings', 'auto_map'],
  ['bos_token_id', 'eos_token_id', 'pad_token_id', 'max_length', 'problem_type'],
  ['id2label', 'label2id', 'chunk_size_feed_forward', 'unsloth_fixed', 'unsloth_version'],
  ['_sliding_window_pattern', 'cache_implementation', 'is_llama_config', 'transformers.js_config'],
)
# Written as null, these are off; other fields that are null have their default.
_NULLABLE = frozenset(['num_key_value_heads', 'head_dim', 'sliding_window', *SOFTCAPS])


def from_hf_config(
  values: Mapping[str, Any],
  *,
  where: str,  # the file, for messages
  **run: Any,  # of ModelConfig: dtype, weight_dtype, remat and attention
) -> ModelConfig:
  """Returns the architecture that a config.json describes; the fields `run` are the run's.

  Fields are used, known to be harmless, or refused: none is ignored.

  Raises:
    ValueError: a field is missing, malformed, or asks for something this network does not do.
  """
  model_type = str(values.get('model_type'))
  family = FAMILIES.get(model_type)
  if family is None:
    raise ValueError(
      f'{where}: model_type is {values.get("model_type")!r}; supported: {", ".join(FAMILIES)}'
    )
  known = HARMLESS_FIELDS.union(FIELDS, family.defaults, ROPE_FIELDS)
  check_fields(values, known=known, fixed=family.fixed, where=where)
  set_here = {k: value for k, value in values.items() if value is not None or k in _NULLABLE}
  given = {**family.defaults, **set_here}
  shape = _shape(given, where)
  scale = given.get('query_pre_attn_scalar', shape['head_dim'])
  return ModelConfig(
    model_type=model_type,
    **shape,
    **_switches(family, given, where),
    attention_types=_attention_types(family, given, shape, where),
    attention_scale=typed(scale, 'query_pre_attn_scalar', float, where) ** -0.5,
    embed_scale=shape['embed_dim'] ** 0.5 if family.scales_embeddings else 1.0,
    **run,
  )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that had none, readable by old and new transformers."""
  family = FAMILIES[config.model_type]
  values = {'architectures': [family.architecture], 'model_type': config.model_type}
  values |= {old: getattr(config, new) for old, new in FIELDS.items()}
  activation = next(name for name, field in ACTIVATIONS.items() if field == config.activation)
  names = [SLIDING if layer.window else FULL for layer in config.layer_types]
  windows = {layer.window for layer in config.layer_types if layer.window}
  switches = {
    'hidden_act': activation,
    'hidden_activation': activation,
    'query_pre_attn_scalar': round(config.attention_scale**-2),
    'use_sliding_window': bool(windows),
    'sliding_window': max(windows, default=None),
    'layer_types': names,
    'no_rope_layers': [int(layer.rope is not None) for layer in config.layer_types],
  }
  switches |= {old: getattr(config, new) for old, new in SOFTCAPS.items()}
  switches |= {old: config.biases >= biased for old, biased in BIASES.items()}
  layers = zip(names, config.layer_types, strict=True)
  ropes = {name: layer.rope for name, layer in layers if layer.rope}
  if 'partial_rotary_factor' in family.defaults:
    values['partial_rotary_factor'] = ropes[names[0]].dim / config.head_dim
  values |= {name: value for name, value in switches.items() if name in family.defaults}
  values |= {**family.fixed, **rope_fields(ropes, family.defaults)}
  # Without it, some families take padding to be a token of the published vocabulary.
  return values | {'pad_token_id': None, 'torch_dtype': np.dtype(config.float_dtype).name}


def _shape(given: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of ModelConfig that stand in config.json as they are."""
  given = dict(given)
  if given.get('num_key_value_heads') is None:
    given['num_key_value_heads'] = given.get('num_attention_heads')
  sizes = ('hidden_size', 'num_attention_heads')
  if given.get('head_dim') is None and all(given.get(name) is not None for name in sizes):
    embed, heads = (typed(given[name], name, int, where) for name in sizes)
    given['head_dim'] = embed // heads
  missing = [name for name in FIELDS if given.get(name) is None]
  if missing:
    raise ValueError(f'{where}: missing {", ".join(missing)}')
  types = ModelConfig.__annotations__
  shape = {field: typed(given[name], name, types[field], where) for name, field in FIELDS.items()}
  if shape['num_heads'] % shape['num_kv_heads']:
    raise ValueError(
      f'{where}: {shape["num_heads"]} attention heads must be a multiple of '
      f'{shape["num_kv_heads"]} key-value heads'
    )
  return shape


def _switches(family: Family, given: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of ModelConfig that decide what a block does."""
  (name,) = {'hidden_act', 'hidden_activation'} & set(family.defaults)
  if given[name] not in list(ACTIVATIONS):
    raise ValueError(f'{where}: {name} is {given[name]!r}; supported: {", ".join(ACTIVATIONS)}')
  biases = family.biases
  for field, biased in BIASES.items():
    if field in family.defaults and typed(given[field], field, bool, where):
      biases |= biased
  caps = {
    field: None if given.get(cap) is None else typed(given[cap], cap, float, where)
    for cap, field in SOFTCAPS.items()
  }
  alike = ('norm_offset', 'input_norms', 'output_norms', 'qk_norm', 'fused_projections')
  return {
    'activation': ACTIVATIONS[given[name]],
    'biases': biases,
    **caps,
    **{field: getattr(family, field) for field in alike},
  }


def _attention_types(
  family: Family, given: Mapping[str, Any], shape: Mapping[str, Any], where: str
) -> tuple[AttentionType, ...]:
  """Returns the attention types of the layers, one period of them."""
  names, window = _layer_types(given, shape['num_layers'], where)
  ropes = {
    name: read_rope(given, name, head_dim=shape['head_dim'], scalings=family.scalings, where=where)
    for name in set(names)
  }
  types = [AttentionType(window if name == SLIDING else None, ropes[name]) for name in names]
  if 'no_rope_layers' in family.defaults:
    types = [
      layer if rotated else AttentionType(layer.window, None)
      for layer, rotated in zip(types, _rotated_layers(given, len(types), where), strict=True)
    ]
  periods = range(1, len(types) + 1)
  return tuple(types[: next(period for period in periods if types[period:] == types[:-period])])


def _rotated_layers(given: Mapping[str, Any], num_layers: int, where: str) -> Sequence[int]:
  """Returns 1 for each layer that has positions, 0 for each other."""
  every = typed(given['no_rope_layer_interval'], 'no_rope_layer_interval', int, where)
  rotated = given['no_rope_layers']
  if not rotated:
    return [int((layer + 1) % every != 0) for layer in range(num_layers)]
  right = isinstance(rotated, list) and all(turned in (0, 1) for turned in rotated)
  if not right or len(rotated) < num_layers:
    raise ValueError(
      f'{where}: no_rope_layers is {rotated}, not 0 or 1 for each of {num_layers} layers'
    )
  return rotated[:num_layers]


def _layer_types(
  given: Mapping[str, Any], num_layers: int, where: str
) -> tuple[Sequence[str], int | None]:
  """Returns the type of each layer, and the window of those that slide."""
  slides = typed(given.get('use_sliding_window', True), 'use_sliding_window', bool, where)
  window = given.get('sliding_window') if slides else None
  if window is not None:
    window = typed(window, 'sliding_window', int, where)
  if given.get('layer_types'):
    types = given['layer_types']
  elif 'sliding_window_pattern' in given:  # the last of so many layers sees everything
    every = typed(given['sliding_window_pattern'], 'sliding_window_pattern', int, where)
    types = [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]
  elif window is None:
    types = [FULL] * num_layers
  else:
    first = given.get('max_window_layers', 0)
    if type(first) is not int:
      raise ValueError(f'{where}: max_window_layers is {first!r}, not a number of layers')
    types = [SLIDING if layer >= first else FULL for layer in range(num_layers)]
  right = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
  if not right or len(types) != num_layers:
    raise ValueError(
      f'{where}: layer_types is {types}, not {FULL} or {SLIDING} for each of {num_layers} layers'
    )
  if SLIDING in types and window is None:
    raise ValueError(f'{where}: {SLIDING} in layer_types, and no sliding_window')
  return types, window
