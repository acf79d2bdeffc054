"""Every format gives the same Preference for the same comparison, and refuses what is none."""

import json
import math

import pytest

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.formats import FORMATS, FormatOptions, to_preferences
from dpo_flax.data.records.preference import Preference


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


def to_preference(record, format='auto', **options):
  """Returns the one preference of a record, and its format."""
  (preference,), name = to_preferences(record, FormatOptions(format, **options))
  return preference, name


TURNS = [user('Hi'), assistant('Hello'), user('2 + 2?')]
CHAT = Preference(TURNS, [assistant('4')], [assistant('5')])
BEGIN = '\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?\n\nAssistant:'


@pytest.mark.parametrize(
  ('name', 'record', 'expected'),
  [
    ('explicit', {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, Preference('a', 'b', 'c')),
    ('explicit', {'prompt': TURNS, 'chosen': CHAT.chosen, 'rejected': CHAT.rejected}, CHAT),
    ('implicit', {'chosen': [*TURNS, assistant('4')], 'rejected': [*TURNS, assistant('5')]}, CHAT),
    ('messages', {'messages': [*TURNS, assistant('4')], 'rejected': CHAT.rejected}, CHAT),
    ('messages', {'messages': [*TURNS, assistant('4')], 'rejected': assistant('5')}, CHAT),
    ('messages', {'messages': [*TURNS, assistant('4')], 'rejected': '5'}, CHAT),
    (
      'hh',
      {'chosen': f'{BEGIN} 4 it is', 'rejected': f'{BEGIN} 4 or 5'},
      Preference(BEGIN, ' 4 it is', ' 4 or 5'),
    ),
  ],
)
def test_auto_recognises_each_format(name, record, expected):
  assert to_preference(record) == (expected, name)
  assert to_preference(record, name) == (expected, name)
  assert name in FORMATS


def test_chats_that_part_early_have_all_that_follows_as_response():
  chosen = [user('Hi'), assistant('A'), user('Go on'), assistant('B')]
  rejected = [user('Hi'), assistant('C'), user('Stop'), assistant('D')]
  preference, _ = to_preference({'chosen': chosen, 'rejected': rejected})
  assert preference == Preference([user('Hi')], chosen[1:], rejected[1:])


def test_transcripts_that_part_early_have_the_later_turns_of_the_human_as_context():
  late = '\n\nHuman: Sure?\n\nAssistant:'
  preference, name = to_preference(
    {'chosen': f'{BEGIN} 4{late} Yes{late} Yes!', 'rejected': f'{BEGIN} 5'}
  )
  assert (name, preference.prompt) == ('hh', BEGIN)
  assert preference.chosen == f' 4{late} Yes{late} Yes!'
  assert [preference.chosen[a:b] for a, b in preference.chosen_context] == [late, late]
  assert preference.rejected_context == ()


def test_tools_are_a_list_or_its_json():
  record = {'prompt': TURNS, 'chosen': CHAT.chosen, 'rejected': CHAT.rejected}
  tools = [{'type': 'function', 'function': {'name': 'add'}}]
  for given in (tools, json.dumps(tools)):
    assert to_preference({**record, 'tools': given})[0].tools == tools
  for nothing in (None, [], ''):
    assert to_preference({**record, 'tools': nothing})[0] == CHAT
  assert to_preference({**record, 'tools': tools})[0].prompt_hash != CHAT.prompt_hash


def test_fields_move_a_record_s_keys_to_the_names_the_formats_know():
  record = {'ask': 'a', 'good': 'b', 'bad': 'c', 'rating': 2, 'prompt': 'other'}
  fields = {'prompt': 'ask', 'chosen': 'good', 'rejected': 'bad', 'margin': 'rating'}
  preference, name = to_preference(record, fields=fields)
  assert (preference, name) == (Preference('a', 'b', 'c', margin=2.0), 'explicit')
  swapped = to_preference(
    {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
    fields={'chosen': 'rejected', 'rejected': 'chosen'},
  )[0]
  assert (swapped.chosen, swapped.rejected) == ('c', 'b')
  with pytest.raises(RecordError, match="takes 'margin' from 'score'"):
    to_preference(record, fields={**fields, 'margin': 'score'})


def test_columns_pass_through_and_other_keys_are_ignored():
  record = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'source': 'x'}
  record |= {'chosen_probability': 0.75, 'margin': 2, 'weight': 0.5}
  preference, _ = to_preference(record)
  assert (preference.chosen_probability, preference.margin, preference.weight) == (0.75, 2.0, 0.5)
  assert to_preference({**record, 'margin': None})[0].margin is None


@pytest.mark.parametrize(
  ('record', 'reason'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, 'unknown format'),
    ({'text': 'a'}, 'unknown format'),
    ({'chosen': 'a', 'rejected': 'b'}, 'unknown format'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'messages': []}, 'ambiguous format'),
    ({'prompt': 'a', 'chosen': ' \n', 'rejected': 'c'}, 'empty response'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'identical responses'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 3}, 'unknown format'),
    ({'prompt': 'a', 'chosen': 'b\ud800', 'rejected': 'c'}, 'lone surrogate'),
    ({'prompt': [user('\udfff')], 'chosen': [assistant('b')], 'rejected': []}, 'lone surrogate'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': None}, 'unknown format'),
    ({'prompt': 'a', 'chosen': CHAT.chosen, 'rejected': CHAT.rejected}, 'no shared prompt'),
    ({'prompt': TURNS, 'chosen': [assistant('')], 'rejected': CHAT.rejected}, 'empty response'),
    ({'prompt': TURNS, 'chosen': [], 'rejected': CHAT.rejected}, 'empty response'),
    ({'prompt': TURNS, 'chosen': [user('4')], 'rejected': CHAT.rejected}, 'wrong role'),
    ({'prompt': TURNS, 'chosen': ['4'], 'rejected': CHAT.rejected}, 'wrong type'),
    ({'chosen': TURNS, 'rejected': TURNS}, 'identical responses'),
    ({'chosen': [*TURNS, assistant('4')], 'rejected': TURNS}, 'empty response'),
    ({'chosen': f'{BEGIN} 4', 'rejected': '\n\nHuman: Ho\n\nAssistant: 5'}, 'no shared prompt'),
    ({'chosen': f'{BEGIN} 4', 'rejected': BEGIN}, 'empty response'),
    ({'chosen': f'{BEGIN} 4\n\nHuman: No', 'rejected': f'{BEGIN} 5'}, 'wrong role'),
    ({'chosen': f'{BEGIN} 4\n\nHuman: No\n\nAssistant:', 'rejected': f'{BEGIN} 5'}, 'wrong role'),
    ({'messages': [], 'rejected': 'x'}, 'empty response'),
    ({'messages': TURNS, 'chosen': TURNS, 'rejected': TURNS}, 'ambiguous format'),
    ({'prompt': 'a', 'question': 'b', 'chosen': 'c', 'rejected': 'd'}, 'ambiguous format'),
    (
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'chosen_probability': 1.5},
      'number out of range',
    ),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 'big'}, 'wrong type'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'weight': True}, 'wrong type'),
    (
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'weight': math.nan},
      'number out of range',
    ),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 10**400}, 'number out of range'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'tools': [{}]}, 'wrong type'),
    ({'prompt': TURNS, 'chosen': CHAT.chosen, 'rejected': CHAT.rejected, 'tools': 3}, 'wrong type'),
    ({'prompt': TURNS, 'chosen': CHAT.chosen, 'rejected': [assistant({1})]}, 'wrong type'),
  ],
)
def test_records_that_are_no_comparison_are_refused(record, reason):
  with pytest.raises(RecordError) as error:
    to_preference(record)
  assert error.value.reason == reason


