"""Planned rows -> the arrays of a packed batch.

A row holds several complete pairs. Here prompt a b c, chosen X $, rejected Y Z $ ($ is EOS) of
record 7 meet a row of 12 tokens and P = 1 pair slot, so S = 2 answers. In the shared layout,
[ prompt[:-1] | p_last chosen | p_last rejected ], both answers see one copy of the prompt:

  index           0   1   2   3   4   5   6   7   8   9  10  11
  tokens          a   b   c   X   $   c   Y   Z   $   0   0   0
  positions       0   1   2   3   4   2   3   4   5   0   0   0
  visible_until   9   9   5   5   5   9   9   9   9  10  11  12
  targets         0   0   X   $   0   Y   Z   $   0   0   0   0
  answer_ids      2   2   0   0   2   1   1   1   2   2   2   2

In the separate layout, [ prompt chosen ] [ prompt rejected ], each has its own:

  index           0   1   2   3   4   5   6   7   8   9  10  11
  tokens          a   b   c   X   $   a   b   c   Y   Z   $   0
  positions       0   1   2   3   4   0   1   2   3   4   5   0
  visible_until   5   5   5   5   5  11  11  11  11  11  11  12
  targets         0   0   X   $   0   0   0   Y   Z   $   0   0
  answer_ids      2   2   0   0   2   2   2   1   1   1   2   2

And in both, of what the row holds:

  answer_mask    [S]     1 1     1.0 for an answer, 0.0 for an empty slot
  pairs          [P, 2]  0 1     the answers that are chosen and rejected; 0 0 where empty
  pair_mask      [P]     1       1.0 for a pair, 0.0 for an empty slot
  pair_index     [P]     7       the record's index in its source; -1 where empty

tokens           0 where padding.
positions        of the token in its own sequence, for the rotary embedding.
visible_until    key t is visible to the queries q with t <= q < visible_until[t]. This is the only
                 mask. A padding token sees itself alone, so that a softmax stays finite.
targets          the token that comes next in the same answer; 0 where it is no part of one.
answer_ids       the answer that the target belongs to, an index in [0, S); S where a position
                 predicts nothing that counts.
optional         reference_logps [S]; pair_weight, chosen_probability, margin [P], float32.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_flax.data.batches.plan import plan_rows

LAYOUTS = ('shared', 'separate')

Batch = dict[str, np.ndarray]


class PackedPair(NamedTuple):
  """A tokenized pair on its way into a row; ~id where a response token is no target."""

  index: int  # of the record in its source
  prompt: np.ndarray  # [P] int32
  chosen: np.ndarray  # [C] int32
  rejected: np.ndarray  # [R] int32
  pair_weight: float = 1.0
  chosen_probability: float = 1.0
  margin: float = 0.0

  @property
  def targets(self) -> tuple[int, int]:
    """How many tokens of chosen and of rejected have a log-prob."""
    return int(np.sum(self.chosen >= 0)), int(np.sum(self.rejected >= 0))


def pair_lengths(pairs: Iterable[PackedPair]) -> np.ndarray:
  """Returns the tokens of each pair's prompt, chosen and rejected, [N, 3]."""
  lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
  return np.array(lengths, int).reshape(-1, 3)


def row_lengths(lengths: np.ndarray, layout: str) -> np.ndarray:
  """Returns the tokens each pair takes in a row, [N], from [N, 3] prompt, chosen, rejected."""
  prompt, chosen, rejected = lengths.T
  return prompt + chosen + _repeated(prompt, layout) + rejected


def _repeated(prompt: np.ndarray, layout: str) -> np.ndarray:
  """Returns how many tokens of each prompt stand again before the rejected answer, [N].

  The shared layout repeats the last token alone, because it predicts the answer's first.
  """
  return np.ones_like(prompt) if layout == 'shared' else prompt


def pack_pairs(
  pairs: Sequence[PackedPair],
  *,
  tokens: int,  # T
  layout: str = 'shared',
  multiple: int = 1,  # empty rows make the number of rows a multiple of this
) -> Batch:
  """Packs pairs of token ids into as few rows as best-fit decreasing needs.

      batch = pack_pairs(pairs, tokens=2048, multiple=8)
      for i in range(0, len(batch['tokens']), 8):
        part = {name: array[i : i + 8] for name, array in batch.items()}

  Returns:
    The fields of `fill_batch`; P is the pairs of the fullest row, `columns` are those that any of
    the pairs gives.

  Raises:
    ValueError: a pair is longer than a row.
  """
  need = row_lengths(pair_lengths(pairs), layout)
  if need.max(initial=0) > tokens:
    longest = pairs[int(need.argmax())].index
    raise ValueError(f'tokens={tokens}: pair {longest} takes {need.max()}: cut or drop it first')
  plan = plan_rows(need, tokens=tokens)
  rows = [[pairs[i] for i in plan[row]] for row in range(len(plan))]
  rows += [[]] * (-len(rows) % multiple)
  slots = max(plan.pairs_per_row, 1)
  columns = given_columns(pairs)
  return fill_batch(rows, tokens=tokens, pairs_per_row=slots, layout=layout, columns=columns)


