"""The losses against closed forms, the papers' formulas in torch, finite differences, and laws."""

import dataclasses
from math import exp, log

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from torch.nn.functional import logsigmoid

from dpo_flax import losses
from dpo_flax.losses import LOSSES, Branches, PairLogps, total_loss
from helpers.pairs import loss_of, make_objective, make_pairs

ALL = tuple(LOSSES)


def sig(x):
  return 1 / (1 + exp(-x))


# r_w = 1, r_l = -1, beta = 0.25, so z = 0.5; log policy(w) = -4 over 4 tokens, log policy(l) = -10
# over 5.
HAND = {
  'sigmoid': (0.474077, {}),
  'sigmoid_norm': (-log(sig(0.25 * (1 / 4 + 1 / 5))), {}),
  'hinge': (0.5, {}),
  'ipo': ((0.45 - 2) ** 2, {}),
  'exo_pair': (
    sig(0.5) * log(sig(0.5) / 0.9) + sig(-0.5) * log(sig(-0.5) / 0.1),
    {'label_smoothing': 0.1},
  ),
  'robust': ((-0.8 * log(sig(0.5)) + 0.2 * log(sig(-0.5))) / 0.6, {'label_smoothing': 0.2}),
  'discopop': (
    -(1 - sig(1)) * log(sig(0.5)) + sig(1) * exp(-0.5),
    {'discopop_temperature': 0.5},
  ),
  'dpop': (0.474077, {}),
  'nca_pair': (-log(sig(0.25)) - log(sig(-0.25)) / 2 - log(sig(0.25)) / 2, {}),
  'bco_pair': (-2 * log(sig(0.25)), {}),
  'sppo_hard': (1.0 + 1.0, {}),
  'apo_zero': (1 - sig(0.25) + sig(-0.25), {}),
  'apo_down': (sig(0.25) + 1 - sig(0.5), {}),
  'aot': (0.474077, {}),
  'aot_unpaired': (0.474077, {}),
  'sft': (1.0, {}),
  'simpo': (-log(sig(0.25 * (-1 + 2) - 0.5)), {'gamma': 0.5}),
  'cpo': (-log(sig(1.5)) + 2 * 1.0, {'cpo_alpha': 2.0}),
  'orpo': (
    1.0 - 0.3 * log(sig(log((exp(-1) / (1 - exp(-1))) / (exp(-2) / (1 - exp(-2)))))),
    {'orpo_lambda': 0.3},
  ),
}


@pytest.fixture
def hand_pair():
  return make_pairs(
    (1, 1),
    policy_chosen=[[-4.0]],
    policy_rejected=[[-10.0]],
    reference_chosen=[[-5.0]],
    reference_rejected=[[-9.0]],
    chosen_lengths=[[4]],
    rejected_lengths=[[5]],
  )


@pytest.mark.parametrize('compile_', (lambda f: f, jax.jit), ids=('eager', 'jit'))
@pytest.mark.parametrize('name', ALL)
def test_loss_equals_the_value_worked_out_by_hand(name, compile_, hand_pair):
  expected, options = HAND[name]
  loss = compile_(lambda pairs: loss_of(name, pairs, beta=0.25, **options))(hand_pair)
  chex.assert_trees_all_close(loss, jnp.array([[expected]]), rtol=2e-6)
  objective = make_objective(name, beta=0.25, **options)
  total = compile_(lambda pairs: total_loss(pairs, objective))(hand_pair)
  chex.assert_trees_all_equal(total, loss)


def test_dpop_penalises_a_chosen_below_its_reference(hand_pair):
  pair = dataclasses.replace(hand_pair, reference_chosen=jnp.full((1, 1), -2.0))  # r_w = -2
  loss = losses.dpop(pair, beta=0.25, dpop_lambda=3.0)
  np.testing.assert_allclose(loss, [[-log(sig(0.25 * (-2 + 1 - 3 * 2)))]], rtol=2e-6)


def test_known_values_of_a_public_implementation():
  """Four pairs of numpy's seed 0; the two numbers are those of Tunix's own test."""
  random = np.random.RandomState(0)
  policy, reference = (random.normal(0, 5, size=(8, 4)).sum(axis=-1) for _ in range(2))
  pairs = make_pairs(
    (1, 4),
    policy_chosen=policy[None, :4],
    policy_rejected=policy[None, 4:],
    reference_chosen=reference[None, :4],
    reference_rejected=reference[None, 4:],
  )
  for label_smoothing, expected in ((0.0, 0.753059), (0.3, 0.925447)):
    loss = losses.sigmoid(pairs, beta=0.1, label_smoothing=label_smoothing).mean()
    np.testing.assert_allclose(loss, expected, atol=1e-6)


