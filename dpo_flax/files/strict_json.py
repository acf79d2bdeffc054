"""Strict JSON, as RFC 8259 has it: UTF-8, no key twice, and no number that is not finite.

Python's own reader takes NaN and Infinity, turns 1e999 into infinity, keeps the last of two equal
keys, and guesses at UTF-16 and UTF-32.
"""

import json
import math
from typing import Any


class StrictJsonError(ValueError):
  """A text that is not strict JSON.

  Attributes:
    reason: 'not JSON', 'not UTF-8', 'not a JSON object', 'duplicate key', 'number out of range' or
      'too many values'.
    detail: the duplicate key, the type that is there instead of an object, or what is wrong.
  """

  def __init__(self, reason: str, detail: Any):
    super().__init__(reason, detail)  # both, so that the error can be pickled
    self.reason, self.detail = reason, detail

  def __str__(self) -> str:
    return f'{self.reason}: {self.detail}'


def parse_object(text: bytes, *, max_values: float = math.inf) -> dict[str, Any]:
  """Parses a JSON object; a byte order mark before it is skipped.

  Nesting is bounded by Python's recursion limit, integers by its limit of digits.

  >>> parse_object(b'{"a": [1, 2]}')
  {'a': [1, 2]}

  Args:
    text: UTF-8.
    max_values: how many values it may have at most, each of which takes about 100 bytes; counted
      before anything is parsed, so that commas and brackets in strings count as well.

  Raises:
    StrictJsonError: it is none.
  """
  if max_values < math.inf and sum(map(text.count, (b',', b'[', b'{'))) > max_values:
    raise StrictJsonError('too many values', f'more than {max_values}')
  try:
    value = _DECODER.decode(text.decode('utf-8-sig').strip())
  except StrictJsonError:
    raise
  except UnicodeDecodeError as error:
    raise StrictJsonError('not UTF-8', str(error)) from None
  except (ValueError, RecursionError) as error:
    raise StrictJsonError('not JSON', str(error)) from None
  if not isinstance(value, dict):
    raise StrictJsonError('not a JSON object', type(value).__name__)
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen = set()
    raise StrictJsonError(
      'duplicate key', next(key for key, _ in pairs if key in seen or seen.add(key))
    )
  return value


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise StrictJsonError('number out of range', text)
  return number


def _refuse_constant(text: str):
  raise StrictJsonError('not JSON', f'{text} is no JSON number')


_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
)
