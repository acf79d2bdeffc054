"""Attention under one mask rule: see mask.py."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.config import ModelConfig
from dpo_flax.model.layers import RMSNorm, make_linear, softly_capped
from dpo_flax.model.lora import LoraConfig
from dpo_flax.model.mask import Mask, Window, make_mask, make_window
from dpo_flax.model.pallas_attention import pallas_attention
from dpo_flax.model.rotary import Rotation, make_rotation, rotate
from dpo_flax.sharding import partition_spec

# Queries per block: each block only meets the keys up to its own end, so half of all scores are
# never computed, and no [H, T, T] array exists.
QUERY_BLOCK = 256


class AttentionInputs(NamedTuple):
  """What attention needs to know of a batch's positions."""

  rotation: Rotation
  mask: Mask


def make_attention_inputs(
  positions: jax.Array,  # [B, T] int32
  visible_until: jax.Array,  # [B, T] int32
  config: ModelConfig,
) -> list[AttentionInputs]:
  """Returns the inputs of each of `config.distinct_types`; what two share is the same array."""
  types, tokens = config.distinct_types, positions.shape[1]
  ropes = [each.rope for each in types]
  # No two tokens of a row are further apart than it is long.
  windows = [each.window if (each.window or tokens) < tokens else None for each in types]
  rotations = {
    rope: make_rotation(positions, rope, config.head_dim) for rope in dict.fromkeys(ropes)
  }
  masks = {}
  for size in dict.fromkeys(windows):
    window = make_window(positions, size) if any(windows) else None
    masks[size] = make_mask(visible_until, window, config.attention)
  return [
    AttentionInputs(rotations[rope], masks[size]) for rope, size in zip(ropes, windows, strict=True)
  ]


