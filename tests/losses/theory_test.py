"""Theorem 1 of arXiv:2309.16240: minimising the loss finds the optimum of E[reward] - beta D_f."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_flax.losses import PairLogps, sigmoid

BETA = 0.5
PROMPTS, RESPONSES = 3, 4

# f and the inverse of its derivative, worked out by hand from the paper's table 1.
DIVERGENCES = {
  ('reverse_kl', None): (lambda u: u * np.log(u), lambda v: np.exp(v - 1)),
  ('forward_kl', None): (lambda u: -np.log(u), lambda v: -1 / v),
  ('js', None): (
    lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    lambda v: 1 / (2 * np.exp(-v) - 1),
  ),
  **{
    ('alpha', a): (
      lambda u, a=a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
      lambda v, a=a: (1 - a * v) ** (-1 / a),
    )
    for a in (0.3, 0.5, 0.7)
  },
}
# Where f' ends for large u: beta f'(u) = reward - shift needs a shift above reward - beta * this.
SUPREMUM = {'reverse_kl': np.inf, 'forward_kl': 0.0, 'js': np.log(2)}


@pytest.fixture(scope='module')
def problem():
  """Known rewards and a reference policy, [prompts, responses]."""
  random = np.random.default_rng(0)
  rewards = random.uniform(-1, 1, (PROMPTS, RESPONSES))
  return rewards, random.dirichlet(np.full(RESPONSES, 3.0), PROMPTS)


def optimal_policy(rewards, reference, inverse, supremum):
  """Maximises E[reward] - beta D_f for one prompt: u = (f')^-1((reward - shift) / beta).

  The shift is the multiplier of sum(policy) = 1, found by bisection.
  """
  low = rewards.max() - BETA * supremum if np.isfinite(supremum) else rewards.min() - 20.0
  high = rewards.max() + 20.0
  for _ in range(200):
    shift = (low + high) / 2
    with np.errstate(divide='ignore', over='ignore'):
      mass = np.sum(reference * inverse((rewards - shift) / BETA))
    low, high = (shift, high) if mass > 1 else (low, shift)
  return reference * inverse((rewards - shift) / BETA)


def trained_policy(rewards, reference, **divergence):
  """Minimises the expected loss over a tabular policy, every ordered pair with its probability."""
  first, second = np.nonzero(~np.eye(RESPONSES, dtype=bool))
  wins = jnp.asarray(1 / (1 + np.exp(rewards[:, second] - rewards[:, first])), jnp.float32)
  log_reference = jnp.asarray(np.log(reference), jnp.float32)

  def expected_loss(logits):
    policy = jax.nn.log_softmax(logits)
    pairs = PairLogps(
      policy_chosen=policy[:, first],
      policy_rejected=policy[:, second],
      reference_chosen=log_reference[:, first],
      reference_rejected=log_reference[:, second],
    )
    return jnp.sum(wins * sigmoid(pairs, beta=BETA, **divergence))

  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 2000))

  def step(carry, _):
    logits, state = carry
    updates, state = optimizer.update(jax.grad(expected_loss)(logits), state)
    return (optax.apply_updates(logits, updates), state), None

  start = log_reference, optimizer.init(log_reference)
  (logits, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000))(start)
  return np.asarray(jax.nn.softmax(logits))


@pytest.mark.parametrize(('divergence', 'alpha'), tuple(DIVERGENCES))
def test_minimising_dpo_recovers_the_regularised_optimum(divergence, alpha, problem):
  rewards, reference = problem
  f, inverse = DIVERGENCES[divergence, alpha]
  supremum = 1 / alpha if alpha else SUPREMUM[divergence]
  optimum = np.stack(
    [optimal_policy(*row, inverse, supremum) for row in zip(rewards, reference, strict=True)]
  )
  assert_maximises(optimum, rewards, reference, f)
  found = trained_policy(rewards, reference, divergence=divergence, alpha_divergence=alpha)
  np.testing.assert_allclose(found, optimum, atol=1e-3)
  assert np.abs(reference - optimum).max() > 0.1  # the problem is not solved by doing nothing


def assert_maximises(policy, rewards, reference, f):
  """No nearby policy does better: a check of the optimum that uses f and not its derivative."""

  def value(policy):
    return (policy * rewards - BETA * reference * f(policy / reference)).sum(axis=-1)

  np.testing.assert_allclose(policy.sum(axis=-1), 1, atol=1e-9)
  random = np.random.default_rng(1)
  for _ in range(100):
    step = random.normal(size=policy.shape) * 1e-3
    moved = policy + step - step.mean(axis=-1, keepdims=True)
    assert (value(moved) < value(policy)).all()


def test_a_wrong_divergence_misses_the_optimum(problem):
  """The tolerance above tells the divergences apart."""
  rewards, reference = problem
  _, inverse = DIVERGENCES['js', None]
  optimum = optimal_policy(rewards[0], reference[0], inverse, SUPREMUM['js'])
  found = trained_policy(rewards, reference)[0]
  assert np.abs(found - optimum).max() > 1e-2
