"""What error messages show of values that come from files: on lines a terminal can print."""

from collections.abc import Iterable
from typing import Any

_CHARACTERS, _LINES = 200, 1000


def shown(value: Any) -> str:
  """Returns a value on one line, not all of it where it is long.

  A text that is such a line is shown without quotes.
  """
  text = value if isinstance(value, str) and value.isprintable() else ascii(value)
  return text if len(text) <= _CHARACTERS else f'{text[:_CHARACTERS]}...'


def shown_list(faults: Iterable[str]) -> str:
  """Returns faults on lines of their own, indented, the first thousand of them."""
  faults = list(faults)
  more = len(faults) - _LINES
  lines = faults[:_LINES] + ([f'and {more} more'] if more > 0 else [])
  return ''.join(f'\n  {line}' for line in lines)
