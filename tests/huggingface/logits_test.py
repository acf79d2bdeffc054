"""Our network against transformers' LlamaForCausalLM on the same files."""

import numpy as np
import pytest

from helpers import llama

# transformers' own save_pretrained calls a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')

SHAPES = {
  'grouped_queries': {},
  'as_many_keys_as_queries': {'num_key_value_heads': 4},
  'one_key_head': {'num_key_value_heads': 1},
  'wide_heads': {'head_dim': 12},
  'tied_embeddings': {'tie_word_embeddings': True},
  'slow_rotation': {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500_000.0}},
  'coarse_norm': {'rms_norm_eps': 0.1},
}


@pytest.mark.parametrize('changes', SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers(tokens, tmp_path, changes):
  theirs = llama.their_logits(llama.write(tmp_path, **changes), tokens)
  ours = llama.our_logits(llama.read(tmp_path), tokens)
  assert theirs.std() > 1
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_logits_equal_transformers_with_stretched_positions(tokens, tmp_path):
  theirs = llama.their_logits(llama.write(tmp_path, rope_parameters=llama.ROPE_LLAMA3), tokens)
  ours = llama.our_logits(llama.read(tmp_path), tokens)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)

  plain = llama.their_logits(llama.write(tmp_path / 'plain'), tokens)
  assert np.abs(theirs - plain).max() > 0.01, 'the scaling must matter for this test to say much'
