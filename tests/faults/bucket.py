"""Kills runs whose data and workdir are in an object store, and damages what is there.

    python tests/faults/bucket.py --rounds=50

A round kills the run at a random moment, or damages, cuts or deletes an object of its newest step.
After three of them in one workdir the command runs to its end, and its final state and metrics must
be those of a run on a local disk that nothing befell. Buckets that are denied or not there must
end the command with one message.
"""

import argparse
import collections
import pathlib
import random
import time

from etils import epath

import runs
from bucket_server import BUCKET, DENIED, UNKNOWN, BucketServer
from dpo_flax.checkpoints import manifest

FAULTS_PER_RUN = 3
# What is seen among the objects of a workdir at the moments worth disturbing.
MOMENTS = [
  '',
  'token_cache/',
  'checkpoints/2/',
  'checkpoints/4/',
  'SHA256SUMS',
  '.peft',
  'peft/',
]


class Trial:
  """What befalls the runs of one workdir."""

  def __init__(self, server: BucketServer, directory: pathlib.Path, name: str):
    self.server, self.directory, self.prefix = server, directory, f'{name}/'
    data = f'--config.data.train=gs://{BUCKET}/pairs.jsonl'
    place = f'--config.workdir=gs://{BUCKET}/{name}'
    self.command = [*runs.arguments(directory / name), data, place]

  def disturb(self, generator: random.Random, seconds: float) -> str:
    """Does something to the run or to what it has saved; says what."""
    steps = {int(name.split('/')[2]) for name in self._names('SHA256SUMS')}
    tensors = f'{self.prefix}peft/adapter_model.safetensors'
    if tensors in self.server.objects and generator.random() < 0.5:
      return self.interrupt_an_export(tensors)
    if steps and generator.random() < 0.5:
      return self.damage(max(steps), generator)
    return self.kill(generator, seconds)

  def kill(self, generator: random.Random, seconds: float) -> str:
    """Kills the run at a moment; says which."""
    moment = generator.choice(MOMENTS)
    before = self._names(moment)
    process = runs.start(self.command, variables=self.server.environment())
    until = time.monotonic() + (60 if moment else generator.uniform(0, seconds))
    while time.monotonic() < until and process.poll() is None:
      if moment and self._names(moment) - before:
        time.sleep(generator.expovariate(1 / 0.02))
        break
      time.sleep(0.001)
    process.kill()
    process.communicate()
    return f'killed: {moment or "any time"}'

  def damage(self, step: int, generator: random.Random) -> str:
    """Damages an object of a step; says how."""
    names = sorted(self._names(f'checkpoints/{step}/'))
    name = generator.choice([name for name in names if self.server.objects[name]])
    content = bytearray(self.server.objects[name])
    how = generator.choice(['flipped', 'cut', 'deleted'])
    if how == 'deleted':
      self.server.remove(name)
      return how
    if how == 'flipped':
      content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    self.server.put(name, bytes(content[: len(content) - (how == 'cut')]))
    return how

  def interrupt_an_export(self, tensors: str) -> str:
    """Leaves what a kill between two moves of an export leaves."""
    self.server.put(tensors.replace('/peft/', '/.peft.old/'), self.server.objects[tensors])
    self.server.remove(tensors)
    return 'an export between its old and its new content'

  def finish(self) -> pathlib.Path:
    """Runs to the end; returns a copy of the workdir on the local disk."""
    runs.must(self.command, variables=self.server.environment())
    for name in self._names(self.prefix):
      path = self.directory / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.server.objects[name])
    return self.directory / self.prefix

  def _names(self, part: str) -> set[str]:
    with self.server.lock:
      return {name for name in self.server.objects if name.startswith(self.prefix) and part in name}


def befall(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether every run ended as if nothing had befallen it."""
  since = time.monotonic()
  local = directory / 'local'
  runs.must(runs.arguments(local))
  seconds = time.monotonic() - since
  expected = runs.digest(local, runs.STEPS), runs.metrics(local)
  seen, well, done, trials = collections.Counter(), True, 0, 0
  with BucketServer() as server:
    server.put('pairs.jsonl', runs.pairs(directory).read_bytes())
    well &= all([_is_refused(server, directory, *place) for place in _NO_PLACES])
    while done < options.rounds:
      trial = Trial(server, directory, f'trial{trials}')
      for _ in range(min(FAULTS_PER_RUN, options.rounds - done)):
        seen[trial.disturb(options.generator, seconds)] += 1
        done += 1
      copy = trial.finish()
      trials += 1
      steps = [epath.Path(step) for step in (copy / 'checkpoints').glob('?')]
      found = runs.digest(copy, runs.STEPS), runs.metrics(copy)
      if any(map(manifest.faults, steps)) or found != expected:
        well = False
        print(f'trial {trials}: the end differs')
      print(f'{done} faults, {trials} runs to the end', flush=True)
  for fault, count in sorted(seen.items()):
    print(f'{count:4} x {fault}')
  return well


_NO_PLACES = [
  (field, f'gs://{bucket}/{name}')
  for bucket in (DENIED, UNKNOWN, 'nowhere')
  for field, name in {'data.train': 'pairs.jsonl', 'workdir': 'run', 'peft_save_path': 'x'}.items()
]


def _is_refused(server: BucketServer, directory: pathlib.Path, field: str, place: str) -> bool:
  """Whether a run in a bucket that it may not use ends with one message that names the place."""
  trial = Trial(server, directory, 'refused')
  command = [*trial.command, f'--config.{field}={place}']
  finished = runs.run(command, variables=server.environment())
  name = place.split('/')[2]
  well = finished.returncode == 2 and name in finished.stderr and 'Trace' not in finished.stderr
  print(f'{place}: {finished.stderr.strip() if well else f"BROKEN: {finished}"}')
  return well


if __name__ == '__main__':
  runs.main(befall, rounds=50, doc=__doc__)
