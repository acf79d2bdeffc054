"""What an objective sees of a batch: a few numbers for each pair."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Branches(NamedTuple):
  """One value for each response of a pair."""

  chosen: jax.Array  # [B, P]
  rejected: jax.Array  # [B, P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLogps:
  """Log-probs of a batch of pairs, float32 [B, P]; empty slots hold zeros.

  Fields that are None were not asked for, or not in the data.
  """

  policy_chosen: jax.Array  # log-prob of the whole response, summed over its tokens
  policy_rejected: jax.Array
  reference_chosen: jax.Array | None = None  # None: no reference was run
  reference_rejected: jax.Array | None = None
  chosen_lengths: jax.Array  # response tokens
  rejected_lengths: jax.Array
  pair_mask: jax.Array  # 1.0 for a real pair

  # From the records.
  pair_weight: jax.Array | None = None  # a pair of weight 2 counts as the pair given twice
  chosen_probability: jax.Array | None = None  # that chosen is the better one, a soft label
  margin: jax.Array | None = None  # how much better chosen is, in units of reward

  # From the token pass.
  policy_tails: Branches | None = None  # the part of policy_* past the shorter response's length
  reference_tails: Branches | None = None
  alignments: Branches | None = None  # token mean of log pi(y_t) - log sum_v pi(v)^2
  kl: Branches | None = None  # token mean of KL(policy || reference) over the whole vocabulary
  entropy: Branches | None = None  # token mean of the policy's entropy, in nats

  # From the steps before.
  reward_mean: jax.Array | None = None  # scalar: mean implicit reward of all pairs seen so far

  @property
  def policy(self) -> Branches:
    """The policy's log-probs of both responses."""
    return Branches(self.policy_chosen, self.policy_rejected)

  @property
  def reference(self) -> Branches:
    """The reference's log-probs of both responses."""
    return Branches(self.reference_chosen, self.reference_rejected)

  @property
  def lengths(self) -> Branches:
    """Tokens of both responses, at least 1 so that empty slots divide to 0."""
    return Branches(jnp.maximum(self.chosen_lengths, 1.0), jnp.maximum(self.rejected_lengths, 1.0))

  @property
  def weights(self) -> jax.Array:
    """What each slot counts in the mean loss: its weight if real, else 0."""
    return self.pair_mask if self.pair_weight is None else self.pair_mask * self.pair_weight
