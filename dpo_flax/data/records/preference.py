"""One comparison of two answers to a prompt, and what makes it usable."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

from dpo_flax.data.records.fields import RecordError

Message = dict[str, Any]  # at least 'role'; 'content' for all but tool calls
Text = str | list[Message]
Span = tuple[int, int]  # of characters: [start, end)

COLUMNS = ('chosen_probability', 'margin', 'weight')


@dataclasses.dataclass(frozen=True)
class Preference:
  """One comparison. The three texts are all strings or all lists of chat messages."""

  prompt: Text
  chosen: Text
  rejected: Text
  chosen_probability: float | None = None  # that chosen is the better one, in [0, 1]
  margin: float | None = None  # by how much, in units of reward
  weight: float | None = None  # of this pair in the loss
  tools: list[Any] | None = None  # JSON schemas, for a chat template that shows them
  # The turns of others inside a response that is a string: read by the model, but no target.
  chosen_context: tuple[Span, ...] = ()
  rejected_context: tuple[Span, ...] = ()

  @property
  def prompt_hash(self) -> int:
    """64 bits of the prompt alone: equal prompts have equal hashes."""
    shown = [self.prompt, self.tools] if self.tools else self.prompt
    content = json.dumps(shown, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little')


def with_extras(preference: Preference, record: dict[str, Any]) -> Preference:
  """Returns the preference with the optional columns and the tools that its record gives.

  Raises:
    RecordError: a column that is no number in its range, tools that are no list.
  """
  return dataclasses.replace(preference, tools=_tools(record), **_columns(record))


def check(preference: Preference) -> None:
  """Refuses what no run could learn from.

  Raises:
    RecordError: text that is no Unicode or no JSON, an empty response, identical responses, a
      response that is not the assistant's, tools without a chat to show them in.
  """
  for name in ('prompt', 'chosen', 'rejected'):
    text = getattr(preference, name)
    _check_unicode(name, text)
    if isinstance(text, list):
      _check_chat(name, text)
    elif name != 'prompt':
      spans = target_spans(text, getattr(preference, f'{name}_context'))
      if not any(text[start:end].strip() for start, end in spans):
        raise RecordError('empty response', f'{name} has no text')
  if preference.chosen == preference.rejected:
    raise RecordError('identical responses', 'chosen equals rejected')
  if preference.tools:
    _check_unicode('tools', preference.tools)
    if isinstance(preference.prompt, str):
      raise RecordError('wrong type', 'tools need a chat: prompt, chosen and rejected are strings')


def target_spans(response: str, context: Iterable[Span]) -> list[Span]:
  """Returns what of a response lies between the turns of others."""
  ends = [0, *(end for span in context for end in span), len(response)]
  return list(zip(ends[::2], ends[1::2], strict=True))


def _check_unicode(name: str, text: Any) -> None:
  try:
    json.dumps(text, ensure_ascii=False, allow_nan=False).encode()
  except UnicodeEncodeError as error:
    raise RecordError('lone surrogate', f'{name} is no Unicode text: {error.reason}') from None
  except (TypeError, ValueError, RecursionError) as error:  # rows of tables hold dates and bytes
    raise RecordError('wrong type', f'{name} is no JSON: {error}') from None


def _check_chat(name: str, chat: list[Message]) -> None:
  for message in chat:
    if not isinstance(message, dict) or not isinstance(message.get('role'), str):
      raise RecordError('wrong type', f'{name} holds {message!r:.80}, which has no "role"')
    if not message.get('tool_calls') and not isinstance(message.get('content'), str | list):
      raise RecordError('wrong type', f'a message of {name} has no text as its "content"')
  if name == 'prompt':
    return
  if not chat:
    raise RecordError('empty response', f'{name} has no messages')
  if chat[0]['role'] != 'assistant':
    raise RecordError(
      'wrong role', f'{name} starts with a turn of {chat[0]["role"]!r}, not of the assistant'
    )
  last = chat[-1]
  if last['role'] != 'assistant':
    raise RecordError('wrong role', f'{name} ends with a turn of {last["role"]!r}')
  if not last.get('tool_calls') and not (last['content'] and str(last['content']).strip()):
    raise RecordError('empty response', f'{name} has no text')


def _tools(record: dict[str, Any]) -> list[Any] | None:
  tools = record.get('tools')
  if isinstance(tools, str):  # as tables hold what has no schema
    try:
      tools = json.loads(tools) if tools else None
    except (ValueError, RecursionError) as error:
      raise RecordError('wrong type', f'tools is a string that is no JSON: {error}') from None
  if tools is not None and not isinstance(tools, list):
    raise RecordError('wrong type', f'tools is a {type(tools).__name__}, not a list')
  return tools or None


def _columns(record: dict[str, Any]) -> dict[str, float]:
  """Returns the optional numbers of a record that are present."""
  columns = {key: record[key] for key in COLUMNS if record.get(key) is not None}
  for key, value in columns.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise RecordError('wrong type', f'{key} is {value!r:.40}, not a number')
    if not abs(value) < math.inf or abs(value) > 1e30:  # float32 must hold it
      raise RecordError('number out of range', f'{key} {value!r:.40}')
  if not 0 <= columns.get('chosen_probability', 0) <= 1:
    raise RecordError('number out of range', f'chosen_probability {columns["chosen_probability"]}')
  if columns.get('weight', 0) < 0:
    raise RecordError('number out of range', f'weight {columns["weight"]} is negative')
  return {key: float(value) for key, value in columns.items()}
