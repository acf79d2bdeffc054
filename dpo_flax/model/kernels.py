"""The weight matrix of a linear map: how it is stored, and how it multiplies.

A kernel knows `matmul`, x W, and `dense`, W itself. A further way to store weights is one more
class here and one more case of `make_weight` and `kernel_of`.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.model import wide_gradient
from dpo_flax.model.quantization import ChannelScale, quantize

VariableType = TypeVar('VariableType', bound=nnx.Variable)


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
  scale = None
  if np.dtype(param_dtype) == np.int8:
    weight, scales = quantize(weight, axis=input_axis)
    scale = sharded(ChannelScale, scales, axes[:input_axis] + axes[input_axis + 1 :])
  return sharded(nnx.Param, weight, axes), scale


def sharded(
  variable: type[VariableType],
  value: jax.Array,
  axes: tuple[str | None, ...],  # logical, of `value`
) -> VariableType:
  """Returns a variable that declares its axes, by which `named_shardings` places it later."""
  return variable(value, out_sharding=axes, eager_sharding=False)


def kernel_of(
  weight: nnx.Variable | jax.Array,  # [(L,) in, out]
  scale: nnx.Variable | None,  # [(L,) out], of int8
) -> Dense:
  """Returns the kernel that these variables hold; an array's gradient is of the inputs' dtype."""
  if scale is not None:
    return Int8(weight[...], scale[...])
  return Learned(weight[...]) if isinstance(weight, Trained) else Dense(weight[...])
