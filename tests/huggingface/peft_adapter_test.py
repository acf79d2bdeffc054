"""Adapters against PEFT, both ways."""

import json

import chex
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from dpo_flax.assembly.models import load_model
from dpo_flax.huggingface.peft_adapter import load_adapter, open_adapter, save_adapter
from dpo_flax.huggingface.weights import open_checkpoint, save_merged
from dpo_flax.model.lora import TRAINABLE, LowRank, train_weights
from dpo_flax.sharding import make_mesh
from helpers import llama
from helpers.models import make_lora

pytestmark = [
  # transformers' own save_pretrained calls a name that transformers has deprecated.
  pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning'),
  # PEFT's own save_pretrained explains that it stores an adapted head's base too.
  pytest.mark.filterwarnings('ignore:Setting .save_embedding_layers. to:UserWarning'),
  # PEFT's advice on tied models, whose adapters are a case below.
  pytest.mark.filterwarnings('ignore:Model has .tie_word_embeddings=True.:UserWarning'),
]

MESH = {'data': 1, 'fsdp': 4, 'tensor': 2}
# PEFT's settings; those of tied models by themselves.
SETTINGS = {
  'all_linear': {'target_modules': 'all-linear'},
  'rslora': {'target_modules': 'all-linear', 'use_rslora': True},
  'dora': {'target_modules': 'all-linear', 'use_dora': True},
  'head_dora': {'target_modules': ['q_proj', 'lm_head'], 'use_dora': True},
  'table': {'target_modules': ['q_proj', 'embed_tokens']},
  'table_and_head_dora': {'target_modules': ['embed_tokens', 'lm_head'], 'use_dora': True},
  'layers': {'target_modules': ['q_proj', 'up_proj'], 'layers_to_transform': [0, 2]},
  'layers_dora': {'target_modules': r'.*\.1\..*(q|up)_proj', 'use_dora': True},
  'ranks': {
    'target_modules': ['q_proj', 'v_proj', 'down_proj'],
    'rank_pattern': {'down_proj': 8, 'layers.1.self_attn.q_proj': 2},
    'alpha_pattern': {'v_proj': 3, 'layers.2.self_attn.q_proj': 7},
  },
  'ranks_rslora_dora': {
    'target_modules': ['q_proj', 'down_proj', 'embed_tokens'],
    'rank_pattern': {'embed_tokens': 3, 'layers.1.mlp.down_proj': 6},
    'use_rslora': True,
    'use_dora': True,
  },
  'saved': {'target_modules': ['q_proj'], 'modules_to_save': ['norm', 'lm_head']},
}
TIED = {
  'shared_and_saved': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['embed_tokens'],
    'ensure_weight_tying': True,
  },
  'tied_table': {'target_modules': ['q_proj', 'embed_tokens']},
  'tied_head': {'target_modules': ['q_proj', 'lm_head']},
  'tied_head_dora': {'target_modules': ['q_proj', 'lm_head'], 'use_dora': True},
  'tied_table_and_head_dora': {'target_modules': ['embed_tokens', 'lm_head'], 'use_dora': True},
  'shared': {'target_modules': ['q_proj', 'embed_tokens'], 'ensure_weight_tying': True},
  'shared_by_the_head': {'target_modules': ['q_proj', 'lm_head'], 'ensure_weight_tying': True},
}
CASES = {name: (False, settings) for name, settings in SETTINGS.items()}
CASES |= {name: (True, settings) for name, settings in TIED.items()}


def write_adapted(directory, tied, settings):
  """Writes a random base and a random PEFT adapter; returns the torch model with both."""
  base = llama.write(directory / 'base', tie_word_embeddings=tied)
  # init_lora_weights=False: B is random.
  start = {'r': 4, 'lora_alpha': 10, 'task_type': 'CAUSAL_LM', 'init_lora_weights': False}
  torch.manual_seed(0)
  model = peft.get_peft_model(base, peft.LoraConfig(**start | settings))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_embedding' in name or 'modules_to_save' in name:
        weight.add_(0.1 * torch.randn(weight.shape))
      if 'magnitude' in name:
        weight.mul_(0.5 + torch.rand(weight.shape))
  model.save_pretrained(directory / 'adapter')
  return model.eval()


