r"""Raw records of several shapes -> Preference(prompt, chosen, rejected).

Every format is one function from the record's dict to a Preference:

  explicit  {prompt, chosen, rejected}: three strings, or three lists of chat messages
  implicit  {chosen, rejected}: two whole chats; the prompt is the beginning they share
  messages  {messages, rejected}: a whole chat, and another answer in place of its last turn
  hh        {chosen, rejected}: two transcripts '\n\nHuman: ... \n\nAssistant: ...'
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from dpo_flax.data.source import RecordError

Message = dict[str, Any]  # at least 'role'; 'content' for all but tool calls
Text = str | list[Message]

_ASSISTANT = '\n\nAssistant:'
_COLUMNS = ('chosen_probability', 'margin', 'weight')


@dataclasses.dataclass(frozen=True)
class Preference:
  """One comparison. The three texts are all strings or all lists of chat messages."""

  prompt: Text
  chosen: Text
  rejected: Text
  chosen_probability: float | None = None  # that chosen is the better one, in [0, 1]
  margin: float | None = None  # by how much, on the data set's own scale
  weight: float | None = None  # of this pair in the loss

  @property
  def prompt_key(self) -> bytes:
    """The prompt alone, as bytes: equal prompts have equal keys."""
    return json.dumps(self.prompt, sort_keys=True).encode()


def to_preference(record: dict[str, Any], format: str = 'auto') -> tuple[Preference, str]:
  """Returns the record as a checked Preference, and the name of the format that was used.

  Raises:
    RecordError: a missing key, a wrong type, an empty response, identical responses.
  """
  name = recognise(record) if format == 'auto' else format
  preference = FORMATS[name](record)
  _check_texts(preference)
  return dataclasses.replace(preference, **_columns(record)), name


def recognise(record: dict[str, Any]) -> str:
  """Names the format of a record by its keys and the types of their values."""
  keys = {'prompt', 'chosen', 'rejected', 'messages'} & record.keys()
  kinds = {type(record[key]) for key in ('chosen', 'rejected') if key in keys}
  if keys == {'prompt', 'chosen', 'rejected'}:
    return 'explicit'
  if keys == {'messages', 'rejected'}:
    return 'messages'
  if keys == {'chosen', 'rejected'} and kinds == {list}:
    return 'implicit'
  if keys == {'chosen', 'rejected'} and kinds == {str}:
    if all(_ASSISTANT in record[key] for key in keys):
      return 'hh'
    raise RecordError(
      'unknown format', 'chosen and rejected are strings without a prompt or an "Assistant:" turn'
    )
  if len(keys) == 4 or keys == {'messages', 'chosen', 'rejected'}:
    raise RecordError('ambiguous format', f'{sorted(keys)} fit several: set data.format')
  raise RecordError(
    'unknown format',
    f'no format fits the keys {sorted(record)}: expected prompt, chosen, rejected; or chosen, '
    'rejected; or messages, rejected',
  )


def explicit(record: dict[str, Any]) -> Preference:
  """{prompt, chosen, rejected}, all strings or all chats."""
  prompt, chosen, rejected = (_get(record, key) for key in ('prompt', 'chosen', 'rejected'))
  kinds = [type(text) for text in (prompt, chosen, rejected)]
  if kinds not in ([str] * 3, [list] * 3):
    names = ', '.join(kind.__name__ for kind in kinds)
    raise RecordError(
      'wrong type',
      f'prompt, chosen, rejected are {names}; they must be three strings or three chats',
    )
  return Preference(prompt, chosen, rejected)


def implicit(record: dict[str, Any]) -> Preference:
  """{chosen, rejected}, two whole chats. All that follows where they part is response."""
  chosen, rejected = _chat(record, 'chosen'), _chat(record, 'rejected')
  shared = _shared(chosen, rejected)
  if shared == len(chosen) == len(rejected):
    raise RecordError('identical responses', 'chosen equals rejected')
  return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def messages(record: dict[str, Any]) -> Preference:
  """{messages, rejected}: the last turn of messages is chosen; rejected is its text or its turn."""
  chat, rejected = _chat(record, 'messages'), _get(record, 'rejected')
  if not chat:
    raise RecordError('empty response', 'messages is empty')
  if isinstance(rejected, str):
    rejected = [{'role': 'assistant', 'content': rejected}]
  elif isinstance(rejected, dict):
    rejected = [rejected]
  elif not isinstance(rejected, list):
    raise RecordError(
      'wrong type', f'rejected is a {type(rejected).__name__}, not a text or a turn'
    )
  return Preference(chat[:-1], chat[-1:], rejected)


def hh(record: dict[str, Any]) -> Preference:
  r"""Two transcripts. The prompt ends with the last '\n\nAssistant:' they share.

  The response begins right behind it, with its leading space (Bai et al. 2022, arXiv:2204.05862).
  """
  chosen, rejected = _string(record, 'chosen'), _string(record, 'rejected')
  if chosen == rejected:
    raise RecordError('identical responses', 'chosen equals rejected')
  turn = chosen.rfind(_ASSISTANT, 0, _shared(chosen, rejected))
  if turn < 0:
    raise RecordError('no shared prompt', 'the transcripts part before the first "Assistant:" turn')
  end = turn + len(_ASSISTANT)
  return Preference(chosen[:end], chosen[end:], rejected[end:])


FORMATS: dict[str, Callable[[dict[str, Any]], Preference]] = {
  'explicit': explicit,
  'implicit': implicit,
  'messages': messages,
  'hh': hh,
}


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
  """Returns the length of the longest common beginning."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _get(record: dict[str, Any], key: str) -> Any:
  if record.get(key) is None:
    raise RecordError('missing key', f'{key!r} is not among {sorted(record)}')
  return record[key]


