"""The memory of one device: what arrays take of it, and errors of too little."""

import math
from typing import Any

import jax


def is_out_of_memory(error: Exception) -> bool:
  """Whether a jax.errors.JaxRuntimeError is of too little memory. It has a text and no code.

  >>> is_out_of_memory(RuntimeError('RESOURCE_EXHAUSTED: Attempting to allocate 20.0G'))
  True
  """
  return 'RESOURCE_EXHAUSTED' in str(error)


def bytes_on_a_device(tree: Any) -> int:
  """Returns what one device holds of a tree of sharded arrays, or of the shapes of some."""
  return sum(
    math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for array in jax.tree.leaves(tree)
  )
