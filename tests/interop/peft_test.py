"""Adapters against PEFT, both ways."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from dpo_flax.interop.hf_weights import open_checkpoint
from dpo_flax.interop.peft import load_adapter, open_adapter, save_adapter
from dpo_flax.sharding import make_mesh

pytestmark = [
  # transformers' own save_pretrained calls a name that transformers has deprecated.
  pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning'),
  # PEFT's own save_pretrained explains that it stores an adapted head's base too.
  pytest.mark.filterwarnings('ignore:Setting .save_embedding_layers. to:UserWarning'),
]

MESH = {'data': 1, 'fsdp': 4, 'tensor': 2}
TARGETS = {
  'all_linear': None,
  'attention_inputs': {'q_proj', 'v_proj'},
  'head_too': {'q_proj', 'down_proj', 'lm_head'},
}


def load_into(llama, base, adapter, mesh):
  """Returns our model of `base` with the adapter in it."""
  model = llama.read(base, adapter.lora, mesh=mesh)
  _, abstract, _ = llama.split_abstract(open_checkpoint(str(base)), adapter.lora, np.float32)
  nnx.update(model, load_adapter(adapter, abstract, mesh))
  return model


@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_saved_adapter_gives_our_logits_in_peft(llama, tokens, tmp_path, targets, rslora):
  base = tmp_path / 'base'
  plain = llama.their_logits(llama.write(base), tokens)
  lora = llama.lora(targets or llama.linear, rslora=rslora)
  model = llama.read(base, lora, mesh=make_mesh(MESH))
  save_adapter(model, lora, str(base), tmp_path / 'adapter')

  # Warnings are errors here: a tensor that PEFT misses would end the test.
  theirs = peft.PeftModel.from_pretrained(
    transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / 'adapter'
  )
  ours = llama.our_logits(model, tokens)
  np.testing.assert_allclose(llama.their_logits(theirs, tokens), ours, atol=1e-4)
  assert np.abs(ours - plain).max() > 0.1


@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_adapter_saved_by_peft_gives_its_logits_here(llama, tokens, tmp_path, targets, rslora):
  base = tmp_path / 'base'
  settings = peft.LoraConfig(
    r=4,
    lora_alpha=10,
    use_rslora=rslora,
    target_modules=sorted(targets or llama.linear),
    task_type='CAUSAL_LM',
    init_lora_weights=False,  # B is random
  )
  torch.manual_seed(0)
  theirs = peft.get_peft_model(llama.write(base), settings)
  theirs.save_pretrained(tmp_path / 'adapter')

  adapter = open_adapter(tmp_path / 'adapter')
  assert adapter.lora == llama.lora(targets or llama.linear, rslora=rslora)
  model = load_into(llama, base, adapter, make_mesh(MESH))
  ours, expected = llama.our_logits(model, tokens), llama.their_logits(theirs, tokens)
  assert np.abs(ours - llama.our_logits(nnx.view(model, adapted=False), tokens)).max() > 0.1
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_adapter_survives_the_round_trip_bit_for_bit(llama, tmp_path):
  llama.write(tmp_path / 'base')
  lora = llama.lora()
  model = llama.read(tmp_path / 'base', lora)
  save_adapter(model, lora, 'some/base', tmp_path / 'adapter')
  adapter = open_adapter(tmp_path / 'adapter')
  assert (adapter.lora, adapter.base_name) == (lora, 'some/base')
  again = load_into(llama, tmp_path / 'base', adapter, make_mesh(MESH))
  before, after = (nnx.state(each, nnx.LoRAParam) for each in (model, again))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_targets_that_have_no_adapter_are_refused(llama, tmp_path):
  llama.write(tmp_path / 'base', tie_word_embeddings=True)
  lora = llama.lora({'q_proj', 'lm_head'})
  model = llama.read(tmp_path / 'base', lora)
  with pytest.raises(ValueError, match='tied to the embedding'):
    save_adapter(model, lora, None, tmp_path / 'adapter')
  assert not (tmp_path / 'adapter').exists()


def test_every_tensor_that_does_not_fit_is_named_in_one_error(llama, tmp_path):
  llama.write(tmp_path / 'base')
  lora = llama.lora()
  save_adapter(llama.read(tmp_path / 'base', lora), lora, None, tmp_path / 'adapter')
  path = tmp_path / 'adapter' / 'adapter_model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  stem = 'base_model.model.model.layers.{}.self_attn.{}.weight'
  tensors['wrong.prefix.lora_A.weight'] = tensors.pop(stem.format(0, 'q_proj.lora_A'))
  tensors[stem.format(1, 'k_proj.lora_B')] = np.ones((16, 3), np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError) as error:
    load_into(llama, tmp_path / 'base', open_adapter(tmp_path / 'adapter'), make_mesh(MESH))
  assert f'{stem.format(0, "q_proj.lora_A")}: missing' in str(error.value)
  assert f'{stem.format(1, "k_proj.lora_B")}: shape [16, 3], expected [16, 4]' in str(error.value)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('peft_type', 'IA3'),
    ('use_dora', True),
    ('bias', 'all'),
    ('fan_in_fan_out', True),
    ('modules_to_save', ['lm_head']),
    ('rank_pattern', {'q_proj': 8}),
    ('alpha_pattern', {'q_proj': 8}),
    ('layer_replication', [[0, 1], [0, 2]]),
    ('init_lora_weights', 'pissa'),
    ('r', 0),
    ('lora_alpha', None),
    ('lora_dropout', 1.0),
  ],
)
def test_adapters_of_another_kind_are_refused_by_name(llama, tmp_path, field, value):
  llama.write(tmp_path / 'base')
  lora = llama.lora()
  save_adapter(llama.read(tmp_path / 'base', lora), lora, None, tmp_path / 'adapter')
  path = tmp_path / 'adapter' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match=rf'adapter_config\.json.*{field}'):
    open_adapter(tmp_path / 'adapter')


def test_directory_without_adapter_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no adapter_config\.json'):
    open_adapter(tmp_path)
