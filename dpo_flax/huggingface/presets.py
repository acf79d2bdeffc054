"""Published architectures by name, so that a run needs no files to be planned."""

import difflib
from collections.abc import Mapping
from typing import Any

from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.model.config import ModelConfig


def _stretched(factor: float) -> dict[str, Any]:
  """Returns the positions of Llama 3.1 and later: 8,192 stretched to 131,072."""
  scaling = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
  scaling |= {'rope_type': 'llama3', 'factor': factor, 'original_max_position_embeddings': 8192}
  return {'rope_scaling': scaling, 'max_position_embeddings': 131_072}


def _of_family(shared: Mapping[str, Any], *values: int, **changes: Any) -> dict[str, Any]:
  """Returns `shared` with the sizes of one model: their order is that of _SIZES."""
  return {**shared, **dict(zip(_SIZES, values, strict=True)), **changes}


_SIZES = (
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
)
_LLAMA = {'model_type': 'llama', 'rms_norm_eps': 1e-5}
_LLAMA3 = _LLAMA | {
  'vocab_size': 128_256,
  'rope_theta': 500_000.0,
  'max_position_embeddings': 8192,
}
_LLAMA31 = _LLAMA3 | _stretched(8.0)
_LLAMA32 = _LLAMA3 | _stretched(32.0) | {'tie_word_embeddings': True}
_MISTRAL = {'model_type': 'mistral', 'rms_norm_eps': 1e-5, 'vocab_size': 32_000}
_MISTRAL3 = _MISTRAL | {'vocab_size': 32_768, 'sliding_window': None, 'rope_theta': 1_000_000.0}
_QWEN2 = {'model_type': 'qwen2', 'rope_theta': 1_000_000.0, 'vocab_size': 152_064}
_QWEN2_TIED = _QWEN2 | {'vocab_size': 151_936, 'tie_word_embeddings': True}
_QWEN3 = {'model_type': 'qwen3', 'rope_theta': 1_000_000.0, 'vocab_size': 151_936}
_GEMMA2 = {'model_type': 'gemma2', 'vocab_size': 256_000, 'sliding_window': 4096}
_GEMMA3_SMALL = {'model_type': 'gemma3_text', 'vocab_size': 262_144, 'sliding_window': 512}
# The language model inside; the checkpoints hold one of images beside it.
_GEMMA3 = {
  'model_type': 'gemma3_text',
  'vocab_size': 262_208,
  'sliding_window': 1024,
  'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
}
_PHI = {'model_type': 'phi3', 'rms_norm_eps': 1e-5}
# fmt: off
_PHI4_MINI_LONG = [
  1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
  2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
  5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
  11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
  25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
  32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on
_OLMO2 = {'model_type': 'olmo2', 'vocab_size': 100_352, 'rope_theta': 500_000.0}
_OLMO2 |= {'rms_norm_eps': 1e-6}
_SMOLLM3 = {'model_type': 'smollm3', 'rope_theta': 5_000_000.0, 'vocab_size': 128_256}
_SMOLLM2 = _LLAMA | {'vocab_size': 49_152, 'rope_theta': 100_000.0, 'tie_word_embeddings': True}

# Published config.json files, and `tiny`, which trains on a laptop.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  'tiny': _of_family(_LLAMA, 128, 384, 4, 4, 2, vocab_size=512, initializer_range=0.08),
  'llama2-7b': _of_family(
    _LLAMA, 4096, 11_008, 32, 32, 32, vocab_size=32_000, max_position_embeddings=4096
  ),
  'llama3-8b': _of_family(_LLAMA3, 4096, 14_336, 32, 32, 8),
  'llama3.1-8b': _of_family(_LLAMA31, 4096, 14_336, 32, 32, 8),
  'llama3.1-70b': _of_family(_LLAMA31, 8192, 28_672, 80, 64, 8),
  'llama3.2-1b': _of_family(_LLAMA32, 2048, 8192, 16, 32, 8, head_dim=64),
  'llama3.2-3b': _of_family(_LLAMA32, 3072, 8192, 28, 24, 8, head_dim=128),
  'mistral-7b-v0.1': _of_family(_MISTRAL, 4096, 14_336, 32, 32, 8, sliding_window=4096),
  'mistral-7b-v0.3': _of_family(_MISTRAL3, 4096, 14_336, 32, 32, 8),
  'qwen2.5-0.5b': _of_family(_QWEN2_TIED, 896, 4864, 24, 14, 2),
  'qwen2.5-1.5b': _of_family(_QWEN2_TIED, 1536, 8960, 28, 12, 2),
  'qwen2.5-3b': _of_family(_QWEN2_TIED, 2048, 11_008, 36, 16, 2),
  'qwen2.5-7b': _of_family(_QWEN2, 3584, 18_944, 28, 28, 4),
  'qwen2.5-14b': _of_family(_QWEN2, 5120, 13_824, 48, 40, 8, rms_norm_eps=1e-5),
  'qwen2.5-32b': _of_family(_QWEN2, 5120, 27_648, 64, 40, 8, rms_norm_eps=1e-5),
  'qwen2.5-72b': _of_family(_QWEN2, 8192, 29_568, 80, 64, 8, rms_norm_eps=1e-5),
  'qwen3-0.6b': _of_family(_QWEN3, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
  'qwen3-1.7b': _of_family(_QWEN3, 2048, 6144, 28, 16, 8, tie_word_embeddings=True),
  'qwen3-4b': _of_family(_QWEN3, 2560, 9728, 36, 32, 8, tie_word_embeddings=True),
  'qwen3-8b': _of_family(_QWEN3, 4096, 12_288, 36, 32, 8),
  'qwen3-14b': _of_family(_QWEN3, 5120, 17_408, 40, 40, 8),
  'qwen3-32b': _of_family(_QWEN3, 5120, 25_600, 64, 64, 8),
  'gemma2-2b': _of_family(_GEMMA2, 2304, 9216, 26, 8, 4),
  'gemma2-9b': _of_family(_GEMMA2, 3584, 14_336, 42, 16, 8),
  'gemma2-27b': _of_family(
    _GEMMA2, 4608, 36_864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144
  ),
  'gemma3-270m': _of_family(_GEMMA3_SMALL, 640, 2048, 18, 4, 1),
  'gemma3-1b': _of_family(_GEMMA3_SMALL, 1152, 6912, 26, 4, 1),
  'gemma3-4b': _of_family(_GEMMA3, 2560, 10_240, 34, 8, 4),
  'gemma3-12b': _of_family(_GEMMA3, 3840, 15_360, 48, 16, 8),
  'gemma3-27b': _of_family(
    _GEMMA3, 5376, 21_504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168
  ),
  'phi3-mini-4k': _of_family(_PHI, 3072, 8192, 32, 32, 32, vocab_size=32_064, sliding_window=2047),
  'phi4-mini': _of_family(
    _PHI,
    *(3072, 8192, 32, 24, 8),
    vocab_size=200_064,
    sliding_window=262_144,
    tie_word_embeddings=True,
    partial_rotary_factor=0.75,
    max_position_embeddings=131_072,
    original_max_position_embeddings=4096,
    rope_scaling={'type': 'longrope', 'short_factor': [1.0] * 48, 'long_factor': _PHI4_MINI_LONG},
  ),
  'phi4': _of_family(
    _PHI,
    *(5120, 17_920, 40, 40, 10),
    vocab_size=100_352,
    rope_theta=250_000.0,
    max_position_embeddings=16_384,
    original_max_position_embeddings=16_384,
  ),
  'olmo2-1b': _of_family(_OLMO2, 2048, 8192, 16, 16, 16),
  'olmo2-7b': _of_family(_OLMO2, 4096, 11_008, 32, 32, 32),
  'olmo2-13b': _of_family(_OLMO2, 5120, 13_824, 40, 40, 40),
  'olmo2-32b': _of_family(_OLMO2, 5120, 27_648, 64, 40, 8),
  'smollm2-135m': _of_family(_SMOLLM2, 576, 1536, 30, 9, 3),
  'smollm2-360m': _of_family(_SMOLLM2, 960, 2560, 32, 15, 5),
  'smollm2-1.7b': _of_family(_SMOLLM2, 2048, 8192, 24, 32, 32, rope_theta=130_000.0),
  'smollm3-3b': _of_family(_SMOLLM3, 2048, 11_008, 36, 16, 4),
}


def from_preset(name: str, **run: Any) -> ModelConfig:
  """Returns the architecture of a name in PRESETS; `run` is that of from_hf_config.

  Raises:
    ValueError: there is no such preset.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(sorted(PRESETS))}'
    raise ValueError(f'no preset is called {name!r}: {hint}')
  return from_hf_config(PRESETS[name], where=f'preset {name}', **run)
