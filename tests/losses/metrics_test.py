"""Metrics against plain numpy, and the law that sums of parts give the metrics of the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax.losses import LOSSES, Branches, PairLogps, total_loss
from dpo_flax.losses.metrics import displacement, metric_sums, summarize
from helpers.pairs import make_objective, make_pairs


def filled(chosen, rejected):
  return Branches(jnp.full((1, 1), chosen), jnp.full((1, 1), rejected))


def report(pairs, objective):
  return summarize(metric_sums(pairs, total_loss(pairs, objective), objective))


@pytest.fixture
def validation():
  """64 slots, 43 of them real, with rewards that are partly right."""
  mask = np.random.default_rng(0).permutation(np.arange(64) < 43).reshape(16, 4)
  statistics = {
    'kl': Branches(jnp.full((16, 4), 0.3), jnp.full((16, 4), 0.1)),
    'entropy': Branches(jnp.full((16, 4), 2.0), jnp.full((16, 4), 1.0)),
  }
  pairs = make_pairs((16, 4), seed=1, scale=3.0, pair_mask=mask, **statistics)
  return jax.tree.map(lambda x: x * pairs.pair_mask, pairs)


def real(pairs, *names):
  mask = np.asarray(pairs.pair_mask) > 0
  return tuple(np.asarray(getattr(pairs, name), np.float64)[mask] for name in names)


def reward_margins(pairs, beta):
  pw, pl, rw, rl = real(
    pairs, 'policy_chosen', 'policy_rejected', 'reference_chosen', 'reference_rejected'
  )
  return beta * ((pw - rw) - (pl - rl))


def test_means_are_over_real_pairs(validation):
  objective = make_objective(beta=0.2)
  metrics = report(validation, objective)
  pw, pl, rw, rl = real(
    validation, 'policy_chosen', 'policy_rejected', 'reference_chosen', 'reference_rejected'
  )
  margins = reward_margins(validation, 0.2)
  expected = {
    'dpo_loss': np.mean(np.log1p(np.exp(-margins))),
    'dpo_margin_policy': np.mean(pw - pl),
    'dpo_margin_ref': np.mean(rw - rl),
    'dpo_accuracy': np.mean(margins > 0),
    'dpo_chosen_reward': np.mean(0.2 * (pw - rw)),
    'dpo_rejected_reward': np.mean(0.2 * (pl - rl)),
    'chosen_logps': np.mean(pw),
    'rejected_logps': np.mean(pl),
    'kl_chosen': 0.3,
    'kl_rejected': 0.1,
    'entropy': 1.5,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_sums_of_parts_give_the_metrics_of_the_whole(validation):
  """Uneven microbatches: a mean of means would weigh pairs differently."""
  objective = make_objective()
  parts = [
    jax.tree.map(lambda x, at=at: x[at], validation) for at in np.split(np.arange(16), [3, 4])
  ]
  sums = [metric_sums(part, total_loss(part, objective), objective) for part in parts]
  merged = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *sums)
  whole = report(validation, objective)
  assert summarize(merged).keys() == whole.keys()
  for name, value in summarize(merged).items():
    np.testing.assert_allclose(value, whole[name], rtol=1e-4, err_msg=name)
  mean_of_means = np.mean([report(part, objective)['dpo_loss'] for part in parts])
  assert abs(mean_of_means - whole['dpo_loss']) > 1e-3


def test_a_weight_of_two_is_the_pair_given_twice():
  pairs = make_pairs((1, 4), seed=2)
  weighted = dataclasses.replace(pairs, pair_weight=jnp.array([[2.0, 1, 1, 1]]))
  repeated = jax.tree.map(lambda x: x[:, jnp.array([0, 0, 1, 2, 3])], pairs)
  objective = make_objective()
  np.testing.assert_allclose(
    report(weighted, objective)['dpo_loss'], report(repeated, objective)['dpo_loss'], rtol=1e-6
  )


def test_accuracy_is_one_half_before_the_first_step():
  metrics = report(make_pairs(scale=0.0), make_objective())
  assert metrics['dpo_accuracy'] == 0.5
  np.testing.assert_allclose(metrics['calibration_error'], 0.0, atol=1e-7)
  assert 'margin_length_correlation' not in metrics  # a constant correlates with nothing


# Three pairs: the policy's margins are 2, -1 and 1, the reference's 1, 0 and 1.
ORDERED = {
  'policy_chosen': [[-4.0, -6.0, -3.0]],
  'policy_rejected': [[-6.0, -5.0, -4.0]],
  'reference_chosen': [[-5.0, -5.0, -3.0]],
  'reference_rejected': [[-6.0, -5.0, -4.0]],
  'chosen_lengths': [[2, 2, 2]],
  'rejected_lengths': [[4, 4, 4]],
}


COMPARED = tuple(name for name, loss in LOSSES.items() if loss.needs_reference)


@pytest.mark.parametrize('name', COMPARED)
def test_accuracy_is_the_share_of_pairs_with_a_margin_above_the_references(name):
  """Above, below and equal: half of three, whatever the loss calls a reward."""
  metrics = report(make_pairs((1, 3), **ORDERED), make_objective(name))
  np.testing.assert_allclose(metrics['dpo_accuracy'], (1 + 0 + 0.5) / 3)
  assert ('reward_accuracy' in metrics) == (name in ('ipo', 'sigmoid_norm'))


@pytest.mark.parametrize('name', ('ipo', 'sigmoid_norm'))
def test_accuracy_and_the_accuracy_of_mean_rewards_may_contradict(name):
  """Chosen gains 1 nat over 10 tokens, rejected 0.5 over 1: more in all, less per token."""
  gains = {'reference_chosen': [[-5.0]], 'reference_rejected': [[-5.0]]}
  gains |= {'policy_chosen': [[-4.0]], 'policy_rejected': [[-4.5]]}
  pairs = make_pairs((1, 1), **gains, chosen_lengths=[[10]], rejected_lengths=[[1]])
  metrics = report(pairs, make_objective(name))
  assert metrics['dpo_margin_policy'] > metrics['dpo_margin_ref']
  assert metrics['dpo_accuracy'] == 1.0
  assert metrics['reward_accuracy'] == 0.0
  assert metrics['dpo_chosen_reward'] < metrics['dpo_rejected_reward']


def test_accuracy_counts_the_tails_that_ld_alpha_leaves_out():
  tails = {'policy_tails': filled(-3.0, 0.0), 'reference_tails': filled(-5.0, 0.0)}
  gains = {'policy_chosen': [[-10.0]], 'policy_rejected': [[-4.0]]}
  gains |= {'reference_chosen': [[-11.0]], 'reference_rejected': [[-4.0]]}
  metrics = report(make_pairs((1, 1), **gains, **tails), make_objective(ld_alpha=0.0))
  assert (metrics['dpo_accuracy'], metrics['reward_accuracy']) == (1.0, 0.0)


@pytest.mark.parametrize(('name', 'expected'), (('cpo', 2 / 3), ('simpo', 0.0), ('sft', 0.0)))
def test_accuracy_without_a_reference_compares_log_probs_as_the_loss_reads_them(name, expected):
  """Sums of -4, -6, -3 against -6, -5, -4; means of -2, -3, -1.5 against -1.5, -1.25, -1."""
  pairs = make_pairs((1, 3), **ORDERED)
  pairs = dataclasses.replace(pairs, reference_chosen=None, reference_rejected=None)
  metrics = report(pairs, make_objective(name))
  np.testing.assert_allclose(metrics['dpo_accuracy'], expected)
  assert 'reward_accuracy' not in metrics


def test_accuracy_with_a_free_reference_is_that_of_the_policy_alone():
  metrics = report(make_pairs((1, 3), **ORDERED), make_objective(reference_free=True))
  np.testing.assert_allclose(metrics['dpo_accuracy'], 2 / 3)


def test_metrics_need_the_policys_log_probs_alone():
  pairs = PairLogps(policy_chosen=jnp.array([-4.0, -6.0]), policy_rejected=jnp.array([-6.0, -5.0]))
  metrics = report(pairs, make_objective(reference_free=True))
  assert (metrics['dpo_accuracy'], metrics['dpo_margin_policy']) == (0.5, 0.5)
  assert not any('perplexity' in name or 'length' in name for name in metrics)


def test_perplexities_are_over_tokens(validation):
  metrics = report(validation, make_objective())
  for model in ('policy', 'reference'):
    for branch in ('chosen', 'rejected'):
      logps, lengths = real(validation, f'{model}_{branch}', f'{branch}_lengths')
      np.testing.assert_allclose(
        metrics[f'{model}_perplexity_{branch}'], np.exp(-logps.sum() / lengths.sum()), rtol=1e-5
      )


def test_calibration_error_equals_a_plain_loop(validation):
  margins = reward_margins(validation, 0.1)
  confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
  expected = 0.0
  for low in np.arange(10) / 20 + 0.5:
    inside = (confidence >= low) & (confidence < low + 0.05)
    if inside.any():
      expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
  metrics = report(validation, make_objective(beta=0.1))
  np.testing.assert_allclose(metrics['calibration_error'], expected, rtol=1e-4)


def test_accuracy_by_margin_equals_a_plain_loop(validation):
  margins = reward_margins(validation, 0.1)
  metrics = report(validation, make_objective(beta=0.1))
  edges = (('0', '0.25'), ('0.25', '0.5'), ('0.5', '1'), ('1', '2'), ('2', 'inf'))
  for low, high in edges:
    inside = (np.abs(margins) >= float(low)) & (np.abs(margins) < float(high))
    name = f'accuracy_margin_{low}_to_{high}'
    assert (name in metrics) == inside.any()
    if inside.any():
      np.testing.assert_allclose(metrics[name], (margins[inside] > 0).mean(), rtol=1e-6)


def test_length_correlation_equals_numpy(validation):
  chosen, rejected = real(validation, 'chosen_lengths', 'rejected_lengths')
  expected = np.corrcoef(chosen - rejected, reward_margins(validation, 0.1))[0, 1]
  metrics = report(validation, make_objective(beta=0.1))
  np.testing.assert_allclose(metrics['margin_length_correlation'], expected, rtol=1e-4)


def test_metrics_without_a_reference_leave_its_numbers_out():
  pairs = dataclasses.replace(make_pairs(), reference_chosen=None, reference_rejected=None)
  metrics = report(pairs, make_objective('simpo', beta=2.0))
  assert 'dpo_margin_ref' not in metrics
  reward = 2.0 * np.mean(pairs.policy_chosen / pairs.chosen_lengths)
  np.testing.assert_allclose(metrics['dpo_chosen_reward'], reward, rtol=1e-5)


def test_metrics_carry_no_gradient():
  pairs, objective = make_pairs(), make_objective()

  def accuracy(chosen):
    moved = dataclasses.replace(pairs, policy_chosen=chosen)
    sums = metric_sums(moved, total_loss(moved, objective), objective)
    return sum(jnp.sum(x) for x in jax.tree.leaves(sums))

  np.testing.assert_array_equal(jax.grad(accuracy)(pairs.policy_chosen), 0.0)


def test_displacement_is_the_change_of_both_log_probs():
  start = {'chosen_logps': -40.0, 'rejected_logps': -50.0, 'dpo_loss': 0.69}
  now = {'chosen_logps': -43.0, 'rejected_logps': -60.5, 'dpo_loss': 0.4}
  expected = {'chosen_logps_change': -3.0, 'rejected_logps_change': -10.5}
  assert displacement(now, start) == expected
  assert displacement(now, now) == dict.fromkeys(expected, 0.0)


@pytest.mark.parametrize('start', ({}, {'chosen_logps': None}))
def test_displacement_from_an_unknown_start_is_left_out(start):
  assert displacement({'chosen_logps': -43.0, 'rejected_logps': -60.5}, start) == {}
