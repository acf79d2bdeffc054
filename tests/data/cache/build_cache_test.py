"""A cache gives back what the tokenizer made, is whole or absent, and accounts for every record."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from dpo_flax.data.cache import build_cache, cache_files, token_cache
from dpo_flax.data.records.formats import FormatOptions, to_preferences
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import load_tokenizer

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


def open_or_build(source, tokenizer, directory, options=None, **settings):
  reading = build_cache.ReadOptions(
    cache_dir=str(directory), format=options or FormatOptions(), **settings
  )
  return build_cache.open_or_build(source, tokenizer, reading)


def tokens(cache):
  return np.concatenate([ids for i in range(len(cache)) for ids in cache[i]])


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
    pair = tokenizer.encode(to_preferences(record, FormatOptions())[0][0])
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
  np.testing.assert_array_equal(tokens(opened), tokens(built))
  assert [path.name for path in (tmp_path / 'cache').iterdir()] == [opened.fingerprint[:16]]


def test_another_tokenizer_format_or_text_is_another_cache(
  data, tokenizer, sentencepiece_directory, tmp_path
):
  directory = str(tmp_path / 'cache')
  other_text = tmp_path / 'other.jsonl'
  other_text.write_text(json.dumps(RECORDS[0]))
  caches = [
    open_or_build(data, tokenizer, directory=directory),
    open_or_build(data, tokenizer, directory=directory, options=FormatOptions('explicit')),
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
  places = [record.where for record in mixed]
  assert [cache.where(i) for i in range(3)] == [places[r] for r in cache.records]


def test_bad_records_stop_the_run_even_when_an_earlier_one_skipped_them(mixed, tokenizer, tmp_path):
  directory = str(tmp_path / 'cache')
  with pytest.raises(ValueError, match=r'mixed\.jsonl:2: not JSON.*data\.bad_record=skip'):
    open_or_build(mixed, tokenizer, directory=directory)
  assert not list((tmp_path / 'cache').glob('*/*.json'))  # nothing half-written stays
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
  largest = int(tokens(cache).max())
  cache.check_ids(largest + 1)
  worst = next(i for i in range(3) if max(map(max, cache[i])) == largest)
  with pytest.raises(ValueError, match=rf'pairs\.jsonl:{worst + 1}: token id'):
    cache.check_ids(largest)


def test_a_pickled_cache_is_its_path(data, tokenizer, tmp_path):
  cache = open_or_build(data, tokenizer, directory=str(tmp_path / 'cache'))
  content = pickle.dumps(cache)
  assert len(content) < 500
  np.testing.assert_array_equal(tokens(pickle.loads(content)), tokens(cache))


@pytest.fixture
def small_shards(monkeypatch):
  """Shards of four records, chunks of two."""
  monkeypatch.setattr(cache_files, 'RECORDS', 4)
  monkeypatch.setattr(build_cache, '_CHUNK', 2)


@pytest.fixture
def many(tmp_path):
  """22 good records of three files and a bad one."""
  files = []
  for name, count in (('a', 9), ('b', 3), ('c', 10)):
    lines = [
      json.dumps({'prompt': f'{name} {i}', 'chosen': ' tea' * (i + 1), 'rejected': ' us'})
      for i in range(count)
    ]
    files.append(tmp_path / f'{name}.jsonl')
    files[-1].write_text('\n'.join([*lines, *(BAD[1:2] if name == 'b' else [])]))
  return RecordSource([str(file) for file in files])


def content(cache):
  return {path.name: path.read_bytes() for path in pathlib.Path(cache.path).iterdir()}


def test_processes_and_shards_do_not_change_what_is_built(many, tokenizer, tmp_path, small_shards):
  one, three = (
    open_or_build(many, tokenizer, tmp_path / str(n), bad_record='skip', workers=n) for n in (1, 3)
  )
  assert content(one) == content(three)
  assert len(list(pathlib.Path(one.path).glob('*.tokens'))) == 6
  assert (one.report.read, one.report.kept) == (23, 22)
  assert one.report.examples == {
    'empty response': [f'{many.files[1]}:4: empty response: chosen has no text']
  }
  records = list(many)
  for pair in range(len(one)):
    record = records[one.records[pair]]
    assert one.where(pair) == record.where
    encoded = tokenizer.encode(to_preferences(record.value(), FormatOptions())[0][0])
    assert [list(ids) for ids in one[pair]] == list(encoded)


def test_a_bad_record_in_another_process_stops_the_build(many, tokenizer, tmp_path, small_shards):
  with pytest.raises(ValueError, match=r'b\.jsonl:4: empty response'):
    open_or_build(many, tokenizer, tmp_path, workers=2)


_BUILD = """
import os, signal, sys
from dpo_flax.data.cache import build_cache, cache_files
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import load_tokenizer
cache_files.RECORDS, build_cache._CHUNK = 4, 2
tokenizer, directory, log, last, *data = sys.argv[1:]
write = cache_files.write_shard
def write_shard(directory, number, *rest):
  write(directory, number, *rest)
  name = cache_files.shard_name(number)
  print(name, file=open(log, 'a'))
  if name == last:
    os.kill(os.getpid(), signal.SIGKILL)
cache_files.write_shard = write_shard
reading = build_cache.ReadOptions(
  cache_dir=directory, format=FormatOptions(), bad_record='skip', workers=2)
