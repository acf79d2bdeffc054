"""Whether chosen responses became less likely, which a growing margin hides: measured and said."""

import importlib.util
import json
import pathlib
import shutil

import pytest

from dpo_flax import train
from dpo_flax.training.reporter import Reporter, displacement_warning

TINY = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'


def make_config(workdir):
  """Four steps with a loss that pushes both responses down."""
  spec = importlib.util.spec_from_file_location('tiny', TINY)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.workdir = str(workdir)
  config.objective.loss = 'apo_down'
  config.batch.tokens = 128
  config.train.num_epochs = 0.0
  config.train.num_train_steps = 4
  config.train.eval_every = config.train.save_every = 2
  return config


def validations(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line for line in map(json.loads, lines) if line['split'] == 'validation']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('displacement')
  return workdir, train.train(make_config(workdir))


def test_validation_tells_the_change_since_step_zero(trained):
  workdir, returned = trained
  first, *later = validations(workdir)
  assert first['chosen_logps_change'] == first['rejected_logps_change'] == 0.0
  for line in later:
    for side in ('chosen_logps', 'rejected_logps'):
      assert line[f'{side}_change'] == pytest.approx(line[side] - first[side], abs=1e-6)
  assert later[-1]['rejected_logps_change'] < later[-1]['chosen_logps_change'] < 0
  assert returned['chosen_logps_change'] == later[-1]['chosen_logps_change']


def test_a_resumed_run_still_measures_from_step_zero(trained, tmp_path, capsys):
  """And says at the end that the likelihood of chosen has fallen."""
  workdir = tmp_path / 'resumed'
  shutil.copytree(trained[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  returned = train.train(make_config(workdir))
  assert validations(workdir) == validations(trained[0])
  assert returned == trained[1]
  said = capsys.readouterr().out
  assert 'resuming after step 2' in said
  assert f'chosen_logps fell by {-returned["chosen_logps_change"]:.2f} nats per response' in said


def test_without_the_first_validation_no_change_is_claimed(trained, tmp_path):
  workdir = tmp_path / 'resumed'
  shutil.copytree(trained[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  (workdir / 'metrics.jsonl').unlink()
  returned = train.train(make_config(workdir))
  assert 'chosen_logps' in returned and 'chosen_logps_change' not in returned


def test_warning_names_the_fall_its_ends_and_what_rejected_did():
  held_out = {'chosen_logps': -48.5, 'chosen_logps_change': -3.25, 'rejected_logps_change': -9.0}
  warning = displacement_warning(held_out)
  assert 'chosen_logps fell by 3.25 nats per response, -45.25 to -48.50' in warning
  assert 'rejected_logps changed by -9.00' in warning


@pytest.mark.parametrize('change', (0.0, 2.5, -0.004))
def test_chosen_that_did_not_fall_is_no_news(change):
  held_out = {
    'chosen_logps': -40.0,
    'chosen_logps_change': change,
    'rejected_logps_change': -9.0,
  }
  assert displacement_warning(held_out) is None


def test_a_run_without_validation_has_nothing_to_warn_of():
  assert displacement_warning({}) is None


def test_reporter_finds_what_was_written_before_a_resume(tmp_path):
  for start in (0, 5):
    reporter = Reporter(tmp_path, start_step=start, num_steps=9)
    if start == 0:
      reporter.write(0, 'train', {'parameter_count': 7})
      reporter.write(0, 'validation', {'chosen_logps': -2.0})
    found = reporter.written(0, 'validation')
    assert found == {'step': 0, 'split': 'validation', 'chosen_logps': -2.0}
    assert reporter.written(1, 'validation') == {}
    reporter.close()


def test_silent_process_has_written_nothing(tmp_path):
  reporter = Reporter(tmp_path, start_step=0, num_steps=9, is_writer=False)
  assert reporter.written(0, 'validation') == {}
