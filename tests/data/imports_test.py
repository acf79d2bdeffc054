"""The data package stands alone: records to packed batches, without a model or a config."""

import ast
import pathlib

import dpo_flax

PACKAGE = pathlib.Path(dpo_flax.__file__).parent


def _imported(path):
  """Yields every module that a file imports, inside its functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module or ''
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_data_and_files_import_no_jax_and_nothing_else_of_this_package():
  for path in [*(PACKAGE / 'data').rglob('*.py'), *(PACKAGE / 'files').rglob('*.py')]:
    for name in _imported(path):
      library, *inside = name.split('.')
      assert library not in {'jax', 'flax', 'optax', 'orbax', 'ml_collections'}, (path, name)
      assert library != 'dpo_flax' or not inside or inside[0] in {'data', 'files'}, (path, name)
