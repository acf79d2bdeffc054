"""Where policy and reference start: adapters of before, and the whole policy learning."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.assembly.blueprint import make_blueprint
from dpo_flax.assembly.models import count_parameters, load_models
from dpo_flax.assembly.sources import make_model_config, make_sources, reference_fingerprint
from dpo_flax.config.sections import ModelSettings
from dpo_flax.config.settings import settings_of
from dpo_flax.huggingface.peft_adapter import save_adapter
from dpo_flax.huggingface.weights import open_checkpoint, save_merged
from dpo_flax.model.kernels import Trained
from dpo_flax.sharding import make_mesh
from dpo_flax.training.state import init_train_state, split_models
from dpo_flax.training.step import jit_eval_step, jit_train_step
from helpers.batches import draw_pairs, fill_batch
from helpers.configs import set_field
from helpers.llama import our_logits, their_logits
from helpers.models import make_mesh_of
from helpers.steps import make_options

pytestmark = [
  # transformers' own save_pretrained calls a name that transformers has deprecated.
  pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning'),
  pytest.mark.filterwarnings('ignore:Setting .save_embedding_layers. to:UserWarning'),
]

SIZES = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'initializer_range': 0.2,
}


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A random Llama and adapters on it: plain LoRA, DoRA, and one with a saved head."""
  root = tmp_path_factory.mktemp('places')
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(root / 'base')
  adapters = {
    'sft': {'target_modules': ['q_proj', 'down_proj'], 'rank_pattern': {'0.mlp.down_proj': 3}},
    'dora': {'target_modules': ['q_proj', 'down_proj'], 'use_dora': True},
    'saved': {'target_modules': ['q_proj'], 'modules_to_save': ['lm_head', 'model.norm']},
  }
  for name, settings in adapters.items():
    base = transformers.LlamaForCausalLM.from_pretrained(root / 'base')
    start = {'r': 2, 'lora_alpha': 6, 'task_type': 'CAUSAL_LM', 'init_lora_weights': False}
    model = peft.get_peft_model(base, peft.LoraConfig(**start | settings))
    with torch.no_grad():
      for parameter, weight in model.named_parameters():
        if 'modules_to_save' in parameter or 'magnitude' in parameter:
          weight.mul_(0.7 + 0.6 * torch.rand(weight.shape))
    model.save_pretrained(root / name)
  return root


@pytest.fixture
def start(places, tmp_path):
  """Makes (config, sources, lora, models) of a config with fields changed."""

  def make(keeps_reference=True, mesh=None, **fields):
    config = config_lib.default()
    config.workdir = str(tmp_path)
    config.initialize_from_hf = str(places / 'base')
    config.model.dtype = config.model.weight_dtype = 'float32'
    for field, value in fields.items():
      is_place = field.endswith('adapter') or field.endswith('path')
      set_field(config, field.replace('__', '.'), str(places / value) if is_place else value)
    mesh = mesh or make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1}, jax.devices()[:2])
    blueprint = make_blueprint(settings_of(config), mesh, trains=False)
    sources, lora = blueprint.sources, blueprint.lora
    models = load_models(sources, lora, seed=0, keeps_reference=keeps_reference, mesh=mesh)
    return config, sources, lora, models

  return make


@pytest.fixture
def batch():
  pairs = draw_pairs(6)
  return fill_batch([pairs[:3], pairs[3:]])


def sums(models, batch, options):
  graphdef, trainable, frozen = split_models(models)
  mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1}, jax.devices()[:2])
  with jax.set_mesh(mesh):
    state = init_train_state(trainable, optax.sgd(0.1), mesh)
    return jax.device_get(jit_eval_step(graphdef, options)(state, frozen, batch))['means']


def trained(models, batch, options, *, steps=3):
  """Returns the models after some steps."""
  graphdef, trainable, frozen = split_models(models)
  mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1}, jax.devices()[:2])
  optimizer = optax.adamw(1e-2)
  with jax.set_mesh(mesh):
    state = init_train_state(trainable, optimizer, mesh)
    step = jit_train_step(graphdef, optimizer, options)
    for _ in range(steps):
      state, metrics = step(state, frozen, batch)
    assert bool(metrics['finite'])
    return nnx.merge(graphdef, state.trainable, frozen)


@pytest.fixture
def tokens():
  return np.random.default_rng(0).integers(0, 97, (2, 12), dtype=np.int32)


