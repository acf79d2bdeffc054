"""Where files are: on a file system, or in an object store such as gs://.

An object store has no links, no locks, no appending, and no rename of a directory in one step.
"""

import os

import fsspec.config
from etils import epath

# fsspec, by which epath reaches object stores, keeps listings, and then never sees what TensorStore
# and other processes write.
for _protocol in ('gs', 's3'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in an object store."""
  return '://' in os.fspath(path)


def is_link(path: epath.PathLike) -> bool:
  """Whether a path is a symbolic link."""
  return not is_remote(path) and os.path.islink(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path from the root, links resolved; one in an object store stays as it is.

  The paths of epath themselves take gs:// for a directory that is named so.
  """
  path = epath.Path(path).expanduser()
  return path if is_remote(path) else epath.Path(os.path.realpath(path))
