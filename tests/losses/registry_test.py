"""What a loss states about itself is what its function does."""

import dataclasses

import jax.numpy as jnp
import pytest

from dpo_flax.losses import LOSSES
from dpo_flax.losses.registry import RECORD_FIELDS
from helpers.pairs import make_pairs


def changes(name, **fields):
  """Whether the losses of some pairs are others with other values of the fields."""
  pairs = make_pairs(seed=1, chosen_probability=jnp.full((2, 4), 0.9), margin=jnp.zeros((2, 4)))
  moved = dataclasses.replace(pairs, **fields)
  return not jnp.array_equal(LOSSES[name](moved), LOSSES[name](pairs))


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_reads_what_it_states(name):
  loss, other = LOSSES[name], jnp.linspace(0.3, 0.7, 8).reshape(2, 4)
  for field in RECORD_FIELDS:
    assert changes(name, **{field: other}) == (field in loss.records)
  assert changes(name, reference_chosen=-other) == loss.needs_reference
  assert changes(name, policy_rejected=-other) != loss.chosen_only
  # cpo is a loss of sums, to which a mean over chosen's tokens is added.
  assert changes(name, chosen_lengths=other + 40) == (loss.per_token or name == 'cpo')


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_of_one_pair_depends_on_others_only_where_it_is_sorted(name):
  """bco_pair compares with a mean over the batch too, unless it is given the running one."""
  pairs = make_pairs(seed=2, reward_mean=0.1)
  moved = dataclasses.replace(pairs, policy_chosen=pairs.policy_chosen.at[0].multiply(2.0))
  same = jnp.array_equal(LOSSES[name](moved)[1], LOSSES[name](pairs)[1])
  assert same != LOSSES[name].sorts_batch
