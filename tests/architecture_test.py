"""Who may import whom: docs/design.md says why."""

import ast
import pathlib

import pytest

import dpo_flax

PACKAGE = pathlib.Path(dpo_flax.__file__).parent

# Each package may import those in the rows above its own, and the packages beside which it stands
# where a row says so. From the ground up.
FLOORS = (
  {'files', 'losses', 'sharding'},
  {'model', 'config'},
  {'data', 'huggingface', 'runtime', 'checkpoints'},
  {'training'},
  {'assembly'},
  {'exports', 'planning', 'debugging'},
  {'train', 'evaluate', 'export', 'inspect_data', 'plan', 'examples'},
)
COMMANDS = {'train', 'evaluate', 'export', 'inspect_data', 'plan'}

# Package -> all of dpo_flax that it may import, where that is less than the floors below.
ONLY = {
  'losses': {'losses'},
  'model': {'model', 'files', 'sharding'},
  'data': {'data', 'files'},
  'files': {'files'},
  'checkpoints': {'checkpoints', 'config', 'files', 'runtime', 'sharding'},
}


def modules():
  """Returns the name of every module -> its path; the links of configs/ are left out."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    if parts[0] != 'configs':
      parts = parts[:-1] if parts[-1] == '__init__' else parts
      found['.'.join(('dpo_flax', *parts))] = path
  return found


MODULES = modules()


def imports(path):
  """Yields the dotted names that a file imports, those inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in MODULES else node.module


def part(module):
  """Returns the package or top-level module of dpo_flax that a module is in; '' for its face."""
  return [*module.split('.'), ''][1]


def arrows():
  """Returns every (importing module, imported module) inside dpo_flax, between different parts."""
  return [
    (module, other)
    for module, path in MODULES.items()
    for other in imports(path)
    if other.split('.')[0] == 'dpo_flax' and part(module) != part(other) and part(module)
  ]


def floor(name):
  return next(i for i, floor in enumerate(FLOORS) if name in floor)


def circle(below):
  """Returns the names that reach themselves, of name -> the names directly below it."""
  left = dict(below)
  while ready := [name for name in left if not left[name] & left.keys()]:
    for name in ready:
      del left[name]
  return sorted(left)


def test_every_part_of_the_package_has_a_floor():
  assert {part(module) for module in MODULES} - {''} == set().union(*FLOORS)


def test_imports_run_downwards():
  up = [
    (module, other)
    for module, other in arrows()
    if part(other) and floor(part(other)) > floor(part(module))
  ]
  assert not up


def test_no_circle_of_packages():
  below = {}
  for module, other in arrows():
    below.setdefault(part(module), set()).add(part(other))
  assert not circle(below)


@pytest.mark.parametrize('package', ONLY)
def test_what_a_package_may_import(package):
  found = {other for module, other in arrows() if part(module) == package}
  assert {part(other) for other in found} - {package} <= ONLY[package], found


def test_nothing_imports_a_command():
  assert not [(module, other) for module, other in arrows() if part(other) in COMMANDS]


def test_training_never_reaches_the_reader_of_compiled_programs():
  reached, waiting = set(), ['dpo_flax.train']
  while waiting:
    module = waiting.pop()
    if module not in reached:
      reached.add(module)
      waiting += [other for other in imports(MODULES[module]) if other in MODULES]
  assert not [module for module in reached if module.startswith('dpo_flax.planning.compiled')]


def test_data_and_files_import_no_jax():
  heavy = {'jax', 'flax', 'optax', 'orbax', 'ml_collections'}
  users = [
    module
    for module, path in MODULES.items()
    if part(module) in {'data', 'files'} and heavy & {name.split('.')[0] for name in imports(path)}
  ]
  assert not users


def test_folders_inside_a_package_form_no_circle():
  below = {}
  for module, path in MODULES.items():
    for other in imports(path):
      if other in MODULES and part(other) == part(module):
        folders = ['.'.join(name.split('.')[:3]) for name in (module, other)]
        inner = [f for f, name in zip(folders, (module, other), strict=True) if f != name]
        if len(inner) == 2 and folders[0] != folders[1]:
          below.setdefault(folders[0], set()).add(folders[1])
  assert not circle(below)
