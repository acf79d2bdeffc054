"""Helper processes: Python programs that answer one message at a time over their standard pipes.

Not multiprocessing, whose processes begin with the caller's own main module: a helper of a training
run would import all of JAX, and a script without a main guard would start itself again.
"""

import atexit
import contextlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

_HEADER = struct.Struct('<Q')  # a message's size


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
    self._process = subprocess.Popen(
      [sys.executable, '-m', module],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL if quiet else None,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
    )
    assert self._process.stdin is not None and self._process.stdout is not None
    self._requests, self._answers = self._process.stdin, self._process.stdout
    self._lock = threading.Lock()
    atexit.register(self.close)

  def ask(self, request: bytes) -> bytes:
    """Returns the helper's answer.

    Raises:
      ChildDied: it ended instead. The helper is of no more use.
    """
    with self._lock:
      try:
        _send(self._requests.fileno(), request)
        return _receive(self._answers.fileno())
      except (EOFError, BrokenPipeError, ValueError):
        self.close()
        raise ChildDied(self._process.returncode) from None

  def close(self) -> None:
    """Ends the helper."""
    atexit.unregister(self.close)
    self._process.kill()
    self._process.wait()
    self._requests.close()
    self._answers.close()


def serve(answer: Callable[[bytes], bytes]) -> None:
  """Answers messages until there are no more; what the program prints goes to standard error."""
  outward = os.dup(1)
  os.dup2(2, 1)
  with contextlib.suppress(EOFError, BrokenPipeError):  # who asked is gone
    while True:
      _send(outward, answer(_receive(0)))


def _send(descriptor: int, message: bytes) -> None:
  rest = memoryview(_HEADER.pack(len(message)) + message)
  while rest:
    rest = rest[os.write(descriptor, rest) :]


def _receive(descriptor: int) -> bytes:
  (size,) = _HEADER.unpack(_read(descriptor, _HEADER.size))
  return _read(descriptor, size)


def _read(descriptor: int, size: int) -> bytes:
  parts = []
  while size:
    part = os.read(descriptor, min(size, 1 << 20))
    if not part:
      raise EOFError
    parts.append(part)
    size -= len(part)
  return b''.join(parts)
