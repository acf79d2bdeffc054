"""Laws of the TPU kernel: it is XLA's attention, it works where something is seen, it compiles."""

import functools
import importlib.util
import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_flax.model.attention import xla_attention
from dpo_flax.model.mask import make_mask, make_window
from dpo_flax.model.pallas_attention import pallas_attention
from helpers.packings import draw_packing

TOKENS = 384  # three blocks of 128


def random_heads(head_dim, heads=4, kv_heads=2):
  """Queries, keys and values, and a cotangent of the output: [2, TOKENS, heads, head_dim]."""
  random = np.random.default_rng(0)
  shapes = [(2, TOKENS, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


def interpreted(queries, keys, values, mask, softcap):
  scaled = queries * queries.shape[-1] ** -0.5
  inputs = (array.swapaxes(1, 2) for array in (scaled, keys, values))
  return pallas_attention(*inputs, mask, softcap, True).swapaxes(1, 2)


def by_xla(queries, keys, values, mask, softcap):
  scale = queries.shape[-1] ** -0.5
  return xla_attention(queries, keys, values, mask, scale=scale, softcap=softcap)


@functools.partial(jax.jit, static_argnums=(5, 6))
def outputs_and_gradients(queries, keys, values, cotangent, packing, window, softcap):
  visible_until, positions = packing
  seen = None if window is None else make_window(positions, window)
  mask = make_mask(visible_until, seen, 'pallas')
  found = []
  for attention in (interpreted, by_xla):
    outputs, pullback = jax.vjp(
      lambda *heads, attention=attention: attention(*heads, mask, softcap), queries, keys, values
    )
    found.append((outputs, pullback(cotangent)))
  return found


@pytest.mark.parametrize(
  ('head_dim', 'window', 'softcap'),
  [(64, None, None), (128, None, None), (64, 50, None), (64, None, 2.0), (128, 50, 2.0)],
)
@hypothesis.given(
  seed=st.integers(0, 2**32),
  longest=st.sampled_from([8, 60, 200]),
  layout=st.sampled_from(['shared', 'separate']),
)
@hypothesis.settings(max_examples=8)
def test_kernel_equals_xla_attention_forward_and_backward(
  head_dim, window, softcap, seed, **packing
):
  packing = draw_packing(seed, rows=2, tokens=TOKENS, **packing)
  heads = random_heads(head_dim)
  ours, theirs = outputs_and_gradients(*heads, packing, window, softcap)
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
  for gradient, expected in zip(ours[1], theirs[1], strict=True):
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


@pytest.mark.usefixtures('without_compilation_cache')
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the tpu extra')
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
@pytest.mark.parametrize('tokens', [4096, 8192])
@pytest.mark.parametrize(
  ('head_dim', 'window', 'softcap'),
  [(64, None, None), (128, None, None), (256, None, None), (128, 1024, None), (256, 1024, 50.0)],
)
def test_kernel_compiles_for_tpu_without_a_mask_in_memory(
  topology, tokens, head_dim, window, softcap
):
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # no TPU to ask
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(devices[:1], ('one',))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

  def total(queries, keys, values, visible_until, positions):
    seen = None if window is None else make_window(positions, window)
    mask = make_mask(visible_until, seen, 'pallas')
    return pallas_attention(queries, keys, values, mask, softcap).astype(jnp.float32).sum()

  heads = [shape(1, n, tokens, head_dim) for n in (32, 8, 8)]
  places = [shape(1, tokens, dtype=jnp.int32)] * 2
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(*heads, *places)
  temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
  # Outputs and gradients may be temporaries (heads fill a register's 128 lanes), and the
  # log-sum-exp and delta in float32; scores may not.
  assert temporaries < 4 * 32 * tokens * max(head_dim, 128) * 2 + 2 * 32 * tokens * 4
