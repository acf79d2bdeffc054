"""A run of many steps with all that happens beside them: memory and open files stay flat.

    python tests/faults/long_run.py --rounds=20000

Rounds are steps. It evaluates every 50 steps, saves every 25 and exports every 100. Memory, open
files and the processor time that a step takes are read ten times a second (wall time tells more of
the machine's other work). Prints them for the second and the last tenth of the steps: the first
holds the compiler.
"""

import argparse
import json
import os
import pathlib
import time

import numpy as np

import runs

MAX_SLOWDOWN, MAX_GROWTH = 1.05, 1.05


def sample(pid: int) -> tuple[float, float, int]:
  """Returns a process's (seconds of processor time, MB in memory, open files)."""
  process = pathlib.Path(f'/proc/{pid}')
  fields = (process / 'stat').read_text().rpartition(')')[2].split()
  seconds = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  resident = int((process / 'statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  return seconds, resident / 1e6, len(list((process / 'fd').iterdir()))


def last_step(path: pathlib.Path) -> int:
  """Returns the newest step reported."""
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - 4000))
    lines = file.read().splitlines()[1:]
  return max((json.loads(line)['step'] for line in lines if line.endswith(b'}')), default=0)


def long_run(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether nothing grew."""
  every = {'eval_every': 50, 'save_every': 25, 'log_every': 10, 'num_train_steps': options.rounds}
  flags = [f'--config.train.{name}={value}' for name, value in every.items()]
  workdir = directory / 'run'
  command = runs.arguments(workdir, *flags, '--config.hf_save_steps=100')
  with (directory / 'screen').open('w') as screen:
    process = runs.start(command, output=screen)
    samples = []
    while process.poll() is None:
      time.sleep(0.1)
      if (workdir / 'metrics.jsonl').exists() and process.poll() is None:
        samples.append((last_step(workdir / 'metrics.jsonl'), *sample(process.pid)))
  assert process.returncode == 0, (directory / 'screen').read_text()[-2000:]
  table = np.array(samples)
  tenth = options.rounds // 10
  early = table[(table[:, 0] > tenth) & (table[:, 0] <= 2 * tenth)]
  late = table[(table[:, 0] > options.rounds - tenth) & (table[:, 0] < options.rounds)]
  pace = [(part[-1, 1] - part[0, 1]) / (part[-1, 0] - part[0, 0]) for part in (early, late)]
  memory, files = ([np.median(part[:, column]) for part in (early, late)] for column in (2, 3))
  print(f'ms of processor time per step: {1e3 * pace[0]:.2f} then {1e3 * pace[1]:.2f}')
  print(f'MB in memory: {memory[0]:.0f} then {memory[1]:.0f}')
  print(f'open files: {files[0]:.0f} then {files[1]:.0f}')
  slower, larger = pace[1] / pace[0], memory[1] / memory[0]
  return slower <= MAX_SLOWDOWN and larger <= MAX_GROWTH and files[1] <= files[0] + 2


if __name__ == '__main__':
  runs.main(long_run, rounds=20_000, doc=__doc__)