def select_inputs(
  inputs: Sequence[AttentionInputs],
  index: jax.Array | None,  # [] int32, of an attention type; None: there is one alone
) -> AttentionInputs:
  """Returns the inputs of one attention type, by the index that a scan over layers gives."""
  if index is None:
    return inputs[0]
  return jax.tree.map(
    lambda *cases: (
      cases[0] if all(case is cases[0] for case in cases) else jax.lax.select_n(index, *cases)
    ),
    *inputs,
  )


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    linear = functools.partial(make_linear, config=config, lora=lora, rngs=rngs)
    self.config = config
    embed = config.embed_dim
    heads, kv_heads = self._features()
    if config.fused_projections:
      self.qkv_proj = linear('qkv_proj', (embed, heads + 2 * kv_heads), ('embed', 'heads'))
    else:
      self.q_proj = linear('q_proj', (embed, heads), ('embed', 'heads'))
      self.k_proj = linear('k_proj', (embed, kv_heads), ('embed', 'kv_heads'))
      self.v_proj = linear('v_proj', (embed, kv_heads), ('embed', 'kv_heads'))
    self.o_proj = linear('o_proj', (heads, embed), ('heads', 'embed'))
    if config.qk_norm:
      over_all = config.qk_norm == 'all'
      self.q_norm = RMSNorm(config, heads if over_all else config.head_dim)
      self.k_norm = RMSNorm(config, kv_heads if over_all else config.head_dim)

  def __call__(
    self,
    hidden: jax.Array,  # [B, T, D]
    inputs: AttentionInputs,
    cache: Any = None,  # of keys and values; none is read or made yet
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:  # [B, T, D], the cache
    queries, keys, values = self._project(hidden, dropout_key)
    if self.config.qk_norm == 'all':
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    queries, keys, values = (
      array.reshape(*array.shape[:2], -1, self.config.head_dim) for array in (queries, keys, values)
    )
    if self.config.qk_norm == 'head':
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    queries, keys = rotate(queries, inputs.rotation), rotate(keys, inputs.rotation)
    mixed = attend(queries, keys, values, inputs.mask, config=self.config)
    return self.o_proj(mixed.reshape(*hidden.shape[:2], -1), dropout_key), cache

  def _features(self) -> tuple[int, int]:  # of all query heads, of all kv heads
    config = self.config
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

  def _project(self, hidden: jax.Array, dropout_key: jax.Array | None) -> Sequence[jax.Array]:
    if self.config.fused_projections:
      heads, kv_heads = self._features()
      return jnp.split(self.qkv_proj(hidden, dropout_key), (heads, heads + kv_heads), axis=-1)
    projections = (self.q_proj, self.k_proj, self.v_proj)
    return [projection(hidden, dropout_key) for projection in projections]


def attend(
  queries: jax.Array,  # [B, T, H, head_dim]
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  mask: Mask,
  *,
  config: ModelConfig,
) -> jax.Array:  # [B, T, H, head_dim]
  """Softmax attention under the mask, by the backend the mask was made for."""
  scale, softcap = config.attention_scale, config.attention_softcap
  if config.attention == 'xla':
    return xla_attention(queries, keys, values, mask, scale=scale, softcap=softcap)
  queries = (queries * scale).astype(queries.dtype)
  queries, keys, values = (array.swapaxes(1, 2) for array in (queries, keys, values))
  if config.attention == 'pallas' and jax.sharding.get_abstract_mesh().empty:  # one device
    return pallas_attention(queries, keys, values, mask, softcap).swapaxes(1, 2)
  # The compiler cannot split a kernel: each device runs it on its own rows and heads.
  split = partition_spec('rows', 'heads')
  kernel = jax.shard_map(
    lambda queries, keys, values, mask: pallas_attention(queries, keys, values, mask, softcap),
    in_specs=(split, split, split, partition_spec('rows')),
    out_specs=split,
    check_vma=False,
  )
  return kernel(queries, keys, values, mask).swapaxes(1, 2)


def xla_attention(
  queries: jax.Array,  # [B, T, H, head_dim]
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  mask: Mask,
  *,
  scale: float,
  softcap: float | None,
) -> jax.Array:  # [B, T, H, head_dim]
  """Softmax attention in plain XLA, one block of queries after the other, scores in float32."""
  tokens = queries.shape[1]
  blocks = []
  for start in range(0, tokens, QUERY_BLOCK):
    end = min(start + QUERY_BLOCK, tokens)
    block = functools.partial(_attend, start=start, scale=scale, softcap=softcap)
    # Recomputing the scores in backward is what keeps only one block of them alive.
    blocks.append(
      jax.checkpoint(block)(
        queries[:, start:end],
        keys[:, :end],
        values[:, :end],
        mask.visible_until[:, :end],
        mask.window and Window(mask.window.positions[:, :end], mask.window.floor[:, start:end]),
      )
    )
  return jnp.concatenate(blocks, axis=1)


def _attend(
  queries: jax.Array,  # [B, Q, H, head_dim], those at start ... start + Q
  keys: jax.Array,  # [B, S, K, head_dim]
  values: jax.Array,  # [B, S, K, head_dim]
  visible_until: jax.Array,  # [B, S]
  window: Window | None,  # positions [B, S], floor [B, Q]
  *,
  start: int,
  scale: float,
  softcap: float | None,
) -> jax.Array:  # [B, Q, H, head_dim]
  rows, length, heads, head_dim = queries.shape
  span, kv_heads = keys.shape[1:3]
  grouped = queries.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum('bqkgd,bskd->bkgqs', grouped, keys, preferred_element_type=jnp.float32)
  scores = softly_capped(scores * scale, softcap)
  query = (start + jnp.arange(length))[None, :, None]
  visible = (jnp.arange(span)[None, None] <= query) & (query < visible_until[:, None])
  if window is not None:
    visible &= window.positions[:, None] > window.floor[:, :, None]
  scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum('bkgqs,bskd->bqkgd', weights, values).reshape(queries.shape)
