"""The small parts against transformers' and against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.llama import modeling_llama

from dpo_flax.model.config import Llama3Scaling, Rope
from dpo_flax.model.layers import MLP, RMSNorm
from dpo_flax.model.rotary import make_rotation, rotate
from helpers.models import make_model_config

SCALING = Llama3Scaling(
  factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('epsilon', [1e-6, 0.1])
def test_rms_norm_equals_transformers(epsilon):
  hidden, scale = normal(2, 5, 32), normal(32, seed=1)
  ours = RMSNorm(make_model_config(rms_norm_eps=epsilon), 32)
  ours.scale[...] = jnp.asarray(scale)
  theirs = modeling_llama.LlamaRMSNorm(32, eps=epsilon)
  theirs.weight.data = torch.tensor(scale)
  expected = theirs(torch.tensor(hidden)).detach().numpy()
  np.testing.assert_allclose(ours(jnp.asarray(hidden)), expected, atol=1e-6)


def test_rms_norm_of_bfloat16_is_taken_in_float32():
  """Rounded once, at the end: nearly every number is the float32 one's nearest."""
  config = make_model_config(dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16)
  hidden = jnp.asarray(normal(1, 1, 4096), jnp.bfloat16)
  normed = RMSNorm(config, 4096)(hidden)
  wide = np.asarray(hidden, np.float32)
  expected = jnp.asarray(wide / np.sqrt((wide**2).mean()), jnp.bfloat16)
  assert normed.dtype == jnp.bfloat16
  assert np.mean(normed == expected) > 0.99


@pytest.mark.parametrize('scaling', [None, SCALING], ids=['plain', 'llama3'])
def test_rotation_equals_transformers(scaling):
  rope = Rope(500_000.0, dim=16, scaling=scaling)
  positions = np.array([[0, 1, 2, 63, 64], [7, 7, 500, 8000, 8001]])
  heads = normal(2, 5, 3, 16)
  parameters = {'rope_type': 'default', 'rope_theta': rope.theta}
  if scaling is not None:
    parameters |= {'rope_type': 'llama3'} | dataclasses.asdict(scaling)
  theirs = modeling_llama.LlamaRotaryEmbedding(
    transformers.LlamaConfig(
      hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters=parameters
    )
  )
  cos, sin = theirs(torch.tensor(heads), torch.tensor(positions))
  expected, _ = modeling_llama.apply_rotary_pos_emb(
    torch.tensor(heads), torch.tensor(heads), cos, sin, unsqueeze_dim=2
  )
  ours = rotate(jnp.asarray(heads), make_rotation(jnp.asarray(positions), rope, 16))
  # A float32 angle of 8,000 radians is right to 5e-4.
  np.testing.assert_allclose(ours, expected.numpy(), atol=2e-3)
  np.testing.assert_allclose(ours[0], expected.numpy()[0], atol=2e-5)


def test_rotated_products_depend_on_the_distance_alone():
  rope = Rope(10_000.0, dim=16, scaling=None)
  query, key = jnp.asarray(normal(1, 1, 1, 16)), jnp.asarray(normal(1, 1, 1, 16, seed=1))

  def product(query_at, key_at):
    turned = [
      rotate(heads, make_rotation(jnp.array([[at]]), rope, 16))
      for heads, at in ((query, query_at), (key, key_at))
    ]
    return float(jnp.sum(turned[0] * turned[1]))

  assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
  assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_rotations_of_bfloat16_heads_are_float32():
  """In bfloat16, positions 1000 and 1001 would be the same."""
  rotation = make_rotation(jnp.array([[1000, 1001]]), Rope(10_000.0, dim=8, scaling=None), 8)
  angles = np.unwrap(np.arctan2(rotation.sin, rotation.cos)[0, :, 0, 0])
  np.testing.assert_allclose(angles[1] - angles[0], 1.0, atol=1e-3)
  assert rotate(jnp.ones((1, 2, 1, 8), jnp.bfloat16), rotation).dtype == jnp.bfloat16


def test_what_is_not_rotated_stays():
  """The rest of a head behind a partial rotation, and heads that have no positions."""
  heads, positions = jnp.asarray(normal(1, 3, 2, 16)), jnp.array([[0, 5, 9]])
  part = rotate(heads, make_rotation(positions, Rope(10_000.0, dim=12, scaling=None), 16))
  np.testing.assert_array_equal(part[..., 12:], heads[..., 12:])
  assert np.abs(part - heads)[:, 1:, :, :12].min() > 0
  np.testing.assert_array_equal(rotate(heads, make_rotation(positions, None, 16)), heads)


def test_mlp_equals_its_formula():
  config = make_model_config()
  mlp = MLP(config, None, nnx.Rngs(0))
  hidden = normal(2, 3, config.embed_dim)
  gate, up, down = (
    np.asarray(projection.kernel[...], np.float64)
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
  )
  gated = hidden @ gate
  expected = (gated / (1 + np.exp(-gated)) * (hidden @ up)) @ down
  np.testing.assert_allclose(jax.jit(mlp)(jnp.asarray(hidden)), expected, atol=1e-5)
