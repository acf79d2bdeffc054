"""The process in which chat templates run.

A template is a program that came with a tokenizer. Jinja's sandbox keeps it from Python's
attributes; it does not keep it from `'a' * 10**9` or from loops without end, and both may happen
while it is only being compiled. So it runs in a process of its own, in little memory, which the
kernel ends when a request takes too long, by the processor's clock or, where it waits, the wall's.
"""

import datetime
import functools
import json
import resource
import signal
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from dpo_flax.data.tokens.helper_process import serve

MEMORY = 256 << 20  # bytes of address space
SECONDS = 1.0  # of processor time for one request
WALL_SECONDS = 60.0  # for one request, on however busy a machine
SPAN, END_SPAN = '\ufdd2', '\ufdd3'  # noncharacters around what {% generation %} holds
_TEXT = 1 << 24  # characters a template may make
# What templates take for today, so that token ids do not depend on the day they are made. It is the
# date that Llama 3.1's template falls back to; the variable strftime_now sets another.
_TODAY = '2024-07-26'


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what it holds as written by the assistant."""

  tags = {'generation'}  # noqa: RUF012  (Jinja's interface)

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('_span'), [], [], body).set_lineno(line)

  def _span(self, caller: Callable[[], str]) -> str:
    return f'{SPAN}{caller()}{END_SPAN}'


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
  """Compiles a template with what Hugging Face tokenizers give theirs."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise
  return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _answer(request: bytes) -> bytes:
  # The kernel ends the process: nothing evades that.
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
  try:
    answer = {'texts': _render(**json.loads(request))}
  except jinja2.TemplateSyntaxError as error:
    answer = {'syntax': f'line {error.lineno}: {error.message}'}
  except MemoryError:
    answer = {'error': f'it needs more than {MEMORY >> 20} MB'}
  except Exception as error:  # a template can raise anything at all
    answer = {'error': f'{type(error).__name__}: {str(error)[:500]}'}
  reply = json.dumps(answer).encode()
  signal.setitimer(signal.ITIMER_PROF, 0)
  signal.setitimer(signal.ITIMER_REAL, 0)
  return reply


def _render(source: str, variables: dict[str, Any], chats: list[list[Any]]) -> list[str]:
  """Renders each of [messages, tools, add_generation_prompt]."""
  template, texts = _compile(source), []
  today = datetime.datetime.fromisoformat(variables.get('strftime_now', _TODAY))
  for messages, tools, header in chats:
    text = template.render(
      messages=messages,
      tools=tools,
      documents=None,
      add_generation_prompt=header,
      **variables | {'strftime_now': today.strftime},
    )
    if len(text) > _TEXT:
      raise OverflowError(f'it makes {len(text)} characters')
    texts.append(text)
  return texts


if __name__ == '__main__':
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  serve(_answer)
