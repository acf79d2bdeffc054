"""What survives which fault: the short form of the commands in tests/faults/."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  'command',
  [
    'damage.py --rounds=60',
    'kill.py --rounds=2 --signal=TERM',
    'kill.py --rounds=1 --processes=2',
    'kill.py --rounds=1 --processes=2 --signal=STOP',
    'full_disk.py --rounds=2',
    'change.py --rounds=3',
    'not_finite.py --rounds=1',
    'shapes.py --rounds=1',
    'bounds.py --rounds=1',
    'bucket.py --rounds=3',
  ],
)
def test_the_promise_is_kept(command):
  script, *options = command.split()
  finished = subprocess.run(
    [sys.executable, ROOT / 'tests' / 'faults' / script, *options],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert finished.returncode == 0, finished.stdout + finished.stderr
