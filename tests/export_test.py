"""What a run and the command write out, read back by the programs it is for, and by ourselves."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.assembly import assemble
from dpo_flax.assembly.assemble import build
from dpo_flax.assembly.run_record import read_record
from dpo_flax.checkpoints.checkpoint import Checkpoints
from dpo_flax.config.checks import validate
from dpo_flax.data import loader
from dpo_flax.examples import make_tiny
from dpo_flax.export import export
from dpo_flax.exports import exporting, verification
from dpo_flax.sharding import make_mesh, shard_batch
from dpo_flax.train import train
from dpo_flax.training.logps import pair_logps
from helpers.bases import write_example_base

EXAMPLE = pathlib.Path(make_tiny.__file__).parent / 'tiny'

# transformers announces the end of an attribute that its own code still reads.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing.*:FutureWarning')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A random Llama in Hugging Face layout, its weights in several files."""
  directory = write_example_base(tmp_path_factory.mktemp('base'), max_shard_size='200KB')
  (directory / 'tokenizer_config.json').write_text(
    json.dumps({'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True})
  )
  return directory


@pytest.fixture(scope='module')
def config(base, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = config_lib.default()
  config.workdir = str(workdir)
  config.initialize_from_hf = str(base)
  config.merged_hf_save_path = str(workdir / 'merged')
  config.model.dtype = config.model.weight_dtype = 'float32'
  config.lora.r, config.lora.alpha = 4, 8.0
  config.lora.target_modules = ['q_proj', 'v_proj', 'down_proj', 'lm_head']
  config.data.train = str(EXAMPLE / 'pairs.jsonl')
  config.batch.rows, config.batch.tokens = 8, 256
  config.train.num_train_steps = 3
  config.train.save_every = config.train.eval_every = 1
  config.train.keep = 3
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup = 0.0
  config.mesh.tensor = 2
  return config


@pytest.fixture(scope='module')
def exports(config):
  """The run's directory after training, and the log-probs of some validation pairs by our model."""
  train(config)
  workdir = pathlib.Path(config.workdir)
  run, state = _restored(config)
  pairs = run.data.validation.packed_pairs(np.arange(4))
  return workdir, pairs, _our_logps(run, state, pairs)


def _restored(config):
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run, state = build(validate(config), mesh)
    checkpoints = Checkpoints(f'{config.workdir}/checkpoints', run.identity, keep=1)
    with contextlib.closing(checkpoints):
      state, step = checkpoints.resume(state)
  assert step == config.train.num_train_steps
  return run, state


def _our_logps(run, state, pairs):
  """Policy log-probs [pairs, 2] through the packed evaluation."""
  batch = next(iter(loader.validation_batches(run.data, shard_index=0, shard_count=1)))

  @jax.jit
  def logps(state, frozen, batch):
    models = nnx.merge(run.graphdef, state.trainable, frozen)
    return pair_logps(models, batch, run.options.objective)

  with jax.set_mesh(run.mesh):
    found = logps(state, run.frozen, shard_batch(batch, run.mesh))
  by_index = {
    int(index): (float(chosen), float(rejected))
    for index, chosen, rejected in zip(
      batch['pair_index'].ravel(),
      np.asarray(found.policy_chosen).ravel(),
      np.asarray(found.policy_rejected).ravel(),
      strict=True,
    )
  }
  return np.array([by_index[pair.index] for pair in pairs])


def _their_logps(model, pairs):
  """The same, one sequence at a time, by a torch model."""

  def logp(prompt, response):
    ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
    with torch.no_grad():
      log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    scores = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return scores[len(prompt) - 1 :].sum().item()

  return np.array(
    [[logp(pair.prompt, pair.chosen), logp(pair.prompt, pair.rejected)] for pair in pairs]
  )


def test_exported_adapter_gives_our_log_probs_in_peft(base, exports):
  workdir, pairs, ours = exports
  model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
  unadapted = _their_logps(model, pairs)
  adapted = _their_logps(peft.PeftModel.from_pretrained(model, workdir / 'peft'), pairs)
  np.testing.assert_allclose(adapted, ours, atol=1e-3, rtol=1e-5)
  assert np.abs(adapted - unadapted).min() > 0.1


def test_merged_export_gives_our_log_probs_in_transformers(exports):
  workdir, pairs, ours = exports
  model = transformers.LlamaForCausalLM.from_pretrained(workdir / 'merged').eval()
  np.testing.assert_allclose(_their_logps(model, pairs), ours, atol=1e-3, rtol=1e-5)


def test_merged_export_holds_the_tokenizer_byte_for_byte(base, exports):
  for name in ('tokenizer.model', 'tokenizer_config.json', 'generation_config.json'):
    assert (exports[0] / 'merged' / name).read_bytes() == (base / name).read_bytes()


def same_files(left, right, *, but=()):
  names = {path.name for path in left.iterdir()}
  assert names == {path.name for path in right.iterdir()}
  return [n for n in sorted(names - {*but}) if (left / n).read_bytes() != (right / n).read_bytes()]


@pytest.mark.parametrize('form', ['peft', 'merged'])
def test_export_of_the_last_step_is_what_the_run_wrote(exports, tmp_path, form):
  """On another mesh: one device, where the run had eight."""
  export(str(exports[0]), str(tmp_path / 'out'), merged=form == 'merged')
  assert not same_files(exports[0] / form, tmp_path / 'out', but=['README.md'])


def test_every_kept_step_can_be_exported_without_the_data(exports, tmp_path, monkeypatch):
  monkeypatch.setattr(assemble, 'prepare_data', None)
  cards = []
  for step in (1, 2, 3):
    export(str(exports[0]), str(tmp_path / 'out'), merged=False, step=step)
    cards.append((tmp_path / 'out' / 'README.md').read_text())
    assert f'| steps | {step} of 3 |' in cards[-1]
  losses = [next(line for line in card.splitlines() if 'dpo_loss' in line) for card in cards]
  assert len(set(losses)) == 3


def test_step_that_is_not_there_is_refused_with_those_that_are(exports, tmp_path):
  with pytest.raises(ValueError, match=r'holds no step 7, but 1, 2, 3$'):
    export(str(exports[0]), str(tmp_path / 'out'), merged=False, step=7)
  with pytest.raises(ValueError, match=r'run\.json does not exist: give the workdir of a run'):
    export(str(tmp_path), str(tmp_path / 'out'), merged=False)
  assert not (tmp_path / 'out').exists()


def test_nothing_but_an_earlier_export_is_replaced(base, exports, tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  for output in (tmp_path, base, exports[0]):
    before = sorted(os.listdir(output))
    with pytest.raises(ValueError, match=r'choose another|in the same place'):
      export(str(exports[0]), str(output), merged=True)
    assert sorted(os.listdir(output)) == before


def test_output_that_cannot_be_written_stops_a_run_before_it_starts(config, base):
  config = config.copy_and_resolve_references()
  config.merged_hf_save_path = str(base)
  with pytest.raises(ValueError, match='merged export and initialize_from_hf are in the same'):
    train(config)


@pytest.mark.parametrize(
  ('peft', 'merged', 'message'),
  [
    ('{run}/checkpoints/3', None, "inside the run's checkpoints"),
    ('{run}/metrics.jsonl', None, "inside the run's metrics.jsonl"),
    ('{run}/out', '{run}/out/merged', 'merged export would be inside the export peft'),
    ('{run}/out', '{run}/out', 'inside the export'),
  ],
)
def test_exports_lie_beside_one_another_and_the_run(config, tmp_path, peft, merged, message):
  config = config.copy_and_resolve_references()
  config.workdir = str(tmp_path)
  config.peft_save_path = peft.format(run=tmp_path)
  config.merged_hf_save_path = merged and merged.format(run=tmp_path)
  with pytest.raises(ValueError, match=message):
    train(config)


def test_base_that_has_changed_is_refused(base, exports, tmp_path):
  changed = tmp_path / 'changed'
  shutil.copytree(base, changed)
  values = json.loads((changed / 'config.json').read_text())
  (changed / 'config.json').write_text(json.dumps(values | {'rms_norm_eps': 0.1}))
  workdir = tmp_path / 'run'
  workdir.mkdir()
  record = (exports[0] / 'run.json').read_text()
  (workdir / 'run.json').write_text(record.replace(str(base), str(changed)))
  (workdir / 'checkpoints').symlink_to(exports[0] / 'checkpoints')
  with pytest.raises(
    ValueError, match=r'initialize_from_hf=.* holds something else than when the run began'
  ):
    export(str(workdir), str(tmp_path / 'out'), merged=False)


@pytest.mark.parametrize(
  ('was', 'now'),
  [('"alpha": 8.0', '"alpha": 16.0'), ('"q_proj"', '"k_proj"'), ('"r": 4', '"r": 2')],
)
def test_a_record_that_is_not_of_the_run_is_refused(exports, tmp_path, was, now):
  record = (exports[0] / 'run.json').read_text()
  assert record.count(was) == 1
  (tmp_path / 'run.json').write_text(record.replace(was, now))
  (tmp_path / 'checkpoints').symlink_to(exports[0] / 'checkpoints')
  with pytest.raises(ValueError, match=r'run\.json is not that of step 3\. lora\.'):
    export(str(tmp_path), str(tmp_path / 'out'), merged=False)


@pytest.mark.parametrize('form', ['peft', 'merged'])
def test_export_that_is_not_what_was_trained_is_refused(exports, tmp_path, monkeypatch, form):
  name = {'peft': 'save_adapter', 'merged': 'save_merged'}[form]
  save = getattr(exporting, name)

  def save_another(policy, *arguments):
    model = nnx.clone(policy)
    adapter = model.blocks.mlp.down_proj.adapters.learned.lora_b
    adapter[...] = 1.5 * adapter[...]
    save(model, *arguments)

  monkeypatch.setattr(exporting, name, save_another)
  with pytest.raises(
    ValueError, match=r'out: reloaded, its log-probs differ .* explains 0\.0001 for'
  ):
    export(str(exports[0]), str(tmp_path / 'out'), merged=form == 'merged')
  assert not list(tmp_path.iterdir())


def test_model_that_fits_the_devices_once_is_exported_unchecked(exports, tmp_path, monkeypatch):
  def out_of_memory(*_, **__):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(verification, 'load_model', out_of_memory)
  export(str(exports[0]), str(tmp_path / 'out'), merged=True)
  assert 'were not compared' in (tmp_path / 'out' / 'README.md').read_text()


def test_card_tells_what_the_export_is_and_no_paths_but_the_bases(base, exports):
  workdir, _, _ = exports
  metrics = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = next(m for m in metrics if (m['step'], m['split']) == (3, 'validation'))
  for form, library in (('peft', 'peft'), ('merged', 'transformers')):
    card = huggingface_hub.ModelCard.load(workdir / form / 'README.md')
    assert card.data.base_model == str(base)
    assert card.data.library_name == library
    assert 'dpo' in card.data.tags
    assert f'| dpo_accuracy | {last["dpo_accuracy"]:.6g} |' in card.text
    assert read_record(workdir).fingerprints['data'] in card.text
    assert '4 held-out pairs differ from those of the trained model by at most' in card.text
    assert '"optimizer.learning_rate": 0.01' in card.text
    # Tests run below /tmp, the package's example does not.
    assert str(workdir) not in card.text
    assert str(EXAMPLE) not in card.text


@pytest.mark.parametrize(
  ('changes', 'form'),
  [
    (
      {
        'tuning.method': 'dora',
        'lora.target_modules': ['v_proj'],
        'lora.modules_to_save': ('lm_head',),
      },
      'peft',
    ),
    ({'tuning.method': 'full'}, 'merged'),
  ],
  ids=['dora_and_head', 'full'],
)
def test_every_way_of_tuning_is_exported_alike_by_run_and_command(config, tmp_path, changes, form):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  config.workdir, config.merged_hf_save_path = str(tmp_path / 'run'), None
  config.train.num_train_steps = 1
  if form == 'merged':
    config.lora = config_lib.default().lora
  train(config)
  if form == 'merged':
    with pytest.raises(ValueError, match='there is no adapter'):
      export(config.workdir, str(tmp_path / 'out'), merged=False)
  export(config.workdir, str(tmp_path / 'out'), merged=form == 'merged')
  written = tmp_path / 'run' / form
  assert not same_files(written, tmp_path / 'out', but=['README.md'])
  assert 'differ from those of the trained model by at most' in (written / 'README.md').read_text()


def test_record_of_a_run_is_read_as_it_was_written(config, exports):
  record = read_record(exports[0])
  ours, theirs = validate(config).to_json(), record.settings.to_json()
  assert theirs['data'].pop('tokenizer') == config.initialize_from_hf  # which was found there
  ours['data'].pop('tokenizer')
  assert theirs == ours
  assert record.num_steps == 3 and record.held_out and len(record.checks) == 4


def test_command_tells_a_mistake_in_one_message(tmp_path):
  process = subprocess.run(
    [sys.executable, '-m', 'dpo_flax.export', '--workdir=nowhere', '--output=y'],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
  )
  assert process.returncode == 2
  assert process.stderr.startswith('ValueError: nowhere/run.json does not exist')
