"""What an objective sees of a batch: a few numbers for each pair."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Branches(NamedTuple):
  """One value for each response of a pair."""

  chosen: jax.Array  # [B, P]
  rejected: jax.Array  # [B, P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLogps:
  """Log-probs of pairs, float32 of any one shape ([B, P] in a batch); empty slots hold zeros.

  Only the policy's log-probs are needed. A field that is None was not asked for, or is not in the
  data; what needs it raises a ValueError that names it, and an AssertionError where shapes differ.
  What is narrower than float32 is widened: sums of log-probs do not fit bfloat16.

  >>> pair = PairLogps(policy_chosen=jnp.array([-4.0]), policy_rejected=jnp.array([-10.0]))
  >>> pair.lengths
  Traceback (most recent call last):
  ValueError: PairLogps lacks chosen_lengths and rejected_lengths, which this computation needs.
  """

  policy_chosen: jax.Array  # log-prob of the whole response, summed over its tokens
  policy_rejected: jax.Array
  reference_chosen: jax.Array | None = None  # None: no reference was run
  reference_rejected: jax.Array | None = None
  chosen_lengths: jax.Array | None = None  # response tokens
  rejected_lengths: jax.Array | None = None
  pair_mask: jax.Array | None = None  # 1.0 for a real pair; None: all are real

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
    return Branches(*self._required('policy_chosen', 'policy_rejected'))

  @property
  def reference(self) -> Branches:
    """The reference's log-probs of both responses."""
    return Branches(*self._required('reference_chosen', 'reference_rejected'))

  @property
  def lengths(self) -> Branches:
    """Tokens of both responses, at least 1 so that empty slots divide to 0."""
    chosen, rejected = self._required('chosen_lengths', 'rejected_lengths')
    return Branches(jnp.maximum(chosen, 1.0), jnp.maximum(rejected, 1.0))

  @property
  def mask(self) -> jax.Array:
    """1.0 for a real pair, 0.0 for an empty slot."""
    if self.pair_mask is None:
      return jnp.ones(jnp.shape(self.policy_chosen), jnp.float32)
    return _at_least_float32(self.pair_mask)

  @property
  def weights(self) -> jax.Array:
    """What each slot counts in the mean loss: its weight if real, else 0."""
    return self.mask if self.pair_weight is None else self.mask * self.pair_weight

  def branches(self, name: str) -> Branches:
    """Returns a field that holds both responses' values, such as kl; ValueError if not given."""
    (values,) = self._required(name)
    return values

  def check_shapes(self) -> None:
    """Raises AssertionError unless all fields, but for reward_mean, have one shape."""
    for field in dataclasses.fields(self):
      values = jax.tree.leaves(getattr(self, field.name))
      if field.name != 'reward_mean':
        arrays = map(jnp.asarray, (self.policy_chosen, *values))
        chex.assert_equal_shape(list(arrays), custom_message=field.name)

  def _required(self, *names: str) -> list:
    values = [getattr(self, name) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
      raise ValueError(f'PairLogps lacks {" and ".join(missing)}, which this computation needs.')
    self.check_shapes()
    return jax.tree.map(_at_least_float32, values)


def _at_least_float32(values: jax.typing.ArrayLike) -> jax.Array:
  array = jnp.asarray(values)
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))
