"""One writer for each workdir: two would mix their histories.

The lock is the operating system's (POSIX record locks), so it ends with the process that holds it,
however that ends, and is not inherited by children. Buckets have no locks: there a second writer is
warned, not refused.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from typing import TextIO

from absl import logging
from etils import epath

from dpo_flax.files.paths import access_errors, fresh, is_link, is_remote

_NAME = 'lock'


@contextlib.contextmanager
def sole_writer(workdir: epath.Path) -> Iterator[str]:
  """Holds `workdir` for this process; yields the content of the file `lock` in it.

  Raises:
    ValueError: another process holds it, which is named; or it cannot be written to.
  """
  path = fresh(workdir / _NAME)
  since = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  me = json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'since': since})
  if is_remote(workdir):
    _announce(workdir, path, me)
    try:
      yield me
    finally:
      path.unlink()
    return
  with _open(path) as file:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      raise ValueError(f'{_in_use(workdir, path)}: end it, or choose another workdir') from None
    except OSError as error:
      logging.warning('%s cannot be locked (%s): see that no other run writes there', path, error)
    file.truncate(0)
    file.write(me)
    file.flush()
    try:
      yield me
    finally:
      file.truncate(0)


def holder(workdir: epath.Path) -> str | None:
  """Returns what the writer of `workdir` has written to its lock file; None if there is none.

  Not for that writer: POSIX locks end when their process closes the file, however it came to it.
  """
  path = fresh(workdir / _NAME)
  return path.read_text() if path.exists() and not is_link(path) else None


def _open(path: epath.Path) -> TextIO:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A link would lead to a file of somebody else's, which is then emptied.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), 'a')
  except OSError as error:
    raise ValueError(f'workdir {path.parent} cannot be written: {error}') from error


def _announce(workdir: epath.Path, path: epath.Path, me: str):
  """Writes the lock file in an object store, where nothing can be held."""
  try:
    if path.exists():
      logging.warning('%s, or it was killed; a bucket cannot tell', _in_use(workdir, path))
    path.write_text(me)
  except access_errors() as error:
    raise ValueError(
      f'{workdir} cannot be written ({error}). Is there such a bucket, and may this account write '
      'to it?'
    ) from error


def _in_use(workdir: epath.Path, path: epath.Path) -> str:
  try:
    holder = json.loads(path.read_text())
    who = f'process {holder["pid"]} on {holder["host"]} since {holder["since"]}'
  except (ValueError, TypeError, KeyError):  # it is writing this very moment
    who = 'another process'
  return f'{workdir} is in use by {who}'
