"""Architectures from config.json files and presets."""

import math

import jax.numpy as jnp
import pytest
import transformers

from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.huggingface.families import FAMILIES
from dpo_flax.model.config import AttentionType, LinearScaling, Llama3Scaling, Rope

RUN = {'dtype': jnp.float32, 'weight_dtype': jnp.bfloat16, 'remat': 'full', 'attention': 'xla'}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def read(values):
  return from_hf_config(values, where='config.json', **RUN)


def with_changes(**changes):
  """Returns a Llama 2 config.json of the kind that transformers 4.31 wrote."""
  values = {
    '_name_or_path': 'somewhere',
    'architectures': ['LlamaForCausalLM'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_act': 'silu',
    'hidden_size': 64,
    'initializer_range': 0.02,
    'intermediate_size': 160,
    'max_position_embeddings': 4096,
    'model_type': 'llama',
    'num_attention_heads': 8,
    'num_hidden_layers': 2,
    'num_key_value_heads': 4,
    'pretraining_tp': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': None,
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
    'transformers_version': '4.31.0.dev0',
    'use_cache': True,
    'vocab_size': 320,
  }
  return {name: value for name, value in (values | changes).items() if value != 'absent'}


def test_every_field_arrives():
  config = read(with_changes())
  assert (config.vocab_size, config.embed_dim, config.mlp_dim) == (320, 64, 160)
  assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 8, 4)
  assert (config.head_dim, config.rms_norm_eps, config.initializer_range) == (8, 1e-5, 0.02)
  assert config.attention_types == (AttentionType(None, Rope(10_000.0, dim=8, scaling=None)),)
  assert (config.activation, config.attention_scale) == ('silu', 8**-0.5)
  assert not config.tie_word_embeddings
  assert {name: getattr(config, name) for name in RUN} == RUN


def test_fields_left_out_mean_what_they_mean_in_transformers():
  optional = ['num_key_value_heads', 'rms_norm_eps', 'tie_word_embeddings', 'initializer_range']
  values = with_changes(**dict.fromkeys(optional, 'absent'))
  theirs = transformers.LlamaConfig(**values)
  ours = read(values)
  assert ours.num_kv_heads == theirs.num_key_value_heads == 8
  assert ours.head_dim == theirs.head_dim
  assert ours.rms_norm_eps == theirs.rms_norm_eps
  assert ours.tie_word_embeddings == theirs.tie_word_embeddings
  assert ours.initializer_range == theirs.initializer_range
  assert ours.attention_types[0].rope.theta == theirs.rope_parameters['rope_theta']


@pytest.mark.parametrize(
  'rope',
  [
    {'rope_theta': 500_000.0, 'rope_scaling': LLAMA3},
    {'rope_theta': 500_000.0, 'rope_scaling': {**LLAMA3, 'type': 'llama3'}},
    {'rope_parameters': {**LLAMA3, 'rope_theta': 500_000.0}, 'rope_scaling': 'absent'},
  ],
  ids=['before_transformers_5', 'both_names_of_the_type', 'transformers_5'],
)
def test_rope_of_every_age_reads_alike(rope):
  config = read(with_changes(**rope))
  scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
  assert config.attention_types[0].rope == Rope(500_000.0, dim=8, scaling=scaling)


def test_what_transformers_writes_is_read():
  theirs = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
  assert read(theirs.to_dict()).embed_dim == 64


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('model_type', 'mamba'),
    ('model_type', 'absent'),
    ('hidden_act', 'gelu'),
    ('attention_bias', 1),
    ('layer_types', ['full_attention', 'full_attention']),
    ('pretraining_tp', 2),
    ('attention_dropout', 0.1),
    ('sliding_window', 4096),
    ('quantization_config', {'quant_method': 'gptq'}),
    ('partial_rotary_factor', 0.5),
    ('rope_scaling', {'type': 'linear'}),
    ('rope_scaling', {'rope_type': 'yarn', 'factor': 2.0}),
    ('rope_scaling', {'rope_type': 'llama3', 'factor': 2.0}),
    ('rope_scaling', {**LLAMA3, 'factor': 'eight'}),
    ('rope_parameters', {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}),
    ('rope_theta', -1.0),
    ('hidden_size', 'absent'),
    ('num_attention_heads', 'absent'),
    ('vocab_size', '320'),
    ('num_hidden_layers', 0),
    ('tie_word_embeddings', 1),
    ('num_key_value_heads', 3),
    ('head_dim', 7),
  ],
)
def test_what_would_change_the_maths_is_refused_by_name(field, value):
  spoken = {
    'rope_scaling': 'rotary',
    'rope_parameters': 'rotary',
    'num_key_value_heads': 'key-value',
  }
  with pytest.raises(ValueError, match=rf'config\.json: .*{spoken.get(field, field)}'):
    read(with_changes(**{field: value}))


