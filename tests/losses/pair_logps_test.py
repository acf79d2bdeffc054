"""What pairs say of themselves."""

import numpy as np

from helpers.pairs import make_pairs


def test_empty_slots_weigh_nothing_and_divide_safely():
  mask = np.array([[1.0, 0.0]])
  lengths = {'chosen_lengths': [[5, 0]], 'rejected_lengths': [[3, 0]]}
  pairs = make_pairs((1, 2), pair_mask=mask, pair_weight=[[0.5, 3.0]], **lengths)
  np.testing.assert_array_equal(pairs.weights, [[0.5, 0.0]])
  np.testing.assert_array_equal(pairs.lengths.chosen, [[5, 1]])
