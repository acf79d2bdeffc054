"""The network: embed -> scan over stacked, rematerialised blocks -> final hidden states.

`run_streams` carries the policy's and the reference's hidden states through one scan, so that each
layer's weights are gathered once for both.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dpo_flax.model.attention import Attention, Places, choose, make_places
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.embedding import Embedding
from dpo_flax.model.hidden import Hidden
from dpo_flax.model.layers import MLP, RMSNorm, softly_capped
from dpo_flax.model.linear import Projection
from dpo_flax.model.lora import LoraConfig, adapters_of
from dpo_flax.sharding import constrain

_LAYER_INPUT = 'layer_input'


class Block(nnx.Module):
  """One layer: attention, then the MLP, each normed where the family does, added to the stream."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    def norm(present: bool):
      return RMSNorm(config, config.embed_dim) if present else None

    self.attention_norm = norm(config.input_norms)
    self.attention = Attention(config, lora, rngs)
    self.attention_output_norm = norm(config.output_norms)
    self.mlp_norm = norm(config.input_norms)
    self.mlp = MLP(config, lora, rngs)
    self.mlp_output_norm = norm(config.output_norms)

  def __call__(
    self,
    hidden: jax.Array,  # [B, T, D]
    places: Places,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:  # [B, T, D]
    def normed(norm, array):
      return array if norm is None else norm(array)

    mixed = self.attention(normed(self.attention_norm, hidden), places, dropout_key)
    hidden = hidden + normed(self.attention_output_norm, mixed)
    fed = self.mlp(normed(self.mlp_norm, hidden), dropout_key)
    hidden = hidden + normed(self.mlp_output_norm, fed)
    return constrain(hidden, 'rows', 'tokens', 'activation')


class Transformer(nnx.Module):
  """A decoder of any of our families; its blocks are stacked along a leading `layers` axis."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    self.config = config
    self.embed_tokens = Embedding(config, lora, rngs)
    stack = nnx.transform_metadata(
      lambda layer_rngs: Block(config, lora, layer_rngs), in_axes=0, out_axes=0, partition='layers'
    )
    self.blocks = jax.vmap(stack)(rngs.split(config.num_layers))
    for adapter in adapters_of(self.blocks):
      adapter.fit_layers()
    self.final_norm = RMSNorm(config, config.embed_dim)
    if not config.tie_word_embeddings:
      # Logits leave the matrix unit in float32: bfloat16 would cost log-probs two digits.
      self.lm_head = Projection(
        'lm_head',
        (config.embed_dim, config.vocab_size),
        ('embed', 'vocab'),
        config=config,
        lora=lora,
        rngs=rngs,
        output_dtype=jnp.float32,
      )

  def embed(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
    """Returns what enters the first layer."""
    hidden = self.embed_tokens(tokens) * self.config.embed_scale
    return constrain(hidden, 'rows', 'tokens', 'activation')

  def hidden(
    self,
    batch: Mapping[str, jax.Array],  # tokens, positions, visible_until [B, T] int32
    *,
    dropout_key: jax.Array | None = None,
    cache: Any = None,
  ) -> Hidden:
    """Returns the final hidden states; see `hidden.Model`."""
    assert cache is None, 'sampling from a cache is still to come'
    return Hidden(run_streams(self, None, batch, dropout_key=dropout_key)[0])

  def logits(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V], float32
    """Applies the head to final hidden states."""
    tied = self.config.tie_word_embeddings
    logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
    return softly_capped(logits, self.config.logits_softcap)


def run_streams(
  policy: Transformer,
  reference: Transformer | None,
  batch: Mapping[str, jax.Array],  # tokens, positions, visible_until [B, T]
  *,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # final hidden states [B, T, D] of each
  """Runs both models over a batch in one scan over their layers.

  The reference has as many layers as the policy and may share any of its variables
  (`nnx.view(policy, adapted=False)`). It is never differentiated: its stream stays outside the
  rematerialised function.
  """
  config = policy.config
  models = (policy,) if reference is None else (policy, reference)
  places = _places_of(models, batch)
  # Splitting both at once keeps one copy of a variable that both hold.
  graphdef, layers = nnx.split(tuple(model.blocks for model in models))
  kinds = [_kinds(model.config) for model in models]
  keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)

  def policy_layer(block, hidden, kind, key):
    # Chosen in here, because what enters is kept for backward, once for every layer.
    return block(checkpoint_name(hidden, _LAYER_INPUT), choose(places[0], kind), key)

  def layer(streams, inputs):
    layer_state, kinds, key = inputs
    blocks = nnx.merge(graphdef, layer_state)
    hidden = _rematerialised(policy_layer, config.remat)(blocks[0], streams[0], kinds[0], key)
    others = [
      jax.lax.stop_gradient(block(stream, choose(its_places, kind)))
      for block, stream, its_places, kind in zip(
        blocks[1:], streams[1:], places[1:], kinds[1:], strict=True
      )
    ]
    return (hidden, *others), None

  streams = tuple(model.embed(batch['tokens']) for model in models)
  streams, _ = jax.lax.scan(layer, streams, (layers, kinds, keys))
  normed = [model.final_norm(stream) for model, stream in zip(models, streams, strict=True)]
  return normed[0], None if reference is None else jax.lax.stop_gradient(normed[1])


def _places_of(models: Sequence[Transformer], batch: Mapping[str, jax.Array]) -> list[list[Places]]:
  """Returns the places of each model's kinds of layers; models alike share them."""
  made = {}
  for config in (model.config for model in models):
    if config not in made:
      made[config] = make_places(batch['positions'], batch['visible_until'], config)
  return [made[model.config] for model in models]


def _kinds(config: ModelConfig) -> jax.Array | None:
  """Returns which kind each layer is [L]; None where all are one."""
  return jnp.array(config.kind_of_layer) if len(config.kinds) > 1 else None


def _rematerialised(function, remat: str):
  if remat == 'none':
    return function
  policies = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # As full, but what each layer starts from waits in the host's memory.
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  }
  # Inside a scan XLA cannot merge the recomputation with the forward pass: no barrier is needed.
  return partial(jax.checkpoint, policy=policies[remat], prevent_cse=False)(function)
