"""How commands end: which failures are the user's, and which are another process's."""

import pytest
from absl import flags

from dpo_flax import command
from dpo_flax.durability.peers import MISTAKE


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
