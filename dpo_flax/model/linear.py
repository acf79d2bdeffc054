"""The adapted linear map: y = x W + scale (x A) B, by LoRA (arXiv:2106.09685) or DoRA (2402.09353).

W is the base weight and does not learn; A and B do. Every weight matrix of a block, and an untied
head, is a `Linear`; the token table takes its adapters from here.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.model import wide_gradient
from dpo_flax.model.kernels import Dense, float_dtype, kernel_of, make_weight, sharded
from dpo_flax.model.lora import Frozen, Lora, LoraConfig

# Below this a channel's squared norm counts as nothing, and DoRA leaves the channel alone.
_TINY = 1e-30

Axes = tuple[str | None, str | None]
Weight = Callable[[], jax.Array]  # gives W [in, out]; only DoRA asks for it


class Linear(nnx.Module):
  """y = x W + scale (x A) B + bias; adapters and bias only where asked for.

  In a model of your own, everything that is an `nnx.LoRAParam` learns, and `reference_of(model)` is
  the model without adapters:

  >>> q_proj = Linear(512, 64, lora=Lora(rank=8), rngs=nnx.Rngs(0))
  >>> q_proj(jnp.ones((2, 512))).shape
  (2, 64)
  >>> [learned.shape for learned in jax.tree.leaves(nnx.state(q_proj, nnx.LoRAParam))]
  [(512, 8), (8, 64)]
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,  # `params` of the kernel, `lora` of the adapters
    lora: Lora | LoraConfig | None = None,  # a LoraConfig adapts the modules that it names
    use_bias: bool = False,
    axes: Axes = (None, None),  # logical axes of the kernel, see sharding.py
    dtype: Any = jnp.float32,  # of products
    param_dtype: Any = jnp.float32,  # of the kernel; int8: see quantization.py
    name: str | None = None,  # its dropout differs from that of other names with the same key
    kernel_init: Callable[..., jax.Array] = jax.nn.initializers.lecun_normal(),  # noqa: B008
    output_dtype: Any = None,  # default: dtype
  ):
    name, features = name or '', (in_features, out_features)
    lora = lora.for_module(name) if isinstance(lora, Lora) else lora
    self.dtype, self.output_dtype = dtype, output_dtype or dtype
    floats = float_dtype(dtype, param_dtype)
    kernel = kernel_init(rngs.params(), features, floats)
    # The scale is [out], or None where the kernel is of floats.
    self.kernel, self.kernel_scale = make_weight(kernel, param_dtype, axes, input_axis=0)
    bias = sharded(nnx.Param, jnp.zeros(out_features, floats), axes[1:])
    self.bias = bias if use_bias else None
    weight = self.weight.dense
    self.adapters = Adapters(name, features, axes, weight, dtype=dtype, lora=lora, rngs=rngs)

  def __call__(
    self,
    inputs: jax.Array,  # [..., in]
    dropout_key: jax.Array | None = None,  # None: no dropout
  ) -> jax.Array:  # [..., out]
    inputs = inputs.astype(self.dtype)
    outputs = self.weight.matmul(inputs, self.output_dtype)
    outputs = self.adapters(outputs, inputs, self.weight.dense, dropout_key)
    if self.bias is not None:
      outputs += jnp.expand_dims(self.bias[...].astype(outputs.dtype), range(outputs.ndim - 1))
    return outputs

  @property
  def weight(self) -> Dense:
    """W."""
    return kernel_of(self.kernel, self.kernel_scale)

  def adapted_weights(self) -> list[tuple['Adapters', jax.Array]]:
    """Returns the adapters with the weights that they are on, [(L,) in, out]."""
    return [(self.adapters, self.weight.dense())]


