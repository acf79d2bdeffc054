"""Whether a rendered chat still holds the texts of its messages."""

import json
from collections.abc import Iterator
from typing import Any

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.preference import Message

_TEXT_KEYS = ('reasoning_content', 'content')  # of a message


def check_kept(messages: list[Message], text: str, part: str) -> None:
  """Refuses a rendering that lacks a text of its messages; white space does not count.

  Each needs a passage of its own, wherever the template puts it: a system message whose words also
  stand in a user's is missed when the template leaves it out.

  Args:
    messages: of one part of a chat.
    text: that part, rendered.
    part: history | response, for messages.

  Raises:
    RecordError: something is not there, or not as it stands.
  """
  squeezed = _squeeze(text)
  said = [(message, saying) for message in messages for saying in _sayings(message)]
  # The longest first: what another one contains must not use up its passage.
  for message, saying in sorted(said, key=lambda item: -len(item[1])):
    if _squeeze(saying) not in squeezed:
      raise _lost(message, saying, part)
    squeezed = squeezed.replace(_squeeze(saying), '\0', 1)
  quoted = [(message, value) for message in messages for value in _quoted(message)]
  plain = _letters(text) if quoted else ''
  for message, value in quoted:
    form = next((form for form in map(_letters, _forms(value)) if form in plain), None)
    if form is None:
      raise _lost(message, _spelt(value), part)
    plain = plain.replace(form, '\0', 1)


def check_tools(tools: list[Any], text: str, text_without: str) -> None:
  """Refuses a rendering that does not show the tools: it equals the one without, or lacks a name.

  Raises:
    RecordError: tools are left out.
  """
  names = [_function(tool).get('name', '') for tool in tools]
  lost = next((name for name in names if str(name) not in text), None)
  if text == text_without or lost is not None:
    raise RecordError(
      'chat template drops the tools',
      f'the rendered prompt does not show {lost or names[0]!r}: use a template that writes `tools`',
    )


def _sayings(message: Message) -> Iterator[str]:
  """Yields what must stand in the text word for word."""
  if message['role'] == 'tool':  # what tools return may be quoted or escaped
    return
  for key in _TEXT_KEYS:
    yield from filter(str.strip, _texts(message.get(key)))


def _quoted(message: Message) -> Iterator[Any]:
  """Yields what a template may quote, escape or spell as JSON or XML: only its letters count."""
  if message['role'] == 'tool':
    yield from _texts(message.get('content'))
  for call in message.get('tool_calls') or []:
    function = _function(call)
    yield str(function.get('name', ''))
    arguments = function.get('arguments')
    if isinstance(arguments, dict):
      yield from ({name: value} for name, value in arguments.items())
    elif arguments is not None:
      yield arguments


def _forms(value: Any) -> Iterator[str]:
  """Yields the ways to write a value."""
  yield _spelt(value)
  yield json.dumps(value)
  yield json.dumps(value, ensure_ascii=False, sort_keys=True)


def _function(item: Any) -> dict[str, Any]:
  """Returns the function of a tool or a call, which some data sets hold bare."""
  item = item if isinstance(item, dict) else {}
  function = item.get('function', item)
  return function if isinstance(function, dict) else {}


def _texts(content: Any) -> list[str]:
  if isinstance(content, str):
    return [content]
  texts = (item.get('text') for item in content or [] if isinstance(item, dict))
  return [text for text in texts if isinstance(text, str)]


def _spelt(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _squeeze(text: str) -> str:
  return ''.join(text.split())


def _letters(text: str) -> str:
  return ''.join(filter(str.isalnum, text))


def _lost(message: Message, what: str, part: str) -> RecordError:
  return RecordError(
    f'chat template rewrites the {part}',
    f'what the {message["role"]} says, {what[:40]!r}, is not in the rendered chat as it stands'
    + ('; data.history=rendered trains on what the template makes' * (part == 'history')),
  )
