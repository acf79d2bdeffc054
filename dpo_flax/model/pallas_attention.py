"""Attention on TPU that reads the mask rule itself: no [T, T] mask, no work where none is needed.

A block of keys is of use to a block of queries only if it does not start after the queries end, its
largest visible_until lies beyond the queries' start, and the window reaches it. `BlockPlan` lists,
for every block of queries, the blocks of keys of use to it (and the other way round for backward);
the kernels walk these lists, so that blocks in which nothing is visible cost neither arithmetic nor
memory traffic.

Online softmax as in FlashAttention-2 (arXiv:2307.08691). Backward recomputes the scores from the
saved log-sum-exp: one kernel gathers the gradient of a block of queries, one that of a block of
keys.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dpo_flax.model.layers import softly_capped
from dpo_flax.model.mask import LANES, BlockPlan, Mask, Window, block_size

_HIDDEN = -1e30  # below every score; -inf would breed NaN


def pallas_attention(
  queries: jax.Array,  # [B, H, T, head_dim], scaled
  keys: jax.Array,  # [B, K, T, head_dim]
  values: jax.Array,  # [B, K, T, head_dim]
  mask: Mask,
  softcap: float | None,
  interpret: bool = False,  # True: run on a CPU, to test
) -> jax.Array:  # [B, H, T, head_dim]
  """Softmax attention of each row under its mask, scores and sums in float32."""
  return _attend(queries, keys, values, mask, softcap, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(queries, keys, values, mask, softcap, interpret):
  return _forward(queries, keys, values, mask, softcap, interpret)[0]


def _visible(
  until: jax.Array,  # of the keys
  window: Window | None,  # positions of the keys, floor of the queries
  q_start: jax.Array,
  k_start: jax.Array,
  *,
  key_axis: int,
) -> jax.Array:
  """The mask of two blocks that meet: [1, S] and [S, 1] in, keys along `key_axis`."""
  size = until.shape[key_axis]
  key = k_start + jax.lax.broadcasted_iota(jnp.int32, (size, size), key_axis)
  query = q_start + jax.lax.broadcasted_iota(jnp.int32, (size, size), 1 - key_axis)
  visible = (key <= query) & (query < until)
  return visible if window is None else visible & (window.positions > window.floor)


def _steepness(capped: jax.Array, softcap: float | None) -> jax.Array | float:
  """The derivative of `softly_capped`, from what it gave."""
  return 1.0 if softcap is None else 1 - jnp.square(capped / softcap)


def _as_column(row: jax.Array) -> jax.Array:  # [1, S] -> [S, LANES], each lane alike
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _as_int_column(row: jax.Array) -> jax.Array:  # [1, S] -> [S, LANES]
  # Positions are small enough for float32, the one type that is transposed everywhere.
  return _as_column(row.astype(jnp.float32)).astype(jnp.int32)


def _as_row(column: jax.Array) -> jax.Array:  # [S, 1] -> [1, S]
  return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _query_scores(
  q_ref, k_ref, seen: Mask, floor_column: Sequence, starts: tuple, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
  """A block's scores, and which of them are visible: [queries, keys] both."""
  scores = softly_capped(_dot(q_ref[0, 0], k_ref[0, 0], (1, 1)), softcap)
  window = seen.window and Window(seen.window.positions[0], floor_column[0][:, :1])
  return scores, _visible(seen.visible_until[0], window, *starts, key_axis=1)


def _forward_kernel(keys_of, counts, q_ref, k_ref, v_ref, seen, o_ref, lse_ref, *scratch, softcap):
  row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  max_ref, sum_ref, acc_ref, *floor_column = scratch
  size = q_ref.shape[2]

  @pl.when(step == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, _HIDDEN)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    for column in floor_column:
      column[...] = _as_int_column(seen.window.floor[0])

  @pl.when(step < counts[row, block])
  def _():
    starts = block * size, keys_of[row, block, step] * size
    scores, visible = _query_scores(q_ref, k_ref, seen, floor_column, starts, softcap)
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
  keys_of, counts, q_ref, k_ref, v_ref, seen, do_ref, lse_ref, delta_ref, dq_ref, *scratch, softcap
):
  row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  lse_column, delta_column, acc_ref, *floor_column = scratch
  size = q_ref.shape[2]

  @pl.when(step == 0)
  def _():
    lse_column[...] = _as_column(lse_ref[0, 0])
    delta_column[...] = _as_column(delta_ref[0, 0])
    acc_ref[...] = jnp.zeros_like(acc_ref)
    for column in floor_column:
      column[...] = _as_int_column(seen.window.floor[0])

  @pl.when(step < counts[row, block])
  def _():
    starts = block * size, keys_of[row, block, step] * size
    scores, visible = _query_scores(q_ref, k_ref, seen, floor_column, starts, softcap)
    weights = jnp.exp(jnp.where(visible, scores, _HIDDEN) - lse_column[:, :1])
    slopes = _dot(do_ref[0, 0], v_ref[0, 0], (1, 1)) - delta_column[:, :1]
    slopes = weights * slopes * _steepness(scores, softcap)
    acc_ref[...] += _dot(slopes.astype(k_ref.dtype), k_ref[0, 0], (1, 0))

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    dq_ref[0, 0] = acc_ref[...].astype(dq_ref.dtype)


