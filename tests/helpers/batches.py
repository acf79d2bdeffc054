"""Random pairs and packed batches of them."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_flax.data.batches import pack


def draw_pairs(count: int, *, seed: int = 0, vocab: int = 97) -> list[pack.PackedPair]:
  """Draws `count` tokenized pairs from a seed: prompts of 1-8 tokens, responses of 1-10."""
  random = np.random.default_rng(seed)

  def ids(longest):
    return random.integers(1, vocab, random.integers(1, longest + 1), dtype=np.int32)

  return [pack.PackedPair(i, ids(8), ids(10), ids(10)) for i in range(count)]


def fill_batch(rows, *, layout='shared', tokens=96, pairs_per_row=4, **options):
  """Packs rows of pairs into a batch of 96 tokens a row, in jax arrays."""
  options |= {'layout': layout, 'tokens': tokens, 'pairs_per_row': pairs_per_row}
  return jax.tree.map(jnp.asarray, pack.fill_batch(rows, **options))
