"""Preference losses, one function per published loss: numbers of each pair -> its loss.

Notation: r = log policy(y|x) - log reference(y|x), summed over response tokens; s = f'(exp r), the
divergence's link (s = r for reverse KL); w chosen, l rejected; |y| response tokens;
z = beta (s_w - s_l); sig the logistic function; eps the label smoothing.

Every loss takes `PairLogps`, float32 arrays of any one shape, and returns an array of that shape.
It raises ValueError where the pairs lack the reference's log-probs or the lengths that it reads.
Losses of empty slots are finite and meaningless: take the mean by `PairLogps.weights`.

aot, aot_unpaired and bco_pair (without `reward_mean`) compare all pairs of an array with one
another: under microbatching the pairs they see are those of the microbatch.

The examples below are of one pair, r_w = 1 and r_l = -1, and print four digits:

>>> np.set_printoptions(precision=4)
>>> pairs = PairLogps(
...   policy_chosen=jnp.array([-4.0]),
...   policy_rejected=jnp.array([-10.0]),
...   reference_chosen=jnp.array([-5.0]),
...   reference_rejected=jnp.array([-9.0]),
...   chosen_lengths=jnp.array([4.0]),
...   rejected_lengths=jnp.array([5.0]),
... )
>>> print(sigmoid(pairs, beta=0.25))  # log(1 + exp(-0.5))
[0.4741]

A new loss is a function here under its `register`, and a row of CONSTANTS for what it alone takes.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu

from dpo_flax.losses.divergences import LARGEST_EXPONENT, link
from dpo_flax.losses.pair_logps import Branches, PairLogps
from dpo_flax.losses.registry import Constant, register

# What single losses take beside beta and the divergence; their signatures hold the defaults.
CONSTANTS = {
  'label_smoothing': Constant(
    'share of the labels that are taken to be flipped', 'in [0, 0.5)', lambda x: 0 <= x < 0.5
  ),
  'gamma': Constant('the margin that simpo asks of the rewards', 'at least 0', lambda x: x >= 0),
  'cpo_alpha': Constant(
    "weight of chosen's negative log-likelihood in cpo", 'at least 0', lambda x: x >= 0
  ),
  'orpo_lambda': Constant('weight of the odds ratio in orpo', 'above 0', lambda x: x > 0),
  'dpop_lambda': Constant(
    'weight that dpop gives a chosen less likely than under the reference',
    'above 0',
    lambda x: x > 0,
  ),
  # Above 1 the exponential would outgrow its weight and the loss would overflow.
  'discopop_temperature': Constant(
    'temperature of the weight between the two losses of discopop',
    'in (0, 1]',
    lambda x: 0 < x <= 1,
  ),
}


def log_ratios(logps: PairLogps) -> Branches:
  """Returns r of both responses."""
  return jax.tree.map(jnp.subtract, logps.policy, logps.reference)


def links(
  logps: PairLogps,
  divergence: str,
  alpha: float | None,  # of the alpha divergence
  *,
  largest_exponent: float = LARGEST_EXPONENT,
) -> Branches:
  """Returns s of both responses."""
  return jax.tree.map(
    lambda r: link(r, divergence, alpha, largest_exponent=largest_exponent), log_ratios(logps)
  )


def scaled(beta: float, ratios: Branches) -> Branches:
  """Returns beta times the value of both responses."""
  return jax.tree.map(lambda r: beta * r, ratios)


def per_token(values: Branches, logps: PairLogps) -> Branches:
  """Returns sums over both responses as means over their tokens."""
  return jax.tree.map(jnp.divide, values, logps.lengths)


def reward_sums(logps: PairLogps, *, beta: float = 0.1) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of beta r over real responses and their count; add over batches, then divide.

  The quotient is what bco_pair reads as `PairLogps.reward_mean`.

  >>> reward_sums(pairs, beta=0.25)
  (Array(0., dtype=float32), Array(2., dtype=float32))
  """
  chosen, rejected = scaled(beta, log_ratios(logps))
  return jnp.sum((chosen + rejected) * logps.mask), 2 * jnp.sum(logps.mask)


