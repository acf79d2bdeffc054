"""The steps of a checkpoint folder: which directories are steps, and how one comes and goes.

A step is a real directory, named by a number, that holds what its manifest lists, and in it a
record of the same number. Everything else in the folder is no step and stays as it is, but
for these, which a kill may leave behind:

    12.unfinished    being written; it takes its name once its manifest is on disk
    12.deleted       was too old

In an object store, which has no rename, a step is finished once it has a manifest.
"""

import json
import re
from typing import Any

from absl import logging
from etils import epath

from dpo_flax.checkpoints import manifest
from dpo_flax.files.atomic import sync
from dpo_flax.files.messages import first_of
from dpo_flax.files.paths import access_errors, fresh, is_link, is_remote

RECORD = 'step.json'  # describes the step
_OLD_RECORD = 'run.json'  # its name in version 0.1.0
_STEP = re.compile(r'0|[1-9][0-9]*')
_LEFTOVER = re.compile(r'(0|[1-9][0-9]*)\.(unfinished|deleted)')
_QUARANTINE = 'quarantine'
_ABOUT_QUARANTINE = 'Steps that were found damaged. Nothing reads them: delete them as you like.\n'


def finished(directory: epath.Path) -> list[int]:
  """Returns the numbers of all steps that have a manifest, intact or not, oldest first."""
  return [step for step in _named(directory) if (directory / str(step) / manifest.NAME).exists()]


def find_intact(directory: epath.Path, step: int | None) -> int:
  """Returns the number of a step that is as it was saved: `step`, or the newest without one.

  Raises:
    ValueError: there is no such step, or it is damaged.
  """
  found = finished(directory)
  if step is None and not found:
    raise ValueError(f'{directory} holds no checkpoint')
  step = found[-1] if step is None else step
  if step not in found:
    raise ValueError(f'{directory} holds no step {step}, but {", ".join(map(str, found))}')
  if damage := faults(directory / str(step)):
    raise ValueError(f'{directory}/{step} is damaged: {damage[0]}')
  return step


def newest_intact(directory: epath.Path) -> int | None:
  """Returns the newest step whose every byte is as it was written; None when there is none.

  What is newer and named like a step, but is damaged or none, is moved to `quarantine/`, with a
  warning.
  """
  for step in reversed(_named(directory)):
    found = faults(directory / str(step))
    if not found:
      return step
    moved = _set_aside(directory, step)
    logging.warning(
      'checkpoint %s/%d is damaged (%s): moved to %s', directory, step, first_of(found), moved
    )
  return None


def faults(step: epath.Path) -> list[str]:
  """Returns why a directory that is named like a step is not that step as it was written."""
  try:
    return manifest.faults(step) or _faults_of_the_record(step)
  except access_errors() as error:  # a bad sector, a file that may not be read
    return [str(error)]


def read_record(step: epath.Path) -> dict[str, Any]:
  """Returns the record of a step: its number, and the identity of its run."""
  path, old = step / RECORD, step / _OLD_RECORD
  return json.loads((path if path.exists() or not old.exists() else old).read_text())


def unfinished_path(directory: epath.Path, step: int) -> epath.Path:
  """Returns where a step is written before it is one."""
  return directory / (str(step) if is_remote(directory) else f'{step}.unfinished')


def begin(directory: epath.Path, step: int):
  """Makes the directory where a step is to be written, empty."""
  abandon(directory, step)
  unfinished_path(directory, step).mkdir(parents=True)


def abandon(directory: epath.Path, step: int):
  """Removes what was written of a step that is not finished."""
  unfinished = unfinished_path(directory, step)
  if unfinished.exists():
    unfinished.rmtree()


def commit(directory: epath.Path, step: int):
  """Makes a step of what was written at `unfinished_path`, once all of it is on disk."""
  written = unfinished_path(directory, step)
  manifest.seal(written)
  if not is_remote(directory):
    written.rename(directory / str(step))
    sync(directory)


def keep_newest(directory: epath.Path, count: int):
  """Deletes all but the newest `count` steps. A kill meanwhile leaves none that is broken."""
  for step in finished(directory)[:-count]:
    old = directory / str(step)
    if not is_remote(directory):
      old = old.rename(directory / f'{step}.deleted')
    else:
      (old / manifest.NAME).unlink()
    old.rmtree()


def clean(directory: epath.Path):
  """Removes what a killed run left half written or half deleted."""
  for path in _directories(directory):
    if _LEFTOVER.fullmatch(path.name):
      path.rmtree()


def _named(directory: epath.Path) -> list[int]:
  """The numbers of directories that are named like a step, in order."""
  return sorted(int(path.name) for path in _directories(directory) if _STEP.fullmatch(path.name))


def _directories(directory: epath.Path) -> list[epath.Path]:
  if not fresh(directory).exists():
    return []
  return [path for path in directory.iterdir() if path.is_dir() and not is_link(path)]


def _faults_of_the_record(step: epath.Path) -> list[str]:
  """Finds a step under another's name, and a directory that was never one."""
  try:
    number = read_record(step)['step']
  except (ValueError, KeyError, TypeError):
    return [f'{RECORD} is no record of a step']
  return [] if str(number) == step.name else [f'it was saved as step {number}']


def _set_aside(directory: epath.Path, step: int) -> epath.Path:
  quarantine = directory / _QUARANTINE
  quarantine.mkdir(exist_ok=True)
  # Something must be in it: an object store has no empty directories, and moves to none.
  (quarantine / 'README').write_text(_ABOUT_QUARANTINE)
  taken = {path.name for path in quarantine.iterdir()}
  names = (f'{step}.{count}' if count else str(step) for count in range(len(taken) + 1))
  return (directory / str(step)).rename(quarantine / next(n for n in names if n not in taken))