def adapted(places, name):
  base = transformers.LlamaForCausalLM.from_pretrained(places / 'base')
  return base if name is None else peft.PeftModel.from_pretrained(base, places / name)


STARTS = {
  'adapters': ({}, None, None),
  'dora': ({'tuning__method': 'dora'}, None, None),
  'saved': ({'lora__modules_to_save': ('lm_head', 'norm')}, None, None),
  'full': ({'tuning__method': 'full'}, None, None),
  'from_adapter': ({'initialize_from_adapter': 'sft'}, 'sft', None),
  'from_dora': ({'initialize_from_adapter': 'dora', 'tuning__method': 'dora'}, 'dora', None),
  'from_saved': ({'initialize_from_adapter': 'saved'}, 'saved', None),
  'on_top': ({'reference_adapter_path': 'sft'}, 'sft', 'sft'),
  'continued': (
    {'reference_adapter_path': 'sft', 'initialize_from_adapter': 'sft'},
    'sft',
    'sft',
  ),
  'from_one_against_another': (
    {'reference_adapter_path': 'dora', 'initialize_from_adapter': 'sft'},
    'sft',
    'dora',
  ),
  'merged': ({'merge_adapter_path': 'sft'}, 'sft', 'sft'),
  'merged_dora': ({'merge_adapter_path': 'dora'}, 'dora', 'dora'),
  'merged_saved_then_full': (
    {'merge_adapter_path': 'saved', 'tuning__method': 'full'},
    'saved',
    'saved',
  ),
}


@pytest.mark.parametrize(('fields', 'policy', 'reference'), STARTS.values(), ids=STARTS)
def test_policy_and_reference_start_as_pefts_models(
  start, places, tokens, fields, policy, reference
):
  _, sources, _, models = start(**fields)
  for model, name in ((models.policy, policy), (models.reference, reference)):
    expected = their_logits(adapted(places, name), tokens)
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4)
  assert sources.starts_as_reference() == (policy == reference)


@pytest.mark.parametrize('name', ['dora', 'saved', 'full', 'on_top', 'merged'])
def test_training_moves_the_policy_alone_and_its_export_is_it(
  start, batch, places, tokens, tmp_path, name
):
  """From ln 2 on; the reference keeps every bit, and PEFT or transformers load the result."""
  fields, *_ = STARTS[name]
  config, sources, lora, models = start(**fields)
  options = make_options()
  loss, pairs = sums(models, batch, options)['dpo_loss']
  assert loss / pairs == pytest.approx(math.log(2), abs=1e-6)
  # The step consumes what learns, and nothing of the reference.
  before = our_logits(models.reference, tokens)
  models = trained(models, batch, options)
  np.testing.assert_array_equal(our_logits(models.reference, tokens), before)
  ours = our_logits(models.policy, tokens)
  assert np.abs(ours - before).max() > 0.05

  save_merged(models.policy, sources.base, tmp_path / 'merged')
  merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'merged')
  np.testing.assert_allclose(their_logits(merged, tokens), ours, atol=2e-4)
  if name == 'full':
    return
  save_adapter(models.policy, lora, config.initialize_from_hf, tmp_path / 'peft')
  if name != 'merged':
    base = transformers.LlamaForCausalLM.from_pretrained(places / 'base')
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / 'peft')
    np.testing.assert_allclose(their_logits(loaded, tokens), ours, atol=2e-4)
  if name == 'on_top':
    values = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert values['r'] == 64 and values['rank_pattern']['model.layers.0.mlp.down_proj'] == 67


def test_a_policy_that_learns_whole_has_float32_weights_on_the_bases_shards(start):
  mesh = make_mesh({'data': 2, 'fsdp': 4, 'tensor': 1})
  fields = {'tuning__method': 'full', 'model__dtype': 'bfloat16', 'model__weight_dtype': 'bfloat16'}
  *_, models = start(mesh=mesh, **fields)
  policy, reference = (
    nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (models.policy, models.reference)
  )
  for (path, own), (_, frozen) in zip(policy, reference, strict=True):
    assert isinstance(own, Trained) and not isinstance(frozen, Trained)
    assert (own.dtype, frozen.dtype) == ('float32', 'bfloat16'), path
    assert own[...].sharding.is_equivalent_to(frozen[...].sharding, own.ndim), path
    np.testing.assert_array_equal(own[...].astype(jnp.bfloat16), frozen[...])


