"""The whole loss of a run: its losses, weighted, with the modifiers around them."""

import dataclasses

import jax
import jax.numpy as jnp

from dpo_flax.losses.losses import LOSSES, sft_loss
from dpo_flax.losses.objective import READS, RECORD_FIELDS, Objective
from dpo_flax.losses.pair_logps import PairLogps


def total_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """Returns what the run minimises, for each pair slot, [B, P] float32.

  The step minimises sum(total_loss * logps.weights) / sum(logps.weights), both sums over the whole
  batch. Beside the weighted losses: WPO's weights on them, `sft_weight` times the likelihood of
  chosen (RPO: Pang et al. 2024, arXiv:2404.19733, eq. 1), and `kl_penalty_weight` times the exact
  KL(policy || reference), a mean over tokens, then over the pair's two responses.
  """
  total = jnp.zeros_like(logps.policy_chosen)
  for name, weight in zip(objective.loss, objective.loss_weights, strict=True):
    loss = LOSSES[name](_as_read(logps, name), objective)
    if objective.wpo and 'wpo' in READS[name]:
      loss = wpo_weights(logps) * loss
    total += weight * loss
  if objective.sft_weight is not None:
    total += objective.sft_weight * sft_loss(logps, objective)
  if objective.kl_penalty_weight is not None:
    total += objective.kl_penalty_weight * (logps.kl.chosen + logps.kl.rejected) / 2
  return total


def wpo_weights(logps: PairLogps) -> jax.Array:
  """WPO's weight of each pair, [B, P]: how near to on-policy it is, without gradient.

  The product over both responses of exp(mean over tokens of log(pi(y_t) / sum_v pi(v)^2)), the
  "sampled alignment" of Zhou et al. 2024 (arXiv:2406.11827, eq. 2). The ratio is 1 in expectation
  where y_t is the policy's own sample; as in the authors' code, a pair of likelier tokens than that
  counts no more than 1.
  """
  alignments = logps.alignments.chosen + logps.alignments.rejected
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(alignments, 0.0)))


def _as_read(logps: PairLogps, loss: str) -> PairLogps:
  """Returns the pairs without the fields of the records that a loss does not use."""
  unread = {field: None for field in RECORD_FIELDS if field not in READS[loss]}
  return dataclasses.replace(logps, **unread)
