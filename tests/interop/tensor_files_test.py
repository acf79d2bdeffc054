"""Our reader and writer against the safetensors library, and against damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dpo_flax.interop.tensor_files import new_directory, read_header, write_tensors

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


def test_new_directory_keeps_what_it_did_not_write(tmp_path):
  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'thesis.txt').write_text('years of work')
  with pytest.raises(ValueError, match='choose another'), new_directory(tmp_path / 'home'):
    pass
  assert (tmp_path / 'home' / 'thesis.txt').exists()
