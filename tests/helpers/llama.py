"""Random Llamas in Hugging Face layout, written by transformers, and the same models in ours."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.huggingface.weights import load_base, open_checkpoint
from dpo_flax.model.transformer import Transformer, run_streams
from helpers.models import make_mesh_of

ROPE_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10_000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}

SMALL = {
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}


def write(directory, *, dtype=torch.float32, max_shard_size='5GB', **changes):
  """Saves a small LlamaForCausalLM whose every weight is random; returns it."""
  config = transformers.LlamaConfig(**SMALL | changes)
  return write_model(directory, config, dtype=dtype, max_shard_size=max_shard_size)


def write_model(directory, config, *, dtype=torch.float32, max_shard_size='5GB'):
  """Saves a model of any family whose every weight, norms and biases too, is random; returns it."""
  # The attention that knows softcaps; others leave them out.
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      weight.copy_(weight + 0.3 * noise if 'norm' in name else 0.2 * noise)
  model = model.to(dtype)
  model.save_pretrained(directory, max_shard_size=max_shard_size)
  return model


def model_config(checkpoint, dtype=jnp.float32, weight_dtype=None):
  """Returns our configuration of a checkpoint."""
  run = {'dtype': dtype, 'weight_dtype': weight_dtype or dtype}
  run |= {'remat': 'none', 'attention': 'xla'}
  return from_hf_config(checkpoint.config, **run, where='config.json')


def split_abstract(checkpoint, lora, dtype, weight_dtype=None):
  """Returns (graphdef, adapters, base) of a model that has no arrays yet."""
  config = model_config(checkpoint, dtype, weight_dtype)
  model = nnx.eval_shape(lambda: Transformer(config, lora, nnx.Rngs(0, lora=1)))
  return nnx.split(model, nnx.LoRAParam, ...)


def read(directory, lora=None, *, mesh=None, dtype=jnp.float32, weight_dtype=None):
  """Loads our model; its adapters are random, B too, so that they change every output."""
  checkpoint = open_checkpoint(str(directory))
  graphdef, adapters, base = split_abstract(checkpoint, lora, dtype, weight_dtype)
  mesh = mesh or make_mesh_of()
  generator = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda leaf: jnp.asarray(0.1 * generator.standard_normal(leaf.shape, np.float32)), adapters
  )
  return nnx.merge(graphdef, adapters, load_base(checkpoint, base, mesh))


@nnx.jit
def _our_logits(model, tokens):
  """Returns our logits [B, T, V] of rows that are one sequence each."""
  rows, length = tokens.shape
  positions = jnp.tile(jnp.arange(length)[None], (rows, 1))
  batch = {'tokens': tokens, 'positions': positions}
  batch['visible_until'] = jnp.full_like(tokens, length)
  hidden, _ = run_streams(model, None, batch)
  return model.logits(hidden)


def our_logits(model, tokens):
  """Returns our logits [B, T, V] of rows that are one sequence each, as a NumPy array."""
  return np.asarray(_our_logits(model, jnp.asarray(tokens)))


def their_logits(model, tokens):
  """Returns the logits [B, T, V] of a torch model."""
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()
