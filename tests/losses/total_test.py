"""The modifiers around the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax.losses import LOSSES, Branches, check_records, total_loss, wpo_weights
from helpers.pairs import make_objective, make_pairs


def filled(chosen, rejected):
  return Branches(jnp.full((2, 4), chosen), jnp.full((2, 4), rejected))


def test_a_tuple_of_losses_is_their_weighted_sum():
  """MPO's shape: preference, quality and generation losses together (arXiv:2411.10442)."""
  names, weights = ('sigmoid', 'bco_pair', 'sft'), (0.8, 0.2, 1.0)
  pairs, objective = make_pairs(), make_objective(names, loss_weights=weights)
  parts = (w * LOSSES[n](pairs) for n, w in zip(names, weights, strict=True))
  np.testing.assert_allclose(total_loss(pairs, objective), sum(parts), rtol=1e-6)


def test_sft_weight_adds_the_mean_token_loss_of_chosen():
  pairs = make_pairs()
  added = total_loss(pairs, make_objective(sft_weight=0.5)) - total_loss(pairs, make_objective())
  expected = 0.5 * -pairs.policy_chosen / pairs.chosen_lengths
  np.testing.assert_allclose(added, expected, rtol=1e-4)


def test_kl_penalty_adds_the_mean_of_both_responses():
  pairs = make_pairs(kl=filled(0.4, 0.2))
  objective = make_objective(kl_penalty_weight=2.0)
  added = total_loss(pairs, objective) - total_loss(pairs, make_objective())
  np.testing.assert_allclose(added, 2.0 * 0.3, rtol=1e-5)

  def penalised(kl):
    return total_loss(dataclasses.replace(pairs, kl=kl), objective).sum()

  slopes = jax.grad(penalised)(pairs.kl)
  np.testing.assert_allclose(slopes.chosen, 1.0, rtol=1e-6)
  np.testing.assert_allclose(slopes.rejected, 1.0, rtol=1e-6)


def test_kl_as_a_metric_does_not_enter_the_loss():
  without, with_kl = make_pairs(), make_pairs(kl=filled(0.4, 0.2))
  np.testing.assert_array_equal(
    total_loss(with_kl, make_objective(token_statistics=True)),
    total_loss(without, make_objective()),
  )


def test_wpo_weighs_pairs_without_a_gradient():
  pairs, objective = make_pairs(alignments=filled(-0.5, -0.2)), make_objective(wpo=True)
  weight = np.exp(-0.7)
  np.testing.assert_allclose(
    total_loss(pairs, objective), weight * total_loss(pairs, make_objective()), rtol=1e-5
  )
  slopes = jax.grad(
    lambda a: total_loss(dataclasses.replace(pairs, alignments=a), objective).sum()
  )(pairs.alignments)
  np.testing.assert_array_equal(slopes.chosen, 0.0)


def test_wpo_counts_no_pair_more_than_once():
  """Greedy tokens are likelier than samples: sum_v pi(v)^2 lies below their probability."""
  pairs = make_pairs(alignments=filled(0.8, -0.2))
  np.testing.assert_array_equal(wpo_weights(pairs), 1.0)


def test_wpo_leaves_sft_alone():
  pairs = make_pairs(alignments=filled(-0.5, -0.2))
  objective = make_objective(('sigmoid', 'sft'), wpo=True, sft_weight=0.1)
  preference, likelihood = (LOSSES[name](pairs) for name in ('sigmoid', 'sft'))
  expected = wpo_weights(pairs) * preference + 1.1 * likelihood
  np.testing.assert_allclose(total_loss(pairs, objective), expected, rtol=1e-6)


@pytest.mark.parametrize('field', ['chosen_probability', 'margin'])
def test_a_field_of_the_records_that_would_be_ignored_is_refused(field):
  check_records([field], make_objective(('sigmoid', 'sft')))
  for deaf in ('ipo', ('sigmoid', 'ipo'), 'sft'):
    with pytest.raises(ValueError, match=f'{field}, which (ipo|sft) does not use'):
      check_records([field], make_objective(deaf))


@pytest.mark.parametrize('field', ['chosen_probability', 'margin'])
def test_each_loss_of_a_mixture_sees_only_what_it_reads(field):
  objective = make_objective(('sigmoid', 'aot'))
  pairs, value = make_pairs(), jnp.full((2, 4), 0.9)
  extended = dataclasses.replace(pairs, **{field: value})
  added = total_loss(extended, objective) - total_loss(pairs, objective)
  alone = make_objective('sigmoid')
  expected = total_loss(extended, alone) - total_loss(pairs, alone)
  np.testing.assert_allclose(added, expected, atol=1e-5)


def test_sorted_losses_refuse_weights_of_pairs():
  with pytest.raises(ValueError, match='aot cannot use'):
    check_records(['pair_weight'], make_objective(('sigmoid', 'aot')))


def test_the_loss_compiles_with_the_objective_static():
  pairs, objective = make_pairs(), make_objective('robust', label_smoothing=0.1)
  compiled = jax.jit(total_loss, static_argnums=1)(pairs, objective)
  np.testing.assert_allclose(compiled, total_loss(pairs, objective), rtol=1e-6)
