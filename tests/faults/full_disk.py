"""Fills the disk under a run: the step that cannot be saved says so, and nothing else is lost.

    python tests/faults/full_disk.py --rounds=50
    python tests/faults/full_disk.py --rounds=50 --tmpfs

A round fills the disk at a random moment of a run. With train.on_save_error=continue there is room
again after a while, and the run must end with all its steps; with stop it must end with exit code 2
and one paragraph, and the next run go on once there is room. At no moment may a listed step be
broken, and the final state is always that of a run that nothing befell.

Files of the run may not grow beyond a few bytes (RLIMIT_FSIZE, which needs no rights); with --tmpfs
the workdir is a small file system that a ballast file fills, which needs those of root.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator

from etils import epath

import runs
from dpo_flax.checkpoints import manifest

MISTAKE = 2
TMPFS_BYTES = 12 << 20
# A run that is measured would write its coverage, too, where there is no room.
UNMEASURED = {'COVERAGE_PROCESS_CONFIG': ''}


@contextlib.contextmanager
def place(directory: pathlib.Path, *, tmpfs: bool) -> Iterator[pathlib.Path]:
  """Yields a workdir, on a file system of its own if `tmpfs`."""
  directory.mkdir()
  if tmpfs:
    size = f'size={TMPFS_BYTES}'
    subprocess.run(['mount', '-t', 'tmpfs', '-o', size, 'tmpfs', directory], check=True)
  yield directory / 'run'
  if tmpfs:
    subprocess.run(['umount', directory], check=True)
  shutil.rmtree(directory)


def fill(process: subprocess.Popen, workdir: pathlib.Path, generator: random.Random, tmpfs: bool):
  """Leaves the run little or no room."""
  if not tmpfs:
    limit = generator.choice([0, 100, 1000, 5000])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return
  free = shutil.disk_usage(workdir.parent).free - generator.choice([0, 5000, 40_000])
  with contextlib.suppress(OSError), (workdir.parent / 'ballast').open('wb') as file:
    file.write(bytes(max(free, 0)))


def make_room(process: subprocess.Popen, workdir: pathlib.Path, tmpfs: bool):
  """Undoes `fill`."""
  if tmpfs:
    (workdir.parent / 'ballast').unlink(missing_ok=True)
  elif process.poll() is None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)


def wait_for_step(process: subprocess.Popen, generator: random.Random) -> str:
  """Reads the screen until a random step is reported, and a little longer; returns what it read."""
  wanted, seen = generator.randrange(1, runs.STEPS), ''
  for line in process.stdout:
    seen += line
    if line.startswith(f'step {wanted}/'):
      break
  time.sleep(generator.expovariate(1 / 0.05))
  return seen


def disturb(workdir: pathlib.Path, generator: random.Random, mode: str, tmpfs: bool) -> list[str]:
  """Runs once with a full disk; returns what was wrong."""
  override = f'--config.train.on_save_error={mode}'
  command = runs.arguments(workdir, override, '--config.train.save_every=1')
  process = runs.start(command, variables=UNMEASURED)
  wait_for_step(process, generator)
  fill(process, workdir, generator, tmpfs)
  if mode == 'continue':
    time.sleep(generator.uniform(0.2, 2))
    make_room(process, workdir, tmpfs)
  _, errors = process.communicate(timeout=300)
  make_room(process, workdir, tmpfs)
  faults = [
    f'step {step} is listed and broken: {found}'
    for step in runs.listed_steps(workdir)
    if (found := manifest.faults(epath.Path(workdir / 'checkpoints' / str(step))))
  ]
  if 'Traceback' in errors:
    faults.append(f'a traceback: {errors[-3000:]}')
  told = 'could not be saved' in errors
  if process.returncode not in {0, MISTAKE}:
    faults.append(f'exit code {process.returncode}: {errors[-2000:]}')
  # A run that was to go on may end only for what it writes last.
  if process.returncode == MISTAKE and not (told or 'OSError' in errors):
    faults.append(f'ended for another reason: {errors[-2000:]}')
  return faults


def full_disks(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether every full disk was told of and survived."""
  whole = directory / 'whole'
  runs.must(runs.arguments(whole, '--config.train.save_every=1'))
  expected = runs.digest(whole, runs.STEPS)
  seen, faults = collections.Counter(), []
  for number in range(options.rounds):
    mode = options.generator.choice(['stop', 'continue'])
    with place(directory / f'disk{number}', tmpfs=options.tmpfs) as workdir:
      runs.pairs(workdir.parent)
      found = disturb(workdir, options.generator, mode, options.tmpfs)
      finished = runs.run(runs.arguments(workdir, '--config.train.save_every=1'))
      if finished.returncode:
        found.append(f'did not go on: {finished.stderr[-2000:]}')
      elif runs.digest(workdir, runs.STEPS) != expected:
        found.append('the end differs')
    seen[mode, bool(found)] += 1
    faults += found
    for fault in found:
      print(f'round {number}, {mode}: {fault}', flush=True)
  for (mode, bad), count in sorted(seen.items()):
    print(f'on_save_error={mode:8} {"BROKEN" if bad else "kept"} {count}')
  return not faults


if __name__ == '__main__':
  runs.main(full_disks, rounds=50, doc=__doc__, options={'tmpfs': {'action': 'store_true'}})
