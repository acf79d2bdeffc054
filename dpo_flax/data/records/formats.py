r"""Raw records of many shapes -> Preference(prompt, chosen, rejected).

Every format is one function from a record's dict to a Preference:

  explicit  {prompt, chosen, rejected}: three strings, or three lists of chat messages
  implicit  {chosen, rejected}: two complete chats; the prompt is the beginning they share
  messages  {messages, rejected}: a complete chat, and another answer instead of its last turn
  hh        {chosen, rejected}: two transcripts '\n\nHuman: ... \n\nAssistant: ...'

A key `system` beside any of these is the chat's system turn. published.py holds those of single
data sets: shp, webgpt, binarized, ultrafeedback, orca.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from dpo_flax.data.records import published
from dpo_flax.data.records.fields import RecordError, get, get_chat, get_text, rename, shared_length
from dpo_flax.data.records.preference import Preference, Span, check, with_extras

_ASSISTANT = '\n\nAssistant:'
_OTHERS = re.compile('\n\nHuman:.*?(?:\n\nAssistant:|$)', re.DOTALL)  # the turns of the user


@dataclasses.dataclass(frozen=True)
class FormatOptions:
  """How records are read; config.data explains each."""

  format: str = 'auto'
  fields: dict[str, str] = dataclasses.field(default_factory=dict)  # our name -> the record's
  completions: str = 'best_vs_random'  # ultrafeedback: which completions make pairs


def to_preferences(record: dict[str, Any], options: FormatOptions) -> tuple[list[Preference], str]:
  """Returns the checked comparisons of a record, at least one, and the name of its format.

  Raises:
    RecordError: a missing key, a wrong type, an empty response, identical responses.
  """
  record = rename(record, options.fields)
  name = recognise(record) if options.format == 'auto' else options.format
  if name == 'ultrafeedback':
    preferences = published.ultrafeedback(record, options.completions)
  else:
    preferences = [FORMATS[name](record)]
  if record.get('system') and name in _WITHOUT_SYSTEM:
    preferences = [_with_system(preference, record) for preference in preferences]
  preferences = [with_extras(preference, record) for preference in preferences]
  for preference in preferences:
    check(preference)
  return preferences, name


def recognise(record: dict[str, Any]) -> str:
  """Names the format of a record by its keys and the types of their values.

  The signature that explains all that the others do wins; so a record with both 'prompt' and
  'messages' beside its answers is ambiguous, and one with 'question' instead of 'prompt' is not.

  Raises:
    RecordError: no format fits, or several do.
  """
  fitting = [
    (name, signature.keys())
    for name, signature in _SIGNATURES
    if all(isinstance(record.get(key), type_) for key, type_ in signature.items())
  ]
  best = [name for name, keys in fitting if all(keys >= other for _, other in fitting)]
  if not fitting:
    types = ', '.join(f'{key} ({type(value).__name__})' for key, value in record.items())
    raise RecordError('unknown format', f'no format fits {types or "an empty record"}'[:500])
  if not best:
    names = ' and '.join(sorted({name for name, _ in fitting}))
    raise RecordError('ambiguous format', f'{names} fit: set data.format')
  if best[0] == 'hh' and not all(_ASSISTANT in record[key] for key in ('chosen', 'rejected')):
    raise RecordError(
      'unknown format', 'chosen and rejected are strings without a prompt or an "Assistant:" turn'
    )
  return best[0]


_SIGNATURES: tuple[tuple[str, dict[str, type | tuple[type, ...]]], ...] = (
  ('explicit', {'prompt': str, 'chosen': str, 'rejected': str}),
  ('explicit', {'prompt': list, 'chosen': list, 'rejected': list}),
  ('implicit', {'chosen': list, 'rejected': list}),
  ('messages', {'messages': list, 'rejected': (str, dict, list)}),
  ('hh', {'chosen': str, 'rejected': str}),
  ('shp', {'history': str, 'human_ref_A': str, 'human_ref_B': str, 'labels': int}),
  ('webgpt', {'question': dict, 'answer_0': str, 'answer_1': str, 'score_0': (int, float)}),
  ('binarized', {'prompt': str, 'chosen': list, 'rejected': list}),
  ('binarized', {'prompt': str, 'chosen': list, 'rejected': list, 'messages': list}),
  ('ultrafeedback', {'instruction': str, 'completions': list}),
  ('orca', {'question': str, 'chosen': str, 'rejected': str}),
)


_WITHOUT_SYSTEM = ('explicit', 'implicit', 'messages', 'hh')  # formats that have no such key
_ECHO = 20  # characters: a shorter prompt may well be how an answer begins


def _with_system(preference: Preference, record: dict[str, Any]) -> Preference:
  """Returns the preference as a chat that begins with the record's `system`."""
  turn = {'role': 'system', 'content': get_text(record, 'system')}
  if isinstance(preference.prompt, list):
    if preference.prompt[:1] == [turn]:
      return preference
    if any(message.get('role') == 'system' for message in preference.prompt):
      raise RecordError('two system turns', 'the chat has one, and the key "system" holds another')
    return dataclasses.replace(preference, prompt=[turn, *preference.prompt])
  if preference.chosen_context or preference.rejected_context or _ASSISTANT in preference.prompt:
    raise RecordError('system beside a transcript', 'there is no place for the key "system" in it')
  user = {'role': 'user', 'content': preference.prompt}
  return published.answers([turn, user], preference.chosen, preference.rejected)


def explicit(record: dict[str, Any]) -> Preference:
  """{prompt, chosen, rejected}, all strings or all chats."""
  prompt, chosen, rejected = (get(record, key) for key in ('prompt', 'chosen', 'rejected'))
  types = [type(text) for text in (prompt, chosen, rejected)]
  if types not in ([str] * 3, [list] * 3):
    names = ', '.join(type_.__name__ for type_ in types)
    raise RecordError(
      'wrong type',
      f'prompt, chosen, rejected are {names}; they must be three strings or three chats',
    )
  echoes = isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt)
  if echoes and len(prompt.strip()) >= _ECHO:
    raise RecordError(
      'prompt inside the responses',
      'chosen and rejected both begin with the whole prompt, which would be scored as their text: '
      'take it off them',
    )
  return Preference(prompt, chosen, rejected)


def implicit(record: dict[str, Any]) -> Preference:
  """{chosen, rejected}, two complete chats. All that follows where they part is response."""
  chosen, rejected = get_chat(record, 'chosen'), get_chat(record, 'rejected')
  shared = shared_length(chosen, rejected)
  if shared == len(chosen) == len(rejected):
    raise RecordError('identical responses', 'chosen equals rejected')
  return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def messages(record: dict[str, Any]) -> Preference:
  """{messages, rejected}: the last turn of messages is chosen; rejected is its text or its turn."""
  chat, rejected = get_chat(record, 'messages'), get(record, 'rejected')
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
  Where the transcripts part before their last turn, the later turns of the human are no targets.
  """
  chosen, rejected = get_text(record, 'chosen'), get_text(record, 'rejected')
  if chosen == rejected:
    raise RecordError('identical responses', 'chosen equals rejected')
  turn = chosen.rfind(_ASSISTANT, 0, shared_length(chosen, rejected))
  if turn < 0:
    raise RecordError('no shared prompt', 'the transcripts part before the first "Assistant:" turn')
  end = turn + len(_ASSISTANT)
  return Preference(
    chosen[:end],
    chosen[end:],
    rejected[end:],
    chosen_context=_human_turns('chosen', chosen[end:]),
    rejected_context=_human_turns('rejected', rejected[end:]),
  )


def _human_turns(name: str, response: str) -> tuple[Span, ...]:
  """Returns the turns of the human, from the end of one answer to the beginning of the next."""
  spans = tuple(match.span() for match in _OTHERS.finditer(response))
  if spans and spans[-1][1] == len(response):
    raise RecordError('wrong role', f'{name} does not end with an answer of the assistant')
  return spans


_OF_DATA_SETS = (published.shp, published.webgpt, published.binarized, published.orca)
FORMATS: dict[str, Callable[[dict[str, Any]], Preference]] = {
  function.__name__: function for function in (explicit, implicit, messages, hh, *_OF_DATA_SETS)
}
