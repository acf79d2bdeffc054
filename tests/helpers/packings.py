"""Random packings, over which a mask and the kernels that read it must agree."""

import numpy as np

from dpo_flax.data.batches import pack


def draw_packing(seed, *, rows, tokens, longest, layout):
  """Draws visible_until and positions [rows, tokens] of rows that are full of random pairs."""
  random = np.random.default_rng(seed)

  def draw_row():
    row, room = [], tokens
    while True:
      lengths = random.integers(1, longest + 1, 3)
      room -= pack.row_lengths(lengths[None], layout)[0]
      if room < 0:
        return row
      row.append(pack.PackedPair(0, *(np.ones(n, np.int32) for n in lengths)))

  drawn = [draw_row() for _ in range(rows)]
  batch = pack.fill_batch(drawn, tokens=tokens, pairs_per_row=tokens // 3, layout=layout)
  return batch['visible_until'], batch['positions']
