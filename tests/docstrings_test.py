"""The examples in docstrings give what they print."""

import doctest
import importlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_flax
from dpo_flax import losses
from dpo_flax.examples import make_tiny
from dpo_flax.losses import PairLogps
from helpers.bases import write_example_base

PACKAGE = pathlib.Path(dpo_flax.__file__).parent
MODULES = sorted(
  '.'.join(('dpo_flax', *path.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__')
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


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A directory with the base and the pairs that examples read."""
  directory = tmp_path_factory.mktemp('examples')
  write_example_base(directory / 'hf_llama')
  shutil.copy(make_tiny.HERE / 'pairs.jsonl', directory)
  return directory


@pytest.fixture(scope='module')
def names(directory):
  """The names that examples use beside those of their own module."""
  device = dpo_flax.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  return {
    'pairs': PAIRS,
    'policy': dpo_flax.load_model(str(directory / 'hf_llama'), dpo_flax.Lora(rank=4), mesh=device),
    'batch': dpo_flax.pack([([1, 5, 6], [7, 2], [8, 9, 2])], tokens=12),
    'init_state': dpo_flax.init_state,
    'np': np,
    'optax': optax,
    'reference_of': dpo_flax.reference_of,
  }


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_of(name, directory, names, monkeypatch):
  monkeypatch.chdir(directory)
  module = importlib.import_module(name)
  with np.printoptions():  # which the examples change
    failed, _ = doctest.testmod(module, extraglobs=names)
  assert not failed


@pytest.mark.parametrize('name', dpo_flax.__all__)
def test_every_public_name_has_an_example(name):
  assert '>>> ' in getattr(dpo_flax, name).__doc__


def test_every_loss_has_an_example():
  for loss in losses.LOSSES.values():
    assert f'>>> print({loss.name}(pairs' in loss.function.__doc__
