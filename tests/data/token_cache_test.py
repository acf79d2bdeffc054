"""A cache gives back what the tokenizer made, is whole or absent, and accounts for every record."""

import json
import pickle

import numpy as np
import pytest

from dpo_flax.data.formats import to_preference
from dpo_flax.data.source import RecordSource
from dpo_flax.data.token_cache import TokenCache, open_or_build
from dpo_flax.data.tokenizer import load_tokenizer

RECORDS = [
  {'prompt': 'the cat', 'chosen': ' likes tea.', 'rejected': ' reads', 'weight': 2.0},
  {'prompt': 'a model', 'chosen': ' answers', 'rejected': ' follows us'},
  {'prompt': 'the cat', 'chosen': ' follows', 'rejected': ' does not see', 'margin': 1.5},
]
BAD = [
  'nonsense',
  json.dumps({'prompt': 'a', 'chosen': '', 'rejected': 'b'}),
  json.dumps({'prompt': 'a', 'chosen': 'b'}),
  json.dumps({'prompt': 'a', 'chosen': ' ', 'rejected': 'b'}),
]


@pytest.fixture
def tokenizer(json_directory):
  return load_tokenizer(str(json_directory))


@pytest.fixture
def data(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text('\n'.join(map(json.dumps, RECORDS)))
  return RecordSource(str(path))


@pytest.fixture
def mixed(tmp_path):
  """Good and bad lines in turn."""
  path = tmp_path / 'mixed.jsonl'
  pairs = zip([*map(json.dumps, RECORDS), ''], BAD, strict=True)
  lines = [line for pair in pairs for line in pair]
  path.write_text('\n'.join(lines))
  return RecordSource(str(path))


def test_cached_ids_are_those_of_the_tokenizer(data, tokenizer, tmp_path):
  cache = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  assert len(cache) == len(RECORDS)
  for i, record in enumerate(RECORDS):
    pair = tokenizer.encode(to_preference(record)[0])
    assert [list(ids) for ids in cache[i]] == list(pair)
    assert list(cache.lengths[i]) == [len(ids) for ids in pair]
    assert cache.where(i) == f'{data.files[0]}:{i + 1}'
  np.testing.assert_array_equal(cache.columns['weight'], [2.0, np.nan, np.nan])
  np.testing.assert_array_equal(cache.columns['margin'], [np.nan, np.nan, 1.5])
  assert 'chosen_probability' not in cache.columns
  assert cache.prompts[0] == cache.prompts[2] != cache.prompts[1]
  assert (cache.report.read, cache.report.kept, cache.report.formats) == (3, 3, {'explicit': 3})


def test_records_are_tokenized_once(data, tokenizer, tmp_path, monkeypatch):
  built = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  monkeypatch.setattr(type(tokenizer), 'encode', None)
  opened = open_or_build(RecordSource(data.files), tokenizer, directory=str(tmp_path / 'cache'))
  assert opened.path == built.path
  np.testing.assert_array_equal(opened.tokens, built.tokens)
  assert [path.name for path in (tmp_path / 'cache').iterdir()] == [opened.fingerprint[:16]]


def test_another_tokenizer_format_or_text_is_another_cache(
  data, tokenizer, sentencepiece_directory, tmp_path
):
  directory = str(tmp_path / 'cache')
  other_text = tmp_path / 'other.jsonl'
  other_text.write_text(json.dumps(RECORDS[0]))
  caches = [
    open_or_build(data, tokenizer, directory=directory),
    open_or_build(data, tokenizer, directory=directory, format='explicit'),
    open_or_build(data, load_tokenizer(str(sentencepiece_directory)), directory=directory),
    open_or_build(RecordSource(str(other_text)), tokenizer, directory=directory),
  ]
  assert len({cache.path for cache in caches}) == len({c.fingerprint for c in caches}) == 4


def test_skipped_records_are_counted_and_named(mixed, tokenizer, tmp_path):
  cache = open_or_build(mixed, tokenizer, directory=str(tmp_path / 'c'), bad_record='skip')
  report = cache.report
  assert report.read == report.kept + sum(report.dropped.values()) == 7
  assert report.dropped == {'not JSON': 1, 'empty response': 2, 'unknown format': 1}
  assert [e.partition(': ')[0] for e in report.examples['empty response']] == [
    f'{mixed.files[0]}:{line}' for line in (4, 8)
  ]
  assert list(cache.records) == [0, 2, 4]
  assert [cache.where(i) for i in range(3)] == [mixed[int(r)].where for r in cache.records]


def test_bad_records_stop_the_run_even_when_an_earlier_one_skipped_them(mixed, tokenizer, tmp_path):
  directory = str(tmp_path / 'cache')
  with pytest.raises(ValueError, match=r'mixed\.jsonl:2: not JSON.*data\.bad_record=skip'):
    open_or_build(mixed, tokenizer, directory=directory)
  assert not list((tmp_path / 'cache').iterdir())  # nothing half-written stays
  open_or_build(mixed, tokenizer, directory=directory, bad_record='skip')
  with pytest.raises(ValueError, match=r'mixed\.jsonl:2: not JSON'):
    open_or_build(mixed, tokenizer, directory=directory)


def test_data_of_which_nothing_is_left_is_an_error(tokenizer, tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_text('\n'.join(BAD))
  with pytest.raises(ValueError, match='none of the 4 records'):
    open_or_build(
      RecordSource(str(path)), tokenizer, directory=str(tmp_path / 'cache'), bad_record='skip'
    )


def test_an_id_beyond_the_embedding_is_named(data, tokenizer, tmp_path):
  cache = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  cache.check_ids(int(cache.tokens.max()) + 1)
  worst = next(i for i in range(3) if max(map(max, cache[i])) == cache.tokens.max())
  with pytest.raises(ValueError, match=rf'pairs\.jsonl:{worst + 1}: token id'):
    cache.check_ids(int(cache.tokens.max()))


def test_a_pickled_cache_is_its_path(data, tokenizer, tmp_path):
  cache = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  assert cache.tokens.size
  content = pickle.dumps(cache)
  assert len(content) < 500
  np.testing.assert_array_equal(pickle.loads(content).tokens, cache.tokens)


def test_a_token_file_of_the_wrong_size_is_refused(data, tokenizer, tmp_path):
  cache = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  with open(f'{cache.path}/tokens.bin', 'ab') as file:
    file.write(b'1234')
  with pytest.raises(ValueError, match='delete'):
    TokenCache(cache.path)
