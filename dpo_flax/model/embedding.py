"""The token table: what a model reads tokens with and, where it is tied, scores them with."""

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.config import ModelConfig
from dpo_flax.model.kernels import kernel_of, make_weight
from dpo_flax.model.linear import Adapters
from dpo_flax.model.lora import LoraConfig


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
    table = init(rngs.params(), shape, config.float_dtype)
    # The scale is [V], or None where the table is of floats.
    self.embedding, self.embedding_scale = make_weight(
      table, config.weight_dtype, axes, input_axis=1
    )
    adapt = {'dtype': config.dtype, 'lora': lora, 'rngs': rngs}
    self.adapters = Adapters('embed_tokens', shape, axes, self.weight, **adapt)
    tied, head, head_axes = config.tie_word_embeddings, shape[::-1], axes[::-1]
    self.head_adapters = (
      Adapters('lm_head', head, head_axes, self._head_weight, **adapt) if tied else None
    )
    self.shares_adapters = lora is not None and lora.tied

  def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
    embedded = self.embedding[...][tokens].astype(self.dtype)
    if self.embedding_scale is not None:
      scales = self.embedding_scale[...][tokens][..., None]
      embedded = (embedded * scales).astype(self.dtype)
    return self.adapters(embedded, tokens, self.weight)

  def attend(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V], float32
    """Scores `hidden` against every token's embedding."""
    # Of the array, not the variable: a table that learns gets both gradients in the model's dtype.
    head = kernel_of(self.embedding[...].astype(self.dtype).T, self.embedding_scale)
    logits = head.matmul(hidden, jnp.float32)
    if self.shares_adapters:
      return logits + sum(adapter.transposed(hidden) for adapter in self.adapters.active)
    assert self.head_adapters is not None  # an untied model scores by its lm_head
    return self.head_adapters(logits, hidden, self._head_weight)

  def weight(self) -> jax.Array:  # [V, D]
    """Returns the table; one of int8, times its scales."""
    if self.embedding_scale is None:
      return self.embedding[...]
    return self.embedding[...].astype(jnp.float32) * self.embedding_scale[...][:, None]

  def adapted_weights(self) -> list[tuple[Adapters, jax.Array]]:
    """Returns the adapters with the weights that they are on."""
    head = [] if self.head_adapters is None else [(self.head_adapters, self._head_weight())]
    return [(self.adapters, self.weight()), *head]

  def _head_weight(self) -> jax.Array:  # [D, V]
    return self.weight().T
