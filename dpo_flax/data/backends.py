"""The two kinds of tokenizer files, behind one interface."""

import functools
from typing import Any, Protocol

import sentencepiece
import tokenizers

from dpo_flax.data.chat_template import ChatTemplate


class Backend(Protocol):
  """What the two kinds of tokenizer files have in common."""

  controls: dict[str, int]  # every token that is matched whole in a rendered chat -> id
  special: set[str]  # those of them that text from a record must not produce
  vocab_size: int

  def encode(self, text: str) -> list[int]:
    """Encodes text in which nothing is a control token."""

  def encode_chat(self, text: str, template: ChatTemplate) -> list[int]:
    """Encodes a rendered chat, with the template's control tokens."""

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, control tokens included."""


class SentencePieceBackend:
  """A SentencePiece model. It never makes a control token from text: chats are split at them."""

  def __init__(self, model: bytes, settings: dict[str, Any]):
    self._model = _load_sentencepiece(model)
    # A second NormalizerSpec is merged into the first: here add_dummy_prefix = false.
    self._bare = _load_sentencepiece(model + b'\x1a\x02\x18\x00')
    size = self._model.get_piece_size()
    own = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
    added = {
      token['content']: int(i) for i, token in settings.get('added_tokens_decoder', {}).items()
    }
    self.controls = own | added
    self.special = set(self.controls)
    self.vocab_size = max(size, *(i + 1 for i in self.controls.values()), 0)
    self._names = {i: name for name, i in self.controls.items()}
    self._prefix_always = settings.get('legacy', True)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def encode_chat(self, text: str, template: ChatTemplate) -> list[int]:
    ids = []
    for piece, control in template.pieces(text):
      if control:
        ids.append(self.controls[piece])
      elif piece:
        prefix = self._prefix_always or not ids
        ids += (self._model if prefix else self._bare).encode(piece)
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
  """A tokenizer.json. Its special tokens are matched in a rendered chat, never in a text."""

  def __init__(self, content: bytes):
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


def _load_sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(model)
  return processor


def _load_tokenizer_json(content: bytes) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_buffer(content)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer
