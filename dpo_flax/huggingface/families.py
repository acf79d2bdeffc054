"""Model families: what sets each apart, and what transformers takes its missing fields to be."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What the models of one `model_type` have in common."""

  architecture: str  # transformers' class
  defaults: Mapping[str, Any]  # fields of config.json, and transformers' values where it lacks them
  fixed: Mapping[str, Any]  # fields whose only value here is this one: another changes the maths
  scalings: tuple[str, ...] = ('linear', 'llama3')  # of rotary positions
  biases: frozenset[str] = frozenset()  # projections that have one in every model
  norm_offset: float = 0.0
  input_norms: bool = True
  output_norms: bool = False
  qk_norm: str | None = None
  fused_projections: bool = False
  scales_embeddings: bool = False  # by the square root of their size


_DEFAULTS = {
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'initializer_range': 0.02,
  'rope_theta': 10_000.0,
}
_LLAMA = _DEFAULTS | {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
# Layers from max_window_layers on have a window, if there is one at all.
_QWEN = _DEFAULTS | {
  'hidden_act': 'silu',
  'num_key_value_heads': 32,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
  'layer_types': None,
}
_GEMMA = _DEFAULTS | {
  'hidden_activation': 'gelu_pytorch_tanh',
  'num_key_value_heads': 4,
  'head_dim': 256,
  'tie_word_embeddings': True,
  'attention_bias': False,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'layer_types': None,
}
_GEMMA_ALIKE = {'norm_offset': 1.0, 'output_norms': True, 'scales_embeddings': True}
_NO_DROPOUT = {'attention_dropout': 0.0}

FAMILIES = {
  'llama': Family('LlamaForCausalLM', _LLAMA, _NO_DROPOUT | {'pretraining_tp': 1}),
  'mistral': Family(
    'MistralForCausalLM',
    _DEFAULTS | {'hidden_act': 'silu', 'num_key_value_heads': 8, 'sliding_window': 4096},
    _NO_DROPOUT,
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM', _QWEN, _NO_DROPOUT, biases=frozenset(['q_proj', 'k_proj', 'v_proj'])
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM',
    _QWEN | {'head_dim': 128, 'attention_bias': False},
    _NO_DROPOUT,
    qk_norm='head',
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    _GEMMA
    | {
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      'sliding_window_pattern': 2,
    },
    _NO_DROPOUT | {'hidden_act': 'gelu_pytorch_tanh', 'sliding_window_pattern': 2},
    **_GEMMA_ALIKE,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    _GEMMA
    | {
      # Published files leave out even these.
      'vocab_size': 262_208,
      'hidden_size': 2304,
      'intermediate_size': 9216,
      'num_hidden_layers': 26,
      'num_attention_heads': 8,
      'rope_theta': 1_000_000.0,
      'rope_local_base_freq': 10_000.0,
      'sliding_window_pattern': 6,
      'final_logit_softcapping': None,
    },
    # transformers reads a cap of the scores here and does not apply it.
    _NO_DROPOUT | {'hidden_act': 'gelu_pytorch_tanh', 'attn_logit_softcapping': None},
    qk_norm='head',
    **_GEMMA_ALIKE,
  ),
  'phi3': Family(
    'Phi3ForCausalLM',
    _DEFAULTS
    | {
      'hidden_act': 'silu',
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096,
      'partial_rotary_factor': 1.0,
      'sliding_window': None,
    },
    _NO_DROPOUT
    | {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'full_attn_mod': 1, 'interpolate_factor': 1},
    scalings=('longrope',),
    fused_projections=True,
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM',
    _DEFAULTS | {'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'attention_bias': False},
    _NO_DROPOUT,
    input_norms=False,
    output_norms=True,
    qk_norm='all',
  ),
  'smollm3': Family(
    'SmolLM3ForCausalLM',
    _LLAMA
    | {
      'num_key_value_heads': 4,
      'tie_word_embeddings': True,
      'rope_theta': 2_000_000.0,
      'no_rope_layers': None,
      'no_rope_layer_interval': 4,
      'layer_types': None,
    },
    _NO_DROPOUT | {'use_sliding_window': False},
  ),
}
