"""Our reader and writer against the safetensors library, and against damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dpo_flax.huggingface import tensor_files
from dpo_flax.huggingface.tensor_files import read_header, write_tensors

ARRAYS = {
  'a': np.arange(24, dtype=np.float32).reshape(4, 6),
  'b': np.arange(10, dtype=np.float16),
  'c': np.arange(12).reshape(2, 3, 2).astype(ml_dtypes.bfloat16),
  'none': np.zeros((0, 3), np.float32),
}


def write_raw(path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
  return epath.Path(path)


def entry(begin, end, shape=None, dtype='F32'):
  shape = [(end - begin) // 4] if shape is None else shape
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def test_any_rows_of_a_file_by_safetensors_are_read(tmp_path):
  safetensors.numpy.save_file(ARRAYS, tmp_path / 'x.safetensors')
  _, tensors = read_header(epath.Path(tmp_path / 'x.safetensors'))
  assert tensors.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    for start in range(len(array)):
      for stop in range(start, len(array) + 1):
        np.testing.assert_array_equal(tensors[name].read(start, stop), array[start:stop])


def test_safetensors_reads_what_we_write(tmp_path):
  specs = {name: (array.dtype, array.shape) for name, array in ARRAYS.items()}
  write_tensors(epath.Path(tmp_path / 'x.safetensors'), specs, iter(ARRAYS.values()))
  read = safetensors.numpy.load_file(tmp_path / 'x.safetensors')
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
  ('header', 'size', 'message'),
  [
    (b'not json', 0, 'not valid JSON'),
    (b'[' * 100_000, 0, 'not valid JSON'),
    (b'[]', 0, 'a JSON object is expected'),
    (b'{"a": {}, "a": {}}', 0, r"duplicate \['a'\]"),
    ({'a': {}}, 0, 'tensor a is malformed'),
    ({'a': 3}, 0, 'tensor a is malformed'),
    ({'a': entry(0, 8, [3])}, 8, 'tensor a is malformed'),
    ({'a': entry(0, 8, [-2])}, 8, 'tensor a is malformed'),
    ({'a': entry(0, 8, [True, 2])}, 8, 'tensor a is malformed'),
    ({'a': entry(0, 8), 'b': entry(4, 12)}, 12, 'overlap'),
    ({'a': entry(0, 8), 'b': entry(12, 16)}, 16, 'gap'),
    ({'a': entry(8, 0, [4], 'I8')}, 8, 'overlap or leave a gap'),
    ({'a': entry(0, 8, [1] * 9)}, 8, 'tensor a is malformed'),
    ({'a': entry(0, 8, [10**4000] * 8, 'I8')}, 8, 'tensor a is malformed'),
    ({'a\x1b[2J': entry(0, 8)}, 8, r"tensor 'a.x1b\[2J' is malformed"),
    ({'a': entry(0, 8), '__metadata__': []}, 8, '__metadata__'),
    ({'a': entry(0, 8)}, 4, 'truncated'),
    ({'a': entry(0, 8)}, 12, 'truncated'),
  ],
)
def test_damaged_headers_are_refused(tmp_path, header, size, message):
  with pytest.raises(ValueError, match=rf'x\.safetensors: .*{message}'):
    read_header(write_raw(tmp_path / 'x.safetensors', header, bytes(size)))


@pytest.mark.parametrize('data', [b'', b'1234', b'\xff' * 8, (2**40).to_bytes(8, 'little') + b'{}'])
def test_files_of_another_kind_are_refused(tmp_path, data):
  (tmp_path / 'x.safetensors').write_bytes(data)
  with pytest.raises(ValueError, match='no safetensors file'):
    read_header(epath.Path(tmp_path / 'x.safetensors'))


def test_git_lfs_pointer_is_explained(tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0'
  )
  with pytest.raises(ValueError, match='git lfs pull'):
    read_header(epath.Path(tmp_path / 'x.safetensors'))


def test_header_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, 'MAX_JSON_BYTES', 50)
  path = write_raw(tmp_path / 'x.safetensors', {'a': entry(0, 8)}, bytes(8))
  with pytest.raises(ValueError, match='a header of 61 bytes; at most 50 are read'):
    read_header(path)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_value_that_is_not_finite_is_found_where_it_is_read(tmp_path, monkeypatch, dtype, value):
  monkeypatch.setattr(tensor_files, '_CHECKED_VALUES', 7)
  array = np.full((10, 3), np.finfo(np.float16).min, np.float32).astype(dtype)
  array[0] = ml_dtypes.finfo(dtype).max
  array[6, 1] = value
  path = epath.Path(tmp_path / 'x.safetensors')
  write_tensors(path, {'some.weight': (array.dtype, array.shape)}, [array])
  tensor = read_header(path)[1]['some.weight']
  np.testing.assert_array_equal(tensor.read(0, 6), array[:6])
  np.testing.assert_array_equal(tensor.read(7, 10), array[7:])
  with pytest.raises(
    ValueError, match=r'x\.safetensors: some\.weight holds NaN or infinite values'
  ):
    tensor.read(5, 7)


def test_file_that_shrinks_while_it_is_read_is_named(tmp_path):
  path = epath.Path(tmp_path / 'x.safetensors')
  write_tensors(path, {'a': (np.dtype(np.float32), (4, 2))}, [np.ones((4, 2), np.float32)])
  tensor = read_header(path)[1]['a']
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match=r'x\.safetensors: truncated since it was opened, within a'):
    tensor.read(0, 4)
