"""Named tensors of a checkpoint <-> arrays of a model, stacked over layers and sharded or not.

A table gives the checkpoint name of each array, and whether it is stored transposed. `{}` in a name
stands for the index on the leading axis of layers.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from dpo_flax.files.messages import shown, shown_list
from dpo_flax.huggingface.tensor_files import DTYPES, TensorFile
from dpo_flax.model.quantization import ChannelScale, quantize, scale_path
from dpo_flax.sharding import named_shardings

Table = Mapping[str, tuple[str, bool]]  # dotted parameter path -> (checkpoint name, transposed)
Span = tuple[int, int]
Path = tuple[Any, ...]  # of a variable in a state

READ_BYTES = 64 * 2**20  # of one tensor, read at once
QUANTIZED_ROWS = 64  # at once: their float32 copies stay in the processor's cache
READERS = 8  # threads; one stream alone does not saturate a bucket


@dataclasses.dataclass(frozen=True)
class Slot:
  """Which part of a model's arrays one tensor of a checkpoint is."""

  path: Path  # of the array
  layer: int | None  # its index there; None: the array is not stacked
  sizes: tuple[int, ...]  # of the array without its layers; a factor's rank may be less than there
  transposed: bool
  repeats: str | None = None  # the name of another tensor that is the same part

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the tensor."""
    return self.sizes[::-1] if self.transposed else self.sizes

  @property
  def scales(self) -> 'Slot':
    """The slot of the scales beside int8 weights: one for each row of the tensor."""
    return dataclasses.replace(self, path=scale_path(self.path), sizes=self.shape[:1])


def layer_slots(
  path: Path, shape: tuple[int, ...], hf_name: str, *, transposed: bool
) -> dict[str, Slot]:
  """Returns the slots of one array by checkpoint name: one for each layer that it has."""
  if '{}' not in hf_name:
    return {hf_name: Slot(path, None, tuple(shape), transposed)}
  return {
    hf_name.format(layer): Slot(path, layer, tuple(shape[1:]), transposed)
    for layer in range(shape[0])
  }


def make_slots(state: nnx.State, table: Table) -> dict[str, Slot]:
  """Returns where each tensor belongs in `state`, by checkpoint name."""
  slots = {}
  for path, variable in nnx.to_flat_state(state):
    if not isinstance(variable, ChannelScale):  # which follows from the weights
      hf_name, transposed = table['.'.join(map(str, path))]
      slots |= layer_slots(path, variable.shape, hf_name, transposed=transposed)
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
  a time; what no tensor fills is 0. What is to be int8 is quantized there, so that its scales are
  known.

  Raises:
    ValueError: a tensor that repeats another one differs from it.
  """
  parts: dict[tuple, list] = collections.defaultdict(list)
  for name, slot in slots.items():
    if slot.repeats is None:
      parts[slot.path].append((slot, tensors[name]))
    else:
      _check_repeats(tensors[name], tensors[slot.repeats], slot, slots[slot.repeats])
  shardings = dict(nnx.to_flat_state(named_shardings(abstract, mesh)))
  variables = dict(nnx.to_flat_state(abstract))
  loaded = {}
  for path, tensors_of_path in parts.items():
    paths = [each for each in (path, scale_path(path)) if each in variables]
    arrays = [_Shards(variables[each], shardings[each].get_value()) for each in paths]
    with ThreadPoolExecutor(READERS) as pool:
      list(pool.map(lambda part, arrays=arrays: _fill(arrays, *part), tensors_of_path))
    for each, array in zip(paths, arrays, strict=True):
      # Waiting here keeps two arrays from being in host memory together.
      loaded[each] = variables[each].replace(jax.block_until_ready(array.hand_over()))
  return nnx.from_flat_state([(path, loaded[path]) for path in variables])


def gather(array: jax.Array | np.ndarray) -> np.ndarray:
  """Returns a complete array on every host; all processes must call it together."""
  if isinstance(array, np.ndarray) or array.is_fully_addressable:
    return np.asarray(jax.device_get(array))
  return multihost_utils.process_allgather(array, tiled=True)


def gather_slot(variables: Mapping[Any, nnx.Variable], slot: Slot) -> np.ndarray:
  """Gathers the tensor of one slot, oriented as in the checkpoint.

  All processes must call it together.
  """
  array = variables[slot.path][...]
  part = gather(array if slot.layer is None else array[slot.layer])
  part = part[tuple(slice(size) for size in slot.sizes)]
  return part.T if slot.transposed else part


def write_gathered(
  directory: epath.PathLike,  # made if it is missing
  arrays: Iterator[Any],  # each gathered when it is asked for; None but in process 0, if so
  write: Callable[[epath.Path, Iterator[np.ndarray]], None],
) -> None:
  """Calls `write` in process 0; the others take part in gathering, and all wait for its end."""
  if jax.process_index() == 0:
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory, arrays)
  else:
    for _ in arrays:
      pass
  multihost_utils.sync_global_devices(f'wrote {directory}')


def equal_tensors(left: TensorFile, right: TensorFile) -> bool:
  """Whether two tensors have the same dtype, shape and values."""
  rows = left.shape[0]
  return (left.dtype, left.shape) == (right.dtype, right.shape) and all(
    np.array_equal(left.read(start, stop), right.read(start, stop))
    for start, stop in ((start, min(start + 4096, rows)) for start in range(0, rows, 4096))
  )


def _check_repeats(tensor: TensorFile, first: TensorFile, slot: Slot, first_slot: Slot) -> None:
  values = [each.read(0, each.shape[0]).astype(np.float32) for each in (tensor, first)]
  if slot.transposed != first_slot.transposed:
    values[0] = values[0].T
  if not np.array_equal(values[0], values[1]):
    raise ValueError(
      f"{tensor.path}: ensure_weight_tying, but {tensor.name} is not the token table's"
    )


class _Shards:
  """The parts of one array that this host's devices hold, to be filled in memory."""

  def __init__(self, variable: nnx.Variable, sharding: Sharding):
    self._shape, self._sharding = variable.shape, sharding
    indices = sharding.addressable_devices_indices_map(self._shape).values()
    # Devices that hold the same part share it.
    self._parts = {
      spans: np.zeros([stop - start for start, stop in spans], variable.dtype)
      for spans in map(self._spans, indices)
    }

  def views(self, slot: Slot) -> list[tuple[list[Span], np.ndarray]]:
    """Returns what goes where of one tensor: its rows and columns, and the memory for them."""
    found = []
    for held, part in self._parts.items():
      spans, view = list(held), part
      if slot.layer is not None:
        first, end = spans.pop(0)
        if not first <= slot.layer < end:
          continue
        view = part[slot.layer - first]
      spans = [
        (start, min(end, size)) for (start, end), size in zip(spans, slot.sizes, strict=True)
      ]
      view = view[tuple(slice(end - start) for start, end in spans)]
      found.append((spans[::-1], view.T) if slot.transposed else (spans, view))
    return found

  def hand_over(self) -> jax.Array:
    """Returns the array, once all parts are filled."""
    return jax.make_array_from_callback(
      self._shape, self._sharding, lambda index: self._parts[self._spans(index)]
    )

  def _spans(self, index: tuple[slice, ...] | None) -> tuple[Span, ...]:
    assert index is not None, 'of a device of another process'
    return tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))


def _fill(arrays: Sequence[_Shards], slot: Slot, tensor: TensorFile) -> None:
  """Copies one tensor into the parts of an array, or quantizes it into those of two."""
  slots = (slot, slot.scales)[: len(arrays)]
  targets = [shards.views(each) for shards, each in zip(arrays, slots, strict=True)]
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
