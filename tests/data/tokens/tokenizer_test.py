"""Token ids and response masks equal transformers'; BOS and end tokens are where they must be."""

import json
import pathlib

import pytest
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.preference import Preference
from dpo_flax.data.tokens.tokenizer import load_tokenizer

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_GENERATION = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
  "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
  "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
  '{% endif %}'
)
LLAMA3_GENERATION = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
  "'<|end_header_id|>\\n\\n' }}{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
  "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
  '{% endif %}'
)
TEMPLATES = [CHATML, CHATML_GENERATION, LLAMA3, LLAMA3_GENERATION]
BEGIN = '\n\nHuman: the cat likes tea?\n\nAssistant:'


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


CHATS = [
  [user('the cat likes tea?')],
  [{'role': 'system', 'content': 'answers: 42'}, user('a model'), assistant('Zoë'), user('\n us ')],
]


@pytest.fixture(params=['json_directory', 'sentencepiece_directory'])
def directory(request):
  return request.getfixturevalue(request.param)


@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('prompt', CHATS)
def test_ids_and_mask_equal_transformers_assistant_mask(json_directory, template, prompt):
  chosen, rejected = 'the answer: 42 nothing\nat all!', 'a question? ☃'
  pair = load_tokenizer(str(json_directory), template).encode(
    Preference(prompt, [assistant(chosen)], [assistant(rejected)])
  )
  marked = CHATML_GENERATION if 'im_end' in template else LLAMA3_GENERATION
  theirs = transformers.AutoTokenizer.from_pretrained(str(json_directory))
  for text, response in ((chosen, pair.chosen), (rejected, pair.rejected)):
    truth = theirs.apply_chat_template(
      [*prompt, assistant(text)],
      chat_template=marked,
      tokenize=True,
      return_dict=True,
      return_assistant_tokens_mask=True,
    )
    ids, mask = truth['input_ids'], truth['assistant_masks']
    size = len(pair.prompt) + len(response)
    assert pair.prompt + response == ids[:size]
    assert not any(mask[size:])  # only the template's white space is left out
    last_turn = len(ids) - mask[::-1].index(1) - len(response)
    assert last_turn == len(pair.prompt)
    assert all(mask[last_turn:size])


@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize('prompt', CHATS)
def test_sentencepiece_chat_ids_equal_transformers(
  sentencepiece_directory, tmp_path, legacy, prompt
):
  (tmp_path / 'tokenizer.model').write_bytes(
    (sentencepiece_directory / 'tokenizer.model').read_bytes()
  )
  settings = {'bos_token': '<s>', 'eos_token': '</s>', 'legacy': legacy}
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps({**settings, 'tokenizer_class': 'LlamaTokenizer'})
  )
  template = (
    '{{ bos_token }}{% for m in messages %}'
    "{{ '[' + m['role'] + ']\\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
  )
  chosen, rejected = [assistant('the cat  reads')], [assistant('Zoë answers')]
  ours = load_tokenizer(str(tmp_path), template).encode(Preference(prompt, chosen, rejected))
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  for response, ids in ((chosen, ours.chosen), (rejected, ours.rejected)):
    truth = theirs.apply_chat_template(prompt + response, chat_template=template, tokenize=True)
    assert ours.prompt + ids == truth['input_ids']


def test_text_ids_are_the_joint_encoding_with_bos_and_eos(directory):
  tokenizer = load_tokenizer(str(directory))
  chosen, rejected = ' the river follows us', ' a question?'
  pair = tokenizer.encode(Preference(BEGIN, chosen, rejected))
  for text, ids in ((chosen, pair.chosen), (rejected, pair.rejected)):
    joint = tokenizer.backend.encode(BEGIN + text)
    assert pair.prompt + ids == [tokenizer.bos_id, *joint, tokenizer.eos_id]
  assert tokenizer.decode(pair.prompt[1:]).lstrip() == BEGIN.lstrip()


