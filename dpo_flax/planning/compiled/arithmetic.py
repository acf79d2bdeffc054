"""Floating-point operations of the matrix products in a compiled program."""

import math
import re

import numpy as np

from dpo_flax.planning.compiled.hlo import Instruction


def matrix_flops(instruction: Instruction) -> float:
  """Returns 2 x multiplications of a `dot` or `convolution`; 0 for anything else.

  The compiler for TPU turns every matrix product into a convolution.
  """
  if instruction.opcode == 'dot':
    left = instruction.inputs[0].arrays[0].dims
    axes = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
    contracted = math.prod(left[int(axis)] for axis in axes.split(',') if axis)
    return 2.0 * instruction.arrays[0].size * contracted
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction)
  return 0.0


def _convolution_flops(instruction: Instruction) -> float:
  left, kernel = (one.arrays[0].dims for one in instruction.inputs)
  out = instruction.arrays[0]
  labels = re.split('_|->', instruction.required(r'dim_labels=(\w+_\w+->\w+)'))
  products = float(kernel[labels[1].index('i')])  # per group, if there are groups
  window = instruction.attribute(r'window=\{([^}]*)\}') or ''
  fields = dict(field.split('=') for field in window.split())
  for axis, size in enumerate(_numbers(fields.get('size', ''))):
    of_axis = {
      name: _numbers(fields[name])[axis] if name in fields else 1
      for name in ('stride', 'lhs_dilate', 'rhs_dilate')
    }
    low = int(fields['pad'].split('x')[axis].split('_')[0]) if 'pad' in fields else 0
    sizes = left[labels[0].index(str(axis))], out.dims[labels[2].index(str(axis))]
    products *= _mean_hits(size, *sizes, low, **of_axis)
  return 2.0 * out.size * products


def _mean_hits(  # noqa: PLR0917
  size: int, inputs: int, outputs: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> float:
  """Returns how many positions of a window hold an input, averaged over the outputs.

  The others are padding or lie between dilated inputs: a product of batches is a convolution
  whose window mostly looks at these.
  """
  if size == 1:
    return 1.0
  position = (np.arange(outputs) * stride - low)[:, None] + np.arange(size) * rhs_dilate
  hit = (position >= 0) & (position % lhs_dilate == 0) & (position // lhs_dilate < inputs)
  return float(hit.sum() / outputs)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split('x') if number]
