"""How often a loop of a compiled program runs, found by running its counter."""

import re
from collections.abc import Callable

from dpo_flax.planning.compiled.hlo import Computation, Instruction

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


# (number of a parameter, element of it; None: all of it) -> value
_Read = Callable[[int, int | None], int]


class _UnknownError(Exception):
  """A value that depends on data."""


def _unknown(*_) -> int:
  raise _UnknownError


def trip_count(loop: Instruction) -> int | None:
  """Returns how often a `while` runs its body; None where that depends on data."""
  known = loop.attribute(r'"known_trip_count":\{"n":"?(\d+)')
  if known:
    return int(known)
  condition, body = (
    loop.computation.siblings[loop.required(rf'{name}=%?([\w.\-]+)')]
    for name in ('condition', 'body')
  )
  start = loop.computation.get(loop.operands[0])
  counters = _Counters(body, lambda index: _element(start, index, _unknown))
  try:
    for trips in range(_MOST_TRIPS):
      if not _evaluate(condition.root, counters.read):
        return trips
      counters.advance()
  except _UnknownError:
    pass
  return None


class _Counters:
  """Those of a loop's variables that decide when it ends."""

  def __init__(self, body: Computation, start: Callable[[int], int]):
    self.body, self.start = body, start
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
      after = {index: _element(self.body.root, index, self.read) for index in list(self.values)}
    self.values, self.trips = after, self.trips + 1


def _element(instruction: Instruction | None, index: int, read: _Read) -> int:
  """Evaluates one element of the tuple that an instruction makes."""
  if instruction is None or instruction.opcode != 'tuple':
    raise _UnknownError
  return _evaluate(instruction.computation[instruction.operands[index]], read)


def _evaluate(instruction: Instruction, read: _Read) -> int:
  """Evaluates an integer that does not depend on data."""

  def value(one: Instruction) -> int:
    return _evaluate(one, read)

  opcode, inputs = instruction.opcode, instruction.inputs
  if opcode == 'constant':
    return _literal(instruction.operands[0])
  if opcode in _COPIES:
    return value(inputs[0])
  if opcode == 'compare':
    return int(_COMPARE[instruction.required(r'direction=(\w+)')](*map(value, inputs)))
  if opcode in _ARITHMETIC:
    return _ARITHMETIC[opcode](*map(value, inputs))
  if opcode == 'fusion':
    return _evaluate(instruction.runs[0].root, lambda parameter, _: value(inputs[parameter]))
  source = inputs[0] if opcode == 'get-tuple-element' else instruction
  if source.opcode == 'parameter':
    index = None if source is instruction else int(instruction.required(r'index=(\d+)'))
    return read(int(source.operands[0]), index)
  raise _UnknownError


def _literal(text: str) -> int:
  if text in {'true', 'false'}:
    return int(text == 'true')
  if not re.fullmatch(r'-?\d+', text):
    raise _UnknownError
  return int(text)
