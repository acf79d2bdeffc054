"""The real command, but losses and gradients of chosen steps are multiplied by chosen factors.

FACTORS is a JSON object: step -> [loss or gradient, factor], such as {"3": ["loss", "nan"]}.
"""

import json
import os

import jax
import numpy as np

from dpo_flax import train
from dpo_flax.runtime import command
from dpo_flax.training import step

FACTORS = json.loads(os.environ['FACTORS'])
_accumulate, _train_batches = step._accumulate, train.train_batches


class Marked:
  """Batches that carry the factors of their step's loss and gradient."""

  def __init__(self, run, start_step: int):
    self._batches, self._step = _train_batches(run, start_step), start_step

  def __next__(self):
    self._step += 1
    batch = next(self._batches)
    where, factor = FACTORS.get(str(self._step), ('loss', 1))
    factors = [float(factor) if where == part else 1.0 for part in ('loss', 'gradient')]
    return batch | {'factors': np.tile(np.float32(factors), (len(batch['tokens']), 1))}

  def close(self):
    self._batches.close()


def accumulate(loss, trainable, batch, *rest):
  """As in the step, then multiplied."""
  batch = dict(batch)
  of_the_loss, of_the_gradient = batch.pop('factors')[0]
  gradients, sums = _accumulate(loss, trainable, batch, *rest)
  total, count = sums['means']['dpo_loss']
  sums['means']['dpo_loss'] = (total * of_the_loss, count)
  return jax.tree.map(lambda gradient: gradient * of_the_gradient, gradients), sums


if __name__ == '__main__':
  step._accumulate, train.train_batches = accumulate, Marked
  command.run(train.train, on_every_host=True)
