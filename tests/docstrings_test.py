"""The examples in docstrings give what they print."""

import doctest
import importlib
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import dpo_flax
from dpo_flax import losses
from dpo_flax.losses import PairLogps

PACKAGE = pathlib.Path(dpo_flax.__file__).parent
MODULES = sorted(
  '.'.join(('dpo_flax', *path.relative_to(PACKAGE).with_suffix('').parts))
  for path in PACKAGE.rglob('*.py')
  if '>>> ' in path.read_text()
)

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
def test_the_examples_of(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  module = importlib.import_module(name)
  with np.printoptions():  # which the examples change
    failed, _ = doctest.testmod(module, extraglobs={'pairs': PAIRS, 'np': np})
  assert not failed


def test_every_loss_has_an_example():
  for loss in losses.LOSSES.values():
    assert f'>>> print({loss.name}(pairs' in loss.function.__doc__
