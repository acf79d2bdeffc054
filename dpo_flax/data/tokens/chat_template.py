"""Chat templates: messages -> text, and where in the text the responses lie.

Text from a record must never act as part of the template: control tokens typed by a user are put
between two Unicode noncharacters before rendering, and `pieces` keeps them apart from those of the
template itself.
"""

import dataclasses
import functools
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

from dpo_flax.data.records.fields import RecordError, shared_length
from dpo_flax.data.records.preference import Message, Preference, Span
from dpo_flax.data.tokens.helper_process import Child, ChildDied
from dpo_flax.data.tokens.rendering_checks import check_kept, check_tools
from dpo_flax.data.tokens.template_process import END_SPAN, SECONDS, SPAN, WALL_SECONDS

# Unicode noncharacters: no text for interchange holds them, and none is let in.
_TYPED, _END_TYPED = '\ufdd0', '\ufdd1'
_MARKS = re.compile(f'[{_TYPED}{_END_TYPED}{SPAN}{END_SPAN}]')


class TemplateDied(ValueError):
  """The template did not end by itself: a fault of the run, which every other record would meet."""


@dataclasses.dataclass(frozen=True)
class Rendering:
  """A text that starts with the prompt, and the spans behind it that are responses."""

  text: str
  spans: list[Span]
  closed: bool  # whether the last span ends with a control token, the template's end of turn


class ChatTemplate:
  """A template, for one set of control tokens.

  Args:
    source: the Jinja template.
    controls: every control token, as written in a rendered chat.
    typed: those of them that must stay text where a record's own text holds them. Only these,
      written by the template, can end a turn: others, such as </think>, are part of what is said.
    variables: what the template may use besides the messages: bos_token, eos_token, ...
    history: exact | rendered. Templates of thinking models leave the thoughts out of earlier
      turns; `exact` refuses to train on a prompt that is not the record's.

  Raises:
    ValueError: the template has a syntax error.
  """

  def __init__(
    self,
    source: str,
    *,
    controls: list[str],
    typed: list[str],
    variables: dict[str, Any],
    history: str = 'exact',
  ):
    self._typed = _any_of(typed)
    every = _any_of(controls).pattern
    self._pieces = re.compile(f'{_TYPED}.*?{_END_TYPED}|{every}', re.DOTALL)
    self._ends = re.compile(f'{_TYPED}.*?{_END_TYPED}|({self._typed.pattern})', re.DOTALL)
    self._source, self._variables, self._history = source, variables, history
    try:
      answer = _ask(source, variables, [])
    except TemplateDied as death:
      raise ValueError(f'the chat template cannot be compiled: {death}') from None
    if 'syntax' in answer:
      raise ValueError(f'the chat template has an error in {answer["syntax"]}')
    if 'error' in answer:
      raise ValueError(f'the chat template cannot be compiled: {answer["error"]}')

  def render_prompt(self, prompt: list[Message], tools: list[Any] | None = None) -> str:
    """Renders the prompt and the header of the assistant's turn."""
    return self._render([(self._mark(prompt), True)], self._mark(tools))[0][0]

  def render_pair(self, preference: Preference) -> list[Rendering]:
    """Renders the chat with either response.

    A template with {% generation %} blocks marks the responses itself. Otherwise a
    response is what its turn adds to the rendering that ends with the assistant's header, up to the
    end-of-turn token: the white space behind that belongs to the template.

    Raises:
      RecordError: the template fails, or leaves out or rewrites the text of a message, so that
        training would show the model another prompt than generation does.
      TemplateDied: it takes too much time or memory to go on with other records.
    """
    prompt, *responses = self._mark([preference.prompt, preference.chosen, preference.rejected])
    tools = self._mark(preference.tools)
    chats = [(prompt, True), *((prompt + response, False) for response in responses)]
    (prefix, _), *rendered = self._render(chats, tools)
    if tools:
      ((without, _),) = self._render(chats[:1], None)
      check_tools(tools, prefix, without)
    renderings = []
    for response, (text, blocks) in zip(responses, rendered, strict=True):
      _check_prefix(prefix, text)
      spans = [self._extend(text, span) for span in blocks if span[0] >= len(prefix)]
      spans = spans or self._find_spans(prompt, response, tools, prefix, text)
      check_kept(response, text[spans[0][0] :], 'response')
      closed = self._closing(text, spans[-1]) is not None
      renderings.append(Rendering(text, spans, closed))
    if self._history == 'exact':
      check_kept(prompt, prefix, 'history')
    return renderings

  def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
    """Splits a rendered text into (piece, whether it is a control token of the template).

    Control tokens that a record's text holds stay inside the pieces that are text.
    """
    start, plain = 0, ''
    for match in self._pieces.finditer(text):
      plain += text[start : match.start()]
      start = match.end()
      if match.group().startswith(_TYPED):
        plain += match.group()
        continue
      yield _MARKS.sub('', plain), False
      yield match.group(), True
      plain = ''
    yield _MARKS.sub('', plain + text[start:]), False

  @staticmethod
  def has_typed(text: str) -> bool:
    """Whether a rendered text holds control tokens that came from a record."""
    return _TYPED in text or _END_TYPED in text

  def _find_spans(
    self,
    prompt: list[Message],
    response: list[Message],
    tools: list[Any] | None,
    prefix: str,  # the prompt, rendered
    text: str,  # prompt and response, rendered
  ) -> list[Span]:
    """Returns the spans of the response's turns, by difference of two renderings.

    Refuses a template that opens the answer with a header it does not give to generation.
    """

    def render(turns: int, *, header: bool = False) -> str:
      """Renders the chat with the first turns of its response alone."""
      return self._render([(prompt + response[:turns], header)], tools)[0][0]

    content = response[0].get('content')
    added = text[len(prefix) :].lstrip()
    begins = not isinstance(content, str) or added.startswith(content.strip())
    if not begins and prefix == render(0):
      raise RecordError(
        'chat template without add_generation_prompt',
        'its header of the assistant turn would be part of the response; add '
        '"{% if add_generation_prompt %}", or {% generation %} around the response',
      )
    until = text if len(response) == 1 else _check_prefix(render(1), text)
    spans = [self._close(text, (len(prefix), len(until)))]
    for i, message in enumerate(response[1:], start=1):
      if message['role'] == 'assistant':
        start = len(_check_prefix(render(i, header=True), text))
        end = len(_check_prefix(render(i + 1), text))
        spans.append(self._close(text, (start, end)))
    return spans

  def _closing(self, text: str, span: Span) -> int | None:
    """Returns where the token that ends a span's turn ends; None where more than space follows."""
    ends = (match.end() for match in self._ends.finditer(text, *span) if match[1])
    last = max(ends, default=None)
    return None if last is None or text[last : span[1]].strip() else last

  def _close(self, text: str, span: Span) -> Span:
    """Takes the white space behind the end-of-turn token out of a span."""
    start, end = span
    if not text[start:end].strip():
      raise RecordError('chat template drops the response', 'it renders to nothing')
    return start, self._closing(text, span) or end

  def _extend(self, text: str, span: Span) -> Span:
    """Takes an end-of-turn token right behind a generation block into the span."""
    start, end = span
    behind = self._ends.match(text, end)
    if behind and behind[1] and self._closing(text, span) is None:
      return start, behind.end()
    return span

  def _render(
    self, chats: list[tuple[list[Message], bool]], tools: list[Any] | None
  ) -> list[tuple[str, list[Span]]]:
    """Returns each text, and the spans that its {% generation %} blocks made."""
    requests = [[messages, tools, header] for messages, header in chats]
    answer = _ask(self._source, self._variables, requests)
    if 'error' in answer:
      raise RecordError('chat template failed', answer['error'])
    return [_spans(text) for text in answer['texts']]

  def _mark(self, value: Any) -> Any:
    """Returns a copy of messages in which control tokens stand between two noncharacters."""
    if isinstance(value, str):
      if _MARKS.search(value):
        raise RecordError('noncharacter', 'the text holds one of U+FDD0 to U+FDD3')
      return self._typed.sub(f'{_TYPED}\\g<0>{_END_TYPED}', value)
    if isinstance(value, dict):
      return {self._mark(key): self._mark(item) for key, item in value.items()}
    return [self._mark(item) for item in value] if isinstance(value, list) else value