# The papers' formulas once more, in torch and float64: a pair is (policy_w, policy_l, reference_w,
# reference_l, |w|, |l|), a batch is vectors of these.


def paper_sigmoid(p, beta, eps=0.0):
  rho = (p.pw - p.rw) - (p.pl - p.rl)
  return -(1 - eps) * logsigmoid(beta * rho) - eps * logsigmoid(-beta * rho)


def paper_sigmoid_norm(p, beta, eps=0.0):
  rho = (p.pw - p.rw) / p.nw - (p.pl - p.rl) / p.nl
  return -(1 - eps) * logsigmoid(beta * rho) - eps * logsigmoid(-beta * rho)


def paper_hinge(p, beta):
  return torch.clamp(1 - beta * ((p.pw - p.pl) - (p.rw - p.rl)), min=0)


def paper_ipo(p, beta):
  h = (p.pw - p.rw) / p.nw - (p.pl - p.rl) / p.nl
  return (h - 0.5 / beta) ** 2


def paper_exo(p, beta, eps):
  f = torch.stack([beta * (p.pw - p.rw), beta * (p.pl - p.rl)])
  target = torch.tensor([[1 - eps], [eps]], dtype=f.dtype)
  return (f.softmax(0) * (f.log_softmax(0) - target.log())).sum(0)


def paper_robust(p, beta, eps):
  clean, flipped = paper_sigmoid(p, beta), paper_sigmoid(p.swapped(), beta)
  return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)


def paper_discopop(p, beta, tau):
  rho = beta * ((p.pw - p.rw) - (p.pl - p.rl))
  mix = torch.sigmoid(rho / tau)
  return (1 - mix) * -logsigmoid(rho) + mix * torch.exp(-rho)


def paper_dpop(p, beta, lam):
  penalty = torch.maximum(p.rw - p.pw, torch.zeros_like(p.pw))
  return -logsigmoid(beta * (p.pw - p.rw - p.pl + p.rl - lam * penalty))


def paper_nca(p, beta):
  rewards = beta * torch.stack([p.pw - p.rw, p.pl - p.rl])
  return -logsigmoid(rewards[0]) - logsigmoid(-rewards).mean(0)


def paper_bco(p, beta):
  rewards = beta * torch.stack([p.pw - p.rw, p.pl - p.rl])
  delta = rewards.mean().detach()
  return -logsigmoid(rewards[0] - delta) - logsigmoid(-(rewards[1] - delta))


def paper_sppo(p, beta):
  eta = 1 / beta
  win = (p.pw - p.rw - eta * (1 - 0.5)) ** 2
  return win + (p.pl - p.rl - eta * (0 - 0.5)) ** 2


def paper_apo_zero(p, beta):
  return 1 - torch.sigmoid(beta * (p.pw - p.rw)) + torch.sigmoid(beta * (p.pl - p.rl))


def paper_apo_down(p, beta):
  win, lose = beta * (p.pw - p.rw), beta * (p.pl - p.rl)
  return 1 + torch.sigmoid(win) - torch.sigmoid(win - lose)


def paper_aot(p, beta):
  return -logsigmoid(beta * ((p.pw - p.pl).sort().values - (p.rw - p.rl).sort().values))


def paper_aot_unpaired(p, beta):
  return -logsigmoid(beta * ((p.pw - p.rw).sort().values - (p.pl - p.rl).sort().values))


def paper_sft(p, beta):
  return -p.pw / p.nw


def paper_simpo(p, beta, gamma):
  return -logsigmoid(beta / p.nw * p.pw - beta / p.nl * p.pl - gamma)


def paper_cpo(p, beta, alpha):
  return -logsigmoid(beta * p.pw - beta * p.pl) + alpha * -p.pw / p.nw


def paper_orpo(p, beta, lam):
  win, lose = torch.exp(p.pw / p.nw), torch.exp(p.pl / p.nl)
  ratio = (win / (1 - win)) / (lose / (1 - lose))
  return -p.pw / p.nw - lam * torch.log(torch.sigmoid(torch.log(ratio)))


