"""Lines of jsonl and jsonl.gz, local or gs://, as one sequence of records."""

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

_CHUNK = 1 << 20  # bytes read at once when hashing


class RecordError(ValueError):
  """A record that cannot be used; `reason` is short, so that equal reasons can be counted."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}' if detail else reason)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Record:
  """One line: its value, or the error that stands in its place."""

  where: str  # file:line
  value: dict[str, Any] | None
  error: RecordError | None = None


class RecordSource:
  """Random and sequential access to the records of several files, in the order of their names.

  Iterating reads every file once in constant memory; unreadable lines come out as records with an
  error. Indexing raises that error. Blank lines do not count.

  Raises:
    ValueError: a path or a glob that names no file.
  """

  def __init__(self, paths: str | list[str] | tuple[str, ...]):
    patterns = [paths] if isinstance(paths, str) else list(paths)
    self.files = [file for pattern in patterns for file in _expand(str(pattern))]
    if not self.files:
      raise ValueError('no data files given: set data.train to a path, a glob or a list of them.')
    if len(set(self.files)) < len(self.files):
      twice = next(file for file in self.files if self.files.count(file) > 1)
      raise ValueError(f'{twice} is named more than once in {patterns}: name every file once.')

  def __iter__(self) -> Iterator[Record]:
    for file in self.files:
      for line, _, text in _lines(file):
        yield _record(f'{file}:{line}', text)

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Record:
    file, line, offset = self._index[index]
    if line == 0:  # a file that could not be read to its end
      record = [r for r in RecordSource(file) if r.error][-1]
    else:
      with _open(file) as stream:
        stream.seek(offset)
        record = _record(f'{file}:{line}', stream.readline())
    if record.error:
      raise ValueError(f'{record.where}: {record.error}')
    return record

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for file in self.files:
      content = hashlib.sha256()
      with epath.Path(file).open('rb') as stream:
        while chunk := stream.read(_CHUNK):
          content.update(chunk)
      digest.update(content.digest())
    return digest.hexdigest()

  @functools.cached_property
  def _index(self) -> list[tuple[str, int, int]]:
    return [
      (file, 0 if isinstance(text, RecordError) else line, offset)
      for file in self.files
      for line, offset, text in _lines(file)
    ]


def _expand(pattern: str) -> list[str]:
  """Returns the files a path or a glob names, sorted."""
  path = epath.Path(pattern)
  if path.exists():
    if path.is_dir():
      raise ValueError(f'{pattern} is a directory: name its files, as in {pattern}/*.jsonl.')
    return [pattern]
  if not glob.has_magic(pattern):
    raise ValueError(f'{pattern} does not exist.')
  if '**' in pattern:
    raise ValueError(f'{pattern}: ** is not supported, as it may list a whole bucket. Use *.')
  parts = pattern.split('/')  # not path.parts, which lose the // of gs://
  start = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  root = epath.Path('/'.join(parts[:start]) + '/' if start else '.')
  files = root.glob('/'.join(parts[start:])) if root.exists() else ()
  names = sorted(str(file) for file in files if not file.is_dir())
  if not names:
    raise ValueError(f'{pattern} matches no file.')
  return names


@contextlib.contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
  with epath.Path(file).open('rb') as raw:
    yield gzip.GzipFile(fileobj=raw) if file.endswith('.gz') else raw


def _lines(file: str) -> Iterator[tuple[int, int, bytes | RecordError]]:
  """Yields (line number, byte offset, line), with an error for what is missing at the end."""
  number, offset = 0, 0
  with _open(file) as stream:
    try:
      for number, line in enumerate(stream, start=1):
        if line.strip():
          yield number, offset, line
        offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      yield number + 1, offset, RecordError('truncated or corrupt gzip file', str(error))
      return
  if not offset:
    yield 1, 0, RecordError('empty file', 'it has no records')


def _record(where: str, line: bytes | RecordError) -> Record:
  if isinstance(line, RecordError):
    return Record(where, None, line)
  try:
    return Record(where, parse(line))
  except RecordError as error:
    return Record(where, None, error)


def parse(line: bytes) -> dict[str, Any]:
  """Parses one JSON object strictly: no NaN or infinity, no key twice.

  Raises:
    RecordError: anything else.
  """
  try:
    value = _DECODER.decode(line.decode('utf-8-sig').strip())
  except RecordError:
    raise
  except UnicodeDecodeError as error:
    raise RecordError('not UTF-8', str(error)) from None
  except (ValueError, RecursionError) as error:
    raise RecordError('not JSON', str(error)) from None
  if not isinstance(value, dict):
    raise RecordError('not a JSON object', f'it is a {type(value).__name__}')
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    raise RecordError('duplicate key', repr(next(k for k in keys if keys.count(k) > 1)))
  return value


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise RecordError('number out of range', text)
  return number


def _refuse_constant(text: str) -> None:
  raise RecordError('not JSON', f'{text} is not a JSON number')


_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
)
