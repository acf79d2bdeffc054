"""Files of directories that may come from anyone, read without leaving these, in bounded memory."""

import os
import pathlib
import re
from typing import Any

from etils import epath

from dpo_flax.files.messages import shown
from dpo_flax.files.paths import fresh, is_remote
from dpo_flax.files.strict_json import StrictJsonError, parse_object

# A published index of 90,000 tensors has 9 MB and 90,000 values.
MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_VALUES = 1_000_000  # each takes Python about 100 bytes


def find_file(directory: epath.Path, name: str) -> epath.Path | None:
  """Returns the file of this name in `directory`; None where there is none.

  Links are followed inside the directory, and as the hub's own cache has them: from
  models--owner--name/snapshots/revision to the contents in models--owner--name/blobs.

  Raises:
    ValueError: a link leads elsewhere, or it is no regular file.
  """
  path = directory / name
  if is_remote(directory):
    return path if fresh(path).exists() else None
  home, real = (pathlib.Path(os.path.realpath(os.fspath(each))) for each in (directory, path))
  if not real.is_relative_to(home) and not _is_blob(real, home):
    raise ValueError(
      f'{path} is a link to {real}, outside its directory: put the file itself there (only '
      "snapshots in the hub's own cache may link elsewhere, to its blobs)"
    )
  if not real.exists():
    return None
  if not real.is_file():
    raise ValueError(f'{path} is no regular file')
  return path


def _is_blob(real: pathlib.Path, home: pathlib.Path) -> bool:
  """Whether `real` is a content that a snapshot `home` in the hub's cache may link to."""
  repository = home.parent.parent
  return (
    home.parent.name == 'snapshots'
    and repository.name.startswith('models--')
    and real.parent == repository / 'blobs'
    and re.fullmatch(r'[0-9a-f]{40}|[0-9a-f]{64}', real.name) is not None
  )


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ValueError: it is too large, or `parse_json` refuses it.
  """
  size = path.stat().length
  if size > MAX_JSON_BYTES:
    raise ValueError(f'{path}: {size} bytes of JSON, of which at most {MAX_JSON_BYTES} are read')
  return parse_json(path.read_bytes(), path)


def parse_json(
  text: bytes, where: epath.Path, *, max_values: float = MAX_JSON_VALUES
) -> dict[str, Any]:
  """Parses a JSON object strictly.

  Args:
    text: UTF-8.
    where: its file, for the message.
    max_values: how many values it may have at most.

  Raises:
    ValueError: it is not one, a key occurs twice, or it would take much memory.
  """
  try:
    return parse_object(text, max_values=max_values)
  except StrictJsonError as error:
    raise ValueError(f'{where}: {_fault(error)}') from error


def _fault(error: StrictJsonError) -> str:
  match error.reason:
    case 'too many values':
      return f'JSON of {error.detail} values'
    case 'not a JSON object':
      return f'a JSON object is expected, not {error.detail}'
    case 'duplicate key':
      return f'not valid JSON: duplicate {shown([error.detail])}'
  return f'not valid JSON: {shown(error.detail)}'
