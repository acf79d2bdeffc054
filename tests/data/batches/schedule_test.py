"""Every part of a mixture is seen exactly as often as its weight says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_flax.data.batches.schedule import Mixture, permutation

parts = st.lists(
  st.tuples(st.integers(0, 30), st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 1.5, 2.0, 3.7])),
  min_size=1,
  max_size=4,
)


def _mixture(sizes_and_weights):
  sizes, weights = zip(*sizes_and_weights, strict=True)
  places = np.split(np.random.RandomState(0).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
  return Mixture(tuple(places), weights)


@given(parts, st.booleans())
def test_ten_epochs_hold_ten_times_the_weight_of_every_part(sizes_and_weights, shuffle):
  mixture = _mixture(sizes_and_weights)
  seen = np.concatenate([mixture.epoch(e, seed=0, shuffle=shuffle) for e in range(10)])
  for places, (size, weight) in zip(mixture.parts, sizes_and_weights, strict=True):
    counts = [(seen == place).sum() for place in places]
    assert abs(sum(counts) - 10 * weight * size) <= 1
    assert not counts or max(counts) - min(counts) <= 1


@given(parts)
def test_each_epoch_is_within_one_pair_of_its_share(sizes_and_weights):
  mixture = _mixture(sizes_and_weights)
  for epoch in range(4):
    places = mixture.epoch(epoch, seed=3, shuffle=True)
    assert list(places) == list(mixture.epoch(epoch, seed=3, shuffle=True))
    for part, (size, weight) in zip(mixture.parts, sizes_and_weights, strict=True):
      assert abs(np.isin(places, part).sum() - weight * size) <= 1


def test_parts_are_mixed_and_orders_differ():
  mixture = Mixture((np.arange(500), np.arange(500, 1000)), (1.0, 1.0))
  orders = [list(mixture.epoch(e, seed=s, shuffle=True)) for e, s in ((0, 0), (1, 0), (0, 1))]
  assert all(sorted(order) == list(range(1000)) for order in orders)
  assert len({tuple(order) for order in orders}) == 3
  assert 200 < np.less(orders[0][:500], 500).sum() < 300
  assert list(mixture.epoch(0, seed=0, shuffle=False)) == list(range(1000))


def test_permutation_is_the_same_on_every_machine():
  assert sorted(permutation(100, 'rows', 0)) == list(range(100))
  assert list(permutation(8, 'rows', 0)) == [1, 7, 0, 3, 6, 2, 5, 4]
  assert list(permutation(8, 'rows', 1)) != list(permutation(8, 'rows', 0))