@given(st.text(max_size=12), st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_both_branches_share_the_prompt_and_no_response_character_is_in_it(
  json_directory, prompt, chosen, rejected
):
  assume(chosen != rejected)
  tokenizer = load_tokenizer(str(json_directory))
  pair = tokenizer.encode(Preference(prompt, chosen, rejected))
  head = tokenizer.decode(pair.prompt[1:]).rstrip('\ufffd')  # a border inside a character
  assert prompt.startswith(head)
  for text, ids in ((chosen, pair.chosen), (rejected, pair.rejected)):
    assert tokenizer.decode(pair.prompt[1:] + ids[:-1]) == prompt + text
    assert ids[-1] == tokenizer.eos_id
    assert ids.count(tokenizer.eos_id) == 1
  assert pair.prompt.count(tokenizer.bos_id) == 1


def test_a_token_across_the_border_is_response(json_directory):
  tokenizer = load_tokenizer(str(json_directory))
  cat, at = tokenizer.backend.encode('x cat'), tokenizer.backend.encode('x c')
  assert cat[: len(at)] != at  # ' c' + 'at' merge into one token
  pair = tokenizer.encode(Preference('x c', 'at', 'ow'))
  assert tokenizer.decode(pair.prompt) == '<s>x'
  assert tokenizer.decode(pair.chosen) == ' cat</s>'
  assert tokenizer.decode(pair.rejected) == ' cow</s>'


@pytest.mark.parametrize('template', TEMPLATES)
def test_decoded_responses_are_the_text_and_its_end_token(directory, template):
  tokenizer = load_tokenizer(str(directory), template)
  pair = tokenizer.encode(Preference(CHATS[1], [assistant('the cat')], [assistant('a model')]))
  end = '<|im_end|>' if 'im_end' in template else '<|eot_id|>'
  if directory.name.startswith('sentencepiece'):  # here these markers are plain text
    end += '\n' if 'im_end' in template and 'generation %}' not in template else ''
    end += '</s>'
  assert tokenizer.decode(pair.chosen).lstrip() == f'the cat{end}'
  assert tokenizer.decode(pair.rejected).lstrip() == f'a model{end}'
  assert pair.prompt.count(tokenizer.bos_id) == template.count('bos_token')


def test_control_tokens_typed_by_a_user_stay_text(directory):
  typed = 'so <s> and </s> and <|im_end|>'
  tokenizer = load_tokenizer(str(directory), LLAMA3)
  chat = Preference([user(typed)], [assistant(typed)], [assistant('us')])
  text = Preference(typed, typed, 'us')
  for preference in (chat, text):
    pair = tokenizer.encode(preference)
    assert pair.prompt.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in pair.prompt
    assert tokenizer.bos_id not in pair.chosen
    assert pair.chosen[:-1].count(tokenizer.eos_id) == 0
    assert typed.replace(' ', '') in tokenizer.decode(pair.prompt).replace(' ', '')
    assert typed.replace(' ', '') in tokenizer.decode(pair.chosen).replace(' ', '')


@pytest.mark.parametrize('template', TEMPLATES)
def test_only_assistant_turns_of_a_long_response_are_targets(json_directory, template):
  tokenizer = load_tokenizer(str(json_directory), template)
  chosen = [assistant('the cat'), user('a model'), assistant('Zoë likes us')]
  pair = tokenizer.encode(Preference(CHATS[0], chosen, [assistant('tea')]))
  end = '<|im_end|>' if 'im_end' in template else '<|eot_id|>'
  targets = [i for i in pair.chosen if i >= 0]
  assert tokenizer.decode(targets) == f'the cat{end}Zoë likes us{end}'
  whole = tokenizer.template.render_prompt([*CHATS[0], *chosen[:2]]) + 'Zoë likes us' + end
  assert tokenizer.decode(pair.prompt + pair.chosen) == whole


def test_an_end_token_outside_the_generation_block_is_still_learned(json_directory):
  template = CHATML_GENERATION.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
  )
  assert template != CHATML_GENERATION
  tokenizer = load_tokenizer(str(json_directory), template)
  pair = tokenizer.encode(Preference(CHATS[0], [assistant('the cat')], [assistant('tea')]))
  assert tokenizer.decode(pair.chosen) == 'the cat<|im_end|>'


def test_a_template_without_end_of_turn_gets_eos(json_directory):
  template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
  template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  tokenizer = load_tokenizer(str(json_directory), template)
  pair = tokenizer.encode(Preference(CHATS[0], [assistant('the cat')], [assistant('tea')]))
  assert tokenizer.decode(pair.chosen).endswith('the cat\n</s>')


