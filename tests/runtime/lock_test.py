"""One writer for each workdir; a process that ended, however, holds nothing."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from dpo_flax.runtime.lock import sole_writer

HOLDER = """
import os, sys, time
from etils import epath
from dpo_flax.runtime.lock import sole_writer

with sole_writer(epath.Path(sys.argv[1])):
  child = os.fork() if 'forks' in sys.argv else None
  if child != 0:
    print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
  """Starts processes that hold the workdir; kills what is left of them."""
  started = []

  def start(*options):
    process = subprocess.Popen(
      [sys.executable, '-c', HOLDER, tmp_path, *options],
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    started.append(process)
    assert process.stdout.readline() == 'held\n'
    return process

  yield start
  for process in started:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_second_writer_is_told_who_the_first_is(hold, tmp_path):
  first = hold()
  who = f'{tmp_path} is in use by process {first.pid} on {socket.gethostname()} since 20'
  for _ in range(2):  # asking does not take it away
    with pytest.raises(ValueError, match=re.escape(who)), sole_writer(epath.Path(tmp_path)):
      pass


@pytest.mark.parametrize('options', [(), ('forks',)])
def test_a_killed_writer_holds_nothing_even_if_its_children_live(hold, tmp_path, options):
  first = hold(*options)
  os.kill(first.pid, signal.SIGKILL)
  first.wait()
  with sole_writer(epath.Path(tmp_path)):
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()


def test_a_link_is_not_followed_to_what_it_would_empty(tmp_path):
  (tmp_path / 'mine').write_text('years of work')
  (tmp_path / 'lock').symlink_to('mine')
  with pytest.raises(ValueError, match='symbolic links'), sole_writer(epath.Path(tmp_path)):
    pass
  assert (tmp_path / 'mine').read_text() == 'years of work'


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  what = f'workdir {tmp_path}/file cannot be written: .*File exists'
  with pytest.raises(ValueError, match=what), sole_writer(epath.Path(tmp_path / 'file')):
    pass


def test_after_the_writer_nobody_is_named(tmp_path):
  with sole_writer(epath.Path(tmp_path) / 'new'):
    pass
  assert (tmp_path / 'new' / 'lock').read_text() == ''