class Adapter(nnx.Module):
  """y -> y + scale (x A) B; with DoRA each channel is then scaled to its own length.

  One of the factors starts at zero, so that y stays y until the first update.

  Where layers differ in rank, all have the largest: the columns of A and rows of B that are too
  many start at zero, and so does then their gradient, always.
  """

  def __init__(
    self,
    name: str,
    features: tuple[int, int],  # (in, out)
    axes: Axes,  # their logical axes
    weight: Weight,
    *,
    dtype: Any,
    lora: LoraConfig,
    rngs: nnx.Rngs,
    learns: bool,
  ):
    self.name, self.features, self.dtype, self.learns = name, features, dtype, learns
    self.low_rank, self.scales, self.dropout = lora.modules[name], lora.scales(name), lora.dropout
    a, b = _initial_factors(name, features, max(self.ranks), rngs)
    if len(self.ranks) > 1:
      kept = jnp.arange(max(self.ranks)) < jnp.array(self.ranks)[lora.layer]
      a = jnp.where(kept[None], a, 0)
    variable = nnx.LoRAParam if learns else Frozen
    self.lora_a = sharded(variable, a, (_factor_axis(axes[0]), 'rank'))
    self.lora_b = sharded(variable, b, ('rank', _factor_axis(axes[1])))
    magnitude = layer_scale = None
    if lora.dora:
      lengths = _channel_norms(weight()) if learns else jnp.ones(features[1], jnp.float32)
      magnitude = sharded(variable, lengths, axes[1:])
    if len(set(self.scales)) > 1:
      # 0 where a layer has no adapter.
      layer_scale = nnx.Variable(jnp.array(self.scales, jnp.float32)[lora.layer])
    self.magnitude, self.layer_scale = magnitude, layer_scale

  @property
  def ranks(self) -> tuple[int, ...]:
    """The rank in each layer, or the one of all."""
    return self.low_rank.ranks

  @property
  def size(self) -> int:
    """The number of parameters that learn, in all layers."""
    layers = self.lora_a.shape[0] if self.lora_a.ndim > 2 else 1
    ranks = [rank for rank, _ in self.low_rank.of_layers(layers)]
    magnitudes = 0 if self.magnitude is None else self.features[1] * np.count_nonzero(ranks)
    return sum(ranks) * sum(self.features) + int(magnitudes)

  def __call__(
    self,
    outputs: jax.Array,  # [..., out]
    inputs: jax.Array,  # [..., in]; or token ids [...], which stand for one-hot vectors
    weight: Weight,
    dropout_key: jax.Array | None = None,  # None: no dropout
  ) -> jax.Array:  # [..., out], of the dtype of `outputs`
    if self.dropout and dropout_key is not None:
      inputs = self._drop(inputs, dropout_key)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      low = self.lora_a[...][inputs].astype(self.dtype)
    else:
      low = wide_gradient.matmul(inputs, self.lora_a[...], self.dtype)
    delta = wide_gradient.matmul(low, self.lora_b[...], outputs.dtype)
    if self.magnitude is None:
      return outputs + (delta * self._scale()).astype(outputs.dtype)
    wide = outputs.astype(jnp.float32) + delta.astype(jnp.float32) * self._scale()
    gain = jnp.expand_dims(self._gain(weight(), self.magnitude[...]), range(outputs.ndim - 1))
    return (wide * gain).astype(outputs.dtype)

  def transposed(self, inputs: jax.Array) -> jax.Array:  # [..., out] -> [..., in], float32
    """Returns scale (x B^T) A^T: what a head that is tied to an adapted table adds."""
    low = wide_gradient.matmul(inputs, self.lora_b[...].T, self.dtype)
    return wide_gradient.matmul(low, self.lora_a[...].T, jnp.float32) * self._scale()

  def _gain(
    self,
    weight: jax.Array,  # [in, out]
    magnitude: jax.Array,  # [out]
  ) -> jax.Array:  # [out] float32
    """Returns DoRA's magnitude / ||W + scale A B|| of each channel; its gradient is exact.

    The square of the norm is ||W||^2 + 2 scale <W, AB> + scale^2 ||AB||^2: nothing of W's size is
    formed. PEFT's gradient takes the norm as a constant (section 4.3 of the paper).
    """
    wide, a, b = weight.astype(jnp.float32), self.lora_a[...], self.lora_b[...]
    exact = jax.lax.Precision.HIGHEST
    cross = jnp.einsum('io,ir->ro', wide, a, precision=exact)
    gram = jnp.einsum('ir,is->rs', a, a, precision=exact)
    scale = self._scale()
    squares = jnp.sum(jnp.square(wide), axis=0)
    squares += 2 * scale * jnp.sum(cross * b, axis=0)
    squares += scale**2 * jnp.sum(jnp.matmul(gram, b, precision=exact) * b, axis=0)
    gain = magnitude / jnp.sqrt(jnp.maximum(squares, _TINY))
    # A layer without adapter keeps its magnitudes: they are in no export.
    return gain if self.layer_scale is None else jnp.where(scale == 0, 1.0, gain)

  def _scale(self) -> float | jax.Array:
    return self.scales[0] if self.layer_scale is None else self.layer_scale[...]

  def _drop(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
    # The maps of a layer share its key; their masks differ by the name.
    key = jax.random.fold_in(key, zlib.crc32(self.name.encode()))
    kept = jax.random.bernoulli(key, 1 - self.dropout, inputs.shape)
    return jnp.where(kept, inputs / (1 - self.dropout), 0).astype(inputs.dtype)


class Adapters(nnx.Module):
  """The adapters of one weight, where it has any: the policy's, and a frozen one of the reference.

  `reference_of(model)` is the model with the latter alone.
  """

  def __init__(self, name: str, *args: Any, lora: LoraConfig | None, **kwargs: Any):
    def make(config, learns):
      if config is None or name not in config.modules:
        return None
      return Adapter(name, *args, lora=config, learns=learns, **kwargs)

    self.learned, self.frozen = make(lora, True), make(lora and lora.reference, False)
    self.adapted = True
    self.reference_adapted = lora is not None and lora.continues

  def set_view(self, adapted: bool | None = None, reference_adapted: bool | None = None):
    """Lets `nnx.view` take the adapters on and off."""
    self.adapted = self.adapted if adapted is None else adapted
    if reference_adapted is not None:
      self.reference_adapted = reference_adapted

  @property
  def active(self) -> list[Adapter]:
    """Those that this view has, in the order in which they are applied."""
    chosen = ((self.frozen, self.reference_adapted), (self.learned, self.adapted))
    return [adapter for adapter, used in chosen if used and adapter is not None]

  def __call__(
    self,
    outputs: jax.Array,  # [..., out]
    inputs: jax.Array,  # [..., in], or token ids [...]
    weight: Weight,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:  # [..., out]
    for adapter in self.active:
      outputs = adapter(outputs, inputs, weight, None if adapter is self.frozen else dropout_key)
    return outputs


def adapters_of(model: nnx.Module) -> Iterator[tuple[tuple, Adapter]]:
  """Yields every adapter of a model, active or not, and its path."""
  for path, module in nnx.iter_modules(model):
    if isinstance(module, Adapter):
      yield path, module


def fit_magnitudes(model: nnx.Module) -> None:
  """Starts DoRA's magnitudes at the norms of the weights: after other weights were loaded."""
  graphdef, state = nnx.split(model)
  are_magnitudes = nnx.All(nnx.LoRAParam, nnx.PathContains('magnitude'))
  magnitudes = nnx.filter_state(state, are_magnitudes)
  if not magnitudes:
    return

  def fitted(state):
    model = nnx.merge(graphdef, state)
    for _, module in nnx.iter_modules(model):
      for adapters, weight in getattr(module, 'adapted_weights', list)():
        if adapters.learned is not None and adapters.learned.magnitude is not None:
          adapters.learned.magnitude[...] = _channel_norms(weight)
    return nnx.state(model, are_magnitudes)

  shardings = jax.tree.map(lambda array: array.sharding, magnitudes)
  nnx.update(model, jax.jit(fitted, out_shardings=shardings)(state))


def _channel_norms(weight: jax.Array) -> jax.Array:  # [(L,) in, out] -> [(L,) out] float32
  squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=-2)
  return jnp.sqrt(jnp.maximum(squares, _TINY))


def _factor_axis(axis: str | None) -> str | None:
  # A kernel has two axes to split, a factor one: `rank` is too short.
  return 'adapter' if axis in {'heads', 'kv_heads', 'mlp'} else axis


def _initial_factors(
  name: str, features: tuple[int, int], rank: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:  # A [in, rank], B [rank, out]
  """Returns PEFT's start: A uniform in +-1/sqrt(in), B zero; of an embedding A zero, B normal."""
  size_a, size_b = (features[0], rank), (rank, features[1])
  if name == 'embed_tokens':
    return jnp.zeros(size_a, jnp.float32), jax.random.normal(rngs.lora(), size_b, jnp.float32)
  bound = 1 / math.sqrt(features[0])
  a = jax.random.uniform(rngs.lora(), size_a, jnp.float32, minval=-bound, maxval=bound)
  return a, jnp.zeros(size_b, jnp.float32)
