"""Damages checkpoints in every way a disk or a person might: none may be loaded silently.

    python tests/faults/damage.py --rounds=500

A run is made once. Each round copies its checkpoints, damages the newest step or puts something
foreign beside it, and asks which step is the newest whole one. Every 100th round goes on with the
whole command, and its final state must be that of the run. Prints what was noticed, by kind.
"""

import argparse
import collections
import pathlib
import random
import shutil

from absl import logging
from etils import epath

import runs
from dpo_flax.checkpoints import steps

_PAGE = 4096


def flip_a_bit(step: pathlib.Path, generator: random.Random):
  path = _choose(step, generator)
  content = bytearray(path.read_bytes())
  content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
  path.write_bytes(content)


def truncate(step: pathlib.Path, generator: random.Random):
  path = _choose(step, generator)
  content = path.read_bytes()
  path.write_bytes(content[: generator.randrange(len(content))])


def zero_a_page(step: pathlib.Path, generator: random.Random):
  path = _choose(step, generator)
  content = path.read_bytes()
  at = generator.randrange(len(content)) // _PAGE * _PAGE
  page = content[at : at + _PAGE]
  if not any(page):
    return zero_a_page(step, generator)
  path.write_bytes(content[:at] + bytes(len(page)) + content[at + len(page) :])


def delete_a_file(step: pathlib.Path, generator: random.Random):
  _choose(step, generator).unlink()


def empty_a_json(step: pathlib.Path, generator: random.Random):
  paths = [path for path in _files(step) if path.read_bytes()[:1] == b'{']
  generator.choice(paths).write_text(generator.choice(['', '{}', 'null']))


def swap_two_files(step: pathlib.Path, generator: random.Random):
  one, other = generator.sample(_files(step), 2)
  contents = one.read_bytes(), other.read_bytes()
  if contents[0] == contents[1]:
    return swap_two_files(step, generator)
  other.write_bytes(contents[0])
  one.write_bytes(contents[1])


def take_from_another_step(step: pathlib.Path, generator: random.Random):
  paths = [path for path in _files(step) if (_older(step) / path.relative_to(step)).exists()]
  path = generator.choice([path for path in paths if path.read_bytes() != _twin(step, path)])
  path.write_bytes(_twin(step, path))


def link_a_file(step: pathlib.Path, generator: random.Random):
  path = _choose(step, generator)
  target = step.parent.parent / 'elsewhere'
  path.rename(target)
  path.symlink_to(target)


def add_a_file(step: pathlib.Path, generator: random.Random):
  (_choose(step, generator).parent / 'more').write_bytes(generator.randbytes(8))


DAMAGES = [
  flip_a_bit,
  truncate,
  zero_a_page,
  delete_a_file,
  empty_a_json,
  swap_two_files,
  take_from_another_step,
  link_a_file,
  add_a_file,
]


def foreign_directory(folder: pathlib.Path):
  (folder / '99').mkdir()
  (folder / '99' / 'notes.txt').write_text('mine')


def foreign_directory_with_an_empty_manifest(folder: pathlib.Path):
  foreign_directory(folder)
  (folder / '99' / 'SHA256SUMS').touch()
  (folder / '99' / 'notes.txt').unlink()


def step_under_another_number(folder: pathlib.Path):
  shutil.copytree(folder / str(runs.STEPS), folder / '99')


def foreign_file(folder: pathlib.Path):
  (folder / '99').write_text('mine')


def link_to_a_step(folder: pathlib.Path):
  (folder / '99').symlink_to(folder / str(runs.STEPS), target_is_directory=True)


def other_names(folder: pathlib.Path):
  for name in ('099', '99 ', '+99', '9_9', '99.bak', '٩', '-1', 'best'):
    shutil.copytree(folder / str(runs.STEPS), folder / name)


FOREIGN = [
  foreign_directory,
  foreign_directory_with_an_empty_manifest,
  step_under_another_number,
  foreign_file,
  link_to_a_step,
  other_names,
]


def damages(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether every damage was noticed, and nothing foreign taken for a step."""
  logging.set_verbosity(logging.ERROR)
  generator = options.generator
  original = directory / 'original'
  runs.must(runs.arguments(original))
  older, newest = runs.listed_steps(original)
  expected = runs.digest(original, newest), runs.digest(original, older)
  seen = collections.Counter()
  for number in range(options.rounds):
    workdir = directory / 'copy'
    shutil.copytree(original, workdir)
    folder = workdir / 'checkpoints'
    kind = generator.choice(DAMAGES * 4 + FOREIGN)
    foreign = kind in FOREIGN
    kind(folder) if foreign else kind(folder / str(newest), generator)
    if number % 100 == 0:
      finished = runs.run(runs.arguments(workdir))
      noticed = finished.returncode == 0 and (foreign or 'is damaged' in finished.stderr)
    else:
      found = steps.newest_intact(epath.Path(folder))
      noticed = found == (newest if foreign else older)
    aside = folder / 'quarantine' / str(newest)
    noticed &= foreign or aside.exists()
    found = newest if foreign or number % 100 == 0 else older
    noticed &= runs.digest(workdir, found) == expected[found == older]
    seen[kind.__name__, noticed] += 1
    if not noticed:
      print(f'round {number}: {kind.__name__} was not noticed')
    shutil.rmtree(workdir)
    (directory / 'elsewhere').unlink(missing_ok=True)
  for (name, noticed), count in sorted(seen.items()):
    print(f'{name:24} {"kept" if noticed else "BROKEN":8} {count}')
  return all(noticed for _, noticed in seen)


def _files(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in step.rglob('*') if path.is_file() and path.stat().st_size)


def _choose(step: pathlib.Path, generator: random.Random) -> pathlib.Path:
  return generator.choice(_files(step))


def _older(step: pathlib.Path) -> pathlib.Path:
  return step.with_name(str(runs.listed_steps(step.parents[1])[0]))


def _twin(step: pathlib.Path, path: pathlib.Path) -> bytes:
  return (_older(step) / path.relative_to(step)).read_bytes()


if __name__ == '__main__':
  runs.main(damages, rounds=500, doc=__doc__)