@register(records=('chosen_probability', 'margin'))
def sigmoid(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """DPO: -log sig(z) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

  With label smoothing, cDPO: -(1-eps) log sig(z) - eps log sig(-z) (Mitchell 2023, "A note on DPO
  with noisy preferences", eq. 3). A pair's `chosen_probability` takes the place of 1-eps, and its
  `margin` is taken from z (Touvron et al. 2023, arXiv:2307.09288, eq. 2).

  >>> print(sigmoid(pairs, beta=0.25, label_smoothing=0.1))
  [0.5241]
  """
  z = _less_margin(_logit(logps, beta, divergence, alpha_divergence), logps)
  return _cross_entropy(z, label_smoothing, logps.chosen_probability)


@register(records=('chosen_probability', 'margin'), per_token=True)
def sigmoid_norm(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """Length-normalised DPO: -log sig(beta (s_w/|w| - s_l/|l|)) (Lambert et al. 2024, 2411.15124).

  >>> print(sigmoid_norm(pairs, beta=2.0))
  [0.3412]
  """
  chosen, rejected = per_token(links(logps, divergence, alpha_divergence), logps)
  z = _less_margin(beta * (chosen - rejected), logps)
  return _cross_entropy(z, label_smoothing, logps.chosen_probability)


@register(records=('margin',))
def hinge(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """SLiC's hinge on DPO's logit: max(0, 1 - z) (Liu et al. 2023, arXiv:2309.06657).

  >>> print(hinge(pairs, beta=0.25))
  [0.5]
  """
  z = _less_margin(_logit(logps, beta, divergence, alpha_divergence), logps)
  return relu(1 - z)


@register(per_token=True)
def ipo(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """IPO: (s_w/|w| - s_l/|l| - 1/(2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17).

  The paper writes whole-response log-probs; its authors' results are with means over tokens.

  >>> print(ipo(pairs, beta=0.25))
  [2.4025]
  """
  # The loss is a square: half the exponent gives its gradient the size of the other losses'.
  half = LARGEST_EXPONENT / 2
  rewards = links(logps, divergence, alpha_divergence, largest_exponent=half)
  chosen, rejected = per_token(rewards, logps)
  return jnp.square(chosen - rejected - 1 / (2 * beta))


@register(
  needs={
    'label_smoothing': 'above 0 (at 0 the loss is infinite); the paper uses 0.001 '
    '(arXiv:2402.00856).'
  }
)
def exo_pair(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.001,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """EXO: KL((sig z, sig -z) || (1-eps, eps)) (Ji et al. 2024, arXiv:2402.00856, eq. 16).

  An objective has to give eps, which is 0 for every other loss and here must not be.

  >>> print(exo_pair(pairs, beta=0.25, label_smoothing=0.1))
  [0.2721]
  """
  z, eps = _logit(logps, beta, divergence, alpha_divergence), label_smoothing
  right = jax.nn.sigmoid(z) * (log_sigmoid(z) - math.log1p(-eps))
  return right + jax.nn.sigmoid(-z) * (log_sigmoid(-z) - math.log(eps))


@register()
def robust(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """Robust DPO: [-(1-eps) log sig(z) + eps log sig(-z)] / (1-2 eps).

  Its mean over labels flipped with probability eps is the DPO loss of the clean labels, so a
  single pair's loss may be negative (Chowdhury et al. 2024, arXiv:2403.00409).

  >>> print(robust(pairs, beta=0.25, label_smoothing=0.2))
  [0.3074]
  """
  z, eps = _logit(logps, beta, divergence, alpha_divergence), label_smoothing
  return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * eps)


@register()
def discopop(
  logps: PairLogps,
  *,
  beta: float = 0.1,
  discopop_temperature: float = 0.05,
  divergence: str = 'reverse_kl',
  alpha_divergence: float | None = None,
) -> jax.Array:
  """DiscoPOP's log-ratio modulated loss: -(1-m) log sig(z) + m exp(-z), m = sig(z / tau).

  Lu et al. 2024, arXiv:2406.08414, eq. 5; tau is the temperature.

  >>> print(discopop(pairs, beta=0.25))
  [0.6065]
  """
  z = _logit(logps, beta, divergence, alpha_divergence)
  scaled = z / discopop_temperature
  # One exponential of the sum: m exp(-z) is 0 times infinity for very negative z.
  exponential = jnp.exp(log_sigmoid(scaled) - z)
  return -jax.nn.sigmoid(-scaled) * log_sigmoid(z) + exponential


@register()
def dpop(logps: PairLogps, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> jax.Array:
  """DPO-Positive: -log sig(beta (r_w - r_l - lambda max(0, -r_w))).

  The extra term keeps chosen from becoming less likely than under the reference (Pal et al. 2024,
  arXiv:2402.13228, eq. 3).

  >>> print(dpop(pairs, beta=0.25))
  [0.4741]
  """
  chosen, rejected = log_ratios(logps)
  penalty = dpop_lambda * relu(-chosen)
  return -log_sigmoid(beta * (chosen - rejected - penalty))


@register()
def nca_pair(logps: PairLogps, *, beta: float = 0.1) -> jax.Array:
  """NCA: -log sig(beta r_w) - 1/2 log sig(-beta r_w) - 1/2 log sig(-beta r_l).

  Noise-contrastive alignment with two responses, as its authors' code has it (Chen et al. 2024,
  arXiv:2402.05369).

  >>> print(nca_pair(pairs, beta=0.25))
  [1.2769]
  """
  chosen, rejected = scaled(beta, log_ratios(logps))
  return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


@register()
def bco_pair(logps: PairLogps, *, beta: float = 0.1) -> jax.Array:
  """BCO: -log sig(beta r_w - delta) - log sig(-(beta r_l - delta)).

  Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656). delta, without gradient, is
  the mean reward of all responses seen so far (`logps.reward_mean`); where that is None, of all
  real responses in the arrays.

  >>> print(bco_pair(pairs, beta=0.25))
  [1.1519]
  """
  chosen, rejected = scaled(beta, log_ratios(logps))
  delta = logps.reward_mean
  if delta is None:
    total, count = reward_sums(logps, beta=beta)
    delta = total / jnp.maximum(count, 1.0)
  delta = jax.lax.stop_gradient(delta)
  return -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)


@register()
def sppo_hard(logps: PairLogps, *, beta: float = 0.1) -> jax.Array:
  """SPPO: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

  Self-play preference optimisation with P(w beats l) = 1 and eta = 1/beta (Wu et al. 2024,
  arXiv:2405.00675, Algorithm 1, eq. 4.7).

  >>> print(sppo_hard(pairs, beta=0.25))
  [2.]
  """
  chosen, rejected = log_ratios(logps)
  target = 1 / (2 * beta)
  return jnp.square(chosen - target) + jnp.square(rejected + target)


@register()
def apo_zero(logps: PairLogps, *, beta: float = 0.1) -> jax.Array:
  """APO: 1 - sig(beta r_w) + sig(beta r_l) (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

  For winners better than the model. The 1, here and below, only keeps the loss above 0.

  >>> print(apo_zero(pairs, beta=0.25))
  [0.8756]
  """
  chosen, rejected = scaled(beta, log_ratios(logps))
  return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


@register()
def apo_down(logps: PairLogps, *, beta: float = 0.1) -> jax.Array:
  """APO: sig(beta r_w) + 1 - sig(beta (r_w - r_l)) (eq. 8), for winners worse than the model.

  >>> print(apo_down(pairs, beta=0.25))
  [0.9397]
  """
  chosen, rejected = scaled(beta, log_ratios(logps))
  return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


@register(modifiers=('ld_alpha', 'reference_free'), sorts_batch=True)
def aot(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
  """AOT, DPO on sorted batches: policy's margins against reference's, smallest with smallest.

  Asks that the distribution of log policy(w) - log policy(l) dominates the reference's (Melnyk et
  al. 2024, arXiv:2406.05882, Algorithm 1, paired). All real pairs of the arrays are sorted
  together; a slot's loss belongs to its rank among them.

  >>> print(aot(pairs, beta=0.25))
  [0.4741]
  """
  policy = logps.policy.chosen - logps.policy.rejected
  reference = logps.reference.chosen - logps.reference.rejected
  return _cross_entropy(beta * _sorted_gaps(policy, reference, logps.mask), label_smoothing)


@register(modifiers=('ld_alpha', 'reference_free'), sorts_batch=True)
def aot_unpaired(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
  """AOT, DPO on sorted batches: r of chosen against r of rejected (Algorithm 1, unpaired).

  >>> print(aot_unpaired(pairs, beta=0.25))
  [0.4741]
  """
  gaps = _sorted_gaps(*log_ratios(logps), logps.mask)
  return _cross_entropy(beta * gaps, label_smoothing)


@register(needs_reference=False, per_token=True, chosen_only=True, modifiers=())
def sft(logps: PairLogps) -> jax.Array:
  """-log policy(w) / |w|: the likelihood of winners alone, the baseline of every other loss.

  >>> print(sft(pairs))
  [1.]
  """
  return -logps.policy.chosen / logps.lengths.chosen


@register(needs_reference=False, per_token=True)
def simpo(logps: PairLogps, *, beta: float = 0.1, gamma: float = 0.5) -> jax.Array:
  """SimPO: -log sig(beta (log policy(w)/|w| - log policy(l)/|l|) - gamma).

  Meng et al. 2024, arXiv:2405.14734, eq. 6.

  >>> print(simpo(pairs, beta=2.0))
  [0.2014]
  """
  chosen, rejected = per_token(logps.policy, logps)
  return -log_sigmoid(beta * (chosen - rejected) - gamma)


@register(needs_reference=False)
def cpo(logps: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0) -> jax.Array:
  """CPO: -log sig(beta (log policy(w) - log policy(l))) - alpha log policy(w)/|w|.

  Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417). The paper writes the
  likelihood as a sum; its authors' code takes the mean over tokens, as here.

  >>> print(cpo(pairs, beta=0.25))
  [1.2014]
  """
  logit = beta * (logps.policy.chosen - logps.policy.rejected)
  return -log_sigmoid(logit) + cpo_alpha * sft(logps)


@register(needs_reference=False, per_token=True)
def orpo(logps: PairLogps, *, orpo_lambda: float = 0.1) -> jax.Array:
  """ORPO: -log policy(w)/|w| - lambda log sig(log odds(w) - log odds(l)).

  odds(y) = p / (1-p), with log p the mean of the tokens' log-probs (Hong et al. 2024,
  arXiv:2403.07691, eq. 6 and 7).

  >>> print(orpo(pairs))
  [1.0238]
  """
  chosen, rejected = per_token(logps.policy, logps)
  odds_ratio = _log_odds(chosen) - _log_odds(rejected)
  return -chosen - orpo_lambda * log_sigmoid(odds_ratio)


def _logit(logps: PairLogps, beta: float, divergence: str, alpha: float | None) -> jax.Array:
  """Returns z."""
  chosen, rejected = links(logps, divergence, alpha)
  return beta * (chosen - rejected)


def _less_margin(z: jax.Array, logps: PairLogps) -> jax.Array:
  return z if logps.margin is None else z - logps.margin


def _cross_entropy(z: jax.Array, eps: float, probability: jax.Array | None = None) -> jax.Array:
  """-p log sig(z) - (1-p) log sig(-z), p the probability that the label is right.

  p = 1 - eps, or the record's own `probability`, flipped with probability eps.
  """
  right = 1 - eps if probability is None else eps + (1 - 2 * eps) * probability
  return -right * log_sigmoid(z) - (1 - right) * log_sigmoid(-z)


def _sorted_gaps(upper: jax.Array, lower: jax.Array, pair_mask: jax.Array) -> jax.Array:
  """Subtracts from `upper` the `lower` of the same rank among real pairs; stays in its slot."""
  real = pair_mask.ravel() > 0
  # Empty slots rank last on both sides, so they meet one another.
  upper_order, lower_order = (
    jnp.argsort(jnp.where(real, values.ravel(), jnp.inf)) for values in (upper, lower)
  )
  partners = jnp.zeros_like(lower.ravel()).at[upper_order].set(lower.ravel()[lower_order])
  return upper - partners.reshape(upper.shape)


def _log_odds(logp: jax.Array) -> jax.Array:
  # float32 rounds a certain token's log-prob to 0, where the odds are infinite.
  logp = jnp.minimum(logp, -1e-7)
  return logp - jnp.log(-jnp.expm1(logp))