def _spans(marked: str) -> tuple[str, list[Span]]:
  spans, text = [], ''
  for i, part in enumerate(marked.split(SPAN)):
    inside, end, rest = part.partition(END_SPAN)
    if i and end:
      spans.append((len(text), len(text) + len(inside)))
    text += inside + rest
  return text, spans


@functools.cache
def _process(pid: int) -> Child:
  """Returns the process for templates that belongs to process `pid`, this one."""
  return Child('dpo_flax.data.tokens.template_process', quiet=True)


def _ask(source: str, variables: dict[str, Any], chats: list[list[Any]]) -> dict[str, Any]:
  request = json.dumps({'source': source, 'variables': variables, 'chats': chats}).encode()
  try:
    return json.loads(_process(os.getpid()).ask(request))
  except ChildDied as death:
    _process.cache_clear()
    limits = {-signal.SIGPROF: f'{SECONDS:g} s', -signal.SIGALRM: f'{WALL_SECONDS:g} s of waiting'}
    if death.code in limits:
      fault = f'it runs for more than {limits[death.code]}'
    else:
      fault = f'its process ended with code {death.code}, most likely for want of memory'
    raise TemplateDied(f'the chat template failed: {fault}') from None


def _any_of(words: list[str]) -> re.Pattern[str]:
  longest_first = sorted(filter(None, words), key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def _check_prefix(prefix: str, text: str) -> str:
  if not text.startswith(prefix):
    same = shared_length(prefix, text)
    raise RecordError(
      'chat template rewrites the prompt',
      f'{prefix[same : same + 40]!r} becomes {text[same : same + 40]!r} once a response follows',
    )
  return prefix
