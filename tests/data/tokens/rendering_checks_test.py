"""What a template leaves out of a chat is noticed, wherever it puts the rest."""

import pathlib

import pytest

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.preference import Preference
from dpo_flax.data.tokens.rendering_checks import check_kept
from dpo_flax.data.tokens.tokenizer import load_tokenizer

TOOLS_TEMPLATE = pathlib.Path(__file__).with_name('tools.jinja').read_text()
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
USER = {'role': 'user', 'content': 'You said: Be brief. Why?'}
CALL = {
  'role': 'assistant',
  'tool_calls': [{'function': {'name': 'add', 'arguments': {'left': 2, 'unit': 'cm "x"'}}}],
}
RESULT = {'role': 'tool', 'content': '{"sum": "<4>"}'}
THOUGHT = {'role': 'assistant', 'reasoning_content': 'so brief', 'content': 'Because.'}
CHAT = [SYSTEM, USER, CALL, RESULT, THOUGHT]
RENDERED = """<|system|> Be brief. <|user|>
You said:  Be brief. Why?
<call>{"name": "add", "arguments": {"left": 2, "unit": "cm \\"x\\""}}</call>
<|tool|>"{\\"sum\\": \\"<4>\\"}"<think>so brief</think>Because."""


def test_what_is_all_there_passes():
  check_kept(CHAT, RENDERED, 'history')
  as_xml = '<add><left>\n2\n</left><unit>cm "x"</unit></add>'
  start, end = RENDERED.index('<call>'), RENDERED.index('</call>')
  check_kept(CHAT, RENDERED[:start] + as_xml + RENDERED[end:], 'history')


@pytest.mark.parametrize(
  ('lost', 'who'),
  [
    ('<|system|> Be brief. ', 'system'),  # its words are also the user's
    ('Why?', 'user'),
    ('"add"', 'assistant'),
    ('"left": 2', 'assistant'),
    ('cm', 'assistant'),
    ('4', 'tool'),
    ('so brief', 'assistant'),
    ('Because.', 'assistant'),
  ],
)
def test_what_is_left_out_is_named(lost, who):
  assert lost in RENDERED
  with pytest.raises(RecordError, match=f'what the {who} says'):
    check_kept(CHAT, RENDERED.replace(lost, '', 1), 'history')


def preference(**fields):
  answers = ([{'role': 'assistant', 'content': text}] for text in ('four', 'five'))
  return Preference([{'role': 'user', 'content': 'add'}], *answers, **fields)


def test_a_template_without_tools_refuses_them(json_directory):
  tools = [{'type': 'function', 'function': {'name': 'add', 'parameters': {'a': 'int'}}}]
  shown = load_tokenizer(str(json_directory), TOOLS_TEMPLATE)
  shown.encode(preference(tools=tools))
  chatml = pathlib.Path(__file__).with_name('chatml.jinja').read_text()
  with pytest.raises(RecordError, match="does not show 'add'"):
    load_tokenizer(str(json_directory), chatml).encode(preference(tools=tools))


def test_a_second_bos_is_refused(json_directory):
  twice = '{{ bos_token }}{{ bos_token }}' + TOOLS_TEMPLATE
  with pytest.raises(RecordError, match='BOS twice'):
    load_tokenizer(str(json_directory), twice).encode(preference())


def test_ids_do_not_depend_on_the_day(json_directory):
  dated = "{{ strftime_now('%d %b %Y') }}" + TOOLS_TEMPLATE
  tokenizer = load_tokenizer(str(json_directory), dated)
  assert '26 Jul 2024' in tokenizer.template.render_prompt(preference().prompt)
  today = {'strftime_now': '2026-03-01'}
  other = load_tokenizer(str(json_directory), dated, variables=today)
  assert '01 Mar 2026' in other.template.render_prompt(preference().prompt)
  assert other.fingerprint != tokenizer.fingerprint
  for wrong in ('26 Jul 2024', 20240726):
    with pytest.raises(ValueError, match='not a date such as'):
      load_tokenizer(str(json_directory), dated, variables={'strftime_now': wrong})
