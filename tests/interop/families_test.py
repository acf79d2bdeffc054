"""Every family against transformers: logits, packing, adapters, merged checkpoints."""

import numpy as np
import pytest
import transformers

# transformers' own save_pretrained calls a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')

LINEAR = {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1_000_000.0}
LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0, 1.5, 2.0],
  'long_factor': [4.0, 5.0, 6.0],
}
# A family, and changes of a small config that make every switch of it matter.
CASES = {
  'llama_with_biases': ('Llama', {'attention_bias': True, 'mlp_bias': True}),
  'mistral': ('Mistral', {'sliding_window': 7, 'head_dim': 12}),
  'mistral_without_window': ('Mistral', {'sliding_window': None}),
  'qwen2': ('Qwen2', {'tie_word_embeddings': True}),
  'qwen2_with_windows': (
    'Qwen2',
    {'use_sliding_window': True, 'sliding_window': 7, 'max_window_layers': 2},
  ),
  'qwen3': ('Qwen3', {'head_dim': 12}),
  'gemma2': (
    'Gemma2',
    {
      'head_dim': 12,
      'sliding_window': 7,
      'query_pre_attn_scalar': 10,
      'attn_logit_softcapping': 3.0,
      'final_logit_softcapping': 8.0,
    },
  ),
  'gemma3': (
    'Gemma3Text',
    {
      'num_hidden_layers': 7,
      'head_dim': 12,
      'sliding_window': 7,
      'query_pre_attn_scalar': 10,
      'rope_parameters': {
        'full_attention': LINEAR,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
      },
    },
  ),
  'phi3': ('Phi3', {'sliding_window': 7, 'num_key_value_heads': 4, 'pad_token_id': 0}),
  'phi3_long': (
    'Phi3',
    {
      'tie_word_embeddings': True,
      'rope_parameters': LONG,
      'partial_rotary_factor': 0.75,
      'max_position_embeddings': 400,
      'original_max_position_embeddings': 40,
      'pad_token_id': 0,
    },
  ),
  'olmo2': ('Olmo2', {}),
  'smollm3': ('SmolLM3', {'num_hidden_layers': 4, 'pad_token_id': 0}),
}


def make_config(llama, case):
  """Returns transformers' configuration of a case."""
  family, changes = CASES[case]
  return getattr(transformers, f'{family}Config')(**llama.small | changes)


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_transformers(llama, tokens, tmp_path, case):
  theirs = llama.their_logits(llama.write_model(tmp_path, make_config(llama, case)), tokens)
  ours = llama.our_logits(llama.read(tmp_path), tokens)
  assert theirs.std() > 1
  print(case, np.abs(ours - theirs).max())
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
