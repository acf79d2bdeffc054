"""From tokens to answers, and from answers to pairs.

A batch's row holds S answers. The numbers of each token are summed over every answer first;
pairs then pick two answers each by their indices, so that an answer may be in several pairs.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_flax.losses.pair_logps import Branches, PairLogps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogps:
  """Log-probs of each position's target, [B, T] float32, 0 where it belongs to no answer."""

  policy: jax.Array
  reference: jax.Array | None  # None: no reference was run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerLogps:
  """Log-probs and statistics of every answer of a batch, float32 [B, S]; empty slots hold zeros.

  Fields that are None were not asked for.

  >>> logps, ones = jnp.array([[-4.0, -10.0]]), jnp.ones((1, 2))
  >>> answers = AnswerLogps(policy=logps, lengths=4 * ones, mask=ones)
  >>> answers.kl is None
  True
  """

  policy: jax.Array  # log-prob of the answer, summed over its tokens
  reference: jax.Array | None = None  # None: no reference was run, and the batch holds none
  lengths: jax.Array  # tokens that count
  mask: jax.Array  # 1.0 for an answer
  kl: jax.Array | None = None  # token mean of KL(policy || reference) over the vocabulary, nats
  entropy: jax.Array | None = None  # token mean of the policy's entropy, nats
  alignments: jax.Array | None = None  # token mean of log pi(y_t) - log sum_v pi(v)^2
  tokens: TokenLogps | None = None  # kept where pairs need the tails of their answers
  # Scalars that the policy returned beside its hidden states, such as an auxiliary loss.
  statistics: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


# Field of a batch -> its dimensions, of which those of a letter are equal.
_DIMENSIONS = {
  **dict.fromkeys(('tokens', 'positions', 'visible_until', 'targets', 'answer_ids'), 'BT'),
  **dict.fromkeys(('answer_mask', 'reference_logps'), 'BS'),
  **dict.fromkeys(('pair_mask', 'pair_index', 'pair_weight', 'chosen_probability', 'margin'), 'BP'),
  'pairs': 'BP2',
}


def check_batch(batch: Mapping[str, jax.Array]) -> None:
  """Raises ValueError unless the fields of a batch have shapes that go together."""
  sizes = {'2': 2}
  for name, dimensions in _DIMENSIONS.items():
    if name not in batch:
      continue
    shape = jnp.shape(batch[name])
    fits = len(shape) == len(dimensions) and all(
      sizes.setdefault(letter, size) == size for letter, size in zip(dimensions, shape, strict=True)
    )
    if not fits:
      expected = ', '.join(str(sizes.get(letter, letter)) for letter in dimensions)
      raise ValueError(f'the batch has {name} of shape {shape}: expected [{expected}]')


