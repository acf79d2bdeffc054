"""Pairs as the model will see them, decoded, with what is learned apart from what is read."""

import dataclasses
import itertools

import numpy as np

from dpo_flax.data.batches.pack import PackedPair
from dpo_flax.data.batches.schedule import permutation
from dpo_flax.data.batches.split import Side
from dpo_flax.data.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
  """Consecutive tokens that are alike."""

  text: str
  learned: bool  # whether the loss counts them
  special: bool  # whether they are control tokens


@dataclasses.dataclass(frozen=True)
class Example:
  """One pair."""

  where: str  # file:line
  prompt: list[Piece]
  chosen: list[Piece]
  rejected: list[Piece]
  tokens: tuple[int, int, int]  # in prompt, chosen, rejected


def pick(pairs: Side, tokenizer: Tokenizer, count: int, *, seed: int) -> list[Example]:
  """Returns `count` pairs of the split, drawn at random, decoded."""
  drawn = permutation(len(pairs), 'examples', seed)[:count]
  where = map(pairs.cache.where, pairs.pairs[drawn].tolist())
  return [
    _example(pair, at, tokenizer) for pair, at in zip(pairs.packed_pairs(drawn), where, strict=True)
  ]


def _example(pair: PackedPair, where: str, tokenizer: Tokenizer) -> Example:
  chosen, rejected = (_pieces(pair.prompt, ids, tokenizer) for ids in (pair.chosen, pair.rejected))
  empty = np.zeros(0, np.int32)
  prompt = [dataclasses.replace(p, learned=False) for p in _pieces(empty, pair.prompt, tokenizer)]
  tokens = len(pair.prompt), len(pair.chosen), len(pair.rejected)
  return Example(where, prompt, chosen, rejected, tokens)


def _pieces(before: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
  """Decodes ids behind others: alone, they may lose the space that they begin with."""
  controls = set(tokenizer.backend.controls.values())

  def flags(i: int) -> tuple[bool, bool]:
    return i >= 0, (i if i >= 0 else ~i) in controls

  pieces, seen = [], before.tolist()
  done = tokenizer.decode(seen)
  for (learned, special), run in itertools.groupby(ids.tolist(), flags):
    seen += run
    text = tokenizer.decode(seen)
    start = len(done) if text.startswith(done) else 0
    pieces.append(Piece(text[start:], learned, special))
    done = text
  return pieces
