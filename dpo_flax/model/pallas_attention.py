"""Attention on TPU that reads `visible_until` itself: no [T, T] mask, no work where none is needed.

Queries q see key t where t <= q < visible_until[t]. A block of keys is therefore of use to a block
of queries exactly if it does not start after the queries end, and its largest visible_until lies
beyond the queries' start. `BlockPlan` lists, for every block of queries, the blocks of keys of use
to it (and the other way round for backward); the kernels walk these lists, so that blocks in which
nothing is visible cost neither arithmetic nor memory traffic.

Online softmax as in FlashAttention-2 (arXiv:2307.08691). Backward recomputes the scores from the
saved log-sum-exp: one kernel gathers the gradient of a block of queries, one that of a block of
keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # of a TPU vector register
_HIDDEN = -1e30  # a score that no other can be told apart from; -inf would breed NaN


class BlockPlan(NamedTuple):
  """Which blocks meet; n blocks of `size` tokens in a row."""

  keys: jax.Array  # [B, n, n] int32: of each block of queries, those of use first, in order
  key_counts: jax.Array  # [B, n] how many of them are of use
  queries: jax.Array  # [B, n, n] the same of each block of keys
  query_counts: jax.Array  # [B, n]


def block_size(tokens: int) -> int:
  """Returns the tokens of a block; rows must be a multiple of 128 tokens.

  Raises:
    ValueError: they are not.
  """
  for size in (512, 256, 128):
    if tokens % size == 0:
      return size
  raise ValueError(f'batch.tokens={tokens}: attention on TPU needs a multiple of {_LANES}')


def make_block_plan(visible_until: jax.Array) -> BlockPlan:  # [B, T] int32
  """Returns which blocks of keys are visible to which blocks of queries."""
  rows, tokens = visible_until.shape
  size = block_size(tokens)
  furthest = visible_until.reshape(rows, -1, size).max(axis=-1)  # [B, n]
  block = jnp.arange(tokens // size)
  starts_before = block[:, None] >= block[None]  # [queries, keys]
  reaches = furthest[:, None, :] > (block * size)[None, :, None]
  useful = starts_before[None] & reaches  # [B, queries, keys]

  def listed(useful):  # [B, n, n] -> lists along the last axis
    order = jnp.argsort(~useful, axis=-1, stable=True).astype(jnp.int32)
    counts = useful.sum(axis=-1, dtype=jnp.int32)
    # Past its end a list repeats its last block, which is then not fetched again.
    last = jnp.maximum(counts - 1, 0)[..., None]
    place = jnp.minimum(block[None, None], last)
    return jnp.take_along_axis(order, place, axis=-1), counts

  return BlockPlan(*listed(useful), *listed(useful.swapaxes(1, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def pallas_attention(
  queries: jax.Array,  # [B, H, T, head_dim], scaled
  keys: jax.Array,  # [B, K, T, head_dim]
  values: jax.Array,  # [B, K, T, head_dim]
  visible_until: jax.Array,  # [B, T] int32
  plan: BlockPlan,
  interpret: bool = False,  # True: run on a CPU, to test
) -> jax.Array:  # [B, H, T, head_dim]
  """Softmax attention of each row under its mask, scores and sums in float32."""
  return _forward(queries, keys, values, visible_until, plan, interpret)[0]


def _visible(visible_until: jax.Array, q_start: jax.Array, k_start: jax.Array, *, key_axis: int):
  """The mask of two blocks that meet; visible_until is [1, S] or [S, 1], keys along `key_axis`."""
  size = visible_until.shape[key_axis]
  key = k_start + jax.lax.broadcasted_iota(jnp.int32, (size, size), key_axis)
  query = q_start + jax.lax.broadcasted_iota(jnp.int32, (size, size), 1 - key_axis)
  return (key <= query) & (query < visible_until)


def _as_column(row: jax.Array) -> jax.Array:  # [1, S] -> [S, LANES], each lane alike
  return jnp.broadcast_to(row, (_LANES, row.shape[1])).T


def _as_row(column: jax.Array) -> jax.Array:  # [S, 1] -> [1, S]
  return jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(
  keys_of, counts, q_ref, k_ref, v_ref, until_ref, o_ref, lse_ref, max_ref, sum_ref, acc_ref
):
  row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  size = q_ref.shape[2]

  @pl.when(step == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, _HIDDEN)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(step < counts[row, block])
  def _():
    scores = _dot(q_ref[0, 0], k_ref[0, 0], (1, 1))  # [queries, keys]
    visible = _visible(until_ref[0], block * size, keys_of[row, block, step] * size, key_axis=1)
    scores = jnp.where(visible, scores, _HIDDEN)
    before = max_ref[:, :1]
    now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - now)
    kept = jnp.exp(before - now)
    max_ref[...] = jnp.broadcast_to(now, max_ref.shape)
    total = kept * sum_ref[:, :1] + weights.sum(axis=1, keepdims=True)
    sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)
    mixed = _dot(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
    acc_ref[...] = kept * acc_ref[...] + mixed

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    o_ref[0, 0] = (acc_ref[...] / sum_ref[:, :1]).astype(o_ref.dtype)
    lse_ref[0, 0] = _as_row(max_ref[:, :1] + jnp.log(sum_ref[:, :1]))


def _query_gradient_kernel(
  keys_of, counts, q_ref, k_ref, v_ref, until_ref, do_ref, lse_ref, delta_ref, dq_ref, *scratch
):
  row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  lse_column, delta_column, acc_ref = scratch
  size = q_ref.shape[2]

  @pl.when(step == 0)
  def _():
    lse_column[...] = _as_column(lse_ref[0, 0])
    delta_column[...] = _as_column(delta_ref[0, 0])
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(step < counts[row, block])
  def _():
    scores = _dot(q_ref[0, 0], k_ref[0, 0], (1, 1))  # [queries, keys]
    visible = _visible(until_ref[0], block * size, keys_of[row, block, step] * size, key_axis=1)
    weights = jnp.exp(jnp.where(visible, scores, _HIDDEN) - lse_column[:, :1])
    slopes = _dot(do_ref[0, 0], v_ref[0, 0], (1, 1)) - delta_column[:, :1]
    acc_ref[...] += _dot((weights * slopes).astype(k_ref.dtype), k_ref[0, 0], (1, 0))

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    dq_ref[0, 0] = acc_ref[...].astype(dq_ref.dtype)


def _key_gradient_kernel(
  queries_of, counts, q_ref, k_ref, v_ref, until_ref, do_ref, lse_ref, delta_ref, *outputs
):
  row, block, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
  dk_ref, dv_ref, until_column, dk_acc, dv_acc = outputs
  size = k_ref.shape[2]

  @pl.when((head == 0) & (step == 0))
  def _():
    # Positions are small enough for float32, the one type that is transposed everywhere.
    until_column[...] = _as_column(until_ref[0].astype(jnp.float32)).astype(jnp.int32)
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  @pl.when(step < counts[row, block])
  def _():
    # Keys along the first axis: a query's log-sum-exp and delta then lie along rows, as stored.
    scores = _dot(k_ref[0, 0], q_ref[0, 0], (1, 1))  # [keys, queries]
    visible = _visible(
      until_column[:, :1], queries_of[row, block, step] * size, block * size, key_axis=0
    )
    weights = jnp.exp(jnp.where(visible, scores, _HIDDEN) - lse_ref[0, 0])
    dv_acc[...] += _dot(weights.astype(do_ref.dtype), do_ref[0, 0], (1, 0))
    slopes = _dot(v_ref[0, 0], do_ref[0, 0], (1, 1)) - delta_ref[0, 0]
    dk_acc[...] += _dot((weights * slopes).astype(q_ref.dtype), q_ref[0, 0], (1, 0))

  @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
  def _():
    dk_ref[0, 0] = dk_acc[...].astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


class _Specs(NamedTuple):
  """The blocks a kernel reads and writes, for grids that fix a block of queries or of keys."""

  query: pl.BlockSpec  # of queries, outputs and their gradients
  key: pl.BlockSpec  # of keys, values and their gradients
  until: pl.BlockSpec  # of visible_until, [B, 1, T]
  row: pl.BlockSpec  # of the log-sum-exp and delta, [B, H, 1, T]


def _query_specs(size: int, head_dim: int, group: int) -> _Specs:
  """For a grid of (rows, heads, blocks of queries, steps over their keys)."""

  def key(row, head, block, step, keys_of, _):
    return row, head // group, keys_of[row, block, step], 0

  return _Specs(
    query=pl.BlockSpec((1, 1, size, head_dim), lambda b, h, i, s, *_: (b, h, i, 0)),
    key=pl.BlockSpec((1, 1, size, head_dim), key),
    until=pl.BlockSpec((1, 1, size), lambda b, h, i, s, keys_of, _: (b, 0, keys_of[b, i, s])),
    row=pl.BlockSpec((1, 1, 1, size), lambda b, h, i, s, *_: (b, h, 0, i)),
  )


def _key_specs(size: int, head_dim: int, group: int) -> _Specs:
  """For a grid of (rows, kv heads, blocks of keys, heads of the group, steps over queries)."""

  def query(row, kv_head, block, head, step, queries_of, _):
    return row, kv_head * group + head, queries_of[row, block, step], 0

  def along(row, kv_head, block, head, step, queries_of, _):
    return row, kv_head * group + head, 0, queries_of[row, block, step]

  return _Specs(
    query=pl.BlockSpec((1, 1, size, head_dim), query),
    key=pl.BlockSpec((1, 1, size, head_dim), lambda b, k, j, g, s, *_: (b, k, j, 0)),
    until=pl.BlockSpec((1, 1, size), lambda b, k, j, g, s, *_: (b, 0, j)),
    row=pl.BlockSpec((1, 1, 1, size), along),
  )


def _forward(queries, keys, values, visible_until, plan, interpret):
  rows, heads, tokens, head_dim = queries.shape
  size = block_size(tokens)
  blocks = tokens // size
  specs = _query_specs(size, head_dim, heads // keys.shape[1])
  lse = jax.ShapeDtypeStruct((rows, heads, 1, tokens), jnp.float32)
  outputs, lse = pl.pallas_call(
    _forward_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, heads, blocks, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.until],
      out_specs=[specs.query, specs.row],
      scratch_shapes=[
        pltpu.VMEM((size, _LANES), jnp.float32),
        pltpu.VMEM((size, _LANES), jnp.float32),
        pltpu.VMEM((size, head_dim), jnp.float32),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), lse],
    compiler_params=_parallel(3, 1),
    interpret=interpret,
  )(plan.keys, plan.key_counts, queries, keys, values, visible_until[:, None])
  return outputs, (queries, keys, values, visible_until, plan, outputs, lse)


def _backward(interpret, saved, cotangent):
  queries, keys, values, visible_until, plan, outputs, lse = saved
  # The part of a score's gradient that the softmax's normaliser takes back.
  delta = jnp.sum(outputs.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  inputs = (queries, keys, values, visible_until[:, None], cotangent, lse, delta[:, :, None])
  dq = _query_gradient(inputs, plan, interpret)
  dk, dv = _key_gradient(inputs, plan, interpret)
  return dq, dk, dv, None, None


def _query_gradient(inputs, plan: BlockPlan, interpret: bool) -> jax.Array:
  queries, keys = inputs[:2]
  rows, heads, tokens, head_dim = queries.shape
  size = block_size(tokens)
  blocks = tokens // size
  specs = _query_specs(size, head_dim, heads // keys.shape[1])
  return pl.pallas_call(
    _query_gradient_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, heads, blocks, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.until, specs.query, specs.row, specs.row],
      out_specs=specs.query,
      scratch_shapes=[
        pltpu.VMEM((size, _LANES), jnp.float32),
        pltpu.VMEM((size, _LANES), jnp.float32),
        pltpu.VMEM((size, head_dim), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
    compiler_params=_parallel(3, 1),
    interpret=interpret,
  )(plan.keys, plan.key_counts, *inputs)


def _key_gradient(inputs, plan: BlockPlan, interpret: bool) -> tuple[jax.Array, jax.Array]:
  queries, keys, values = inputs[:3]
  rows, kv_heads, tokens, head_dim = keys.shape
  size = block_size(tokens)
  blocks = tokens // size
  group = queries.shape[1] // kv_heads
  specs = _key_specs(size, head_dim, group)
  return pl.pallas_call(
    _key_gradient_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, kv_heads, blocks, group, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.until, specs.query, specs.row, specs.row],
      out_specs=[specs.key, specs.key],
      scratch_shapes=[
        pltpu.VMEM((size, _LANES), jnp.int32),
        pltpu.VMEM((size, head_dim), jnp.float32),
        pltpu.VMEM((size, head_dim), jnp.float32),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
    compiler_params=_parallel(3, 2),
    interpret=interpret,
  )(plan.queries, plan.query_counts, *inputs)


def _parallel(parallel: int, sequential: int) -> pltpu.CompilerParams:
  """The grid's leading axes are independent; along the rest a kernel accumulates."""
  return pltpu.CompilerParams(
    dimension_semantics=('parallel',) * parallel + ('arbitrary',) * sequential
  )


pallas_attention.defvjp(_forward, _backward)