@pytest.mark.parametrize(
  ('template', 'reason'),
  [
    (None, 'chat data without a chat template'),
    (CHATML.partition('{% if')[0], 'chat template without add_generation_prompt'),
    ("{{ messages | length }}{{ 'x' }}", 'chat template rewrites the prompt'),
    (
      "{{ 'constant' if add_generation_prompt else 'constant ' }}",
      'chat template drops the response',
    ),
    ("{{ raise_exception('no system turn') }}", 'chat template failed'),
    ("{{ messages[0]['content'].nothing.more }}", 'chat template failed'),
    ('{{ messages.__class__.__mro__[1].__subclasses__() }}', 'chat template failed'),
    ("{{ messages[0].update({'content': 'x'}) }}", 'chat template failed'),
  ],
)
def test_templates_that_cannot_be_trusted_are_refused(json_directory, template, reason):
  tokenizer = load_tokenizer(str(json_directory), template)
  with pytest.raises(RecordError) as error:
    tokenizer.encode(Preference(CHATS[0], [assistant('the cat')], [assistant('tea')]))
  assert error.value.reason == reason


def test_text_with_the_characters_that_mark_typed_tokens_is_refused(directory):
  tokenizer = load_tokenizer(str(directory), CHATML)
  with pytest.raises(RecordError, match='noncharacter'):
    tokenizer.encode(Preference([user('a\ufdd0')], [assistant('b')], [assistant('c')]))


def test_the_template_beside_the_tokenizer_is_found_and_the_given_one_wins(
  json_directory, tmp_path
):
  for file in json_directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  assert load_tokenizer(str(tmp_path)).template is None
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  settings['chat_template'] = [
    {'name': 'tool', 'template': ''},
    {'name': 'default', 'template': CHATML},
  ]
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  chatml = load_tokenizer(str(tmp_path))
  assert chatml.template.render_prompt([user('Hi')]) == (
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
  )
  (tmp_path / 'chat_template.jinja').write_text(LLAMA3)
  llama3 = load_tokenizer(str(tmp_path))
  assert llama3.template.render_prompt([user('Hi')]).startswith('<s><|start_header_id|>user')
  (tmp_path / 'mine.jinja').write_text(CHATML)
  given_file = load_tokenizer(str(tmp_path), str(tmp_path / 'mine.jinja'))
  assert given_file.fingerprint == chatml.fingerprint != llama3.fingerprint


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({}, 'holds neither tokenizer.json nor tokenizer.model'),
    ({'tokenizer.json': 'x'}, 'cannot be read as a tokenizers file'),
    ({'tokenizer.model': 'x'}, 'cannot be read as a SentencePiece model'),
    ({'tokenizer.json': None, 'tokenizer_config.json': '{}'}, 'names no end-of-text token'),
    ({'tokenizer.json': None, 'tokenizer_config.json': '{'}, 'is not JSON'),
  ],
)
def test_broken_tokenizer_files_are_named(json_directory, tmp_path, files, message):
  for name, content in files.items():
    original = pathlib.Path(json_directory / name).read_text() if content is None else content
    (tmp_path / name).write_text(original)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(str(tmp_path))


def test_wrong_paths_and_templates_are_named(json_directory):
  with pytest.raises(ValueError, match='does not exist'):
    load_tokenizer(str(json_directory / 'nothing'))
  with pytest.raises(ValueError, match='neither a file nor a template'):
    load_tokenizer(str(json_directory), 'nothing.jinja')
  with pytest.raises(ValueError, match='error in line 2'):
    load_tokenizer(str(json_directory), '{% for m in messages %}\n{% endif %}')


def test_responses_that_become_the_same_ids_are_refused(json_directory):
  chat = [[assistant(text)] for text in ('the cat', ' the cat ')]
  tokenizer = load_tokenizer(str(json_directory), LLAMA3)  # it trims what is said
  with pytest.raises(RecordError, match='token ids are equal') as error:
    tokenizer.encode(Preference(CHATS[0], *chat))
  assert error.value.reason == 'identical responses'
