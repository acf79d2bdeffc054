"""What `import dpo_flax` gives, and the README's examples as they are written."""

import inspect
import pathlib
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import dpo_flax as dpo
from helpers.bases import write_example_base

# Of peft within transformers.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')

ROOT = pathlib.Path(__file__).parent.parent
PAIRS = ROOT / 'dpo_flax/examples/tiny/pairs.jsonl'
# One example goes on where the one before it ended.
EXAMPLES = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.S | re.M)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A directory with a base and pairs under the names that the README gives them."""
  directory = tmp_path_factory.mktemp('library')
  write_example_base(directory / 'hf_llama')
  lines = PAIRS.read_text().splitlines(keepends=True)
  (directory / 'pairs.jsonl').write_text(''.join(lines[:64]))
  return directory


@pytest.fixture(scope='module')
def ran(directory):
  """What the README's examples have defined once they have run."""
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(directory)
    for example in EXAMPLES:
      exec(compile(example, 'README.md', 'exec'), found)
  return found


def test_there_are_three_examples_and_the_loop_has_at_most_twelve_lines():
  assert len(EXAMPLES) == 3
  assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 12


def test_the_examples_run_and_learn(ran):
  assert int(ran['state'].step) == 1
  assert dpo.summarize(ran['metrics']['sums'])['dpo_loss'] == pytest.approx(25, rel=1e-5)  # ipo


def test_the_loop_writes_an_adapter_that_peft_loads(ran, directory):
  base = transformers.AutoModelForCausalLM.from_pretrained(directory / 'hf_llama')
  tokens = torch.arange(3, 13)[None]
  with torch.no_grad():
    before = base(tokens).logits.numpy()
    after = peft.PeftModel.from_pretrained(base, directory / 'adapter')(tokens).logits.numpy()
  assert np.abs(after - before).max() > 1e-3


def test_the_foreign_model_writes_its_adapter_under_the_given_names(ran, directory):
  tensors = load_file(directory / 'tiny_adapter' / 'adapter_model.safetensors')
  assert {name: array.shape for name, array in tensors.items()} == {
    'base_model.model.attention.qkv.lora_A.weight': (4, 16),
    'base_model.model.attention.qkv.lora_B.weight': (48, 4),
  }


def test_importing_takes_no_jax_and_no_flags():
  code = (
    'import sys; import dpo_flax; from absl import flags; '
    'print("jax" in sys.modules, len([f for f in flags.FLAGS if "config" in f]))'
  )
  printed = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  assert printed.split() == ['False', '0']


@pytest.mark.parametrize('name', [name for name in dpo.__all__ if name != 'losses'])
def test_every_public_name_is_documented(name):
  public = getattr(dpo, name)
  assert inspect.getdoc(public)
  assert name in dir(dpo)


def test_a_name_that_does_not_exist_is_an_attribute_error():
  with pytest.raises(AttributeError, match='no_such_name'):
    dpo.no_such_name  # noqa: B018


def test_a_saved_adapter_is_loaded_on_the_same_base_and_scores_alike(ran, directory):
  pairs = list(
    dpo.load_pairs(str(directory / 'pairs.jsonl'), str(directory / 'hf_llama'), tokens=512, rows=8)
  )[:5]
  mesh = dpo.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  base = dpo.load_model(str(directory / 'hf_llama'), mesh=mesh)
  policy = dpo.load_adapter(base, directory / 'adapter')
  models = dpo.Models(policy, dpo.reference_of(policy))
  batch = dpo.pack(pairs, tokens=512)
  logps = dpo.pair_logps(models, batch)
  real = batch['pair_mask'] > 0
  order = np.argsort(batch['pair_index'][real])
  packed = np.stack([np.asarray(array)[real][order] for array in logps.policy], axis=1)
  np.testing.assert_allclose(dpo.score_pairs(policy, pairs), packed, rtol=1e-5)
  assert np.abs(packed - dpo.score_pairs(base, pairs)).max() > 1e-3


def test_a_merged_checkpoint_is_what_transformers_computes(ran, directory):
  mesh = dpo.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  base = str(directory / 'hf_llama')
  policy = dpo.load_adapter(dpo.load_model(base, mesh=mesh), directory / 'adapter')
  dpo.save_merged(policy, directory / 'merged', base=base)
  merged = transformers.AutoModelForCausalLM.from_pretrained(directory / 'merged')
  adapted = peft.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(base), directory / 'adapter'
  )
  tokens = torch.arange(3, 13)[None]
  with torch.no_grad():
    np.testing.assert_allclose(
      merged(tokens).logits.numpy(), adapted(tokens).logits.numpy(), atol=1e-4
    )


def test_checkpoints_hold_the_state_of_a_loop_of_ones_own(directory, tmp_path):
  mesh = dpo.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  policy = dpo.load_model(str(directory / 'hf_llama'), dpo.Lora(rank=2), mesh=mesh)
  models = dpo.Models(policy, dpo.reference_of(policy))
  optimizer = optax.adamw(1e-3)
  step, state = dpo.make_train_step(models, optimizer, 'sigmoid'), dpo.init_state(models, optimizer)
  batches = dpo.load_pairs(
    str(directory / 'pairs.jsonl'), str(directory / 'hf_llama'), tokens=512, rows=2
  ).batches()
  state, _ = step(state, next(batches))
  checkpoints = dpo.Checkpoints(tmp_path / 'checkpoints', keep=1)
  checkpoints.save(state, 1)
  checkpoints.finish(1)
  restored, number = checkpoints.resume(dpo.init_state(models, optimizer))
  checkpoints.close()
  assert number == 1
  chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize(
  ('lora', 'message'), [(dpo.Lora(target_modules=('no_such',)), 'no_such'), (None, None)]
)
def test_what_a_model_lacks_is_named(directory, tmp_path, lora, message):
  mesh = dpo.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  if message:
    with pytest.raises(ValueError, match=message):
      dpo.load_model(str(directory / 'hf_llama'), lora, mesh=mesh)
    return
  model = dpo.load_model(str(directory / 'hf_llama'), mesh=mesh)
  with pytest.raises(ValueError, match='no adapters'):
    dpo.save_adapter(model, tmp_path / 'adapter')
  with pytest.raises(ValueError, match='nothing learns'):
    dpo.init_state(model, optax.sgd(1.0))
  assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
