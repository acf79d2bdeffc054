"""Files of every format -> raw records one after the other, in bounded memory.

  .jsonl, .ndjson and other names   one JSON object a line
  .json                             an array of objects, or one object a line
  .parquet, .arrow                  rows (needs the `parquet` extra)
  .array_record                     one JSON object a record, local files only

Text may be compressed: .gz, .zst (needs the `zst` extra).
"""

import contextlib
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from etils import epath

from dpo_flax.data.records.fields import RecordError
from dpo_flax.files.paths import is_remote

Raw = bytes | dict[str, Any] | RecordError  # JSON, a row of a table, or what is wrong
Plain = io.BufferedReader | gzip.GzipFile  # bytes without compression
Numbered = tuple[int, Raw]  # with its line, or its number from 1

_CHUNK = 1 << 16  # bytes
_ROWS = 256  # of a table decoded at once
_RECORDS = 256  # of an ArrayRecord file read at once
_LONGEST = 1 << 27  # characters of an item of a JSON array
_DECODER = json.JSONDecoder()  # lenient: it only finds where an item ends


def read(file: str, stream: IO[bytes]) -> Iterator[Numbered]:
  """Yields what a file holds; a fault is the last thing it yields.

  Args:
    file: its name, which decides its format.
    stream: its bytes as they are stored.
  """
  number = 0
  try:
    with _plain(file, stream) as plain:
      for number, raw in _reader(file, plain)(plain):
        yield number, raw
  except RecordError as error:
    yield number + 1, error
    return
  if not number:
    yield 1, RecordError('empty file', 'it has no records')


def _reader(file: str, plain: Plain) -> Callable[[Any], Iterator[Numbered]]:
  match _suffix(file):
    case 'parquet':
      return _parquet
    case 'arrow':
      return _arrow
    case 'array_record' | 'arrayrecord':
      return lambda _: _array_record(file)
    case 'json' if plain.peek(_CHUNK).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'[':
      return _array
  return _lines


def format_of(file: str) -> str:
  """Returns what decides how bytes are read: equal bytes of one format hold equal records."""
  return _suffix(file) + file[len(_stem(file)) :]


def _suffix(file: str) -> str:
  suffix = re.search(r'\.(parquet|arrow|array_?record|json)$', _stem(file))
  return suffix[1] if suffix else 'lines'


def _stem(file: str) -> str:
  return file.removesuffix('.gz').removesuffix('.zst')


