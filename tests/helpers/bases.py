"""Checkpoints in Hugging Face layout, written by transformers."""

import pathlib
import shutil

from dpo_flax.examples import make_tiny


def write_example_base(
  directory: pathlib.Path, *, seed=0, initializer_range=0.2, max_shard_size='5GB'
):
  """Writes a random Llama with the example's tokenizer in Hugging Face layout, by transformers."""
  # Most tests need neither, and both take seconds to import.
  import torch
  import transformers

  torch.manual_seed(seed)
  config = transformers.LlamaConfig(
    vocab_size=make_tiny.VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=initializer_range,
  )
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(directory, max_shard_size=max_shard_size)
  tokenizer = pathlib.Path(make_tiny.__file__).parent / 'tiny' / 'tokenizer.model'
  shutil.copy(tokenizer, directory)
  return directory
