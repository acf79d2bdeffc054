"""Event files for TensorBoard, written at once and on the caller's thread.

tensorboardX's SummaryWriter writes on a thread of its own behind a queue. When that thread dies of
a full disk the queue fills, and the run waits for it for ever.
"""

import contextlib
import importlib
import importlib.util
import itertools
import os
import socket
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

from etils import epath

_FORMAT = 'brain.Event:2'
_PACKAGE = 'tensorboardX'
_PARTS = ('proto.event_pb2', 'proto.summary_pb2', 'record_writer')


def _import_parts() -> list[types.ModuleType]:
  """Imports the `_PARTS` of tensorboardX alone.

  The package itself would import torch, where it is installed, for tensors, of which it gets none
  here. That takes as long as all other imports of a run together, and 180 MB. So a package without
  content stands for it meanwhile; whoever imports tensorboardX later gets all of it.
  """
  names = [f'{_PACKAGE}.{part}' for part in _PARTS]
  if _PACKAGE in sys.modules:
    return [importlib.import_module(name) for name in names]
  spec = importlib.util.find_spec(_PACKAGE)
  if spec is None or spec.submodule_search_locations is None:
    raise ImportError('tensorboardX is not installed')
  package = types.ModuleType(_PACKAGE)
  package.__path__ = spec.submodule_search_locations
  sys.modules[_PACKAGE] = package
  try:
    return [importlib.import_module(name) for name in names]
  finally:
    for name in [name for name in sys.modules if name.partition('.')[0] == _PACKAGE]:
      del sys.modules[name]


class EventFiles:
  """The scalars of one run; after a failed write they go on in a new file."""

  def __init__(self, directory: epath.Path, *, purge_step: int):
    """Hides, in files that are there already, what lies at `purge_step` and beyond."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
    self._paths = (f'{directory}/{prefix}.{number}' for number in itertools.count())
    self._event_pb2, self._summary_pb2, self._record_writer = _import_parts()
    self._file: Any = None  # a RecordWriter, or none
    log = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
    self._append(self._event_pb2.Event(session_log=log, step=purge_step))

  def write(self, step: int, values: Mapping[str, float]):
    """Writes tag -> value of a step.

    Raises:
      OSError: it could not; the file has what it had before, and perhaps a part of these.
    """
    summary = self._summary_pb2.Summary(
      value=[{'tag': tag, 'simple_value': value} for tag, value in values.items()]
    )
    self._append(self._event_pb2.Event(step=step, summary=summary))

  def close(self):
    """Closes the file that is open."""
    file, self._file = self._file, None
    if file is not None:
      file.close()

  def _append(self, event: Any):
    event.wall_time = time.time()
    try:
      if self._file is None:
        self._file = self._record_writer.RecordWriter(next(self._paths))
        first = self._event_pb2.Event(wall_time=event.wall_time, file_version=_FORMAT)
        self._file.write(first.SerializeToString())
      self._file.write(event.SerializeToString())
      self._file.flush()
    except OSError:
      # Half an event ends what TensorBoard reads of a file.
      with contextlib.suppress(OSError):
        self.close()
      raise
