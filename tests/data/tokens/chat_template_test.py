"""Templates of every style are read as transformers reads them; hostile ones end in an error."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tokenizers
import transformers

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.preference import Preference
from dpo_flax.data.tokens.chat_template import TemplateDied
from dpo_flax.data.tokens.tokenizer import load_tokenizer

TEMPLATES = pathlib.Path(__file__).parent
ENDS = {
  'chatml': '<|im_end|>',
  'llama3': '<|eot_id|>',
  'mistral': '</s>',
  'qwen': '<|im_end|>',
  'gemma': '<end_of_turn>',
  'zephyr': '</s>',
}


def read_template(name, *, marked=False):
  """Returns a template, with {% generation %} around what the assistant writes or without."""
  source = (TEMPLATES / f'{name}.jinja').read_text()
  if marked:
    return source
  for tag in ('{% generation %}', '{% endgeneration %}', '{% endgeneration +%}'):
    source = source.replace(tag, '')
  return source


THINKING, TOOLS = read_template('thinking'), read_template('tools')


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


SYSTEM = {'role': 'system', 'content': 'answers: 42'}
CHATS = [
  [user('the cat likes tea?')],
  [user('a model'), assistant('Zoë'), user('\n us ')],
  [SYSTEM, user('a model'), assistant('Zoë'), user('that river')],
]
CHOSEN, REJECTED = 'the answer: 42 nothing\nat all!', 'a question? ☃'
PAIR = Preference(CHATS[0], [assistant('the cat')], [assistant('tea')])


@pytest.mark.parametrize('style', ENDS)
@pytest.mark.parametrize('prompt', CHATS)
def test_ids_and_mask_equal_transformers(json_directory, style, prompt):
  plain, marked = read_template(style), read_template(style, marked=True)
  if style == 'gemma' and prompt[0] is SYSTEM:
    pytest.skip('Gemma has no system turn')
  preference = Preference(prompt, [assistant(CHOSEN)], [assistant(REJECTED)])
  pair = load_tokenizer(str(json_directory), plain).encode(preference)
  assert load_tokenizer(str(json_directory), marked).encode(preference) == pair
  theirs = transformers.AutoTokenizer.from_pretrained(str(json_directory))
  for text, response in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
    truth = theirs.apply_chat_template(
      [*prompt, assistant(text)],
      chat_template=marked,
      tokenize=True,
      return_dict=True,
      return_assistant_tokens_mask=True,
    )
    size = len(pair.prompt) + len(response)
    assert pair.prompt + response == truth['input_ids'][:size]
    mask = truth['assistant_masks']
    earlier = sum(mask) - len(response)  # targets in turns of the prompt: none of ours
    assert mask[len(pair.prompt) :] == [1] * len(response) + [0] * (len(mask) - size)
    assert (earlier > 0) == (len(prompt) > 1)


@pytest.mark.parametrize('style', ENDS)
def test_decoded_response_is_its_text_and_its_end_token(json_directory, style):
  plain, end = read_template(style), ENDS[style]
  tokenizer = load_tokenizer(str(json_directory), plain)
  pair = tokenizer.encode(Preference(CHATS[1], [assistant(CHOSEN)], [assistant(REJECTED)]))
  assert tokenizer.decode(pair.chosen) == CHOSEN + end
  assert tokenizer.decode(pair.rejected) == REJECTED + end
  assert pair.prompt.count(tokenizer.bos_id) == plain.count('bos_token')
  assert tokenizer.bos_id not in pair.chosen


@pytest.mark.parametrize('style', ENDS)
def test_turns_of_the_user_inside_a_response_are_no_targets(json_directory, style):
  plain, end = read_template(style), ENDS[style]
  tokenizer = load_tokenizer(str(json_directory), plain)
  chosen = [assistant('the cat'), user('a model'), assistant('Zoë likes us')]
  pair = tokenizer.encode(Preference(CHATS[0], chosen, [assistant('tea')]))
  targets = [i for i in pair.chosen if i >= 0]
  assert tokenizer.decode(targets) == f'the cat{end}Zoë likes us{end}'


def test_tools_and_tool_calls_reach_the_template(json_directory):
  tools = [{'type': 'function', 'function': {'name': 'add', 'parameters': {'a': 'int'}}}]
  call = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'add', 'arguments': {'a': 2}}}]}
  result = {'role': 'tool', 'content': '{"sum": "<4>"}'}
  preference = Preference(
    [user('2 + 2?')], [call, result, assistant('four')], [assistant('five')], tools=tools
  )
  tokenizer = load_tokenizer(str(json_directory), TOOLS)
  pair = tokenizer.encode(preference)
  assert '{"name": "add", "parameters": {"a": "int"}}' in tokenizer.decode(pair.prompt)
  targets = tokenizer.decode([i for i in pair.chosen if i >= 0])
  assert targets == '{"name": "add", "arguments": {"a": 2}}<|im_end|>four<|im_end|>'
  assert '<4>' in tokenizer.decode(pair.chosen)
  theirs = transformers.AutoTokenizer.from_pretrained(str(json_directory))
  truth = theirs.apply_chat_template(
    [*preference.prompt, *preference.chosen], tools=tools, chat_template=TOOLS, tokenize=False
  )
  assert tokenizer.decode(pair.prompt + pair.chosen) + '\n' == truth


THOUGHT = '<think>\nhm\n</think>\n\n'


def test_thoughts_of_the_answer_are_learned(json_directory):
  tokenizer = load_tokenizer(str(json_directory), THINKING)
  pair = tokenizer.encode(Preference(CHATS[0], [assistant(f'{THOUGHT}tea')], [assistant('us')]))
  assert tokenizer.decode(pair.chosen) == f'{THOUGHT}tea<|im_end|>'
  assert tokenizer.decode(pair.rejected) == '<think>\n\n</think>\n\nus<|im_end|>'


def test_variables_reach_the_template_and_the_fingerprint(json_directory):
  tokenizer = load_tokenizer(str(json_directory), THINKING, variables={'enable_thinking': False})
  pair = tokenizer.encode(PAIR)
  assert tokenizer.decode(pair.prompt).endswith('<think>\n\n</think>\n\n')
  assert tokenizer.decode(pair.chosen) == 'the cat<|im_end|>'
  assert tokenizer.fingerprint != load_tokenizer(str(json_directory), THINKING).fingerprint


def test_thoughts_lost_from_the_prompt_are_refused_unless_asked_for(json_directory):
  prompt = [user('tea?'), assistant(f'{THOUGHT}us'), user('the cat?')]
  preference = Preference(prompt, [assistant('a model')], [assistant('tea')])
  with pytest.raises(RecordError, match=r'rewrites the history.*data\.history=rendered'):
    load_tokenizer(str(json_directory), THINKING).encode(preference)
  tokenizer = load_tokenizer(str(json_directory), THINKING, history='rendered')
  text = tokenizer.decode(tokenizer.encode(preference).prompt)
  assert 'hm' not in text
  assert '\nus<|im_end|>' in text


def test_thoughts_lost_from_a_response_are_refused(json_directory):
  response = [assistant(f'{THOUGHT}us'), user('the cat?'), assistant('tea')]
  tokenizer = load_tokenizer(str(json_directory), THINKING, history='rendered')
  with pytest.raises(RecordError, match='rewrites the'):
    tokenizer.encode(Preference(CHATS[0], response, [assistant('us')]))
  stripping = THINKING.replace("not loop.last and '</think>'", "'</think>'")
  assert stripping != THINKING
  tokenizer = load_tokenizer(str(json_directory), stripping, history='rendered')
  with pytest.raises(RecordError, match='rewrites the response'):
    tokenizer.encode(Preference(CHATS[0], response[:1], [assistant('us')]))


def test_a_template_that_drops_the_system_turn_is_refused(json_directory):
  template = read_template('chatml').replace(
    'for m in messages', "for m in messages if m['role'] != 'system'"
  )
  with pytest.raises(RecordError, match="what the system says, 'answers: 42'"):
    load_tokenizer(str(json_directory), template).encode(
      Preference(CHATS[2], [assistant('us')], [assistant('tea')])
    )


HOSTILE = [
  "{{ 'a' * 10**9 }}",  # folded by the compiler
  "{{ messages[0]['role'] * 10**9 }}",
  "{{ '%1000000000d' % messages | length }}",
  "{{ 'a'.ljust(10**9) }}",
  "{{ 'a' | center(10**9) }}",
  '{{ lipsum(n=10**6) }}',
  '{{ 9 ** (9 ** 9) }}',
  '{{ range(10**12) | list }}',
  "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}",
  '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
  '{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}',
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  '{{ messages.__init__.__globals__ }}',
  '{{ raise_exception.__globals__ }}',
  '{{ cycler.__init__.__globals__.os.system("true") }}',
  '{{ self._TemplateReference__context }}',
  '{{ nothing.more }}',
  '{{ 1 / 0 }}',
  '{% include "/etc/passwd" %}',
  '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
]


@pytest.mark.parametrize('template', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_in_an_error_soon(json_directory, template):
  start = time.monotonic()
  with pytest.raises(ValueError, match='template') as error:
    load_tokenizer(str(json_directory), template).encode(PAIR)
  assert time.monotonic() - start < 10  # two of processor time, on however busy a machine
  assert len(str(error.value)) < 1000


def test_memory_is_bounded_by_the_kernel(json_directory):
  load_tokenizer(str(json_directory), read_template('chatml'))
  child = pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children')
  limits = [pathlib.Path(f'/proc/{pid}/limits').read_text() for pid in child.read_text().split()]
  assert any(f'Max address space         {256 << 20} ' in limit for limit in limits)


def test_a_template_that_fails_does_not_spoil_the_next(json_directory):
  good = load_tokenizer(str(json_directory), read_template('chatml'))
  before = good.encode(PAIR)
  with pytest.raises(TemplateDied, match='more than 1 s'):
    load_tokenizer(str(json_directory), HOSTILE[9]).encode(PAIR)
  assert good.encode(PAIR) == before


@pytest.fixture
def directory_with_marks(json_directory, tmp_path):
  """A tokenizer that also has </answer>, a token that is not special."""
  tokenizer = tokenizers.Tokenizer.from_file(str(json_directory / 'tokenizer.json'))
  tokenizer.add_tokens([tokenizers.AddedToken('</answer>', normalized=False, special=False)])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  settings = (json_directory / 'tokenizer_config.json').read_text()
  (tmp_path / 'tokenizer_config.json').write_text(settings)
  return tmp_path


BARE = '{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}'
MARKED = BARE.replace(
  '{{ m.content }}',
  "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
  '{% else %}{{ m.content }}{% endif %}',
)


@pytest.mark.parametrize('template', [BARE, MARKED], ids=['plain', 'marked'])
@pytest.mark.parametrize('last', ['</answer>', '<|im_end|>', '</s>', 'tea'])
def test_only_the_template_ends_a_turn(directory_with_marks, template, last):
  tokenizer = load_tokenizer(str(directory_with_marks), template)
  pair = tokenizer.encode(Preference(CHATS[0], [assistant(f'us {last}')], [assistant('tea')]))
  for response, text in ((pair.chosen, f'us {last}'), (pair.rejected, 'tea')):
    assert response[-1] == tokenizer.eos_id
    assert tokenizer.decode(response[:-1]) == text
    assert tokenizer.eos_id not in response[:-1]


def test_a_mark_of_the_text_leaves_the_end_of_turn_in_place(directory_with_marks):
  tokenizer = load_tokenizer(str(directory_with_marks), read_template('chatml'))
  pair = tokenizer.encode(Preference(CHATS[0], [assistant('us </answer>')], [assistant('tea')]))
  assert tokenizer.decode(pair.chosen) == 'us </answer><|im_end|>'


def test_a_request_is_bounded_by_the_clock_on_the_wall():
  program = (
    'import time\n'
    'from dpo_flax.data.tokens import template_process as process\n'
    'process.WALL_SECONDS = 0.2\n'
    'process._render = lambda **request: time.sleep(60)  # takes no processor time\n'
    "process._answer(b'{}')\n"
  )
  process = subprocess.run([sys.executable, '-c', program], check=False)
  assert process.returncode == -signal.SIGALRM
