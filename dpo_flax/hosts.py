"""One run on several hosts: how its processes find one another before jax looks for devices.

On Cloud TPU the environment tells. Elsewhere every process is told, here for the second of two:

    --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1

Without these a run is one process that listens to nobody.
"""

import os
import socket

import jax
from absl import flags

_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port where process 0 listens, and on no other address.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes of the run, all together.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'This one among them, from 0.')

_CLOUD_TPU_PORT = '8482'  # jax's own choice
_METADATA_SERVER = ('169.254.169.254', 80)  # that of any Google Cloud VM


def connect():
  """Joins the run's other processes, if there are any.

  Raises:
    ValueError: the flags are incomplete or contradict each other.
  """
  given = {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
  if any(value is not None for value in given.values()):
    _connect_as_told(**given)
  elif _is_cloud_tpu():
    port = os.environ.get('JAX_COORDINATOR_PORT', _CLOUD_TPU_PORT)
    # jax would listen on every interface; the other workers know this one.
    jax.distributed.initialize(coordinator_bind_address=f'{_own_address()}:{port}')


def _connect_as_told(coordinator: str | None, num_processes: int | None, process_id: int | None):
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if missing:
    raise ValueError(f'a run of several processes also needs {", ".join(missing)}')
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id}: with --num_processes={num_processes} it is one of '
      f'0 ... {num_processes - 1}'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(f'--coordinator={coordinator}: expected host:port of process 0')
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    coordinator_bind_address=coordinator,
    cluster_detection_method='deactivate',
  )


def _is_cloud_tpu() -> bool:
  """Whether this is a worker of a Cloud TPU slice, and the run is to use its chips."""
  # jax sets this on import where it finds TPU chips and libtpu.
  has_chips = os.environ.get('TPU_ML_PLATFORM') == 'JAX'
  is_wanted = 'tpu' in (jax.config.jax_platforms or 'tpu')
  # Either GKE names the workers, or the VM's metadata does, where there is any.
  has_workers = 'TPU_WORKER_HOSTNAMES' in os.environ or 'TPU_SKIP_MDS_QUERY' not in os.environ
  return has_chips and is_wanted and has_workers


def _own_address() -> str:
  """The address by which the network's other machines reach this one."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(_METADATA_SERVER)  # of a datagram socket: picks the interface, sends nothing
    return probe.getsockname()[0]
