"""Nothing in the package runs code that it was given."""

import ast
import pathlib

import pytest

import dpo_flax

PACKAGE = pathlib.Path(dpo_flax.__file__).parent
MODULES = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml'}
CALLS = {'eval', 'exec', 'compile'}
FLAGS = {'allow_pickle', 'trust_remote_code', 'shell'}

# They pickle what a process and the child that it has started say to each other through a pipe.
TALK_TO_THEIR_CHILD = {'data/tokens/encode.py', 'data/tokens/encode_process.py'}


def offences(tree: ast.AST) -> list[str]:
  """Returns what in a module would run, or could be made to run, foreign code."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names if alias.name.split('.')[0] in MODULES]
    elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in MODULES:
      found.append(node.module)
    elif isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        found.append(node.func.id)
      for keyword in node.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in FLAGS and not is_false:
          found.append(keyword.arg)
  return found


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: path.stem)
def test_no_pickle_no_eval_no_shell(path):
  talks = str(path.relative_to(PACKAGE)) in TALK_TO_THEIR_CHILD
  assert offences(ast.parse(path.read_text())) == (['pickle'] if talks else [])


@pytest.mark.parametrize(
  'code',
  ['import pickle', 'from marshal import loads', 'eval(x)', 'np.load(f, allow_pickle=True)'],
)
def test_offences_are_found(code):
  assert offences(ast.parse(code))
