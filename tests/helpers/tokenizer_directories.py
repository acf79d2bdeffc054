"""Tokenizers trained on a small text, as directories in Hugging Face layout."""

import itertools
import json

import pytest
import sentencepiece
import tokenizers

SPECIAL = ['<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>']
SPECIAL += ['<|eot_id|>', '<start_of_turn>', '<end_of_turn>']


def _texts():
  subjects = ['the cat', 'a model', 'my friend', 'that river', 'an old book', 'Zoë']
  verbs = ['likes', 'reads', 'does not see', 'follows', 'answers']
  objects = ['tea.', 'two letters!', 'a question?', 'the answer: 42', 'nothing\nat all', 'us']
  for words in itertools.product(subjects, verbs, objects):
    yield ' '.join(words)
    yield f'\n\nHuman: {" ".join(words)}\n\nAssistant: {" ".join(reversed(words))}'


def _configure(directory, **settings):
  settings = {'bos_token': '<s>', 'eos_token': '</s>', **settings}
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))


@pytest.fixture(scope='session')
def sentencepiece_directory(tmp_path_factory):
  """A SentencePiece model like Llama 2's: BPE, byte fallback, text left as it is."""
  directory = tmp_path_factory.mktemp('sentencepiece')
  with (directory / 'tokenizer.model').open('wb') as model:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_texts(),
      model_writer=model,
      vocab_size=400,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      minloglevel=2,
    )
  _configure(directory)
  return directory


@pytest.fixture(scope='session')
def json_directory(tmp_path_factory):
  """A tokenizer.json like Llama 3's: byte-level BPE whose post-processor adds BOS."""
  directory = tmp_path_factory.mktemp('tokenizers')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=SPECIAL,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_texts(), trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  tokenizer.save(str(directory / 'tokenizer.json'))
  _configure(directory)
  return directory
