"""What to lower when a step does not fit into the devices' memory."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_flax.config.schema import Settings
from dpo_flax.config.sections import BatchSettings, ModelSettings
from dpo_flax.files.messages import shown_list
from dpo_flax.runtime.memory import bytes_on_a_device, is_out_of_memory
from dpo_flax.sharding import row_parts


class OutOfMemoryError(ValueError):
  """The devices hold less than a step needs."""


@contextlib.contextmanager
def explained(find_changes: Callable[..., list[str]], *held: Any) -> Iterator[None]:
  """Turns the device's refusal into figures and remedies, the cheapest first.

  Args:
    find_changes: `remedies` of the run's settings and mesh.
    held: trees of what lies on the devices from the first step to the last.

  Raises:
    OutOfMemoryError: something inside did not fit.
  """
  # Before anything can be donated, and so be gone.
  bytes_held = bytes_on_a_device(held)
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    device = jax.local_devices()[0]
    capacity = (device.memory_stats() or {}).get('bytes_limit')
    is_room_left = capacity is None or bytes_held < capacity
    changes = find_changes(temporaries_matter=is_room_left)
    raise OutOfMemoryError(
      f'out of memory on {device.device_kind}: {str(error).partition(chr(10))[0]}\n'
      + _share(bytes_held, capacity)
      + f'What makes it smaller, the cheapest first:{shown_list(changes)}'
      + '\npython -m dpo_flax.plan measures each of them for a TPU, without one.'
    ) from error


def _share(held: int, capacity: int | None) -> str:
  """Says what is left for a step; nothing before the weights are there."""
  if not held:
    return ''
  total = f'the {capacity / 2**30:.1f} GiB of ' if capacity else ''
  return (
    f'Weights, adapters and optimizer take {held / 2**30:.2f} GiB of {total}each device; the rest '
    'is for the step. '
  )


def remedies(settings: Settings, mesh: Mesh, *, temporaries_matter: bool) -> list[str]:
  """Returns what would make a step that does not fit smaller, the cheapest first.

  What is done already, or cannot be enough, is left out.
  """
  changes = []
  if temporaries_matter:
    changes += _smaller_temporaries(settings.batch, settings.model, row_parts(mesh))
  if settings.tuning.method == 'full':
    changes.append('config.tuning.method=lora: one frozen copy of the weights, no moments of them')
  elif settings.model.weight_dtype != 'int8':
    changes.append('config.model.weight_dtype=int8: base weights of one byte, rounded')
  if settings.mesh.data > 1:
    changes.append('config.mesh.data=1 and config.mesh.fsdp=-1: weights split over all chips')
  changes.append(f'more chips than {mesh.size}: each holds a smaller part of the weights')
  return changes


def _smaller_temporaries(batch: BatchSettings, model: ModelSettings, shards: int) -> list[str]:
  per_chip = batch.rows // (shards * batch.microbatches)
  found = []
  if model.remat in {'none', 'dots'}:
    found.append('config.model.remat=full: backward runs each layer forward once more')
  if model.remat != 'offload':
    found.append("config.model.remat=offload: each layer's input waits in the host's memory")
  if per_chip > 1:
    found.append(
      f'config.batch.microbatches={batch.rows // shards}: one row of a chip at a time instead of '
      f'{per_chip}, one after the other'
    )
  if model.logits_chunk > 128:
    found.append(
      f'config.model.logits_chunk={model.logits_chunk // 4}: fewer logits at once, the head is '
      'read more often'
    )
  if batch.tokens > 1024:
    found.append(
      f'config.batch.tokens={batch.tokens // 2}: shorter rows; longer pairs must be dropped or cut'
    )
  return found