def test_a_format_that_was_set_is_not_guessed():
  with pytest.raises(RecordError, match="'prompt' is not among"):
    to_preference({'chosen': 'a', 'rejected': 'b'}, 'explicit')


def test_a_system_key_becomes_the_system_turn():
  system = {'role': 'system', 'content': 'Be brief.'}
  texts = {'system': 'Be brief.', 'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.'}
  (preference,), _ = to_preferences(texts, FormatOptions())
  assert preference.prompt == [system, {'role': 'user', 'content': 'Why?'}]
  assert preference.chosen == [{'role': 'assistant', 'content': 'So.'}]
  user = {'role': 'user', 'content': 'Why?'}
  chat = texts | {'prompt': [user]}
  chat |= {name: [{'role': 'assistant', 'content': texts[name]}] for name in ('chosen', 'rejected')}
  for prompt in ([user], [system, user]):
    (preference,), _ = to_preferences(chat | {'prompt': prompt}, FormatOptions())
    assert preference.prompt == [system, user]
  other = {'role': 'system', 'content': 'Be long.'}
  with pytest.raises(RecordError, match='two system turns'):
    to_preferences(chat | {'prompt': [other, user]}, FormatOptions())
  transcript = {name: f'\n\nHuman: Why?\n\nAssistant: {name}' for name in ('chosen', 'rejected')}
  with pytest.raises(RecordError, match='system beside a transcript'):
    to_preferences(transcript | {'system': 'Be brief.'}, FormatOptions())


def test_a_prompt_repeated_in_its_responses_is_refused():
  prompt = 'What is the capital of France?'
  whole = {'prompt': prompt, 'chosen': f'{prompt} Paris.', 'rejected': f'{prompt} London.'}
  with pytest.raises(RecordError, match='prompt inside the responses'):
    to_preferences(whole, FormatOptions())
  hello = {'prompt': 'Hello', 'chosen': 'Hello! What is new?', 'rejected': 'Hello there.'}
  to_preferences(hello, FormatOptions())
