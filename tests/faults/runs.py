"""The small run that every fault befalls: the real command, a few seconds long, always the same.

The tiny example's model, 24 of its pairs in rows of 128 tokens, 8 steps; validation, a checkpoint
and an export every few steps.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
_XLA_FLAGS = '--xla_backend_optimization_level=0'  # most runs are too short to gain by more
SMALL = {
  'train.num_epochs': 0,
  'train.num_train_steps': STEPS,
  'train.eval_every': 4,
  'train.save_every': 2,
  'train.log_every': 1,
  'train.keep': 2,
  'hf_save_steps': 3,
  'lora.r': 2,
  'lora.target_modules': '["q_proj","down_proj"]',
  'batch.rows': 4,
  'batch.tokens': 128,
}
# What the tiny config and SMALL say of adapters, undone.
WITHOUT_ADAPTERS = (
  '--config.lora.r=64',
  '--config.lora.alpha=64',
  '--config.lora.target_modules=None',
)


def arguments(workdir: pathlib.Path, *overrides: str, program: str = '-m dpo_flax.train'):
  """Returns the command line of the run in a workdir."""
  fields = {'workdir': workdir, 'data.train': pairs(workdir.parent), **SMALL}
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  return [sys.executable, *program.split(), '--config=configs/tiny.py', *flags, *overrides]


def pairs(directory: pathlib.Path) -> pathlib.Path:
  """Returns the file of the run's records, after writing it if it is not there."""
  path = directory / 'pairs.jsonl'
  if not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    text = (ROOT / 'dpo_flax/examples/tiny/pairs.jsonl').read_text()
    path.write_text(''.join(text.splitlines(keepends=True)[:24]))
  return path


def environment(devices: int = 1) -> Mapping[str, str]:
  """Returns the environment of the run: so many CPU devices, and compiled programs kept."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': f'{_XLA_FLAGS} --xla_force_host_platform_device_count={devices}',
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(
  command: list[str],
  *,
  devices: int = 1,
  variables: Mapping[str, str] | None = None,
  output: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
  """Starts a command from the project's root, with more variables in its environment."""
  errors = subprocess.PIPE if output == subprocess.PIPE else subprocess.STDOUT
  pipes = {'stdout': output, 'stderr': errors, 'text': True}
  variables = {**environment(devices), **(variables or {})}
  return subprocess.Popen(command, env=variables, cwd=ROOT, **pipes)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
  """Runs a command to its end, as `start` does."""
  process = start(command, **options)
  output, errors = process.communicate(timeout=600)
  return subprocess.CompletedProcess(command, process.returncode, output, errors)


def must(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
  """Runs a command that is to succeed."""
  finished = run(command, **options)
  assert finished.returncode == 0, (finished.returncode, finished.stderr[-2000:])
  return finished


def listed_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps in a workdir by their names alone, oldest first."""
  folder = workdir / 'checkpoints'
  if not folder.exists():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def digest(workdir: pathlib.Path, step: int) -> str:
  """Returns the SHA-256 of all that a step holds, as Orbax alone reads it.

  That is the adapters, the optimizer's moments and counts, the random keys' counter, and the place
  in the data, which is the step.
  """
  content = hashlib.sha256(str(step).encode())
  for name, array in sorted(arrays(workdir, step).items()):
    content.update(f'{name} {array.dtype} {array.shape}'.encode())
    content.update(array.tobytes())
  return content.hexdigest()


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Returns path -> array of a step."""
  place = workdir / 'checkpoints' / str(step) / 'state'
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.metadata(place).item_metadata
    targets = {name: np.zeros(array.shape, array.dtype) for name, array in saved.items()}
    return checkpointer.restore(place, targets)  # whatever devices they were saved on


def metrics(workdir: pathlib.Path) -> dict[tuple[int, str], dict[str, float]]:
  """Returns (step, split) -> what was reported there, but for rates; each must be there once."""
  found = {}
  for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()):
    if 'dpo_loss' not in line:
      continue
    place = line['step'], line['split']
    assert place not in found, f'{place} was reported twice'
    found[place] = {name: v for name, v in line.items() if not name.endswith('_per_second')}
  return found


def main(
  fault: Callable[[argparse.Namespace, pathlib.Path], bool],
  *,
  rounds: int,
  doc: str,
  options: Mapping[str, Mapping[str, Any]] | None = None,
):
  """Runs `fault(options, directory)` as a command; it returns whether all was well."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=rounds)
  parser.add_argument('--seed', type=int, default=0)
  for name, settings in (options or {}).items():
    parser.add_argument(f'--{name}', **settings)
  given = parser.parse_args()
  given.generator = random.Random(given.seed)
  since = time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    well = fault(given, pathlib.Path(directory))
  print(f'{"kept" if well else "BROKEN"}, in {time.monotonic() - since:.0f} s', flush=True)
  sys.exit(0 if well else 1)
