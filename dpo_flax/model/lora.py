"""A linear projection with an optional low-rank adapter (LoRA, arXiv:2106.09685)."""

import dataclasses
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model import wide_gradient
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.quantization import ChannelScale, quantize, scale_channels

# Projection -> where Hugging Face puts it in a layer: the names that target patterns speak of.
BLOCK_PROJECTIONS = {
  'q_proj': 'self_attn.q_proj',
  'k_proj': 'self_attn.k_proj',
  'v_proj': 'self_attn.v_proj',
  'o_proj': 'self_attn.o_proj',
  'gate_proj': 'mlp.gate_proj',
  'up_proj': 'mlp.up_proj',
  'down_proj': 'mlp.down_proj',
}
FUSED_PROJECTIONS = {
  'qkv_proj': 'self_attn.qkv_proj',
  'o_proj': 'self_attn.o_proj',
  'gate_up_proj': 'mlp.gate_up_proj',
  'down_proj': 'mlp.down_proj',
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The adapters: which projections have one, and of what kind."""

  r: int  # rank
  alpha: float
  dropout: float  # on the adapter's input
  rslora: bool
  targets: frozenset[str]  # names of projections: q_proj, ..., lm_head

  @property
  def scale(self) -> float:
    """The factor on the adapter's output: alpha / r, or alpha / sqrt(r) (arXiv:2312.03732)."""
    return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class Projection(nnx.Module):
  """y = x W + bias + scale * (x A) B: A and B only where adapted, a bias where the family has it.

  `nnx.view(module, adapted=False)` is the same projection without its adapter: the reference.
  B starts at zero, so that the two agree until the first update.
  """

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
    self.name = name
    self.dtype = config.dtype
    self.output_dtype = output_dtype or config.dtype
    self.adapted = lora is not None and name in lora.targets
    kernel_init = jax.nn.initializers.normal(config.initializer_range)
    kernel, scale = kernel_init(rngs.params(), features, config.float_dtype), None
    if config.is_quantized:
      kernel, scale = quantize(kernel, axis=0)
      scale = ChannelScale(scale, out_sharding=axes[1:], eager_sharding=False)
    self.kernel = nnx.Param(kernel, out_sharding=axes, eager_sharding=False)
    self.kernel_scale = scale  # [out]; None: the kernel is of floats
    bias = None
    if name in config.biases:
      zeros = jnp.zeros(features[1], config.float_dtype)
      bias = nnx.Param(zeros, out_sharding=axes[1:], eager_sharding=False)
    self.bias = bias  # [out]
    if self.adapted:
      self.scale, self.dropout = lora.scale, lora.dropout
      # PEFT's start for A: uniform in +-1/sqrt(in).
      bound = 1 / math.sqrt(features[0])
      self.lora_a = nnx.LoRAParam(
        jax.random.uniform(
          rngs.lora(), (features[0], lora.r), jnp.float32, minval=-bound, maxval=bound
        ),
        out_sharding=(axes[0], 'rank'),
        eager_sharding=False,
      )
      self.lora_b = nnx.LoRAParam(
        jnp.zeros((lora.r, features[1]), jnp.float32),
        out_sharding=('rank', axes[1]),
        eager_sharding=False,
      )

  def set_view(self, adapted: bool | None = None):
    """Lets `nnx.view` take the adapter off. A projection that has none stays as it is."""
    if adapted is not None:
      self.adapted = adapted and hasattr(self, 'lora_a')

  def __call__(
    self,
    inputs: jax.Array,  # [..., in]
    dropout_key: jax.Array | None = None,  # None: no dropout
  ) -> jax.Array:  # [..., out]
    outputs = scale_channels(self._matmul(inputs, self.kernel), self.kernel_scale)
    if self.bias is not None:
      outputs += jnp.expand_dims(self.bias[...].astype(outputs.dtype), range(outputs.ndim - 1))
    if not self.adapted:
      return outputs
    if self.dropout and dropout_key is not None:
      inputs = self._drop(inputs, dropout_key)
    low = wide_gradient.matmul(inputs, self.lora_a[...], self.dtype)
    return outputs + wide_gradient.matmul(low, self.lora_b[...], self.output_dtype) * self.scale

  def _matmul(self, inputs: jax.Array, weight: nnx.Variable) -> jax.Array:
    return jnp.matmul(
      inputs, weight[...].astype(self.dtype), preferred_element_type=self.output_dtype
    )

  def _drop(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
    # Projections of a layer share its key; the name tells their masks apart.
    key = jax.random.fold_in(key, zlib.crc32(self.name.encode()))
    kept = jax.random.bernoulli(key, 1 - self.dropout, inputs.shape)
    return jnp.where(kept, inputs / (1 - self.dropout), 0).astype(inputs.dtype)


def resolve_targets(
  target_modules: Sequence[str] | str | None,
  exclude_modules: Sequence[str] | str,
  *,
  config: ModelConfig,
) -> frozenset[str]:
  """Returns the projections that get an adapter, by PEFT's rules.

  A list holds module names or their ends (`q_proj`, `self_attn.q_proj`), a string is a regex that
  must match a whole module name (`model.layers.0.self_attn.q_proj`), None and 'all-linear' mean
  every linear layer but the head.

  Raises:
    ValueError: an entry matches nothing, or only some of the layers.
  """
  modules = _module_names(config)
  everything = target_modules is None or target_modules == 'all-linear'
  chosen = frozenset(block_projections(config))
  if not everything:
    chosen = _matching(target_modules, modules, 'lora.target_modules')
  excluded = _matching(exclude_modules, modules, 'lora.exclude_modules')
  if not chosen - excluded:
    raise ValueError(
      f'lora.target_modules={target_modules!r} less lora.exclude_modules={exclude_modules!r} '
      f'leaves no module to adapt; the model has {", ".join(modules)}'
    )
  return chosen - excluded


def block_projections(config: ModelConfig) -> dict[str, str]:
  """Returns the projections of a layer, and where Hugging Face puts them."""
  return FUSED_PROJECTIONS if config.fused_projections else BLOCK_PROJECTIONS


def _module_names(config: ModelConfig) -> dict[str, list[str]]:
  """Projection -> its module names in a Hugging Face model, one per layer."""
  layers = range(config.num_layers)
  modules = {
    name: [f'model.layers.{layer}.{place}' for layer in layers]
    for name, place in block_projections(config).items()
  }
  return modules if config.tie_word_embeddings else modules | {'lm_head': ['lm_head']}


def _matching(
  pattern: Sequence[str] | str, modules: dict[str, list[str]], field: str
) -> frozenset[str]:
  """The projections that a pattern names; every entry of a list must name at least one."""
  if isinstance(pattern, str):
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'{field}={pattern!r} is not a regular expression: {error}') from None
    entries = [(pattern, lambda module: re.fullmatch(pattern, module) is not None)]
  else:
    entries = [
      (entry, lambda module, entry=entry: module == entry or module.endswith('.' + entry))
      for entry in pattern
    ]
  found = set()
  for entry, matches in entries:
    hits = {name: [matches(module) for module in names] for name, names in modules.items()}
    if not any(any(hit) for hit in hits.values()):
      raise ValueError(f'{field}: {entry!r} matches none of {", ".join(modules)}')
    partial = [name for name, hit in hits.items() if any(hit) and not all(hit)]
    if partial:
      raise ValueError(f'{field}: {entry!r} matches only some layers of {", ".join(partial)}')
    found |= {name for name, hit in hits.items() if all(hit)}
  return frozenset(found)
