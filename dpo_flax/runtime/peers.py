"""The other processes of a run: which of them are alive, and the messages they leave.

Collectives wait for ever for a process that is gone, in C++, where nothing can interrupt them. So
every process shows a sign of life each second on the notice board of jax's coordinator, and a
thread ends the process, with a line that names the one at fault, when another's signs stop.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from dpo_flax.runtime import coordinator

# Exit codes. After the last two, of sysexits.h, the same command goes on.
MISTAKE = 2
LOST_PEER = 69  # EX_UNAVAILABLE
PREEMPTED = 75  # EX_TEMPFAIL

_TIMEOUT = 20.0  # seconds without a sign of life
_INTERVAL = 1.0  # seconds
_BOARD = 'dpo_flax'
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)  # of a signal


class Peers:
  """What this process knows of the others; alone, it knows none and nothing can happen to them."""

  def __init__(self):
    self.index, self.count = 0, 1
    self._name = f'{socket.gethostname()}, pid {os.getpid()}'
    self._names: dict[int, str] = {}
    self._signs: dict[int, tuple[str, float]] = {}  # of each other: the last, and when it came
    self._answered = time.monotonic()  # when the board did, which process 0 keeps
    self._closed = threading.Event()
    self.parting: dict[int, str] = {}  # of those that have left: exit code and reason
    self.stop_was_asked = False

  def join(self, index: int, count: int):
    """Shows signs of life, as one of `count`, and ends this process when another's stop."""
    self.index, self.count = index, count
    if count > 1:
      self._signs = {i: ('', time.monotonic()) for i in range(self.count) if i != self.index}
      self.post('name', self._name)
      for task in (self._talk, self._judge):
        threading.Thread(target=task, name=task.__name__, daemon=True).start()
      atexit.register(self.leave, 1, 'it has ended before the run has')
      # jax's client aborts the process, without a name, once the coordinator's socket is closed.
      self._last_words = _HANDLER(self._aborted)
      ctypes.CDLL(None).signal(signal.SIGABRT, self._last_words)

  def post(self, topic: str, text: str):
    """Pins a note to the board, over an earlier one of this process on the topic."""
    if self.count > 1:
      coordinator.write(f'{_BOARD}/{topic}/{self.index}', text)

  def notes(self, topic: str) -> dict[int, str]:
    """Returns the notes on a topic: process -> text."""
    if self.count == 1:
      return {}
    found = coordinator.read_directory(f'{_BOARD}/{topic}/')
    return {int(key.rpartition('/')[2]): text for key, text in found.items()}

  def ask_to_stop(self):
    """Asks all processes to stop at a point that they agree on."""
    self.post('stop', '')

  def leave(self, code: int, why: str):
    """Takes leave, so that no other waits for signs of this one. Process 0 waits for all others."""
    if self.count == 1 or self._closed.is_set():
      return
    self._closed.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self.post('parting', f'{code} {why}')
      self._keep_the_board()

  def _keep_the_board(self):
    """Lets the others read the last note of process 0: the board ends with it."""
    until = time.monotonic() + 3 * _INTERVAL
    while self.index == 0 and len(self.notes('parting')) < self.count and time.monotonic() < until:
      time.sleep(_INTERVAL / 10)

  def close(self):
    """Ends the watch: the run is over."""
    self._closed.set()

  def wait_for_verdict(self):
    """Gives the watch the time to find, and end this process, if a failure is another's."""
    if self.count > 1:
      time.sleep(_TIMEOUT + 3 * _INTERVAL)

  def _at_fault(self) -> tuple[int, str] | None:
    """Returns which process is, and the exit code that it calls for; None while all are well."""
    now = time.monotonic()
    for peer, note in self.parting.items():
      code, _, why = note.partition(' ')
      code = int(code) if int(code) in {MISTAKE, PREEMPTED} else LOST_PEER
      return code, f'{self._describe(peer)} has left: {why}'
    if now - self._answered > _TIMEOUT:
      silent, since = f'{self._describe(0)}, the coordinator,', self._answered
    else:
      peer = min(self._signs, key=lambda peer: self._signs[peer][1])
      silent, since = self._describe(peer), self._signs[peer][1]
    if now - since <= _TIMEOUT:
      return None
    return LOST_PEER, f'{silent} has shown no sign of life for {_TIMEOUT:.0f} s'

  def _describe(self, peer: int) -> str:
    return f'process {peer} of {self.count} ({self._names.get(peer, "never heard of")})'

  def _aborted(self, _: int):
    """Runs on the thread that aborts, which does so once this returns."""
    try:
      socket.create_connection(coordinator.address(), timeout=5).close()
    except OSError:
      end(f'{self._describe(0)}, the coordinator, is gone. This process ends too.', LOST_PEER)
    faulthandler.dump_traceback()

  def _talk(self):
    """Shows signs of life and collects the others'. It blocks while the coordinator is frozen."""
    sign = 0
    while not self._closed.wait(_INTERVAL):
      sign += 1
      try:
        self.post('sign', str(sign))
        signs = self.notes('sign')
        self.stop_was_asked = self.stop_was_asked or bool(self.notes('stop'))
        self._names = self._names if len(self._names) == self.count else self.notes('name')
        self.parting = {i: why for i, why in self.notes('parting').items() if i != self.index}
      except jax.errors.JaxRuntimeError:
        continue
      self._answered = time.monotonic()
      for peer, last in signs.items():
        if peer != self.index and last != self._signs[peer][0]:
          self._signs[peer] = last, self._answered

  def _judge(self):
    while not self._closed.wait(_INTERVAL):
      if found := self._at_fault():
        code, reason = found
        end(f'{reason}. This process ends too.', code)


def end(message: str, code: int) -> NoReturn:
  """Ends the process at once, even while another thread of it is stuck."""
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)
