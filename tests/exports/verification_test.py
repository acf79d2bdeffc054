"""What counts as rounding, and what does not. Whole exports are checked in export_test.py."""

import numpy as np
import pytest
from etils import epath

from dpo_flax.data.batches.pack import PackedPair
from dpo_flax.exports.verification import compare


def ids(count):
  return np.ones(count, np.int32)


PAIRS = [
  PackedPair(0, ids(3), ids(1), ids(4)),
  # Ids that are no targets have no log-prob either.
  PackedPair(1, ids(3), np.array([5, ~7, ~7, 5], np.int32), ids(100)),
]
LIVE = np.array([[-1.0, -8.0], [-3.0, -400.0]], np.float32)


def check(difference, *dtypes):
  return compare(LIVE, LIVE + difference, PAIRS, dtypes=dtypes, where=epath.Path('runs/peft'))


def test_difference_is_the_largest_mean_over_the_tokens_of_a_response():
  found = check(np.array([[0.0, 0.08], [0.06, 0.5]]), 'float32', 'bfloat16')
  assert found.difference == pytest.approx(0.03, rel=1e-4)
  assert (found.bound, found.pairs) == (0.4, 2)


@pytest.mark.parametrize(
  ('place', 'tokens'), [((0, 0), 1), ((0, 1), 4), ((1, 0), 2), ((1, 1), 100)]
)
def test_each_response_is_allowed_what_rounding_explains_for_its_length(place, tokens):
  difference = np.zeros((2, 2))
  difference[place] = -0.99 * 0.4 * np.sqrt(tokens)
  check(difference, 'bfloat16')
  difference[place] *= 1.02
  with pytest.raises(ValueError, match='runs/peft: reloaded, its log-probs differ'):
    check(difference, 'bfloat16', 'float32')


def test_float32_is_held_to_a_ten_thousandth_of_a_nat_per_token():
  assert check(np.array([[0.9e-4, 0], [0, 0]]), 'float32').difference < 1e-4
  with pytest.raises(ValueError, match=r'rounding explains 0\.0001 for one token'):
    check(np.array([[0, 5e-4], [0, 0]]), 'float32')


def test_nan_is_no_rounding():
  with pytest.raises(ValueError, match='differ'):
    check(np.array([[0, np.nan], [0, 0]]), 'int8')


def test_what_was_not_reloaded_is_not_compared():
  found = compare(LIVE, None, PAIRS, dtypes=['float32'], where=epath.Path('runs/merged'))
  assert found.difference is None
