"""Attention under the one mask rule: queries q see key t where t <= q < visible_until[t]."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from dpo_flax.model import pallas_attention
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.layers import apply_rope
from dpo_flax.model.lora import LoraConfig, Projection
from dpo_flax.sharding import partition_spec

# Queries per block: each block only meets the keys up to its own end, so half of all scores are
# never computed, and no [H, T, T] array exists.
QUERY_BLOCK = 256


class Mask(NamedTuple):
  """What each query may see, prepared once for all layers."""

  visible_until: jax.Array  # [B, T] int32
  plan: pallas_attention.BlockPlan | None  # of the Pallas kernel alone


def make_mask(visible_until: jax.Array, backend: str) -> Mask:
  """Returns the mask of a batch for one backend: xla | pallas | splash."""
  pallas = backend == 'pallas'
  return Mask(visible_until, pallas_attention.make_block_plan(visible_until) if pallas else None)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    def projection(name, features, axes):
      return Projection(name, features, axes, config=config, lora=lora, rngs=rngs)

    self.head_dim, self.backend = config.head_dim, config.attention
    heads, kv_heads = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
    embed = config.embed_dim
    self.q_proj = projection('q_proj', (embed, heads), ('embed', 'heads'))
    self.k_proj = projection('k_proj', (embed, kv_heads), ('embed', 'kv_heads'))
    self.v_proj = projection('v_proj', (embed, kv_heads), ('embed', 'kv_heads'))
    self.o_proj = projection('o_proj', (heads, embed), ('heads', 'embed'))

  def __call__(
    self,
    hidden: jax.Array,  # [B, T, D]
    angles: jax.Array,  # [B, T, head_dim / 2]
    mask: Mask,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:  # [B, T, D]
    rows, tokens, _ = hidden.shape

    def heads(projection):
      return projection(hidden, dropout_key).reshape(rows, tokens, -1, self.head_dim)

    queries = apply_rope(heads(self.q_proj), angles)
    keys = apply_rope(heads(self.k_proj), angles)
    mixed = attend(queries, keys, heads(self.v_proj), mask, self.backend)
    return self.o_proj(mixed.reshape(rows, tokens, -1), dropout_key)


def attend(
  queries: jax.Array,  # [B, T, H, head_dim]
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  mask: Mask,
  backend: str,  # xla | pallas | splash
) -> jax.Array:  # [B, T, H, head_dim]
  """Softmax attention under the mask, by the backend the mask was made for.

  splash serves the separate layout alone, where visible_until is constant inside a sequence.
  """
  if backend == 'xla':
    return xla_attention(queries, keys, values, mask.visible_until)
  queries = (queries * queries.shape[-1] ** -0.5).astype(queries.dtype)
  heads_first = (array.swapaxes(1, 2) for array in (queries, keys, values))
  # The compiler cannot split a kernel: each device runs it on its own rows and heads.
  rows, split = partition_spec('rows'), partition_spec('rows', 'heads')
  kernel = jax.shard_map(
    {'pallas': pallas_attention.pallas_attention, 'splash': splash_attention}[backend],
    in_specs=(split, split, split, rows, rows),
    out_specs=split,
    check_vma=False,
  )
  return kernel(*heads_first, *mask).swapaxes(1, 2)


def splash_attention(
  queries: jax.Array,  # [B, H, T, head_dim], scaled
  keys: jax.Array,  # [B, K, T, head_dim]
  values: jax.Array,  # [B, K, T, head_dim]
  visible_until: jax.Array,  # [B, T] int32, constant inside a sequence
  _: None = None,
  interpret: bool = False,  # True: run on a CPU, to test
) -> jax.Array:  # [B, H, T, head_dim]
  """JAX's splash kernel, a group of query heads and its kv head at a time."""
  rows, heads, tokens, head_dim = queries.shape
  kv_heads = keys.shape[1]
  group = heads // kv_heads
  mask = splash_attention_mask.MultiHeadMask(
    [splash_attention_mask.CausalMask((tokens, tokens))] * group
  )
  kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, interpret=interpret)
  # Where a sequence ends tells it from the others of its row.
  segments = splash_attention_kernel.SegmentIds(q=visible_until, kv=visible_until)
  over_kv_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  grouped = queries.reshape(rows, kv_heads, group, tokens, head_dim)
  return jax.vmap(over_kv_heads)(grouped, keys, values, segments).reshape(queries.shape)


def xla_attention(
  queries: jax.Array,  # [B, T, H, head_dim]
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  visible_until: jax.Array,  # [B, T] int32
) -> jax.Array:  # [B, T, H, head_dim]
  """Softmax attention in plain XLA, one block of queries after the other, scores in float32."""
  tokens = queries.shape[1]
  blocks = []
  for start in range(0, tokens, QUERY_BLOCK):
    end = min(start + QUERY_BLOCK, tokens)
    block = functools.partial(_attend, start=start)
    # Recomputing the scores in backward is what keeps only one block of them alive.
    blocks.append(
      jax.checkpoint(block)(
        queries[:, start:end], keys[:, :end], values[:, :end], visible_until[:, :end]
      )
    )
  return jnp.concatenate(blocks, axis=1)


def _attend(
  queries: jax.Array,  # [B, Q, H, head_dim], those at start ... start + Q
  keys: jax.Array,  # [B, S, K, head_dim]
  values: jax.Array,  # [B, S, K, head_dim]
  visible_until: jax.Array,  # [B, S]
  *,
  start: int,
) -> jax.Array:  # [B, Q, H, head_dim]
  rows, length, heads, head_dim = queries.shape
  span, kv_heads = keys.shape[1:3]
  grouped = queries.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum('bqkgd,bskd->bkgqs', grouped, keys, preferred_element_type=jnp.float32)
  query = (start + jnp.arange(length))[None, :, None]
  visible = (jnp.arange(span)[None, None] <= query) & (query < visible_until[:, None])
  scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum('bkgqs,bskd->bqkgd', weights, values).reshape(queries.shape)
