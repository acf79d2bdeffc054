"""Each data set's records, as it publishes them, are recognised and read as its card says."""

import pytest

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.formats import FormatOptions, to_preferences

SHP = {
  'post_id': 'qt3nxl',
  'domain': 'askculinary_train',
  'upvote_ratio': 0.98,
  'history': 'What is the best way to keep basil?',
  'c_root_id_A': 'hkh25sc',
  'c_root_id_B': 'hkh25lp',
  'created_at_utc_A': 1636822112,
  'created_at_utc_B': 1636822110,
  'score_A': 340,
  'score_B': 166,
  'human_ref_A': 'In a glass of water.',
  'human_ref_B': 'In the fridge.',
  'labels': 1,
  'seconds_difference': 2.0,
  'score_ratio': 2.048,
}
WEBGPT = {
  'question': {'dataset': 'triviaqa', 'id': 'jb_6', 'full_text': 'Voiced by whom is Gort?'},
  'quotes_0': {'title': ['Gort'], 'extract': ['Gort is a robot.']},
  'answer_0': 'Nobody [1].',
  'tokens_0': {'prefix': [5195], 'completion': [27]},
  'score_0': -0.5,
  'quotes_1': {'title': [], 'extract': []},
  'answer_1': 'Gort does not speak.',
  'tokens_1': {'prefix': [5195], 'completion': [27]},
  'score_1': 0.5,
}
BINARIZED = {
  'prompt': 'how can i develop a habit of drawing daily',
  'prompt_id': '086b3e24',
  'chosen': [
    {'content': 'how can i develop a habit of drawing daily', 'role': 'user'},
    {'content': 'Set a time.', 'role': 'assistant'},
  ],
  'rejected': [
    {'content': 'how can i develop a habit of drawing daily', 'role': 'user'},
    {'content': 'As an AI, I cannot draw.', 'role': 'assistant'},
  ],
  'messages': [
    {'content': 'how can i develop a habit of drawing daily', 'role': 'user'},
    {'content': 'Set a time.', 'role': 'assistant'},
  ],
  'score_chosen': 8.5,
  'score_rejected': 7.5,
}
ORCA = {
  'system': 'You are an AI assistant.',
  'question': 'Generate a sentence about Midsummer House.',
  'chosen': 'Midsummer House is a Chinese restaurant.',
  'rejected': 'Sure! Here is a sentence.',
}


def _completion(text, score, grade):
  return {
    'annotations': {'honesty': {'Rating': '3', 'Rationale': '...'}},
    'custom_system_prompt': 'Be honest.',
    'model': 'alpaca-7b',
    'principle': 'honesty',
    'response': text,
    'critique': '...',
    'overall_score': score,
    'fine-grained_score': grade,
  }


ULTRAFEEDBACK = {
  'source': 'evol_instruct',
  'instruction': 'Name a prime.',
  'models': ['alpaca-7b', 'bard', 'gpt-4', 'llama'],
  'completions': [
    _completion('Nine.', 2.0, 1.0),
    _completion('Seven.', 8.0, 5.0),
    _completion('Four.', 1.0, 2.0),
    _completion('Eleven.', 8.0, 4.75),
  ],
  'correct_answers': ['None'],
  'incorrect_answers': ['None'],
}


def read(record, **options):
  return to_preferences(record, FormatOptions(**options))


def texts(preferences):
  """Returns (prompt, chosen, rejected) of chats of one turn each."""
  return [
    tuple(chat[-1]['content'] for chat in (p.prompt, p.chosen, p.rejected)) for p in preferences
  ]


