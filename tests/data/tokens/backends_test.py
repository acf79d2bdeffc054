"""Encoding word by word gives the ids of the whole text, for models of every kind."""

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dpo_flax.data.tokens.backends import SentencePieceBackend
from dpo_flax.data.tokens.chat_template import ChatTemplate

LINES = [
  'the cat likes tea',
  'a model  reads two letters',
  'Zoë answers: 42!',
  'us\tand  them',
] * 20

KINDS = {
  'bpe': {'model_type': 'bpe', 'byte_fallback': True},
  'bpe with NFKC': {'model_type': 'bpe', 'normalization_rule_name': 'nmt_nfkc'},
  'bpe, spaces kept': {'model_type': 'bpe', 'remove_extra_whitespaces': False},
  'bpe across words': {'model_type': 'bpe', 'split_by_whitespace': False},
  'bpe, spaces behind': {'model_type': 'bpe', 'treat_whitespace_as_suffix': True},
  'unigram': {'model_type': 'unigram', 'hard_vocab_limit': False},
}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """(our backend, the library's own model) for each kind."""
  directory, made = tmp_path_factory.mktemp('models'), {}
  for name, options in KINDS.items():
    path = directory / name
    with path.open('wb') as file:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=file,
        vocab_size=300 if options.get('byte_fallback') else 60,
        minloglevel=2,
        **options,
      )
    theirs = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(path.read_bytes())
    made[name] = SentencePieceBackend(path.read_bytes(), {}), theirs
  return made


words = st.sampled_from(
  ['the', 'cat', ' ', '  ', '\u2581', '\t', '\n', 'letters', 'Zoë', 'ﬁ', '42!']
)
texts = st.lists(words | st.text(max_size=3), max_size=20).map(''.join)


@pytest.mark.parametrize('name', KINDS)
@given(text=texts)
def test_ids_are_those_of_the_whole_text(models, name, text):
  ours, theirs = models[name]
  assert ours.encode(text) == theirs.encode(text)
  assert ours.encode(text) == theirs.encode(text)  # now from memory


def test_long_words_are_not_remembered(models):
  ours, theirs = models['bpe']
  before = len(ours._words)
  assert ours.encode('x' * 1000) == theirs.encode('x' * 1000)
  assert len(ours._words) == before


@pytest.mark.parametrize(
  'settings',
  [
    {'added_tokens_decoder': {'3': {'content': '<end_of_turn>', 'special': True}}},
    {'additional_special_tokens': ['<end_of_turn>']},
    {'eos_token': {'content': '<end_of_turn>'}},
  ],
  ids=lambda settings: next(iter(settings)),
)
def test_control_tokens_defined_by_the_user_are_not_found_in_text(tmp_path, settings):
  """As Gemma's models hold them, beside pieces that are text: <b>."""
  path = tmp_path / 'tokenizer.model'
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(LINES),
      model_writer=file,
      vocab_size=300,
      model_type='bpe',
      byte_fallback=True,
      user_defined_symbols=['<end_of_turn>', '<b>'],
      minloglevel=2,
    )
  text = 'the<end_of_turn> <b>cat'
  theirs = sentencepiece.SentencePieceProcessor()
  theirs.LoadFromSerializedProto(path.read_bytes())
  turn, bold = (theirs.piece_to_id(piece) for piece in ('<end_of_turn>', '<b>'))
  assert turn in theirs.encode(text)
  ours = SentencePieceBackend(path.read_bytes(), settings)
  assert turn not in ours.encode(text)
  assert bold in ours.encode(text)
  assert ours.decode(ours.encode(text)) == text
  assert ours.controls['<end_of_turn>'] == turn
  assert ours.decode([turn]) == '<end_of_turn>'
  template = ChatTemplate(
    '{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}',
    controls=list(ours.controls),
    typed=sorted(ours.special),
    variables={},
  )
  rendered = template.render_prompt([{'role': 'user', 'content': text}])
  ids = ours.encode_chat(rendered, template)
  assert ids == [*ours.encode(text), turn]


def test_added_tokens_that_are_not_special_do_not_end_a_turn(sentencepiece_directory):
  content = (sentencepiece_directory / 'tokenizer.model').read_bytes()
  tokens = {'400': {'content': '</answer>', 'special': False}}
  tokens['401'] = {'content': '<end_of_turn>', 'special': True}
  backend = SentencePieceBackend(content, {'added_tokens_decoder': tokens})
  assert backend.controls.keys() >= {'<s>', '</s>', '</answer>', '<end_of_turn>'}
  assert backend.special == backend.controls.keys() - {'</answer>'}
