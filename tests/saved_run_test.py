"""A run that version 0.1.0 saved goes on and is exported as it would have been then.

What is in tests/saved_run is told in its README.
"""

import json
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_flax.checkpoints import steps
from helpers import checkpoint_arrays
from helpers.processes import environment

SAVED = pathlib.Path(__file__).with_name('saved_run')
ADAPTER = 'adapter_model.safetensors'

pytestmark = pytest.mark.xdist_group('saved_run')


def run(directory, *command):
  """Runs a command in the run's directory as the run itself was run."""
  command = [sys.executable, '-m', *command]
  finished = subprocess.run(
    command, cwd=directory, env=environment(devices=1), capture_output=True, text=True, check=False
  )
  assert finished.returncode == 0, finished.stderr[-2000:]
  return finished.stdout


def is_same_machine():
  """Whether programs are compiled here as they were then."""
  saved = json.loads((SAVED / 'expected' / 'machine.json').read_text())
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  flags = re.search('^flags.*', cpuinfo.read_text() if cpuinfo.exists() else '', re.MULTILINE)
  found = re.findall(r'\b(?:avx|amx|fma)\w*', flags[0]) if flags else []
  here = {'jax': jax.__version__, 'instructions': ' '.join(sorted(found))}
  return platform.machine() == 'x86_64' and here == saved


def assert_same(found, expected):
  """Compares arrays by name, bit for bit where the machine is the same one."""
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    if is_same_machine():
      np.testing.assert_array_equal(found[name], array, err_msg=name)
    else:
      np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
  """The directory of the run after a new version has brought it to its end, and what it printed."""
  directory = tmp_path_factory.mktemp('saved') / 'run'
  shutil.copytree(SAVED, directory)
  return directory, run(directory, 'dpo_flax.train', '--config=config.py')


def test_the_saved_run_goes_on_after_its_last_step(resumed):
  _, printed = resumed
  assert 'resuming after step 4 of 8' in printed


def test_it_ends_with_the_adapters_optimizer_and_counters_of_then(resumed):
  directory, _ = resumed
  found, expected = (
    checkpoint_arrays.read(checkpoints / '8')
    for checkpoints in (directory / 'workdir/checkpoints', SAVED / 'expected/checkpoints')
  )
  assert_same(found, expected)


def test_it_reports_what_was_reported_then(resumed):
  directory, _ = resumed
  found, expected = (
    [json.loads(line) for line in path.read_text().splitlines()]
    for path in (directory / 'workdir/metrics.jsonl', SAVED / 'expected/metrics.jsonl')
  )
  assert len(found) == len(expected)
  for line, before in zip(found, expected, strict=True):
    assert line.pop('split') == before.pop('split')
    same = {name: value for name, value in before.items() if not name.endswith('_per_second')}
    assert {name: line.get(name) for name in same} == pytest.approx(same, rel=1e-4, abs=1e-6)


def test_its_export_is_the_export_of_then(resumed):
  directory, _ = resumed
  assert_same(
    load_file(directory / 'workdir/peft' / ADAPTER), load_file(SAVED / 'expected/peft_8' / ADAPTER)
  )


def test_an_old_step_is_exported_with_the_same_bits(tmp_path):
  shutil.copytree(SAVED, tmp_path / 'run')
  flags = ('--workdir=workdir', '--step=4', '--output=peft_4')
  run(tmp_path / 'run', 'dpo_flax.export', *flags)
  found, expected = (
    path / ADAPTER for path in (tmp_path / 'run/peft_4', SAVED / 'expected/peft_4')
  )
  # Nothing is computed on the way out, so the machine does not matter.
  assert found.read_bytes() == expected.read_bytes()


def test_damage_to_the_saved_step_would_be_noticed(tmp_path):
  shutil.copytree(SAVED / 'workdir/checkpoints/4', tmp_path / '4')
  assert not steps.faults(tmp_path / '4')
  (tmp_path / '4/run.json').write_text('{"step": 4}')
  assert steps.faults(tmp_path / '4')
