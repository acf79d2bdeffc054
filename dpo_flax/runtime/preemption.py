"""SIGTERM, by which a machine is taken away: a checkpoint, and an exit code that asks to restart.

All processes of a run must save the same step. Each counts the points at which it could stop, which
are the same for all; one that was signalled posts at which point it is, waits until all have
done so, and goes on to the furthest of them.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from dpo_flax.runtime.peers import PREEMPTED, Peers, end

_INTERVAL = 0.25  # seconds
_GOODBYE = 1.0  # seconds of the grace in which to inform the others and end


class Preempted(Exception):
  """The run was asked to stop, and all its processes are at the same point."""


class Preemption:
  """Handles SIGTERM from `__enter__` to `__exit__`, for this process and its peers.

  A process that has nothing to save ends at once, in whatever it is stuck. One that has ends by
  `Preempted` at the agreed point, or after `grace` seconds without its latest steps.
  """

  def __init__(self, peers: Peers, *, grace: float):
    self._is_saved: Callable[[], bool] = lambda: True  # until there is something to save
    self._peers, self._grace = peers, grace
    self._limit = grace - min(_GOODBYE, grace / 2)
    self._signalled: float | None = None  # when, on the monotonic clock
    self._stopping = False  # at the agreed point
    self._point = 0
    self._closed = threading.Event()

  def __enter__(self) -> 'Preemption':
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    # A handler in Python would wait for the main thread, which may be compiling.
    self._before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, name='preemption', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._closed.set()
    self._thread.join()
    signal.set_wakeup_fd(-1)
    # One that is on its way out for a first SIGTERM is not to be killed by a second.
    signal.signal(signal.SIGTERM, self._before if self._signalled is None else signal.SIG_IGN)
    for descriptor in self._pipe:
      os.close(descriptor)

  def save_unless(self, is_saved: Callable[[], bool]):
    """From now on, this process ends at once only when nothing would be lost by `is_saved`.

    It is called on another thread.
    """
    self._is_saved = is_saved

  def check(self):
    """Marks a point at which the run could stop; every process comes to the same ones.

    Raises:
      Preempted: it is to stop here.
    """
    self._point += 1
    if self._signalled is not None and self._is_furthest():
      self._stopping = True
      raise Preempted

  def _is_furthest(self) -> bool:
    self._peers.post('point', str(self._point))
    while len(points := self._peers.notes('point')) < self._peers.count > 1:
      time.sleep(_INTERVAL / 10)
    return self._point >= max(map(int, points.values()), default=0)

  def _watch(self):
    while not self._closed.is_set():
      if self._signalled is None:
        if self._was_signalled() or self._peers.stop_was_asked:
          self._signalled = time.monotonic()
          self._peers.ask_to_stop()
        continue
      time.sleep(_INTERVAL / 10)
      late = time.monotonic() - self._signalled > self._limit
      if late or (not self._stopping and (self._peers.parting or self._is_saved())):
        self._leave(late)

  def _was_signalled(self) -> bool:
    readable, _, _ = select.select([self._pipe[0]], [], [], _INTERVAL)
    return bool(readable) and signal.SIGTERM in os.read(self._pipe[0], 64)

  def _leave(self, late: bool):
    self._peers.leave(PREEMPTED, 'it was told to stop (SIGTERM)')
    saved = f'not within {self._grace:.0f} s' if late else 'and there was nothing to save'
    end(f'told to stop (SIGTERM), {saved}: the same command goes on.', PREEMPTED)
