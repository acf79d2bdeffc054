"""The network: embed -> scan over stacked, rematerialised blocks -> final hidden states.

`run_streams` carries the policy's and the reference's hidden states through one scan, so that each
layer's weights are gathered once for both.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dpo_flax.model.attention import (
  Attention,
  AttentionInputs,
  make_attention_inputs,
  select_inputs,
)
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.embedding import Embedding
from dpo_flax.model.hidden import Hidden
from dpo_flax.model.layers import MLP, RMSNorm, make_linear, softly_capped
from dpo_flax.model.lora import LoraConfig
from dpo_flax.sharding import constrain

# What rematerialisation may keep of a block.
LAYER_INPUT = 'layer_input'

Statistics = Mapping[str, jax.Array]  # what a layer reports beside its hidden states; none does yet


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
    inputs: AttentionInputs,
    cache: Any = None,  # of keys and values
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any, Statistics]:  # [B, T, D], the cache, statistics
    def normed(norm, array):
      return array if norm is None else norm(array)

    hidden = checkpoint_name(hidden, LAYER_INPUT)
    mixed, cache = self.attention(normed(self.attention_norm, hidden), inputs, cache, dropout_key)
    hidden = hidden + normed(self.attention_output_norm, mixed)
    fed = self.mlp(normed(self.mlp_norm, hidden), dropout_key)
    hidden = hidden + normed(self.mlp_output_norm, fed)
    return constrain(hidden, 'rows', 'tokens', 'activation'), cache, {}


class Segment(NamedTuple):
  """Consecutive layers alike in shape, which one scan runs through."""

  start: int  # the first one's index
  count: int
  blocks: Block  # stacked along a leading axis


class Transformer(nnx.Module):
  """A decoder of any of our families; its blocks are stacked along a leading `layers` axis."""

  def __init__(self, config: ModelConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
    self.config = config
    self.embed_tokens = Embedding(config, lora, rngs)
    stack = nnx.transform_metadata(
      lambda layer_rngs, layer: Block(config, lora and lora.at_layer(layer), layer_rngs),
      in_axes=0,
      out_axes=0,
      partition='layers',
    )
    layers = config.num_layers
    self.blocks = jax.vmap(stack)(rngs.split(layers), jnp.arange(layers))
    self.final_norm = RMSNorm(config, config.embed_dim)
    if not config.tie_word_embeddings:
      self.lm_head = make_linear(
        'lm_head',
        (config.embed_dim, config.vocab_size),
        ('embed', 'vocab'),
        config=config,
        lora=lora,
        rngs=rngs,
        # Logits leave the matrix unit in float32: bfloat16 would cost log-probs two digits.
        output_dtype=jnp.float32,
      )

  @property
  def vocab_size(self) -> int:
    """Rows of the token table."""
    return self.config.vocab_size

  @property
  def segments(self) -> list[Segment]:
    """The layers in order: today one segment of blocks that are all alike."""
    return [Segment(0, self.config.num_layers, self.blocks)]

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
  inputs = {  # of models alike, the same arrays
    config: make_attention_inputs(batch['positions'], batch['visible_until'], config)
    for config in dict.fromkeys(model.config for model in models)
  }
  keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
  streams = tuple(model.embed(batch['tokens']) for model in models)
  for segments in zip(*(model.segments for model in models), strict=True):
    streams = _run_segments(segments, streams, [(m.config, inputs[m.config]) for m in models], keys)
  normed = [model.final_norm(stream) for model, stream in zip(models, streams, strict=True)]
  return normed[0], None if reference is None else jax.lax.stop_gradient(normed[1])


def _run_segments(
  segments: Sequence[Segment],  # of each model, the same layers
  streams: tuple[jax.Array, ...],  # of each model [B, T, D]
  attention: Sequence[tuple[ModelConfig, Sequence[AttentionInputs]]],  # of each model
  keys: jax.Array | None,  # [L] of dropout
) -> tuple[jax.Array, ...]:
  """Runs every model's stream through its segment in one scan."""
  layers = slice(segments[0].start, segments[0].start + segments[0].count)
  configs, inputs = zip(*attention, strict=True)
  # Splitting all at once keeps one copy of a variable that two models hold.
  graphdef, state = nnx.split(tuple(segment.blocks for segment in segments))
  types = [_type_indices(config, layers) for config in configs]
  keys = None if keys is None else keys[layers]

  def policy_layer(block, hidden, index, key):
    # Selected in here, because what enters is kept for backward, once for every layer.
    hidden, _, _ = block(hidden, select_inputs(inputs[0], index), None, key)
    return hidden

  def layer(streams, layer_inputs):
    layer_state, types, key = layer_inputs
    blocks = nnx.merge(graphdef, layer_state)
    remat = _rematerialised(policy_layer, configs[0].remat)
    hidden = [remat(blocks[0], streams[0], types[0], key)]
    for block, stream, its_inputs, index in zip(
      blocks[1:], streams[1:], inputs[1:], types[1:], strict=True
    ):
      other, _, _ = block(stream, select_inputs(its_inputs, index))
      hidden.append(jax.lax.stop_gradient(other))
    return tuple(hidden), None

  return jax.lax.scan(layer, streams, (state, types, keys))[0]


def _type_indices(config: ModelConfig, layers: slice) -> jax.Array | None:  # [L]
  """Returns which of `distinct_types` each layer has; None where all have the same."""
  types = config.distinct_types
  if len(types) == 1:
    return None
  return jnp.array([types.index(each) for each in config.layer_types[layers]])


def _rematerialised(function, remat: str):
  if remat == 'none':
    return function
  policies = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # As full, but what each layer starts from waits in the host's memory.
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  }
  # Inside a scan XLA cannot merge the recomputation with the forward pass: no barrier is needed.
  return partial(jax.checkpoint, policy=policies[remat], prevent_cse=False)(function)
