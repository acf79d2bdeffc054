"""Trains configs/tiny.py's task through the real command, once per loss.

    python tests/benchmarks/losses.py [--only sigmoid simpo ...]

Every run has the same data, seed, steps, learning rate and beta. Prints a markdown table of the
metrics on the held-out pairs, before the first step and after the last: dpo_accuracy, dpo_loss,
and how many nats the log-probs of chosen and rejected responses have moved. A loss whose accuracy
ends below 0.8 makes the exit status 1.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from dpo_flax.losses import LOSSES

ROOT = pathlib.Path(__file__).parent.parent.parent
ENOUGH = 0.8  # chance is 0.5

# What a loss cannot do without, or without which it is another loss.
NEEDS = {
  'exo_pair': {'label_smoothing': 0.001},
  'robust': {'label_smoothing': 0.1},
}
RUNS = {
  **{name: {'loss': name} | NEEDS.get(name, {}) for name in LOSSES},
  'sigmoid, forward_kl': {'divergence': 'forward_kl'},
  'sigmoid, js': {'divergence': 'js'},
  'sigmoid, alpha = 0.5': {'divergence': 'alpha', 'alpha_divergence': 0.5},
  'sigmoid, 0.1 KL penalty': {'kl_penalty_weight': 0.1},
}


def train(objective: dict[str, object], workdir: str) -> list[dict[str, float]]:
  """Runs the command; returns the validation metrics before the first and after the last step."""
  options = {'workdir': workdir, 'train.eval_every': 0, 'train.save_every': 0}
  options |= {f'objective.{name}': value for name, value in objective.items()}
  command = [sys.executable, '-m', 'dpo_flax.train', '--config=configs/tiny.py']
  command += [f'--config.{name}={value}' for name, value in options.items()]
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [line for line in map(json.loads, lines) if line['split'] == 'validation']


def main():
  """Trains with each loss and prints a row for it as soon as it is known."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--only', nargs='*', choices=RUNS, default=RUNS, metavar='run')
  weak = []
  print('| objective | dpo_accuracy | dpo_loss | chosen_logps | rejected_logps | seconds |')
  print('|---|---|---|---|---|---|')
  for name in parser.parse_args().only:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
      first, *_, last = train(RUNS[name], workdir)
    cells = [
      f'{first["dpo_accuracy"]:.2f} -> {last["dpo_accuracy"]:.3f}',
      f'{first["dpo_loss"]:.4f} -> {last["dpo_loss"]:.4f}',
      *(f'{last[f"{side}_logps_change"]:+.1f}' for side in ('chosen', 'rejected')),
      f'{time.perf_counter() - began:.0f}',
    ]
    print(f'| {name} | {" | ".join(cells)} |', flush=True)
    weak += [name] if last['dpo_accuracy'] < ENOUGH else []
  if weak:
    sys.exit(f'no better than {ENOUGH}: {", ".join(weak)}')


if __name__ == '__main__':
  main()
