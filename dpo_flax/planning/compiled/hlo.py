"""The text of a compiled program -> computations of instructions.

XLA prints one instruction a line, such as

    %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%body, ...

and no other form carries the layouts, memory spaces and costs of a scheduled program. A text that
is not understood whole is refused: a sum over part of a program would look like a good one.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 'token': 0, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'opaque': 0}

_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|select|scatter|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_CALLED_LISTS = re.compile(r'\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}')
_TABLE_ROW = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')

HBM = 0  # the memory space of arrays whose layout names none


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result, as one device holds it."""

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...]
  tile: tuple[int, ...]  # the innermost dimensions are stored in multiples of it
  space: int  # HBM, or a smaller memory of the chip

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of the elements alone."""
    return math.ceil(self.size * _bits(self.dtype) / 8)

  @property
  def stored_bytes(self) -> int:
    """Bytes it takes in memory, its innermost dimensions padded to whole tiles."""
    minor_first = [self.dims[axis] for axis in self.minor_to_major]
    for i, tile in enumerate(reversed(self.tile[-len(minor_first) :] if minor_first else ())):
      minor_first[i] = math.ceil(minor_first[i] / tile) * tile
    return math.ceil(math.prod(minor_first) * _bits(self.dtype) / 8)

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  result: str  # its type, as printed
  operands: tuple[str, ...]  # names of instructions, or the literal of a constant
  attributes: str  # all that follows the operands
  is_root: bool
  computation: 'Computation' = dataclasses.field(repr=False)  # that it is a line of

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result; one, unless it is a tuple."""
    return tuple(_arrays(self.result))

  @functools.cached_property
  def inputs(self) -> list['Instruction']:
    """The instructions whose results it takes."""
    return [self.computation[name] for name in self.operands if name in self.computation]

  @property
  def runs(self) -> list['Computation']:
    """The computations it runs."""
    return [self.computation.siblings[name] for name in self.called()]

  def called(self) -> list[str]:
    """Names of the computations it runs."""
    names = _CALLED.findall(self.attributes)
    for group in _CALLED_LISTS.findall(self.attributes):
      names += [name.strip().lstrip('%') for name in group.split(',')]
    return names

  def attribute(self, pattern: str) -> str | None:
    """Returns what `pattern` (with one group) matches in the attributes."""
    match = re.search(pattern, self.attributes)
    return match and match.group(1)

  def required(self, pattern: str) -> str:
    """Returns what `pattern` (with one group) matches; ValueError where it matches nothing."""
    value = self.attribute(pattern)
    if value is None:
      raise ValueError(f'{self.name} has no attribute {pattern}')
    return value


class Computation(dict[str, Instruction]):
  """Instructions by name, in the order of their execution."""

  def __init__(self, siblings: dict[str, 'Computation']):
    super().__init__()
    self.siblings = siblings  # all computations of the program, by name

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(one for one in self.values() if one.is_root)

  @functools.cached_property
  def parameters(self) -> list[str]:
    """Names of the parameters, by number."""
    found = [one for one in self.values() if one.opcode == 'parameter']
    return [one.name for one in sorted(found, key=lambda one: int(one.operands[0]))]


@dataclasses.dataclass(frozen=True)
class Program:
  """A module: what one device executes."""

  computations: dict[str, Computation]
  entry: Computation
  num_partitions: int
  frames: dict[int, tuple[tuple[str, int], ...]]  # frame id -> (file, line), innermost first

  def source(self, instruction: Instruction, package: str) -> str | None:
    """Returns the line in `package` that asked for an instruction, and whom it served, if known.

    As in 'model/layers.py:12 for model/transformer.py:40': the innermost line, and the first
    outside its file.
    """
    frame = instruction.attribute(r'stack_frame_id=(\d+)')
    locations = [
      (file.rpartition(f'/{package}/')[2], line)
      for file, line in self.frames.get(int(frame or 0), ())
      if f'/{package}/' in file
    ]
    outer = [one for one in locations if one[0] != locations[0][0]]
    return ' for '.join(f'{file}:{line}' for file, line in [*locations[:1], *outer[:1]]) or None