PAPERS = {
  'sigmoid': (paper_sigmoid, {'label_smoothing': 0.2}),
  'sigmoid_norm': (paper_sigmoid_norm, {'label_smoothing': 0.2}),
  'hinge': (paper_hinge, {}),
  'ipo': (paper_ipo, {}),
  'exo_pair': (paper_exo, {'label_smoothing': 0.01}),
  'robust': (paper_robust, {'label_smoothing': 0.3}),
  'discopop': (paper_discopop, {'discopop_temperature': 0.05}),
  'dpop': (paper_dpop, {'dpop_lambda': 5.0}),
  'nca_pair': (paper_nca, {}),
  'bco_pair': (paper_bco, {}),
  'sppo_hard': (paper_sppo, {}),
  'apo_zero': (paper_apo_zero, {}),
  'apo_down': (paper_apo_down, {}),
  'aot': (paper_aot, {}),
  'aot_unpaired': (paper_aot_unpaired, {}),
  'sft': (paper_sft, {}),
  'simpo': (paper_simpo, {'gamma': 1.2}),
  'cpo': (paper_cpo, {'cpo_alpha': 0.7}),
  'orpo': (paper_orpo, {'orpo_lambda': 0.3}),
}


@dataclasses.dataclass
class TorchPairs:
  """The real pairs of a PairLogps, flat and in float64."""

  pw: torch.Tensor
  pl: torch.Tensor
  rw: torch.Tensor
  rl: torch.Tensor
  nw: torch.Tensor
  nl: torch.Tensor

  @classmethod
  def of(cls, pairs):
    real = np.asarray(pairs.pair_mask) > 0
    fields = (
      pairs.policy_chosen,
      pairs.policy_rejected,
      pairs.reference_chosen,
      pairs.reference_rejected,
      pairs.chosen_lengths,
      pairs.rejected_lengths,
    )
    arrays = (np.asarray(x, np.float64)[real] for x in fields)
    return cls(*(torch.tensor(x, requires_grad=True) for x in arrays))

  def swapped(self):
    return TorchPairs(self.pl, self.pw, self.rl, self.rw, self.nl, self.nw)


def gradient(name, pairs, **constants):
  """d(sum of losses) / d(policy's log-probs)."""

  def total(policy):
    moved = dataclasses.replace(pairs, policy_chosen=policy.chosen, policy_rejected=policy.rejected)
    return loss_of(name, moved, **constants).sum()

  return jax.grad(total)(pairs.policy)