def _key_gradient_kernel(
  queries_of, counts, q_ref, k_ref, v_ref, seen, do_ref, lse_ref, delta_ref, *outputs, softcap
):
  row, block, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
  dk_ref, dv_ref, until_column, dk_acc, dv_acc, *positions_column = outputs
  size = k_ref.shape[2]

  @pl.when((head == 0) & (step == 0))
  def _():
    until_column[...] = _as_int_column(seen.visible_until[0])
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    for column in positions_column:
      column[...] = _as_int_column(seen.window.positions[0])

  @pl.when(step < counts[row, block])
  def _():
    # Keys along the first axis: a query's log-sum-exp and delta then lie along rows, as stored.
    scores = softly_capped(_dot(k_ref[0, 0], q_ref[0, 0], (1, 1)), softcap)  # [keys, queries]
    window = seen.window and Window(positions_column[0][:, :1], seen.window.floor[0])
    starts = queries_of[row, block, step] * size, block * size
    visible = _visible(until_column[:, :1], window, *starts, key_axis=0)
    weights = jnp.exp(jnp.where(visible, scores, _HIDDEN) - lse_ref[0, 0])
    dv_acc[...] += _dot(weights.astype(do_ref.dtype), do_ref[0, 0], (1, 0))
    slopes = _dot(v_ref[0, 0], do_ref[0, 0], (1, 1)) - delta_ref[0, 0]
    slopes = weights * slopes * _steepness(scores, softcap)
    dk_acc[...] += _dot(slopes.astype(q_ref.dtype), q_ref[0, 0], (1, 0))

  @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
  def _():
    dk_ref[0, 0] = dk_acc[...].astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


class _Specs(NamedTuple):
  """The blocks a kernel reads and writes, for grids that fix a block of queries or of keys."""

  query: pl.BlockSpec  # of queries, outputs and their gradients
  key: pl.BlockSpec  # of keys, values and their gradients
  seen: Any  # a Mask of them: [B, 1, T] each, without a plan
  row: pl.BlockSpec  # of the log-sum-exp and delta, [B, H, 1, T]


def _seen_specs(window: Window | None, of_keys: Any, of_queries: Any) -> Mask:
  return Mask(of_keys, window and Window(of_keys, of_queries), None)


def _query_specs(size: int, head_dim: int, group: int, window: Window | None) -> _Specs:
  """For a grid of (rows, heads, blocks of queries, steps over their keys)."""

  def key(row, head, block, step, keys_of, _):
    return row, head // group, keys_of[row, block, step], 0

  of_keys = pl.BlockSpec((1, 1, size), lambda b, h, i, s, keys_of, _: (b, 0, keys_of[b, i, s]))
  of_queries = pl.BlockSpec((1, 1, size), lambda b, h, i, s, *_: (b, 0, i))
  return _Specs(
    query=pl.BlockSpec((1, 1, size, head_dim), lambda b, h, i, s, *_: (b, h, i, 0)),
    key=pl.BlockSpec((1, 1, size, head_dim), key),
    seen=_seen_specs(window, of_keys, of_queries),
    row=pl.BlockSpec((1, 1, 1, size), lambda b, h, i, s, *_: (b, h, 0, i)),
  )


def _key_specs(size: int, head_dim: int, group: int, window: Window | None) -> _Specs:
  """For a grid of (rows, kv heads, blocks of keys, heads of the group, steps over queries)."""

  def query(row, kv_head, block, head, step, queries_of, _):
    return row, kv_head * group + head, queries_of[row, block, step], 0

  def along(row, kv_head, block, head, step, queries_of, _):
    return row, kv_head * group + head, 0, queries_of[row, block, step]

  of_keys = pl.BlockSpec((1, 1, size), lambda b, k, j, g, s, *_: (b, 0, j))
  of_queries = pl.BlockSpec(
    (1, 1, size), lambda b, k, j, g, s, queries_of, _: (b, 0, queries_of[b, j, s])
  )
  return _Specs(
    query=pl.BlockSpec((1, 1, size, head_dim), query),
    key=pl.BlockSpec((1, 1, size, head_dim), lambda b, k, j, g, s, *_: (b, k, j, 0)),
    seen=_seen_specs(window, of_keys, of_queries),
    row=pl.BlockSpec((1, 1, 1, size), along),
  )


