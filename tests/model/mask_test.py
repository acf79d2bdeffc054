"""Laws of the block plan: nothing that is visible is left out, and little else is listed."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_flax.model.mask import block_size, make_block_plan, make_window
from helpers.packings import draw_packing

TOKENS = 384  # three blocks of 128


PACKINGS = {
  'seed': st.integers(0, 2**32),
  'longest': st.sampled_from([8, 60, 200]),
  'layout': st.sampled_from(['shared', 'separate']),
}


@pytest.fixture(scope='session')
def draw_row():
  """Draws visible_until and positions [TOKENS] of one row."""

  def draw(seed, **options):
    return [array[0] for array in draw_packing(seed, rows=1, tokens=TOKENS, **options)]

  return draw


def planned(until, positions, size):
  """Returns the plan's blocks [queries, keys] as truth values, by either of its lists."""
  window = None if size is None else make_window(jnp.asarray(positions)[None], size)
  plan = make_block_plan(jnp.asarray(until)[None], window)
  blocks = len(until) // block_size(len(until))
  found = np.zeros((2, blocks, blocks), bool)
  for which, (lists, counts) in enumerate(
    [(plan.keys, plan.key_counts), (plan.queries, plan.query_counts)]
  ):
    for block in range(blocks):
      listed = np.asarray(lists[0, block, : counts[0, block]])
      assert (np.diff(listed) > 0).all()
      found[which, block, listed] = True
  np.testing.assert_array_equal(found[0], found[1].T)
  return found[0]


def with_something_visible(until, positions, size):
  """Returns the blocks [queries, keys] in which some query sees some key."""
  key, query = np.arange(len(until))[None], np.arange(len(until))[:, None]
  visible = (key <= query) & (query < until[None])
  if size is not None:
    visible &= positions[:, None] - positions[None] < size
  side = block_size(len(until))
  blocks = len(until) // side
  return visible.reshape(blocks, side, blocks, side).any(axis=(1, 3))


@given(**PACKINGS)
def test_plan_lists_exactly_the_blocks_in_which_something_is_visible(draw_row, **packing):
  packing = draw_row(**packing)
  np.testing.assert_array_equal(planned(*packing, None), with_something_visible(*packing, None))


@given(**PACKINGS, size=st.sampled_from([1, 20, 130]))
def test_plan_of_a_window_leaves_nothing_visible_out(draw_row, size, **packing):
  packing = draw_row(**packing)
  listed = planned(*packing, size)
  assert (listed >= with_something_visible(*packing, size)).all()
  assert (listed <= with_something_visible(*packing, None)).all()


@settings(max_examples=20)
@given(size=st.integers(1, 2048))
def test_plan_of_one_long_sequence_is_exact_under_a_window(size):
  until, positions = np.full(2048, 2048), np.arange(2048)
  np.testing.assert_array_equal(
    planned(until, positions, size), with_something_visible(until, positions, size)
  )


def test_rows_that_no_block_divides_are_refused():
  with pytest.raises(ValueError, match=r'batch\.tokens=200'):
    block_size(200)
