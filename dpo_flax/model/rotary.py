"""Rotary positions: by what the heads of each token are rotated (arXiv:2104.09864)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_flax.model.config import LinearScaling, Llama3Scaling, LongScaling, Rope


class Rotation(NamedTuple):
  """By what the heads of each token are rotated; float32."""

  cos: jax.Array  # [B, T, 1, head_dim]
  sin: jax.Array  # [B, T, 1, head_dim]
  # Takes a head to what its sines multiply: (first half, second half) to (-second, first).
  turn: jax.Array  # [head_dim, head_dim]


def make_rotation(
  positions: jax.Array,  # [B, T] int32
  rope: Rope | None,  # None: no rotation
  head_dim: int,
) -> Rotation:
  """Returns the rotations of each token, computed once for all layers of one attention type."""
  frequencies, magnitude = (jnp.zeros(0), 1.0) if rope is None else _frequencies(rope)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
  half = angles.shape[-1]
  rest = ((0, 0), (0, 0), (0, 0), (0, head_dim - 2 * half))  # of a head, which stays

  def widen(values, fill):
    both = jnp.concatenate([values * magnitude] * 2, axis=-1)
    return jnp.pad(both, rest, constant_values=fill)

  first, second = np.arange(half), np.arange(half, 2 * half)
  turn = np.zeros((head_dim, head_dim), np.float32)
  turn[second, first], turn[first, second] = -1, 1
  return Rotation(widen(jnp.cos(angles), 1), widen(jnp.sin(angles), 0), jnp.asarray(turn))


def rotate(
  heads: jax.Array,  # [B, T, H, head_dim]
  rotation: Rotation,
) -> jax.Array:
  """Rotates the (first half, second half) pairs of each head's rotated part, in float32.

  The halves are swapped by a matrix product, which is exact: each sum has one term. On TPU it costs
  about half of slicing the halves out of registers and joining them again.
  """
  cos, sin, turn = rotation
  turned = jnp.matmul(
    heads, turn.astype(heads.dtype), precision='highest', preferred_element_type=jnp.float32
  )
  return (heads.astype(jnp.float32) * cos + turned * sin).astype(heads.dtype)


def _frequencies(rope: Rope) -> tuple[jax.Array, float]:
  """Returns radians per position [rope.dim / 2], and the magnitude of the rotated parts."""
  exponent = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
  frequencies = 1.0 / rope.theta**exponent
  match rope.scaling:
    case LinearScaling(factor):
      return frequencies / factor, 1.0
    case Llama3Scaling():
      return _llama3_frequencies(frequencies, rope.scaling), 1.0
    case LongScaling(short_factor=factors, attention_factor=magnitude):
      return frequencies / jnp.asarray(factors, jnp.float32), magnitude
  return frequencies, 1.0


def _llama3_frequencies(frequencies: jax.Array, scaling: Llama3Scaling) -> jax.Array:
  """Slows the long wavelengths by `factor` and blends between the two bounds (Llama 3.1)."""
  wavelengths = 2 * math.pi / frequencies
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  # 0 where a wave is longer than the low bound, 1 where shorter than the high bound.
  blend = (scaling.original_max_position_embeddings / wavelengths - low) / (high - low)
  blend = jnp.clip(blend, 0.0, 1.0)
  return frequencies * (blend + (1.0 - blend) / scaling.factor)
