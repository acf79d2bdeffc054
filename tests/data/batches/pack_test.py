"""Laws of packing: nothing is lost or split, and the masks are those of a pair on its own."""

import chex
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_flax.data.batches import pack

layouts = st.sampled_from(pack.LAYOUTS)


def _pair(index, prompt, chosen, rejected):
  """A pair whose ids tell which token of which pair they are."""
  ids = 1000 * (index + 1) + np.arange(prompt + chosen + rejected, dtype=np.int32)
  return pack.PackedPair(index, *np.split(ids, [prompt, prompt + chosen]))


pair_lists = st.lists(
  st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), max_size=4
).map(lambda sizes: [_pair(i, *size) for i, size in enumerate(sizes)])


def _branches(pairs):
  """Yields (slot, branch, prompt, response) of every sequence in a row."""
  for slot, pair in enumerate(pairs):
    yield slot, 0, pair.prompt, pair.chosen
    yield slot, 1, pair.prompt, pair.rejected


def _fill_row(pairs, **options):
  """A batch of one row, without its first axis."""
  return {name: array[0] for name, array in pack.fill_batch([pairs], **options).items()}


def _visible(row):
  """The mask as the attention applies it: [query, key]."""
  query = np.arange(len(row['tokens']))[:, None]
  key = np.arange(len(row['tokens']))[None]
  return (key <= query) & (query < row['visible_until'][key])


def test_worked_example_of_the_shared_layout():
  a, b, c, x, y, z, eos = 11, 12, 13, 14, 15, 16, 2
  pair = pack.PackedPair(7, np.array([a, b, c]), np.array([x, eos]), np.array([y, z, eos]))
  row = _fill_row([pair], tokens=11, pairs_per_row=2, layout='shared')
  expected = {
    'tokens': [a, b, c, x, eos, c, y, z, eos, 0, 0],
    'positions': [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0],
    'visible_until': [9, 9, 5, 5, 5, 9, 9, 9, 9, 10, 11],
    'targets': [0, 0, x, eos, 0, y, z, eos, 0, 0, 0],
    'answer_ids': [4, 4, 0, 0, 4, 1, 1, 1, 4, 4, 4],
    'answer_mask': [1, 1, 0, 0],
    'pairs': [[0, 1], [0, 0]],
    'pair_mask': [1, 0],
    'pair_index': [7, -1],
  }
  assert row.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_array_equal(row[name], values, err_msg=name)


def test_worked_example_of_the_separate_layout():
  a, b, c, x, y, z, eos = 11, 12, 13, 14, 15, 16, 2
  pair = pack.PackedPair(7, np.array([a, b, c]), np.array([x, eos]), np.array([y, z, eos]))
  row = _fill_row([pair], tokens=12, pairs_per_row=1, layout='separate')
  expected = {
    'tokens': [a, b, c, x, eos, a, b, c, y, z, eos, 0],
    'positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0],
    'visible_until': [5, 5, 5, 5, 5, 11, 11, 11, 11, 11, 11, 12],
    'targets': [0, 0, x, eos, 0, 0, 0, y, z, eos, 0, 0],
    'answer_ids': [2, 2, 0, 0, 2, 2, 2, 1, 1, 1, 2, 2],
  }
  for name, values in expected.items():
    np.testing.assert_array_equal(row[name], values, err_msg=name)


def test_batch_has_the_shapes_and_dtypes_the_model_reads():
  batch = pack.fill_batch(
    [[_pair(0, 3, 2, 2)], []],
    tokens=16,
    pairs_per_row=3,
    layout='shared',
    columns=('pair_weight', 'chosen_probability'),
  )
  floats = ['answer_mask', 'pair_mask', 'pair_weight', 'chosen_probability']
  by_token = ['tokens', 'positions', 'visible_until', 'targets', 'answer_ids']
  shapes = dict.fromkeys(by_token, (2, 16)) | {'answer_mask': (2, 6), 'pairs': (2, 3, 2)}
  assert batch.keys() == {*shapes, 'pair_index', *floats}
  for name, array in batch.items():
    chex.assert_shape(array, shapes.get(name, (2, 3)))
    chex.assert_type(array, np.float32 if name in floats else np.int32)


