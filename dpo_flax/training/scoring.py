"""Log-probs of pairs by one model alone, no loss and no gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_flax.data import loader
from dpo_flax.data.batches import pack
from dpo_flax.data.prepare import PreparedData
from dpo_flax.model.hidden import Model, check_tokens
from dpo_flax.sharding import row_parts, row_shard, shard_batch
from dpo_flax.training.logps import Batch, pair_logps

_ROWS = 8  # of a device, where pairs are scored one a row
_LANES = 128  # rows of few pairs have a multiple of these tokens


def score_side(
  model: Model, data: PreparedData, side: str, *, logits_chunk: int, mesh: Mesh
) -> np.ndarray:
  """Returns [n, 2] float32: the log-probs of chosen and rejected of every pair of a side, once.

  All processes call it together, and all get every pair.
  """
  score = _scorer(model, logits_chunk, mesh)
  index, count = row_shard(mesh)
  every_row = data.every_row(side)
  found = np.full((len(getattr(data, side)), 2), np.nan, np.float32)
  batches = loader.every_pair(data, side, shard_index=index, shard_count=count)
  for step, batch in enumerate(batches):
    for row, values in enumerate(score(batch), start=step * data.rows.rows):
      if row < len(every_row):
        pairs = every_row[row]
        found[pairs] = values[: len(pairs)]
  return found


def score_pairs(
  model: Model, pairs: Sequence[pack.PackedPair], *, layout: str, logits_chunk: int, mesh: Mesh
) -> np.ndarray:
  """Returns [n, 2] float32 of pairs, each in a row of its own, `_ROWS` rows of a device at once."""
  if not pairs:
    return np.zeros((0, 2), np.float32)
  longest = int(pack.row_lengths(pack.pair_lengths(pairs), layout).max())
  score, (mine, count) = _scorer(model, logits_chunk, mesh), row_shard(mesh)
  parts = row_parts(mesh)
  size = min(_ROWS * parts, len(pairs) + -len(pairs) % parts)
  found = []
  for start in range(0, len(pairs), size):
    rows = [[pair] for pair in pairs[start : start + size]]
    batch = pack.fill_batch(
      rows + [[]] * (size - len(rows)),
      tokens=longest + -longest % _LANES,
      pairs_per_row=1,
      layout=layout,
      columns=(),
    )
    blocks = {name: np.split(values, count) for name, values in batch.items()}
    local = {name: np.concatenate([block[i] for i in mine]) for name, block in blocks.items()}
    found.append(score(local)[: len(rows), 0])
  return np.concatenate(found)


def score_batch(
  model: Model, batch: Batch, *, chunk: int
) -> jax.Array:  # [B, P, 2] chosen, rejected
  """Returns the log-probs of a batch's pairs by a model on its own."""
  logps = pair_logps(model, batch, logits_chunk=chunk)
  return jnp.stack(logps.policy, axis=-1)


def _scorer(model: Model, chunk: int, mesh: Mesh) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
  """Returns a function of this process's rows of a batch: [B, P, 2] of all processes' rows."""
  graphdef, weights = nnx.split(model)

  @jax.jit
  def score(weights: Any, batch: Batch) -> jax.Array:
    return score_batch(nnx.merge(graphdef, weights), batch, chunk=chunk)

  def score_rows(batch):
    check_tokens(batch, getattr(model, 'vocab_size', None))
    with jax.set_mesh(mesh):
      scores = score(weights, shard_batch(batch, mesh))
    return multihost_utils.process_allgather(scores, tiled=True)

  return score_rows
