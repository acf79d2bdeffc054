"""A directory that can be checked for damage: the SHA-256 of every file in it.

The manifest has the format of sha256sum, so that any machine can check a directory with

    sha256sum -c SHA256SUMS
"""

import os

from etils import epath

from dpo_flax.files.atomic import sha256_of, sync, write_file
from dpo_flax.files.paths import fresh, is_link, is_remote

NAME = 'SHA256SUMS'


def seal(directory: epath.Path):
  """Writes the manifest of a directory; returns once that and every file in it are on disk."""
  entries = _entries(directory)
  write_file(directory / NAME, _describe(directory, entries, synced=True))
  for folder in {directory, *(path.parent for path in entries)}:
    sync(folder)


def faults(directory: epath.Path) -> list[str]:
  """Returns what differs from when the directory was sealed; [] if every byte is the same."""
  path = fresh(directory / NAME)
  if is_link(path) or not path.exists():
    return [f'{NAME} is missing']
  sealed = path.read_bytes()
  found = _describe(directory, _entries(directory), synced=False).encode()
  if sealed == found:
    return []
  then, now = (dict(map(_entry, text.splitlines())) for text in (sealed, found))
  if then == now or b'' in then:
    return [f'{NAME} is damaged']
  return [
    f'{name.decode(errors="replace")} {_fate(then.get(name), now.get(name))}'
    for name in sorted(then.keys() | now.keys())
    if then.get(name) != now.get(name)
  ]


def _fate(then: bytes | None, now: bytes | None) -> str:
  if now is None:
    return 'is missing'
  return 'was not there before' if then is None else 'has changed'


def _entry(line: bytes) -> tuple[bytes, bytes]:
  """Returns (name, SHA-256) of a manifest's line; both are empty if it is none."""
  digest, separator, name = line.partition(b'  ')
  return (name, digest) if separator and len(digest) == 64 else (b'', b'')


def _describe(directory: epath.Path, entries: list[epath.Path], *, synced: bool) -> str:
  """Returns the manifest of a directory that holds these entries."""
  base = len(str(directory)) + 1
  names = {str(path)[base:]: path for path in entries}
  lines = [f'{_digest(path, synced)}  {name}\n' for name, path in sorted(names.items())]
  return ''.join(line for line in lines if not line.endswith(f'  {NAME}\n'))


def _entries(directory: epath.Path) -> list[epath.Path]:
  """Every file below a directory, and every symbolic link and pipe, which are not read."""
  found = []
  for path in fresh(directory).iterdir():
    if path.is_dir() and not is_link(path):
      found += _entries(path)
    else:
      found.append(path)
  return found


def _digest(path: epath.Path, synced: bool) -> str:
  # epath takes a pipe for a file.
  if is_link(path) or not (is_remote(path) or os.path.isfile(path)):
    return '-' * 64  # no file's: what a link leads to may change, a pipe may have nothing to read
  return sha256_of(path, synced=synced)
