"""safetensors files: read in slices, written as streams, on local disks and in buckets alike.

A file is eight bytes of little-endian header length, a JSON header (name -> dtype, shape,
data_offsets) and the tensors' bytes (https://huggingface.co/docs/safetensors). Reading a slice by
its offset lets one reader serve disks and gs://; writing in order keeps one tensor in memory.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
  'F32': np.dtype(np.float32),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
METADATA = {'format': 'pt', 'written_by': 'dpo_flax'}


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """One tensor inside a file; nothing of it is read yet."""

  path: epath.Path
  dtype: str  # the format's name of it; DTYPES holds those that can be read
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  @property
  def row_bytes(self) -> int:
    """The size of one index of the first axis."""
    return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads the indices start ... stop of the first axis, and no other byte."""
    with self.path.open('rb') as file:
      file.seek(self.offset + start * self.row_bytes)
      data = file.read((stop - start) * self.row_bytes)
    return np.frombuffer(data, DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])


def parse_json(text: bytes, where: epath.Path) -> dict[str, Any]:
  """Parses a JSON object, refusing keys that occur twice.

  Raises:
    ValueError: it is not one.
  """

  def unique(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
      keys = [key for key, _ in pairs]
      raise ValueError(f'duplicate {sorted({key for key in keys if keys.count(key) > 1})}')
    return values

  try:
    values = json.loads(text, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: not valid JSON: {error}') from error
  if not isinstance(values, dict):
    raise ValueError(f'{where}: a JSON object is expected, not {type(values).__name__}')
  return values


def read_header(path: epath.Path) -> tuple[dict[str, str], dict[str, TensorFile]]:
  """Returns the metadata and the tensors of a safetensors file.

  Raises:
    ValueError: the header is malformed, or its tensors do not fill the file exactly.
  """
  size = path.stat().length
  with path.open('rb') as file:
    prefix = file.read(8)
    length = int.from_bytes(prefix, 'little')
    if prefix == b'version ':
      raise ValueError(f'{path}: a git-lfs pointer, not the file itself: run `git lfs pull`')
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
      raise ValueError(f'{path}: no safetensors file: {size} bytes, header of {length}')
    header = parse_json(file.read(length), path)
  metadata = header.pop('__metadata__', {})
  start, tensors, spans = 8 + length, {}, []
  for name, entry in header.items():
    dtype, shape, span = _entry(entry, name, path)
    tensors[name] = TensorFile(path, dtype, shape, start + span[0])
    spans.append(span)
  end = 0
  for span in sorted(spans):
    if span[0] != end or span[1] < end:
      raise ValueError(f'{path}: tensors overlap or leave a gap at byte {end}: {span}')
    end = span[1]
  if start + end != size:
    raise ValueError(f'{path}: {size} bytes, where the header needs {start + end}: truncated?')
  return metadata, tensors


def write_tensors(
  path: epath.Path,
  specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  arrays: Iterable[np.ndarray],  # in the order of `specs`
) -> None:
  """Writes a safetensors file, one array at a time."""
  header, offset = {'__metadata__': METADATA}, 0
  for name, (dtype, shape) in specs.items():
    span = [offset, offset + math.prod(shape) * dtype.itemsize]
    header[name] = {'dtype': DTYPE_NAMES[dtype], 'shape': shape, 'data_offsets': span}
    offset = span[1]
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # the data starts aligned
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for (name, (dtype, shape)), array in zip(specs.items(), arrays, strict=True):
      assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def new_directory(output: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary sibling that takes the place of `output` when the block ends without error.

  A reader sees the old directory or the whole new one, except in buckets: they have no atomic
  rename, and the files appear one by one.

  Raises:
    ValueError: `output` exists and is no earlier export, so that replacing it would lose something.
  """
  output = epath.Path(output)
  if output.exists() and not _is_export(output):
    raise ValueError(f'{output} exists and was not written by an earlier export: choose another')
  temporary = output.parent / f'.{output.name}.new'
  retired = output.parent / f'.{output.name}.old'
  for leftover in (temporary, retired):
    if leftover.exists():
      leftover.rmtree()
  temporary.mkdir(parents=True)
  yield temporary
  if output.exists():
    output.rename(retired)
  temporary.rename(output)
  if retired.exists():
    retired.rmtree()


def _is_export(directory: epath.Path) -> bool:
  """Whether a directory is empty, or all its tensors were written by `write_tensors`."""
  if not directory.is_dir():
    return False
  files = list(directory.iterdir())
  tensors = [file for file in files if file.suffix == '.safetensors']
  written = all(read_header(file)[0].get('written_by') == 'dpo_flax' for file in tensors)
  return not files or (bool(tensors) and written)


def _entry(entry: Any, name: str, path: epath.Path) -> tuple[str, tuple[int, ...], tuple[int, int]]:
  """Checks one tensor of a header: (dtype, shape, (begin, end) in the data)."""

  def sizes(values):
    return isinstance(values, list) and all(type(size) is int and size >= 0 for size in values)

  try:
    dtype, shape, span = entry['dtype'], entry['shape'], entry['data_offsets']
    valid = isinstance(dtype, str) and sizes(shape) and sizes(span) and len(span) == 2
  except (KeyError, TypeError):
    valid = False
  if valid and dtype in DTYPES:
    valid = math.prod(shape) * DTYPES[dtype].itemsize == span[1] - span[0]
  if not valid:
    raise ValueError(f'{path}: tensor {name} is malformed: {entry}')
  return dtype, tuple(shape), tuple(span)
