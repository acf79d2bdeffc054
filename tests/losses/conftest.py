"""What the objective's tests share: settings from the real config, pairs from a seed."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax import config
from dpo_flax.losses.objective import Objective
from dpo_flax.losses.pair_logps import PairLogps


@pytest.fixture(scope='session')
def make_objective():
  """Makes an Objective from options, the rest as in the default config."""

  def make(loss='sigmoid', **options) -> Objective:
    settings = config.default().objective
    settings.update(loss=loss, **options)
    if loss == 'exo_pair' and 'label_smoothing' not in options:
      settings.label_smoothing = 1e-3
    return Objective.from_config(settings)

  return make


@pytest.fixture(scope='session')
def make_pairs():
  """Makes PairLogps of a shape [B, P]; fields that are not given are drawn from a seed."""

  def make(shape=(2, 4), seed=0, scale=1.0, **fields) -> PairLogps:
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

  return make
