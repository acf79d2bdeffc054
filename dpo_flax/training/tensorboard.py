"""Event files for TensorBoard, written at once and on the caller's thread.

tensorboardX's SummaryWriter writes on a thread of its own behind a queue. When that thread dies of
a full disk the queue fills, and the run waits for it for ever.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping

from etils import epath

_FORMAT = 'brain.Event:2'


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Keeps torch, where it is installed, from being imported."""
  imported = sys.modules.get('torch')
  sys.modules['torch'] = None
  try:
    yield
  finally:
    sys.modules.pop('torch')
    if imported is not None:
      sys.modules['torch'] = imported


# tensorboardX would import it for tensors, of which it gets none here. That takes as long as all
# other imports of a run together, and 180 MB.
with _without_torch():
  from tensorboardX.proto import event_pb2, summary_pb2
  from tensorboardX.record_writer import RecordWriter


class EventFiles:
  """The scalars of one run; after a failed write they go on in a new file."""

  def __init__(self, directory: epath.Path, *, purge_step: int):
    """Hides, in files that are there already, what lies at `purge_step` and beyond."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
    self._paths = (f'{directory}/{prefix}.{number}' for number in itertools.count())
    self._file: RecordWriter | None = None
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._append(event_pb2.Event(session_log=log, step=purge_step))

  def write(self, step: int, values: Mapping[str, float]):
    """Writes tag -> value of a step.

    Raises:
      OSError: it could not; the file has what it had before, and perhaps a part of these.
    """
    scalars = [
      summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
    ]
    self._append(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=scalars)))

  def close(self):
    """Closes the file that is open."""
    file, self._file = self._file, None
    if file is not None:
      file.close()

  def _append(self, event: event_pb2.Event):
    event.wall_time = time.time()
    try:
      if self._file is None:
        self._file = RecordWriter(next(self._paths))
        first = event_pb2.Event(wall_time=event.wall_time, file_version=_FORMAT)
        self._file.write(first.SerializeToString())
      self._file.write(event.SerializeToString())
      self._file.flush()
    except OSError:
      # Half an event ends what TensorBoard reads of a file.
      with contextlib.suppress(OSError):
        self.close()
      raise
