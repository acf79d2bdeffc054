"""Preference losses, one function per published loss: [B, P] numbers per pair -> [B, P] losses.

Notation: r = log policy(y|x) - log reference(y|x), summed over response tokens; s = f'(exp r), the
divergence's link (s = r for reverse KL); w chosen, l rejected; |y| response tokens;
z = beta (s_w - s_l); sig the logistic function; eps the label smoothing.

Losses of empty slots are finite and meaningless: take the mean by `PairLogps.weights`.

aot, aot_unpaired and bco_pair (without `reward_mean`) compare the pairs of a batch with one
another: under microbatching the batch they see is the microbatch.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid

from dpo_flax.losses import divergences
from dpo_flax.losses.objective import Objective
from dpo_flax.losses.pair_logps import Branches, PairLogps


def log_ratios(logps: PairLogps, objective: Objective) -> Branches:
  """Returns r of both responses, [B, P]; the reference counts as 0 with `reference_free`."""
  policy, reference = _response_logps(logps, objective)
  return Branches(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def _response_logps(logps: PairLogps, objective: Objective) -> tuple[Branches, Branches]:
  """Policy's and reference's log-probs as the losses compare them.

  With `ld_alpha`, tokens past the length of the pair's shorter response count `ld_alpha` each:
  LD-DPO, length desensitisation (Liu et al. 2024, arXiv:2409.06411).
  """
  policy = _without_tails(logps.policy, logps.policy_tails, objective.ld_alpha)
  if objective.reference_free:
    return policy, jax.tree.map(jnp.zeros_like, policy)
  return policy, _without_tails(logps.reference, logps.reference_tails, objective.ld_alpha)


def _without_tails(sums: Branches, tails: Branches | None, ld_alpha: float | None) -> Branches:
  if ld_alpha is None:
    return sums
  return jax.tree.map(lambda whole, tail: whole - (1 - ld_alpha) * tail, sums, tails)


def _links(logps: PairLogps, objective: Objective, **limits: float) -> Branches:
  """The link s of both responses, [B, P]."""
  return jax.tree.map(
    lambda r: divergences.link(r, objective.divergence, objective.alpha_divergence, **limits),
    log_ratios(logps, objective),
  )


def implicit_rewards(logps: PairLogps, objective: Objective) -> Branches:
  """Returns the reward the policy stands for, [B, P]: beta s (up to a constant per prompt).

  Without a reference it is beta log policy. It is a mean over tokens where the (first) loss is.
  """
  has_reference = objective.reference_free or logps.reference_chosen is not None
  rewards = _links(logps, objective) if has_reference else logps.policy
  if objective.per_token:
    rewards = jax.tree.map(jnp.divide, rewards, logps.lengths)
  return jax.tree.map(lambda reward: objective.beta * reward, rewards)


def _log_ratio_rewards(logps: PairLogps, objective: Objective) -> Branches:
  return jax.tree.map(lambda r: objective.beta * r, log_ratios(logps, objective))


def _logit(links: Branches, logps: PairLogps, objective: Objective) -> jax.Array:
  """z, less the margin that a record asks for (Touvron et al. 2023, arXiv:2307.09288, eq. 2)."""
  logit = objective.beta * (links.chosen - links.rejected)
  return logit if logps.margin is None else logit - logps.margin


def _z(logps: PairLogps, objective: Objective) -> jax.Array:
  return _logit(_links(logps, objective), logps, objective)


def _cross_entropy(logit: jax.Array, logps: PairLogps, objective: Objective) -> jax.Array:
  """-p log sig(logit) - (1-p) log sig(-logit), p the probability that the label is right.

  p = 1 - eps, or the record's own probability q, flipped with probability eps.
  """
  eps = objective.label_smoothing
  if logps.chosen_probability is None:
    right = 1 - eps
  else:
    right = eps + (1 - 2 * eps) * logps.chosen_probability
  return -right * log_sigmoid(logit) - (1 - right) * log_sigmoid(-logit)


def sigmoid_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """DPO: -log sig(z) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

  With label smoothing, cDPO: -(1-eps) log sig(z) - eps log sig(-z) (Mitchell 2023, "A note on DPO
  with noisy preferences", eq. 3).
  """
  return _cross_entropy(_z(logps, objective), logps, objective)


def sigmoid_norm_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """Length-normalised DPO: -log sig(beta (s_w/|w| - s_l/|l|)) (Lambert et al. 2024, 2411.15124)."""
  links = jax.tree.map(jnp.divide, _links(logps, objective), logps.lengths)
  return _cross_entropy(_logit(links, logps, objective), logps, objective)


def hinge_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """SLiC's hinge on DPO's logit: max(0, 1 - z) (Liu et al. 2023, arXiv:2309.06657)."""
  return relu(1 - _z(logps, objective))


def ipo_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """IPO: (s_w/|w| - s_l/|l| - 1/(2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17).

  The paper writes whole-response log-probs; its authors' results are with means over tokens.
  """
  # The loss is a square: half the exponent gives its gradient the size of the other losses'.
  links = _links(logps, objective, largest_exponent=divergences.LARGEST_EXPONENT / 2)
  links = jax.tree.map(jnp.divide, links, logps.lengths)
  return jnp.square(links.chosen - links.rejected - 1 / (2 * objective.beta))


def exo_pair_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """EXO: KL((sig z, sig -z) || (1-eps, eps)) (Ji et al. 2024, arXiv:2402.00856, eq. 16)."""
  z, eps = _z(logps, objective), objective.label_smoothing
  chosen = sigmoid(z) * (log_sigmoid(z) - math.log1p(-eps))
  return chosen + sigmoid(-z) * (log_sigmoid(-z) - math.log(eps))


def robust_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """Robust DPO: [-(1-eps) log sig(z) + eps log sig(-z)] / (1-2 eps).

  Its mean over labels flipped with probability eps is the DPO loss of the clean labels, so a
  single pair's loss may be negative (Chowdhury et al. 2024, arXiv:2403.00409).
  """
  z, eps = _z(logps, objective), objective.label_smoothing
  return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * eps)


def discopop_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """DiscoPOP's log-ratio modulated loss: -(1-m) log sig(z) + m exp(-z), m = sig(z / tau).

  Lu et al. 2024, arXiv:2406.08414, eq. 5.
  """
  z = _z(logps, objective)
  scaled = z / objective.discopop_temperature
  # One exponential of the sum: m exp(-z) is 0 times infinity for very negative z.
  exponential = jnp.exp(log_sigmoid(scaled) - z)
  return -sigmoid(-scaled) * log_sigmoid(z) + exponential


def dpop_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """DPO-Positive: -log sig(beta (r_w - r_l - lambda max(0, -r_w))).

  The extra term keeps chosen from becoming less likely than under the reference (Pal et al. 2024,
  arXiv:2402.13228, eq. 3).
  """
  chosen, rejected = log_ratios(logps, objective)
  penalty = objective.dpop_lambda * relu(-chosen)
  return -log_sigmoid(objective.beta * (chosen - rejected - penalty))


def nca_pair_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """NCA: -log sig(beta r_w) - 1/2 log sig(-beta r_w) - 1/2 log sig(-beta r_l).

  Noise-contrastive alignment with two responses, as its authors' code has it (Chen et al. 2024,
  arXiv:2402.05369).
  """
  chosen, rejected = _log_ratio_rewards(logps, objective)
  return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


def bco_pair_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """BCO: -log sig(beta r_w - delta) - log sig(-(beta r_l - delta)).

  Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656). delta, without gradient, is
  the mean reward of all responses seen so far (`logps.reward_mean`), of this batch where None.
  """
  chosen, rejected = _log_ratio_rewards(logps, objective)
  delta = logps.reward_mean
  if delta is None:
    total, count = reward_sums(logps, objective)
    delta = total / jnp.maximum(count, 1.0)
  delta = jax.lax.stop_gradient(delta)
  return -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)


def reward_sums(logps: PairLogps, objective: Objective) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of real responses' rewards and their count; add over batches, then divide."""
  chosen, rejected = _log_ratio_rewards(logps, objective)
  return jnp.sum((chosen + rejected) * logps.pair_mask), 2 * jnp.sum(logps.pair_mask)


