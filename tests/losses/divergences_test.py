"""The links against their definitions, their limits, and the ends of float32."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_flax.losses.divergences import LARGEST_EXPONENT, link
from dpo_flax.losses.metrics import metric_sums
from dpo_flax.losses.registry import LOSSES
from helpers.pairs import make_objective, make_pairs

CASES = (
  ('reverse_kl', None),
  ('forward_kl', None),
  ('js', None),
  ('alpha', 0.3),
  ('alpha', 0.5),
  ('alpha', 0.7),
  ('alpha', 0.01),
)

# f of D_f(p || q) = E_q[f(p / q)] in arXiv:2309.16240, table 1, in float64.
F = {
  'reverse_kl': lambda u, a: u * np.log(u),
  'forward_kl': lambda u, a: -np.log(u),
  'js': lambda u, a: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
  'alpha': lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


@pytest.mark.parametrize(('divergence', 'alpha'), CASES)
def test_link_is_the_slope_of_f_less_its_slope_at_one(divergence, alpha):
  r = np.linspace(-4, 4, 41)

  def slope(u, h=1e-5):
    f = F[divergence]
    return (f(u * (1 + h), alpha) - f(u * (1 - h), alpha)) / (2 * h * u)

  expected = slope(np.exp(r)) - slope(1.0)
  actual = link(jnp.asarray(r, jnp.float32), divergence, alpha)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('alpha', 'limit'), ((1e-6, 'reverse_kl'), (1 - 1e-6, 'forward_kl')))
def test_alpha_reaches_both_kl_divergences(alpha, limit):
  r = jnp.linspace(-30, 30, 61)
  np.testing.assert_allclose(link(r, 'alpha', alpha), link(r, limit, None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('divergence', 'alpha'), (('forward_kl', 1.0), ('alpha', 0.5)))
def test_link_is_exact_up_to_the_largest_exponent(divergence, alpha):
  r = np.linspace(-LARGEST_EXPONENT / alpha, 100, 2001).astype(np.float32)
  exact = -np.expm1(-alpha * r.astype(np.float64)) / alpha
  np.testing.assert_allclose(link(jnp.asarray(r), divergence, alpha), exact, rtol=1e-5)


def test_far_out_the_link_grows_as_a_logarithm():
  """The law s = -e^32 (1 + log(1 + x - 32)), x = alpha * -r, over alpha; worked out in float64."""
  r = np.array([-200.0, -1e3, -1e4])
  forward = -np.exp(32.0) * (1 + np.log(1 - r - 32))
  np.testing.assert_allclose(link(jnp.asarray(r), 'forward_kl', None), forward, rtol=1e-5)
  half = -np.exp(32.0) * (1 + np.log(1 - r / 2 - 32)) / 0.5
  np.testing.assert_allclose(link(jnp.asarray(r), 'alpha', 0.5), half, rtol=1e-5)


@pytest.mark.parametrize('largest', (LARGEST_EXPONENT, LARGEST_EXPONENT / 2))
def test_the_continuation_joins_without_a_kink(largest):
  def forward_kl(r):
    return link(r, 'forward_kl', None, largest_exponent=largest)

  r = -largest + jnp.array([-1e-3, 0.0, 1e-3])
  slopes = jax.vmap(jax.grad(forward_kl))(r)
  np.testing.assert_allclose(forward_kl(r), -np.exp(largest), rtol=2e-3)
  np.testing.assert_allclose(slopes, np.exp(largest), rtol=2e-3)


@pytest.mark.parametrize(('divergence', 'alpha'), CASES)
def test_link_keeps_its_order_and_a_slope_down_to_vanishing_probability(divergence, alpha):
  r = jnp.asarray(-np.geomspace(1e5, 1e-3, 200), jnp.float32)
  values = link(r, divergence, alpha)
  slopes = jax.vmap(jax.grad(lambda x: link(x, divergence, alpha)))(r)
  assert np.isfinite(values).all()
  assert (np.diff(values) > 0).all()
  assert np.isfinite(slopes).all()
  assert (np.asarray(slopes) > 0).all()


EXTREME = (-1e4, -9e3, -89.0, -40.0, 0.0, 89.0, 1e4)
OF_DIFFERENCE = tuple(name for name in LOSSES if LOSSES[name].reads('divergence'))


@pytest.fixture
def extreme_pairs():
  """Every pair of extreme log-ratios at once, near-zero reference probability included."""
  chosen, rejected = np.meshgrid(EXTREME, EXTREME)
  reference = np.full(chosen.shape, -1e4)
  pairs = make_pairs(
    chosen.shape,
    policy_chosen=reference + chosen,
    policy_rejected=reference + rejected,
    reference_chosen=reference,
    reference_rejected=reference,
  )
  return pairs, chosen, rejected


@pytest.mark.parametrize(('divergence', 'alpha'), CASES)
@pytest.mark.parametrize('name', OF_DIFFERENCE)
def test_losses_and_gradients_are_finite_for_any_log_ratios(name, divergence, alpha, extreme_pairs):
  pairs, chosen, rejected = extreme_pairs

  def loss(chosen):
    moved = dataclasses.replace(pairs, policy_chosen=chosen)
    return LOSSES[name](moved, divergence=divergence, alpha_divergence=alpha)

  values, pullback = jax.vjp(loss, pairs.policy_chosen)
  (slopes,) = pullback(jnp.ones_like(values))
  chex.assert_tree_all_finite((values, slopes))
  # The squared norm of the whole gradient too, of log-probs whose own gradient is large.
  assert jnp.isfinite(optax.tree.norm(1e4 * slopes))
  if name == 'sigmoid':  # a chosen that has all but vanished is always called back
    assert (np.asarray(slopes)[(chosen < -80) & (rejected >= 0)] < 0).all()


@pytest.mark.parametrize(('divergence', 'alpha'), CASES)
def test_metrics_are_finite_for_any_log_ratios(divergence, alpha, extreme_pairs):
  pairs, *_ = extreme_pairs
  objective = make_objective(divergence=divergence, alpha_divergence=alpha)
  losses = LOSSES['sigmoid'](pairs, divergence=divergence, alpha_divergence=alpha)
  chex.assert_tree_all_finite(metric_sums(pairs, losses, objective))
