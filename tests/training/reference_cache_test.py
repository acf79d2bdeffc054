"""Laws of the cached reference: the losses of the live one, never a stale or damaged file."""

import contextlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dpo_flax import config as config_lib
from dpo_flax.assembly import assemble
from dpo_flax.config.checks import validate
from dpo_flax.data import loader
from dpo_flax.examples import make_tiny
from dpo_flax.sharding import make_mesh, row_shard, shard_batch
from dpo_flax.training import reference_cache
from dpo_flax.training.step import jit_eval_step, jit_train_step

EXAMPLE = pathlib.Path(make_tiny.__file__).parent / 'tiny'


@pytest.fixture
def config(tmp_path):
  config = config_lib.default()
  config.workdir = str(tmp_path)
  config.model.preset = 'tiny'
  config.model.dtype = config.model.weight_dtype = 'float32'
  config.lora.r = 4
  lines = (EXAMPLE / 'pairs.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'pairs.jsonl').write_text(''.join(lines[:60]))
  config.data.train = str(tmp_path / 'pairs.jsonl')
  config.data.tokenizer = str(EXAMPLE / 'tokenizer.model')
  config.batch.rows, config.batch.tokens = 8, 256
  config.train.num_train_steps = 4
  config.optimizer.learning_rate = 1e-3
  config.mesh.tensor = 2
  return config


def build(config, source):
  settings = validate(config).replace({'reference.source': source})
  mesh = make_mesh(settings.mesh.sizes())
  with jax.set_mesh(mesh):
    return assemble.build(settings, mesh)


def losses(run, state):
  """The training losses of a few steps, and the validation loss after them."""
  index, count = row_shard(run.mesh)
  where = {'shard_index': index, 'shard_count': count}
  step = jit_train_step(run.graphdef, run.optimizer, run.options)
  evaluate = jit_eval_step(run.graphdef, run.options)
  found = []
  with jax.set_mesh(run.mesh):
    with contextlib.closing(loader.train_batches(run.data, start_step=0, **where)) as batches:
      for _ in range(run.num_steps):
        state, metrics = step(state, run.frozen, shard_batch(next(batches), run.mesh))
        found.append(metrics['sums']['means']['dpo_loss'])
    for batch in loader.validation_batches(run.data, **where):
      found.append(evaluate(state, run.frozen, shard_batch(batch, run.mesh))['means']['dpo_loss'])
  return np.array(found)


def files(config):
  return sorted(pathlib.Path(config.workdir, 'token_cache').glob('reference-*.float32'))


def test_losses_equal_those_of_the_live_reference(config):
  np.testing.assert_allclose(
    losses(*build(config, 'cache')), losses(*build(config, 'live')), rtol=1e-5, atol=1e-5
  )


def test_training_runs_no_reference_stream(config):
  flops = {}
  for source in ('cache', 'live'):
    run, state = build(config, source)
    batches = loader.train_batches(run.data, start_step=0, shard_index=0, shard_count=1)
    with contextlib.closing(batches), jax.set_mesh(run.mesh):
      step = jit_train_step(run.graphdef, run.optimizer, run.options)
      lowered = step.lower(state, run.frozen, shard_batch(next(batches), run.mesh))
    flops[source] = lowered.compile().cost_analysis()['flops']
  assert flops['cache'] < 0.85 * flops['live']


def test_a_second_run_reads_what_the_first_has_written(config, monkeypatch):
  first, _ = build(config, 'cache')
  assert len(files(config)) == 2
  monkeypatch.setattr('dpo_flax.training.reference_cache.score_side', None)
  second, _ = build(config, 'cache')
  for side in ('train', 'validation'):
    np.testing.assert_array_equal(
      getattr(first.data, side).reference_logps, getattr(second.data, side).reference_logps
    )


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty'])
def test_a_damaged_file_is_noticed_and_computed_again(config, damage):
  first, _ = build(config, 'cache')
  for path in files(config):
    data = bytearray(path.read_bytes())
    if damage == 'flip':
      data[len(data) // 3] ^= 1
    path.write_bytes({'flip': data, 'cut': data[: len(data) // 2], 'empty': b''}[damage])
  second, _ = build(config, 'cache')
  np.testing.assert_allclose(
    first.data.train.reference_logps, second.data.train.reference_logps, rtol=1e-6
  )


@pytest.mark.parametrize(
  'change',
  [{'seed': 1}, {'model.dtype': 'bfloat16'}, {'data.too_long': 'drop', 'batch.tokens': 96}],
)
def test_another_model_dtype_or_length_is_another_file(config, change):
  build(config, 'cache')
  before = files(config)
  config.update_from_flattened_dict(change)
  build(config, 'cache')
  assert set(files(config)) > set(before)


def test_what_the_cache_cannot_give_is_refused(config):
  config.objective.kl_penalty_weight = 0.1
  with pytest.raises(ValueError, match=r'reference\.source'):
    build(config, 'cache')


def test_two_runs_that_write_at_once_do_not_meet(tmp_path, monkeypatch):
  path, names = epath.Path(tmp_path / 'cache' / 'reference.float32'), set()
  sync = os.fsync
  monkeypatch.setattr(os, 'fsync', lambda n: (sync(n), names.update(os.listdir(path.parent))))
  for value in (1.0, 2.0):
    reference_cache._write(path, np.full((3, 2), value, np.float32))
  assert len(names - {path.name}) == 2
  assert os.listdir(path.parent) == [path.name]
  np.testing.assert_array_equal(reference_cache._read(path, 3), np.full((3, 2), 2.0))


def test_log_probs_that_are_not_finite_are_refused_with_their_place(config, monkeypatch):
  monkeypatch.setattr(
    'dpo_flax.training.scoring.score_batch',
    lambda model, batch, chunk: jnp.full((*batch['pair_mask'].shape, 2), jnp.nan),
  )
  with pytest.raises(ValueError, match=r'pairs\.jsonl:\d+: the log-probs .* not finite'):
    build(config, 'cache')
  assert not files(config)
