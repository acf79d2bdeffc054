"""jax's coordinator: the process that all processes of a run are connected to, and its notes.

`jax.distributed` starts it and connects to it, but gives no public name to the store of keys and
values by which processes can talk outside of collectives, nor to what was agreed on. Orbax uses
the same private module. Every use of jax._src is in this file, because it may move.
"""

from jax._src import distributed


def membership() -> tuple[int, int]:
  """Returns this process's index and how many there are, without looking for devices."""
  state = distributed.global_state
  return state.process_id, state.num_processes


def address() -> tuple[str, int]:
  """Returns host and port of the coordinator, once this process is connected."""
  host, _, port = str(distributed.global_state.coordinator_address).rpartition(':')
  return host, int(port)


def write(key: str, value: str):
  """Stores a value for all processes, over an earlier one.

  Raises:
    jax.errors.JaxRuntimeError: the coordinator does not answer.
  """
  _client().key_value_set(key, value, allow_overwrite=True)


def read_directory(prefix: str) -> dict[str, str]:
  """Returns key -> value of all keys below a prefix that ends in '/'.

  Raises:
    jax.errors.JaxRuntimeError: the coordinator does not answer.
  """
  return dict(_client().key_value_dir_get(prefix))


def _client():
  client = distributed.global_state.client
  assert client is not None, 'jax.distributed.initialize has not been called'
  return client
