"""What to lower when a step does not fit into the devices' memory."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dpo_flax.planning.estimate import remedies


class OutOfMemoryError(ValueError):
  """The devices hold less than a step needs."""


@contextlib.contextmanager
def explained(config: ConfigDict, *held: Any) -> Iterator[None]:
  """Turns the device's refusal into figures and remedies, the cheapest first.

  Args:
    config: the run's.
    held: trees of what lies on the devices from the first step to the last.

  Raises:
    OutOfMemoryError: something inside did not fit.
  """
  # Before anything can be donated, and so be gone.
  bytes_held = sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(held))
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    device = jax.local_devices()[0]
    capacity = (device.memory_stats() or {}).get('bytes_limit')
    changes = remedies(
      config, jax.devices(), temporaries_matter=capacity is None or bytes_held < capacity
    )
    raise OutOfMemoryError(
      f'out of memory on {device.device_kind}: {str(error).partition(chr(10))[0]}\n'
      + _share(bytes_held, capacity)
      + 'What makes it smaller, the cheapest first:\n  '
      + '\n  '.join(changes)
      + '\npython -m dpo_flax.plan measures each of them for a TPU, without one.'
    ) from error


def _share(held: int, capacity: int | None) -> str:
  """Says what is left for a step; nothing before the weights are there."""
  if not held:
    return ''
  whole = f'the {capacity / 2**30:.1f} GiB of ' if capacity else ''
  return (
    f'Weights, adapters and optimizer take {held / 2**30:.2f} GiB of {whole}each device; the rest '
    'is for the step. '
  )


def _bytes_on_a_device(array: jax.Array) -> int:
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
