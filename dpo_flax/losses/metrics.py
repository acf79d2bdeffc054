"""What a run reports: sums per batch, and the numbers they become.

`metric_sums` runs on the device and returns only sums, so that microbatches, validation batches and
hosts merge by addition, each pair counting once; `summarize` turns the merged sums into metrics.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_flax.losses.losses import log_ratios
from dpo_flax.losses.objective import Objective, implicit_rewards
from dpo_flax.losses.pair_logps import Branches, PairLogps

Sums = dict[str, dict[str, jax.Array]]

CONFIDENCE_BINS = 10  # equal bins of [0.5, 1] for the calibration error
MARGIN_EDGES = (0.25, 0.5, 1.0, 2.0)  # between the buckets of |reward margin|


def metric_sums(
  logps: PairLogps,
  losses: jax.Array,  # [B, P], from `total_loss`
  objective: Objective,
) -> Sums:
  """Returns the sums of a batch, over real pairs; add two of them with `jax.tree.map(add, ...)`.

  Sums that need lengths, a reference, KL or entropy are left out where the pairs have none.

  dpo_accuracy is the share of pairs that the policy orders better than the reference does: whose
  summed margin, log policy(w) - log policy(l), is larger than the reference's; without a reference,
  whose reward is larger. reward_accuracy stands beside it where the loss's own reward may order
  pairs otherwise, being a mean over tokens or without the tails that ld_alpha removes.
  """
  logps.check_shapes()
  chex.assert_equal_shape((logps.policy_chosen, losses))
  rewards = implicit_rewards(logps, objective)
  margins = rewards.chosen - rewards.rejected
  return jax.lax.stop_gradient(
    {
      'means': _mean_sums(logps, losses, rewards, objective),
      'perplexities': _perplexity_sums(logps),
      'histograms': _histogram_sums(margins, logps.mask),
      'moments': _moment_sums(margins, logps),
    }
  )


def summarize(sums: Sums) -> dict[str, float]:
  """Returns the metrics of everything that was added into `sums`.

  Means over real pairs, but for dpo_loss (over `logps.weights`) and perplexities (over tokens).
  Buckets with no pairs are left out, and so is the correlation where one side is constant.

  >>> from dpo_flax.losses import total_loss
  >>> objective = Objective('sigmoid', beta=0.1)
  >>> sums = metric_sums(pairs, total_loss(pairs, objective), objective)
  >>> print(round(summarize(sums)['dpo_loss'], 4), summarize(sums)['dpo_accuracy'])
  0.5981 1.0
  """
  merged: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
  metrics = {name: total / count for name, (total, count) in merged['means'].items()}
  for name, (total, count) in merged['perplexities'].items():
    metrics[name] = np.exp(-total / count)
  metrics |= _calibration(merged['histograms']['confidence'])
  metrics |= _accuracy_by_margin(merged['histograms']['margin'])
  metrics |= _length_correlation(merged['moments'])
  return {name: float(value) for name, value in metrics.items()}


def displacement(metrics: Mapping[str, float], start: Mapping[str, float]) -> dict[str, float]:
  """Returns how the likelihood of both responses has moved since `start`, of the same pairs.

  chosen_logps_change and rejected_logps_change, in nats per response; none that `start` lacks.
  DPO asks for a difference alone, and often both fall: likelihood displacement (Razin et al. 2024,
  arXiv:2410.08847).
  """
  sides = ('chosen_logps', 'rejected_logps')
  known = (side for side in sides if start.get(side) is not None)
  return {f'{side}_change': metrics[side] - start[side] for side in known}


def accuracy(margins: jax.Array) -> jax.Array:
  """1 where chosen has the higher reward, 0 where the lower; a tie is a guess, 1/2.

  So a policy that equals its reference to the bit scores 0.5 on any data; in training, where the
  two are compiled apart, rounding may break ties.
  """
  return (jnp.sign(margins) + 1) / 2


def _mean_sums(
  logps: PairLogps, losses: jax.Array, rewards: Branches, objective: Objective
) -> dict[str, jax.Array]:
  values = {
    'dpo_margin_policy': logps.policy.chosen - logps.policy.rejected,
    **_accuracies(logps, rewards, objective),
    'dpo_chosen_reward': rewards.chosen,
    'dpo_rejected_reward': rewards.rejected,
    'chosen_logps': logps.policy.chosen,
    'rejected_logps': logps.policy.rejected,
  }
  if logps.reference_chosen is not None:
    values['dpo_margin_ref'] = logps.reference.chosen - logps.reference.rejected
  if logps.kl is not None:
    values |= {'kl_chosen': logps.kl.chosen, 'kl_rejected': logps.kl.rejected}
  if logps.entropy is not None:
    values['entropy'] = (logps.entropy.chosen + logps.entropy.rejected) / 2
  means = {name: _over(value, logps.mask) for name, value in values.items()}
  return {'dpo_loss': _over(losses, logps.weights), **means}


def _accuracies(logps: PairLogps, rewards: Branches, objective: Objective) -> dict[str, jax.Array]:
  of_rewards = accuracy(rewards.chosen - rewards.rejected)
  if logps.reference_chosen is None or objective.reference_free:
    return {'dpo_accuracy': of_rewards}
  # Of the margins in this order, for the two are equal to the bit where the models are.
  ratios = log_ratios(logps)
  values = {'dpo_accuracy': accuracy(ratios.chosen - ratios.rejected)}
  if objective.per_token or objective.ld_alpha is not None:
    values['reward_accuracy'] = of_rewards
  return values


def _over(values: jax.Array, weights: jax.Array) -> jax.Array:
  """A weighted mean, still apart: [sum, what to divide it by]."""
  return jnp.stack([jnp.sum(values * weights), jnp.sum(weights)])


def _perplexity_sums(logps: PairLogps) -> dict[str, jax.Array]:
  if logps.chosen_lengths is None or logps.rejected_lengths is None:
    return {}
  models = {'policy': logps.policy}
  if logps.reference_chosen is not None:
    models['reference'] = logps.reference
  lengths = Branches(logps.chosen_lengths, logps.rejected_lengths)
  return {
    f'{model}_perplexity_{branch}': jnp.stack(
      [jnp.sum(getattr(sums, branch) * logps.mask), jnp.sum(getattr(lengths, branch))]
    )
    for model, sums in models.items()
    for branch in Branches._fields
  }


def _histogram_sums(margins: jax.Array, pair_mask: jax.Array) -> dict[str, jax.Array]:
  sizes = jnp.abs(margins)
  confidences = jax.nn.sigmoid(sizes)  # in [0.5, 1]
  bins = jnp.minimum((2 * confidences - 1) * CONFIDENCE_BINS, CONFIDENCE_BINS - 1)
  buckets = jnp.searchsorted(jnp.array(MARGIN_EDGES), sizes, side='right')
  # Of each pair: one, how confident, how right.
  columns = jnp.stack([jnp.ones_like(margins), confidences, accuracy(margins)], axis=-1)
  columns = columns * pair_mask[..., None]
  return {
    'confidence': _histogram(bins.astype(jnp.int32), columns, CONFIDENCE_BINS),
    'margin': _histogram(buckets, columns, len(MARGIN_EDGES) + 1),
  }


def _histogram(buckets: jax.Array, columns: jax.Array, size: int) -> jax.Array:
  """Sums columns [B, P, C] over the pairs of each bucket [B, P]: [size, C]."""
  flat = columns.reshape(-1, columns.shape[-1])
  return jax.ops.segment_sum(flat, buckets.ravel(), num_segments=size)


def _moment_sums(margins: jax.Array, logps: PairLogps) -> dict[str, jax.Array]:
  if logps.chosen_lengths is None or logps.rejected_lengths is None:
    return {}
  lengths = logps.chosen_lengths - logps.rejected_lengths
  products = {
    'count': jnp.ones_like(margins),
    'x': lengths,
    'y': margins,
    'xx': lengths**2,
    'yy': margins**2,
    'xy': lengths * margins,
  }
  return {name: jnp.sum(value * logps.mask) for name, value in products.items()}


def _calibration(histogram: np.ndarray) -> dict[str, float]:
  """Expected calibration error of sig(|margin|) as the probability that its sign is right.

  sum over bins of (share of pairs) |accuracy - mean confidence| (Guo et al. 2017,
  arXiv:1706.04599, eq. 3).
  """
  counts, confident, right = histogram.T
  return {'calibration_error': np.abs(right - confident).sum() / counts.sum()}


def _accuracy_by_margin(histogram: np.ndarray) -> dict[str, float]:
  edges = ('0', *(f'{edge:g}' for edge in MARGIN_EDGES), 'inf')
  return {
    f'accuracy_margin_{low}_to_{high}': right / count
    for (low, high), (count, _, right) in zip(itertools.pairwise(edges), histogram, strict=True)
    if count > 0
  }


def _length_correlation(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Pearson correlation of the reward margin with |chosen| - |rejected|, in tokens."""
  if not sums:
    return {}
  count = sums['count']
  x, y = sums['x'] / count, sums['y'] / count
  variances = sums['xx'] / count - x * x, sums['yy'] / count - y * y
  # Below the rounding of float32 sums a variance is noise.
  if variances[0] <= 1e-6 * sums['xx'] / count or variances[1] <= 1e-6 * sums['yy'] / count:
    return {}
  covariance = sums['xy'] / count - x * y
  correlation = covariance / np.sqrt(variances[0] * variances[1])
  return {'margin_length_correlation': float(correlation)}
