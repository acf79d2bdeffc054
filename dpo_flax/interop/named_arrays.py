"""Named tensors of another format <-> our arrays, which may be stacked over layers and sharded.

A table says for each of our arrays what the others call it and whether they store it transposed.
`{}` in a name stands for the index on our leading axis of layers.
"""

import dataclasses
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from dpo_flax.interop.tensor_files import DTYPES, TensorFile
from dpo_flax.sharding import named_shardings

Table = Mapping[str, tuple[str, bool]]  # our dotted path -> (their name, transposed)
Span = tuple[int, int]

READ_BYTES = 64 * 2**20  # of one tensor, read at once
READERS = 8  # threads; one stream alone does not saturate a bucket


@dataclasses.dataclass(frozen=True)
class Slot:
  """The place of one of their tensors in our arrays."""

  path: tuple[str, ...]  # of our array
  layer: int | None  # its index there; None: the array is not stacked
  shape: tuple[int, ...]  # of their tensor
  transposed: bool


def make_slots(state: nnx.State, table: Table) -> dict[str, Slot]:
  """Returns where each of their tensors belongs in `state`, by their names."""
  slots = {}
  for path, variable in nnx.to_flat_state(state):
    theirs, transposed = table['.'.join(path)]
    stacked = '{}' in theirs
    shape = tuple(variable.shape[stacked:])
    shape = shape[::-1] if transposed else shape
    for layer in range(variable.shape[0]) if stacked else (None,):
      slots[theirs.format(layer)] = Slot(path, layer, shape, transposed)
  return slots


def match(
  tensors: Mapping[str, TensorFile],
  slots: Mapping[str, Slot],
  *,
  harmless: re.Pattern,  # names of tensors that may be there and are not read
  where: str,
) -> None:
  """Checks that `tensors` fills `slots` exactly.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  faults = [f'{name}: missing' for name in slots if name not in tensors]
  for name, tensor in tensors.items():
    if name not in slots:
      if not harmless.fullmatch(name):
        faults.append(f'{name}: unexpected')
    elif tensor.shape != slots[name].shape:
      faults.append(f'{name}: shape {list(tensor.shape)}, expected {list(slots[name].shape)}')
    elif tensor.dtype not in DTYPES:
      faults.append(f'{name}: dtype {tensor.dtype}, expected one of {", ".join(DTYPES)}')
  if faults:
    raise ValueError(f'{where} does not fit the model:\n  ' + '\n  '.join(faults))


def load_arrays(
  tensors: Mapping[str, TensorFile], slots: Mapping[str, Slot], abstract: nnx.State, mesh: Mesh
) -> nnx.State:
  """Reads `abstract`'s arrays, cast to its dtypes and placed by its logical axes.

  Each host reads only the rows that its devices need, once, and holds its part of one array at
  a time.
  """
  parts: dict[tuple, list] = {}
  for name, slot in slots.items():
    parts.setdefault(slot.path, []).append((slot, tensors[name]))
  shardings = dict(nnx.to_flat_state(named_shardings(abstract, mesh)))
  loaded = []
  for path, variable in nnx.to_flat_state(abstract):
    array = _load_array(parts[path], variable, shardings[path].get_value())
    # Waiting here keeps two arrays from being in host memory together.
    loaded.append((path, variable.replace(jax.block_until_ready(array))))
  return nnx.from_flat_state(loaded)


def gather(array: jax.Array) -> np.ndarray:
  """Returns a whole array on every host; all processes must call it together."""
  if array.is_fully_addressable:
    return np.asarray(jax.device_get(array))
  return multihost_utils.process_allgather(array, tiled=True)


def gather_slot(state: nnx.State, slot: Slot) -> np.ndarray:
  """Gathers the tensor of one slot, in their orientation."""
  array = dict(nnx.to_flat_state(state))[slot.path][...]
  whole = gather(array if slot.layer is None else array[slot.layer])
  return whole.T if slot.transposed else whole


def _load_array(
  parts: list[tuple[Slot, TensorFile]], variable: nnx.Variable, sharding: Sharding
) -> jax.Array:
  """Fills the shards of this host's devices, then hands them over."""
  shape, dtype = variable.shape, variable.dtype

  def spans(index: tuple[slice, ...]) -> tuple[Span, ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

  # Devices that hold the same part share it.
  places = {spans(index) for index in sharding.addressable_devices_indices_map(shape).values()}
  shards = {place: np.empty([stop - start for start, stop in place], dtype) for place in places}
  with ThreadPoolExecutor(READERS) as pool:
    list(pool.map(lambda part: _fill(shards, *part), parts))
  return jax.make_array_from_callback(shape, sharding, lambda index: shards[spans(index)])


def _fill(shards: Mapping[tuple[Span, ...], np.ndarray], slot: Slot, tensor: TensorFile) -> None:
  """Copies one tensor into the shards that hold a part of it."""
  views = []  # (the part as their rows and columns, where it goes)
  for place, shard in shards.items():
    spans, view = list(place), shard
    if slot.layer is not None:
      first, end = spans.pop(0)
      if not first <= slot.layer < end:
        continue
      view = shard[slot.layer - first]
    views.append((spans[::-1], view.T) if slot.transposed else (spans, view))
  start = min(rows[0] for (rows, *_), _ in views)
  stop = max(rows[1] for (rows, *_), _ in views)
  step = max(1, READ_BYTES // tensor.row_bytes)
  for low in range(start, stop, step):
    high = min(low + step, stop)
    block = tensor.read(low, high)
    for (rows, *columns), view in views:
      first, end = max(low, rows[0]), min(high, rows[1])
      if first < end:
        part = block[(slice(first - low, end - low), *(slice(*span) for span in columns))]
        view[first - rows[0] : end - rows[0]] = part
