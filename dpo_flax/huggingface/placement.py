"""Named tensors of another format <-> our arrays, which may be stacked over layers and sharded.

A table says for each of our arrays what the others call it and whether they store it transposed.
`{}` in a name stands for the index on our leading axis of layers.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from dpo_flax.files.messages import shown, shown_list
from dpo_flax.huggingface.tensor_files import DTYPES, TensorFile
from dpo_flax.model.quantization import ChannelScale, quantize, scale_path
from dpo_flax.sharding import named_shardings

Table = Mapping[str, tuple[str, bool]]  # our dotted path -> (their name, transposed)
Span = tuple[int, int]

READ_BYTES = 64 * 2**20  # of one tensor, read at once
QUANTIZED_ROWS = 64  # at once: their float32 copies stay in the processor's cache
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
    if isinstance(variable, ChannelScale):
      continue  # follows from the weights
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
        faults.append(f'{shown(name)}: unexpected')
    elif tensor.shape != slots[name].shape:
      faults.append(f'{name}: shape {list(tensor.shape)}, expected {list(slots[name].shape)}')
    elif tensor.dtype not in DTYPES:
      expected = ', '.join(DTYPES)
      faults.append(f'{name}: dtype {shown(tensor.dtype)}, expected one of {expected}')
  if faults:
    raise ValueError(f'{where} does not fit the model:{shown_list(faults)}')


def load_arrays(
  tensors: Mapping[str, TensorFile], slots: Mapping[str, Slot], abstract: nnx.State, mesh: Mesh
) -> nnx.State:
  """Reads `abstract`'s arrays, cast to its dtypes and placed by its logical axes.

  Each host reads only the rows that its devices need, once, and holds its part of one array at
  a time. What is to be int8 is quantized there, so that its scales are known.
  """
  parts: dict[tuple, list] = {}
  for name, slot in slots.items():
    parts.setdefault(slot.path, []).append((slot, tensors[name]))
  shardings = dict(nnx.to_flat_state(named_shardings(abstract, mesh)))
  variables = dict(nnx.to_flat_state(abstract))
  loaded = {}
  for path, tensors_of_path in parts.items():
    paths = [place for place in (path, scale_path(path)) if place in variables]
    arrays = [_Shards(variables[place], shardings[place].get_value()) for place in paths]
    with ThreadPoolExecutor(READERS) as pool:
      list(pool.map(lambda part, arrays=arrays: _fill(arrays, *part), tensors_of_path))
    for place, array in zip(paths, arrays, strict=True):
      # Waiting here keeps two arrays from being in host memory together.
      loaded[place] = variables[place].replace(jax.block_until_ready(array.hand_over()))
  return nnx.from_flat_state([(path, loaded[path]) for path in variables])


def gather(array: jax.Array | np.ndarray) -> np.ndarray:
  """Returns a whole array on every host; all processes must call it together."""
  if isinstance(array, np.ndarray) or array.is_fully_addressable:
    return np.asarray(jax.device_get(array))
  return multihost_utils.process_allgather(array, tiled=True)


def gather_slot(state: nnx.State, slot: Slot) -> np.ndarray:
  """Gathers the tensor of one slot, in their orientation."""
  array = dict(nnx.to_flat_state(state))[slot.path][...]
  whole = gather(array if slot.layer is None else array[slot.layer])
  return whole.T if slot.transposed else whole


class _Shards:
  """The parts of one array that this host's devices hold, to be filled in memory."""

  def __init__(self, variable: nnx.Variable, sharding: Sharding):
    self._shape, self._sharding = variable.shape, sharding
    places = sharding.addressable_devices_indices_map(self._shape).values()
    # Devices that hold the same part share it.
    self._parts = {
      place: np.empty([stop - start for start, stop in place], variable.dtype)
      for place in map(self._spans, places)
    }

  def views(self, slot: Slot) -> list[tuple[list[Span], np.ndarray]]:
    """Returns what goes where of one tensor: its rows and columns, and the memory for them."""
    found = []
    for place, part in self._parts.items():
      spans, view = list(place), part
      if slot.layer is not None:
        first, end = spans.pop(0)
        if not first <= slot.layer < end:
          continue
        view = part[slot.layer - first]
      found.append((spans[::-1], view.T) if slot.transposed else (spans, view))
    return found

  def hand_over(self) -> jax.Array:
    """Returns the array, once all parts are filled."""
    return jax.make_array_from_callback(
      self._shape, self._sharding, lambda index: self._parts[self._spans(index)]
    )

  def _spans(self, index: tuple[slice, ...]) -> tuple[Span, ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))


def _fill(arrays: Sequence[_Shards], slot: Slot, tensor: TensorFile) -> None:
  """Copies one tensor into the parts of an array, or quantizes it into those of two."""
  targets = [shards.views(slot) for shards in arrays]
  start = min(rows[0] for (rows, *_), _ in targets[0])
  stop = max(rows[1] for (rows, *_), _ in targets[0])
  step = max(1, READ_BYTES // tensor.row_bytes)
  for low in range(start, stop, step):
    high = min(low + step, stop)
    block = tensor.read(low, high)
    blocks = [block] if len(arrays) == 1 else _quantize_rows(block)
    for values, views in zip(blocks, targets, strict=True):
      for (rows, *columns), view in views:
        first, end = max(low, rows[0]), min(high, rows[1])
        if first < end:
          part = values[(slice(first - low, end - low), *(slice(*span) for span in columns))]
          view[first - rows[0] : end - rows[0]] = part


def _quantize_rows(block: np.ndarray) -> list[np.ndarray]:
  """Returns int8 rows and their scales: on disk, a row is all that one channel weighs."""
  starts = range(0, len(block), QUANTIZED_ROWS)
  parts = [quantize(block[start : start + QUANTIZED_ROWS], axis=1) for start in starts]
  return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