def sppo_hard_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """SPPO: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

  Self-play preference optimisation with P(w beats l) = 1 and eta = 1/beta (Wu et al. 2024,
  arXiv:2405.00675, Algorithm 1, eq. 4.7).
  """
  chosen, rejected = log_ratios(logps, objective)
  target = 1 / (2 * objective.beta)
  return jnp.square(chosen - target) + jnp.square(rejected + target)


def aot_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """AOT, DPO on sorted batches: policy's margins against reference's, smallest with smallest.

  Asks that the distribution of log policy(w) - log policy(l) dominates the reference's (Melnyk et
  al. 2024, arXiv:2406.05882, Algorithm 1, paired).
  """
  policy, reference = _response_logps(logps, objective)
  margins = policy.chosen - policy.rejected
  gaps = _sorted_gaps(margins, reference.chosen - reference.rejected, logps.pair_mask)
  return _cross_entropy(objective.beta * gaps, logps, objective)


def aot_unpaired_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """AOT, DPO on sorted batches: r of chosen against r of rejected (Algorithm 1, unpaired)."""
  gaps = _sorted_gaps(*log_ratios(logps, objective), logps.pair_mask)
  return _cross_entropy(objective.beta * gaps, logps, objective)


def _sorted_gaps(upper: jax.Array, lower: jax.Array, pair_mask: jax.Array) -> jax.Array:
  """Subtracts from `upper` the `lower` of the same rank among real pairs; stays in its slot."""
  real = pair_mask.ravel() > 0
  # Empty slots rank last on both sides, so they meet one another.
  upper_order, lower_order = (
    jnp.argsort(jnp.where(real, values.ravel(), jnp.inf)) for values in (upper, lower)
  )
  partners = jnp.zeros_like(lower.ravel()).at[upper_order].set(lower.ravel()[lower_order])
  return upper - partners.reshape(upper.shape)


