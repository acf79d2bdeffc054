"""The two formats of tokenizer files, behind one interface."""

import functools
import itertools
import json
import re
from typing import Any, Protocol

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dpo_flax.data.tokens.chat_template import ChatTemplate

# protobuf makes it when the module is imported, where no type checker sees it.
_ModelProto: Any = vars(sentencepiece_model_pb2)['ModelProto']

# SentencePiece writes a space as \u2581.
_WORD = re.compile('\u2581*[^\u2581]+|\u2581+')
_ACROSS = re.compile('[^\u2581]\u2581')
# How control tokens are written; other pieces defined by the user are HTML tags and line breaks.
_CONTROL = re.compile(r'<\|.*\|>|<(start|end)_of_\w+>|<unused\d+>|\[/?[A-Z_]+\]')
_KNOWN, _SHORT = 1 << 18, 64  # words remembered, and the characters of the longest


class Backend(Protocol):
  """What the two formats of tokenizer files have in common."""

  controls: dict[str, int]  # every token that is matched as a unit in a rendered chat -> id
  special: set[str]  # those of them that text from a record must not produce
  vocab_size: int

  def encode(self, text: str) -> list[int]:
    """Encodes text in which nothing is a control token."""
    ...

  def encode_chat(self, text: str, template: ChatTemplate) -> list[int]:
    """Encodes a rendered chat, with the template's control tokens."""
    ...

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, control tokens included."""
    ...


class SentencePieceBackend:
  """A SentencePiece model. It never makes a control token from text: chats are split at them.

  Gemma's models hold <start_of_turn> as a piece `defined by the user`, which they would find in any
  text; such pieces are made controls where the settings beside the model call them special, or
  where they are written as control tokens are.
  """

  def __init__(self, model: bytes, settings: dict[str, Any]):
    proto = _ModelProto.FromString(model)
    special = _special_tokens(settings)
    for piece in proto.pieces:
      named = piece.piece in special or _CONTROL.fullmatch(piece.piece)
      if piece.type == piece.USER_DEFINED and named:
        piece.type = piece.CONTROL
    self._model, self._words = _load_sentencepiece(proto), _Words(proto)
    proto.normalizer_spec.add_dummy_prefix = False
    self._bare = _load_sentencepiece(proto)
    size = self._model.get_piece_size()
    own = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
    added = {
      token['content']: int(i) for i, token in settings.get('added_tokens_decoder', {}).items()
    }
    self.controls = own | added
    self.special = own.keys() | (special & added.keys())
    self.vocab_size = max(size, *(i + 1 for i in self.controls.values()), 0)
    self._names = {i: name for name, i in self.controls.items()}
    self._prefix_always = settings.get('legacy', True)

  def encode(self, text: str) -> list[int]:
    return self._words.encode(self._model.normalize(text))

  def encode_chat(self, text: str, template: ChatTemplate) -> list[int]:
    ids = []
    for piece, control in template.pieces(text):
      if control:
        ids.append(self.controls[piece])
      elif piece:
        prefix = self._prefix_always or not ids
        ids += self._words.encode((self._model if prefix else self._bare).normalize(piece))
    return ids

  def decode(self, ids: list[int]) -> str:
    text, run = '', []
    for i in ids:
      if i in self._names:
        text += self._model.decode(run) + self._names[i]
        run = []
      else:
        run.append(i)
    return text + self._model.decode(run)


class TokenizersBackend:
  """A tokenizer.json. Its special tokens are matched in a rendered chat, never in a text.

  Special are those that the file itself or the settings beside it call so.
  """

  def __init__(self, content: bytes, settings: dict[str, Any]):
    content = _with_special(content, _special_tokens(settings))
    self._chat, self._text = _load_tokenizer_json(content), _load_tokenizer_json(content)
    self._text.encode_special_tokens = True
    added = self._chat.get_added_tokens_decoder()
    self.controls = {token.content: i for i, token in added.items()}
    self.special = {token.content for token in added.values() if token.special}
    self.vocab_size = max([self._chat.get_vocab_size(), *(i + 1 for i in added)])

  def encode(self, text: str) -> list[int]:
    return self._text.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def encode_chat(self, text: str, template: ChatTemplate) -> list[int]:
    if not template.has_typed(text):
      return self._chat.encode_batch_fast([text], add_special_tokens=False)[0].ids
    ids = []
    for piece, control in template.pieces(text):
      ids += [self.controls[piece]] if control else self.encode(piece)
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._chat.decode(ids, skip_special_tokens=False)

  @functools.cached_property
  def first_added(self) -> int | None:
    """The id that the file's post-processor puts before a text, if any."""
    bare = self._chat.encode('a', add_special_tokens=False).ids
    full = self._chat.encode('a').ids
    return full[0] if len(full) > len(bare) and full[:1] != bare[:1] else None


class _Words(dict[str, list[int]]):
  """Encodes normalized text word by word, each word once: a dictionary of the words it has met.

  In a BPE model none of whose pieces reaches past a word into the space before the next, no merge
  does either, so the ids of a text are those of its words. To other models a text is one word.
  """

  def __init__(self, proto: Any):
    as_it_is = _ModelProto()
    as_it_is.CopyFrom(proto)
    as_it_is.normalizer_spec.precompiled_charsmap = b''
    as_it_is.normalizer_spec.add_dummy_prefix = False
    as_it_is.normalizer_spec.remove_extra_whitespaces = False
    self._model = _load_sentencepiece(as_it_is)
    bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    apart = bpe and not any(_ACROSS.search(piece.piece) for piece in proto.pieces)
    self._word = _WORD if apart else re.compile('.+', re.DOTALL)

  def encode(self, text: str) -> list[int]:
    # All of the loop is in C.
    return list(itertools.chain.from_iterable(map(self.__getitem__, self._word.findall(text))))

  def __missing__(self, word: str) -> list[int]:
    ids = self._model.encode(word)
    if len(self) < _KNOWN and len(word) < _SHORT:
      self[word] = ids
    return ids


def _special_tokens(settings: dict[str, Any]) -> set[str]:
  """Returns the tokens that the files beside a model call special."""
  added = settings.get('added_tokens_decoder', {}).values()
  named = [token for key, token in settings.items() if key.endswith('_token')]
  named += settings.get('additional_special_tokens') or []
  texts = [token.get('content') if isinstance(token, dict) else token for token in named]
  special = {token['content'] for token in added if token.get('special')}
  return special | {text for text in texts if isinstance(text, str)}


def _with_special(content: bytes, names: set[str]) -> bytes:
  """Returns a tokenizer.json in which every token of `names` that it has is special."""
  values = json.loads(content)
  tokens = values['added_tokens']
  known = tokenizers.Tokenizer.from_buffer(content)
  for name in names - {token['content'] for token in tokens}:
    if (i := known.token_to_id(name)) is not None:
      plain = dict.fromkeys(['single_word', 'lstrip', 'rstrip', 'normalized'], False)
      tokens.append({'id': i, 'content': name, **plain})
  values['added_tokens'] = [
    token | {'special': token.get('special', False) or token['content'] in names}
    for token in sorted(tokens, key=lambda token: token['id'])
  ]
  return json.dumps(values).encode()


def _load_sentencepiece(proto: Any) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(proto.SerializeToString())
  return processor


def _load_tokenizer_json(content: bytes) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_buffer(content)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer
