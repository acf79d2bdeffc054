"""Laws of the way from tokens to answers and from answers to pairs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_flax.losses.answers import AnswerLogps, TokenLogps, pairs_of, scored, sum_by_answer
from dpo_flax.losses.pair_logps import Branches

ROWS, TOKENS, ANSWERS, PAIRS = 2, 24, 6, 4
PER_ANSWER = ('policy', 'reference', 'lengths', 'kl', 'entropy', 'alignments')


def draw_batch(seed=0):
  """Two rows of six slots for answers: row 0 has all six, row 1 four; pairs share answers.

  The tokens of an answer need not follow one another.
  """
  random = np.random.default_rng(seed)
  ids = np.stack([random.integers(0, n + 1, TOKENS) for n in (ANSWERS, 4)])
  ids[1][ids[1] == 4] = ANSWERS
  pairs = np.array([[[0, 1], [2, 3], [4, 5], [0, 5]], [[1, 0], [1, 2], [3, 1], [0, 0]]])
  return {
    'answer_ids': ids.astype(np.int32),
    'answer_mask': np.array([[1] * 6, [1] * 4 + [0] * 2], np.float32),
    'pairs': pairs.astype(np.int32),
    'pair_mask': np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.float32),
  }


def draw_answers(batch, seed=0):
  """Answers as a model gives them: zeros where there is none."""
  random = np.random.default_rng(seed)
  tokens = {name: random.normal(size=(ROWS, TOKENS)) for name in ('policy', 'reference')}
  tokens = {name: jnp.asarray(values * scored(batch)) for name, values in tokens.items()}
  mask = batch['answer_mask']
  values = {name: jnp.asarray(random.normal(size=mask.shape) * mask) for name in PER_ANSWER}
  values['lengths'] = total(scored(batch), batch)
  return AnswerLogps(**values, mask=jnp.asarray(mask), tokens=TokenLogps(**tokens))


def total(values, batch):
  return sum_by_answer(values, batch['answer_ids'], answers=ANSWERS)


def permuted(batch, answers, order):
  """Renames answer order[i] to i, everywhere."""
  new = np.append(np.argsort(order), ANSWERS).astype(np.int32)
  mask = batch['answer_mask'][:, order]
  batch = batch | {'answer_ids': new[batch['answer_ids']], 'answer_mask': mask}
  batch['pairs'] = np.where(batch['pair_mask'][..., None] > 0, new[batch['pairs']], 0)
  values = {name: getattr(answers, name)[:, order] for name in (*PER_ANSWER, 'mask')}
  return batch, dataclasses.replace(answers, **values)


class SumByAnswer(chex.TestCase):
  """With and without jit."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_an_answer_is_summed_from_its_own_tokens_alone(self):
    """Row 0 holds two answers and two empty slots, row 1 four; 4 marks all other tokens."""
    ids = jnp.array([[4, 0, 0, 1, 4, 4], [0, 1, 2, 2, 3, 3]])
    values = jnp.array([[100.0, 1, 2, 3, 100, 100], [1, 2, 3, 4, 5, 6]], jnp.bfloat16)
    sums = self.variant(lambda values, ids: sum_by_answer(values, ids, answers=4))(values, ids)
    chex.assert_type(sums, jnp.float32)
    np.testing.assert_array_equal(sums, [[3, 3, 0, 0], [1, 2, 7, 11]])


def test_neither_direction_scatters():
  """A scatter serialises on TPU: both the sums and their gradients are comparisons and sums."""
  batch = draw_batch()
  answers = draw_answers(batch)

  def loss(policy, tokens):
    changed = dataclasses.replace(answers, policy=total(policy, batch), tokens=tokens)
    logps = pairs_of(changed, batch, tails=True)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(logps))

  text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(answers.tokens.policy, answers.tokens))
  assert 'scatter' not in text and 'gather' not in text


