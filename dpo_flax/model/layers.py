"""The small parts of a block: RMSNorm, the gated MLP, and how a model makes its linear maps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.config import ModelConfig
from dpo_flax.model.kernels import sharded
from dpo_flax.model.linear import Linear
from dpo_flax.model.lora import LoraConfig

ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (arXiv:1910.07467), computed in float32 and rounded once."""

  def __init__(self, config: ModelConfig, size: int):
    self.epsilon, self.offset = config.rms_norm_eps, config.norm_offset
    scale = jnp.full(size, 1 - self.offset, config.float_dtype)
    self.scale = sharded(nnx.Param, scale, ('norm',))

  def __call__(self, hidden: jax.Array) -> jax.Array:  # [..., size] -> [..., size]
    wide = hidden.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = self.scale[...].astype(jnp.float32) + self.offset
    normed = wide * jax.lax.rsqrt(variance + self.epsilon)
    return (normed * jnp.expand_dims(scale, range(hidden.ndim - 1))).astype(hidden.dtype)


def make_linear(
  name: str,
  features: tuple[int, int],  # (in, out)
  axes: tuple[str, str],  # their logical axes
  *,
  config: ModelConfig,
  lora: LoraConfig | None,
  rngs: nnx.Rngs,
  **changes: Any,
) -> Linear:
  """Returns one of a model's linear maps."""
  settings = {
    'axes': axes,
    'dtype': config.dtype,
    'param_dtype': config.weight_dtype,
    'kernel_init': jax.nn.initializers.normal(config.initializer_range),
    'lora': lora,
    'name': name,
    'rngs': rngs,
    'use_bias': name in config.biases,
  }
  return Linear(*features, **settings | changes)


class MLP(nnx.Module):
  """The gated feed-forward layer: down(activation(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    linear = functools.partial(make_linear, config=config, lora=lora, rngs=rngs)
    embed, mlp = config.embed_dim, config.mlp_dim
    self.activation = config.activation
    self.fused = config.fused_projections
    if self.fused:
      self.gate_up_proj = linear('gate_up_proj', (embed, 2 * mlp), ('embed', 'mlp'))
    else:
      self.gate_proj = linear('gate_proj', (embed, mlp), ('embed', 'mlp'))
      self.up_proj = linear('up_proj', (embed, mlp), ('embed', 'mlp'))
    self.down_proj = linear('down_proj', (mlp, embed), ('mlp', 'embed'))

  def __call__(self, hidden: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    if self.fused:
      gate, up = jnp.split(self.gate_up_proj(hidden, dropout_key), 2, axis=-1)
    else:
      gate, up = self.gate_proj(hidden, dropout_key), self.up_proj(hidden, dropout_key)
    return self.down_proj(ACTIVATIONS[self.activation](gate) * up, dropout_key)


def softly_capped(values: jax.Array, cap: float | None) -> jax.Array:
  """Keeps values inside +-cap, near 0 as they are (Gemma 2, arXiv:2408.00118)."""
  return values if cap is None else cap * jnp.tanh(values / cap)
