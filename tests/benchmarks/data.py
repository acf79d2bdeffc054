"""Measures the data pipeline: tokenizing, padding, row filling and planning.

    python tests/benchmarks/data.py --tokenizer=/path/to/tokenizer pairs.jsonl.gz more.jsonl

Prints the time and memory of planning ten million pairs. Then, for each file: pairs tokenized a
second on one core; and for each layout the padding, beside the least that whole rows allow, and
rows filled a second in one process.
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time

import numpy as np

from dpo_flax import config as schema
from dpo_flax.assembly.data import prepare_data
from dpo_flax.config.settings import settings_of
from dpo_flax.data import loader
from dpo_flax.data.batches import pack
from dpo_flax.data.batches.plan import plan_rows
from dpo_flax.data.prepare import PreparedData

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SECONDS = 3.0  # that each rate is measured over


def make_config(path: str, tokenizer: str, directory: str, tokens: int):
  """Returns the config of a run on one file, all of it for training."""
  config = schema.default()
  config.workdir = directory
  config.data.train, config.data.tokenizer = path, tokenizer
  config.data.chat_template = CHATML
  config.data.validation_split_fraction = 0.0
  config.data.bad_record = 'skip'
  config.data.too_long = 'drop'
  config.data.cache_workers = 1
  config.batch.tokens = tokens
  return config


def measure_file(path: str, tokenizer: str, tokens: int):
  """Prints the rates of one file."""
  with tempfile.TemporaryDirectory() as directory:
    config = make_config(path, tokenizer, directory, tokens)
    start = time.perf_counter()
    prepared = prepare_data(settings_of(config), vocab_size=1 << 30)
    rate = len(prepared.train.cache) / (time.perf_counter() - start)
    print(f'{path}: {len(prepared.train.cache)} pairs, prepared at {rate:,.0f} pairs/s')
    for layout in pack.LAYOUTS:
      config.data.layout = layout
      prepared = prepare_data(settings_of(config), vocab_size=1 << 30)
      report = prepared.report['train']
      least = 1 - report['tokens'] / tokens / -(-report['tokens'] // tokens)
      print(
        f'  {layout}: {report["padding_fraction"]:.3%} padding in {report["rows"]} rows '
        f'(whole rows allow {least:.3%}), {row_rate(prepared):,.0f} rows/s'
      )


def row_rate(prepared: PreparedData) -> float:
  """Returns the rows a second that one process fills."""
  batches = loader.train_batches(prepared, start_step=0, shard_index=0, shard_count=1)
  next(batches)
  start, rows = time.perf_counter(), 0
  while time.perf_counter() - start < SECONDS:
    rows += len(next(batches)['tokens'])
  rate = rows / (time.perf_counter() - start)
  batches.close()
  return rate


def measure_planning(pairs: int, tokens: int):
  """Prints the time and memory of a plan."""
  lengths = np.random.RandomState(0).lognormal(np.log(300), 0.7, pairs)
  lengths = lengths.clip(8, tokens).astype(np.int32)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.perf_counter()
  plan = plan_rows(lengths, tokens=tokens)
  seconds = time.perf_counter() - start
  memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
  padding = 1 - lengths.sum() / (len(plan) * tokens)
  print(f'{pairs:,} pairs planned in {seconds:.1f} s and {memory:.2f} GiB, {padding:.3%} padding')


def main():
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--tokenizer', required=True, help='a directory or file of a tokenizer')
  parser.add_argument('--tokens', type=int, default=2048, help='of a row')
  parser.add_argument('--plan', type=int, default=10_000_000, help='pairs to plan')
  parser.add_argument('files', nargs='*', type=pathlib.Path)
  arguments = parser.parse_args()
  print(f'load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
  # First, because memory is measured as what the process grows by.
  measure_planning(arguments.plan, arguments.tokens)
  for file in arguments.files:
    measure_file(str(file), arguments.tokenizer, arguments.tokens)


if __name__ == '__main__':
  main()
