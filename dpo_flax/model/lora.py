"""Low-rank adapters of linear maps: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.model import wide_gradient

# Below this a channel's squared norm counts as nothing, and DoRA leaves the channel alone.
_TINY = 1e-30


class Magnitude(nnx.LoRAParam):
  """DoRA's length of each output channel, learned beside the directions."""


class Frozen(nnx.Variable):
  """An array of an adapter that belongs to the reference and does not learn."""


class Trained(nnx.Param):
  """A base weight that the policy learns whole: its own float32 copy."""


class LayerScale(nnx.Variable):
  """The factor on an adapter's output in each layer, where layers differ; 0: no adapter there."""


# What a model learns, and what a checkpoint of the model holds; a Trained weight is both.
TRAINABLE = nnx.Any(nnx.LoRAParam, Trained)
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Rank and alpha of one module's adapter: a single one of each, or one for every layer."""

  ranks: tuple[int, ...]  # 0: no adapter in that layer
  alphas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The adapters of a model, and what else of the policy learns beside them."""

  modules: Mapping[str, LowRank]  # by name: q_proj, ..., embed_tokens, lm_head
  dropout: float  # on the input of linear layers' adapters
  rslora: bool
  dora: bool
  tied: bool  # whether a tied head shares what the token table learns
  saved: frozenset[str]  # modules that learn whole, by their paths: final_norm, blocks.mlp.up_proj
  # An adapter that the reference has and that does not learn; the policy's own comes on top of it
  # (`continues`), or in its place.
  reference: 'LoraConfig | None'
  continues: bool

  @property
  def targets(self) -> frozenset[str]:
    """Names of the modules that have an adapter."""
    return frozenset(self.modules)

  def scales(self, name: str) -> tuple[float, ...]:
    """Returns the factor on the adapter's output in each layer, 0 where it has none.

    It is alpha / r, or with rslora alpha / sqrt(r) (arXiv:2312.03732).
    """
    module = self.modules[name]
    return tuple(
      alpha / (math.sqrt(rank) if self.rslora else rank) if rank else 0.0
      for rank, alpha in zip(module.ranks, module.alphas, strict=True)
    )


class Adapter(nnx.Module):
  """y -> y + scale * (x A) B; with DoRA each channel is then scaled to its own length.

  One of the factors starts at zero, so that y stays y until the first update.

  Where layers differ in rank, all have the largest: the columns of A and rows of B that are too
  many start at zero, and so does then their gradient, always.
  """

  def __init__(
    self,
    name: str,
    features: tuple[int, int],  # (in, out)
    axes: tuple[str, str],  # their logical axes
    *,
    dtype: Any,
    lora: LoraConfig,
    rngs: nnx.Rngs,
    learns: bool,
  ):
    self.name, self.features, self.dtype, self.learns = name, features, dtype, learns
    self.dropout, self.scales, self.ranks = (
      lora.dropout,
      lora.scales(name),
      lora.modules[name].ranks,
    )
    rank = max(self.ranks)
    a, b = _initial_factors(name, features, rank, rngs)
    factor, length = (nnx.LoRAParam, Magnitude) if learns else (Frozen, Frozen)
    self.lora_a = factor(a, out_sharding=(_factor_axis(axes[0]), 'rank'), eager_sharding=False)
    self.lora_b = factor(b, out_sharding=('rank', _factor_axis(axes[1])), eager_sharding=False)
    ones = jnp.ones(features[1], jnp.float32)  # until the weights are known
    magnitude = length(ones, out_sharding=axes[1:], eager_sharding=False)
    self.magnitude = magnitude if lora.dora else None
    differs = len(set(self.scales)) > 1
    self.layer_scale = LayerScale(jnp.zeros((), jnp.float32)) if differs else None

  @property
  def size(self) -> int:
    """The number of parameters that learn, in all layers."""
    layers = self.lora_a.shape[0] if self.lora_a.ndim > 2 else 1
    ranks = self.ranks if len(self.ranks) > 1 else self.ranks * layers
    magnitudes = 0 if self.magnitude is None else self.features[1] * np.count_nonzero(ranks)
    return sum(ranks) * sum(self.features) + int(magnitudes)

  def fit_layers(self):
    """Gives each layer its rank and scale; called once the layers are stacked."""
    if len(self.ranks) > 1:
      kept = np.arange(max(self.ranks))[None] < np.array(self.ranks)[:, None]
      self.lora_a[...] *= kept[:, None].astype(np.float32)
    if self.layer_scale is not None:
      self.layer_scale[...] = jnp.array(self.scales, jnp.float32)

  def __call__(
    self,
    outputs: jax.Array,  # [..., out]
    inputs: jax.Array,  # [..., in]; or token ids [...], which stand for one-hot vectors
    weight: Callable[[], jax.Array],  # gives [in, out]; only DoRA asks for it
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
    gain = jnp.expand_dims(self.gain(weight()), range(outputs.ndim - 1))
    return (wide * gain).astype(outputs.dtype)

  def gain(self, weight: jax.Array) -> jax.Array:  # [in, out] -> [out] float32
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
    gain = self.magnitude[...] / jnp.sqrt(jnp.maximum(squares, _TINY))
    # A layer without adapter keeps its magnitudes: they are in no export.
    return gain if self.layer_scale is None else jnp.where(scale == 0, 1.0, gain)

  def transposed(self, inputs: jax.Array) -> jax.Array:  # [..., out] -> [..., in], float32
    """Returns scale * (x B^T) A^T: what a head that is tied to an adapted table adds."""
    low = wide_gradient.matmul(inputs, self.lora_b[...].T, self.dtype)
    return wide_gradient.matmul(low, self.lora_a[...].T, jnp.float32) * self._scale()

  def _scale(self) -> float | jax.Array:
    return self.scales[0] if self.layer_scale is None else self.layer_scale[...]

  def _drop(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
    # Projections of a layer share its key; the name tells their masks apart.
    key = jax.random.fold_in(key, zlib.crc32(self.name.encode()))
    kept = jax.random.bernoulli(key, 1 - self.dropout, inputs.shape)
    return jnp.where(kept, inputs / (1 - self.dropout), 0).astype(inputs.dtype)


class Adapters(nnx.Module):
  """The adapters of one module, where it has any: the policy's, and a frozen one of the reference.

  `nnx.view(model, adapted=False, reference_adapted=True)` is the reference.
  """

  def __init__(
    self,
    name: str,
    features: tuple[int, int],  # (in, out)
    axes: tuple[str, str],  # their logical axes
    *,
    dtype: Any,
    lora: LoraConfig | None,
    rngs: nnx.Rngs,
  ):
    def make(config, learns):
      if config is None or name not in config.modules:
        return None
      return Adapter(name, features, axes, dtype=dtype, lora=config, rngs=rngs, learns=learns)

    self.learned, self.frozen = make(lora, True), make(lora and lora.reference, False)
    self.adapted = True
    self.reference_adapted = lora is not None and lora.continues

  def set_view(self, adapted: bool | None = None, reference_adapted: bool | None = None):
    """Lets `nnx.view` take the adapters on and off."""
    self.adapted = self.adapted if adapted is None else adapted
    if reference_adapted is not None:
      self.reference_adapted = reference_adapted

  def fit_magnitudes(self, weight: jax.Array):  # [(L,) in, out]
    """Starts what DoRA learns at the norms of the weights."""
    if self.learned is not None and self.learned.magnitude is not None:
      squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=-2)
      self.learned.magnitude[...] = jnp.sqrt(jnp.maximum(squares, _TINY))

  @property
  def active(self) -> list[Adapter]:
    """Those that this view has, in the order in which they are applied."""
    chosen = ((self.frozen, self.reference_adapted), (self.learned, self.adapted))
    return [adapter for adapter, used in chosen if used and adapter is not None]

  def __call__(
    self,
    outputs: jax.Array,  # [..., out]
    inputs: jax.Array,  # [..., in], or token ids [...]
    weight: Callable[[], jax.Array],
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:  # [..., out]
    for adapter in self.active:
      outputs = adapter(outputs, inputs, weight, None if adapter is self.frozen else dropout_key)
    return outputs


def adapters_of(model: nnx.Module) -> Iterator[Adapter]:
  """Yields every adapter of a model, active or not."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, Adapter):
      yield module


def train_whole(model: nnx.Module, modules: Collection[str] | None):
  """Gives a model its own float32 copies of the weights of `modules` (None: all), which learn.

  What shared the variables, such as another view of the model, keeps the old ones.
  """
  for path, module in list(nnx.iter_modules(model)):
    if modules is None or '.'.join(map(str, path)) in modules:
      for name, variable in list(vars(module).items()):
        if isinstance(variable, nnx.Param):
          # A copy in any case: the step consumes what it updates.
          copy = jnp.copy(variable[...].astype(jnp.float32))
          setattr(module, name, Trained(copy, **variable.get_metadata()))


def _factor_axis(axis: str) -> str:
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