@pytest.mark.parametrize('scale', (1.0, 30.0, 300.0))
@pytest.mark.parametrize('name', ALL)
def test_loss_and_gradient_equal_the_paper_in_torch(name, scale):
  paper, options = PAPERS[name]
  mask = np.ones((3, 16))
  mask[:, 13:] = 0
  pairs = make_pairs((3, 16), seed=1, scale=scale, pair_mask=mask)
  ours = np.asarray(loss_of(name, pairs, beta=0.1, **options))[mask > 0]
  inputs = TorchPairs.of(pairs)
  theirs = paper(inputs, 0.1, *options.values())
  slopes = torch.autograd.grad(theirs.sum(), (inputs.pw, inputs.pl), materialize_grads=True)
  theirs = theirs.detach().numpy()
  if name.startswith('aot'):  # a loss belongs to a rank: the same numbers, in another order
    ours, theirs = np.sort(ours), np.sort(theirs)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(gradient(name, pairs, beta=0.1, **options), slopes, strict=True):
    np.testing.assert_allclose(ours[mask > 0], theirs.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_gradient_equals_finite_differences(name):
  # A running mean keeps bco_pair's delta, which has no gradient, out of the differences.
  pairs = make_pairs((1, 4), seed=3, scale=0.5, reward_mean=0.1)
  # The published dpop_lambda, 50, makes differences of 1e-2 too coarse.
  constants = {'beta': 0.2, 'label_smoothing': 0.1, 'dpop_lambda': 1.0}

  def loss(policy):
    moved = dataclasses.replace(pairs, policy_chosen=policy.chosen, policy_rejected=policy.rejected)
    return loss_of(name, moved, **constants)

  check_grads(loss, (pairs.policy,), order=1, modes=('fwd', 'rev'), atol=2e-2, rtol=2e-2)


def swap(pairs):
  return dataclasses.replace(
    pairs,
    policy_chosen=pairs.policy_rejected,
    policy_rejected=pairs.policy_chosen,
    reference_chosen=pairs.reference_rejected,
    reference_rejected=pairs.reference_chosen,
    chosen_lengths=pairs.rejected_lengths,
    rejected_lengths=pairs.chosen_lengths,
  )


def test_gradient_of_dpo_is_beta_sigmoid_of_minus_z():
  """The gradient is -beta sig(-z) (grad log pi_w - grad log pi_l): see the paper's section 4."""
  pairs = make_pairs(seed=4)
  ratios = (pairs.policy_chosen - pairs.reference_chosen) - (
    pairs.policy_rejected - pairs.reference_rejected
  )
  expected = -0.3 * jax.nn.sigmoid(-0.3 * ratios)
  chosen, rejected = gradient('sigmoid', pairs, beta=0.3)
  np.testing.assert_allclose(chosen, expected, rtol=1e-5)
  np.testing.assert_allclose(rejected, -expected, rtol=1e-5)


@pytest.mark.parametrize('divergence', ('reverse_kl', 'forward_kl', 'js', 'alpha'))
@pytest.mark.parametrize('name', ('sigmoid', 'sigmoid_norm'))
def test_loss_is_log_two_when_policy_equals_reference(name, divergence):
  pairs = make_pairs(scale=0.0)
  alpha = 0.4 if divergence == 'alpha' else None
  loss = LOSSES[name](pairs, divergence=divergence, alpha_divergence=alpha)
  np.testing.assert_allclose(loss, log(2), rtol=1e-6)


def test_swapping_the_pair_changes_dpo_by_its_logit():
  """-log sig(-z) = -log sig(z) + z."""
  pairs = make_pairs(seed=5)
  r = losses.log_ratios(pairs)
  difference = losses.sigmoid(swap(pairs), beta=0.1) - losses.sigmoid(pairs, beta=0.1)
  np.testing.assert_allclose(difference, 0.1 * (r.chosen - r.rejected), rtol=1e-4, atol=1e-6)


def test_robust_loss_is_unbiased_under_flipped_labels():
  pairs = make_pairs(seed=6)
  kept, flipped = (losses.robust(each, label_smoothing=0.3) for each in (pairs, swap(pairs)))
  expected = 0.7 * kept + 0.3 * flipped
  np.testing.assert_allclose(expected, losses.sigmoid(pairs), rtol=1e-4)


@pytest.mark.parametrize(
  'name', ('sigmoid', 'sigmoid_norm', 'hinge', 'exo_pair', 'discopop', 'nca_pair', 'apo_down')
)
def test_only_beta_times_the_log_ratio_matters(name):
  pairs = make_pairs(seed=7)
  fields = ('policy_chosen', 'policy_rejected', 'reference_chosen', 'reference_rejected')
  halved = dataclasses.replace(pairs, **{field: getattr(pairs, field) / 2 for field in fields})
  np.testing.assert_allclose(
    LOSSES[name](halved, beta=0.4), LOSSES[name](pairs, beta=0.2), rtol=1e-5
  )


@pytest.mark.parametrize('name', ALL)
def test_a_constant_on_both_log_ratios_cancels_where_theory_says_so(name):
  """A reward is known up to a constant per prompt; losses on each reward alone are anchored."""
  same_length = {'chosen_lengths': np.full((2, 4), 7.0), 'rejected_lengths': np.full((2, 4), 7.0)}
  pairs = make_pairs(seed=8, reward_mean=0.0, **same_length)
  shifted = dataclasses.replace(
    pairs,
    reference_chosen=pairs.reference_chosen - 2.0,
    reference_rejected=pairs.reference_rejected - 2.0,
  )
  before, after = LOSSES[name](pairs), LOSSES[name](shifted)
  anchored = {'dpop', 'nca_pair', 'bco_pair', 'sppo_hard', 'apo_zero', 'apo_down'}
  if name in anchored:
    assert not np.allclose(before, after, rtol=1e-3)
  else:
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_empty_slots_are_finite_and_change_nothing(name):
  mask = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
  pairs = make_pairs(seed=9, pair_mask=mask)
  emptied = jax.tree.map(lambda x: x * pairs.pair_mask, pairs)
  alone = jax.tree.map(lambda x: x[mask > 0][None], pairs)
  padded = LOSSES[name](emptied)
  chex.assert_tree_all_finite((padded, gradient(name, emptied)))
  np.testing.assert_allclose(padded[mask > 0][None], LOSSES[name](alone), rtol=1e-6)


@pytest.mark.parametrize('ratios', ((-1e4, 1e4), (1e4, -1e4), (-1e4, -9e3), (0.0, -1e4), (-1e4, 0)))
@pytest.mark.parametrize('name', ALL)
def test_loss_and_gradient_are_finite_at_extreme_log_probs(name, ratios):
  floor = np.full((1, 1), -2e4)
  policy = {'policy_chosen': floor + ratios[0], 'policy_rejected': floor + ratios[1]}
  pairs = make_pairs((1, 1), reference_chosen=floor, reference_rejected=floor, **policy)
  chex.assert_tree_all_finite((LOSSES[name](pairs), gradient(name, pairs)))


def test_orpo_is_finite_for_a_certain_response():
  pairs = make_pairs((1, 1), policy_chosen=[[0.0]], policy_rejected=[[-5.0]])
  chex.assert_tree_all_finite((losses.orpo(pairs), gradient('orpo', pairs)))


@pytest.mark.parametrize('name', ('sigmoid', 'sigmoid_norm'))
def test_label_smoothing_is_a_constant_chosen_probability(name):
  pairs = make_pairs(seed=10)
  soft = dataclasses.replace(pairs, chosen_probability=jnp.full((2, 4), 0.8))
  smoothed = LOSSES[name](pairs, label_smoothing=0.2)
  np.testing.assert_allclose(LOSSES[name](soft), smoothed, rtol=1e-6)
  # Both together: the label 0.8, flipped with probability 0.1, is right with probability 0.74.
  both = LOSSES[name](soft, label_smoothing=0.1)
  flipped = LOSSES[name](pairs, label_smoothing=0.26)
  np.testing.assert_allclose(both, flipped, rtol=1e-5)


def test_margin_is_taken_from_the_logit():
  pairs = make_pairs(seed=11)
  wider = dataclasses.replace(pairs, margin=jnp.full((2, 4), 0.5))
  ratios = losses.log_ratios(pairs)
  z = 0.1 * (ratios.chosen - ratios.rejected)
  np.testing.assert_allclose(
    losses.hinge(wider, beta=0.1), np.maximum(0, 1.5 - z), rtol=1e-5, atol=1e-6
  )


def test_reference_free_is_a_reference_of_zero():
  pairs = make_pairs(seed=12)
  zero = jnp.zeros((2, 4))
  zeros = dataclasses.replace(pairs, reference_chosen=zero, reference_rejected=zero)
  none = dataclasses.replace(pairs, reference_chosen=None, reference_rejected=None)
  for name in ('sigmoid', 'nca_pair', 'aot'):
    free = total_loss(none, make_objective(name, reference_free=True))
    np.testing.assert_allclose(free, total_loss(zeros, make_objective(name)), rtol=1e-6)


def test_losses_that_need_no_reference_do_not_read_one():
  pairs = dataclasses.replace(make_pairs(), reference_chosen=None, reference_rejected=None)
  for name in ALL:
    if not make_objective(name).needs_reference:
      chex.assert_tree_all_finite(LOSSES[name](pairs))
  assert {n for n in ALL if not make_objective(n).needs_reference} == {
    'sft',
    'simpo',
    'cpo',
    'orpo',
  }


@pytest.mark.parametrize(('ld_alpha', 'kept'), ((1.0, 1.0), (0.5, 0.5), (0.0, 0.0)))
def test_ld_alpha_scales_the_tails_of_both_models(ld_alpha, kept):
  policy_tails = Branches(jnp.full((2, 4), -3.0), jnp.zeros((2, 4)))
  reference_tails = Branches(jnp.full((2, 4), -5.0), jnp.zeros((2, 4)))
  pairs = make_pairs(seed=13, policy_tails=policy_tails, reference_tails=reference_tails)
  cut = dataclasses.replace(
    pairs,
    policy_chosen=pairs.policy_chosen + 3.0 * (1 - kept),
    reference_chosen=pairs.reference_chosen + 5.0 * (1 - kept),
  )
  np.testing.assert_allclose(
    total_loss(pairs, make_objective(ld_alpha=ld_alpha)),
    total_loss(cut, make_objective()),
    rtol=1e-5,
  )


@pytest.mark.parametrize('name', ('aot', 'aot_unpaired'))
def test_aot_ignores_which_chosen_came_with_which_rejected(name):
  pairs = make_pairs(seed=14)
  if name == 'aot':  # paired by prompt: only the order of the reference's margins is free
    fields = ('reference_chosen', 'reference_rejected')
  else:
    fields = ('policy_rejected', 'reference_rejected')
  mixed = dataclasses.replace(pairs, **{f: jnp.roll(getattr(pairs, f), 1, 1) for f in fields})
  np.testing.assert_allclose(LOSSES[name](mixed).sum(), LOSSES[name](pairs).sum(), rtol=1e-5)


def test_reward_sums_of_parts_add_up_to_the_whole_batch():
  """With the mean of all microbatches given, bco_pair is the same on each as on their batch."""
  whole = make_pairs((4, 4), seed=15)
  parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], whole) for i in range(2)]
  totals, counts = zip(*(losses.reward_sums(part) for part in parts), strict=True)
  mean = sum(totals) / sum(counts)
  split = [losses.bco_pair(dataclasses.replace(part, reward_mean=mean)) for part in parts]
  np.testing.assert_allclose(jnp.concatenate(split), losses.bco_pair(whole), rtol=1e-5)


