"""Looks at what a run opens and writes: no listener, no secret, no wider permission.

    python tests/faults/bounds.py --rounds=3

The environment holds secrets of the usual names. While the run goes its listening sockets, and
those of the processes that tokenize and fill rows, are read every few milliseconds; afterwards all
that it wrote and said is searched for the secrets, and the permissions of every file are held
against the umask. Two processes may listen, on loopback.
"""

import argparse
import contextlib
import os
import pathlib
import secrets
import stat
import time
from collections.abc import Iterator

import kill
import runs

NAMES = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY')
LOOPBACK = {'0100007F', '00000000000000000000000001000000', '0000000000000000FFFF00000100007F'}
UMASK = 0o077
WORKERS = ('--config.data.cache_workers=2', '--config.data.workers=2')


def family(pid: int) -> Iterator[int]:
  """Yields a process and all that come from it."""
  yield pid
  with contextlib.suppress(OSError):
    for children in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
      for child in children.read_text().split():
        yield from family(int(child))


def listeners(pid: int) -> set[str]:
  """Returns the addresses, in the kernel's hexadecimal, on which a process listens."""
  inodes = set()
  with contextlib.suppress(OSError):
    for file in pathlib.Path(f'/proc/{pid}/fd').iterdir():
      with contextlib.suppress(OSError):
        inodes.add(os.readlink(file))
  found = set()
  for table in ('tcp', 'tcp6'):
    for line in pathlib.Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
      fields = line.split()
      if fields[3] == '0A' and f'socket:[{fields[9]}]' in inodes:
        found.add(fields[1].partition(':')[0])
  return found


def bounds(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether nothing of a run leaves its bounds."""
  before = os.umask(UMASK)
  values = {name: f'hf_{secrets.token_hex(16)}' for name in NAMES}
  os.environ.update(values)
  faults, files = [], 0
  for number in range(options.rounds):
    workdir = directory / f'run{number}'
    count = 1 + number % 2
    processes = kill.start(workdir, count, flags=WORKERS)
    seen, members = set(), set()
    while any(process.poll() is None for process in processes):
      present = {member for process in processes for member in family(process.pid)}
      seen |= set().union(*map(listeners, present))
      members |= present
      time.sleep(0.01)
    said = [''.join(process.communicate()) for process in processes]
    faults += [f'ended with {p.returncode}: {said}' for p in processes if p.returncode]
    if len(members) < count + 4:
      faults.append(f'the processes that tokenize and fill rows were not seen: {members}')
    if seen - (LOOPBACK if count > 1 else set()):
      faults.append(f'{count} processes listened on {seen}')
    for path in workdir.rglob('*'):
      files += 1
      if stat.S_IMODE(path.stat().st_mode) & UMASK:
        faults.append(f'{path} may be read by others: {path.stat().st_mode:o}')
      if path.is_file() and any(value.encode() in path.read_bytes() for value in values.values()):
        faults.append(f'{path} holds a secret')
    if any(value in text for value in values.values() for text in said):
      faults.append('a secret was printed')
  os.umask(before)
  print(f'{options.rounds} runs, {files} files and directories', *faults, sep='\n')
  return not faults


if __name__ == '__main__':
  runs.main(bounds, rounds=3, doc=__doc__)
