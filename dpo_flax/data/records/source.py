"""Data files, local or gs://, as one sequence of records."""

import dataclasses
import functools
import glob
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dpo_flax.data.records import readers
from dpo_flax.data.records.fields import RecordError, parse
from dpo_flax.files.paths import access_errors

_CHUNK = 1 << 20  # bytes read at once when hashing


@dataclasses.dataclass(frozen=True)
class Record:
  """One record as it stands in its file: unparsed, so that reading is cheap."""

  file: str
  number: int  # of its line, or of the record in its file
  raw: readers.Raw

  @property
  def where(self) -> str:
    """'file:line'."""
    return f'{self.file}:{self.number}'

  def value(self) -> dict[str, Any]:
    """Returns the record's keys and values, or raises the RecordError that was read instead."""
    if isinstance(self.raw, RecordError):
      raise self.raw
    return parse(self.raw) if isinstance(self.raw, bytes) else self.raw


class RecordSource:
  """The records of several files, file after file, in the order given (globs: of their names).

  Iterating reads every file once in constant memory. Blank lines are no records; what cannot be
  read is a record whose value is an error.

  Args:
    paths: a path or a glob, or several of them.
    weights: the passes over each path in an epoch, where the paths are a mixture.

  Raises:
    ValueError: a path or a glob that names no file, or a file named twice.
  """

  def __init__(self, paths: str | Sequence[str], weights: Sequence[float] | None = None):
    paths = [paths] if isinstance(paths, str) else paths
    self.weights = [1.0] if weights is None else list(map(float, weights))  # of each part
    found = [(i, file) for i, path in enumerate(paths) for file in _expand(path)]
    self.files: list[str] = [file for _, file in found]
    # Of each file; without weights, all is one part.
    self.parts: list[int] = [0 if weights is None else i for i, _ in found]
    if not self.files:
      raise ValueError('no data files given: set data.train to a path, a glob or a list of them')
    if len(set(self.files)) < len(self.files):
      twice = next(file for file in self.files if self.files.count(file) > 1)
      raise ValueError(f'{twice} is named more than once: name every file once')
    self.position = 0  # stored bytes that the iteration has passed, of `size`

  def __iter__(self) -> Iterator[Record]:
    before = 0
    for file in self.files:
      with epath.Path(file).open('rb') as stream:
        for number, raw in readers.read(file, stream):
          yield Record(file, number, raw)
          # Some readers close what they have read to its end.
          self.position = before + (0 if stream.closed else stream.tell())
      before += epath.Path(file).stat().length

  @functools.cached_property
  def size(self) -> int:
    """Bytes of all files, as stored."""
    return sum(epath.Path(file).stat().length for file in self.files)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files' formats and bytes, in order."""
    digest = hashlib.sha256()
    for file in self.files:
      content = hashlib.sha256(readers.format_of(file).encode())
      with epath.Path(file).open('rb') as stream:
        while chunk := stream.read(_CHUNK):
          content.update(chunk)
      digest.update(content.digest())
    return digest.hexdigest()


def _expand(pattern: str) -> list[str]:
  """Returns the files that a path, a saved data set or a glob names; those of a glob sorted."""
  path = epath.Path(pattern)
  try:
    if path.exists():
      return readers.table_files(path) if path.is_dir() else [pattern]
  except access_errors() as error:
    raise ValueError(f'{pattern} cannot be read: {error}. May this account read it?') from error
  if not glob.has_magic(pattern):
    several = ': give several paths as a tuple, not one text with commas' if ',' in pattern else ''
    raise ValueError(f'{pattern} does not exist{several}')
  if '**' in pattern:
    raise ValueError(f'{pattern}: ** is not supported, as it may list a whole bucket. Use *.')
  parts = pattern.split('/')  # not path.parts, which lose the // of gs://
  start = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  root = epath.Path('/'.join(parts[:start]) + '/' if start else '.')
  files = root.glob('/'.join(parts[start:])) if root.exists() else ()
  names = sorted(str(file) for file in files if not file.is_dir())
  if not names:
    raise ValueError(f'{pattern} matches no file')
  return names
