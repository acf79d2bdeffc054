"""What Hugging Face checkpoints call the parameters of a Transformer."""

import functools
import re

import jax
from flax import nnx

from dpo_flax.huggingface.families import FAMILIES
from dpo_flax.huggingface.placement import Table
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.quantization import ChannelScale
from dpo_flax.model.transformer import Transformer

# Parameter path -> (checkpoint name, transposed): torch's linear layers store [out, in], kernels
# here are [in, out].
NAMES: Table = {
  'embed_tokens.embedding': ('model.embed_tokens.weight', False),
  'blocks.attention.q_proj.kernel': ('model.layers.{}.self_attn.q_proj.weight', True),
  'blocks.attention.k_proj.kernel': ('model.layers.{}.self_attn.k_proj.weight', True),
  'blocks.attention.v_proj.kernel': ('model.layers.{}.self_attn.v_proj.weight', True),
  'blocks.attention.qkv_proj.kernel': ('model.layers.{}.self_attn.qkv_proj.weight', True),
  'blocks.attention.o_proj.kernel': ('model.layers.{}.self_attn.o_proj.weight', True),
  'blocks.attention.q_proj.bias': ('model.layers.{}.self_attn.q_proj.bias', False),
  'blocks.attention.k_proj.bias': ('model.layers.{}.self_attn.k_proj.bias', False),
  'blocks.attention.v_proj.bias': ('model.layers.{}.self_attn.v_proj.bias', False),
  'blocks.attention.o_proj.bias': ('model.layers.{}.self_attn.o_proj.bias', False),
  'blocks.attention.q_norm.scale': ('model.layers.{}.self_attn.q_norm.weight', False),
  'blocks.attention.k_norm.scale': ('model.layers.{}.self_attn.k_norm.weight', False),
  'blocks.mlp.gate_proj.kernel': ('model.layers.{}.mlp.gate_proj.weight', True),
  'blocks.mlp.up_proj.kernel': ('model.layers.{}.mlp.up_proj.weight', True),
  'blocks.mlp.gate_up_proj.kernel': ('model.layers.{}.mlp.gate_up_proj.weight', True),
  'blocks.mlp.down_proj.kernel': ('model.layers.{}.mlp.down_proj.weight', True),
  'blocks.mlp.gate_proj.bias': ('model.layers.{}.mlp.gate_proj.bias', False),
  'blocks.mlp.up_proj.bias': ('model.layers.{}.mlp.up_proj.bias', False),
  'blocks.mlp.down_proj.bias': ('model.layers.{}.mlp.down_proj.bias', False),
  'final_norm.scale': ('model.norm.weight', False),
  'lm_head.kernel': ('lm_head.weight', True),
  'blocks.attention_norm.scale': ('model.layers.{}.input_layernorm.weight', False),
}

# The other norms of a block. `post_attention_layernorm` follows attention only where outputs are
# normed: elsewhere it is what the MLP begins with.
_INPUT_NORMS: Table = {
  'blocks.mlp_norm.scale': ('model.layers.{}.post_attention_layernorm.weight', False),
}
_OUTPUT_NORMS: Table = {
  'blocks.attention_output_norm.scale': ('model.layers.{}.post_attention_layernorm.weight', False),
  'blocks.mlp_norm.scale': ('model.layers.{}.pre_feedforward_layernorm.weight', False),
  'blocks.mlp_output_norm.scale': ('model.layers.{}.post_feedforward_layernorm.weight', False),
}

# Old writers stored the rotary frequencies, which follow from config.json.
HARMLESS = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')


@functools.cache
def names_of(config: ModelConfig) -> Table:
  """Returns the names of the parameters that a model of this architecture has."""
  weights = nnx.All(nnx.Param, nnx.Not(ChannelScale))
  state = jax.eval_shape(lambda: nnx.state(Transformer(config, None, nnx.Rngs(0)), weights))
  present = {'.'.join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
  table = name_table(config.model_type)
  return {name: entry for name, entry in table.items() if name in present}


def modules_of(config: ModelConfig) -> dict[str, str]:
  """Returns the checkpoint name of each module that has parameters, by its path."""
  return {
    parameter.rpartition('.')[0]: hf_name.rpartition('.')[0]
    for parameter, (hf_name, _) in names_of(config).items()
  }


def name_table(model_type: str) -> Table:
  """Returns the names of all parameters that a model of this type may have."""
  return {**NAMES, **(_OUTPUT_NORMS if FAMILIES[model_type].output_norms else _INPUT_NORMS)}
