"""The examples in the docstrings of the losses give what they print."""

import doctest
import importlib
import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax import losses
from dpo_flax.losses import PairLogps

MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__)]

# The pair of losses.py's docstring.
PAIRS = PairLogps(
  policy_chosen=jnp.array([-4.0]),
  policy_rejected=jnp.array([-10.0]),
  reference_chosen=jnp.array([-5.0]),
  reference_rejected=jnp.array([-9.0]),
  chosen_lengths=jnp.array([4.0]),
  rejected_lengths=jnp.array([5.0]),
)


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_of(name):
  module = importlib.import_module(f'dpo_flax.losses.{name}')
  with np.printoptions():  # which the examples change
    failed, _ = doctest.testmod(module, extraglobs={'pairs': PAIRS, 'np': np})
  assert not failed


def test_every_loss_has_an_example():
  for loss in losses.LOSSES.values():
    assert f'>>> print({loss.name}(pairs' in loss.function.__doc__
