"""One run on several hosts: how its processes find one another before jax looks for devices.

On Cloud TPU the environment has their addresses. Elsewhere every process is given them, here the
second of two:

    --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1

Without these a run is one process that listens to nobody. command.py defines the flags.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_flax.files.paths import access_errors
from dpo_flax.runtime.coordinator import membership
from dpo_flax.runtime.peers import LOST_PEER, Peers, end

# peers.py notices sooner, and names who is at fault; this is for when it cannot.
_TIMEOUTS = {'heartbeat_timeout_seconds': 60, 'shutdown_timeout_seconds': 15}
_LONGER = 60  # seconds that jax, whose timeout aborts with a stack trace, waits longer

_CLOUD_TPU_PORT = '8482'  # jax's own choice
_METADATA_SERVER = ('169.254.169.254', 80)  # that of any Google Cloud VM

JOIN_TIMEOUT = 300  # seconds

_peers = Peers()  # alone until `connect`


def peers() -> Peers:
  """Returns the run's other processes, as far as this one has joined them."""
  return _peers


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  join_timeout: int = JOIN_TIMEOUT,
):
  """Joins the run's other processes, if there are any.

  Args:
    coordinator: host:port where process 0 listens, and on no other address.
    num_processes: of the run, all together.
    process_id: this one among them, from 0.
    join_timeout: seconds until all of them must have come; else this process ends.

  Raises:
    ValueError: the first three are incomplete or contradict each other.
  """
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  if coordinator is not None and num_processes is not None and process_id is not None:
    _connect_as_given(coordinator, num_processes, process_id, join_timeout)
  elif any(value is not None for value in given.values()):
    missing = [f'--{name}' for name, value in given.items() if value is None]
    raise ValueError(f'a run of several processes also needs {", ".join(missing)}')
  elif _is_cloud_tpu():
    port = os.environ.get('JAX_COORDINATOR_PORT', _CLOUD_TPU_PORT)
    # jax would listen on every interface; the other workers know this one.
    with _limited_wait('another process of the run', 'Has it failed', join_timeout):
      _join(join_timeout, coordinator_bind_address=f'{_own_address()}:{port}')


def _connect_as_given(coordinator: str, num_processes: int, process_id: int, join_timeout: int):
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id}: with --num_processes={num_processes} it is one of '
      f'0 ... {num_processes - 1}'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(f'--coordinator={coordinator}: expected host:port of process 0')
  who = f'process {1 - process_id} of 2' if num_processes == 2 else 'another process of the run'
  why = f'Has it failed, or can {coordinator} not be reached'
  with _limited_wait(who, why, join_timeout):
    _join(
      join_timeout,
      coordinator,
      num_processes,
      process_id,
      coordinator_bind_address=coordinator,
      cluster_detection_method='deactivate',
    )


def _join(join_timeout: int, *arguments, **options):
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
  patience = join_timeout + _LONGER
  jax.distributed.initialize(*arguments, **options, **_TIMEOUTS, initialization_timeout=patience)
  _peers.join(*membership())


@contextlib.contextmanager
def _limited_wait(who: str, why: str, seconds: int) -> Iterator[None]:
  """Ends the process if it waits too long for the others; an interrupt ends it at once.

  One that comes late cannot be distinguished from one that has died before it came.
  """
  said = f'{who} has not come within {seconds} s (--join_timeout). {why}? This process ends too.'
  timer = threading.Timer(seconds, end, [said, LOST_PEER])
  timer.daemon = True
  timer.start()
  before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait as well
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
    timer.cancel()


def first_does(action: Callable[[], object]):
  """Runs `action` on the run's first process alone; if it fails there, it fails on all.

  Raises:
    ValueError, access_errors(): as raised there; elsewhere, a ValueError that says where to look.
  """
  error = None
  if jax.process_index() == 0:
    try:
      action()
    except (ValueError, *access_errors()) as raised:
      error = raised
  if multihost_utils.broadcast_one_to_all(np.array(error is not None)):
    raise error or ValueError('process 0 has failed, and says why')


def check_agreement(values: Mapping[str, Any]):
  """Checks that all processes of the run come with the same values, which JSON can hold.

  Every process calls it at the same point.

  Raises:
    ValueError: one differs from the first process; names it, and what differs.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(values, sort_keys=True)
  peers().post('values', text)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  digests = np.asarray(multihost_utils.process_allgather(digest))
  for other in np.flatnonzero((digests != digests[0]).any(axis=1)):
    notes = peers().notes('values')
    first, differing = json.loads(notes[0]), json.loads(notes[int(other)])
    name = next(n for n in sorted(first | differing) if first.get(n) != differing.get(n))
    raise ValueError(
      f'process {other} of {len(digests)} has {name}={differing.get(name)!r}, where process 0 has '
      f'{first.get(name)!r}: start all of them with the same command, on the same data and storage'
    )


def _is_cloud_tpu() -> bool:
  """Whether this is a worker of a Cloud TPU slice, and the run is to use its chips."""
  # jax sets this on import where it finds TPU chips and libtpu.
  has_chips = os.environ.get('TPU_ML_PLATFORM') == 'JAX'
  platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
  is_wanted = 'tpu' in (platforms or 'tpu')
  # Either GKE names the workers, or the VM's metadata does, where there is any.
  has_workers = 'TPU_WORKER_HOSTNAMES' in os.environ or 'TPU_SKIP_MDS_QUERY' not in os.environ
  return has_chips and is_wanted and has_workers


def _own_address() -> str:
  """The address by which the network's other machines reach this one."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(_METADATA_SERVER)  # of a datagram socket: picks the interface, sends nothing
    return probe.getsockname()[0]