def parse(text: str) -> Program:
  """Reads a program, as `jax.stages.Compiled.as_text()` prints it.

  Raises:
    ValueError: a line is not understood, or a computation is missing or never run.
  """
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in _logical_lines(text):
    header = _HEADER.match(line)
    if _INSTRUCTION.match(line) and current is not None:
      instruction = _instruction(line, current)
      current[instruction.name] = instruction
    elif header:
      current = computations.setdefault(header.group(2), Computation(computations))
      entry = current if header.group(1) else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and line.strip():
      raise ValueError(f'not an instruction of a compiled program: {line[:120]!r}')
  if entry is None:
    raise ValueError('the text has no ENTRY computation: is it that of a compiled program?')
  _check_reachable(computations, entry)
  partitions = re.search(r'num_partitions=(\d+)', text[: text.find('\n')])
  return Program(computations, entry, int(partitions.group(1)) if partitions else 1, _frames(text))


def _logical_lines(text: str) -> Iterator[str]:
  """Yields one instruction at a time: kernels carry metadata that breaks lines inside braces."""
  held, depth = '', 0
  for line in text.splitlines():
    if depth or _INSTRUCTION.match(line):
      bare = _STRING.sub('', line)
      depth += bare.count('{') - bare.count('}')
      held += line
      if not depth:
        yield held
        held = ''
    else:
      yield line
  if held:
    raise ValueError(f'the text ends inside an instruction: {held[:120]!r}')


def _instruction(line: str, computation: Computation) -> Instruction:
  head = _INSTRUCTION.match(line)
  assert head is not None
  rest = line[head.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opcode, parenthesis, _ = rest.partition('(')
  if not parenthesis:
    raise ValueError(f'not an instruction of a compiled program: {line[:120]!r}')
  end = _closing(rest, len(opcode))
  inner = re.sub(r'/\*.*?\*/', '', rest[len(opcode) + 1 : end])
  names = re.findall(r'%([\w.\-]+)', inner)
  operands = tuple(names) if names else (inner.strip(),)
  is_root, name = bool(head.group(1)), head.group(2)
  return Instruction(name, opcode, result, operands, rest[end + 1 :], is_root, computation)


def _closing(text: str, start: int) -> int:
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
    depth += {'(': 1, ')': -1}.get(match.group(), 0)
    if not depth:
      return match.start()
  raise ValueError(f'unbalanced parentheses: {text[:120]!r}')


def _arrays(result: str) -> Iterator[Array]:
  for dtype, dims, order, tiling in _ARRAY.findall(re.sub(r'/\*.*?\*/', '', result)):
    sizes = tuple(int(dim.lstrip('<=')) for dim in dims.split(',') if dim)
    minor = tuple(int(axis) for axis in order.split(',') if axis)
    tile = re.search(r'T\(([\d,]+)\)', tiling)
    space = re.search(r'S\((\d+)\)', tiling)
    yield Array(
      dtype,
      sizes,
      minor or tuple(reversed(range(len(sizes)))),
      tuple(int(size) for size in tile.group(1).split(',')) if tile else (),
      int(space.group(1)) if space else HBM,
    )


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  if dtype.startswith('f8'):
    return 8
  return int(re.findall(r'\d+', dtype)[0])


def _check_reachable(computations: dict[str, Computation], entry: Computation):
  seen, waiting = set(), [entry]
  while waiting:
    for instruction in waiting.pop().values():
      for name in instruction.called():
        if name not in computations:
          raise ValueError(f'{instruction.name} runs {name}, which the text does not hold')
        if name not in seen:
          seen.add(name)
          waiting.append(computations[name])
  idle = [name for name, one in computations.items() if name not in seen and one is not entry]
  if idle:
    raise ValueError(f'nothing runs the computations {", ".join(idle[:5])}: misread the text?')


def _frames(text: str) -> dict[int, tuple[tuple[str, int], ...]]:
  """Reads the tables in the program's head: which lines of source an instruction stems from."""
  tables, current = {}, None
  for line in text[: text.find('ENTRY ')].splitlines():
    if line in {'FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'}:
      current = tables.setdefault(line, {})
    elif current is not None and (row := _TABLE_ROW.match(line)):
      current[int(row.group(1))] = row.group(2) or dict(re.findall(r'(\w+)=(\d+)', row.group(3)))
    elif line.startswith('%'):
      break
  locations = {
    number: (tables['FileNames'][int(row['file_name_id'])], int(row['line']))
    for number, row in tables.get('FileLocations', {}).items()
  }
  frames = {}
  # A parent precedes its children; its id is counted from 1, 0 being none.
  for number, row in tables.get('StackFrames', {}).items():
    outer = frames.get(int(row.get('parent_frame_id', 0)) - 1, ())
    frames[number] = (locations[int(row['file_location_id'])], *outer)
  return frames
