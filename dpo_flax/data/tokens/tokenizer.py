"""Preference -> token ids, with SentencePiece models, tokenizer.json files and chat templates.

Prompt and response are encoded together, as the model will read them, and split where the prompt
ends. Where a token would lie on both sides of that border, all of it is response: the prompt
is then the longest beginning that the encodings of the prompt alone, of prompt + chosen and of
prompt + rejected have in common. So both branches see the same prompt ids, and every character of a
response is predicted by its loss.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from dpo_flax.data.records.fields import RecordError, shared_length
from dpo_flax.data.records.preference import Preference, Span, target_spans
from dpo_flax.data.tokens.backends import Backend, SentencePieceBackend, TokenizersBackend
from dpo_flax.data.tokens.chat_template import ChatTemplate, Rendering
from dpo_flax.files.strict_json import StrictJsonError, parse_object

_FILES = ('tokenizer.json', 'tokenizer.model')  # in order of preference
_SETTINGS = ('config.json', 'special_tokens_map.json', 'tokenizer_config.json')  # the last one wins


class EncodedPair(NamedTuple):
  """Token ids. An id in a response that is no target (a later turn of the user) is held as ~id."""

  prompt: list[int]
  chosen: list[int]
  rejected: list[int]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer as a training run uses it; `load_tokenizer` makes it."""

  backend: Backend
  bos_id: int | None
  eos_id: int
  add_bos: bool  # to plain text; a chat template writes its own
  template: ChatTemplate | None
  fingerprint: str  # SHA-256 of the files that decide any id
  origin: tuple[Any, ...]  # what it was loaded with

  def __reduce__(self) -> tuple[Any, ...]:
    path, chat_template, variables, history = self.origin
    load = functools.partial(load_tokenizer, variables=variables, history=history)
    return load, (path, chat_template)

  @property
  def vocab_size(self) -> int:
    return self.backend.vocab_size

  def decode(self, ids: list[int]) -> str:
    return self.backend.decode([~i if i < 0 else i for i in map(int, ids)])

  def encode(self, preference: Preference) -> EncodedPair:
    """Encodes one pair: one BOS at most, and an end token closing every response.

    Raises:
      RecordError: chat data with no template, a template that fails, nothing to predict from, or
        responses that become the same ids.
    """
    is_text = isinstance(preference.prompt, str)
    pair = self._encode_text(preference) if is_text else self._encode_chat(preference)
    if not pair.prompt:
      raise RecordError(
        'empty prompt', 'it has no token of its own, and the tokenizer adds no BOS to predict from'
      )
    if pair.chosen == pair.rejected:
      raise RecordError(
        'identical responses', 'chosen and rejected differ as text, but their token ids are equal'
      )
    return pair

  def _encode_text(self, preference: Preference) -> EncodedPair:
    prompt, chosen, rejected = map(str, (preference.prompt, preference.chosen, preference.rejected))
    renderings = [
      _join(prompt, chosen, preference.chosen_context),
      _join(prompt, rejected, preference.rejected_context),
    ]
    pair = self._split(prompt, renderings, self.backend.encode)
    return pair._replace(prompt=[self.bos_id, *pair.prompt]) if self.add_bos else pair

  def _encode_chat(self, preference: Preference) -> EncodedPair:
    template = self.template
    if template is None:
      raise RecordError(
        'chat data without a chat template',
        'the tokenizer has none; set data.chat_template to a file or to the template itself',
      )
    renderings = template.render_pair(preference)
    chosen, rejected = (r.text[: r.spans[0][0]] for r in renderings)
    if chosen != rejected:
      raise RecordError(
        'chat template rewrites the prompt', 'its text before chosen and before rejected differs'
      )
    pair = self._split(chosen, renderings, lambda text: self.backend.encode_chat(text, template))
    if pair.prompt[:2] == [self.bos_id] * 2:
      raise RecordError('BOS twice', 'the chat template writes it twice: take one out')
    return pair

  def _split(
    self, prompt: str, renderings: list[Rendering], encode: Callable[[str], list[int]]
  ) -> EncodedPair:
    """Encodes the prompt with either response, and parts them."""
    branches = [encode(rendering.text[: rendering.spans[-1][1]]) for rendering in renderings]
    prompt_ids = encode(prompt)
    n = min(shared_length(prompt_ids, ids) for ids in branches)
    responses = []
    for rendering, ids in zip(renderings, branches, strict=True):
      response = ids[n:]
      if not response:
        raise RecordError('empty response', 'the tokenizer drops all of its characters')
      for (_, end), (begin, _) in itertools.pairwise(rendering.spans):
        first, last = (shared_length(encode(rendering.text[:at]), ids) - n for at in (end, begin))
        response[first:last] = [~i for i in response[first:last]]
      responses.append(response if rendering.closed else [*response, self.eos_id])
    return EncodedPair(branches[0][:n], *responses)


def _join(prompt: str, response: str, context: tuple[Span, ...]) -> Rendering:
  """Returns a text response behind its prompt."""
  n = len(prompt)
  spans = [(n + start, n + end) for start, end in target_spans(response, context)]
  return Rendering(prompt + response, spans, closed=False)