@pytest.mark.parametrize('value', [None, False, {}, []])
def test_unknown_features_that_are_off_are_accepted(value):
  assert read(with_changes(some_feature=value)) == read(with_changes())


# Sizes alone, as few as transformers can do with.
SIZES = {
  'vocab_size': 320,
  'hidden_size': 128,
  'intermediate_size': 160,
  'num_hidden_layers': 7,
  'num_attention_heads': 32,
}


@pytest.mark.parametrize('empty', [{}, {'sliding_window': None}, {'final_logit_softcapping': None}])
@pytest.mark.parametrize('model_type', FAMILIES)
def test_missing_and_empty_fields_mean_in_every_family_what_they_mean_in_transformers(
  model_type, empty
):
  if model_type.startswith('gemma'):
    empty = {name: value for name, value in empty.items() if name != 'sliding_window'}
  values = SIZES | {'model_type': model_type} | empty
  theirs = transformers.AutoConfig.for_model(**values)
  assert read(values) == read(theirs.to_dict())


def test_positions_of_local_layers_are_read_in_both_ways():
  """Gemma 3 before and since transformers 5."""
  linear = {'rope_type': 'linear', 'factor': 8.0}
  old = {'rope_theta': 5e5, 'rope_local_base_freq': 2e4, 'rope_scaling': linear}
  new = {
    'full_attention': linear | {'rope_theta': 5e5},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 2e4},
  }
  gemma = SIZES | {'model_type': 'gemma3_text'}
  configs = [read(gemma | old), read(gemma | {'rope_parameters': new})]
  assert configs[0] == configs[1]
  local, whole = configs[0].distinct_types
  assert local == AttentionType(4096, Rope(2e4, dim=256, scaling=None))
  assert whole == AttentionType(None, Rope(5e5, dim=256, scaling=LinearScaling(8.0)))


def test_positions_of_phi3_are_stretched_as_transformers_stretches_them():
  factors = {'short_factor': [1.0, 1.5], 'long_factor': [4, 5]}
  lengths = {'max_position_embeddings': 131_072, 'original_max_position_embeddings': 4096}
  values = SIZES | lengths | {'model_type': 'phi3', 'rope_scaling': {'type': 'su', **factors}}
  config = read(values)
  scaling = config.layer_types[0].rope.scaling
  assert (scaling.short_factor, scaling.long_factor) == ((1.0, 1.5), (4.0, 5.0))
  assert scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
  assert config.longest_sequence == 4096


@pytest.mark.parametrize(
  ('model_type', 'field', 'value'),
  [
    ('mistral', 'sliding_window', 0),
    ('mistral', 'layer_types', ['full_attention'] * 7),
    ('qwen2', 'rope_scaling', {'type': 'yarn', 'factor': 4.0}),
    ('qwen2', 'layer_types', ['linear_attention'] * 7),
    ('qwen2', 'layer_types', [[]] * 7),
    ('qwen2', 'use_mrope', True),
    ('qwen3', 'layer_types', ['sliding_attention'] * 7),
    ('qwen3', 'use_sliding_window', 'yes'),
    ('gemma2', 'hidden_activation', 'gelu'),
    ('gemma2', 'hidden_activation', []),
    ('gemma2', 'hidden_act', 'silu'),
    ('gemma2', 'sliding_window', None),
    ('gemma2', 'use_bidirectional_attention', True),
    ('gemma2', 'attn_logit_softcapping', -1.0),
    ('gemma3_text', 'attn_logit_softcapping', 50.0),
    ('gemma3_text', 'rope_parameters', {'rope_type': 'default', 'rope_theta': 1e4}),
    ('phi3', 'rope_scaling', {'type': 'longrope', 'short_factor': [1.0], 'long_factor': [1.0]}),
    ('phi3', 'rope_scaling', {'type': 'yarn', 'factor': 4.0}),
    ('phi3', 'partial_rotary_factor', 1.5),
    ('phi3', 'resid_pdrop', 0.1),
    ('phi3', 'full_attn_mod', 2),
    ('olmo2', 'clip_qkv', 8.0),
    ('smollm3', 'use_sliding_window', True),
    ('smollm3', 'no_rope_layers', [1, 1]),
    ('smollm3', 'no_rope_layers', [2] * 7),
  ],
)
def test_what_a_family_does_not_do_is_refused_by_name(model_type, field, value):
  spoken = {'rope_scaling': 'rotary', 'rope_parameters': 'rotary', 'partial_rotary_factor': 'head'}
  with pytest.raises(ValueError, match=rf'config\.json: .*{spoken.get(field, field)}'):
    read(SIZES | {'model_type': model_type, field: value})
