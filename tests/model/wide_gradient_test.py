"""A product in bfloat16 whose weight's gradient stays float32 up to the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dpo_flax.model.wide_gradient import matmul
from dpo_flax.planning.compiled import hlo
from dpo_flax.sharding import make_mesh


def draw(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_the_product_is_that_of_the_rounded_weight(dtype):
  inputs, weight = draw(0, 2, 5, 8, dtype=jnp.bfloat16), draw(1, 8, 3)
  product = matmul(inputs, weight, dtype)
  assert product.dtype == dtype
  wide = inputs.astype(jnp.float32) @ weight.astype(jnp.bfloat16).astype(jnp.float32)[None]
  rounding = 1e-6 if dtype == jnp.float32 else 2**-8
  np.testing.assert_allclose(product.astype(jnp.float32), wide, rtol=rounding, atol=rounding)


def test_gradients_are_those_of_the_sum_in_float32():
  inputs, weight = draw(0, 4, 300, 8, dtype=jnp.bfloat16), draw(1, 8, 3)
  slopes = draw(2, 4, 300, 3, dtype=jnp.bfloat16)
  _, pullback = jax.vjp(lambda *args: matmul(*args, jnp.bfloat16), inputs, weight)
  back, gradient = pullback(slopes)
  assert (back.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
  exact = [np.asarray(array, np.float64) for array in (inputs, slopes)]
  # Rounded to bfloat16 the sum over 1,200 tokens would be off by up to 0.2 %.
  np.testing.assert_allclose(gradient, np.einsum('bti,bto->io', *exact), rtol=1e-5, atol=1e-4)
  narrow = np.asarray(weight.astype(jnp.bfloat16), np.float64)
  np.testing.assert_allclose(
    np.asarray(back, np.float64), exact[1] @ narrow.T, rtol=0.01, atol=0.01
  )


def test_slices_add_their_gradients_in_float32(monkeypatch, without_compilation_cache):
  """As the compiler for TPU sends them through the data centre's network."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc('v5e:2x2', 'tpu', num_slices=2).devices
  mesh = make_mesh({'data': 2, 'fsdp': 4, 'tensor': 1}, devices)

  def shape(sizes, dtype, *spec):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

  inputs = shape((16, 128, 256), jnp.bfloat16, ('data', 'fsdp'))
  gradient = jax.grad(lambda weight, inputs: matmul(inputs, weight, jnp.bfloat16).sum())
  lowered = jax.jit(gradient).lower(shape((256, 128), jnp.float32), inputs)
  program = hlo.parse(lowered.compile().as_text())
  everything = [one for part in program.computations.values() for one in part.values()]
  sent = {one.arrays[0].dtype for one in everything if one.opcode == 'send'}
  reduced = {array.dtype for one in everything for array in one.arrays if 'reduce' in one.opcode}
  assert sent == {'f32'} and 'bf16' not in reduced
