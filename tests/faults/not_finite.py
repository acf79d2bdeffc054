"""Makes losses and gradients of random steps NaN, infinite or spike: no such step may teach.

    python tests/faults/not_finite.py --rounds=50

A round is one run of 30 steps, each saved, of which some random ones are poisoned. A poisoned
step's checkpoint must hold the bits of the one before it and every other step's must not; each must
be named and counted. Where more follow one another than optimizer.max_skipped_steps, the run must
stop there with exit code 2. No checkpoint holds a number that is not finite.
"""

import argparse
import json
import pathlib
import random
import re
import shutil

import numpy as np

import runs

STEPS, MAX_SKIPPED, BEFORE_SPIKES, FACTOR = 30, 2, 18, 20.0
FAULTS = [('loss', 'nan'), ('loss', 'inf'), ('gradient', 'nan'), ('gradient', 'inf')]
SPIKE = ('gradient', '1e4')
OVERRIDES = (
  f'--config.train.num_train_steps={STEPS}',
  '--config.train.save_every=1',
  f'--config.train.keep={STEPS}',
  '--config.train.eval_every=0',
  '--config.hf_save_steps=0',
  f'--config.optimizer.max_skipped_steps={MAX_SKIPPED}',
  f'--config.optimizer.spike_factor={FACTOR}',
)


def poison(generator: random.Random) -> dict[int, tuple[str, str]]:
  """Returns step -> what befalls it."""
  steps = sorted(generator.sample(range(2, STEPS + 1), generator.randrange(1, 7)))
  return {
    step: generator.choice([*FAULTS, *[SPIKE] * (2 if step - len(steps) > BEFORE_SPIKES else 0)])
    for step in steps
  }


def last_step(poisoned: dict[int, tuple[str, str]]) -> int:
  """Returns the step at which the run must end."""
  row = 0
  for step in range(1, STEPS + 1):
    row = row + 1 if step in poisoned else 0
    if row > MAX_SKIPPED:
      return step
  return STEPS


def check(workdir: pathlib.Path, poisoned: dict[int, tuple[str, str]], said: str) -> list[str]:
  """Returns what is wrong with a run that these befell."""
  last, faults = last_step(poisoned), []
  stopped = last in poisoned and all(step in poisoned for step in range(last - MAX_SKIPPED, last))
  arrays = {step: runs.arrays(workdir, step) for step in runs.listed_steps(workdir)}
  expected = list(range(1, last if stopped else last + 1))
  # The step that stops the run is noticed before it is saved.
  if sorted(arrays) != expected:
    faults.append(f'steps {sorted(arrays)} are saved, not {expected}')
  for step, values in arrays.items():
    if not all(np.isfinite(value).all() for value in values.values()):
      faults.append(f'step {step} holds what is not finite')
    before = arrays.get(step - 1)
    if before is None:
      continue
    same = all(value.tobytes() == before[name].tobytes() for name, value in values.items())
    if same != (step in poisoned):
      faults.append(f'step {step} {"taught nothing" if same else "taught"}: {poisoned}')
  named = {int(step) for step in re.findall(r'step (\d+): the (?:loss|gradient)', said)}
  if named != {step for step in poisoned if step <= last}:
    faults.append(f'named are {sorted(named)} of {poisoned}')
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  counted = sum(line.get('skipped_steps', 0) for line in lines)
  if counted != len([step for step in poisoned if step <= last]) - stopped:
    faults.append(f'{counted} are counted of {poisoned}')
  return faults


def numbers(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether no poisoned step taught anything."""
  faults, skipped = [], 0
  for number in range(options.rounds):
    workdir = directory / f'run{number}'
    poisoned = poison(options.generator)
    command = runs.arguments(workdir, *OVERRIDES, program='tests/faults/poisoned.py')
    finished = runs.run(command, variables={'FACTORS': json.dumps(poisoned)})
    expected = 2 if last_step(poisoned) in poisoned and last_step(poisoned) != STEPS else {0, 2}
    found = []
    if finished.returncode not in ({expected} if expected == 2 else expected):
      found.append(f'exit code {finished.returncode}: {finished.stderr[-2000:]}')
    else:
      found += check(workdir, poisoned, finished.stdout + finished.stderr)
    for fault in found:
      print(f'round {number}: {fault}', flush=True)
    skipped += len(poisoned)
    faults += found
    shutil.rmtree(workdir)
  print(f'{options.rounds} runs, {skipped} steps poisoned, {len(faults)} faults')
  return not faults


if __name__ == '__main__':
  runs.main(numbers, rounds=50, doc=__doc__)
