"""The adapted linear map in a model of one's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpo_flax.model.linear import Linear, fit_magnitudes
from dpo_flax.model.lora import TRAINABLE, Lora, LowRank, reference_of

ADAPTED = ['up.adapters.learned.lora_a', 'up.adapters.learned.lora_b']


class Model(nnx.Module):
  """A module that knows nothing of ours but Linear."""

  def __init__(self, lora, **changes):
    rngs = nnx.Rngs(0)
    self.up = Linear(8, 12, rngs=rngs, lora=lora, use_bias=True, **changes)
    self.down = Linear(12, 4, rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


def make(lora, **changes):
  """Returns a model whose B and bias are random."""
  model = Model(lora, **changes)
  draw = np.random.default_rng(0).standard_normal
  adapter = model.up.adapters.learned
  adapter.lora_b[...] = jnp.asarray(draw(adapter.lora_b.shape), jnp.float32)
  model.up.bias[...] = jnp.asarray(draw(12), jnp.float32)
  return model


def arrays(linear):
  adapter = linear.adapters.learned
  variables = (linear.kernel, linear.bias, adapter.lora_a, adapter.lora_b)
  return [np.asarray(variable[...], np.float64) for variable in variables]


@pytest.fixture(scope='module')
def x():
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 8)), jnp.float32)


@pytest.mark.parametrize(('rslora', 'scale'), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_a_linear_alone_equals_its_closed_form(x, rslora, scale):
  model = make(Lora(rank=3, alpha=6, rslora=rslora))
  w, bias, a, b = arrays(model.up)
  wide = np.asarray(x, np.float64)
  chex.assert_trees_all_close(
    model.up(x), np.float32(wide @ w + scale * (wide @ a) @ b + bias), atol=1e-5
  )
  chex.assert_trees_all_close(reference_of(model).up(x), np.float32(wide @ w + bias), atol=1e-5)
  assert reference_of(model).up.kernel is model.up.kernel


def test_dora_alone_equals_its_closed_form_whatever_weights_are_loaded(x):
  model = make(Lora(rank=3, dora=True))
  model.up.kernel[...] *= 2
  fit_magnitudes(model)
  w, bias, a, b = arrays(model.up)
  channels = w + a @ b
  channels *= np.linalg.norm(w, axis=0) / np.linalg.norm(channels, axis=0)
  expected = np.asarray(x, np.float64) @ channels + bias
  chex.assert_trees_all_close(model.up(x), np.float32(expected), atol=1e-5)


def test_only_adapters_learn_and_start_as_nothing(x):
  model = Model(Lora(rank=3))
  learned = nnx.state(model, TRAINABLE)
  assert ['.'.join(path) for path, _ in nnx.to_flat_state(learned)] == ADAPTED
  chex.assert_trees_all_equal(model(x), reference_of(model)(x))
  graphdef, learned, rest = nnx.split(model, TRAINABLE, ...)
  gradient = jax.grad(lambda state: nnx.merge(graphdef, state, rest)(x).sum())(learned)
  chex.assert_tree_all_finite(gradient)
  assert np.any(gradient['up']['adapters']['learned']['lora_b'][...])


def test_inputs_are_rounded_to_the_dtype_of_products(x):
  linear = Linear(8, 12, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  outputs = linear(x)
  chex.assert_type(outputs, jnp.bfloat16)
  chex.assert_trees_all_equal(outputs, linear(x.astype(jnp.bfloat16)))


def test_an_int8_kernel_alone_is_near_the_floats_it_was_made_from(x):
  floats, int8 = (Linear(8, 12, rngs=nnx.Rngs(0), param_dtype=d) for d in (jnp.float32, jnp.int8))
  assert int8.kernel.dtype == jnp.int8
  steps = int8.kernel_scale[...][None, None] * jnp.abs(x).sum(axis=-1, keepdims=True)
  assert (jnp.abs(int8(x) - floats(x)) <= steps / 2 + 1e-6).all()


def test_alpha_is_the_rank_unless_it_is_given():
  assert Lora(rank=8).alpha == 8 and Lora(rank=8, alpha=2.0).alpha == 2.0
  assert Lora(rank=8).for_module('q').modules == {'q': LowRank((8,), (8.0,))}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank': 0}, r'lora\.rank is 0: expected a whole number'),
    ({'rank': 1.5}, r'lora\.rank is 1\.5'),
    ({'alpha': -1.0}, r'lora\.alpha is -1\.0: expected a number'),
    ({'dropout': 1.0}, r'lora\.dropout is 1\.0'),
    ({'rank_pattern': {'q_proj': True}}, r'lora\.rank_pattern gives q_proj True'),
  ],
)
def test_what_is_out_of_range_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Lora(**fields)


def test_a_linear_refuses_to_choose_among_modules():
  with pytest.raises(ValueError, match=r"choose among modules: \{'target_modules'"):
    Linear(8, 4, rngs=nnx.Rngs(0), lora=Lora(target_modules=['q_proj']))


def test_a_reference_needs_a_part_that_has_a_view():
  with pytest.raises(ValueError, match='adapted'):
    reference_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
