"""Laws of the plan: every pair has one row, no row overflows, and few tokens are wasted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_flax.data.batches.plan import plan_rows, reorder


@given(
  st.lists(st.integers(1, 64), max_size=200),
  st.integers(0, 5),
  st.sampled_from([0, 7, 1 << 16]),
  st.randoms(use_true_random=False),
)
@settings(max_examples=200)
def test_plan_holds_every_pair_once_and_no_row_overflows(lengths, cap, window, random):
  lengths = np.array(lengths, np.int32)
  order = list(range(len(lengths)))
  random.shuffle(order)
  plan = plan_rows(lengths, tokens=64, pairs_per_row=cap, order=np.array(order, int), window=window)
  assert sorted(plan.pairs) == sorted(order)
  for i in range(len(plan)):
    assert 1 <= len(plan[i]) <= ((cap or len(lengths)) if window else 1)
    assert lengths[plan[i]].sum() <= 64
  rows = np.array(random.sample(range(len(plan)), len(plan)), int)
  moved = reorder(plan, rows)
  assert [list(moved[i]) for i in range(len(plan))] == [list(plan[r]) for r in rows]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=100))
def test_plan_is_as_tight_as_textbook_best_fit_decreasing(lengths):
  rooms = []
  for length in sorted(lengths, reverse=True):
    fitting = [i for i, room in enumerate(rooms) if room >= length]
    if not fitting:
      rooms.append(64)
      fitting = [len(rooms) - 1]
    rooms[min(fitting, key=lambda i: rooms[i])] -= length
  assert len(plan_rows(np.array(lengths), tokens=64)) == len(rooms)


def test_one_pair_per_row_without_packing():
  plan = plan_rows(np.array([3, 1, 2]), tokens=64, window=0)
  assert [list(plan[i]) for i in range(3)] == [[0], [1], [2]]


def test_plan_wastes_little_on_realistic_lengths():
  lengths = np.random.RandomState(0).lognormal(np.log(300), 0.7, 20_000).clip(8, 2048).astype(int)
  plan = plan_rows(lengths, tokens=2048)
  assert 1 - lengths.sum() / (len(plan) * 2048) < 0.002
