"""What does not fit is told with figures and with what to lower."""

import jax
import jax.numpy as jnp
import pytest

from dpo_flax.planning.out_of_memory import OutOfMemoryError, explained

GIB = 2**30


def test_a_step_that_does_not_fit_says_what_to_lower(config):
  config.batch.rows = 16
  config.model.remat = 'dots'
  held = {'weights': jnp.zeros(GIB // 4, jnp.uint8)}
  with pytest.raises(OutOfMemoryError) as error, explained(config, held, jnp.zeros(4)):
    jnp.zeros(2**45, jnp.uint8).block_until_ready()  # the allocator's own refusal
  told = str(error.value)
  assert 'RESOURCE_EXHAUSTED' in told.partition('\n')[0]
  assert 'take 0.25 GiB of each device' in told
  order = [told.index(f'config.{name}=') for name in ('model.remat', 'batch.microbatches')]
  assert order == sorted(order)
  assert f'more chips than {jax.device_count()}' in told


def test_other_errors_pass(config):
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), explained(config):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
