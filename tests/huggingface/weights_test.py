"""Checkpoints in Hugging Face layout, read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers
from flax import nnx

from dpo_flax.huggingface import placement, weights
from dpo_flax.huggingface.presets import from_preset
from dpo_flax.huggingface.weights import open_checkpoint, save_merged
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import make_mesh
from helpers import llama
from helpers.models import BLOCK_PROJECTIONS, make_lora

# transformers' own save_pretrained calls a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')


def rewrite(directory, change):
  """Applies `change` to the tensors of a one-file checkpoint."""
  path = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def load(directory, mesh=None, dtype=jnp.float32):
  """Loads the base alone."""
  model = llama.read(directory, mesh=mesh, dtype=dtype)
  return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def assert_same_weights(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=str(name))


@pytest.mark.parametrize('place', [0, 1 / 3, 2 / 3, 1])
def test_a_fingerprint_samples_each_tensor_from_end_to_end(tmp_path, place):
  llama.write(tmp_path)
  large = np.zeros(100_000, np.float32)
  rewrite(tmp_path, lambda tensors: tensors.update(large=large))
  before = weights.fingerprint(open_checkpoint(str(tmp_path)))
  assert weights.fingerprint(open_checkpoint(str(tmp_path))) == before
  large[min(int(place * large.size) + 100, large.size - 1)] = 1
  rewrite(tmp_path, lambda tensors: tensors.update(large=large))
  assert weights.fingerprint(open_checkpoint(str(tmp_path))) != before


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_load_equals_whole_load(tmp_path, monkeypatch, dtype):
  llama.write(tmp_path, dtype=dtype, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 3
  whole = load(tmp_path)
  monkeypatch.setattr(placement, 'READ_BYTES', 1000)  # several reads per tensor
  sharded = load(tmp_path, make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2}))
  assert_same_weights(whole, sharded)
  kernel = sharded['blocks', 'mlp', 'down_proj', 'kernel'][...]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 24, 8)}


def test_loaded_weights_are_rounded_once_to_the_dtype_in_memory(tmp_path):
  model = llama.write(tmp_path)
  embedding = load(tmp_path, dtype=jnp.bfloat16)['embed_tokens', 'embedding'][...]
  rounded = model.model.embed_tokens.weight.to(torch.bfloat16).float().detach().numpy()
  assert embedding.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(embedding, np.float32), rounded)


def test_every_tensor_that_does_not_fit_is_named_in_one_error(tmp_path):
  llama.write(tmp_path)

  def change(tensors):
    del tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.norm.weight'] = np.ones(31, np.float32)
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(32, np.float32)
    tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.float64)

  rewrite(tmp_path, change)
  with pytest.raises(ValueError) as error:
    load(tmp_path)
  for fault in (
    'model.layers.1.mlp.up_proj.weight: missing',
    'model.norm.weight: shape [31], expected [32]',
    'model.layers.0.self_attn.q_proj.bias: unexpected',
    'lm_head.weight: dtype F64, expected one of BF16, F16, F32',
  ):
    assert fault in str(error.value)


def test_layers_beyond_the_config_are_refused(tmp_path):
  llama.write(tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text()) | {'num_hidden_layers': 2}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'model\.layers\.2\.mlp\.up_proj\.weight: unexpected'):
    load(tmp_path)


def test_stored_rotary_frequencies_are_harmless(tmp_path):
  llama.write(tmp_path)
  before = load(tmp_path)
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  rewrite(tmp_path, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
  assert_same_weights(before, load(tmp_path))


def test_second_copy_of_a_tied_head_must_be_equal(tmp_path):
  llama.write(tmp_path, tie_word_embeddings=True)
  before = load(tmp_path)
  embedding = before['embed_tokens', 'embedding']
  rewrite(tmp_path, lambda t: t.update({'lm_head.weight': np.array(embedding[...])}))
  assert_same_weights(before, load(tmp_path))
  rewrite(tmp_path, lambda t: t.update({'lm_head.weight': np.array(embedding[...]) + 1}))
  with pytest.raises(ValueError, match=r'lm_head\.weight differs from model\.embed_tokens'):
    load(tmp_path)


def change_index(directory, change):
  path = directory / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


@pytest.mark.parametrize(
  'file', ['../model.safetensors', '/etc/passwd', 'a/b.safetensors', '..', 'model.bin', '']
)
def test_index_may_only_list_plain_names(tmp_path, file):
  llama.write(tmp_path, max_shard_size='20KB')
  change_index(tmp_path, lambda listed: listed.update({'model.norm.weight': file}))
  with pytest.raises(ValueError, match='no plain name'):
    open_checkpoint(str(tmp_path))


def test_index_and_files_must_agree(tmp_path):
  llama.write(tmp_path, max_shard_size='20KB')

  def change(listed):
    files = sorted(set(listed.values()) - {listed['model.norm.weight']})
    listed['model.norm.weight'] = files[0]
    listed['model.nothing.weight'] = files[0]
    del listed['model.layers.0.input_layernorm.weight']

  change_index(tmp_path, change)
  with pytest.raises(ValueError) as error:
    open_checkpoint(str(tmp_path))
  assert 'model.norm.weight: in model-0000' in str(error.value)
  assert 'but the index says model-0000' in str(error.value)
  assert 'model.nothing.weight: not in model-0000' in str(error.value)
  assert 'but the index says nothing of it' in str(error.value)


def test_index_may_not_list_a_tensor_twice(tmp_path):
  llama.write(tmp_path, max_shard_size='20KB')
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(path.read_text().replace('"model.norm.weight"', '"lm_head.weight"'))
  with pytest.raises(ValueError, match=r"duplicate \['lm_head\.weight'\]"):
    open_checkpoint(str(tmp_path))


def test_incomplete_directories_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no such directory'):
    open_checkpoint(str(tmp_path / 'nothing'))
  with pytest.raises(ValueError, match=r'no config\.json'):
    open_checkpoint(str(tmp_path))
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'\.bin and \.pt files are not read'):
    open_checkpoint(str(tmp_path))
  llama.write(tmp_path, max_shard_size='20KB')
  next(tmp_path.glob('model-*')).unlink()
  with pytest.raises(ValueError, match='incomplete download'):
    open_checkpoint(str(tmp_path))


def test_hub_id_is_opened_from_the_download(tmp_path, monkeypatch):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  llama.write(tmp_path)
  asked = []

  def snapshot_download(name, **_):
    asked.append(name)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  assert open_checkpoint('some/llama').config['model_type'] == 'llama'
  assert asked == ['some/llama']


def test_unreachable_hub_id_is_explained():
  with pytest.raises(ValueError, match=r'nobody/nothing: no such directory, and the hub'):
    open_checkpoint('nobody/nothing')


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('rslora', [False, True])
def test_merged_export_equals_adapted_forward(tokens, tmp_path, tied, rslora):
  base, merged = tmp_path / 'base', tmp_path / 'merged'
  theirs = llama.write(base, tie_word_embeddings=tied)
  targets = {*BLOCK_PROJECTIONS} if tied else {*BLOCK_PROJECTIONS, 'lm_head'}
  model = llama.read(base, make_lora(targets=targets, rslora=rslora))
  save_merged(model, open_checkpoint(str(base)), merged, shard_bytes=20_000)
  assert len(list(merged.glob('model-*.safetensors'))) > 3

  ours = llama.our_logits(model, tokens)
  reloaded = transformers.LlamaForCausalLM.from_pretrained(merged)
  np.testing.assert_allclose(llama.their_logits(reloaded, tokens), ours, atol=1e-4)
  assert np.abs(ours - llama.their_logits(theirs, tokens)).max() > 0.1
  # And the other way: what we wrote, we read.
  np.testing.assert_allclose(llama.our_logits(llama.read(merged), tokens), ours, atol=1e-4)


def test_merged_export_keeps_dtypes_untouched_tensors_and_files(tmp_path):
  base, merged = tmp_path / 'base', tmp_path / 'merged'
  llama.write(base, dtype=torch.bfloat16)
  (base / 'tokenizer.model').write_bytes(b'\x00\xffany bytes')
  (base / 'notes.txt').write_text('not ours to copy')
  # Float32 in memory on 8 devices, an adapter on one projection only.
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  model = llama.read(base, make_lora(targets={'v_proj'}), mesh=mesh)
  save_merged(model, open_checkpoint(str(base)), merged)

  for name in ('tokenizer.model', 'config.json', 'generation_config.json'):
    assert (merged / name).read_bytes() == (base / name).read_bytes()
  assert not (merged / 'notes.txt').exists()
  with (
    safetensors.safe_open(base / 'model.safetensors', 'pt') as before,
    safetensors.safe_open(merged / 'model.safetensors', 'pt') as after,
  ):
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():  # noqa: SIM118  (not a dict)
      assert after.get_tensor(name).dtype == torch.bfloat16
      same = torch.equal(before.get_tensor(name), after.get_tensor(name))
      assert same == ('v_proj' not in name), name


def test_random_model_exports_without_a_checkpoint(tokens, tmp_path):
  run = {'dtype': jnp.float32, 'weight_dtype': jnp.float32, 'remat': 'none', 'attention': 'xla'}
  config = from_preset('tiny', **run)
  model = Transformer(config, None, nnx.Rngs(0))
  save_merged(model, None, tmp_path / 'model')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model')
  np.testing.assert_allclose(
    llama.our_logits(model, tokens), llama.their_logits(theirs, tokens), atol=1e-4
  )


def test_view_without_adapters_exports_the_base(tmp_path):
  llama.write(tmp_path / 'base')
  model = llama.read(tmp_path / 'base', make_lora())
  save_merged(nnx.view(model, adapted=False), None, tmp_path / 'copy')
  left, right = (
    safetensors.numpy.load_file(tmp_path / name / 'model.safetensors') for name in ('base', 'copy')
  )
  assert_same_weights(left, right)


def test_export_of_another_model_is_refused(tmp_path):
  llama.write(tmp_path / 'base')
  llama.write(tmp_path / 'other', num_hidden_layers=2)
  model = llama.read(tmp_path / 'base')
  with pytest.raises(ValueError, match=r'model\.layers\.2\.mlp\.up_proj\.weight: missing'):
    save_merged(model, open_checkpoint(str(tmp_path / 'other')), tmp_path / 'merged')


def test_host_reads_each_byte_once_for_all_its_devices(tmp_path, monkeypatch):
  llama.write(tmp_path)
  read = []
  original = weights.TensorFile.read

  def counted(tensor, start, stop):
    block = original(tensor, start, stop)
    read.append(block.nbytes)
    return block

  monkeypatch.setattr(weights.TensorFile, 'read', counted)
  loaded = load(tmp_path, make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
  assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
