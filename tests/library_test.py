"""What `import dpo_flax` gives, and the README's examples as they are written."""

import inspect
import pathlib
import re
import subprocess
import sys
import tempfile

import chex
import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import dpo_flax as dpo
from dpo_flax.data.batches.pack import PackedPair
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
      found.setdefault('ours', found['policy'])  # the last example has a model of its own
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
  ('arguments', 'message'),
  [
    ({'lora': dpo.Lora(target_modules=('no_such',))}, 'no_such'),
    ({'attention': 'flash'}, "model.attention='flash': expected one of auto, xla, pallas"),
    ({'remat': 'some'}, 'model.remat'),
    ({'dtype': 'float8'}, 'model.dtype'),
    ({'weight_dtype': np.float16}, "model.weight_dtype='float16'"),
    ({'seed': -1}, 'seed=-1'),
    ({'lora': 16}, 'lora=16: expected Lora'),
  ],
)
def test_a_model_is_not_loaded_with_wrong_arguments(directory, arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dpo.load_model(directory / 'hf_llama', **arguments)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'layout': 'tree'}, "data.layout='tree': expected one of shared, separate"),
    ({'too_long': 'cut'}, "data.too_long='cut'"),
    ({'bad_record': 'drop'}, "data.bad_record='drop'"),
    ({'format': 'alpaca'}, "data.format='alpaca'"),
    ({'rows': 0}, 'batch.rows=0: must be between 1'),
    ({'rows': '8'}, "batch.rows='8': expected a value of type int"),
    ({'tokens': 0}, 'batch.tokens=0'),
    ({'files': {'pairs.jsonl': -1.0}}, 'the weight -1.0'),
    ({'files': 'nowhere.jsonl'}, 'nowhere.jsonl does not exist'),
  ],
)
def test_pairs_are_not_loaded_with_wrong_arguments(directory, monkeypatch, arguments, message):
  monkeypatch.chdir(directory)
  monkeypatch.setattr(tempfile, 'tempdir', str(directory / 'temporary'))
  (directory / 'temporary').mkdir(exist_ok=True)
  right = {'files': 'pairs.jsonl', 'tokenizer': 'hf_llama', 'tokens': 512, 'rows': 8}
  with pytest.raises(ValueError, match=re.escape(message)):
    dpo.load_pairs(**right | arguments)
  assert not list((directory / 'temporary').iterdir())


@pytest.mark.parametrize(
  ('pair', 'message'),
  [
    (([], [2], [3]), 'prompt is empty'),
    (([1], [], [3]), 'chosen is empty'),
    (([1], [2], [-3]), 'rejected is [-3]: expected token ids'),
    (([1.5], [2], [3]), 'prompt is [1.5]'),
    (('a', 'b', 'c'), 'prompt is a'),
    (([[1]], [2], [3]), 'prompt is [[1]]'),
    (([1], [2**40], [3]), 'chosen is [1099511627776]'),
    (([1], [2]), 'pair 0 has 2 parts'),
    (([1] * 9, [2] * 9, [3]), 'tokens=12: pair 0 takes'),
    (
      PackedPair(7, np.array([], np.int32), np.array([1]), np.array([2])),
      'pair 7: prompt is empty',
    ),
  ],
)
def test_what_is_no_pair_of_token_ids_is_not_packed(pair, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dpo.pack([pair], tokens=12)


@pytest.mark.parametrize('arguments', [{'layout': 'x'}, {'tokens': 0}, {'multiple': 0}])
def test_rows_of_no_such_form_are_not_packed(arguments):
  (name,) = arguments
  with pytest.raises(ValueError, match=name):
    dpo.pack([([1], [2], [3])], **{'tokens': 12} | arguments)


def test_ids_that_the_model_has_not_are_refused(ran):
  policy, optimizer = ran['ours'], optax.sgd(1.0)
  batch = dpo.pack([([1], [512], [3])], tokens=12)
  with pytest.raises(ValueError, match='the token id 512, and the model has 512'):
    dpo.score_pairs(policy, [([1], [512], [3])])
  with pytest.raises(ValueError, match='the token id 512'):
    dpo.pair_logps(policy, batch)
  step = dpo.make_train_step((policy, dpo.reference_of(policy)), optimizer, 'ipo')
  with pytest.raises(ValueError, match='the token id 512'):
    step(dpo.init_state(policy, optimizer), batch)


def test_a_model_of_ones_own_has_no_layout_here(ran, tmp_path):
  for write in (dpo.save_merged, dpo.load_adapter):
    with pytest.raises(ValueError, match='Tiny is no model of load_model'):
      write(ran['policy'], tmp_path)


def test_weights_that_learn_need_a_second_model_as_reference(directory):
  lora = dpo.Lora(rank=2, modules_to_save=['lm_head'])
  with pytest.raises(ValueError, match='pass a second model as the reference'):
    dpo.reference_of(dpo.load_model(directory / 'hf_llama', lora))


def test_microbatches_divide_the_rows(ran):
  policy, optimizer = ran['ours'], optax.sgd(1.0)
  models = (policy, dpo.reference_of(policy))
  step = dpo.make_train_step(models, optimizer, 'ipo', microbatches=3)
  batch = dpo.pack([([1], [2], [3])], tokens=12, multiple=8)
  with pytest.raises(ValueError, match='microbatches=3 does not divide the 8 rows'):
    step(dpo.init_state(models, optimizer), batch)


def test_steps_are_not_negative(directory):
  pairs = dpo.load_pairs(directory / 'pairs.jsonl', directory / 'hf_llama', tokens=512, rows=8)
  for arguments in ({'steps': -1}, {'start_step': -1}):
    with pytest.raises(ValueError, match='neither can be negative'):
      next(pairs.batches(**arguments))


def test_no_pairs_have_no_scores(ran):
  assert dpo.score_pairs(ran['ours'], []).shape == (0, 2)


def test_a_mesh_has_no_other_axes():
  assert dict(dpo.make_mesh({'fsdp': -1}).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}
  with pytest.raises(ValueError, match='data, fsdp, tensor, not expert'):
    dpo.make_mesh({'expert': 2})


def test_a_model_without_adapters_neither_learns_nor_is_saved(directory, tmp_path):
  model = dpo.load_model(directory / 'hf_llama')
  with pytest.raises(ValueError, match='no adapters'):
    dpo.save_adapter(model, tmp_path / 'adapter')
  with pytest.raises(ValueError, match='nothing learns'):
    dpo.init_state(model, optax.sgd(1.0))
  with pytest.raises(ValueError, match='nothing learns'):
    dpo.make_train_step(model, optax.sgd(1.0), 'simpo')
