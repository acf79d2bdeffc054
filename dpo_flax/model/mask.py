"""What each query may see, and which blocks of queries and keys the Pallas kernel brings together.

Queries q see key t where t <= q < visible_until[t] and, in layers with a sliding window,
positions[q] - positions[t] < window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU vector register


class Window(NamedTuple):
  """A sliding window: query q sees key t where positions[t] > floor[q]."""

  positions: jax.Array  # [B, T] int32
  floor: jax.Array  # [B, T] int32


class BlockPlan(NamedTuple):
  """Which blocks meet; n blocks of `size` tokens in a row."""

  keys: jax.Array  # [B, n, n] int32: of each block of queries, those of use first, in order
  key_counts: jax.Array  # [B, n] how many of them are of use
  queries: jax.Array  # [B, n, n] the same of each block of keys
  query_counts: jax.Array  # [B, n]


class Mask(NamedTuple):
  """What each query may see, prepared once for all layers of one attention type."""

  visible_until: jax.Array  # [B, T] int32
  window: Window | None
  plan: BlockPlan | None  # of the Pallas kernel alone


def make_mask(
  visible_until: jax.Array,  # [B, T] int32
  window: Window | None,
  backend: str,  # xla | pallas
) -> Mask:
  """Returns the mask of a batch for one backend."""
  plan = make_block_plan(visible_until, window) if backend == 'pallas' else None
  return Mask(visible_until, window, plan)


def make_window(
  positions: jax.Array,  # [B, T] int32
  size: int | None,  # None: as wide as any sequence
) -> Window:
  """Returns the window in which queries see keys less than `size` positions back."""
  return Window(positions, jnp.full_like(positions, -1) if size is None else positions - size)


def block_size(tokens: int) -> int:
  """Returns the tokens of a block; rows must be a multiple of 128 tokens.

  Raises:
    ValueError: they are not.
  """
  for size in (512, 256, 128):
    if tokens % size == 0:
      return size
  raise ValueError(f'batch.tokens={tokens}: attention on TPU needs a multiple of {LANES}')


def make_block_plan(visible_until: jax.Array, window: Window | None) -> BlockPlan:
  """Returns which blocks of keys may be visible to which blocks of queries.

  By visible_until [B, T] it is exactly those in which something is. Of a window it knows the
  farthest positions of each block: blocks in which sequences end may meet for nothing.
  """
  rows, tokens = visible_until.shape
  size = block_size(tokens)

  def blocks(array):  # [B, T] -> [B, n, size]
    return array.reshape(rows, -1, size)

  furthest = blocks(visible_until).max(axis=-1)  # [B, n]
  block = jnp.arange(tokens // size)
  starts_before = block[:, None] >= block[None]  # [queries, keys]
  reaches = furthest[:, None, :] > (block * size)[None, :, None]
  useful = starts_before[None] & reaches  # [B, queries, keys]
  if window is not None:
    last, floor = blocks(window.positions).max(axis=-1), blocks(window.floor).min(axis=-1)
    useful &= last[:, None, :] > floor[:, :, None]

  def listed(useful):  # [B, n, n] -> lists along the last axis
    order = jnp.argsort(~useful, axis=-1, stable=True).astype(jnp.int32)
    counts = useful.sum(axis=-1, dtype=jnp.int32)
    # Past its end a list repeats its last block, which is then not fetched again.
    last = jnp.maximum(counts - 1, 0)[..., None]
    index = jnp.minimum(block[None, None], last)
    return jnp.take_along_axis(order, index, axis=-1), counts

  return BlockPlan(*listed(useful), *listed(useful.swapaxes(1, 2)))
