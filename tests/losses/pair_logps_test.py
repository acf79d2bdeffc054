"""What pairs say of themselves."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax import losses
from dpo_flax.losses import PairLogps
from helpers.pairs import make_pairs


def test_empty_slots_weigh_nothing_and_divide_safely():
  mask = np.array([[1.0, 0.0]])
  lengths = {'chosen_lengths': [[5, 0]], 'rejected_lengths': [[3, 0]]}
  pairs = make_pairs((1, 2), pair_mask=mask, pair_weight=[[0.5, 3.0]], **lengths)
  np.testing.assert_array_equal(pairs.weights, [[0.5, 0.0]])
  np.testing.assert_array_equal(pairs.lengths.chosen, [[5, 1]])


@pytest.mark.parametrize('loss', ['sigmoid', 'simpo', 'ipo', 'orpo', 'cpo'])
def test_narrow_numbers_are_widened_first(loss):
  wide = make_pairs(scale=100.0)
  narrow = jax.tree.map(lambda array: array.astype(jnp.bfloat16), wide)
  widened = jax.tree.map(lambda array: array.astype(jnp.float32), narrow)
  found, expected = losses.LOSSES[loss](narrow), losses.LOSSES[loss](widened)
  chex.assert_type(found, jnp.float32)
  np.testing.assert_array_equal(found, expected)


def test_numbers_are_taken():
  pair = PairLogps(
    policy_chosen=-4.0, policy_rejected=-10.0, reference_chosen=-5.0, reference_rejected=-9.0
  )
  assert float(losses.sigmoid(pair)) == pytest.approx(math.log1p(math.exp(-0.2)))


@pytest.mark.parametrize('field', ['margin', 'pair_mask', 'policy_rejected', 'chosen_lengths'])
def test_fields_of_other_shapes_do_not_broadcast(field):
  pairs = dataclasses.replace(make_pairs((3,)), **{field: jnp.ones((3, 1))})
  for loss in ('cpo', 'sigmoid', 'bco_pair'):
    with pytest.raises(AssertionError, match=field):
      losses.LOSSES[loss](pairs)
