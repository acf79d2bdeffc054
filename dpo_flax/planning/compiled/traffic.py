"""Bytes that a compiled program moves: to and from HBM, and from other chips."""

import math
import re
from collections.abc import Iterable

from dpo_flax.planning.compiled.hlo import HBM, Array, Computation, Instruction

# Collective of n devices -> the bytes that a device gets from the others, as a multiple of those of
# its operands. An all-reduce counts as a reduce-scatter and an all-gather.
_RECEIVED = {
  'all-gather': lambda n: n - 1,
  'all-reduce': lambda n: 2 * ((n - 1) / n),
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
  'collective-broadcast': lambda n: 1,
}

# They name arrays, or run computations that are counted on their own.
_MOVES_NOTHING = frozenset().union(
  ['parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id'],
  ['while', 'conditional', 'call', 'opt-barrier', 'optimization-barrier'],
  ['async-start', 'async-update', 'async-done'],
)
_VIEWS = frozenset(['bitcast', 'reshape', 'get-tuple-element'])
_PARTIAL_READS = frozenset(['dynamic-slice', 'slice', 'gather'])
_ASYNC_FUSION = re.compile(r'custom_call_target="(AsyncCollective\w*)"')


def collective(opcode: str) -> str | None:
  """Returns which collective an opcode is or starts, if any."""
  name = opcode.removesuffix('-start')
  return name if name in _RECEIVED else None


def received_bytes(instruction: Instruction, num_partitions: int) -> float:
  """Returns what a device gets from others in a collective, if none of it is sent twice."""
  given = sum(array.bytes for one in instruction.inputs for array in one.arrays)
  received = _RECEIVED[instruction.opcode.removesuffix('-start')]
  return given * received(_group_size(instruction, num_partitions))


def _group_size(instruction: Instruction, num_partitions: int) -> int:
  """Returns how many devices take part together; XLA has four ways to write it."""
  text = instruction.attributes
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
    return int(iota.group(1))
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return len(listed.group(1).split(','))
  return num_partitions


def hbm_bytes(instruction: Instruction) -> float:
  """Returns the bytes an instruction reads from and writes to HBM, each array once.

  Of an operand that is only sliced, the slices count; of one updated in place, the update.
  """
  opcode, inputs = instruction.opcode, instruction.inputs
  other_call = opcode == 'custom-call' and 'tpu_custom_call' not in instruction.attributes
  if opcode in _MOVES_NOTHING or opcode.endswith('-start') or other_call:
    return 0.0
  if opcode == 'fusion':
    return _fusion_bytes(instruction)
  if opcode == 'dynamic-update-slice':
    return 2 * _size_in_hbm(inputs[1].arrays)
  written = _size_in_hbm(instruction.arrays)
  if opcode.endswith('-done'):
    (start,) = inputs
    inputs = start.inputs[:1]
  if opcode.endswith('-done') or opcode in _PARTIAL_READS:
    return written + _size(instruction.arrays) * _in_hbm(inputs[0].arrays)
  return written + sum(_size_in_hbm(one.arrays) for one in inputs)


def _fusion_bytes(fusion: Instruction) -> float:
  inner = fusion.runs[0]
  if _ASYNC_FUSION.search(inner.root.attributes):
    return 0.0
  read = sum(
    min(_read_of(inner, name), _size(one.arrays))
    for name, one in zip(inner.parameters, fusion.inputs, strict=True)
    if _in_hbm(one.arrays)
  )
  # A result that is an operand passed on costs nothing.
  aliased = {int(i or 0) for i in re.findall(r'\{(\d*)\}: \(\d+,', fusion.attributes)}
  if inner.root.opcode == 'tuple':
    parts = inner.root.inputs
  else:
    parts, aliased = [inner.root], set()
  written = sum(
    _written(part)
    for i, (part, array) in enumerate(zip(parts, fusion.arrays, strict=False))
    if array.space == HBM and i not in aliased
  )
  return read + written


def _read_of(computation: Computation, name: str) -> float:
  """Returns how many bytes of `name` the instructions of a fusion look at."""
  total = 0.0
  for user in computation.values():
    if name not in user.operands or user.opcode in {'tuple', 'custom-call'}:
      continue
    index = user.operands.index(name)
    if user.opcode in _VIEWS:
      total += _read_of(computation, user.name)
    elif user.opcode in _PARTIAL_READS and index == 0:
      total += _size(user.arrays)
    elif user.opcode == 'dynamic-update-slice' and index == 0:
      continue  # what is not updated stays where it is
    elif user.opcode == 'fusion':
      inner = user.runs[0]
      total += _read_of(inner, inner.parameters[index])
    elif not collective(user.opcode):
      total += _size(computation[name].arrays)
  return total


def _written(part: Instruction) -> float:
  if part.opcode in _VIEWS:
    return _written(part.inputs[0])
  if part.opcode == 'dynamic-update-slice':
    return _size(part.inputs[1].arrays)
  if part.opcode == 'fusion':
    return _written(part.runs[0].root)
  return 0.0 if part.opcode == 'parameter' else _size(part.arrays)


def _size(arrays: Iterable[Array]) -> float:
  return float(sum(array.bytes for array in arrays))


def _size_in_hbm(arrays: Iterable[Array]) -> float:
  return float(sum(array.bytes for array in arrays if array.space == HBM))


def _in_hbm(arrays: Iterable[Array]) -> bool:
  return any(array.space == HBM for array in arrays)