build_cache.open_or_build(RecordSource(data), load_tokenizer(tokenizer), reading)
"""


def start_build(data, tokenizer, directory, *, die_after=''):
  """Starts a process that builds a cache in small shards, writing their names to directory/log."""
  arguments = [tokenizer.origin[0], str(directory), str(directory / 'log'), die_after, *data.files]
  directory.mkdir(exist_ok=True)
  return subprocess.Popen([sys.executable, '-c', _BUILD, *arguments])


def test_a_build_that_was_killed_goes_on_with_the_next_shard(
  many, tokenizer, tmp_path, small_shards, monkeypatch
):
  whole = open_or_build(many, tokenizer, tmp_path / 'whole', bad_record='skip')
  assert start_build(many, tokenizer, tmp_path / 'part', die_after='00002').wait() == -9
  prompts, encode = [], type(tokenizer).encode
  monkeypatch.setattr(
    type(tokenizer), 'encode', lambda t, p: prompts.append(p.prompt) or encode(t, p)
  )
  resumed = open_or_build(many, tokenizer, tmp_path / 'part', bad_record='skip')
  assert prompts == [f'c {i}' for i in range(10)]  # behind three shards of four records
  assert content(resumed) == content(whole)


@pytest.mark.parametrize('name', ['00001.tokens', '00001.npz', '00001.json', 'manifest.json'])
def test_a_damaged_file_is_noticed_and_built_again(many, tokenizer, tmp_path, small_shards, name):
  built = open_or_build(many, tokenizer, tmp_path, bad_record='skip')
  before = content(built)
  path = pathlib.Path(built.path) / name
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)
  assert content(open_or_build(many, tokenizer, tmp_path, bad_record='skip')) == before
  path.unlink()
  assert content(open_or_build(many, tokenizer, tmp_path, bad_record='skip')) == before


@pytest.mark.parametrize(
  'change',
  [
    lambda manifest: [],
    lambda manifest: None,
    lambda manifest: {**manifest, 'sha256': {}},
    lambda manifest: {**manifest, 'sha256': []},
    lambda manifest: {**manifest, 'fingerprint': 'f' * 64},
    lambda manifest: {**manifest, 'files': None},
    lambda manifest: {'sha256': manifest['sha256']},
  ],
)
def test_a_manifest_that_is_not_the_caches_is_written_again(data, tokenizer, tmp_path, change):
  built = open_or_build(data, tokenizer, tmp_path)
  before, path = content(built), pathlib.Path(built.path) / 'manifest.json'
  text = path.read_text()
  path.write_text(json.dumps(change(json.loads(text))))
  assert content(open_or_build(data, tokenizer, tmp_path)) == before
  assert path.read_text() == text


def test_of_many_processes_one_builds(many, tokenizer, tmp_path):
  processes = [start_build(many, tokenizer, tmp_path / 'cache') for _ in range(3)]
  assert [process.wait() for process in processes] == [0, 0, 0]
  names = (tmp_path / 'cache' / 'log').read_text().split()
  assert names == [f'0000{i}' for i in range(6)]


def test_a_remote_cache_is_mirrored(data, tokenizer, tmp_path, monkeypatch):
  mirror = tmp_path / 'mirror'
  for module in (build_cache, token_cache):
    monkeypatch.setattr(module, 'local_directory', lambda path: epath.Path(mirror) / path.name)
  built = open_or_build(data, tokenizer, tmp_path / 'remote')
  names = {path.name for path in pathlib.Path(built.path).iterdir()}
  assert names == {'00000.tokens', '00000.npz', '00000.json', 'manifest.json'}
  shutil.rmtree(mirror)
  monkeypatch.setattr(type(tokenizer), 'encode', None)
  opened = open_or_build(data, tokenizer, tmp_path / 'remote')
  np.testing.assert_array_equal(tokens(opened), tokens(built))


def test_a_record_of_several_comparisons_is_one_record(tokenizer, tmp_path):
  completions = [{'response': f'answer {i}', 'overall_score': i} for i in range(3)]
  record = {'instruction': 'tea?', 'completions': completions}
  (tmp_path / 'a.jsonl').write_text('\n'.join([json.dumps(record)] * 2))
  chat = load_tokenizer(tokenizer.origin[0], '{% for m in messages %}{{ m.content }}{% endfor %}')
  options = FormatOptions(completions='all')
  cache = open_or_build(RecordSource(str(tmp_path / 'a.jsonl')), chat, tmp_path, options)
  assert (cache.report.read, cache.report.kept, len(cache)) == (2, 2, 6)
  assert list(cache.records) == [0, 0, 0, 1, 1, 1]


def test_a_template_without_end_stops_the_run_at_its_first_record(json_directory, tmp_path):
  def turn(role, text):
    return [{'role': role, 'content': text}]

  record = {'prompt': turn('user', 'a'), 'chosen': turn('assistant', 'b')}
  record['rejected'] = turn('assistant', 'c')
  (tmp_path / 'chats.jsonl').write_text('\n'.join([json.dumps(record)] * 50))
  loops = '{% for i in range(99999) %}' * 2 + '{% endfor %}' * 2
  template = f'{{% if messages %}}{loops}{{% endif %}}'
  tokenizer = load_tokenizer(str(json_directory), template)
  source = RecordSource(str(tmp_path / 'chats.jsonl'))
  for workers in (1, 2):
    with pytest.raises(ValueError, match=r'chats\.jsonl:1: the chat template .* more than 1 s'):
      open_or_build(source, tokenizer, tmp_path, bad_record='skip', workers=workers)