def test_pairs_pick_their_two_answers_and_empty_slots_hold_zeros():
  batch = draw_batch()
  answers = draw_answers(batch)
  logps = pairs_of(answers, batch)
  names = {'policy': logps.policy, 'reference': logps.reference, 'entropy': logps.entropy}
  names |= {'kl': logps.kl, 'alignments': logps.alignments}
  names['lengths'] = Branches(logps.chosen_lengths, logps.rejected_lengths)
  for name, branches in names.items():
    expected = np.zeros((2, ROWS, PAIRS))
    for row, pair in np.argwhere(batch['pair_mask'] > 0):
      for side, answer in enumerate(batch['pairs'][row, pair]):
        expected[side, row, pair] = getattr(answers, name)[row, answer]
    np.testing.assert_array_equal(np.stack(branches), expected.astype(np.float32), err_msg=name)


@given(st.permutations(range(ANSWERS)), st.integers(0, 100))
@settings(max_examples=20)
def test_pairs_do_not_depend_on_the_order_of_the_answers(order, seed):
  batch = draw_batch(seed)
  answers = draw_answers(batch, seed)
  expected = pairs_of(answers, batch, tails=True)
  changed, moved = permuted(batch, answers, np.array(order))
  chex.assert_trees_all_equal(pairs_of(moved, changed, tails=True), expected)


@pytest.mark.parametrize('seed', range(3))
def test_tails_equal_a_plain_loop(seed):
  """An answer of several pairs has a tail for each: what passes the shorter one of that pair."""
  batch = draw_batch(seed)
  answers = draw_answers(batch, seed)
  logps = pairs_of(answers, batch, tails=True)
  for name in ('policy', 'reference'):
    values = np.asarray(getattr(answers.tokens, name))
    expected = np.zeros((2, ROWS, PAIRS), np.float32)
    for row, pair in np.argwhere(batch['pair_mask'] > 0):
      at = [np.flatnonzero(batch['answer_ids'][row] == a) for a in batch['pairs'][row, pair]]
      for side in (0, 1):
        for token in at[side][min(map(len, at)) :]:
          expected[side, row, pair] += values[row, token]
    found = np.stack(getattr(logps, f'{name}_tails'))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found).max() > 0.1


def test_tails_of_equally_long_answers_are_zero():
  batch = {
    'answer_ids': jnp.array([[0, 0, 1, 1, 4, 4]]),
    'answer_mask': jnp.array([[1.0, 1, 0, 0]]),
    'pairs': jnp.array([[[0, 1], [0, 0]]]),
    'pair_mask': jnp.array([[1.0, 0]]),
  }
  tokens = TokenLogps(jnp.ones((1, 6)), None)
  lengths = sum_by_answer(scored(batch), batch['answer_ids'], answers=4)
  answers = AnswerLogps(policy=lengths, lengths=lengths, mask=batch['answer_mask'], tokens=tokens)
  logps = pairs_of(answers, batch, tails=True)
  assert not np.any(logps.policy_tails) and logps.reference_tails is None


def test_tails_need_the_tokens():
  batch = draw_batch()
  answers = dataclasses.replace(draw_answers(batch), tokens=None)
  with pytest.raises(ValueError, match='keep_tokens'):
    pairs_of(answers, batch, tails=True)


def test_what_is_not_finite_stays_in_its_own_pairs():
  """And a slot without a pair passes no gradient on, whatever its loss makes of it."""
  batch = draw_batch()
  answers = draw_answers(batch)
  bad = dataclasses.replace(answers, policy=answers.policy.at[0, 4].set(jnp.nan))
  logps = pairs_of(bad, batch)
  found = np.isnan(logps.policy_chosen) | np.isnan(logps.policy_rejected)
  np.testing.assert_array_equal(found, [[False, False, True, False], [False] * 4])

  def loss(policy):
    logps = pairs_of(dataclasses.replace(answers, policy=policy), batch)
    return jnp.sum(jnp.where(logps.pair_mask > 0, 1.0, jnp.inf) * logps.policy_chosen)

  chex.assert_tree_all_finite(jax.grad(loss)(answers.policy))