@pytest.mark.parametrize(
  ('name', 'record', 'expected'),
  [
    ('shp', SHP, (SHP['history'], SHP['human_ref_A'], SHP['human_ref_B'])),
    ('shp', {**SHP, 'labels': 0}, (SHP['history'], SHP['human_ref_B'], SHP['human_ref_A'])),
    ('webgpt', WEBGPT, ('Voiced by whom is Gort?', 'Gort does not speak.', 'Nobody [1].')),
    ('binarized', BINARIZED, (BINARIZED['prompt'], 'Set a time.', 'As an AI, I cannot draw.')),
    ('orca', ORCA, (ORCA['question'], ORCA['chosen'], ORCA['rejected'])),
  ],
)
def test_a_published_record_is_recognised_and_read(name, record, expected):
  preferences, found = read(record)
  assert (texts(preferences), found) == ([expected], name)
  assert read(record, format=name) == (preferences, name)
  (preference,) = preferences
  assert [turn['role'] for turn in (*preference.chosen, *preference.rejected)] == ['assistant'] * 2
  assert preference.margin is preference.weight is preference.chosen_probability is None


def test_orca_s_system_prompt_is_a_turn_unless_it_is_empty():
  (preference,), _ = read(ORCA)
  assert [turn['role'] for turn in preference.prompt] == ['system', 'user']
  (preference,), _ = read({**ORCA, 'system': ''})
  assert [turn['role'] for turn in preference.prompt] == ['user']


def test_ultrafeedback_takes_the_best_against_another():
  preferences, name = read(ULTRAFEEDBACK, completions='best_vs_worst')
  assert (texts(preferences), name) == ([('Name a prime.', 'Seven.', 'Four.')], 'ultrafeedback')
  drawn = set()
  for i in range(20):
    record = {**ULTRAFEEDBACK, 'source': str(i)}
    (preference,) = texts(read(record)[0])
    assert texts(read(record)[0]) == [preference]  # drawn anew, the same
    assert preference[1] == 'Seven.'
    drawn.add(preference[2])
  assert drawn == {'Nine.', 'Four.'}  # never its equal


def test_ultrafeedback_gives_all_ordered_pairs():
  preferences, _ = read(ULTRAFEEDBACK, completions='all')
  pairs = {(chosen, rejected) for _, chosen, rejected in texts(preferences)}
  primes, others = ('Seven.', 'Eleven.'), ('Nine.', 'Four.')
  assert pairs == {(p, o) for p in primes for o in others} | {('Nine.', 'Four.')}
  assert len(preferences) == len(pairs)


def test_another_score_of_ultrafeedback_may_be_chosen():
  fields = {'completions.overall_score': 'fine-grained_score'}
  preferences, _ = read(ULTRAFEEDBACK, completions='best_vs_worst', fields=fields)
  assert texts(preferences) == [('Name a prime.', 'Seven.', 'Nine.')]


@pytest.mark.parametrize(
  ('record', 'reason'),
  [
    ({**SHP, 'labels': 2}, 'number out of range'),
    ({**SHP, 'human_ref_A': ' '}, 'empty response'),
    ({**WEBGPT, 'score_1': -0.5}, 'tie'),
    ({**WEBGPT, 'score_1': None}, 'missing key'),
    ({**WEBGPT, 'question': {'id': 'x'}}, 'missing key'),
    ({**BINARIZED, 'prompt': 'something else'}, 'no shared prompt'),
    ({**BINARIZED, 'rejected': BINARIZED['rejected'][1:]}, 'no shared prompt'),
    ({**BINARIZED, 'rejected': []}, 'no shared prompt'),
    ({**ORCA, 'system': 3}, 'wrong type'),
    ({**ULTRAFEEDBACK, 'completions': []}, 'tie'),
    ({**ULTRAFEEDBACK, 'completions': ['Nine.']}, 'wrong type'),
    ({**ULTRAFEEDBACK, 'completions': [_completion('Nine.', 'N/A', 1)] * 2}, 'wrong type'),
    ({**ULTRAFEEDBACK, 'completions': [_completion('Nine.', 1, 1)] * 2}, 'tie'),
  ],
)
def test_records_that_prefer_nothing_are_refused(record, reason):
  for completions in ('best_vs_worst', 'best_vs_random', 'all'):
    with pytest.raises(RecordError) as error:
      read(record, completions=completions)
    assert error.value.reason == reason