def test_rewards_follow_the_divergence_and_the_length_of_the_first_loss():
  pairs = make_pairs(seed=16)
  r = pairs.policy_chosen - pairs.reference_chosen
  js = losses.implicit_rewards(pairs, make_objective(divergence='js', beta=0.5))
  np.testing.assert_allclose(js.chosen, 0.5 * np.log(2 / (1 + np.exp(-r))), rtol=1e-4, atol=1e-6)
  per_token = losses.implicit_rewards(pairs, make_objective(('ipo', 'sft'), beta=0.5))
  np.testing.assert_allclose(per_token.chosen, 0.5 * r / pairs.chosen_lengths, rtol=1e-5)


@pytest.mark.parametrize('name', ALL)
def test_every_loss_is_a_function_of_the_package_that_works_with_its_defaults(name, hand_pair):
  function = getattr(losses, name)
  assert function is LOSSES[name].function
  chex.assert_tree_all_finite(function(hand_pair))


@pytest.mark.parametrize('shape', ((), (5,), (2, 3, 2)))
@pytest.mark.parametrize('name', ALL)
def test_any_leading_shape_and_plain_numpy_arrays_will_do(name, shape):
  pairs = make_pairs(shape, seed=17)
  flat = jax.tree.map(lambda x: np.asarray(x).reshape(1, -1), pairs)
  loss = LOSSES[name](jax.tree.map(np.asarray, pairs))
  chex.assert_shape(loss, shape)
  chex.assert_trees_all_close(loss.reshape(1, -1), LOSSES[name](flat), rtol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_without_a_mask_all_pairs_are_real(name):
  pairs = make_pairs(seed=18)
  unmasked = dataclasses.replace(pairs, pair_mask=None)
  chex.assert_trees_all_equal(LOSSES[name](unmasked), LOSSES[name](pairs))
  chex.assert_trees_all_equal(unmasked.weights, pairs.weights)


@pytest.mark.parametrize('name', ALL)
def test_a_loss_names_the_field_that_it_lacks(name):
  pairs = make_pairs()
  bare = PairLogps(policy_chosen=pairs.policy_chosen, policy_rejected=pairs.policy_rejected)
  if LOSSES[name].needs_reference:
    with pytest.raises(ValueError, match='lacks reference_chosen and reference_rejected'):
      LOSSES[name](bare)
    references = {'reference_chosen': bare.policy_chosen, 'reference_rejected': bare.policy_chosen}
    bare = dataclasses.replace(bare, **references)
  if LOSSES[name].per_token or name == 'cpo':
    with pytest.raises(ValueError, match='lacks chosen_lengths and rejected_lengths'):
      LOSSES[name](bare)
  else:
    chex.assert_shape(LOSSES[name](bare), (2, 4))


def test_arrays_of_different_shapes_are_refused():
  pairs = dataclasses.replace(make_pairs(), reference_chosen=jnp.zeros((4,)))
  with pytest.raises(AssertionError, match='different shapes'):
    losses.sigmoid(pairs)
  pairs = dataclasses.replace(make_pairs(), margin=jnp.zeros((2, 1)))
  with pytest.raises(AssertionError, match='margin'):
    total_loss(pairs, make_objective())


def test_every_constant_has_a_row_and_one_default():
  """The config's section has one field for a constant, whichever loss reads it."""
  general = {'beta', 'divergence', 'alpha_divergence'}
  defaults = {}
  for loss in LOSSES.values():
    assert set(loss.constants) <= general | set(losses.CONSTANTS)
    for name in set(loss.constants) - set(loss.needs):
      assert defaults.setdefault(name, loss.constants[name]) == loss.constants[name]
  assert set(defaults) == general | set(losses.CONSTANTS)