def load_tokenizer(
  path: str,
  chat_template: str | None = None,
  *,
  variables: Mapping[str, Any] | None = None,
  history: str = 'exact',
) -> Tokenizer:
  """Loads a tokenizer from a directory in Hugging Face layout, or from one file.

  Args:
    path: local or gs://. Of a directory, tokenizer.json is preferred to tokenizer.model; beside
      them tokenizer_config.json, special_tokens_map.json, config.json and chat_template.jinja are
      read where they exist.
    chat_template: a file, or the template itself; it wins over the tokenizer's own.
    variables: what the template is given besides, such as {'enable_thinking': False}.
    history: exact | rendered, see ChatTemplate.

  Raises:
    ValueError: files that are missing or broken, an EOS that is nowhere defined, or a variable
      strftime_now that is no date.
  """
  if variables and 'strftime_now' in variables:
    _check_date(variables['strftime_now'])
  file = _find(epath.Path(path))
  settings = _read_settings(file.parent)
  content = file.read_bytes()
  json_file = file.name.endswith('.json')
  try:
    backend = (TokenizersBackend if json_file else SentencePieceBackend)(content, settings)
  except Exception as error:  # both libraries raise bare Exceptions
    name = 'tokenizers file' if json_file else 'SentencePiece model'
    raise ValueError(f'{file} cannot be read as a {name}: {error}') from None
  names = _special_names(settings)
  bos_id, eos_id, add_bos = _ends(backend, names, settings)
  if eos_id is None:
    raise ValueError(
      f'{file} names no end-of-text token: add "eos_token" to {file.parent}/tokenizer_config.json'
    )
  source = _template_source(chat_template, settings, file.parent)
  template = None
  given = names | dict(variables or {})
  if source is not None:
    template = ChatTemplate(
      source,
      controls=list(backend.controls),
      typed=sorted(backend.special | {names.get('eos_token', '')}),
      variables=given,
      history=history,
    )
  decided = json.dumps([bos_id, eos_id, add_bos, given, source, history, settings.get('legacy')])
  fingerprint = hashlib.sha256(hashlib.sha256(content).digest() + decided.encode()).hexdigest()
  origin = (path, chat_template, dict(variables or {}), history)
  return Tokenizer(backend, bos_id, eos_id, add_bos, template, fingerprint, origin)


def _check_date(date: Any) -> None:
  try:
    datetime.date.fromisoformat(date)
  except (TypeError, ValueError):
    raise ValueError(
      f"data.template_variables: strftime_now is {date!r}, not a date such as '2024-07-26'"
    ) from None


def _find(path: epath.Path) -> epath.Path:
  if not path.exists():
    raise ValueError(f'{path} does not exist: set data.tokenizer to a directory or a file')
  if not path.is_dir():
    return path
  files = [path / name for name in _FILES if (path / name).exists()] or sorted(path.glob('*.model'))
  if not files:
    raise ValueError(f'{path} holds neither {" nor ".join(_FILES)}')
  return files[0]


def _read_settings(directory: epath.Path) -> dict[str, Any]:
  settings: dict[str, Any] = {}
  for name in _SETTINGS:
    if (directory / name).exists():
      try:
        settings |= parse_object((directory / name).read_bytes())
      except StrictJsonError as error:
        raise ValueError(f'{directory / name} is not JSON: {error}') from None
  return settings


def _special_names(settings: dict[str, Any]) -> dict[str, str]:
  """Returns bos_token, eos_token, ... as text."""
  tokens = {key: settings[key] for key in settings if key.endswith('_token')}
  texts = {key: t['content'] if isinstance(t, dict) else t for key, t in tokens.items()}
  return {key: text for key, text in texts.items() if isinstance(text, str)}


def _ends(
  backend: Backend, names: dict[str, str], settings: dict[str, Any]
) -> tuple[int | None, int | None, bool]:
  """Returns BOS, EOS and whether plain text begins with BOS; fills in missing names."""
  ids = {}
  for end in ('bos', 'eos'):
    i = backend.controls.get(names.get(f'{end}_token', ''), settings.get(f'{end}_token_id'))
    i = i[0] if isinstance(i, list) else i
    if i is None and isinstance(backend, SentencePieceBackend):
      i = backend.controls.get({'bos': '<s>', 'eos': '</s>'}[end])
    ids[end] = i
  first = backend.first_added if isinstance(backend, TokenizersBackend) else ids['bos']
  if ids['bos'] is None:
    ids['bos'] = first
  for end, i in ids.items():
    text = next((name for name, j in backend.controls.items() if i == j), None)
    if text is not None:
      names.setdefault(f'{end}_token', text)
  add_bos = settings.get('add_bos_token')
  add_bos = first is not None if add_bos is None else add_bos
  return ids['bos'], ids['eos'], bool(add_bos) and ids['bos'] is not None


def _template_source(
  given: str | None, settings: dict[str, Any], directory: epath.Path
) -> str | None:
  if given is not None:
    if '{' in given or '\n' in given:
      return given
    if not epath.Path(given).exists():
      raise ValueError(f'data.chat_template: {given} is neither a file nor a template')
    return epath.Path(given).read_text()
  if (directory / 'chat_template.jinja').exists():
    return (directory / 'chat_template.jinja').read_text()
  own = settings.get('chat_template')
  if isinstance(own, list):
    own = {entry['name']: entry['template'] for entry in own}.get('default')
  return own
