"""Held-out prompts are never trained on; pairs longer than a row meet the fate that was chosen."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_flax.data.batches import pack, split
from dpo_flax.data.batches.schedule import RowOptions
from dpo_flax.data.cache.build_cache import ReadOptions, open_or_build
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import load_tokenizer


@given(
  st.lists(st.integers(0, 20), min_size=2, max_size=200).filter(lambda x: len(set(x)) > 1),
  st.floats(0.01, 0.99),
  st.integers(0, 5),
)
def test_no_prompt_is_on_both_sides_and_neither_is_empty(prompts, fraction, seed):
  prompts = np.array(prompts, np.uint64)
  held = split.hold_out(prompts, fraction, seed)
  assert not set(prompts[held]) & set(prompts[~held])
  assert 0 < held.sum() < len(prompts)
  smallest = np.unique(prompts, return_counts=True)[1].min()
  assert held.sum() <= max(round(fraction * len(prompts)), smallest)


def test_a_prompt_with_most_of_the_pairs_is_not_held_out():
  prompts = np.array([0] * 90 + list(range(1, 11)), np.uint64)
  for seed in range(20):
    held = split.hold_out(prompts, 0.05, seed)
    assert held.sum() == 5
    assert not held[:90].any()


def test_the_seed_decides_which_prompts_are_held_out():
  prompts = np.arange(1000, dtype=np.uint64)
  first, again, other = (split.hold_out(prompts, 0.1, seed) for seed in (0, 0, 1))
  assert first.sum() == other.sum() == 100
  np.testing.assert_array_equal(first, again)
  assert 0 < (first & other).sum() < 30


def test_one_prompt_alone_cannot_be_divided():
  with pytest.raises(ValueError, match='same prompt'):
    split.hold_out(np.zeros(5, np.uint64), 0.1, 0)


@pytest.fixture(scope='module')
def cache(json_directory, tmp_path_factory):
  """A short pair, one with a long prompt and one with a long response."""
  directory = tmp_path_factory.mktemp('long')
  tea, words = ' tea.', ''.join(f' letter {i}' for i in range(30))
  pairs = [('the cat', tea, ' us'), (f'the cat{words}', tea, ' us'), ('the cat', words, tea)]
  records = [dict(zip(('prompt', 'chosen', 'rejected'), pair, strict=True)) for pair in pairs]
  (directory / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, records)))
  source = RecordSource(str(directory / 'pairs.jsonl'))
  tokenizer = load_tokenizer(str(json_directory))
  reading = ReadOptions(cache_dir=str(directory), format=FormatOptions())
  return open_or_build(source, tokenizer, reading)


def _fit(cache, too_long, layout='shared', tokens=40):
  rows = RowOptions(rows=1, tokens=tokens, layout=layout, too_long=too_long)
  return split.fit(cache, np.arange(3), rows, bos_id=0)


def test_pairs_that_all_fit_are_left_as_they_are(cache):
  for too_long in ('raise', 'drop', 'truncate_prompt'):
    fitted = _fit(cache, too_long, tokens=1000)
    np.testing.assert_array_equal(fitted.lengths, cache.lengths)
    assert not fitted.dropped
    assert not fitted.truncated


def test_raise_names_the_first_pair_with_numbers(cache):
  with pytest.raises(ValueError, match=r'pairs\.jsonl:2: the pair takes \d+ tokens.*2 of 3'):
    _fit(cache, 'raise')


def test_drop_leaves_long_pairs_out_and_names_them(cache):
  fitted = _fit(cache, 'drop')
  assert list(fitted.pairs) == [0]
  assert [place.rpartition(':')[2] for place in fitted.dropped] == ['2', '3']


@pytest.mark.parametrize('layout', pack.LAYOUTS)
def test_truncation_keeps_bos_and_the_prompts_end_and_never_cuts_a_response(cache, layout):
  fitted = _fit(cache, 'truncate_prompt', layout)
  assert list(fitted.pairs) == [0, 1]
  assert [place.rpartition(':')[2] for place in fitted.dropped] == ['3']
  assert [place.rpartition(':')[2] for place in fitted.truncated] == ['2']
  assert 40 - 2 < pack.row_lengths(fitted.lengths, layout)[1] <= 40
  pair, (prompt, chosen, rejected) = fitted.packed_pairs(np.array([1]))[0], cache[1]
  assert len(pair.prompt) == fitted.lengths[1, 0] < len(prompt)
  assert pair.prompt[0] == prompt[0] == 0
  np.testing.assert_array_equal(pair.prompt[1:], prompt[1 - len(pair.prompt) :])
  np.testing.assert_array_equal(pair.chosen, chosen)
  np.testing.assert_array_equal(pair.rejected, rejected)
  np.testing.assert_array_equal(fitted.packed_pairs(np.array([0]))[0].prompt, cache[0][0])


def test_rows_too_short_for_any_pair_are_refused(cache):
  with pytest.raises(ValueError, match='none of 3 pairs fits'):
    _fit(cache, 'drop', tokens=4)
