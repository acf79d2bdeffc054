"""Laws of checkpoints: what was saved comes back bit for bit, or a reason why not."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx

from dpo_flax.checkpoints import checkpoint, steps
from dpo_flax.checkpoints.checkpoint import Checkpoints
from dpo_flax.checkpoints.identity import saved_identity
from dpo_flax.config.identity import RunIdentity
from dpo_flax.training.state import RewardMean, init_train_state, split_models
from helpers import checkpoint_arrays
from helpers.models import make_lora, make_mesh_of, make_model_config, make_models

IDENTITY = RunIdentity({'lora.r': 4, 'batch.rows': 8}, {'data': 'ab12'})
OPTIMIZER = optax.adamw(1e-3)


def make_state(seed, *, fsdp=4, tensor=2, **lora):
  """Makes a TrainState on a mesh; its every array is random, from a seed."""
  mesh = make_mesh_of(fsdp=fsdp, tensor=tensor)
  config = make_model_config(vocab_size=96)
  models = make_models(config, make_lora(targets=frozenset(['q_proj']), **lora), mesh=mesh)
  state = init_train_state(split_models(models)[1], OPTIMIZER, mesh)
  random = np.random.default_rng(seed)

  def draw(leaf):
    if leaf.dtype == jnp.int32:
      return jax.device_put(np.int32(random.integers(100)), leaf.sharding)
    value = random.standard_normal(leaf.shape).astype(np.float32)
    return jax.device_put(value, leaf.sharding)

  return jax.tree.map(draw, state)


@pytest.fixture
def open_checkpoints(tmp_path):
  """Opens the checkpoints of one directory, and closes what is left open."""
  opened = []

  def open_them(keep=2, identity=IDENTITY, **options):
    opened.append(Checkpoints(tmp_path / 'checkpoints', identity, keep=keep, **options))
    return opened[-1]

  yield open_them
  for checkpoints in opened:
    checkpoints.close()


def assert_same_bits(ours, expected):
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert our.dtype == their.dtype
    np.testing.assert_array_equal(
      np.asarray(our).view(np.uint32), np.asarray(their).view(np.uint32)
    )


@pytest.mark.parametrize('shape', [(4, 2), (2, 4), (1, 1)], ids=str)
def test_restored_state_has_the_saved_bits_on_the_new_mesh(open_checkpoints, shape):
  saved = make_state(0)
  # Numbers that arithmetic would tidy up: minus zero and the smallest.
  odd = jnp.array([-0.0, 1e-45])
  saved = dataclasses.replace(saved, rewards=RewardMean(odd[0], odd[1]))
  checkpoints = open_checkpoints()
  checkpoints.save(saved, 7)
  checkpoints.close()
  target = make_state(1, fsdp=shape[0], tensor=shape[1])
  again = open_checkpoints()
  assert again.latest() == 7
  restored = again.restore(target, 7)
  assert_same_bits(restored, saved)
  for leaf, place in zip(
    jax.tree.leaves(restored.trainable), jax.tree.leaves(target.trainable), strict=True
  ):
    assert leaf.sharding == place.sharding


def test_a_state_that_is_trained_on_while_it_is_written_is_saved_as_it_was(open_checkpoints):
  """The step after a save consumes the very buffers that were handed over."""
  state = make_state(0)
  before = jax.tree.map(np.array, state)
  checkpoints = open_checkpoints()
  checkpoints.save(state, 1)
  consume = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 1, state), donate_argnums=0)
  consume(state)
  checkpoints.close()
  assert_same_bits(open_checkpoints().restore(make_state(1), 1), before)


def test_a_fresh_directory_has_no_step(open_checkpoints):
  assert open_checkpoints().latest() is None


@pytest.mark.parametrize('keep', [1, 2])
def test_the_newest_are_kept_and_nothing_else(open_checkpoints, tmp_path, keep):
  checkpoints = open_checkpoints(keep)
  for step in (1, 5, 20, 100):
    checkpoints.save(make_state(step), step)
  checkpoints.close()
  directory = tmp_path / 'checkpoints'
  kept = ['1', '5', '20', '100'][-keep:]
  assert sorted(path.name for path in directory.iterdir()) == sorted(kept)
  again = open_checkpoints(keep)
  assert again.latest() == 100
  for step in map(int, kept):
    assert_same_bits(again.restore(make_state(0), step), make_state(step))


def test_a_step_takes_its_name_only_when_all_of_it_is_on_disk(
  open_checkpoints, tmp_path, monkeypatch
):
  synced, folder = [], tmp_path / 'checkpoints'
  local = type(epath.Path(folder))
  fsync, rename = os.fsync, local.rename

  def note_sync(descriptor):
    name = os.readlink(f'/proc/self/fd/{descriptor}')
    synced.append(pathlib.Path(name.removesuffix('.tmp')))  # which a file has before its own
    fsync(descriptor)

  def note_rename(path, target):
    if path.name == '1.unfinished':
      files = {pathlib.Path(found) for found in pathlib.Path(path).rglob('*')}
      assert files | {pathlib.Path(path)} <= set(synced)
      synced.append('renamed')
    return rename(path, target)

  monkeypatch.setattr(os, 'fsync', note_sync)
  monkeypatch.setattr(local, 'rename', note_rename)
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(1), 1)
  checkpoints.close()
  assert folder in synced[synced.index('renamed') :]  # the name, too, is on disk


def test_a_kill_while_an_old_step_is_deleted_leaves_none_that_is_broken(
  open_checkpoints, tmp_path, monkeypatch
):
  checkpoints = open_checkpoints(keep=3)
  for step in (1, 2):
    checkpoints.save(make_state(step), step)
  checkpoints.close()
  folder = epath.Path(tmp_path / 'checkpoints')

  def die(path):
    raise KeyboardInterrupt

  monkeypatch.setattr(type(folder), 'rmtree', die)
  with pytest.raises(KeyboardInterrupt):
    steps.keep_newest(folder, 1)
  assert steps.finished(folder) == [2]


def test_a_step_that_was_not_finished_is_not_seen_and_goes_away(open_checkpoints, tmp_path):
  """A kill leaves a directory that is half written, or half deleted."""
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 3)
  checkpoints.close()
  folder = tmp_path / 'checkpoints'
  for name in ('4.unfinished', '1.deleted'):
    shutil.copytree(folder / '3', folder / name)
  again = open_checkpoints()
  assert again.latest() == 3
  assert again.resume(make_state(1))[1] == 3
  assert [path.name for path in folder.iterdir()] == ['3']


def test_a_damaged_step_is_set_aside_for_the_one_before(open_checkpoints, tmp_path, caplog):
  checkpoints = open_checkpoints()
  for step in (1, 2):
    checkpoints.save(make_state(step), step)
  checkpoints.close()
  with (tmp_path / 'checkpoints' / '2' / 'step.json').open('r+b') as file:
    file.write(b'[')
  state, step = open_checkpoints().resume(make_state(0))
  assert step == 1
  assert_same_bits(state, make_state(1))
  assert (tmp_path / 'checkpoints' / 'quarantine' / '2' / 'step.json').exists()
  assert 'damaged (step.json has changed)' in caplog.text


def test_a_pipe_in_a_step_is_a_fault_and_not_waited_for(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 1)
  checkpoints.close()
  os.mkfifo(tmp_path / 'checkpoints' / '1' / 'pipe')
  assert open_checkpoints().resume(make_state(0))[1] == 0
  assert (tmp_path / 'checkpoints' / 'quarantine' / '1').exists()


@pytest.mark.parametrize('how', ['renamed', 'never one'])
def test_a_whole_directory_that_is_not_that_step_is_set_aside(
  open_checkpoints, tmp_path, caplog, how
):
  checkpoints = open_checkpoints()
  for step in (1, 2):
    checkpoints.save(make_state(step), step)
    checkpoints.finish(step)
  checkpoints.close()
  place = tmp_path / 'checkpoints'
  if how == 'renamed':
    (place / '2').rename(place / '7')
  else:
    (place / '7').mkdir()
    (place / '7' / 'SHA256SUMS').touch()
  state, step = open_checkpoints().resume(make_state(0))
  assert step == (1 if how == 'renamed' else 2)
  assert_same_bits(state, make_state(step))
  assert ('it was saved as step 2' if how == 'renamed' else 'step.json') in caplog.text


def test_any_machine_can_check_a_step(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 1)
  checkpoints.close()
  check = ['sha256sum', '--check', '--strict', 'SHA256SUMS']
  place = tmp_path / 'checkpoints' / '1'
  assert subprocess.run(check, cwd=place, capture_output=True, check=False).returncode == 0
  names = {line[66:] for line in (place / 'SHA256SUMS').read_text().splitlines()}
  files = {str(path.relative_to(place)) for path in place.rglob('*') if path.is_file()}
  assert names == files - {'SHA256SUMS'}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_saved(open_checkpoints, value):
  state = make_state(0)
  moments = jax.tree.leaves(state.opt_state)
  spoiled = moments[1].at[(0,) * moments[1].ndim].set(value)
  leaves = [spoiled if leaf is moments[1] else leaf for leaf in jax.tree.leaves(state)]
  checkpoints = open_checkpoints()
  with pytest.raises(FloatingPointError, match=r'step 5 is not saved: .* in opt_state'):
    checkpoints.save(jax.tree.unflatten(jax.tree.structure(state), leaves), 5)
  assert checkpoints.latest() is None


@pytest.mark.parametrize('moment', ['at once', 'while writing'])
def test_a_failed_save_is_told_with_its_step_and_the_next_one_works(
  open_checkpoints, monkeypatch, moment
):
  errors = []
  checkpoints = open_checkpoints(on_error=errors.append)
  checkpoints.save(make_state(1), 1)
  checkpoints.check(wait=True)
  with monkeypatch.context() as broken:
    if moment == 'at once':
      usage = types.SimpleNamespace(free=1_000_000)
      broken.setattr(checkpoint.shutil, 'disk_usage', lambda path: usage)
      reason = '1.0 MB are free, 1.1 MB are needed'
    else:
      reason = 'No space left'
      broken.setattr(checkpoint.steps, 'commit', raise_no_space)
    checkpoints.save(make_state(2), 2)
    checkpoints.check(wait=True)
  (error,) = errors
  assert 'step 2 could not be saved' in str(error) and reason in str(error)
  assert 'the newest one is step 1' in str(error)
  assert checkpoints.latest() == 1
  assert not list(checkpoints.directory.glob('*.unfinished'))
  checkpoints.save(make_state(3), 3)
  checkpoints.close()
  assert open_checkpoints().resume(make_state(0))[1] == 3
  assert len(errors) == 1


def raise_no_space(directory, step):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_the_base_is_not_saved(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  state = make_state(0)
  checkpoints.save(state, 1)
  checkpoints.close()
  metadata = json.loads((tmp_path / 'checkpoints' / '1' / 'state' / '_METADATA').read_text())
  names = [
    '.'.join(key['key'] for key in entry['key_metadata'])
    for entry in metadata['tree_metadata'].values()
  ]
  assert len(names) == len(jax.tree.leaves(state))
  assert not any('kernel' in name or 'embedding' in name for name in names)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('shape', r'lora_a\S* is float32\[2, 32, 4\], this run needs float32\[2, 32, 8\]'),
    ('dtype', r'lora_a\S* is float32\[2, 32, 4\], this run needs bfloat16\[2, 32, 4\]'),
    ('missing', r'extra\S* is nothing, this run needs float32\[3\]'),
  ],
)
def test_arrays_of_another_shape_or_dtype_are_refused(open_checkpoints, change, message):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 1)
  checkpoints.close()
  target = make_state(0, r=8 if change == 'shape' else 4)
  if change == 'dtype':
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target.trainable)
    target = dataclasses.replace(target, trainable=trainable)
  if change == 'missing':
    extra = nnx.State({'extra': nnx.LoRAParam(jnp.zeros(3))})
    target = dataclasses.replace(target, trainable=nnx.merge_state(target.trainable, extra))
  with pytest.raises(ValueError, match=message):
    open_checkpoints().restore(target, 1)


def test_a_run_resumes_after_its_newest_step(open_checkpoints):
  """Its identity comes back as it was saved: lists, None and numbers are not differences."""
  config = {'lora.alpha': 0.1, 'lora.target_modules': ['q', 'k'], 'objective.gamma': None}
  identity = RunIdentity(config, {'data.train': 'ab12', 'base': 'cd'})
  checkpoints = open_checkpoints(identity=identity)
  start = make_state(0)
  state, step = checkpoints.resume(start)
  assert state is start and step == 0
  for step in (1, 2):
    checkpoints.save(make_state(step), step)
  checkpoints.close()
  again = open_checkpoints(identity=identity)
  assert saved_identity(again.directory, 2, RunIdentity) == identity
  state, step = again.resume(start)
  assert step == 2
  assert_same_bits(state, make_state(2))


def test_a_run_of_another_config_or_data_does_not_resume(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 3)
  checkpoints.close()
  other = RunIdentity(IDENTITY.config | {'lora.r': 8}, {'data': 'cd34'})
  with pytest.raises(ValueError) as error:
    open_checkpoints(identity=other).resume(make_state(1))
  for part in (
    f'{tmp_path}/checkpoints holds step 3',
    'lora.r: saved 4, now 8',
    "data: saved 'ab12', now 'cd34'",
    'another workdir',
  ):
    assert part in str(error.value)
  assert 'batch.rows' not in str(error.value)


def test_other_data_are_refused_unless_allowed_aloud(open_checkpoints, caplog):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 3)
  checkpoints.close()
  other = RunIdentity(IDENTITY.config | {'batch.rows': 4}, {'data': 'cd34'})
  again = open_checkpoints(identity=other)
  with pytest.raises(ValueError, match=r'batch\.rows: saved 8, now 4[^$]*allow_data_change'):
    again.resume(make_state(1))
  state, step = again.resume(make_state(1), allow_data_change=True)
  assert step == 3
  assert_same_bits(state, make_state(0))
  assert "data: saved 'ab12', now 'cd34'" in caplog.text
  assert 'batch.rows: saved 8, now 4' in caplog.text


def test_allowing_other_data_allows_nothing_else(open_checkpoints):
  checkpoints = open_checkpoints()
  checkpoints.save(make_state(0), 3)
  checkpoints.close()
  other = RunIdentity(IDENTITY.config | {'lora.r': 8}, {'data': 'cd34'})
  with pytest.raises(ValueError, match=r'lora\.r: saved 4, now 8') as error:
    open_checkpoints(identity=other).resume(make_state(1), allow_data_change=True)
  assert 'cd34' not in str(error.value)


def test_every_difference_is_named_with_both_values():
  saved = RunIdentity({'lora.r': 4, 'seed': 0, 'old': 1}, {'data.train': 'ab', 'base': 'x'})
  now = RunIdentity({'lora.r': 8, 'seed': 0, 'new': 2}, {'data.train': 'cd', 'base': 'x'})
  assert [str(difference) for difference in saved.differences(now)] == [
    'lora.r: saved 4, now 8',
    'new: saved None, now 2',
    'old: saved 1, now None',
    "data.train: saved 'ab', now 'cd'",
  ]
  assert saved.differences(saved) == []


SAVED = pathlib.Path(__file__).parents[1] / 'saved_run' / 'workdir' / 'checkpoints'


def test_a_step_that_version_0_1_0_saved_is_read_and_checked(tmp_path, caplog):
  """It holds run.json where step.json is now."""
  folder = tmp_path / 'checkpoints'
  shutil.copytree(SAVED, folder)
  record = json.loads((folder / '4' / 'run.json').read_text())
  saved = checkpoint_arrays.read(folder / '4')
  identity = RunIdentity(record['config'], record['fingerprints'])
  assert saved_identity(epath.Path(folder), 4, RunIdentity) == identity
  assert steps.find_intact(epath.Path(folder), 4) == 4
  checkpoints = Checkpoints(folder, identity, keep=2)
  start = {name: jnp.zeros_like(array) for name, array in saved.items()}
  state, step = checkpoints.resume(start)
  assert step == 4
  assert_same_bits(state, saved)
  (folder / '4' / 'run.json').write_text('{"step": 4}')
  assert checkpoints.resume(start) == (start, 0)
  checkpoints.close()
  assert 'damaged (run.json has changed)' in caplog.text


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    ({'a.b': jnp.ones(2), 'a': {'b': jnp.ones(3)}}, 'one name'),
    ({'step': 1}, 'step is a int'),
    ({'key': jax.random.key(0)}, 'key is a key'),
  ],
)
def test_what_would_not_come_back_is_not_saved(tmp_path, state, message):
  checkpoints = Checkpoints(tmp_path, keep=2)
  with contextlib.closing(checkpoints), pytest.raises(ValueError, match=message):
    checkpoints.save(state, 1)


def test_a_step_before_the_newest_is_not_saved(tmp_path):
  with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
    checkpoints.save({'weight': jnp.ones(2)}, 4)
    checkpoints.finish(4)
    with pytest.raises(ValueError, match='holds step 4'):
      checkpoints.save({'weight': jnp.ones(2)}, 2)


def test_any_tree_of_arrays_is_saved_and_needs_no_identity(tmp_path):
  tree = {'a': [jnp.arange(3), jnp.ones((2, 2), jnp.bfloat16)], 'b': (jnp.float32(5),)}
  zeros = jax.tree.map(jnp.zeros_like, tree)
  with contextlib.closing(Checkpoints(tmp_path / 'checkpoints', keep=1)) as checkpoints:
    checkpoints.save(tree, 3)
    checkpoints.finish(3)
    state, step = checkpoints.resume(zeros)
    assert step == 3
    chex.assert_trees_all_equal(state, tree)
    part = checkpoint.restore(checkpoints.directory, 3, zeros['a'], part='a')
    chex.assert_trees_all_equal(part, tree['a'])
    with pytest.raises(ValueError, match=r'a\.0 is int32\[3\], this run needs float32\[3\]'):
      checkpoint.restore(checkpoints.directory, 3, [jnp.zeros(3)], part='a')
  others = Checkpoints(tmp_path / 'checkpoints', IDENTITY, keep=1)
  with contextlib.closing(others), pytest.raises(ValueError, match='does not say of which run'):
    others.resume(zeros)
