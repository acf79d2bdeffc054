"""Adapters of a model that is not one of ours, written for PEFT."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from flax import nnx

from dpo_flax.huggingface.peft_adapter import save_adapter
from dpo_flax.model.linear import Linear
from dpo_flax.model.lora import Lora

NAMES = {'layers.0': 'model.first', 'layers.1': 'model.second', 'head': 'head'}
SIZES = {'layers.0': (6, 10), 'layers.1': (10, 7), 'head': (7, 5)}


class Ours(nnx.Module):
  """Three linear maps, of which the last has a rank of its own."""

  def __init__(self, lora, head):
    rngs = nnx.Rngs(0)
    first, second, last = SIZES.values()
    self.layers = nnx.List([Linear(*each, rngs=rngs, lora=lora) for each in (first, second)])
    self.head = Linear(*last, rngs=rngs, lora=head)
    draw = np.random.default_rng(0).standard_normal
    for linear in (*self.layers, self.head):
      variables = nnx.state(linear, nnx.LoRAParam)['adapters']['learned']
      for variable in variables.values():
        variable[...] += jnp.asarray(0.3 * draw(variable.shape), jnp.float32)
      nnx.update(linear.adapters.learned, variables)

  def __call__(self, x):
    return self.head(jnp.tanh(self.layers[1](jnp.tanh(self.layers[0](x)))))


class Theirs(torch.nn.Module):
  """The same in torch."""

  def __init__(self, ours):
    super().__init__()
    self.model = torch.nn.Module()
    maps = [torch.nn.Linear(*size, bias=False) for size in SIZES.values()]
    self.model.first, self.model.second, self.head = maps
    for theirs, linear in zip(maps, (*ours.layers, ours.head), strict=True):
      theirs.weight.data = torch.tensor(np.asarray(linear.kernel[...]).T)

  def forward(self, x):
    return self.head(torch.tanh(self.model.second(torch.tanh(self.model.first(x)))))


@pytest.mark.parametrize('changes', [{}, {'rslora': True}, {'dora': True}], ids=str)
def test_peft_computes_what_our_model_does(tmp_path, changes):
  lora = Lora(rank=3, alpha=6, **changes)
  ours = Ours(lora, Lora(rank=2, alpha=5, **changes))
  save_adapter(ours, lora, 'some/base', tmp_path, names=NAMES)

  tensors = safetensors.numpy.load_file(tmp_path / 'adapter_model.safetensors')
  adapter = ours.layers[0].adapters.learned
  prefix = 'base_model.model.model.first'
  chex.assert_trees_all_equal(tensors[f'{prefix}.lora_A.weight'], adapter.lora_a[...].T)
  chex.assert_trees_all_equal(tensors[f'{prefix}.lora_B.weight'], adapter.lora_b[...].T)
  chex.assert_shape(tensors['base_model.model.head.lora_A.weight'], (2, 7))
  chex.assert_shape(tensors['base_model.model.head.lora_B.weight'], (5, 2))

  x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
  with torch.no_grad():
    theirs = peft.PeftModel.from_pretrained(Theirs(ours), tmp_path)(torch.tensor(x)).numpy()
  chex.assert_trees_all_close(ours(x), theirs, atol=1e-5)


def test_layers_that_are_stacked_are_written_one_by_one(tmp_path):
  lora = Lora(rank=3)
  model = nnx.Dict(
    layers=jax.vmap(lambda rngs: Linear(6, 10, rngs=rngs, lora=lora))(nnx.Rngs(0).split(2))
  )
  save_adapter(model, lora, None, tmp_path, names={'layers': 'model.layers.{}.q_proj'})
  tensors = safetensors.numpy.load_file(tmp_path / 'adapter_model.safetensors')
  for layer in range(2):
    a = tensors[f'base_model.model.model.layers.{layer}.q_proj.lora_A.weight']
    chex.assert_trees_all_equal(a, model.layers.adapters.learned.lora_a[...][layer].T)
  values = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert values['target_modules'] == ['model.layers.0.q_proj', 'model.layers.1.q_proj']
  assert (values['r'], values['lora_alpha']) == (3, 3.0)


@pytest.mark.parametrize(
  ('names', 'lora', 'message'),
  [
    ({'layers.0': 'a', 'head': 'b'}, {}, r'names has .* adapters on .*layers\.1'),
    (NAMES | {'tail': 'c'}, {}, 'tail'),
    (NAMES, {'rslora': True}, r'was not made with rslora=True'),
    (NAMES, {'dora': True}, r'was not made with rslora=False, dora=True'),
  ],
)
def test_names_that_do_not_describe_the_model_are_refused(tmp_path, names, lora, message):
  model = Ours(Lora(rank=3), Lora(rank=3))
  with pytest.raises(ValueError, match=message):
    save_adapter(model, Lora(rank=3, **lora), None, tmp_path, names=names)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('head', 'two modules the same name'),
    ('', "layers.0'\\]='': expected the name"),
    ('q.weight', 'expected the name of a module'),
    ('layers.{}.q', 'this one is not'),
  ],
)
def test_a_name_that_peft_could_not_read_is_refused(tmp_path, name, message):
  lora = Lora(rank=3)
  with pytest.raises(ValueError, match=message):
    save_adapter(Ours(lora, lora), lora, 'base', tmp_path, names=NAMES | {'layers.0': name})


def test_what_learned_beside_the_adapters_of_linear_maps_is_refused(tmp_path):
  model = Ours(Lora(rank=3), Lora(rank=3))
  model.extra = nnx.LoRAParam(jnp.zeros(3))
  with pytest.raises(ValueError, match='extra: no adapter of a Linear'):
    save_adapter(model, Lora(rank=3), None, tmp_path, names=NAMES)
