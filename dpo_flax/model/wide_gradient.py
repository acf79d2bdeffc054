"""A matrix product in the model's dtype whose float32 weight gets a float32 gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def matmul(
  inputs: jax.Array,  # [..., in]
  weight: jax.Array,  # [in, out] float32
  dtype: DTypeLike,  # of the result
) -> jax.Array:  # [..., out]
  """Returns inputs @ weight, the weight rounded to the inputs' dtype for the matrix unit.

  Were it simply cast, its gradient would be of the inputs' dtype too, and each device's part would
  be rounded before the parts are summed over devices and slices. Here they are summed in float32.
  """
  return _matmul(inputs, weight, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(inputs, weight, dtype):
  return jnp.matmul(inputs, weight.astype(inputs.dtype), preferred_element_type=dtype)


def _forward(inputs, weight, dtype):
  return _matmul(inputs, weight, dtype), (inputs, weight)


def _backward(dtype, saved, cotangent):
  inputs, weight = saved
  back = jnp.matmul(cotangent, weight.astype(inputs.dtype).T, preferred_element_type=inputs.dtype)
  leading = tuple(range(inputs.ndim - 1))
  gradient = jnp.tensordot(
    inputs, cotangent, axes=(leading, leading), preferred_element_type=weight.dtype
  )
  return back.astype(inputs.dtype), gradient


_matmul.defvjp(_forward, _backward)
