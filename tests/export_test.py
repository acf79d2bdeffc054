"""What a run writes out, read back by the programs it is for: peft and transformers."""

import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.assembly.assemble import build
from dpo_flax.data import loader
from dpo_flax.durability.checkpoint import Checkpoints
from dpo_flax.examples import make_tiny
from dpo_flax.learner.step import pair_logps
from dpo_flax.sharding import make_mesh, shard_batch
from dpo_flax.train import train
from dpo_flax.validation import validate

EXAMPLE = pathlib.Path(make_tiny.__file__).parent / 'tiny'

# transformers announces the end of an attribute that its own code still reads.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing.*:FutureWarning')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A random Llama in Hugging Face layout, its weights in several files."""
  directory = tmp_path_factory.mktemp('base')
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=make_tiny.VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
  )
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(directory, max_shard_size='200KB')
  shutil.copy(EXAMPLE / 'tokenizer.model', directory)
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
  pairs = [run.data.validation.packed_pair(i) for i in range(4)]
  return workdir, pairs, _our_logps(run, state, pairs)


def _restored(config):
  config = validate(config)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run, state = build(config, mesh)
    checkpoints = Checkpoints(f'{config.workdir}/checkpoints', run.identity, keep=1)
    with contextlib.closing(checkpoints):
      state, step = checkpoints.resume(state)
  assert step == config.train.num_train_steps
  return run, state


def _our_logps(run, state, pairs):
  """Policy log-probs [pairs, 2] through the packed evaluation."""
  batch = next(iter(loader.validation_batches(run.data, run.config, shard_index=0, shard_count=1)))

  @jax.jit
  def logps(state, frozen, batch):
    models = nnx.merge(run.graphdef, state.trainable, frozen)
    return pair_logps(models, batch, run.options)

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