def _string(record: dict[str, Any], key: str) -> str:
  value = _get(record, key)
  if not isinstance(value, str):
    raise RecordError('wrong type', f'{key} is a {type(value).__name__}, not a string')
  return value


def _chat(record: dict[str, Any], key: str) -> list[Message]:
  value = _get(record, key)
  if not isinstance(value, list):
    raise RecordError('wrong type', f'{key} is a {type(value).__name__}, not a list of messages')
  return value


def _check_texts(preference: Preference) -> None:
  for name in ('prompt', 'chosen', 'rejected'):
    text = getattr(preference, name)
    try:
      json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      raise RecordError('lone surrogate', f'{name} is no Unicode text: {error.reason}') from None
    if isinstance(text, list):
      _check_chat(name, text)
    elif name != 'prompt' and not text.strip():
      raise RecordError('empty response', f'{name} has no text')
  if preference.chosen == preference.rejected:
    raise RecordError('identical responses', 'chosen equals rejected')


def _check_chat(name: str, chat: list[Message]) -> None:
  for message in chat:
    if not isinstance(message, dict) or not isinstance(message.get('role'), str):
      raise RecordError('wrong type', f'{name} holds {message!r:.80}, which has no "role"')
    content = message.get('content')
    if 'tool_calls' not in message and not isinstance(content, str | list):
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
  if 'tool_calls' not in last and not (last['content'] and str(last['content']).strip()):
    raise RecordError('empty response', f'{name} has no text')


def _columns(record: dict[str, Any]) -> dict[str, float]:
  """Returns the optional numbers of a record that are present."""
  columns = {key: record[key] for key in _COLUMNS if record.get(key) is not None}
  for key, value in columns.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise RecordError('wrong type', f'{key} is {value!r:.40}, not a number')
  if not 0 <= columns.get('chosen_probability', 0) <= 1:
    raise RecordError('number out of range', f'chosen_probability {columns["chosen_probability"]}')
  if columns.get('weight', 0) < 0:
    raise RecordError('number out of range', f'weight {columns["weight"]} is negative')
  return {key: float(value) for key, value in columns.items()}
