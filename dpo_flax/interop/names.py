"""What Hugging Face checkpoints call our parameters."""

import re

# Ours -> (theirs, transposed): torch's linear layers store [out, in], our kernels are [in, out].
NAMES = {
  'embed_tokens.embedding': ('model.embed_tokens.weight', False),
  'blocks.attention_norm.scale': ('model.layers.{}.input_layernorm.weight', False),
  'blocks.attention.q_proj.kernel': ('model.layers.{}.self_attn.q_proj.weight', True),
  'blocks.attention.k_proj.kernel': ('model.layers.{}.self_attn.k_proj.weight', True),
  'blocks.attention.v_proj.kernel': ('model.layers.{}.self_attn.v_proj.weight', True),
  'blocks.attention.o_proj.kernel': ('model.layers.{}.self_attn.o_proj.weight', True),
  'blocks.mlp_norm.scale': ('model.layers.{}.post_attention_layernorm.weight', False),
  'blocks.mlp.gate_proj.kernel': ('model.layers.{}.mlp.gate_proj.weight', True),
  'blocks.mlp.up_proj.kernel': ('model.layers.{}.mlp.up_proj.weight', True),
  'blocks.mlp.down_proj.kernel': ('model.layers.{}.mlp.down_proj.weight', True),
  'final_norm.scale': ('model.norm.weight', False),
  'lm_head.kernel': ('lm_head.weight', True),
}

# Old writers stored the rotary frequencies, which follow from config.json.
HARMLESS = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
