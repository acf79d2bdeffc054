"""Chat templates: messages -> text, and where in the text the responses lie.

Templates are programs that come with a tokenizer, so they run in Jinja's sandbox, with the
environment Hugging Face tokenizers give them. Text from a record must never act as part of the
template: control tokens typed by a user are put between two Unicode noncharacters before rendering,
and `pieces` tells them from the template's own.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from dpo_flax.data.formats import Message
from dpo_flax.data.source import RecordError

# Unicode noncharacters: no text for interchange holds them, and none is let in.
_TYPED, _END_TYPED, _SPAN, _END_SPAN = '\ufdd0', '\ufdd1', '\ufdd2', '\ufdd3'
_MARKS = re.compile(f'[{_TYPED}-{_END_SPAN}]')

Span = tuple[int, int]  # of characters: [start, end)


@dataclasses.dataclass(frozen=True)
class Rendering:
  """A text that starts with the prompt, and the spans behind it that are responses."""

  text: str
  spans: list[Span]
  closed: bool  # whether the last span ends with a control token, the template's end of turn


class ChatTemplate:
  """A compiled template, for one set of control tokens.

  Args:
    source: the Jinja template.
    controls: every control token, as written in a rendered chat.
    typed: those of them that must stay text where a record's own text holds them.
    variables: what the template may use besides the messages: bos_token, eos_token, ...

  Raises:
    ValueError: the template has a syntax error.
  """

  def __init__(
    self, source: str, *, controls: list[str], typed: list[str], variables: dict[str, str]
  ):
    self._control = _any_of(controls)
    self._typed = _any_of(typed)
    self._variables = variables
    try:
      self._template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(f'the chat template has an error in line {error.lineno}: {error}') from None

  def render_prompt(self, prompt: list[Message]) -> str:
    """Renders the prompt and the header of the assistant's turn."""
    return self._render(self._mark(prompt), header=True)[0]

  def render(self, prompt: list[Message], response: list[Message], *, prefix: str) -> Rendering:
    """Renders a chat and finds its response spans, each with its end-of-turn token.

    A template with {% generation %} blocks says itself where they are. Otherwise a response is
    what its turn adds to the rendering that ends with the assistant's header, up to the end-of-turn
    token: the white space behind that belongs to the template.

    Args:
      prompt: the messages before the response.
      response: the assistant's turn, or several with others between them.
      prefix: render_prompt(prompt).

    Raises:
      RecordError: the template fails, or it rewrites the prompt once a response follows, so that
        training would show the model another prompt than generation does.
    """
    prompt, response = self._mark(prompt), self._mark(response)
    text, blocks = self._render(prompt + response, header=False)
    _check_prefix(prefix, text)
    spans = [self._extend(text, span) for span in blocks if span[0] >= len(prefix)]
    if not spans:
      turns = [i for i, message in enumerate(response) if message['role'] == 'assistant']
      spans = [self._turn(prompt, response, i, text) for i in turns[1:]]
      self._check_header(prompt, response[0], prefix, text)
      until = text if len(response) == 1 else self._part(prompt + response[:1], text)
      spans = [self._close(text, (len(prefix), len(until))), *spans]
    end = spans[-1][1]
    closing = self._closing(text, spans[-1])
    return Rendering(text, spans, closing is not None and not text[closing:end].strip())

  def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
    """Splits a rendered text into (piece, whether it is a control token of the template).

    Control tokens that a record's text holds stay inside the pieces that are text.
    """
    start, plain = 0, ''
    pattern = re.compile(f'{_TYPED}.*?{_END_TYPED}|{self._control.pattern}', re.DOTALL)
    for match in pattern.finditer(text):
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

  def _turn(self, prompt: list[Message], response: list[Message], i: int, text: str) -> Span:
    """Returns the span of turn i of a response of several turns."""
    start = len(self._part(prompt + response[:i], text, header=True))
    return self._close(text, (start, len(self._part(prompt + response[: i + 1], text))))

  def _part(self, messages: list[Message], text: str, *, header: bool = False) -> str:
    return _check_prefix(self._render(messages, header=header)[0], text)

  def _closing(self, text: str, span: Span) -> int | None:
    """Returns where the last control token of a span ends."""
    return max((match.end() for match in self._control.finditer(text, *span)), default=None)

  def _close(self, text: str, span: Span) -> Span:
    """Takes the white space behind the end-of-turn token out of a span."""
    start, end = span
    if not text[start:end].strip():
      raise RecordError('chat template drops the response', 'it renders to nothing')
    closing = self._closing(text, span)
    return (start, closing) if closing and not text[closing:end].strip() else span

  def _extend(self, text: str, span: Span) -> Span:
    """Takes an end-of-turn token right behind a generation block into the span."""
    start, end = span
    closing = self._closing(text, span)
    behind = self._control.match(text, end)
    closed = closing is not None and not text[closing:end].strip()
    return (start, behind.end()) if behind and not closed else span

  def _check_header(self, prompt: list[Message], answer: Message, prefix: str, text: str) -> None:
    """Refuses a template that opens the answer with a header it does not give to generation."""
    content = answer.get('content')
    if not isinstance(content, str) or text[len(prefix) :].lstrip().startswith(content.strip()):
      return
    if prefix == self._render(prompt, header=False)[0]:
      raise RecordError(
        'chat template without add_generation_prompt',
        'its header of the assistant turn would be part of the response; add '
        '"{% if add_generation_prompt %}", or {% generation %} around the response',
      )

  def _render(self, messages: list[Message], *, header: bool) -> tuple[str, list[Span]]:
    """Returns the text, and the spans that {% generation %} blocks made."""
    try:
      marked = self._template.render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=header,
        **self._variables,
      )
    except Exception as error:  # a template can raise anything at all
      raise RecordError('chat template failed', f'{type(error).__name__}: {error}') from None
    spans, text = [], ''
    for i, part in enumerate(marked.split(_SPAN)):
      inside, end, rest = part.partition(_END_SPAN)
      if i and end:
        spans.append((len(text), len(text) + len(inside)))
      text += inside + rest
    return text, spans

  def _mark(self, value: Any) -> Any:
    """Returns a copy of messages in which control tokens stand between two noncharacters."""
    if isinstance(value, str):
      if _MARKS.search(value):
        raise RecordError('noncharacter', 'the text holds one of U+FDD0 to U+FDD3')
      return self._typed.sub(f'{_TYPED}\\g<0>{_END_TYPED}', value)
    if isinstance(value, dict):
      return {key: self._mark(item) for key, item in value.items()}
    return [self._mark(item) for item in value] if isinstance(value, list) else value


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what it holds as written by the assistant."""

  tags = {'generation'}  # noqa: RUF012  (Jinja's interface)

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('_span'), [], [], body).set_lineno(line)

  def _span(self, caller: Callable[[], str]) -> str:
    return f'{_SPAN}{caller()}{_END_SPAN}'


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _any_of(words: list[str]) -> re.Pattern[str]:
  longest_first = sorted(filter(None, words), key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def _check_prefix(prefix: str, text: str) -> str:
  if not text.startswith(prefix):
    same = next(
      (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text)
    )
    raise RecordError(
      'chat template rewrites the prompt',
      f'{prefix[same : same + 40]!r} becomes {text[same : same + 40]!r} once a response follows',
    )
  return prefix
