"""safetensors files: read in slices, written as streams, on local disks and in buckets alike.

A file is eight bytes of little-endian header length, a JSON header (name -> dtype, shape,
data_offsets) and the tensors' bytes (https://huggingface.co/docs/safetensors). Reading a slice by
its offset lets one reader serve disks and gs://; writing in order keeps one tensor in memory.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from dpo_flax.files.messages import shown
from dpo_flax.files.untrusted import MAX_JSON_BYTES, parse_json

DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
  'F32': np.dtype(np.float32),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WRITER = 'dpo_flax'
METADATA = {'format': 'pt', 'written_by': WRITER}

_MAX_AXES, _MAX_SIZE = 8, 2**63  # of a tensor; a product of these is still an ordinary number
_CHECKED_VALUES = 1 << 18  # at once: they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """One tensor inside a file; nothing of it is read yet."""

  name: str
  path: epath.Path
  dtype: str  # the format's name of it; DTYPES holds those that can be read
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  @property
  def row_bytes(self) -> int:
    """The size of one index of the first axis."""
    return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads the indices start ... stop of the first axis, and no other byte.

    Raises:
      ValueError: the file has become shorter, or a value is not finite.
    """
    with self.path.open('rb') as file:
      file.seek(self.offset + start * self.row_bytes)
      data = file.read((stop - start) * self.row_bytes)
    if len(data) != (stop - start) * self.row_bytes:
      raise ValueError(f'{self.path}: truncated since it was opened, within {shown(self.name)}')
    values = np.frombuffer(data, DTYPES[self.dtype])
    if not _is_finite(values):
      raise ValueError(f'{self.path}: {shown(self.name)} holds NaN or infinite values: damaged?')
    return values.reshape(stop - start, *self.shape[1:])


def _is_finite(values: np.ndarray) -> bool:
  """Whether no value is NaN or infinite: those have the largest bits, once the sign is off."""
  bits = np.dtype(f'u{values.itemsize}')
  infinity = np.array(np.inf, values.dtype).view(bits)
  values, unsigned = values.view(bits), np.array(np.iinfo(bits).max >> 1, bits)
  starts = range(0, len(values), _CHECKED_VALUES)
  return all((values[at : at + _CHECKED_VALUES] & unsigned).max() < infinity for at in starts)


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
    if len(prefix) < 8 or length > size - 8:
      raise ValueError(f'{path}: no safetensors file: {size} bytes, header of {length}')
    if length > MAX_JSON_BYTES:
      raise ValueError(f'{path}: a header of {length} bytes; at most {MAX_JSON_BYTES} are read')
    header = parse_json(file.read(length), path)
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict):
    raise ValueError(f'{path}: __metadata__ is {shown(metadata)}, not an object')
  start, tensors, spans = 8 + length, {}, []
  for name, entry in header.items():
    dtype, shape, span = _entry(entry, name, path)
    tensors[name] = TensorFile(name, path, dtype, shape, start + span[0])
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
  header: dict[str, Any] = {'__metadata__': METADATA}
  offset = 0
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


def _entry(entry: Any, name: str, path: epath.Path) -> tuple[str, tuple[int, ...], tuple[int, int]]:
  """Checks one tensor of a header: (dtype, shape, (begin, end) in the data)."""

  def sizes(values):
    return isinstance(values, list) and all(
      type(size) is int and 0 <= size < _MAX_SIZE for size in values
    )

  try:
    dtype, shape, span = entry['dtype'], entry['shape'], entry['data_offsets']
    valid = isinstance(dtype, str) and sizes(shape) and sizes(span) and len(span) == 2
    valid = valid and len(shape) <= _MAX_AXES and name.isprintable()
  except (KeyError, TypeError):
    valid = False
  if valid and dtype in DTYPES:
    valid = math.prod(shape) * DTYPES[dtype].itemsize == span[1] - span[0]
  if not valid:
    raise ValueError(f'{path}: tensor {shown(name)} is malformed: {shown(entry)}')
  return dtype, tuple(shape), tuple(span)
