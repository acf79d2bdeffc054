"""Laws of the adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from dpo_flax.model.layers import make_linear
from dpo_flax.model.linear import fit_magnitudes
from dpo_flax.model.lora import train_weights
from helpers.models import make_lora, make_model_config


def make_projection(config, lora, *, name='q_proj', features=(32, 24), b=0.3, seed=0):
  """Returns a projection whose B is random."""
  rngs = nnx.Rngs(seed, lora=seed + 1)
  projection = make_linear(name, features, ('embed', 'heads'), config=config, lora=lora, rngs=rngs)
  if projection.adapters.learned:
    shape = projection.adapters.learned.lora_b[...].shape
    projection.adapters.learned.lora_b[...] = jnp.asarray(
      b * np.random.default_rng(0).standard_normal(shape)
    ).astype(jnp.float32)
  return projection


@pytest.fixture(scope='module')
def inputs():
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 32)), jnp.float32)


@pytest.mark.parametrize(
  ('rslora', 'scale'), [(False, 10 / 4), (True, 10 / 2)], ids=['alpha_over_r', 'over_sqrt_r']
)
def test_output_is_base_plus_scaled_low_rank_product(inputs, rslora, scale):
  projection = make_projection(make_model_config(), make_lora(rslora=rslora))
  x, w, a, b = (
    np.asarray(array, np.float64)
    for array in (
      inputs,
      projection.kernel[...],
      projection.adapters.learned.lora_a[...],
      projection.adapters.learned.lora_b[...],
    )
  )
  np.testing.assert_allclose(projection(inputs), x @ w + scale * (x @ a) @ b, atol=1e-5)


@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize(('r', 'alpha'), [(8, 16.0), (64, 64.0), (2, 1.0)])
def test_scale_equals_peft(r, alpha, rslora):
  config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=['q_proj'])
  theirs = peft.get_peft_model(torch.nn.ModuleDict({'q_proj': torch.nn.Linear(3, 2)}), config)
  expected = theirs.base_model.model['q_proj'].scaling['default']
  scales = make_lora(r=r, alpha=alpha, rslora=rslora).scales('q_proj')
  assert scales == (pytest.approx(expected),)


def test_adapter_taken_off_equals_the_base_bit_for_bit(inputs):
  adapted = make_projection(make_model_config(), make_lora(dropout=0.5))
  plain = make_projection(make_model_config(), None)
  taken_off = nnx.view(adapted, adapted=False)
  assert not np.array_equal(adapted(inputs), plain(inputs))
  np.testing.assert_array_equal(taken_off(inputs, jax.random.key(0)), plain(inputs))
  np.testing.assert_array_equal(nnx.view(taken_off, adapted=True)(inputs), adapted(inputs))
  assert taken_off.kernel is adapted.kernel, 'a copy of the base would double its memory'


def test_a_projection_without_adapter_stays_plain_in_either_view():
  projection = make_projection(make_model_config(), None)
  assert nnx.view(projection, adapted=True).adapters.active == []


def test_fresh_adapter_changes_no_bit(inputs):
  projection = make_projection(make_model_config(), make_lora(), b=0.0)
  off = nnx.view(projection, adapted=False)
  np.testing.assert_array_equal(projection(inputs), off(inputs))


def test_a_starts_uniform_within_pefts_bound():
  lora = make_lora(r=64)
  projection = make_projection(make_model_config(), lora, features=(400, 16))
  a = np.asarray(projection.adapters.learned.lora_a[...])
  bound = 1 / np.sqrt(400)
  assert np.abs(a).max() <= bound
  assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_adapters_are_float32_and_products_of_the_models_dtype(inputs):
  config = make_model_config(dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16)
  projection = make_projection(config, make_lora())
  assert projection.kernel.dtype == jnp.bfloat16
  assert (
    projection.adapters.learned.lora_a.dtype
    == projection.adapters.learned.lora_b.dtype
    == jnp.float32
  )
  assert projection(inputs.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_keeps_the_mean_and_touches_the_adapter_alone(inputs):
  config = make_model_config()
  lora = make_lora(dropout=0.25)
  projection = make_projection(config, lora)
  keys = jax.random.split(jax.random.key(0), 4000)
  outputs = jax.jit(jax.vmap(lambda key: projection(inputs, key)))(keys)
  spread = np.asarray(outputs.std(axis=0))
  assert spread.min() > 0.01
  error = np.abs(outputs.mean(axis=0) - projection(inputs))
  assert (error < 5 * spread / np.sqrt(len(keys))).all()

  projection.adapters.learned.lora_b[...] = jnp.zeros_like(projection.adapters.learned.lora_b[...])
  off = nnx.view(projection, adapted=False)
  np.testing.assert_array_equal(projection(inputs, keys[0]), off(inputs))


def test_dropout_zeroes_its_share_of_inputs():
  """With W = 0, A = I and B = I the output is the dropped input itself."""
  config = make_model_config()
  lora = make_lora(r=32, alpha=32.0, dropout=0.25)
  projection = make_projection(config, lora, features=(32, 32))
  projection.kernel[...] = jnp.zeros((32, 32))
  projection.adapters.learned.lora_a[...] = projection.adapters.learned.lora_b[...] = jnp.eye(32)
  outputs = np.asarray(projection(jnp.ones((50, 20, 32)), jax.random.key(0)))
  assert set(np.unique(outputs)) == {0.0, np.float32(1 / 0.75)}
  assert (outputs == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_follows_its_key_and_differs_by_projection(inputs):
  lora = make_lora(dropout=0.5)
  q, k = (make_projection(make_model_config(), lora, name=name) for name in ('q_proj', 'k_proj'))
  first, second = jax.random.split(jax.random.key(0))
  np.testing.assert_array_equal(q(inputs), k(inputs))
  np.testing.assert_array_equal(q(inputs, first), q(inputs, first))
  assert not np.array_equal(q(inputs, first), q(inputs, second))
  assert not np.array_equal(q(inputs, first), k(inputs, first))
  assert not np.array_equal(q(inputs, first), q(inputs))


def dora(**changes):
  """Returns a DoRA projection whose every array is random, and its W, A, B, m in float64."""
  config = make_model_config(**changes)
  projection = make_projection(config, make_lora(dora=True))
  adapter = projection.adapters.learned
  draws = np.random.default_rng(5).uniform(0.5, 2, adapter.magnitude.shape)
  adapter.magnitude[...] *= jnp.asarray(draws, jnp.float32)
  arrays = (projection.weight.dense(), adapter.lora_a, adapter.lora_b, adapter.magnitude)
  return projection, [np.asarray(array[...], np.float64) for array in arrays]


@pytest.mark.parametrize('weight_dtype', ['float32', 'int8'])
def test_dora_gives_each_channel_its_length(inputs, weight_dtype):
  """Y = x m (W + scale A B) / ||W + scale A B||, the norm over a channel's inputs."""
  projection, (w, a, b, m) = dora(weight_dtype=jnp.dtype(weight_dtype))
  whole = w + 10 / 4 * a @ b
  expected = np.asarray(inputs, np.float64) @ (whole * m / np.linalg.norm(whole, axis=0))
  np.testing.assert_allclose(projection(inputs), expected, atol=2e-5)
  off = nnx.view(projection, adapted=False)
  np.testing.assert_allclose(off(inputs), np.asarray(inputs, np.float64) @ w, atol=1e-5)


