"""Helper processes: Python programs that answer one message at a time.

Not processes of multiprocessing, which begin with the caller's own main module: a helper of a
training run would import all of JAX, and a script without a main guard would start itself again.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection


class ChildDied(Exception):
  """The helper ended before it answered; `code` is its exit code, or the negative of a signal."""

  def __init__(self, code: int):
    super().__init__(f'a helper process ended with code {code}')
    self.code = code


class Child:
  """A running helper. `ask` is safe to call from several threads.

  Args:
    module: the program, a module that calls `serve`.
    quiet: whether its standard error is thrown away.
  """

  def __init__(self, module: str, *, quiet: bool = False):
    output = subprocess.DEVNULL if quiet else 2  # what it prints goes to standard error
    self._connection, theirs = connection.Pipe()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, '-m', module],
        stdin=theirs.fileno(),
        stdout=output,
        stderr=output,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
      )
    self._lock = threading.Lock()
    atexit.register(self.close)

  def ask(self, request: bytes) -> bytes:
    """Returns the helper's answer.

    Raises:
      ChildDied: it ended instead. The helper is of no more use.
    """
    with self._lock:
      try:
        self._connection.send_bytes(request)
        return self._connection.recv_bytes()
      except (EOFError, OSError):
        self.close()
        raise ChildDied(self._process.returncode) from None

  def close(self) -> None:
    """Ends the helper."""
    atexit.unregister(self.close)
    self._process.kill()
    self._process.wait()
    self._connection.close()


def serve(answer: Callable[[bytes], bytes]) -> None:
  """Answers the messages that come by standard input, until there are no more."""
  with connection.Connection(0) as asker, contextlib.suppress(EOFError, ConnectionError):
    while True:  # until who asks is gone
      asker.send_bytes(answer(asker.recv_bytes()))
