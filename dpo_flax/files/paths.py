"""Where files are: on a file system, or in an object store such as gs://.

An object store has no links, no locks, no appending, and no rename of a directory in one step.
"""

import os
import sys

import fsspec.config
from etils import epath

# fsspec, by which epath reaches object stores, keeps listings, and then never sees what TensorStore
# and other processes write.
for _protocol in ('gs', 's3'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False


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
