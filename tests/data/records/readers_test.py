"""All kinds of files that hold the same records give the same records; damage is an error."""

import gzip
import json
import random
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.source import RecordSource

_RANDOM = random.Random(0)
RECORDS = [
  {'n': i, 'text': f'Zoë {_RANDOM.getrandbits(2000)}', 'list': [{'role': 'user', 'k': i}] * (i % 3)}
  for i in range(700)
]
LINES = ''.join(json.dumps(record) + '\n' for record in RECORDS)


def _values(path):
  return [record.value() for record in RecordSource(str(path))]


def _outcome(path):
  """Returns how many records a damaged file still gives, and the reason it ends with."""
  *good, last = RecordSource(str(path))
  for record in good:
    record.value()
  with pytest.raises(RecordError) as error:
    last.value()
  assert last.where == f'{path}:{len(good) + 1}'
  return len(good), error.value.reason


def _jsonl(path):
  path.write_text(LINES)


def _gz(path):
  path.write_bytes(gzip.compress(LINES.encode()))


def _zst(path):
  zstandard = pytest.importorskip('zstandard')
  half = len(LINES) // 2
  frames = (zstandard.compress(part.encode()) for part in (LINES[:half], LINES[half:]))
  path.write_bytes(b''.join(frames))


def _json(path):
  path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding='utf-8')


def _parquet(path):
  pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=300)


def _arrow(path):
  pyarrow = pytest.importorskip('pyarrow')
  table = pyarrow.Table.from_pylist(RECORDS)
  with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
    stream.write_table(table)


def _array_record(path):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:16')
  for record in RECORDS:
    writer.write(json.dumps(record).encode())
  writer.close()


KINDS = {
  'a.jsonl': _jsonl,
  'a.jsonl.gz': _gz,
  'a.jsonl.zst': _zst,
  'a.json': _json,
  'a.parquet': _parquet,
  'a.arrow': _arrow,
  'a.array_record': _array_record,
}


@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
  KINDS[name](tmp_path / name)
  assert _values(tmp_path / name) == RECORDS


def test_objects_a_line_may_be_called_json(tmp_path):
  _jsonl(tmp_path / 'a.json')
  assert _values(tmp_path / 'a.json') == RECORDS
  with gzip.open(tmp_path / 'b.json.gz', 'wt') as file:
    json.dump(RECORDS, file)
  assert _values(tmp_path / 'b.json.gz') == RECORDS


@pytest.mark.parametrize('name', KINDS)
def test_a_file_that_was_cut_ends_in_an_error(tmp_path, name):
  KINDS[name](tmp_path / name)
  whole = (tmp_path / name).read_bytes()
  for share in (0.001, 0.4, 0.99):
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    good, _ = _outcome(tmp_path / name)
    assert good < len(RECORDS)