def apo_zero_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """APO: 1 - sig(beta r_w) + sig(beta r_l) (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

  For winners better than the model. The 1, here and below, only keeps the loss above 0.
  """
  chosen, rejected = _log_ratio_rewards(logps, objective)
  return sigmoid(-chosen) + sigmoid(rejected)


def apo_down_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """APO: sig(beta r_w) + 1 - sig(beta (r_w - r_l)) (eq. 8), for winners worse than the model."""
  chosen, rejected = _log_ratio_rewards(logps, objective)
  return sigmoid(chosen) + sigmoid(rejected - chosen)


def sft_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """-log policy(w) / |w|: the likelihood of winners alone, the baseline of every other loss."""
  del objective
  return -logps.policy_chosen / logps.lengths.chosen


def simpo_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """SimPO: -log sig(beta (log policy(w)/|w| - log policy(l)/|l|) - gamma).

  Meng et al. 2024, arXiv:2405.14734, eq. 6.
  """
  chosen, rejected = jax.tree.map(jnp.divide, logps.policy, logps.lengths)
  return -log_sigmoid(objective.beta * (chosen - rejected) - objective.gamma)


def cpo_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """CPO: -log sig(beta (log policy(w) - log policy(l))) - alpha log policy(w)/|w|.

  Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417). The paper writes the
  likelihood as a sum; its authors' code takes the mean over tokens, as here.
  """
  logit = objective.beta * (logps.policy_chosen - logps.policy_rejected)
  return -log_sigmoid(logit) + objective.cpo_alpha * sft_loss(logps, objective)


def orpo_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """ORPO: -log policy(w)/|w| - lambda log sig(log odds(w) - log odds(l)).

  odds(y) = p / (1-p), with log p the mean of the tokens' log-probs (Hong et al. 2024,
  arXiv:2403.07691, eq. 6 and 7).
  """
  chosen, rejected = jax.tree.map(jnp.divide, logps.policy, logps.lengths)
  odds_ratio = _log_odds(chosen) - _log_odds(rejected)
  return -chosen - objective.orpo_lambda * log_sigmoid(odds_ratio)


def _log_odds(logp: jax.Array) -> jax.Array:
  # float32 rounds a certain token's log-prob to 0, where the odds are infinite.
  logp = jnp.minimum(logp, -1e-7)
  return logp - jnp.log(-jnp.expm1(logp))


LOSSES = {
  'sigmoid': sigmoid_loss,
  'sigmoid_norm': sigmoid_norm_loss,
  'hinge': hinge_loss,
  'ipo': ipo_loss,
  'exo_pair': exo_pair_loss,
  'robust': robust_loss,
  'discopop': discopop_loss,
  'dpop': dpop_loss,
  'nca_pair': nca_pair_loss,
  'bco_pair': bco_pair_loss,
  'sppo_hard': sppo_hard_loss,
  'apo_zero': apo_zero_loss,
  'apo_down': apo_down_loss,
  'aot': aot_loss,
  'aot_unpaired': aot_unpaired_loss,
  'sft': sft_loss,
  'simpo': simpo_loss,
  'cpo': cpo_loss,
  'orpo': orpo_loss,
}
