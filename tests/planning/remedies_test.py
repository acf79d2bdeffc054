"""What does not fit is told with figures and with what to lower."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from dpo_flax.config.checks import validate
from dpo_flax.examples import make_tiny
from dpo_flax.planning.remedies import OutOfMemoryError, explained, remedies
from dpo_flax.sharding import make_mesh
from dpo_flax.train import train

EXAMPLE = pathlib.Path(make_tiny.__file__).parent / 'tiny'
GIB = 2**30


def remedies_of(config):
  """Returns what finds the remedies of a run."""
  settings = validate(config)
  return functools.partial(remedies, settings, make_mesh(settings.mesh.sizes()))


def test_a_step_that_does_not_fit_says_what_to_lower(config):
  config.batch.rows = 16
  config.model.remat = 'dots'
  held = {'weights': jnp.zeros(GIB // 4, jnp.uint8)}
  with pytest.raises(OutOfMemoryError) as error, explained(remedies_of(config), held, jnp.zeros(4)):
    jnp.zeros(2**45, jnp.uint8).block_until_ready()  # the allocator's own refusal
  told = str(error.value)
  assert 'RESOURCE_EXHAUSTED' in told.partition('\n')[0]
  assert 'take 0.25 GiB of each device' in told
  order = [told.index(f'config.{name}=') for name in ('model.remat', 'batch.microbatches')]
  assert order == sorted(order)
  assert f'more chips than {jax.device_count()}' in told


@pytest.mark.parametrize('phase', ['assemble.build', 'save_exports'])
def test_weights_and_exports_that_do_not_fit_say_so_too(config, monkeypatch, phase):
  def ask_for_too_much(*_, **__):
    jnp.zeros(2**45, jnp.uint8).block_until_ready()

  monkeypatch.setattr(f'dpo_flax.train.{phase}', ask_for_too_much)
  config.data.train, config.data.tokenizer = f'{EXAMPLE}/pairs.jsonl', f'{EXAMPLE}/tokenizer.model'
  config.batch.rows, config.batch.tokens, config.train.num_train_steps = 8, 256, 1
  with pytest.raises(OutOfMemoryError) as error:
    train(config)
  assert 'the cheapest first' in str(error.value)
  assert '0.00 GiB' not in str(error.value)


def test_other_errors_pass(config):
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), explained(remedies_of(config)):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
