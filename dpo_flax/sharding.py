"""The device mesh and where every array lives on it.

Modules name the logical axes of their weights and activations; `RULES` alone states which mesh axis
each is split over. Rows of a batch are split over `data` and `fsdp` together, weights over `fsdp`
and `tensor`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core.spmd
import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Devices = Sequence[Any]  # of jax.Device, which is no type for a checker

AXES = ('data', 'fsdp', 'tensor')

ROW_AXES = ('data', 'fsdp')

RULES = (
  ('rows', ROW_AXES),
  ('tokens', None),
  ('embed', 'fsdp'),
  ('activation', None),  # the embed axis of activations: `fsdp` already splits their rows
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('adapter', ('tensor', 'fsdp')),  # heads, kv_heads or mlp of an adapter: its one long axis
  ('rank', None),
  ('norm', None),
  ('layers', None),
)


def make_mesh(
  sizes: Mapping[str, int],  # axis of AXES -> devices along it; one may be -1: the rest
  devices: Devices | None = None,
) -> Mesh:
  """Returns a mesh over `devices` (default: all of them).

  An axis that is left out has the size 1. TPUs of several slices are joined by the data centre's
  network alone: `data` goes over it.

  >>> mesh = make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})
  >>> mesh.shape['fsdp'] == len(jax.devices())
  True

  Raises:
    ValueError: there is no such axis; the sizes do not multiply to the number of devices, or `data`
      not over the slices.
  """
  devices = jax.devices() if devices is None else devices
  if unknown := set(sizes) - set(AXES):
    raise ValueError(f'a mesh has the axes {", ".join(AXES)}, not {", ".join(sorted(unknown))}')
  shape = [sizes.get(axis, 1) for axis in AXES]
  asked = ' x '.join(f'mesh.{axis}={size}' for axis, size in zip(AXES, shape, strict=True))
  known = int(np.prod([size for size in shape if size != -1]))
  if shape.count(-1) > 1 or known < 1 or min(shape) < -1:
    raise ValueError(f'{asked}: sizes are positive, and one of them may be -1 (the rest)')
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if int(np.prod(shape)) != len(devices):
    raise ValueError(
      f'{asked} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}'
    )
  # jax.make_mesh would declare Explicit axes; the compiler places our activations (Auto).
  axis_types = (AxisType.Auto,) * len(AXES)
  # TPUs alone: other devices call a host a slice. A topology of one slice does not number it.
  tpus = [device for device in devices if device.platform == 'tpu']
  slices = len({getattr(device, 'slice_index', 0) for device in tpus})
  if slices < 2:
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
  data, *inside = shape
  if data % slices:
    raise ValueError(
      f'{asked} on {slices} slices: make mesh.data a multiple of {slices}, so that their slow '
      "network carries the adapters' gradients and no weights"
    )
  grid = mesh_utils.create_hybrid_device_mesh((data // slices, *inside), (slices, 1, 1), devices)
  return Mesh(grid, AXES, axis_types=axis_types)


def named_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns a sharding for every array of `tree`, from the logical axes its variables declare.

  Arrays that are no nnx Variables, or declare no axes, are replicated.

  Raises:
    ValueError: the mesh does not divide an array's axis.
  """
  with flax.core.spmd.logical_axis_rules(RULES):
    shardings = nnx.get_named_sharding(tree, mesh)
  jax.tree.map_with_path(_check_divides, shardings, tree)
  return shardings


def _check_divides(path: tuple, sharding: NamedSharding, array: jax.Array):
  for size, split in zip(array.shape, sharding.spec, strict=False):
    axes = (split,) if isinstance(split, str) else split or ()
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if size % parts:
      name = jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
      asked = ' x '.join(f'mesh.{axis}={sharding.mesh.shape[axis]}' for axis in axes)
      raise ValueError(f'{asked} does not divide an axis of {size} in {name} {list(array.shape)}')


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch field: [B, ...] split over its rows."""
  return NamedSharding(mesh, partition_spec('rows'))


def constrain(array: jax.Array, *axes: str) -> jax.Array:
  """Places an activation by its logical axes on the mesh of `jax.set_mesh`, if there is one."""
  if jax.sharding.get_abstract_mesh().empty:
    return array
  return jax.lax.with_sharding_constraint(array, partition_spec(*axes))


def row_parts(mesh: Mesh) -> int:
  """Returns into how many parts the mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def row_shard(mesh: Mesh) -> tuple[tuple[int, ...], int]:
  """Returns (indices, count): which of `count` equal blocks of a batch's rows this process feeds.

  A process's devices are neighbours on the chip grid, not in the mesh: its blocks may lie apart.
  Processes that differ only along `tensor` hold the same rows and get the same indices.
  """
  blocks = np.moveaxis(mesh.devices, AXES.index('tensor'), -1).reshape(-1, mesh.shape['tensor'])
  process = jax.process_index()
  mine = [i for i, block in enumerate(blocks) if any(d.process_index == process for d in block)]
  return tuple(mine), len(blocks)


def shard_batch(batch: Mapping[str, np.ndarray | jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices; together they are the global [B, ...].

  Args:
    batch: the rows of this process's blocks, block after block.
    mesh: where they go.

  Raises:
    ValueError: the rows cannot be divided equally among this process's blocks.
  """
  sharding = row_sharding(mesh)
  mine, count = row_shard(mesh)
  rows = len(next(iter(batch.values())))
  if rows % len(mine):
    raise ValueError(f'{rows} rows cannot be split over {len(mine)} devices: add empty rows')

  def put(local: np.ndarray | jax.Array) -> jax.Array:
    size = len(local) // len(mine)  # rows of a block
    shape = (size * count, *local.shape[1:])

    def block(index: Any) -> np.ndarray | jax.Array:  # slices, one for each axis
      start = size * mine.index(index[0].indices(shape[0])[0] // size)
      return local[start : start + size]

    return jax.make_array_from_callback(shape, sharding, block)

  return {name: put(value) for name, value in batch.items()}


def partition_spec(*axes: str) -> PartitionSpec:
  """Returns how the mesh splits an array with these logical axes."""
  rules = dict(RULES)
  return PartitionSpec(*(rules[axis] for axis in axes))