def test_without_need_of_a_reference_the_weights_are_held_once(start):
  *_, models = start(keeps_reference=False, tuning__method='full')
  assert models.reference is None
  _, trainable, frozen = split_models(models)
  assert len(jax.tree.leaves(trainable)) == 12 and not jax.tree.leaves(frozen)


def test_counts_are_the_policys_and_leave_out_ranks_of_other_layers(start, places):
  base = transformers.LlamaForCausalLM.from_pretrained(places / 'base')
  settings = peft.LoraConfig(
    r=4,
    target_modules=['q_proj', 'up_proj'],
    layers_to_transform=[1],
    use_dora=True,
    modules_to_save=['lm_head'],
  )
  theirs = peft.get_peft_model(base, settings)
  learning, total = theirs.get_nb_trainable_parameters()
  *_, models = start(
    tuning__method='dora',
    lora__r=4,
    lora__target_modules=['q_proj', 'up_proj'],
    lora__layers_to_transform=[1],
    lora__modules_to_save=('lm_head',),
  )
  # PEFT counts the head's frozen original as well.
  assert count_parameters(models.policy) == (total - 97 * 32, learning)


def test_reference_fingerprint_tells_every_reference_apart(start):
  names = ('on_top', 'from_one_against_another', 'merged', 'merged_dora')

  def fingerprint(name):
    _, sources, _, _ = start(**STARTS[name][0])
    return reference_fingerprint(sources, preset=None, seed=0)

  found = [fingerprint(name) for name in ('adapters', *names)]
  assert len(set(found)) == 5
  same = fingerprint('from_adapter')
  assert same == found[0], 'the policy says nothing of the reference'


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'initialize_from_adapter': 'dora'}, 'set tuning.method=dora'),
    ({'reference_adapter_path': 'dora'}, 'exact for plain LoRA alone'),
    ({'reference_adapter_path': 'sft', 'tuning__method': 'dora'}, 'exact for plain LoRA alone'),
    ({'reference_adapter_path': 'saved'}, 'give this one as merge_adapter_path'),
  ],
)
def test_starts_that_cannot_be_are_refused(start, fields, message):
  with pytest.raises(ValueError, match=message):
    start(**fields)


def write_tokenizer(directory, vocabulary, **fields):
  shutil.copytree(directory, directory := directory.with_name(f'{directory.name}-{len(fields)}'))
  model = {'type': 'BPE', 'vocab': vocabulary, 'merges': [['a', 'b']]}
  (directory / 'tokenizer.json').write_text(json.dumps({'model': model} | fields))
  return directory


def sources_of(base, reference):
  mesh = make_mesh_of()
  checkpoints = [open_checkpoint(str(each)) for each in (base, reference)]
  shape, other = (make_model_config(ModelSettings(), each, mesh, tokens=64) for each in checkpoints)
  return make_sources(
    shape,
    checkpoints[0],
    reference=checkpoints[1],
    reference_model=other,
    reference_model_path=str(reference),
  )


def test_a_reference_with_another_tokenizer_is_refused(places, tmp_path):
  shutil.copytree(places / 'base', tmp_path / 'base')
  vocabulary = {'a': 0, 'b': 1, 'ab': 2}
  first, second = (
    write_tokenizer(tmp_path / 'base', vocabulary, **fields)
    for fields in ({}, {'added_tokens': [{'content': '<s>', 'id': 3}]})
  )
  with pytest.raises(ValueError, match=r'another tokenizer than .*\(other added tokens\)'):
    sources_of(first, second)
  sources_of(first, first)


@pytest.mark.parametrize(('field', 'theirs'), [('vocab_size', 96), ('num_hidden_layers', 3)])
def test_a_reference_of_another_shape_is_refused(places, tmp_path, field, theirs):
  shutil.copytree(places / 'base', tmp_path / 'other')
  path = tmp_path / 'other' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: theirs}))
  with pytest.raises(ValueError, match=f"is {theirs}, the policy's is"):
    sources_of(places / 'base', tmp_path / 'other')


def test_a_checkpoint_is_sampled_once_for_all_that_asks(start, monkeypatch):
  sampled = []
  monkeypatch.setattr(
    'dpo_flax.huggingface.weights.fingerprint', lambda checkpoint: sampled.append(checkpoint) or 'x'
  )
  _, sources, _, _ = start()
  assert sources.fingerprints['initialize_from_hf'] == 'x'
  assert sources.starts_as_reference()
  assert reference_fingerprint(sources, preset=None, seed=0) == 'weights x'
  assert sampled == [sources.base]
