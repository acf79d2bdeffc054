"""Objectives and pairs for the tests of losses: pairs are drawn from a seed."""

import jax.numpy as jnp
import numpy as np

from dpo_flax.losses import LOSSES, Objective, PairLogps


def make_objective(loss='sigmoid', **options) -> Objective:
  """Makes an Objective; exo_pair gets the paper's label smoothing, which it cannot do without."""
  if loss == 'exo_pair':
    options.setdefault('label_smoothing', 1e-3)
  return Objective(loss, **options)


def loss_of(name, pairs, **constants):
  """Calls a loss by itself, with those of the constants that it takes."""
  loss = LOSSES[name]
  return loss(pairs, **{key: value for key, value in constants.items() if key in loss.constants})


def make_pairs(shape=(2, 4), seed=0, scale=1.0, **fields) -> PairLogps:
  """Makes PairLogps of a shape [B, P]; fields that are not given are drawn from a seed."""
  random = np.random.default_rng(seed)
  lengths = random.integers(3, 30, (2, *shape))
  values = {
    'policy_chosen': -lengths[0] * random.uniform(0.1, 3, shape),
    'policy_rejected': -lengths[1] * random.uniform(0.1, 3, shape),
    'chosen_lengths': lengths[0],
    'rejected_lengths': lengths[1],
    'pair_mask': np.ones(shape),
  }
  for branch in ('chosen', 'rejected'):
    noise = random.normal(0, 3 * scale, shape)
    values[f'reference_{branch}'] = values[f'policy_{branch}'] + noise
  arrays = {
    name: value if isinstance(value, tuple) else jnp.asarray(value, jnp.float32)
    for name, value in (values | fields).items()
  }
  return PairLogps(**arrays)
