"""What importing this library does to the program that imports it: nothing."""

import json
import pathlib
import re
import subprocess
import sys

import dpo_flax

ROOT = pathlib.Path(dpo_flax.__file__).parent
# What a user starts, and nobody imports.
COMMANDS = {f'dpo_flax.{name}' for name in ('train', 'evaluate', 'export', 'inspect_data', 'plan')}

IMPORT_ALL = """
import copy, importlib, json, sys
from absl import flags
import absl.app, chex, grain, jax, orbax.checkpoint  # which define flags of their own
import fsspec.config
import ml_collections.config_flags
sentinel = object()
sys.modules['torch'] = sentinel
conf, defined = copy.deepcopy(fsspec.config.conf), set(flags.FLAGS)
for name in sys.argv[1:]:
  importlib.import_module(name)
print(json.dumps({
  'flags': sorted(set(flags.FLAGS) - defined),
  'same_conf': fsspec.config.conf == conf,
  'same_torch': sys.modules['torch'] is sentinel,
  'tensorboardX': 'tensorboardX' in sys.modules,
}))
"""


def module_names():
  """Yields the modules of the library that are no command."""
  for path in sorted(ROOT.rglob('*.py')):
    parts = path.relative_to(ROOT.parent).with_suffix('').parts
    if 'configs' not in parts and path.name != '__main__.py':
      yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def test_importing_the_library_defines_no_flags_and_changes_nothing_of_others():
  modules = [name for name in module_names() if name not in COMMANDS]
  assert len(modules) > 50
  command_line = [sys.executable, '-c', IMPORT_ALL, *modules]
  printed = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
  expected = {'flags': [], 'same_conf': True, 'same_torch': True, 'tensorboardX': False}
  assert json.loads(printed.splitlines()[-1]) == expected


def test_what_is_private_to_jax_is_used_in_one_file():
  found = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.rglob('*.py'))
    if re.search(r'^\s*(from|import) jax\._src', path.read_text(), re.MULTILINE)
  ]
  assert found == ['runtime/coordinator.py']
