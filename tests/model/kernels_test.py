"""Kernels: what is multiplied is what `dense` says."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpo_flax.model.kernels import Dense, Int8, Learned, Trained, kernel_of, make_weight


def make(kind):
  """Returns a kernel [6, 5] of random weights."""
  weight = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32)
  if kind is Learned:
    return kernel_of(Trained(weight), None)
  dtype = {Dense: jnp.float32, Int8: jnp.int8}[kind]
  return kernel_of(*make_weight(weight, dtype, (None, None), input_axis=0))


@pytest.mark.parametrize('kind', [Dense, Learned, Int8])
def test_a_kernel_times_the_identity_is_dense(kind):
  kernel = make(kind)
  assert type(kernel) is kind
  product = kernel.matmul(jnp.eye(6), jnp.float32)
  chex.assert_type([product, kernel.dense()], jnp.float32)
  chex.assert_trees_all_close(product, kernel.dense(), rtol=1e-6)


@pytest.mark.parametrize('kind', [Dense, Learned, Int8])
def test_a_product_has_the_dtype_that_is_asked_for(kind):
  inputs = jnp.ones((2, 3, 6), jnp.bfloat16)
  for dtype in (jnp.bfloat16, jnp.float32):
    product = make(kind).matmul(inputs, dtype)
    chex.assert_shape(product, (2, 3, 5))
    chex.assert_type(product, dtype)


def test_scales_have_the_axis_of_a_weights_outputs():
  weight, axes = jnp.ones((6, 5)), ('embed', 'heads')
  for input_axis, size, axis in ((0, 5, 'heads'), (1, 6, 'embed')):
    _, scale = make_weight(weight, jnp.int8, axes, input_axis=input_axis)
    chex.assert_shape(scale[...], (size,))
    assert scale.get_metadata()['out_sharding'] == (axis,)


def test_stacked_int8_weights_are_scaled_layer_by_layer():
  weight = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 5)), jnp.float32)
  layers = [make_weight(each, jnp.int8, (None, None), input_axis=0) for each in weight]
  stacked = [nnx.Param(jnp.stack([pair[i][...] for pair in layers])) for i in range(2)]
  expected = jnp.stack([kernel_of(*pair).dense() for pair in layers])
  chex.assert_trees_all_equal(kernel_of(*stacked).dense(), expected)
