"""What messages show of values that come from elsewhere: printable, not too long, no secrets."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_CHARACTERS, _LINES = 200, 1000

# Tokens of Hugging Face, GitHub, OpenAI, Slack, Amazon and Google, JSON web tokens, and a password
# or token in an address.
SECRETS = re.compile(
  r'\b(hf_|gh[pousr]_|github_pat_|sk-)[A-Za-z0-9_-]{20,}|\bxox[abeoprs]-[A-Za-z0-9-]{10,}'
  r'|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]+'
  r'|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_.-]+'
  r'|://[^/@\s]*:[^/@\s]+@|[?&](access_token|api_key|key|token|password|signature)=[^&\s]+'
)


def shown(value: Any) -> str:
  """Returns a value on one line, not all of it where it is long.

  A text that is such a line is shown without quotes.
  """
  text = value if isinstance(value, str) and value.isprintable() else ascii(value)
  return text if len(text) <= _CHARACTERS else f'{text[:_CHARACTERS]}...'


def without_secrets(text: str) -> str:
  """Returns a text with what looks like a token or password taken out."""
  return SECRETS.sub('(secret)', text)


def first_of(names: Sequence[str], count: int = 3) -> str:
  """Returns the first few on one line, and how many more there are.

  >>> first_of(['a', 'b', 'c', 'd', 'e'])
  'a, b, c and 2 more'
  """
  more = len(names) - count
  return ', '.join(names[:count]) + (f' and {more} more' if more > 0 else '')


def shown_list(faults: Iterable[str]) -> str:
  """Returns faults on lines of their own, indented, the first thousand of them."""
  faults = list(faults)
  more = len(faults) - _LINES
  lines = faults[:_LINES] + ([f'and {more} more'] if more > 0 else [])
  return ''.join(f'\n  {line}' for line in lines)
