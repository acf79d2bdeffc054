"""The small parts of a block: RMSNorm, rotary positions, the gated MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.config import Llama3Scaling, ModelConfig
from dpo_flax.model.lora import LoraConfig, Projection


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (arXiv:1910.07467), computed in float32."""

  def __init__(self, config: ModelConfig):
    self.epsilon = config.rms_norm_eps
    self.scale = nnx.Param(
      jnp.ones(config.embed_dim, config.float_dtype), out_sharding=('norm',), eager_sharding=False
    )

  def __call__(self, hidden: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
    wide = hidden.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(hidden.dtype)
    return normed * self.scale[...].astype(hidden.dtype)[None, None]


class MLP(nnx.Module):
  """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    def projection(name, features, axes):
      return Projection(name, features, axes, config=config, lora=lora, rngs=rngs)

    embed, mlp = config.embed_dim, config.mlp_dim
    self.gate_proj = projection('gate_proj', (embed, mlp), ('embed', 'mlp'))
    self.up_proj = projection('up_proj', (embed, mlp), ('embed', 'mlp'))
    self.down_proj = projection('down_proj', (mlp, embed), ('mlp', 'embed'))

  def __call__(self, hidden: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    gate = jax.nn.silu(self.gate_proj(hidden, dropout_key))
    return self.down_proj(gate * self.up_proj(hidden, dropout_key), dropout_key)


def rope_angles(
  positions: jax.Array,  # [B, T] int32
  config: ModelConfig,
) -> jax.Array:
  """Returns the rotary angles [B, T, head_dim / 2], float32 radians (arXiv:2104.09864)."""
  exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  frequencies = 1.0 / config.rope_theta**exponent
  if config.rope_scaling is not None:
    frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
  return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def apply_rope(
  heads: jax.Array,  # [B, T, H, head_dim]
  angles: jax.Array,  # [B, T, head_dim / 2]
) -> jax.Array:
  """Rotates each head's (first half, second half) pairs by `angles`, in float32."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(heads.dtype)


def _llama3_frequencies(frequencies: jax.Array, scaling: Llama3Scaling) -> jax.Array:
  """Slows the long wavelengths by `factor` and blends between the two bounds (Llama 3.1)."""
  wavelengths = 2 * math.pi / frequencies
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  # 0 where a wave is longer than the low bound, 1 where shorter than the high bound.
  blend = (scaling.original_max_position_embeddings / wavelengths - low) / (high - low)
  blend = jnp.clip(blend, 0.0, 1.0)
  return frequencies * (blend + (1.0 - blend) / scaling.factor)
