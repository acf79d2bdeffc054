"""Data files, local or gs://, as one sequence of records."""

import dataclasses
import functools
import glob
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dpo_flax.config.named_values import NamedValues, named_values
from dpo_flax.data.records import readers
from dpo_flax.data.records.raw import RecordError, parse
from dpo_flax.files.paths import access_errors

_CHUNK = 1 << 20  # bytes read at once when hashing
_LEAST, _MOST = 0.001, 1000  # passes over a part of a mixture in an epoch

Paths = str | Sequence[str] | NamedValues


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
    """Returns the record's keys and values, or raises the RecordError that stands in its place."""
    if isinstance(self.raw, RecordError):
      raise self.raw
    return parse(self.raw) if isinstance(self.raw, bytes) else self.raw


class RecordSource:
  """The records of several files, file after file, in the order given (globs: of their names).

  Iterating reads every file once in constant memory. Blank lines are no records; what cannot be
  read is a record whose value is an error.

  Args:
    paths: a path or a glob, several of them, or a mixture: the passes over each path in an epoch,
      in any form of named_values.

  Raises:
    ValueError: a path or a glob that names no file, a file named twice, a weight that is no number,
      or something else than paths.
  """

  def __init__(self, paths: Paths):
    parts = _parts(paths)
    self.weights: list[float] = [weight for weight, _ in parts]  # of each part of the mixture
    names = [[file for p in patterns for file in _expand(p)] for _, patterns in parts]
    self.files: list[str] = [file for files in names for file in files]
    self.parts: list[int] = [i for i, files in enumerate(names) for _ in files]  # of each file
    if not self.files:
      raise ValueError('no data files given: set data.train to a path, a glob or a list of them.')
    if len(set(self.files)) < len(self.files):
      twice = next(file for file in self.files if self.files.count(file) > 1)
      raise ValueError(f'{twice} is named more than once: name every file once.')
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
    """SHA-256 of the files' kinds and bytes, in order."""
    digest = hashlib.sha256()
    for file in self.files:
      content = hashlib.sha256(readers.kind(file).encode())
      with epath.Path(file).open('rb') as stream:
        while chunk := stream.read(_CHUNK):
          content.update(chunk)
      digest.update(content.digest())
    return digest.hexdigest()


def _parts(paths: Paths) -> list[tuple[float, list[str]]]:
  """Returns (weight, patterns) of each part; without weights, all is one part."""
  mixture = named_values(paths)
  if mixture is None:
    patterns = [paths] if isinstance(paths, str) else paths
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
      raise ValueError(
        f'data files {paths!r}: expected a path, a list of paths, or a mixture such as '
        "(('a.jsonl', 1), ('b.jsonl', 0.5))."
      )
    return [(1.0, list(patterns))]
  for path, weight in mixture.items():
    if (
      isinstance(weight, bool)
      or not isinstance(weight, int | float)
      or not _LEAST <= weight <= _MOST
    ):
      raise ValueError(
        f'data.train gives {path} the weight {weight!r}: it is the number of passes over the file '
        f'in an epoch, such as 1, 2 or 0.5, from {_LEAST} to {_MOST}.'
      )
  return [(float(weight), [path]) for path, weight in mixture.items()]


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
    raise ValueError(f'{pattern} does not exist{several}.')
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
