"""How often a loop of a compiled program runs, found by running its counter."""

import re
from collections.abc import Callable

from dpo_flax.planning.compiled.hlo import Computation, Instruction, Program

_MOST_TRIPS = 100_000

_COPIES = frozenset(['copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done'])

_COMPARE = {
  'LT': lambda a, b: a < b,
  'LE': lambda a, b: a <= b,
  'GT': lambda a, b: a > b,
  'GE': lambda a, b: a >= b,
  'EQ': lambda a, b: a == b,
  'NE': lambda a, b: a != b,
}

_ARITHMETIC = {
  'add': lambda a, b: a + b,
  'subtract': lambda a, b: a - b,
  'multiply': lambda a, b: a * b,
  'minimum': min,
  'maximum': max,
  'and': lambda a, b: a & b,
  'or': lambda a, b: a | b,
}


class _UnknownError(Exception):
  """A value that depends on data."""


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
  """Returns how often a `while` runs its body; None where that depends on data."""
  known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
  if known:
    return int(known.group(1))
  condition, body = (
    program.computations[loop.required(rf'{name}=%?([\w.\-]+)')] for name in ('condition', 'body')
  )
  start = caller.get(loop.operands[0])
  try:
    state = _Counters(program, body, lambda index: _scalar(program, caller, start, index))
    for trips in range(_MOST_TRIPS):
      if not _evaluate(program, condition, condition.root, state.read):
        return trips
      state.advance()
  except _UnknownError:
    pass
  return None


class _Counters:
  """Those of a loop's variables that decide when it ends."""

  def __init__(self, program: Program, body: Computation, start: Callable[[int], int]):
    self.program, self.body, self.start = program, body, start
    self.values: dict[int, int] = {}
    self.trips = 0

  def read(self, parameter: int, index: int | None) -> int:
    """Returns variable `index`, following it from the start where it was not followed before."""
    if parameter or index is None:
      raise _UnknownError
    if index not in self.values:
      if self.trips:
        raise _UnknownError
      self.values[index] = self.start(index)
    return self.values[index]

  def advance(self):
    """Runs the body once."""
    done = 0
    while done < len(self.values):  # what a variable depends on joins them on the way
      done = len(self.values)
      after = {
        index: _scalar(self.program, self.body, self.body.root, index, self.read)
        for index in list(self.values)
      }
    self.values, self.trips = after, self.trips + 1


def _scalar(
  program: Program,
  computation: Computation,
  instruction: Instruction | None,  # that makes a tuple
  index: int,
  read: Callable[[int, int | None], int] | None = None,
) -> int:
  """Evaluates element `index` of a tuple."""
  if instruction is None or instruction.opcode != 'tuple':
    raise _UnknownError
  element = computation[instruction.operands[index]]
  return _evaluate(program, computation, element, read)


def _evaluate(
  program: Program,
  computation: Computation,
  instruction: Instruction,
  read: Callable[[int, int | None], int] | None,  # (parameter, element of it) -> value
) -> int:
  """Evaluates an integer that does not depend on data."""

  def value(one: Instruction) -> int:
    return _evaluate(program, computation, one, read)

  opcode, inputs = instruction.opcode, computation.inputs(instruction)
  if opcode == 'constant':
    return _literal(instruction.operands[0])
  if opcode in _COPIES:
    return value(inputs[0])
  if opcode == 'compare':
    return int(_COMPARE[instruction.required(r'direction=(\w+)')](*map(value, inputs)))
  if opcode in _ARITHMETIC:
    return _ARITHMETIC[opcode](*map(value, inputs))
  if opcode == 'fusion':
    inner = program.computations[instruction.called()[0]]
    return _evaluate(program, inner, inner.root, lambda parameter, _: value(inputs[parameter]))
  return _read(instruction, inputs, read)


def _read(
  instruction: Instruction, inputs: list[Instruction], read: Callable[[int, int | None], int] | None
) -> int:
  if read and instruction.opcode == 'parameter':
    return read(int(instruction.operands[0]), None)
  if read and instruction.opcode == 'get-tuple-element' and inputs[0].opcode == 'parameter':
    return read(int(inputs[0].operands[0]), int(instruction.required(r'index=(\d+)')))
  raise _UnknownError


def _literal(text: str) -> int:
  if text in {'true', 'false'}:
    return int(text == 'true')
  if not re.fullmatch(r'-?\d+', text):
    raise _UnknownError
  return int(text)