@contextlib.contextmanager
def _plain(file: str, stream: IO[bytes]) -> Iterator[Plain]:
  """Gives the bytes without compression; damage to it is a RecordError."""
  if file.endswith('.gz'):
    try:
      yield gzip.GzipFile(fileobj=stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise RecordError('truncated or corrupt gzip file', str(error)) from None
  elif file.endswith('.zst'):
    yield io.BufferedReader(_Zstandard(stream), _CHUNK)
  else:
    raw: Any = stream  # of an object store: what BufferedReader needs, though not RawIOBase
    yield raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


class _Zstandard(io.RawIOBase):
  """The content of all frames of a .zst file.

  The library's own stream reader takes a file that stops inside a frame for a complete one.
  """

  def __init__(self, stream: IO[bytes]):
    library = _import('zstandard', file='.zst', extra='zst')
    self._decompressor, self._failure = library.ZstdDecompressor(), library.ZstdError
    self._stream, self._frame, self._rest, self._ready = stream, None, b'', b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      packed = self._rest or self._stream.read(_CHUNK)
      if not packed and self._frame:
        raise RecordError('truncated or corrupt zstd file', 'it ends inside a frame')
      if not packed:
        return 0
      self._frame = self._frame or self._decompressor.decompressobj()
      try:
        self._ready = self._frame.decompress(packed)
      except self._failure as error:
        raise RecordError('truncated or corrupt zstd file', str(error)) from None
      self._rest = self._frame.unused_data
      self._frame = None if self._frame.eof else self._frame
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size


def _lines(stream: IO[bytes]) -> Iterator[Numbered]:
  for number, line in enumerate(stream, start=1):
    if line.strip():
      yield number, line


def _array(stream: Plain) -> Iterator[Numbered]:
  try:
    with io.TextIOWrapper(stream, 'utf-8-sig') as text:
      yield from _items(text)
  except UnicodeDecodeError as error:
    raise RecordError('not UTF-8', str(error)) from None


def _items(text: io.TextIOWrapper) -> Iterator[Numbered]:
  """Yields the items of one JSON array as text, holding little more than one item at a time."""
  rest, number = text.read(_CHUNK).lstrip()[1:].lstrip(), 0
  while not rest.startswith(']'):
    try:
      end = _DECODER.raw_decode(rest)[1]
      behind = rest[end:].lstrip()
      failure = f'{behind[:20]!r} follows item {number + 1}'
    except (ValueError, RecursionError) as error:
      behind, failure = '', f'item {number + 1} has no end: {error}'
    if behind[:1] in (',', ']'):
      number += 1
      yield number, rest[:end].encode(errors='surrogatepass')
      rest = behind if behind[0] == ']' else behind[1:].lstrip()
      continue
    more = text.read(max(_CHUNK, len(rest)))  # doubled, so that no item is scanned often
    if behind or not more or len(rest) > _LONGEST:
      raise RecordError('not JSON', failure)
    rest = (rest + more).lstrip()
  if rest[1:].strip() or text.read(_CHUNK).strip():
    raise RecordError('not JSON', 'text follows the array')


def _parquet(stream: IO[bytes]) -> Iterator[Numbered]:
  _import('pyarrow', file='.parquet', extra='parquet')
  from pyarrow import parquet

  return _rows(lambda: parquet.ParquetFile(stream).iter_batches(_ROWS), 'a parquet file')


def _arrow(stream: IO[bytes]) -> Iterator[Numbered]:
  pyarrow = _import('pyarrow', file='.arrow', extra='parquet')
  return _rows(lambda: pyarrow.ipc.open_stream(stream), 'an Arrow stream')


def _rows(open_table: Callable[[], Iterable[Any]], name: str) -> Iterator[Numbered]:
  import pyarrow

  number = 0
  try:
    for batch in open_table():
      names = batch.schema.names
      if len(set(names)) < len(names):
        raise RecordError('duplicate key', repr(next(n for n in names if names.count(n) > 1)))
      for start in range(0, len(batch), _ROWS):
        for row in _decode(batch.slice(start, _ROWS)):
          number += 1
          yield number, _without_nulls(row)
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise RecordError(f'not {name}', str(error)) from None


def _decode(rows: Any) -> list[Raw]:
  """Returns the rows of a part of a table, with an error instead of each that is damaged."""
  try:
    rows.validate(full=True)  # wrong offsets would be read as addresses
    return rows.to_pylist()
  except (ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is the first
    if len(rows) == 1:
      return [RecordError('unreadable row', str(error))]
    return [row for i in range(len(rows)) for row in _decode(rows.slice(i, 1))]


def _without_nulls(value: Any) -> Any:
  """Leaves out the keys that a table gives every row because some other row has them."""
  if isinstance(value, dict):
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}
  return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _array_record(file: str) -> Iterator[Numbered]:
  if is_remote(file):
    raise RecordError('not a local file', 'ArrayRecord files are read from local disks only')
  try:
    module = importlib.import_module('array_record.python.array_record_module')  # built, no .py
    reader = module.ArrayRecordReader(file)
    for start in range(0, reader.num_records(), _RECORDS):
      end = min(start + _RECORDS, reader.num_records())
      yield from enumerate(reader.read(start, end), start=start + 1)
  except (RuntimeError, ValueError) as error:
    raise RecordError('not an ArrayRecord file', str(error)) from None


def _import(name: str, *, file: str, extra: str) -> Any:
  try:
    return __import__(name)
  except ImportError:
    raise ValueError(f'{file} files need {name}: pip install "dpo_flax[{extra}]"') from None


def table_files(directory: epath.Path) -> list[str]:
  """Returns the Arrow files of a data set that Hugging Face `datasets` saved to disk, in order.

  Raises:
    ValueError: the directory holds several splits, or no such data set.
  """
  splits = directory / 'dataset_dict.json'
  if splits.exists():
    names = ' or '.join(f'{directory}/{name}' for name in json.loads(splits.read_text())['splits'])
    raise ValueError(f'{directory} holds several splits: name one, {names}')
  state = directory / 'state.json'
  if not state.exists():
    raise ValueError(f'{directory} is a directory: name its files, as in {directory}/*.jsonl')
  content = json.loads(state.read_text())
  if content.get('_indices_data_files'):
    raise ValueError(
      f'{directory} selects rows by an indices file, as old versions of `datasets` wrote: load it, '
      'flatten_indices(), and save it again'
    )
  return [str(directory / file['filename']) for file in content['_data_files']]
