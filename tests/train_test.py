"""The command itself: real processes on the example that ships with the package."""

import json
import math
import resource
import signal
import subprocess
import time

import pytest

from dpo_flax.losses import Objective
from dpo_flax.train import is_plain_dpo
from helpers.processes import ROOT, environment, short_run

STEPS = 6


def command(workdir, *overrides, devices=1):
  """Returns the arguments, environment and directory of a run of six steps."""
  fields = {'num_train_steps': STEPS, 'eval_every': 3, 'save_every': 2, 'log_every': 2}
  fields = {f'train.{name}': value for name, value in fields.items()}
  arguments = short_run(workdir, *overrides, **fields)
  return {'args': arguments, 'env': environment(devices), 'cwd': ROOT}


def run(workdir, *overrides, devices=1):
  """Runs to the end and returns the finished process."""
  return subprocess.run(
    **command(workdir, *overrides, devices=devices), capture_output=True, text=True, check=False
  )


def processor_seconds_of_children():
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def metrics(workdir, split):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line for line in map(json.loads, lines) if line['split'] == split and 'dpo_loss' in line]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  process = run(workdir)
  assert process.returncode == 0, process.stderr
  return workdir, process


def test_loss_starts_at_ln_two_and_falls(uninterrupted):
  workdir, _ = uninterrupted
  train = metrics(workdir, 'train')
  assert train[0]['dpo_loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert train[-1]['dpo_loss'] < train[0]['dpo_loss']


def test_validation_is_first_before_any_step_and_last_after_the_final_one(uninterrupted):
  workdir, _ = uninterrupted
  validation = metrics(workdir, 'validation')
  assert [line['step'] for line in validation] == [0, 3, 6]
  assert len({line['pairs'] for line in validation}) == 1
  assert validation[0]['dpo_loss'] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
  ('objective', 'columns', 'expected'),
  [
    (Objective(), (), True),
    (Objective(divergence='js', label_smoothing=0.1), ('pair_weight',), True),
    (Objective(), ('margin',), False),
    (Objective('ipo'), (), False),
    (Objective(loss_weights=[0.5]), (), False),
    (Objective(sft_weight=1.0), (), False),
    (Objective(reference_free=True), (), False),
    (Objective(wpo=True), (), False),
    (Objective(kl_penalty_weight=0.1), (), False),
  ],
)
def test_only_plain_dpo_has_to_start_at_ln_two(objective, columns, expected):
  assert is_plain_dpo(objective, columns) is expected


def test_a_run_whose_pairs_wpo_weighs_starts(tmp_path):
  """Its loss is below ln 2 although policy and reference are equal."""
  options = ('wpo=True', 'kl_penalty_weight=0.1')
  flags = [f'--config.objective.{option}' for option in options]
  process = run(tmp_path, *flags, '--config.train.num_train_steps=1')
  assert process.returncode == 0, process.stderr
  assert metrics(tmp_path, 'train')[0]['dpo_loss'] < 0.9 * math.log(2)


def test_screen_tells_steps_and_where_the_adapter_is(uninterrupted):
  workdir, process = uninterrupted
  assert 'step 6/6' in process.stdout
  assert 'held-out dpo_accuracy' in process.stdout
  assert f'wrote {workdir}/peft' in process.stdout
  assert (workdir / 'peft' / 'adapter_model.safetensors').exists()


def test_a_second_run_in_the_workdir_is_refused_while_the_first_lives(tmp_path):
  """And a lock that a killed run has left behind stops nobody."""
  first = subprocess.Popen(**command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  while not (tmp_path / 'run.json').exists():  # it has come past all that looks at the lock
    assert first.poll() is None
    time.sleep(0.01)
  first.send_signal(signal.SIGSTOP)  # or it may be done before the second has begun
  before, since = processor_seconds_of_children(), time.monotonic()
  second = run(tmp_path)
  taken, waited = processor_seconds_of_children() - before, time.monotonic() - since
  first.kill()
  first.communicate()
  assert second.returncode == 2
  assert f'{tmp_path} is in use by process {first.pid} on ' in second.stderr
  assert taken < 5 and waited < 20  # other processes may keep the machine busy
  assert run(tmp_path, '--config.train.num_train_steps=1').returncode == 0


def test_finished_run_is_not_run_again(uninterrupted):
  workdir, _ = uninterrupted
  before = (workdir / 'metrics.jsonl').read_text()
  process = run(workdir)
  assert process.returncode == 0, process.stderr
  assert (workdir / 'metrics.jsonl').read_text() == before


def test_other_config_on_resume_is_refused_by_name(uninterrupted):
  process = run(uninterrupted[0], '--config.objective.beta=0.2', '--config.lora.alpha=8')
  assert process.returncode == 2
  assert 'objective.beta: saved 0.1, now 0.2' in process.stderr
  assert 'lora.alpha: saved 16.0, now 8.0' in process.stderr


def test_other_data_on_resume_is_refused(uninterrupted, tmp_path):
  lines = (ROOT / 'dpo_flax/examples/tiny/pairs.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'pairs.jsonl').write_text(''.join(lines[:-1]))
  process = run(uninterrupted[0], f'--config.data.train={tmp_path}/pairs.jsonl')
  assert process.returncode == 2
  assert 'data: saved' in process.stderr


def test_sharded_run_equals_the_single_device_run(uninterrupted, tmp_path):
  process = run(tmp_path, '--config.mesh.fsdp=4', '--config.mesh.tensor=2', devices=8)
  assert process.returncode == 0, process.stderr
  pairs = zip(metrics(tmp_path, 'validation'), metrics(uninterrupted[0], 'validation'), strict=True)
  for sharded, single in pairs:
    for name in ('dpo_loss', 'dpo_margin_policy', 'dpo_chosen_reward'):
      assert sharded[name] == pytest.approx(single[name], abs=2e-4), name


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.lora.rank=8', 'lora.rank'),
    ('--config.lora.r=many', 'lora.r'),
    ('--config.lora.r=0', 'lora.r=0: must be between 1 and'),
    ('--config.model.preset=tiney', 'tiny'),
    ('--config.data.train=nowhere.jsonl', 'nowhere.jsonl'),
    ('--config.batch.rows=3', 'batch.rows=3'),
    ('--config.mesh.data=3', 'mesh.data=3'),
    ('--config.lora.target_modules=["q_prj"]', 'q_prj'),
  ],
)
def test_mistakes_end_in_one_message_without_a_traceback(tmp_path, override, message):
  process = run(tmp_path, override, devices=2)
  assert process.returncode == 2
  assert message in process.stderr + process.stdout
  assert 'Traceback' not in process.stderr


def test_a_bucket_without_its_client_says_what_to_install(tmp_path):
  (tmp_path / 'gcsfs.py').write_text("raise ImportError('there is no gcsfs here')")
  short = command('gs://bucket/run')
  short['env'] |= {'PYTHONPATH': str(tmp_path)}
  process = subprocess.run(**short, capture_output=True, text=True, check=False)
  assert process.returncode == 2
  assert "pip install 'dpo_flax[gcs]'" in process.stderr
  assert 'Traceback' not in process.stderr


def test_verbose_shows_the_traceback(tmp_path):
  process = run(tmp_path, '--config.data.train=nowhere.jsonl', '--verbose')
  assert process.returncode == 2
  assert 'Traceback' in process.stderr and 'nowhere.jsonl' in process.stderr.splitlines()[-1]
