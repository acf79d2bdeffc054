"""Directories that exports write: complete or not at all, and never over something else."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from dpo_flax.files.atomic import sync
from dpo_flax.files.paths import absolute, access_errors, fresh, is_remote
from dpo_flax.huggingface.tensor_files import WRITER, read_header

# What an export may hold besides its tensors.
_SIDECARS = re.compile(
  r'README\.md|[\w.-]+\.json|tokenizer\.model|chat_template\.jinja|merges\.txt'
)
_PROBE = 'probe'


def staging_path(output: epath.PathLike) -> epath.Path:
  """Returns the sibling of `output` that `new_directory` yields."""
  return _siblings(output)[0]


@contextlib.contextmanager
def new_directory(output: epath.PathLike) -> Iterator[epath.Path]:
  """Yields an empty sibling that replaces `output` when the block ends without error.

  A reader sees the old directory or the complete new one, except in buckets: they have no atomic
  rename, and the files appear one by one. Of a link, what it leads to is replaced.

  Raises:
    ValueError: `output` cannot be replaced.
  """
  check_replaceable(output)
  output, (staging, retired) = absolute(output), _siblings(output)
  _check_leftovers(output)
  if _is_half_replaced(output):
    output.rmtree()  # first: what lies beside it shows that an export wrote it
  for leftover in (staging, retired):
    if leftover.exists():
      leftover.rmtree()
  staging.mkdir(parents=True)
  try:
    yield staging
    for path in (*staging.iterdir(), staging):
      sync(path)  # so that the rename is never on disk before the files
  except BaseException:
    staging.rmtree()
    raise
  if output.exists():
    output.rename(retired)
  staging.rename(output)
  sync(output.parent)
  if retired.exists():
    retired.rmtree()


def check_replaceable(output: epath.PathLike):
  """Checks that nothing is lost when `output` is replaced.

  Raises:
    ValueError: it exists, and is neither empty nor an earlier export with nothing added to it.
  """
  output = fresh(absolute(output))
  if not output.exists():
    return
  if not output.is_dir():
    raise ValueError(f'{output} exists and is no directory: choose another place')
  files = list(output.iterdir())
  tensors = [file for file in files if file.suffix == '.safetensors']
  for file in sorted(set(files) - set(tensors)):
    if file.is_dir() or not _SIDECARS.fullmatch(file.name):
      raise ValueError(f'{output} holds {file.name}, which no export writes: choose another place')
  if _is_half_replaced(output):
    return
  if not all(map(_is_export, tensors)) or (files and not tensors):
    raise ValueError(f'{output} exists and was not written by an earlier export: choose another')


def check_writable(output: epath.PathLike):
  """Checks that what will replace `output` can be written beside it.

  Raises:
    ValueError: it cannot, and why.
  """
  staging = staging_path(output)
  try:
    was_there = fresh(staging).exists()  # left by a kill: it shows what `output` is
    staging.mkdir(parents=True, exist_ok=True)
    (staging / _PROBE).write_text('')
    (staging / _PROBE).unlink()
    if not was_there and staging.exists():
      staging.rmtree()
  except access_errors() as error:
    raise ValueError(f'{output} cannot be written: {error}') from error
  if not is_remote(output) and os.path.ismount(output):
    raise ValueError(f'{output} is a mount point, and cannot be replaced: take a directory in it')
  _check_leftovers(output)


def same_path(left: epath.PathLike, right: epath.PathLike) -> bool:
  """Whether two paths lead to one directory."""
  return str(absolute(left)) == str(absolute(right))


def is_inside(path: epath.PathLike, other: epath.PathLike) -> bool:
  """Whether a path is another or lies below it."""
  return f'{absolute(path)}/'.startswith(f'{absolute(other)}/')


def _siblings(output: epath.PathLike) -> tuple[epath.Path, epath.Path]:
  """Where the new content of `output` is made, and where the old one goes."""
  output = absolute(output)
  return output.parent / f'.{output.name}.new', output.parent / f'.{output.name}.old'


def _check_leftovers(output: epath.PathLike):
  """Checks that what lies where `output` is made is of an export, as it is deleted."""
  for sibling in _siblings(output):
    files = [file.name for file in sibling.iterdir()] if sibling.exists() else []
    for name in files:
      if not _SIDECARS.fullmatch(name) and not name.endswith('.safetensors') and name != _PROBE:
        raise ValueError(f'{sibling} holds {name}, which no export writes: move it elsewhere')


def _is_half_replaced(output: epath.Path) -> bool:
  """Whether a kill left files of an export without its tensors, as only a bucket moves them."""
  if not is_remote(output) or not output.exists():
    return False
  files = list(output.iterdir())
  known = all(_SIDECARS.fullmatch(file.name) and not file.is_dir() for file in files)
  return bool(files) and known and any(path.exists() for path in _siblings(output))


def _is_export(file: epath.Path) -> bool:
  try:
    return read_header(file)[0].get('written_by') == WRITER
  except ValueError:
    return False