def _seen(mask: Mask) -> Mask:
  """Returns what the kernels read of a mask beside its plan, [B, 1, T] each."""
  return jax.tree.map(lambda array: array[:, None], mask._replace(plan=None))


def _scratch(
  size: int, columns: Sequence[DTypeLike], sums: Sequence[int], window: Window | None
) -> list[Any]:
  """A number for each token of a block, of these types; sums [size, width]; one for a window."""
  shapes = [(LANES, dtype) for dtype in columns] + [(width, jnp.float32) for width in sums]
  shapes += [] if window is None else [(LANES, jnp.int32)]
  return [pltpu.VMEM((size, width), jnp.dtype(dtype)) for width, dtype in shapes]


def _forward(queries, keys, values, mask, softcap, interpret):
  rows, heads, tokens, head_dim = queries.shape
  size = block_size(tokens)
  blocks = tokens // size
  specs = _query_specs(size, head_dim, heads // keys.shape[1], mask.window)
  lse = jax.ShapeDtypeStruct((rows, heads, 1, tokens), jnp.float32)
  outputs, lse = pl.pallas_call(
    functools.partial(_forward_kernel, softcap=softcap),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, heads, blocks, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.seen],
      out_specs=[specs.query, specs.row],
      scratch_shapes=_scratch(size, [jnp.float32] * 2, [head_dim], mask.window),
    ),
    out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), lse],
    compiler_params=_parallel(3, 1),
    cost_estimate=_cost(queries, products=2),
    interpret=interpret,
  )(mask.plan.keys, mask.plan.key_counts, queries, keys, values, _seen(mask))
  return outputs, (queries, keys, values, mask, outputs, lse)


def _backward(softcap, interpret, saved, cotangent):
  queries, keys, values, mask, outputs, lse = saved
  # The part of a score's gradient that the softmax's normaliser takes back.
  delta = jnp.sum(outputs.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  inputs = (queries, keys, values, _seen(mask), cotangent, lse, delta[:, :, None])
  dq = _query_gradient(inputs, mask.plan, softcap, interpret)
  dk, dv = _key_gradient(inputs, mask.plan, softcap, interpret)
  return dq, dk, dv, None


def _query_gradient(inputs, plan: BlockPlan, softcap: float | None, interpret: bool) -> jax.Array:
  queries, keys, _, seen = inputs[:4]
  rows, heads, tokens, head_dim = queries.shape
  size = block_size(tokens)
  blocks = tokens // size
  specs = _query_specs(size, head_dim, heads // keys.shape[1], seen.window)
  return pl.pallas_call(
    functools.partial(_query_gradient_kernel, softcap=softcap),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, heads, blocks, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.seen, specs.query, specs.row, specs.row],
      out_specs=specs.query,
      scratch_shapes=_scratch(size, [jnp.float32] * 2, [head_dim], seen.window),
    ),
    out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
    compiler_params=_parallel(3, 1),
    cost_estimate=_cost(queries, products=3),
    interpret=interpret,
  )(plan.keys, plan.key_counts, *inputs)


def _key_gradient(
  inputs, plan: BlockPlan, softcap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  queries, keys, values, seen = inputs[:4]
  rows, kv_heads, tokens, head_dim = keys.shape
  size = block_size(tokens)
  blocks = tokens // size
  group = queries.shape[1] // kv_heads
  specs = _key_specs(size, head_dim, group, seen.window)
  return pl.pallas_call(
    functools.partial(_key_gradient_kernel, softcap=softcap),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows, kv_heads, blocks, group, blocks),
      in_specs=[specs.query, specs.key, specs.key, specs.seen, specs.query, specs.row, specs.row],
      out_specs=[specs.key, specs.key],
      scratch_shapes=_scratch(size, [jnp.int32], [head_dim] * 2, seen.window),
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
    compiler_params=_parallel(3, 2),
    cost_estimate=_cost(queries, products=4),
    interpret=interpret,
  )(plan.queries, plan.query_counts, *inputs)


def _cost(queries: jax.Array, *, products: int) -> pl.CostEstimate:
  """The work of a row that is one sequence; the compiler cannot know how much a mask will hide."""
  rows, heads, tokens, head_dim = queries.shape
  size = block_size(tokens)
  blocks = tokens // size
  meetings = rows * heads * blocks * (blocks + 1) // 2  # of a block of queries and one of keys
  return pl.CostEstimate(
    flops=2 * products * meetings * size**2 * head_dim,
    transcendentals=meetings * size**2,
    bytes_accessed=2 * meetings * size * head_dim * queries.dtype.itemsize,
  )


def _parallel(parallel: int, sequential: int) -> pltpu.CompilerParams:
  """The grid's leading axes are independent; along the rest a kernel accumulates."""
  return pltpu.CompilerParams(
    dimension_semantics=('parallel',) * parallel + ('arbitrary',) * sequential
  )


_attend.defvjp(_forward, _backward)
