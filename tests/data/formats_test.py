"""Every format gives the same Preference for the same comparison, and refuses what is none."""

import pytest

from dpo_flax.data.formats import FORMATS, Preference, to_preference
from dpo_flax.data.source import RecordError


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


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
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 3}, 'wrong type'),
    ({'prompt': 'a', 'chosen': 'b\ud800', 'rejected': 'c'}, 'lone surrogate'),
    ({'prompt': [user('\udfff')], 'chosen': [assistant('b')], 'rejected': []}, 'lone surrogate'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': None}, 'missing key'),
    ({'prompt': 'a', 'chosen': CHAT.chosen, 'rejected': CHAT.rejected}, 'wrong type'),
    ({'prompt': TURNS, 'chosen': [assistant('')], 'rejected': CHAT.rejected}, 'empty response'),
    ({'prompt': TURNS, 'chosen': [], 'rejected': CHAT.rejected}, 'empty response'),
    ({'prompt': TURNS, 'chosen': [user('4')], 'rejected': CHAT.rejected}, 'wrong role'),
    ({'prompt': TURNS, 'chosen': ['4'], 'rejected': CHAT.rejected}, 'wrong type'),
    ({'chosen': TURNS, 'rejected': TURNS}, 'identical responses'),
    ({'chosen': [*TURNS, assistant('4')], 'rejected': TURNS}, 'empty response'),
    ({'chosen': f'{BEGIN} 4', 'rejected': '\n\nHuman: Ho\n\nAssistant: 5'}, 'no shared prompt'),
    ({'chosen': f'{BEGIN} 4', 'rejected': BEGIN}, 'empty response'),
    ({'messages': [], 'rejected': 'x'}, 'empty response'),
    (
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'chosen_probability': 1.5},
      'number out of range',
    ),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 'big'}, 'wrong type'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'weight': True}, 'wrong type'),
  ],
)
def test_records_that_are_no_comparison_are_refused(record, reason):
  with pytest.raises(RecordError) as error:
    to_preference(record)
  assert error.value.reason == reason


def test_a_format_that_was_set_is_not_guessed():
  with pytest.raises(RecordError, match="'prompt' is not among"):
    to_preference({'chosen': 'a', 'rejected': 'b'}, 'explicit')