def scored(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns [B, T] bool: whether a position's target belongs to an answer."""
  return batch['answer_ids'] < batch['answer_mask'].shape[1]


def sum_by_answer(
  values: jax.Array,  # [B, T]
  answer_ids: jax.Array,  # [B, T] int32 in [0, S]; S: the position scores nothing
  *,
  answers: int,  # S
) -> jax.Array:  # [B, S] float32
  """Sums per-token values over each answer, in float32."""
  # A comparison and a sum, where a scatter would serialise on TPU.
  member = _members(answer_ids, answers)
  return jnp.sum(jnp.where(member, values[..., None].astype(jnp.float32), 0.0), axis=1)


def pairs_of(
  answers: AnswerLogps,
  batch: Mapping[str, jax.Array],  # pairs, pair_mask; optional columns; answer_ids for tails
  *,
  tails: bool = False,
) -> PairLogps:
  """Returns what each pair of a batch has, [B, P], from what each answer has.

  The numbers do not depend on where in a row the answers are. Slots without a pair get zeros and
  pass no gradient on.

  >>> logps, ones = jnp.array([[-4.0, -10.0]]), jnp.ones((1, 2))
  >>> answers = AnswerLogps(policy=logps, lengths=4 * ones, mask=ones)
  >>> batch = {'pairs': jnp.array([[[1, 0]]]), 'pair_mask': jnp.ones((1, 1))}
  >>> print(pairs_of(answers, batch).policy_chosen)  # answer 1 is the better one
  [[-10.]]

  Args:
    answers: of this batch, from `answer_logps`.
    batch: the fields of `pack.fill_batch`.
    tails: also sum what lies past the length of each pair's shorter answer, which LD-DPO discounts
      (arXiv:2409.06411).

  Raises:
    ValueError: tails are asked for, and `answers` kept no tokens; the fields' shapes do not go
      together.
  """
  check_batch({**batch, 'answer_mask': answers.mask})

  def pick(values):
    return None if values is None else _pick(values, batch)

  policy, lengths = _pick(answers.policy, batch), _pick(answers.lengths, batch)
  reference = pick(answers.reference)
  policy_tails = reference_tails = None
  if tails:
    if answers.tokens is None:
      raise ValueError('tails=True needs the log-probs of tokens: answer_logps(keep_tokens=True)')
    policy_tails, reference_tails = (
      None if values is None else _sum_tails(values, batch, lengths)
      for values in (answers.tokens.policy, answers.tokens.reference)
    )
  return PairLogps(
    policy_chosen=policy.chosen,
    policy_rejected=policy.rejected,
    reference_chosen=reference and reference.chosen,
    reference_rejected=reference and reference.rejected,
    chosen_lengths=lengths.chosen,
    rejected_lengths=lengths.rejected,
    pair_mask=batch['pair_mask'],
    pair_weight=batch.get('pair_weight'),
    chosen_probability=batch.get('chosen_probability'),
    margin=batch.get('margin'),
    policy_tails=policy_tails,
    reference_tails=reference_tails,
    alignments=pick(answers.alignments),
    kl=pick(answers.kl),
    entropy=pick(answers.entropy),
  )


def _members(answer_ids: jax.Array, answers: int) -> jax.Array:
  """[B, T] -> [B, T, S] bool: which of the row's answers each position belongs to."""
  return answer_ids[..., None] == jnp.arange(answers)[None, None]


def _pick(values: jax.Array, batch: Mapping[str, jax.Array]) -> Branches:
  """[B, S] -> [B, P] of each pair's two answers; 0 where there is no pair."""
  # A comparison and a sum again: their gradient is no scatter either.
  slots = jnp.arange(values.shape[1])[None, None, None]
  member = (batch['pairs'][..., None] == slots) & (batch['pair_mask'][..., None, None] != 0)
  picked = jnp.sum(jnp.where(member, values[:, None, None], 0.0), axis=-1)  # [B, P, 2]
  return Branches(picked[..., 0], picked[..., 1])


def _sum_tails(
  values: jax.Array,  # [B, T]
  batch: Mapping[str, jax.Array],
  lengths: Branches,  # [B, P] tokens
) -> Branches:  # [B, P]
  """Sums, of both answers, the tokens past the length of their pair's shorter one.

  chosen    x x x x x      counts  0 0 0 1 1
  rejected  y y y                  0 0 0
  """
  ids = batch['answer_ids']
  member = _members(ids, batch['answer_mask'].shape[1])
  # The number of each token in its answer, from 1.
  rank = jnp.sum(jnp.where(member, jnp.cumsum(member, axis=1), 0), axis=-1)  # [B, T]
  shared = jnp.minimum(*lengths)[:, None]  # [B, 1, P]
  is_past = rank[..., None] > shared  # [B, T, P]
  is_past &= batch['pair_mask'][:, None] != 0
  is_tail = (ids[..., None, None] == batch['pairs'][:, None]) & is_past[..., None]  # [B, T, P, 2]
  values = values[..., None, None].astype(jnp.float32)
  tails = jnp.sum(jnp.where(is_tail, values, 0.0), axis=1)
  return Branches(tails[..., 0], tails[..., 1])
