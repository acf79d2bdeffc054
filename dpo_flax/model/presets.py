"""Published architectures by name, so that a run needs no files to be planned."""

import difflib
from collections.abc import Mapping
from typing import Any

from dpo_flax.model.config import ModelConfig
from dpo_flax.model.families import from_hf_config

_LLAMA3 = {
  'model_type': 'llama',
  'vocab_size': 128_256,
  'hidden_size': 4096,
  'intermediate_size': 14_336,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500_000.0,
  'max_position_embeddings': 8192,
}


def _stretched(factor: float) -> dict[str, Any]:
  """Returns the positions of Llama 3.1 and later: 8,192 stretched to 131,072."""
  scaling = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
  scaling |= {'rope_type': 'llama3', 'factor': factor, 'original_max_position_embeddings': 8192}
  return {'rope_scaling': scaling, 'max_position_embeddings': 131_072}


# Published config.json files, and `tiny`, which trains on a laptop.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  'tiny': {
    'model_type': 'llama',
    'vocab_size': 512,
    'hidden_size': 128,
    'intermediate_size': 384,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-5,
    'initializer_range': 0.08,
  },
  'llama2-7b': {
    'model_type': 'llama',
    'vocab_size': 32_000,
    'hidden_size': 4096,
    'intermediate_size': 11_008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 4096,
  },
  'llama3-8b': _LLAMA3,
  'llama3.1-8b': _LLAMA3 | _stretched(8.0),
  'llama3.1-70b': _LLAMA3
  | _stretched(8.0)
  | {
    'hidden_size': 8192,
    'intermediate_size': 28_672,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
  },
  'llama3.2-1b': _LLAMA3
  | _stretched(32.0)
  | {
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'head_dim': 64,
    'tie_word_embeddings': True,
  },
  'llama3.2-3b': _LLAMA3
  | _stretched(32.0)
  | {
    'hidden_size': 3072,
    'intermediate_size': 8192,
    'num_hidden_layers': 28,
    'num_attention_heads': 24,
    'head_dim': 128,
    'tie_word_embeddings': True,
  },
}


def from_preset(
  name: str, *, dtype: Any, weight_dtype: Any, remat: str, attention: str
) -> ModelConfig:
  """Returns the architecture of a name in PRESETS; the other fields are the run's.

  Raises:
    ValueError: there is no such preset.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(sorted(PRESETS))}'
    raise ValueError(f'no preset is called {name!r}: {hint}')
  return from_hf_config(
    PRESETS[name],
    dtype=dtype,
    weight_dtype=weight_dtype,
    remat=remat,
    attention=attention,
    where=f'preset {name}',
  )
