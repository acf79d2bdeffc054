"""Names and values as a config gives them.

A config cannot hold a mapping whose names have dots, as those of files do, so the values of names
may also be written as a sequence of pairs: (('a.jsonl', 2), ('b.jsonl', 0.5)).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

_LEAST, _MOST = 0.001, 1000  # passes over a part of a mixture in an epoch


def named_values(given: Any) -> dict[str, Any] | None:
  """Returns name -> value, or None for what is no mapping in any of its forms.

  Args:
    given: a mapping, a sequence of (name, value) pairs, or a JSON object as a string.

  Raises:
    ValueError: a name given twice, or a string that begins as a JSON object and is none.
  """
  if isinstance(given, str):
    if not given.lstrip().startswith('{'):
      return None
    try:
      return json.loads(given, object_pairs_hook=_one_value_each)
    except json.JSONDecodeError as error:
      raise ValueError(f'{given} is not JSON: {error}') from None
  if isinstance(given, ConfigDict):
    given = given.to_dict()
  if isinstance(given, Mapping):
    return _sorted(given) if all(isinstance(name, str) for name in given) else None
  if not isinstance(given, list | tuple) or not given or not all(map(_is_pair, given)):
    return None
  return _one_value_each(given)


def named_pairs(
  field: str, given: Any, *, of: str, example: tuple[str, Any]
) -> tuple[tuple[str, Any], ...]:
  """Returns the (name, value) pairs that a field of a config gives; () where it gives nothing.

  Args:
    field: its name.
    given: its value.
    of: what its names are of, and
    example: a (name, value), for the message.

  Raises:
    ValueError: it is no mapping in any of its forms.
  """
  values = named_values(given) if given else {}
  if values is None:
    name, value = map(json.dumps, example)
    raise ValueError(
      f'{field}={given!r}: expected a mapping of {of}: {{{name}: {value}}} or (({name}, {value}),).'
    )
  return tuple(values.items())


def data_paths(given: Any) -> str | tuple[str, ...] | tuple[tuple[str, float], ...]:
  """Returns a path, paths, or the (path, weight) pairs of a mixture, whatever their form.

  Raises:
    ValueError: they are none of these, or a weight is no number of passes over a file.
  """
  mixture = named_values(given)
  if mixture is None:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
      raise ValueError(
        f'data files {given!r}: expected a path, a list of paths, or a mixture such as '
        "(('a.jsonl', 1), ('b.jsonl', 0.5))."
      )
    return given if isinstance(given, str) else tuple(given)
  for path, weight in mixture.items():
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not _LEAST <= weight <= _MOST:
      raise ValueError(
        f'data.train gives {path} the weight {weight!r}: it is the number of passes over the file '
        f'in an epoch, such as 1, 2 or 0.5, from {_LEAST} to {_MOST}.'
      )
  return tuple(mixture.items())


def split_paths(
  paths: str | Sequence[str] | Sequence[tuple[str, float]] | None,
) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
  """Returns the paths of `data_paths`, and the weight of each where they are a mixture."""
  if isinstance(paths, str):
    return (paths,), None
  mixture = [pair for pair in paths or () if not isinstance(pair, str)]
  if not mixture:
    return tuple(path for path in paths or () if isinstance(path, str)), None
  return tuple(path for path, _ in mixture), tuple(float(weight) for _, weight in mixture)


def _sorted(given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a mapping in the order of its names, as a config has it, and those inside it."""
  return {
    name: _sorted(value) if isinstance(value, Mapping) else value
    for name, value in sorted(given.items())
  }


def _is_pair(item: Any) -> bool:
  return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def _one_value_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{twice} is named more than once: give every name one value.')
  return values
