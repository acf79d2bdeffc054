"""Two processes on loopback are one run: real commands, two CPU devices each."""

import json
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.processes import ROOT, environment, short_run

STEPS = 4


pytestmark = pytest.mark.slow


def start(workdir, *overrides, devices=2):
  """Starts one process of a run of four steps."""
  fields = {
    'num_train_steps': STEPS,
    'eval_every': 2,
    'save_every': 2,
    'keep': 3,  # an export saves its step as well
    'log_every': 1,
  }
  fields = {f'train.{name}': value for name, value in fields.items()}
  return start_process(short_run(workdir, *overrides, **fields), devices=devices)


def start_process(command, *, devices=2):
  """Starts a command on so many CPU devices."""
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, env=environment(devices), cwd=ROOT, **pipes)


def finish(process):
  """Waits for a process and returns its (exit code, output, errors)."""
  try:
    output, errors = process.communicate(timeout=300)
  finally:
    process.kill()
  return process.returncode, output, errors


def lonely_process(*flags):
  """Starts the one of two processes to which the other never comes."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  alone = (f'--coordinator=127.0.0.1:{port}', '--num_processes=2', *flags)
  return start_process([sys.executable, '-m', 'dpo_flax.train', '--config=configs/tiny.py', *alone])


@pytest.mark.parametrize('index', [0, 1])
def test_a_process_to_which_no_other_comes_says_so_and_ends(index):
  process = lonely_process(f'--process_id={index}', '--join_timeout=1')
  code, _, errors = finish(process)
  assert code == 69
  assert f'process {1 - index} of 2 has not come within 1 s' in errors
  assert 'Traceback' not in errors and 'stack trace' not in errors


def test_a_process_that_waits_for_others_can_be_interrupted():
  process = lonely_process('--process_id=0')
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=10)
  process.send_signal(signal.SIGINT)
  code, _, _ = finish(process)
  assert code == -signal.SIGINT


def run_both(start_one):
  """Starts both processes by their flags; returns how each finished."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  shared = (f'--coordinator=127.0.0.1:{port}', '--num_processes=2')
  processes = [start_one((*shared, f'--process_id={i}')) for i in (0, 1)]
  return [finish(process) for process in processes]


def run_on_two(workdir, *overrides):
  """Runs the command on both processes to its end; returns what each said."""
  finished = run_both(lambda flags: start(workdir, *overrides, *flags))
  for code, _, errors in finished:
    assert code == 0, errors
  return [output for _, output, _ in finished]


@pytest.mark.parametrize(
  ('override', 'named'),
  [
    ('--config.optimizer.learning_rate=0.004', 'optimizer.learning_rate=0.004'),
    ('--config.lora.r=4', 'lora.r=4'),
    ('--config.data.train={}/other.jsonl', 'data='),
    ('--config.workdir={}/disk_of_its_own', 'lock in workdir=None'),
  ],
)
def test_processes_that_are_not_of_one_run_refuse_to_train(tmp_path, override, named):
  records = (ROOT / 'dpo_flax/examples/tiny/pairs.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'other.jsonl').write_text(''.join(records[:-1]))

  def start_one(flags):
    more = (override.format(tmp_path),) if '--process_id=1' in flags else ()
    return start(tmp_path / 'run', *more, *flags)

  for code, _, errors in run_both(start_one):
    assert code == 2
    assert f'process 1 of 2 has {named}' in errors
    assert 'Traceback' not in errors


def metrics(workdir):
  """(step, split) -> the metrics reported there, each once."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  found = {(line['step'], line['split']): line for line in lines if 'dpo_loss' in line}
  assert len(found) == len([line for line in lines if 'dpo_loss' in line])
  return found


def assert_same_metrics(ours, expected):
  assert ours.keys() == expected.keys()
  for place, line in expected.items():
    for name, value in line.items():
      if isinstance(value, float) and not name.endswith('_per_second'):
        # Sums over hundreds of nats are rounded in another order.
        np.testing.assert_allclose(ours[place][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


EXPORTS = ('--config.merged_hf_save_path={}/merged', '--config.hf_save_steps=3')


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """A run of one process with as many devices."""
  workdir = tmp_path_factory.mktemp('alone')
  flags = [flag.format(workdir) for flag in EXPORTS]
  code, _, errors = finish(start(workdir, *flags, devices=4))
  assert code == 0, errors
  return workdir


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('together')
  return workdir, run_on_two(workdir, *[flag.format(workdir) for flag in EXPORTS])


def test_two_processes_report_what_one_does(alone, together):
  assert_same_metrics(metrics(together[0]), metrics(alone))


def test_only_the_first_process_speaks(together):
  _, (first, second) = together
  assert f'step {STEPS}/{STEPS}' in first and 'wrote' in first
  assert not [line for line in second.splitlines() if not line.startswith('[Gloo]')]


def test_exports_are_written_once_and_are_those_of_one_process(alone, together):
  for place in ('peft/adapter_model.safetensors', 'merged/model.safetensors'):
    ours, expected = (load_file(workdir / place) for workdir in (together[0], alone))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
      # Adam divides by the size of a gradient: where that is tiny, rounding shows.
      np.testing.assert_allclose(ours[name], array, atol=2e-4, err_msg=name)
  assert not list(together[0].glob('.*'))


def test_what_two_processes_saved_goes_on_in_one(alone, together, tmp_path):
  """As if the run had been killed after the second step."""
  for name in ('checkpoints/2', 'metrics.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    subprocess.run(['cp', '-r', together[0] / name, tmp_path / name], check=True)
  code, output, errors = finish(start(tmp_path, devices=1))
  assert code == 0, errors
  assert f'resuming after step 2 of {STEPS}' in output
  assert_same_metrics(metrics(tmp_path), metrics(alone))


def test_cached_reference_and_tensor_axis_across_processes(alone, tmp_path):
  """Each host computes its rows of the cache; all then hold all of it."""
  run_on_two(tmp_path, '--config.reference.source=cache', '--config.mesh.tensor=2')
  assert len(list((tmp_path / 'token_cache').glob('reference-*.float32'))) == 2
  ours = {place: line['dpo_loss'] for place, line in metrics(tmp_path).items()}
  expected = {place: line['dpo_loss'] for place, line in metrics(alone).items()}
  assert ours == pytest.approx(expected, rel=1e-5)


# A mesh in whose order the processes take turns, as the chip grid of a TPU makes them.
SCATTERED = """
import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_flax.runtime import command
from dpo_flax.sharding import make_mesh, row_shard, shard_batch

def main():
  order = [jax.devices()[i] for i in (0, 2, 3, 1)]
  mesh = make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1}, order)
  blocks, count = row_shard(mesh)
  assert (blocks, count) == ([(0, 3), (1, 2)][jax.process_index()], 4)
  rows = np.arange(8 * 3).reshape(4, 2, 3)
  batch = shard_batch({'tokens': rows[list(blocks)].reshape(-1, 3)}, mesh)
  everywhere = multihost_utils.process_allgather(batch['tokens'], tiled=True)
  np.testing.assert_array_equal(everywhere, rows.reshape(8, 3))

command.run_flags(main, on_every_host=True)
"""


def test_rows_that_lie_apart_in_the_mesh_arrive_in_order():
  processes = run_both(lambda flags: start_process([sys.executable, '-c', SCATTERED, *flags]))
  for code, _, errors in processes:
    assert code == 0, errors
