"""Feeds damaged weights to the loader: it loads them or says what is wrong, and nothing else.

    python tests/faults/fuzz_weights.py --cases=10000

Takes a checkpoint of one file, one of several and a PEFT adapter, damages a header, index, config
or link in some way that chance or malice might, and loads what results. A case fails if it ends in
anything but success or a ValueError of one readable message, opens a file outside its directory or
a pickle, takes more than 2 s, or more than 256 MiB. The test suite runs a short form.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from dpo_flax.files.messages import shown
from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.huggingface.peft_adapter import (
  CONFIG,
  WEIGHTS,
  fingerprint,
  load_adapter,
  open_adapter,
  save_adapter,
)
from dpo_flax.huggingface.presets import from_preset
from dpo_flax.huggingface.weights import INDEX, load_base, open_checkpoint, save_merged
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import BASE, TRAINABLE, LoraConfig, LowRank
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import make_mesh

SECONDS, BYTES = 2.0, 256 * 2**20  # that a case may take
RUN = {'dtype': 'float32', 'weight_dtype': 'float32', 'remat': 'none', 'attention': 'xla'}
LORA = LoraConfig(
  modules={'q_proj': LowRank((2, 1), (4.0, 1.0)), 'v_proj': LowRank((2,), (4.0,))},
  **{'dropout': 0.0, 'rslora': False, 'dora': True, 'tied': False, 'saved': frozenset()},
  **{'reference': None, 'continues': False},
)

_NAMES = ['../secret.safetensors', '/etc/passwd', 'a/b.safetensors', 'linked.safetensors', '..']
_NAMES += [
  'pytorch_model.bin',
  'model.pt',
  '',
  'x' * 300 + '.safetensors',
  '\0',
  '\ud800',
  '\x1b[2J',
]
_VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 10**400, 1e300, '', 'F64', 'I8', 'BF16']
_VALUES += [
  [],
  {},
  [[]],
  {'(a|a)*b': 2, '.*.*.*.*': 1},
  {'q_proj': 2**40},
  {'(.+)+x': 2.0},
  [0, 4],
  [4, 0],
  [1] * 50,
  {'a': {}},
  *_NAMES,
]
_RAW = [
  b'NaN',
  b'1e999',
  b'"\\ud800"',
  b'9' * 5000,
  b'[' * 5000,
  b'{"a":1,"a":1}',
  b'\xff',
  b',',
  b'"',
]


@dataclasses.dataclass(frozen=True)
class Subject:
  """Sound directories, and what loads them."""

  seeds: dict[str, pathlib.Path]
  config: ModelConfig
  base: nnx.State  # abstract
  adapters: nnx.State
  mesh: jax.sharding.Mesh

  def load(self, kind: str, directory: pathlib.Path):
    """Loads a directory of a kind as training does."""
    if kind == 'adapter':
      adapter = open_adapter(directory, self.config)
      load_adapter(adapter, self.adapters, self.mesh)
      fingerprint(adapter)
    else:
      checkpoint = open_checkpoint(str(directory))
      from_hf_config(checkpoint.config, **RUN, where=str(directory / 'config.json'))
      load_base(checkpoint, self.base, self.mesh)


def make_subject(root: pathlib.Path) -> Subject:
  """Writes the sound directories."""
  config = dataclasses.replace(
    from_preset('tiny', **RUN),
    **{'vocab_size': 16, 'embed_dim': 8, 'mlp_dim': 12, 'num_layers': 2},
    **{'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 4},
  )
  model = Transformer(config, LORA, nnx.Rngs(0, lora=1))
  seeds = {kind: root / kind for kind in ('whole', 'sharded', 'adapter')}
  save_merged(model, None, seeds['whole'])
  save_merged(model, None, seeds['sharded'], shard_bytes=2000)
  save_adapter(model, LORA, 'base', seeds['adapter'])
  (root / 'secret.safetensors').write_bytes((seeds['whole'] / 'model.safetensors').read_bytes())
  for seed in seeds.values():
    for pickle in ('pytorch_model.bin', 'adapter_model.bin', 'model.pt'):
      (seed / pickle).write_bytes(b'never opened')
  _, adapters, base, _ = nnx.split(nnx.eval_shape(lambda: model), TRAINABLE, BASE, ...)
  mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  return Subject(seeds, config, base, adapters, mesh)


def damage(directory: pathlib.Path, generator: random.Random) -> str:
  """Damages one file of a directory; returns what was done to it."""
  kept = {'.safetensors', '.json'}
  files = sorted(p for p in directory.iterdir() if p.suffix in kept and not p.is_symlink())
  # Most faults go where most is read.
  weights = [
    8 if path.name in {INDEX, CONFIG, WEIGHTS, 'model.safetensors'} else 1 for path in files
  ]
  (path,) = generator.choices(files, weights)
  kinds = [_damage_bytes, _damage_json, _damage_json, _damage_json, _replace]
  kind = generator.choice(kinds)
  kind(path, generator)
  return f'{kind.__name__} {path.name}'


def _damage_bytes(path: pathlib.Path, generator: random.Random):
  content = bytearray(path.read_bytes())
  header = (
    8 + int.from_bytes(content[:8], 'little') if path.suffix == '.safetensors' else len(content)
  )
  for _ in range(generator.randint(1, 4)):
    at = generator.randrange(min(generator.choice([8, header, len(content)]), len(content)))
    match generator.randrange(4):
      case 0:
        content[at] = generator.randrange(256)
      case 1:
        content[at:at] = generator.choice(_RAW)
      case 2:
        del content[at + 1 : at + generator.randint(2, 40)]
      case _:
        del content[at + 1 :]
  path.write_bytes(content)


def _damage_json(path: pathlib.Path, generator: random.Random):
  """Changes a header, an index or a config, and keeps its form."""
  content = path.read_bytes()
  start = 8 if path.suffix == '.safetensors' else 0
  length = int.from_bytes(content[:8], 'little') if start else len(content)
  values = json.loads(content[start : start + length])
  for _ in range(generator.randint(1, 3)):
    _change(values, generator)
  text = json.dumps(values).encode()
  if generator.random() < 0.1:
    key = generator.choice([b'"a": ', b'"\\u0000": '])
    text = re.sub(rb'"[^"]+": ', lambda _: key, text, count=2)
  if start:
    text += b' ' * (length - len(text))  # so that only a longer header moves the data
    content = len(text).to_bytes(8, 'little') + text + content[8 + length :]
  path.write_bytes(content if start else text)


def _change(values: Any, generator: random.Random):
  """Changes one entry somewhere in a tree of JSON."""
  keys = list(values) if isinstance(values, dict) else range(len(values))
  if not keys:
    return
  key = generator.choice(keys)
  if isinstance(values[key], (dict, list)) and generator.random() < 0.8:
    _change(values[key], generator)
    return
  other = generator.choice(keys)
  match generator.randrange(5):
    case 0:
      values.pop(key)
    case 1:
      values[key] = copy.deepcopy(values[other])
    case 2 if isinstance(values, dict):
      values[generator.choice(_NAMES)] = values.pop(key)
    case 3 if isinstance(values[key], int):
      values[key] += generator.choice([-4, -1, 1, 4, 2**62])
    case _:
      values[key] = copy.deepcopy(generator.choice(_VALUES))


def _replace(path: pathlib.Path, generator: random.Random):
  """Puts a link, a pipe, a directory, a bomb or a huge hole in the place of a file."""
  content = path.read_bytes()
  path.unlink()
  match generator.randrange(6):
    case 0:
      targets = ['../../secret.safetensors', '/dev/zero', '/etc/passwd', path.name, '.', 'nothing']
      path.symlink_to(generator.choice(targets))
    case 1:
      os.mkfifo(path)
    case 2:
      path.mkdir()
    case 3:
      element = generator.choice([b'[],', b'{},', b'"a":{},', b'1,', b'"",'])
      text = b'{"a": [' + element * (generator.choice([1, 30]) * 2**20 // len(element)) + b'0]}'
      start = len(text).to_bytes(8, 'little') if path.suffix == '.safetensors' else b''
      path.write_bytes(start + text)
    case 4:
      path.write_bytes(generator.choice([2**24, 2**40, 2**63]).to_bytes(8, 'little') + content[8:])
      os.truncate(path, generator.choice([9, 2**25, 2**36]))
    case _:
      path.write_bytes(b'')


class Watch:
  """Counts the files that are opened outside a directory, and pickles inside it."""

  def __init__(self):
    self._home: str | None = None
    self.opened: list[str] = []
    sys.addaudithook(self._hear)  # there is no way to take one off again

  @contextlib.contextmanager
  def over(self, home: pathlib.Path) -> Iterator[None]:
    """Watches what the block opens."""
    self.opened, self._home = [], os.path.realpath(home)
    try:
      yield
    finally:
      self._home = None

  def _hear(self, event: str, arguments: tuple):
    if self._home is None or event != 'open' or not isinstance(arguments[0], (str, bytes)):
      return
    name = os.path.realpath(os.fsdecode(arguments[0]))
    # Python's own modules, imported when first used, are no data.
    is_code = name.startswith((sys.prefix, sys.base_prefix)) or name.endswith(('.py', '.pyc'))
    is_inside = name.startswith(self._home + os.sep) and not name.endswith(('.bin', '.pt'))
    if not is_code and not is_inside:
      self.opened.append(name)


def check(subject: Subject, kind: str, directory: pathlib.Path, watch: Watch) -> str:
  """Loads a directory; returns the outcome in a word.

  Raises:
    AssertionError: it took too much, opened what is not its own, or failed in another way.
  """
  outcome = 'loaded'
  tracemalloc.reset_peak()
  before, start = tracemalloc.get_traced_memory()[0], time.process_time()
  try:
    with watch.over(directory):
      subject.load(kind, directory)
  except ValueError as error:
    outcome = 'refused'
    lines = str(error).splitlines()
    assert type(error) is ValueError, repr(error)
    assert str(directory) in lines[0], lines[0]
    assert all(line.isprintable() and len(line) < 1000 for line in lines), str(error)
  seconds = time.process_time() - start
  taken = tracemalloc.get_traced_memory()[1] - before
  assert not watch.opened, watch.opened
  assert seconds < SECONDS, f'{seconds:.1f} s'
  assert taken < BYTES, f'{taken / 2**20:.0f} MiB'
  return outcome


def run(cases: int, seed: int, root: pathlib.Path) -> tuple[collections.Counter, list[str]]:
  """Runs so many cases in `root`; returns how often each had which outcome, and what failed.

  The directory of a case that fails stays.
  """
  generator = random.Random(seed)
  subject, watch = make_subject(root), Watch()
  found, failures = collections.Counter(), []
  tracemalloc.start()
  for kind, sound in subject.seeds.items():
    subject.load(kind, sound)
  for case in range(cases):
    kind = generator.choice(list(subject.seeds))
    directory = root / 'cases' / str(case)
    shutil.copytree(subject.seeds[kind], directory)
    (directory / 'linked.safetensors').symlink_to('../../secret.safetensors')
    fault = damage(directory, generator)
    try:
      outcome = check(subject, kind, directory, watch)
    except Exception as error:
      outcome = 'FAILED'
      failures.append(f'{directory}: {kind}, {fault}: {shown(repr(error))}')
    else:
      shutil.rmtree(directory)
    found[f'{kind:8} {outcome:8} {fault.split()[0].strip("_")}'] += 1
  tracemalloc.stop()
  return found, failures


def main():
  """Runs the long form."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--cases', type=int, default=10_000)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  root = pathlib.Path(tempfile.mkdtemp())
  found, failures = run(arguments.cases, arguments.seed, root)
  for what, count in sorted(found.items()):
    print(f'{count:8} {what}')
  print('\n'.join(failures))
  if failures:
    sys.exit(1)
  shutil.rmtree(root)


if __name__ == '__main__':
  main()
