"""int8 base weights: symmetric, one float32 scale for each output channel.

A scale belongs to all inputs of a channel, so it factors out of the product: x W = (x Q) * scale.
The matrix unit reads Q, converted on its way in; no float copy of W exists.
"""

from typing import Any

import numpy as np
from flax import nnx

LARGEST = 127  # -128 stays unused, so that the range is symmetric
# A channel of less than this counts as zeros: devices have no float32 small enough for its scale.
SMALLEST = LARGEST * float(np.finfo(np.float32).tiny)


class ChannelScale(nnx.Param):
  """What int8 weights are multiplied by; derived from them, and in no checkpoint."""


def quantize(
  weights: Any,  # a NumPy or JAX array
  axis: int,
) -> tuple[Any, Any]:  # arrays of the same library
  """Returns int8 weights, and float32 scales without `axis`, the one of a channel's inputs.

  weights = quantized * scales to within scales / 2, and exactly where they are 0 or the largest of
  their channel.
  """
  wide = weights.astype('float32')
  largest = abs(wide).max(axis=axis, keepdims=True)
  is_zero = largest < SMALLEST
  scales = largest / LARGEST * ~is_zero + is_zero  # a channel of zeros keeps them
  quantized = (wide / scales).round().clip(-LARGEST, LARGEST).astype('int8')
  return quantized, scales.squeeze(axis)


def scale_path(path: tuple[str, ...]) -> tuple[str, ...]:
  """Returns where a module keeps the scales of its weights at `path`."""
  return (*path[:-1], f'{path[-1]}_scale')