def load_into(base, adapter, mesh):
  """Returns our model of `base` with the adapter in it."""
  checkpoint = open_checkpoint(str(base))
  config = llama.model_config(checkpoint)
  model = load_model(config, adapter.lora, checkpoint=checkpoint, mesh=mesh, seed=0)
  train_weights(model, adapter.lora.saved)
  nnx.update(model, load_adapter(adapter, nnx.state(model, TRAINABLE), mesh))
  return model


def open_written(directory):
  config = llama.model_config(open_checkpoint(str(directory / 'base')))
  return open_adapter(directory / 'adapter', config)


@pytest.mark.parametrize(('tied', 'settings'), CASES.values(), ids=CASES)
def test_adapters_of_peft_and_ours_are_one(tokens, tmp_path, tied, settings):
  """PEFT's adapter gives its logits here; saved by us, alone or merged, it gives them again."""
  theirs = write_adapted(tmp_path, tied, settings)
  expected = llama.their_logits(theirs, tokens)
  adapter = open_written(tmp_path)
  model = load_into(tmp_path / 'base', adapter, make_mesh(MESH))
  ours = llama.our_logits(model, tokens)
  np.testing.assert_allclose(ours, expected, atol=2e-4)
  plain = llama.our_logits(nnx.view(model, adapted=False), tokens)
  assert np.abs(ours - plain).max() > 0.1

  save_adapter(model, adapter.lora, str(tmp_path / 'base'), tmp_path / 'again')
  # Warnings are errors here: a tensor that PEFT misses would end the test.
  base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'base')
  again = peft.PeftModel.from_pretrained(base, tmp_path / 'again').eval()
  np.testing.assert_allclose(llama.their_logits(again, tokens), ours, atol=2e-4)

  checkpoint, merged = open_checkpoint(str(tmp_path / 'base')), tmp_path / 'merged'
  if tied and adapter.lora.targets & {'embed_tokens', 'lm_head'} and not adapter.lora.tied:
    with pytest.raises(ValueError, match='tied to the token table'):
      save_merged(model, checkpoint, merged)
  else:
    save_merged(model, checkpoint, merged)
    merged = transformers.LlamaForCausalLM.from_pretrained(merged).eval()
    np.testing.assert_allclose(llama.their_logits(merged, tokens), ours, atol=2e-4)


@pytest.mark.parametrize('name', ['all_linear', 'layers_dora', 'ranks', 'shared'])
def test_adapter_survives_the_round_trip_bit_for_bit(tmp_path, name):
  write_adapted(tmp_path, *CASES[name])
  adapter = open_written(tmp_path)
  model = load_into(tmp_path / 'base', adapter, make_mesh(MESH))
  (tmp_path / 'adapter').rename(tmp_path / 'first')
  save_adapter(model, adapter.lora, 'some/base', tmp_path / 'adapter')
  again = open_written(tmp_path)
  assert again.lora == adapter.lora
  values = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  assert values['base_model_name_or_path'] == 'some/base'
  other = load_into(tmp_path / 'base', again, make_mesh(MESH))
  before, after = (nnx.state(each, TRAINABLE) for each in (model, other))
  chex.assert_trees_all_equal(before, after)


