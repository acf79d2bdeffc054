"""Names and values as a config gives them.

A config cannot hold a mapping whose names have dots, as those of files do, so the values of names
may also be written as a sequence of pairs: (('a.jsonl', 2), ('b.jsonl', 0.5)).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpo_flax.config.schema import get

NamedValues = Mapping[str, Any] | Sequence[tuple[str, Any]] | str


def named_values(given: Any) -> dict[str, Any] | None:
  """Returns name -> value, or None for what is no mapping in any of its forms.

  Args:
    given: a mapping, a sequence of (name, value) pairs, or a JSON object as a string.

  Raises:
    ValueError: a name given twice, or a string that begins as a JSON object and is none.
  """
  if isinstance(given, str):
    return _from_json(given) if given.lstrip().startswith('{') else None
  if isinstance(given, ConfigDict):
    given = given.to_dict()
  if isinstance(given, Mapping):
    return dict(given) if all(isinstance(name, str) for name in given) else None
  if not isinstance(given, list | tuple) or not given or not all(map(_is_pair, given)):
    return None
  return _once(given)


def named_field(
  config: ConfigDict, field: str, *, of: str, example: tuple[str, Any]
) -> dict[str, Any]:
  """Returns the name -> value that a dotted field of a config gives; {} where it gives nothing.

  Args:
    config: the run's.
    field: its name.
    of: what its names are of, and
    example: a (name, value), for the message.

  Raises:
    ValueError: it is no mapping in any of its forms.
  """
  given = get(config, field)
  values = named_values(given) if given else {}
  if values is None:
    name, value = map(json.dumps, example)
    raise ValueError(
      f'{field}={given!r}: expected a mapping of {of}: {{{name}: {value}}} or (({name}, {value}),).'
    )
  return values


def _is_pair(item: Any) -> bool:
  return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{twice} is named more than once: give every name one value.')
  return values


def _from_json(text: str) -> dict[str, Any]:
  try:
    return json.loads(text, object_pairs_hook=_once)
  except json.JSONDecodeError as error:
    raise ValueError(f'{text} is not JSON: {error}') from None