@given(pair_lists, layouts)
def test_every_target_sees_exactly_its_prompt_and_the_response_before_it(pairs, layout):
  row = _fill_row(pairs, tokens=96, pairs_per_row=4, layout=layout)
  visible = _visible(row)
  seen = np.zeros(96)
  for slot, branch, prompt, response in _branches(pairs):
    at = np.flatnonzero(row['answer_ids'] == row['pairs'][slot, branch])
    np.testing.assert_array_equal(row['targets'][at], response)
    seen[at] += 1
    for n, query in enumerate(at):
      keys = np.flatnonzero(visible[query])
      np.testing.assert_array_equal(row['tokens'][keys], np.concatenate([prompt, response[:n]]))
      np.testing.assert_array_equal(row['positions'][keys], np.arange(len(prompt) + n))
  assert set(seen) <= {0, 1}
  assert (row['answer_ids'][seen == 0] == 8).all()
  assert (row['targets'][seen == 0] == 0).all()


@given(pair_lists, layouts)
def test_padding_sees_itself_alone_and_nobody_sees_padding(pairs, layout):
  row = _fill_row(pairs, tokens=96, pairs_per_row=4, layout=layout)
  lengths = [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]
  used = pack.row_lengths(np.array(lengths, int).reshape(-1, 3), layout).sum()
  assert (row['tokens'][:used] != 0).all()
  assert not row['tokens'][used:].any()
  np.testing.assert_array_equal(_visible(row)[used:, :], np.eye(96, dtype=bool)[used:, :])
  assert not _visible(row)[:used, used:].any()


@given(pair_lists)
def test_separate_layout_has_constant_visible_until_in_a_sequence(pairs):
  row = _fill_row(pairs, tokens=96, pairs_per_row=4, layout='separate')
  start = 0
  for _, _, prompt, response in _branches(pairs):
    end = start + len(prompt) + len(response)
    assert (row['visible_until'][start:end] == end).all()
    start = end


def test_a_later_turn_of_the_user_is_read_and_not_a_target():
  chosen = np.array([20, 21, ~30, ~31, 22, 2])
  for layout in pack.LAYOUTS:
    pair = pack.PackedPair(0, np.array([11, 12]), chosen, np.array([40, 2]))
    row = _fill_row([pair], tokens=20, pairs_per_row=1, layout=layout)
    start = np.flatnonzero(row['tokens'] == 20)[0]
    np.testing.assert_array_equal(row['tokens'][start : start + 6], [20, 21, 30, 31, 22, 2])
    at = slice(start - 1, start + 5)
    np.testing.assert_array_equal(row['targets'][at], [20, 21, 0, 0, 22, 2])
    np.testing.assert_array_equal(row['answer_ids'][at], [0, 0, 2, 2, 0, 0])


@given(pair_lists, layouts, st.integers(1, 3))
def test_packed_pairs_are_in_the_batch_once(pairs, layout, multiple):
  batch = pack.pack_pairs(pairs, tokens=32, layout=layout, multiple=multiple)
  assert len(batch['tokens']) % multiple == 0
  found = batch['pair_index'][batch['pair_mask'] > 0]
  assert sorted(found) == [pair.index for pair in pairs]
  assert batch['answer_mask'].sum() == 2 * len(pairs)
  assert 'margin' not in batch


def test_packed_pairs_bring_the_columns_they_give():
  pairs = [_pair(0, 2, 2, 2), _pair(1, 2, 2, 2)._replace(margin=0.5)]
  batch = pack.pack_pairs(pairs, tokens=32)
  np.testing.assert_array_equal(batch['margin'], [[0.0, 0.5]])


def test_a_pair_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match='tokens=8: pair 1 takes 9'):
    pack.pack_pairs([_pair(0, 2, 2, 2), _pair(1, 2, 3, 3)], tokens=8)
