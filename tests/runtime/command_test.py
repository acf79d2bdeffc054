"""How commands end: which failures are the user's, and which are another process's."""

import subprocess
import sys

import pytest
from absl import flags

from dpo_flax.runtime import command
from dpo_flax.runtime.peers import MISTAKE


@pytest.fixture
def waited(monkeypatch):
  """Lists the waits for the watch to say that another process is at fault."""
  found = []
  monkeypatch.setattr(command.app, 'run', lambda main, **_: main(['command']))
  monkeypatch.setattr(command, '_quieten_libraries', lambda: None)
  monkeypatch.setattr(command.hosts.peers(), 'wait_for_verdict', lambda: found.append(1))
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return found


@pytest.mark.parametrize(
  ('error', 'waits'),
  [
    (ValueError('UNKNOWN: Gloo AllGather failed: Connection reset by peer'), True),
    (OSError('step 4 could not be saved: DEADLINE_EXCEEDED: barrier timed out'), True),
    (ValueError('lora.r=0: must be at least 1'), False),
    (OSError('No space left on device'), False),
  ],
)
def test_a_failed_collective_is_a_mistake_only_if_all_processes_live(waited, capsys, error, waits):
  def fail():
    raise error

  with pytest.raises(SystemExit) as stopped:
    command.run_flags(fail)
  assert stopped.value.code == MISTAKE and str(error) in capsys.readouterr().err
  assert bool(waited) == waits


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('def get_config(:', 'SyntaxError: invalid syntax (config.py, line 1)'),
    ('import nothing_such', 'config.py:1: ModuleNotFoundError'),
    ("\nraise RuntimeError('boom')", 'config.py:2: RuntimeError: boom'),
    ('def get_config():\n  return {}[1]', 'config.py:2: KeyError: 1'),
    ('def get_config():\n  return 5', 'get_config() returned 5, which is no ConfigDict'),
  ],
)
def test_a_config_file_that_fails_is_told_in_one_line(tmp_path, content, message):
  (tmp_path / 'config.py').write_text(content)
  command_line = [sys.executable, '-m', 'dpo_flax.train', f'--config={tmp_path}/config.py']
  finished = subprocess.run(command_line, capture_output=True, text=True, check=False)
  assert finished.returncode == MISTAKE
  assert message in finished.stderr and 'Traceback' not in finished.stderr


def test_no_command_imports_torch():
  """Which takes longer than all that they need; tensorboardX would, where it is installed."""
  commands = 'train, evaluate, inspect_data, export, plan'
  code = f'import sys; from dpo_flax import {commands}; print("torch" in sys.modules)'
  command_line = [sys.executable, '-c', code]
  printed = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
  assert printed.split()[-1] == 'False'


def test_a_secret_is_not_repeated(capsys):
  secret = 'hf_' + 'aB3' * 10
  with pytest.raises(SystemExit):
    command._fail(f'flag --config.lora.r={secret}: invalid literal for int()')
  assert secret not in capsys.readouterr().err
