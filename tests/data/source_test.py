"""Reading jsonl: every record once, every fault with its file and line."""

import gzip
import json

import pytest

from dpo_flax.data.source import RecordError, RecordSource, parse


def _write(path, values):
  lines = ''.join(json.dumps(value) + '\n' for value in values)
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines)
  return str(path)


def test_globs_and_lists_give_all_records_in_the_order_of_names(tmp_path):
  _write(tmp_path / 'b.jsonl', [{'n': 2}, {'n': 3}])
  _write(tmp_path / 'a.jsonl', [{'n': 0}, {'n': 1}])
  last = _write(tmp_path / 'z.jsonl.gz', [{'n': 4}])
  source = RecordSource([f'{tmp_path}/[ab].jsonl', last])
  assert [record.value['n'] for record in source] == [0, 1, 2, 3, 4]
  assert [source[i].value['n'] for i in range(len(source))] == [0, 1, 2, 3, 4]
  assert source[3].where == f'{tmp_path}/b.jsonl:2'
  assert [record.where for record in source] == [source[i].where for i in range(5)]


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"n": 0}\n\n  \n{"n": 1}')
  source = RecordSource(str(path))
  assert [(r.value['n'], r.where) for r in source] == [(0, f'{path}:1'), (1, f'{path}:4')]
  assert len(source) == 2


@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    (b'{"a": NaN}', 'not JSON'),
    (b'{"a": -Infinity}', 'not JSON'),
    (b'{"a": 1e999}', 'number out of range'),
    (b'{"a": 1, "a": 2}', 'duplicate key'),
    (b'{"a": {"b": 1, "b": 2}}', 'duplicate key'),
    (b'[1, 2]', 'not a JSON object'),
    (b'{"a": ', 'not JSON'),
    (b'{"a": "\xff"}', 'not UTF-8'),
    (b'{"a": ' + b'[' * 100_000, 'not JSON'),
    (b'{"a": ' + b'1' * 10_000 + b'}', 'not JSON'),
  ],
)
def test_lines_that_are_not_strict_json_objects_are_refused(line, reason):
  with pytest.raises(RecordError) as error:
    parse(line)
  assert error.value.reason == reason


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"n": 0}\nnonsense\n{"n": 1}\n')
  source = RecordSource(str(path))
  assert [r.error and r.where for r in source] == [None, f'{path}:2', None]
  with pytest.raises(ValueError, match=r'a\.jsonl:2: not JSON'):
    source[1]


def test_truncated_gzip_keeps_what_came_before_and_ends_in_an_error(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  lines = [json.dumps({'n': i, 'text': str(hash(i)) * 50}) for i in range(1000)]
  whole = gzip.compress('\n'.join(lines).encode())
  path.write_bytes(whole[: len(whole) // 2])
  records = list(RecordSource(str(path)))
  assert [r.value['n'] for r in records[:-1]] == list(range(len(records) - 1))
  assert records[-1].error.reason == 'truncated or corrupt gzip file'
  assert records[-1].where == f'{path}:{len(records)}'


def test_empty_missing_and_doubled_files_are_errors(tmp_path):
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('')
  (record,) = RecordSource(str(empty))
  assert record.error.reason == 'empty file'
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


def test_fingerprint_is_of_the_content_and_not_of_the_name(tmp_path):
  one = _write(tmp_path / 'one.jsonl', [{'n': 0}])
  same = _write(tmp_path / 'same.jsonl', [{'n': 0}])
  other = _write(tmp_path / 'other.jsonl', [{'n': 1}])
  assert RecordSource(one).fingerprint == RecordSource(same).fingerprint
  assert RecordSource(one).fingerprint != RecordSource(other).fingerprint
