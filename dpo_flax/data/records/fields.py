"""Reading a record: strict JSON, and typed values, with errors that name the key."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_flax.files.strict_json import StrictJsonError, parse_object


class RecordError(ValueError):
  """A record that cannot be used; `reason` is short, so that equal reasons can be counted."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason, detail)  # both, so that the error can be pickled
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f'{self.reason}: {self.detail}' if self.detail else self.reason


def parse(line: bytes) -> dict[str, Any]:
  """Parses one JSON object strictly: no NaN or infinity, no key twice.

  Raises:
    RecordError: anything else.
  """
  try:
    return parse_object(line)
  except StrictJsonError as error:
    details = {
      'duplicate key': repr(error.detail),
      'not a JSON object': f'it is a {error.detail}',
    }
    raise RecordError(error.reason, details.get(error.reason, str(error.detail))) from None


def rename(record: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
  """Returns the record with values moved to the names that the formats know.

  Args:
    record: its keys and values.
    fields: our name -> the record's. 'completions.overall_score' is a key inside the items of the
      list 'completions'.

  Raises:
    RecordError: the record has no such key.
  """
  renamed = dict(record)
  for name, key in fields.items():
    outer, dot, inner = name.partition('.')
    if dot:
      items = get_list(renamed, outer)
      if not all(isinstance(item, dict) for item in items):
        raise RecordError('wrong type', f'{outer} holds something else than objects')
      renamed[outer] = [rename(item, {inner: key}) for item in items]
    elif key not in record:
      raise RecordError(
        'missing key', f'data.fields takes {name!r} from {key!r}, not among {sorted(record)}'
      )
    else:
      if renamed.get(key) is record[key]:
        del renamed[key]
      renamed[name] = record[key]
  return renamed


def get(record: dict[str, Any], key: str) -> Any:
  """Returns a value that must be there."""
  if record.get(key) is None:
    raise RecordError('missing key', f'{key!r} is not among {sorted(record)}')
  return record[key]


def get_text(record: dict[str, Any], key: str) -> str:
  """Returns a value that must be a string."""
  return _typed(record, key, str, 'a string')


def get_chat(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
  """Returns a value that must be a chat; its messages are checked later."""
  return _typed(record, key, list, 'a list of messages')


def get_list(record: dict[str, Any], key: str) -> list[Any]:
  """Returns a value that must be a list."""
  return _typed(record, key, list, 'a list')


def get_number(record: dict[str, Any], key: str) -> float:
  """Returns a value that must be a number."""
  value = _typed(record, key, (int, float), 'a number')
  if isinstance(value, bool) or math.isnan(value):
    raise RecordError('wrong type', f'{key} is {value}, not a number')
  return value


def _typed(record: dict[str, Any], key: str, expected: type | tuple[type, ...], name: str) -> Any:
  value = get(record, key)
  if not isinstance(value, expected):
    raise RecordError('wrong type', f'{key} is a {type(value).__name__}, not {name}')
  return value


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
  """Returns the length of the longest common beginning."""
  n = min(len(a), len(b))
  if a[:n] == b[:n]:
    return n
  return next(i for i in range(n) if a[i] != b[i])
