"""A raw record: strict JSON, and the error of a record that cannot be used."""

import json
import math
from typing import Any


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
    value = _DECODER.decode(line.decode('utf-8-sig').strip())
  except RecordError:
    raise
  except UnicodeDecodeError as error:
    raise RecordError('not UTF-8', str(error)) from None
  except (ValueError, RecursionError) as error:
    raise RecordError('not JSON', str(error)) from None
  if not isinstance(value, dict):
    raise RecordError('not a JSON object', f'it is a {type(value).__name__}')
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    raise RecordError('duplicate key', repr(next(k for k in keys if keys.count(k) > 1)))
  return value


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise RecordError('number out of range', text)
  return number


def _refuse_constant(text: str) -> None:
  raise RecordError('not JSON', f'{text} is not a JSON number')


_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
)
