"""The weight matrix of a linear map: how it is stored, and how it multiplies.

A kernel knows `matmul`, x W, and `dense`, W itself. A further way to store weights is one more
class here and one more case of `make_weight` and `kernel_of`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.model import wide_gradient
from dpo_flax.model.quantization import ChannelScale, quantize


class Trained(nnx.Param):
  """A base weight that the policy learns: its own float32 copy."""


@dataclasses.dataclass(frozen=True)
class Dense:
  """A matrix W of floats, which is rounded to the dtype of what it multiplies."""

  weight: jax.Array  # [(L,) in, out]

  def matmul(self, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Returns x W, [..., in] -> [..., out], as `dtype`."""
    return jnp.matmul(inputs, self.weight.astype(inputs.dtype), preferred_element_type=dtype)

  def dense(self) -> jax.Array:
    """Returns W [(L,) in, out] as floats."""
    return self.weight


class Learned(Dense):
  """A float32 matrix that learns: its gradient is summed in float32."""

  def matmul(self, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Returns x W, [..., in] -> [..., out], as `dtype`."""
    return wide_gradient.matmul(inputs, self.weight, dtype)


@dataclasses.dataclass(frozen=True)
class Int8(Dense):
  """A matrix of integers and a scale for each output channel: W = weight * scale."""

  scale: jax.Array  # [(L,) out] float32

  def matmul(self, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Returns x W, [..., in] -> [..., out], as `dtype`; the scales multiply in float32."""
    outputs = super().matmul(inputs, dtype)
    scale = jnp.expand_dims(self.scale, range(outputs.ndim - 1))
    return (outputs * scale).astype(outputs.dtype)

  def dense(self) -> jax.Array:
    """Returns W [(L,) in, out] in float32."""
    return self.weight.astype(jnp.float32) * self.scale[..., None, :]


def float_dtype(dtype: Any, param_dtype: Any) -> Any:
  """Returns the dtype of the parameters that are floats in any case, and of initial weights."""
  return dtype if np.dtype(param_dtype) == np.int8 else param_dtype


def make_weight(
  weight: jax.Array,
  param_dtype: Any,
  axes: tuple[str | None, ...],  # logical, of `weight`
  *,
  input_axis: int,  # which axis of `weight` one channel's inputs are on
) -> tuple[nnx.Param, ChannelScale | None]:
  """Returns the variables that hold a weight, quantized if `param_dtype` is int8."""
  if np.dtype(param_dtype) != np.int8:
    return nnx.Param(weight, out_sharding=axes, eager_sharding=False), None
  weight, scale = quantize(weight, axis=input_axis)
  channels = axes[:input_axis] + axes[input_axis + 1 :]
  return (
    nnx.Param(weight, out_sharding=axes, eager_sharding=False),
    ChannelScale(scale, out_sharding=channels, eager_sharding=False),
  )


def kernel_of(
  weight: nnx.Variable,  # [(L,) in, out]
  scale: nnx.Variable | None,  # [(L,) out], of int8
) -> Dense:
  """Returns the kernel that these variables hold."""
  if scale is not None:
    return Int8(weight[...], scale[...])
  return Learned(weight[...]) if isinstance(weight, Trained) else Dense(weight[...])
