"""Reading files of every kind: every record once, every fault with its file and place."""

import gzip
import json

import pytest

from dpo_flax.config.named_values import data_paths, split_paths
from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.source import RecordSource


def _write(path, values):
  lines = ''.join(json.dumps(value) + '\n' for value in values)
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines)
  return str(path)


def _read(path):
  """Returns the values of a file's records, and the reason in place of each that has none."""
  values = []
  for record in RecordSource(path):
    try:
      values.append(record.value())
    except RecordError as error:
      values.append(error.reason)
  return values


def test_globs_and_lists_give_all_records_in_the_order_of_names(tmp_path):
  _write(tmp_path / 'b.jsonl', [{'n': 2}, {'n': 3}])
  _write(tmp_path / 'a.jsonl', [{'n': 0}, {'n': 1}])
  last = _write(tmp_path / 'z.jsonl.gz', [{'n': 4}])
  records = list(RecordSource([f'{tmp_path}/[ab].jsonl', last]))
  assert [record.value()['n'] for record in records] == [0, 1, 2, 3, 4]
  assert records[3].where == f'{tmp_path}/b.jsonl:2'


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"n": 0}\n\n  \n{"n": 1}')
  source = RecordSource(str(path))
  assert [(r.value()['n'], r.where) for r in source] == [(0, f'{path}:1'), (1, f'{path}:4')]


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"n": 0}\nnonsense\n{"n": 1}\n')
  assert _read(str(path)) == [{'n': 0}, 'not JSON', {'n': 1}]
  assert [r.where for r in RecordSource(str(path))] == [f'{path}:{i}' for i in (1, 2, 3)]


def test_position_reaches_size(tmp_path):
  files = [_write(tmp_path / f'{n}.jsonl.gz', [{'n': n}] * 3) for n in range(3)]
  source = RecordSource(files)
  positions = [source.position for _ in source]
  assert positions == sorted(positions)
  assert source.position == source.size


def test_weights_make_each_path_a_part_of_a_mixture(tmp_path):
  for name in ('a1', 'a2', 'b'):
    _write(tmp_path / f'{name}.jsonl', [{'n': 0}])
  given = data_paths({f'{tmp_path}/a*.jsonl': 2, f'{tmp_path}/b.jsonl': 0.5})
  mixture = RecordSource(*split_paths(given))
  assert (mixture.weights, mixture.parts) == ([2.0, 0.5], [0, 0, 1])
  alike = RecordSource([f'{tmp_path}/a*.jsonl', f'{tmp_path}/b.jsonl'])
  assert (alike.weights, alike.parts) == ([1.0], [0, 0, 0])
  assert mixture.fingerprint == alike.fingerprint
  for weight in (0, -1, True, 'x', float('nan'), 1e-7, 1e9):
    with pytest.raises(ValueError, match='number of passes'):
      data_paths({f'{tmp_path}/b.jsonl': weight})


def test_empty_missing_and_doubled_files_are_errors(tmp_path):
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('')
  assert _read(str(empty)) == ['empty file']
  with pytest.raises(ValueError, match='does not exist'):
    RecordSource(str(tmp_path / 'none.jsonl'))
  with pytest.raises(ValueError, match='matches no file'):
    RecordSource(str(tmp_path / '*.json'))
  with pytest.raises(ValueError, match=r'\*\* is not supported'):
    RecordSource(f'{tmp_path}/**/a.jsonl')
  with pytest.raises(ValueError, match='is a directory'):
    RecordSource(str(tmp_path))
  with pytest.raises(ValueError, match='more than once'):
    RecordSource([str(empty), f'{tmp_path}/*.jsonl'])
  with pytest.raises(ValueError, match='no data files'):
    RecordSource([])


def test_fingerprint_is_of_the_content_and_kind_and_not_of_the_name(tmp_path):
  one = _write(tmp_path / 'one.jsonl', [{'n': 0}])
  same = _write(tmp_path / 'same.jsonl', [{'n': 0}])
  other = _write(tmp_path / 'other.jsonl', [{'n': 1}])
  kind = _write(tmp_path / 'one.json', [{'n': 0}])
  packed = tmp_path / 'packed.jsonl.gz'  # the same bytes under a name that says otherwise
  packed.write_bytes((tmp_path / 'one.jsonl').read_bytes())
  assert RecordSource(one).fingerprint == RecordSource(same).fingerprint
  assert len({RecordSource(path).fingerprint for path in (one, other, kind, str(packed))}) == 4


def test_paths_with_commas_are_told_from_a_missing_file(tmp_path):
  with pytest.raises(ValueError, match='does not exist: give several paths as a tuple'):
    RecordSource(f'{tmp_path}/a.jsonl,{tmp_path}/b.jsonl')