def given_columns(pairs: Sequence[PackedPair]) -> tuple[str, ...]:
  """Returns the optional fields that any of the pairs gives."""
  defaults = PackedPair._field_defaults
  return tuple(
    name for name, value in defaults.items() if any(getattr(pair, name) != value for pair in pairs)
  )


def fill_batch(
  rows: Sequence[Iterable[PackedPair]],
  *,
  tokens: int,
  pairs_per_row: int,
  layout: str,
  columns: tuple[str, ...] = (),  # of pair_weight, chosen_probability, margin: those the data has
) -> Batch:
  """Fills B rows of T tokens and P pair slots, as drawn above.

  Returns:
    tokens, positions, visible_until, targets, answer_ids [B, T] int32; answer_mask [B, S] float32,
    S = 2 P; pairs [B, P, 2] int32; pair_mask [B, P] float32; pair_index [B, P] int32; each of
    `columns` [B, P] float32. The pair in slot p has the answers 2p and 2p + 1.
  """
  rows = [list(row) for row in rows]
  batch = _empty_batch(len(rows), tokens, pairs_per_row, columns)
  pairs = [pair for row in rows for pair in row]
  if not pairs:
    return batch
  counts = np.array([len(row) for row in rows])
  row = np.repeat(np.arange(len(rows)), counts)
  slot = np.arange(len(pairs)) - np.repeat(counts.cumsum() - counts, counts)
  answers = 2 * slot[:, None] + np.arange(2)  # [n, 2] chosen, rejected
  batch['answer_mask'][row[:, None], answers] = 1.0
  batch['pairs'][row, slot] = answers
  batch['pair_mask'][row, slot] = 1.0
  batch['pair_index'][row, slot] = [pair.index for pair in pairs]
  for name in columns:
    batch[name][row, slot] = [getattr(pair, name) for pair in pairs]
  lengths = pair_lengths(pairs)
  run = _fill_run(pairs, lengths, row, answers, layout=layout, nothing=2 * pairs_per_row)
  used = np.bincount(row, row_lengths(lengths, layout), len(rows))
  filled = np.arange(tokens) < used[:, None]  # [B, T]
  for name, values in run.items():
    batch[name][filled] = values
  return batch


def _empty_batch(rows: int, tokens: int, slots: int, columns: tuple[str, ...]) -> Batch:
  shape = (rows, tokens)
  visible = np.arange(1, tokens + 1, dtype=np.int32)  # padding sees itself alone
  empty = PackedPair._field_defaults
  return {
    'tokens': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
    'visible_until': np.tile(visible, (rows, 1)),
    'targets': np.zeros(shape, np.int32),
    'answer_ids': np.full(shape, 2 * slots, np.int32),
    'answer_mask': np.zeros((rows, 2 * slots), np.float32),
    'pairs': np.zeros((rows, slots, 2), np.int32),
    'pair_mask': np.zeros((rows, slots), np.float32),
    'pair_index': np.full((rows, slots), -1, np.int32),
    **{name: np.full((rows, slots), empty[name], np.float32) for name in columns},
  }


def _fill_run(
  pairs: list[PackedPair],
  lengths: np.ndarray,  # [n, 3] prompt, chosen, rejected
  row: np.ndarray,  # [n] each pair's row
  answers: np.ndarray,  # [n, 2] and the ids of its answers there
  *,
  layout: str,
  nothing: int,  # the answer id of what is no target
) -> Batch:
  """Returns the token fields of all pairs one behind the other, without padding."""
  prompt, chosen, rejected = lengths.T
  again = _repeated(prompt, layout)
  sizes = np.stack([prompt - again, again, chosen, again, rejected], axis=1)  # [n, 5] parts

  def spread(*values: np.ndarray | int) -> np.ndarray:
    """Repeats the value of each part, [n] or one, for each of its tokens."""
    columns = np.stack(np.broadcast_arrays(*values), axis=1)
    return np.repeat(columns.ravel().astype(np.int32), sizes.ravel())

  need = sizes.sum(axis=1)
  before = need.cumsum() - need  # tokens of earlier pairs, in all rows
  start = before - before[np.searchsorted(row, row)]  # in the pair's own row
  middle, end = start + prompt + chosen, start + need  # `again` begins, rejected ends
  second = before + chosen + again  # where position 0 of the rejected sequence would be
  tokens = np.concatenate(
    [
      part
      for p, n in zip(pairs, again.tolist(), strict=True)
      for part in (p.prompt, p.chosen, p.prompt[len(p.prompt) - n :], p.rejected)
    ]
  )
  # The answer that each token is part of.
  answer = spread(nothing, nothing, answers[:, 0], nothing, answers[:, 1])
  answer[tokens < 0] = nothing  # read, but no targets
  tokens = np.where(tokens < 0, ~tokens, tokens)
  # The next token is the target, in either layout.
  answer_ids = np.append(answer[1:], nothing)
  return {
    'tokens': tokens,
    'positions': np.arange(len(tokens)) - spread(before, before, before, second, second),
    'visible_until': spread(end, middle, middle, end, end),
    'targets': np.append(tokens[1:], 0) * (answer_ids != nothing),
    'answer_ids': answer_ids,
  }
