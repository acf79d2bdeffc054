"""The launch scripts: dry runs, and real ones in which `gcloud` is a stand-in on this machine."""

import itertools
import os
import pathlib
import shutil
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh') if path.name != 'settings.sh')
CONFIG = ['--config=configs/llama8b.py', "--config.data.train={'a b.jsonl': 2}", '--x=$HOME `;"']

# One worker is a directory. Each call of `list` takes the next state of a file of them.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$FAKE/calls"
for argument in "$@"; do [[ $argument == --command=* ]] && command=${argument#--command=}; done
case $4 in
  list) head -n 1 "$FAKE/states"; sed -i 1d "$FAKE/states" ;;
  scp) cp "$5" "$FAKE/home/dpo_flax.tar.gz" ;;
  ssh) cd "$FAKE/home" && HOME=$PWD bash -c "$command" ;;
  create) rm -rf "$FAKE/home" && mkdir "$FAKE/home" ;;
esac
"""

# Stands in for the worker's python3 (which installs) and for the environment's python (which
# trains): the latter leaves its arguments and ends as `$FAKE/ends` says, line by line.
PYTHON = """#!/usr/bin/env bash
if [[ "$1 $2 $3" == '-m uv venv' ]]; then mkdir -p venv/bin && cp "$0" venv/bin/python; fi
if [[ "$2" == dpo_flax.train ]]; then
  printf '%s\\n' "$@" > "$FAKE/arguments"
  code=$(head -n 1 "$FAKE/ends"); sed -i 1d "$FAKE/ends"; exit "$code"
fi
"""


def launch(script, *arguments, **environment):
  environment = os.environ | {'NAME': 'my-run', 'ZONE': 'us-west4-a', 'POLL': '0.2'} | environment
  process = subprocess.run(
    [LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, check=False
  )
  return process.returncode, process.stdout, process.stderr


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """A directory that stands for the cloud: see GCLOUD and PYTHON."""
  programs = tmp_path / 'programs'
  programs.mkdir()
  (tmp_path / 'home').mkdir()
  for name, text in {'gcloud': GCLOUD, 'python3': PYTHON}.items():
    (programs / name).write_text(text)
    (programs / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{programs}:{os.environ["PATH"]}')
  monkeypatch.setenv('FAKE', str(tmp_path))
  return tmp_path


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_dry_run_calls_nothing(cloud, script):
  arguments = ['--config=configs/llama8b.py'] if script in {'run.sh', 'resume.sh'} else []
  code, output, errors = launch(script, *arguments, '--dry-run')
  assert code == 0, errors
  assert 'gcloud compute tpus queued-resources' in output
  assert not (cloud / 'calls').exists()


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_a_script_does_not_know_it_does_not_ignore(cloud, script):
  if script not in {'run.sh', 'resume.sh'}:
    code, _, errors = launch(script, '--dryrun')
    assert code == 2 and 'no argument but --dry-run: --dryrun' in errors
  code, output, _ = launch(script, '--help')
  _, *lines = (LAUNCH / script).read_text().splitlines()
  head = itertools.takewhile(lambda line: line.startswith('#'), lines)
  assert code == 0 and output.splitlines() == [line.removeprefix('# ') for line in head]
  assert not (cloud / 'calls').exists()


def test_settings_reach_the_request():
  code, output, _ = launch('create.sh', '--dry-run', SPOT='yes', SLICES='2', TPU_TYPE='v6e-8')
  assert code == 0
  for flag in ('--spot', '--node-count=2', '--accelerator-type=v6e-8', '--zone=us-west4-a'):
    assert f' {flag} ' in output
  assert '--node-id' not in output


def test_a_missing_setting_is_named():
  code, _, errors = launch('create.sh', '--dry-run', ZONE='')
  assert code != 0 and 'set ZONE' in errors


def test_create_waits_until_the_tpus_are_there(cloud):
  (cloud / 'states').write_text('WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n')
  code, output, _ = launch('create.sh')
  assert code == 0
  assert output.split()[1::2] == ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  (cloud / 'states').write_text('PROVISIONING\nFAILED\n')
  assert launch('create.sh')[0] == 1


def wait_for(path):
  deadline = time.monotonic() + 30
  while not path.exists() or not path.read_text():
    assert time.monotonic() < deadline, f'{path} never came'
    time.sleep(0.05)
  return path.read_text()


def test_arguments_arrive_as_they_were_given(cloud):
  (cloud / 'ends').write_text('0\n')
  code, _, errors = launch('run.sh', *CONFIG)
  assert code == 0, errors
  assert wait_for(cloud / 'home/dpo_flax/exit_code') == '0\n'
  assert (cloud / 'arguments').read_text().splitlines() == ['-m', 'dpo_flax.train', *CONFIG]
  assert (cloud / 'home/dpo_flax/configs/tiny.py').exists()


def test_a_crashed_run_is_started_again_until_it_ends(cloud):
  (cloud / 'states').write_text('\n' + 'ACTIVE\n' * 40)
  (cloud / 'ends').write_text('1\n0\n')
  code, output, errors = launch('resume.sh', *CONFIG)
  assert code == 0, errors
  assert 'NONE: starting anew' in output and '1: starting again' in output
  assert 'the run has ended' in output
  assert (cloud / 'arguments').read_text().splitlines()[2:] == CONFIG


def test_a_preempted_slice_is_deleted_before_a_new_one_is_asked_for(cloud):
  (cloud / 'states').write_text('SUSPENDED\n' + 'ACTIVE\n' * 40)
  (cloud / 'ends').write_text('0\n')
  code, _, errors = launch('resume.sh', *CONFIG)
  assert code == 0, errors
  verbs = [
    line.split()[3] for line in (cloud / 'calls').read_text().splitlines() if ' tpus ' in line
  ]
  assert verbs[:4] == ['list', 'delete', 'create', 'list']


@pytest.mark.parametrize(
  ('ends', 'code', 'message'), [('2\n', 2, 'refused'), ('1\n' * 9, 1, 'crashed')]
)
def test_what_would_fail_again_is_not_tried_forever(cloud, ends, code, message):
  (cloud / 'states').write_text('ACTIVE\n' * 99)
  (cloud / 'ends').write_text(ends)
  found, _, errors = launch('resume.sh', *CONFIG)
  assert found == code and message in errors


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck_finds_nothing():
  process = subprocess.run(
    ['shellcheck', '-x', *sorted(LAUNCH.glob('*.sh'))],
    cwd=LAUNCH,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stdout


def test_the_manifest_restarts_after_a_preemption_but_not_after_a_mistake():
  yaml = pytest.importorskip('yaml')
  manifest = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  policy = manifest['spec']['failurePolicy']
  [job] = manifest['spec']['replicatedJobs']
  template = job['template']['spec']
  [rule] = template['podFailurePolicy']['rules']
  assert policy['maxRestarts'] > 0 and template['backoffLimit'] == 0
  assert policy['rules'][0]['action'] == 'FailJobSet'
  assert rule == {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [2]}}
  assert template['parallelism'] == template['completions']
