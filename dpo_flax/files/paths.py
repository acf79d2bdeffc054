"""Where files are: on a file system, or in an object store such as gs://.

An object store has no links, no locks, no appending, and no rename of a directory in one step.
"""

import os
import sys

from etils import epath
from etils.epath import backend

_CLIENTS = {'gs': 'gcsfs', 's3': 's3fs'}  # scheme -> the module by which fsspec reaches it
_STORE_ERRORS = (
  ('gcsfs.retry', 'HttpError'),
  ('gcsfs.retry', 'ChecksumError'),
  ('google.auth.exceptions', 'GoogleAuthError'),
  ('aiohttp', 'ClientError'),
)


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in an object store."""
  return '://' in os.fspath(path)


def is_link(path: epath.PathLike) -> bool:
  """Whether a path is a symbolic link."""
  return not is_remote(path) and os.path.islink(path)


def keep_no_listings():
  """Lets all of this process see what other processes write to object stores.

  fsspec, by which epath reaches them, keeps listings, and then never sees what TensorStore and
  other processes write. This changes fsspec for everyone: it is for commands, which own their
  process. `fresh` does it for what this library reads.
  """
  import fsspec.config

  for scheme in _CLIENTS:
    fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False


def fresh(path: epath.Path) -> epath.Path:
  """Returns the path; what is read by it from then on is what the object store holds now.

  epath's own client of the store, which its paths share, forgets what it has listed and keeps no
  listings any more. Neither fsspec's settings nor its other clients change.
  """
  client = _CLIENTS.get(os.fspath(path).partition('://')[0])
  if client in sys.modules:  # else nothing has been listed yet
    store = backend.fsspec_backend.fs(path)
    if store.dircache.use_listings_cache:
      store.dircache.use_listings_cache = False
      store.invalidate_cache()
  return path


def access_errors() -> tuple[type[Exception], ...]:
  """Returns what reading or writing a path may raise; for `except`, which asks when there is one.

  The clients of object stores raise more than OSError, where they are in use.
  """
  found = [getattr(sys.modules.get(module), name, None) for module, name in _STORE_ERRORS]
  return (OSError, *filter(None, found))


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path from the root, links resolved; one in an object store stays as it is.

  The paths of epath themselves take gs:// for a directory that is named so.
  """
  path = epath.Path(path).expanduser()
  return path if is_remote(path) else epath.Path(os.path.realpath(path))
