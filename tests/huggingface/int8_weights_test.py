"""Checkpoints read into int8: quantized on the host, row by row of the files."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from dpo_flax.huggingface import placement
from dpo_flax.huggingface.presets import from_preset
from dpo_flax.huggingface.weights import open_checkpoint, save_merged
from dpo_flax.model.quantization import quantize, scale_path
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import make_mesh
from helpers import llama
from helpers.models import make_lora

# transformers' own save_pretrained calls a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')


def load(directory, mesh=None):
  model = llama.read(directory, mesh=mesh, weight_dtype=jnp.int8)
  return {path: value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize('tied', [False, True])
def test_loaded_weights_are_the_files_quantized_whole(tmp_path, tied):
  llama.write(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
  loaded, floats = load(tmp_path), llama.read(tmp_path)
  for path, variable in nnx.to_flat_state(nnx.state(floats, nnx.Param)):
    value = np.asarray(variable[...])
    if path[-1] == 'scale':
      np.testing.assert_array_equal(loaded[path], value)
      continue
    weights, scales = quantize(value, value.ndim - (1 if path[-1] == 'embedding' else 2))
    np.testing.assert_array_equal(loaded[path], weights)
    np.testing.assert_array_equal(loaded[scale_path(path)], scales)


def test_sharded_load_equals_whole_load(tmp_path, monkeypatch):
  """A device's part holds some inputs of a channel; its scale is that of all of them."""
  llama.write(tmp_path, dtype=torch.bfloat16, max_shard_size='20KB')
  whole = load(tmp_path)
  monkeypatch.setattr(placement, 'READ_BYTES', 1000)
  monkeypatch.setattr(placement, 'QUANTIZED_ROWS', 3)
  sharded = load(tmp_path, make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2}))
  assert whole.keys() == sharded.keys()
  for path, array in whole.items():
    np.testing.assert_array_equal(sharded[path], array, err_msg=str(path))
  path = ('blocks', 'mlp', 'gate_proj', 'kernel')
  parts = {name: sharded[name].addressable_shards[0].data for name in (path, scale_path(path))}
  assert [(part.dtype, part.shape) for part in parts.values()] == [
    (jnp.int8, (3, 8, 24)),
    (jnp.float32, (3, 24)),
  ]


def test_merged_export_adds_the_adapter_to_the_original_weights(tmp_path):
  """Not to what they were rounded to."""
  base = tmp_path / 'base'
  llama.write(base, dtype=torch.bfloat16)
  exported = {}
  for dtype in (jnp.float32, jnp.int8):
    model = llama.read(base, make_lora(), weight_dtype=dtype)
    save_merged(model, open_checkpoint(str(base)), tmp_path / 'merged')
    exported[dtype] = safetensors.numpy.load_file(tmp_path / 'merged/model.safetensors')
  for name, array in exported[jnp.float32].items():
    np.testing.assert_array_equal(exported[jnp.int8][name], array, err_msg=name)


def test_random_model_exports_what_it_computes_with(tokens, tmp_path):
  run = {'dtype': jnp.float32, 'weight_dtype': jnp.int8, 'remat': 'none', 'attention': 'xla'}
  model = Transformer(from_preset('tiny', **run), None, nnx.Rngs(0))
  save_merged(model, None, tmp_path)
  read = llama.read(tmp_path)
  np.testing.assert_allclose(
    llama.our_logits(read, tokens), llama.our_logits(model, tokens), atol=1e-4
  )
