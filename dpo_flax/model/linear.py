"""The linear map that every weight matrix of a block, and an untied head, is."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model import wide_gradient
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import Adapters, LoraConfig, Trained
from dpo_flax.model.quantization import ChannelScale, quantize, scale_channels


class Projection(nnx.Module):
  """y = x W, its adapters where it has any, and the bias that some families give it."""

  def __init__(
    self,
    name: str,
    features: tuple[int, int],  # (in, out)
    axes: tuple[str, str],  # their logical axes
    *,
    config: ModelConfig,
    lora: LoraConfig | None,
    rngs: nnx.Rngs,
    output_dtype: Any = None,  # default: the model's dtype
  ):
    self.dtype = config.dtype
    self.output_dtype = output_dtype or config.dtype
    kernel_init = jax.nn.initializers.normal(config.initializer_range)
    kernel, scale = kernel_init(rngs.params(), features, config.float_dtype), None
    if config.is_quantized:
      kernel, scale = quantize(kernel, axis=0)
      scale = ChannelScale(scale, out_sharding=axes[1:], eager_sharding=False)
    self.kernel = nnx.Param(kernel, out_sharding=axes, eager_sharding=False)
    self.kernel_scale = scale  # [out]; None: the kernel is of floats
    zeros = jnp.zeros(features[1], config.float_dtype)
    bias = nnx.Param(zeros, out_sharding=axes[1:], eager_sharding=False)
    self.bias = bias if name in config.biases else None
    self.adapters = Adapters(name, features, axes, dtype=config.dtype, lora=lora, rngs=rngs)
    self.fit_magnitudes()

  def __call__(
    self,
    inputs: jax.Array,  # [..., in]
    dropout_key: jax.Array | None = None,  # None: no dropout
  ) -> jax.Array:  # [..., out]
    if isinstance(self.kernel, Trained):
      outputs = wide_gradient.matmul(inputs, self.kernel[...], self.output_dtype)
    else:
      kernel = self.kernel[...].astype(self.dtype)
      outputs = jnp.matmul(inputs, kernel, preferred_element_type=self.output_dtype)
    outputs = scale_channels(outputs, self.kernel_scale)
    outputs = self.adapters(outputs, inputs, self.weight, dropout_key)
    if self.bias is not None:
      outputs += jnp.expand_dims(self.bias[...].astype(outputs.dtype), range(outputs.ndim - 1))
    return outputs

  def weight(self) -> jax.Array:  # [(L,) in, out]
    """Returns the kernel; one of int8, times its scales."""
    if self.kernel_scale is None:
      return self.kernel[...]
    return self.kernel[...].astype(jnp.float32) * self.kernel_scale[...][..., None, :]

  def fit_magnitudes(self):
    """Starts DoRA's magnitudes at the norms of the weights."""
    self.adapters.fit_magnitudes(self.weight())
