"""f-divergences: the link from a log-ratio to the implicit reward.

The policy that maximises E[reward] - beta D_f(policy || reference) has, for any f whose f' is
invertible with 0 outside its domain,

  reward(x, y) = beta f'(u) + lambda(x),   u = policy(y|x) / reference(y|x)

(Wang et al. 2023, arXiv:2309.16240, Theorem 1). lambda(x) cancels between two responses to one
prompt, so every loss on the difference of two rewards takes s = f'(u) in place of log u. D_f does
not change when a multiple of (u - 1) is added to f, which adds a constant to f'; every link here
has the constant with f'(1) = 0, so that a policy equal to its reference has reward 0.
"""

import math

import jax
import jax.numpy as jnp

DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')

# Known divergences that Theorem 1 does not cover, and why.
REFUSED = {
  'total_variation': "its f' takes only two values, so it cannot be inverted",
  'chi_squared': "0 is in the domain of its f', so the optimum may be 0 where the reference is not",
}

# Where the exponential ends. No slope of s exceeds e^32 = 8e13, so the square of a whole gradient's
# norm, which clipping needs, and that of a margin, which the metrics need, fit float32 (3e38) with
# 10 digits to spare for beta, the log-prob's own gradient and sums. Long before, at beta e^x of
# about 100, the losses have only one direction left.
LARGEST_EXPONENT = 32.0


def link(
  log_ratio: jax.Array,  # r = log policy - log reference of a whole response
  divergence: str,
  alpha: float | None,  # of the alpha divergence, in (0, 1)
  *,
  largest_exponent: float = LARGEST_EXPONENT,
) -> jax.Array:
  """Returns s = f'(exp(r)), elementwise and increasing in r.

    reverse_kl   s = r
    forward_kl   s = 1 - exp(-r)
    js           s = log sigmoid(r) + log 2
    alpha        s = (1 - exp(-alpha r)) / alpha: reverse KL as alpha -> 0, forward KL at alpha = 1

  Exact while alpha * -r <= `largest_exponent` (alpha = 1 for forward KL). Where the policy has all
  but dropped a response and the gradient would overflow float32, s keeps its sign, its order and a
  slope above 0: see `_expm1`.
  """
  if divergence == 'reverse_kl':
    return log_ratio
  if divergence == 'js':
    return jax.nn.log_sigmoid(log_ratio) + math.log(2.0)
  power = 1.0 if divergence == 'forward_kl' else alpha
  assert power is not None
  return -_expm1(-power * log_ratio, largest_exponent) / power


def _expm1(x: jax.Array, largest: float) -> jax.Array:
  """e^x - 1 up to x = `largest`, then e^largest (1 + log(1 + x - largest)) - 1.

  The two pieces meet with equal value and slope, and each minimum or maximum cuts the other
  piece's gradient, so no infinity is ever multiplied by 0.
  """
  exponential = jnp.expm1(jnp.minimum(x, largest))
  return exponential + math.exp(largest) * jnp.log1p(jnp.maximum(x - largest, 0.0))