def test_ranks_that_a_layer_lacks_are_zeros_and_in_no_file(tmp_path):
  write_adapted(tmp_path, *CASES['ranks'])
  adapter = open_written(tmp_path)
  assert adapter.lora.modules['q_proj'] == LowRank((4, 2, 4), (10.0, 10.0, 7.0))
  model = load_into(tmp_path / 'base', adapter, make_mesh(MESH))
  q_proj = model.blocks.attention.q_proj.adapters.learned
  assert q_proj.lora_a.shape == (3, 32, 4)
  assert not np.any(q_proj.lora_a[...][1, :, 2:]) and not np.any(q_proj.lora_b[...][1, 2:])
  assert q_proj.size == (4 + 2 + 4) * (32 + 32)
  save_adapter(model, adapter.lora, None, tmp_path / 'again')
  saved = safetensors.numpy.load_file(tmp_path / 'again' / 'adapter_model.safetensors')
  assert saved['base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'].shape == (2, 32)


def test_adapters_that_are_not_the_models_are_refused(tmp_path):
  llama.write(tmp_path / 'base')
  model = llama.read(tmp_path / 'base', make_lora(targets={'q_proj'}))
  with pytest.raises(ValueError, match='the model has adapters on'):
    save_adapter(model, make_lora(targets={'q_proj', 'lm_head'}), None, tmp_path / 'adapter')
  assert not (tmp_path / 'adapter').exists()


def test_every_tensor_that_does_not_fit_is_named_in_one_error(tmp_path):
  llama.write(tmp_path / 'base')
  lora = make_lora()
  save_adapter(llama.read(tmp_path / 'base', lora), lora, None, tmp_path / 'adapter')
  path = tmp_path / 'adapter' / 'adapter_model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  stem = 'base_model.model.model.layers.{}.self_attn.{}.weight'
  tensors['wrong.prefix.lora_B.weight'] = tensors.pop(stem.format(0, 'q_proj.lora_B'))
  tensors[stem.format(1, 'k_proj.lora_B')] = np.ones((16, 3), np.float32)
  tensors[stem.format(2, 'v_proj.lora_A')] = np.ones((5, 32), np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError) as error:
    load_into(tmp_path / 'base', open_written(tmp_path), make_mesh(MESH))
  assert f'{stem.format(0, "q_proj.lora_B")}: missing' in str(error.value)
  assert 'wrong.prefix.lora_B.weight: unexpected' in str(error.value)
  assert f'{stem.format(1, "k_proj.lora_B")}: shape [16, 3], expected [16, 4]' in str(error.value)
  assert f'{stem.format(2, "v_proj.lora_A")}: shape [5, 32], expected [4, 32]' in str(error.value)


def test_a_head_that_does_not_share_the_tables_adapter_is_refused(tmp_path):
  write_adapted(tmp_path, *CASES['shared'])
  path = tmp_path / 'adapter' / 'adapter_model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['base_model.model.lm_head.lora_A.weight'] += 1
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=r'ensure_weight_tying, but .*lm_head\.lora_A'):
    load_into(tmp_path / 'base', open_written(tmp_path), make_mesh(MESH))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('peft_type', 'IA3'),
    ('bias', 'all'),
    ('lora_bias', True),
    ('fan_in_fan_out', True),
    ('trainable_token_indices', [1, 2]),
    ('target_parameters', ['mlp.experts']),
    ('rank_pattern', {'x_proj': 8}),
    ('alpha_pattern', ['q_proj']),
    ('layer_replication', [[0, 1], [0, 2]]),
    ('init_lora_weights', 'pissa'),
    ('r', 0),
    ('lora_alpha', None),
    ('lora_dropout', 1.0),
  ],
)
def test_adapters_of_another_kind_are_refused_by_name(tmp_path, field, value):
  llama.write(tmp_path / 'base')
  lora = make_lora()
  save_adapter(llama.read(tmp_path / 'base', lora), lora, None, tmp_path / 'adapter')
  path = tmp_path / 'adapter' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match=rf'adapter_config\.json.*{field}'):
    open_written(tmp_path)


def test_directory_without_adapter_is_refused(tmp_path):
  llama.write(tmp_path / 'base')
  (tmp_path / 'adapter').mkdir()
  with pytest.raises(ValueError, match=r'no adapter_config\.json'):
    open_written(tmp_path)
