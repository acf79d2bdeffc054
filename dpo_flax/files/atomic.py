"""Files that appear complete or not at all, and are on disk once they have their name."""

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Callable
from typing import IO, Any

from etils import epath

from dpo_flax.files.paths import is_remote

SUFFIX = '.tmp'  # of what a kill left half written
_CHUNK = 1 << 22  # bytes


def write_file(
  path: epath.PathLike,
  content: str | bytes | Callable[[IO[bytes]], Any],
  *,
  concurrent: bool = False,
) -> str:
  """Writes a file in one step, over an earlier one, and returns its SHA-256 in hexadecimal.

  It is written under another name in the same directory, put on disk, renamed, and the directory
  is put on disk. A reader, or a machine that lost its power, finds the old content or all of the
  new. An object store shows an object once all of it has arrived; there nothing is renamed.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   write_file(f'{directory}/a', 'text') == sha256_of(f'{directory}/a')
  True

  Args:
    path: the directory it is in must exist.
    content: text (written as UTF-8), bytes, or what writes to the file that it is given.
    concurrent: whether other processes may write this file at the same time; the last one wins.

  Raises:
    OSError, or another of `paths.access_errors()`: it could not be written. The old content stays.
    Exception: whatever `content` raises, with the same effect.
  """
  path = epath.Path(path)
  if isinstance(content, str):
    content = content.encode()
  if is_remote(path):
    return _write_object(path, content)
  name = f'{path.name}.{uuid.uuid4().hex}{SUFFIX}' if concurrent else f'{path.name}{SUFFIX}'
  unfinished = path.parent / name
  try:
    with unfinished.open('wb') as file:
      _write(file, content)
      file.flush()
      os.fsync(file.fileno())
    digest = _digest(content) or sha256_of(unfinished)
    unfinished.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)
    raise
  sync(path.parent)
  return digest


def sha256_of(path: epath.PathLike, *, synced: bool = False) -> str:
  """Returns the SHA-256 of a file in hexadecimal; with `synced`, once the file is on disk."""
  digest = hashlib.sha256()
  with epath.Path(path).open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
    if synced and not is_remote(path):
      os.fsync(file.fileno())
  return digest.hexdigest()


def sync(path: epath.PathLike):
  """Puts a file, or the names in a directory, on disk; an object store has done so by itself."""
  if is_remote(path):
    return
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _write_object(path: epath.Path, content: bytes | Callable[[IO[bytes]], Any]) -> str:
  """Uploads what is complete: a file in a store that is closed by an error keeps what it has."""
  buffer = io.BytesIO()
  _write(buffer, content)
  path.write_bytes(buffer.getvalue())
  return hashlib.sha256(buffer.getvalue()).hexdigest()


def _write(file: IO[bytes], content: bytes | Callable[[IO[bytes]], Any]):
  if isinstance(content, bytes):
    file.write(content)
  else:
    content(file)


def _digest(content: bytes | Callable[[IO[bytes]], Any]) -> str | None:
  """None where it takes the file to know."""
  return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else None