def test_a_cut_gzip_file_keeps_what_came_before(tmp_path):
  _gz(tmp_path / 'a.jsonl.gz')
  whole = (tmp_path / 'a.jsonl.gz').read_bytes()
  (tmp_path / 'a.jsonl.gz').write_bytes(whole[: len(whole) // 2])
  good, reason = _outcome(tmp_path / 'a.jsonl.gz')
  assert 200 < good < 500
  assert reason == 'truncated or corrupt gzip file'


@pytest.mark.parametrize(
  ('text', 'good', 'reason'),
  [
    ('[ ]\n', 0, 'empty file'),
    ('[{"a": 1}', 0, 'not JSON'),
    ('[{"a": 1}, ', 1, 'not JSON'),
    ('[{"a": 1} {"a": 2}]', 0, 'not JSON'),
    ('[{"a": 1}] more', 1, 'not JSON'),
    ('[{"a": 1}, {"a": 2, "a": 3}]', 1, 'duplicate key'),
    ('[{"a": 1}, {"a": NaN}]', 1, 'not JSON'),
    ('[{"a": 1}, 7]', 1, 'not a JSON object'),
    ('[{"a": 1}, ' + '[' * 100_000, 1, 'not JSON'),
  ],
)
def test_broken_arrays_keep_what_came_before(tmp_path, text, good, reason):
  (tmp_path / 'a.json').write_text(text)
  assert _outcome(tmp_path / 'a.json') == (good, reason)


def test_nulls_that_a_table_adds_are_left_out(tmp_path):
  pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  rows = [{'a': [{'x': 1}], 'b': 2}, {'a': [{'y': 3}]}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  assert _values(tmp_path / 'a.parquet') == rows


def _save_to_disk(directory):
  """Writes what `datasets` 4 writes for Dataset.save_to_disk with two shards."""
  pyarrow = pytest.importorskip('pyarrow')
  names = [f'data-0000{i}-of-00002.arrow' for i in range(2)]
  for name, part in zip(names, (RECORDS[:400], RECORDS[400:]), strict=True):
    table = pyarrow.Table.from_pylist(part)
    with pyarrow.ipc.new_stream(str(directory / name), table.schema) as stream:
      stream.write_table(table)
  state = {'_data_files': [{'filename': name} for name in names], '_split': 'train'}
  (directory / 'state.json').write_text(json.dumps(state))
  (directory / 'dataset_info.json').write_text('{}')


def test_a_saved_hugging_face_data_set_is_its_directory(tmp_path):
  train = tmp_path / 'train'
  train.mkdir()
  _save_to_disk(train)
  assert _values(train) == RECORDS
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(ValueError, match=r'name one, .*/train or .*/test'):
    RecordSource(str(tmp_path))
  state = json.loads((train / 'state.json').read_text())
  state['_indices_data_files'] = [{'filename': 'indices.arrow'}]
  (train / 'state.json').write_text(json.dumps(state))
  with pytest.raises(ValueError, match='flatten_indices'):
    RecordSource(str(train))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  (tmp_path / 'a.jsonl.zst').write_bytes(b'x')
  with pytest.raises(ValueError, match=r'pip install "dpo_flax\[zst\]"'):
    list(RecordSource(str(tmp_path / 'a.jsonl.zst')))


def _write_arrow(path, columns, names):
  pyarrow = pytest.importorskip('pyarrow')
  batch = pyarrow.record_batch(columns, names=names)
  with pyarrow.ipc.new_stream(str(path), batch.schema) as stream:
    stream.write_batch(batch)


def _strings(offsets, content):
  pyarrow = pytest.importorskip('pyarrow')
  places = pyarrow.py_buffer(np.array(offsets, np.int32).tobytes())
  return pyarrow.Array.from_buffers(
    pyarrow.string(), len(offsets) - 1, [None, places, pyarrow.py_buffer(content)]
  )


def _damaged_columns():
  pyarrow = pytest.importorskip('pyarrow')
  return {
    'wrong UTF-8': _strings([0, 1, 3, 4], b'a\xff\xfeb'),
    'beyond the text': _strings([0, 1, 1 << 30, 3], b'abc'),
    'no such second': pyarrow.array([0, 2**62, 1], pyarrow.timestamp('s')),
    'no such day': pyarrow.array([0, 2**30, 1], pyarrow.date32()),
  }


@pytest.mark.parametrize(
  'fault', ['wrong UTF-8', 'beyond the text', 'no such second', 'no such day']
)
def test_a_damaged_row_of_a_table_is_an_error_and_others_are_read(tmp_path, fault):
  _write_arrow(tmp_path / 'a.arrow', [_damaged_columns()[fault]], ['x'])
  raw = [record.raw for record in RecordSource(str(tmp_path / 'a.arrow'))]
  assert len(raw) == 3
  assert isinstance(raw[0], dict)
  assert raw[1].reason == 'unreadable row'


def test_columns_of_the_same_name_are_refused(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  one, two = pyarrow.array([1]), pyarrow.array([2])
  _write_arrow(tmp_path / 'a.arrow', [one, two], ['x', 'x'])
  assert _outcome(tmp_path / 'a.arrow') == (0, 'duplicate key')
  inner = pyarrow.StructArray.from_arrays([one, two], names=['x', 'x'])
  _write_arrow(tmp_path / 'b.arrow', [inner], ['s'])
  assert _outcome(tmp_path / 'b.arrow') == (0, 'unreadable row')