def test_doras_gradient_is_that_of_its_closed_form(inputs):
  """Through the norm too, in float64; a norm taken as a constant fails by far."""
  projection, (w, a, b, m) = dora()
  cotangent = np.random.default_rng(7).standard_normal((2, 6, 24))
  graphdef, parts, rest = nnx.split(projection, nnx.LoRAParam, ...)

  def ours(parts):
    return jnp.sum(nnx.merge(graphdef, parts, rest)(inputs) * cotangent.astype(np.float32))

  def closed(a, b, m, norm=None):
    whole = torch.tensor(w) + 10 / 4 * a @ b
    norm = torch.linalg.norm(whole, dim=0) if norm is None else norm
    x = torch.tensor(np.asarray(inputs, np.float64))
    return torch.sum(x @ (whole * m / norm) * torch.tensor(cotangent))

  leaves = [torch.tensor(array, requires_grad=True) for array in (a, b, m)]
  found = jax.grad(ours)(parts)['adapters']['learned']
  exact = torch.autograd.grad(closed(*leaves), leaves)
  norm = torch.tensor(np.linalg.norm(w + 10 / 4 * a @ b, axis=0))
  constant = torch.autograd.grad(closed(*leaves, norm), leaves)
  for name, wanted, other in zip(('lora_a', 'lora_b', 'magnitude'), exact, constant, strict=True):
    np.testing.assert_allclose(found[name][...], wanted, rtol=1e-4, atol=1e-4)
    if name != 'magnitude':
      assert np.abs(found[name][...] - other.numpy()).max() > 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('weight_dtype', ['bfloat16', 'int8'])
def test_fresh_dora_changes_nothing(dtype, weight_dtype):
  """In bfloat16 not one bit, though the norms are computed twice, in different programs."""
  config = make_model_config(dtype=jnp.dtype(dtype), weight_dtype=jnp.dtype(weight_dtype))
  projection = make_projection(config, make_lora(dora=True), features=(256, 512), b=0.0)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 64, 256)), dtype)
  on, off = (nnx.jit(nnx.view(projection, adapted=adapted)) for adapted in (True, False))
  if dtype == 'bfloat16':
    np.testing.assert_array_equal(on(x), off(x))
  np.testing.assert_allclose(on(x), off(x), rtol=1e-6, atol=1e-6)


def test_a_kernel_that_learns_whole_is_used_in_bfloat16_and_has_a_float32_gradient(inputs):
  config = make_model_config(dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16)
  projection = make_projection(config, None)
  before = projection(inputs.astype(jnp.bfloat16))
  train_weights(projection, None)
  np.testing.assert_array_equal(projection(inputs.astype(jnp.bfloat16)), before)

  graphdef, trained = nnx.split(projection)
  gradient = jax.grad(
    lambda state: nnx.merge(graphdef, state)(inputs.astype(jnp.bfloat16)).astype(jnp.float32).sum()
  )(trained)['kernel'][...]
  expected = np.sum(inputs.astype(jnp.bfloat16).astype(np.float32), axis=(0, 1))[:, None]
  np.testing.assert_allclose(gradient, np.broadcast_to(expected, (32, 24)), rtol=1e-6, atol=1e-6)
  assert np.any(gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_channel_of_zeros_stays_zero_under_dora(inputs):
  projection = make_projection(make_model_config(), make_lora(dora=True), b=0.0)
  projection.kernel[...] = projection.kernel[...].at[:, 3].set(0)
  fit_magnitudes(projection)
  outputs, pullback = jax.vjp(projection, inputs)
  chex.assert_tree_all_finite((outputs, pullback(jnp.ones_like(outputs))[0]))
  assert not np.any(outputs[..., 3])
