"""What pairs say of themselves."""

import jax.numpy as jnp
import numpy as np
from helpers.pairs import make_pairs

from dpo_flax.losses.pair_logps import Branches, sum_by_response, tail_mask


def test_a_response_is_summed_from_its_own_tokens_alone():
  """Row 0 holds one pair and an empty slot, row 1 two pairs; 4 marks all other tokens."""
  ids = jnp.array([[4, 0, 0, 1, 4, 4], [0, 1, 2, 2, 3, 3]])
  values = jnp.array([[100.0, 1, 2, 3, 100, 100], [1, 2, 3, 4, 5, 6]])
  sums = sum_by_response(values, ids, pairs=2)
  np.testing.assert_array_equal(sums.chosen, [[3, 0], [1, 7]])
  np.testing.assert_array_equal(sums.rejected, [[3, 0], [2, 11]])


def test_tail_is_what_passes_the_shorter_response():
  """Two pairs in a row: chosen 2 tokens against rejected 4, then 3 against 1."""
  ids = [4, 0, 0, 4, 1, 1, 1, 1, 4, 2, 2, 2, 4, 3, 4]
  tail = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
  lengths = Branches(jnp.array([[2.0, 3.0]]), jnp.array([[4.0, 1.0]]))
  np.testing.assert_array_equal(tail_mask(jnp.array([ids]), lengths), [tail])


def test_an_empty_slot_has_no_tail():
  lengths = Branches(jnp.array([[2.0, 1.0]]), jnp.array([[2.0, 1.0]]))
  ids = jnp.array([[0, 0, 1, 1, 4, 4]])
  np.testing.assert_array_equal(tail_mask(ids, lengths), np.zeros((1, 6)))


def test_empty_slots_weigh_nothing_and_divide_safely():
  mask = np.array([[1.0, 0.0]])
  lengths = {'chosen_lengths': [[5, 0]], 'rejected_lengths': [[3, 0]]}
  pairs = make_pairs((1, 2), pair_mask=mask, pair_weight=[[0.5, 3.0]], **lengths)
  np.testing.assert_array_equal(pairs.weights, [[0.5, 0.0]])
  np.testing.assert_array_equal(pairs.lengths.chosen, [[5, 1]])
