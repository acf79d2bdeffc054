"""The token table: what a model reads tokens with and, where it is tied, scores them with."""

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import Adapters, LoraConfig
from dpo_flax.model.quantization import ChannelScale, quantize, scale_channels


class Embedding(nnx.Module):
  """The token table, which a tied model also uses as its head.

  Adapted as `embed_tokens`, it reads tokens by E + scale * A B. The head of a tied model has an
  adapter of its own as `lm_head`; or, with `lora.tied`, that of the table, transposed; or none, and
  then it scores tokens by E alone, as PEFT does.
  """

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    self.dtype = config.dtype
    init = jax.nn.initializers.normal(config.initializer_range)
    shape, axes = (config.vocab_size, config.embed_dim), ('vocab', 'embed')
    table, scale = init(rngs.params(), shape, config.float_dtype), None
    if config.is_quantized:
      table, scale = quantize(table, axis=1)
      scale = ChannelScale(scale, out_sharding=axes[:1], eager_sharding=False)
    self.embedding = nnx.Param(table, out_sharding=axes, eager_sharding=False)
    self.embedding_scale = scale  # [V]; None: the table is of floats
    adapt = {'dtype': config.dtype, 'lora': lora, 'rngs': rngs}
    self.adapters = Adapters('embed_tokens', shape, axes, **adapt)
    tied = config.tie_word_embeddings
    self.head_adapters = Adapters('lm_head', shape[::-1], axes[::-1], **adapt) if tied else None
    self.shares_adapters = lora is not None and lora.tied
    self.fit_magnitudes()

  def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
    embedded = self.embedding[...][tokens].astype(self.dtype)
    if self.embedding_scale is not None:
      scales = self.embedding_scale[...][tokens][..., None]
      embedded = (embedded * scales).astype(self.dtype)
    return self.adapters(embedded, tokens, self.weight)

  def attend(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V], float32
    """Scores `hidden` against every token's embedding."""
    table = self.embedding[...].astype(self.dtype)
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    logits = scale_channels(logits, self.embedding_scale)
    if self.shares_adapters:
      return logits + sum(adapter.transposed(hidden) for adapter in self.adapters.active)
    return self.head_adapters(logits, hidden, lambda: self.weight().T)

  def weight(self) -> jax.Array:  # [V, D]
    """Returns the table; one of int8, times its scales."""
    if self.embedding_scale is None:
      return self.embedding[...]
    return self.embedding[...].astype(jnp.float32) * self.embedding_scale[...][:, None]

  def fit_magnitudes(self):
    """Starts DoRA's magnitudes at the norms of the weights."""
    self.adapters.fit_magnitudes(self.weight())
    if self.head_adapters is not None:
      self.head_adapters.fit_magnitudes(self.weight().T)
