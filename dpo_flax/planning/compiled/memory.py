"""Which temporaries fill the HBM when a compiled program needs most of it.

The compiler does not report it, but prints the program in the order of execution: an array lives
from the instruction that makes it to the last that reads it.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from dpo_flax.planning.compiled.hlo import HBM, Computation, Instruction, Program

# Their results are their operands under another name.
_ALIASES = frozenset(['bitcast', 'optimization-barrier', 'opt-barrier', 'while', 'async-update'])
# While they run what they call, what is alive around them stays so.
_CONTROLS = frozenset(['while', 'conditional', 'call', 'async-start'])
_PASSES_ON = re.compile(r'custom_call_target="(?:ConcatBitcast|AsyncCollectiveDone)"')


@dataclasses.dataclass(frozen=True, eq=False)
class Temporary:
  """One array that is alive at the peak."""

  maker: Instruction
  near: tuple[Instruction, ...]  # its first reader, and what it is made of
  shape: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Peak:
  """The moment at which most temporaries are alive."""

  bytes: int
  alive: tuple[Temporary, ...]


def peak(program: Program) -> Peak:
  """Returns what is alive at the peak, without the program's arguments and results.

  Arrays that share memory in ways the text does not show count twice, so the sum is an estimate;
  `memory_analysis().temp_size_in_bytes` is the compiler's.
  """
  return _peak(program.entry, {})


def by_source(alive: Iterable[Temporary], program: Program, package: str) -> list[dict[str, Any]]:
  """Returns bytes, source and arrays for each line of `package` that made some, largest first."""
  sums, shapes = collections.Counter(), collections.defaultdict(collections.Counter)
  for one in alive:
    source = _source(one, program, package)
    sums[source] += one.bytes
    shapes[source][one.shape] += 1
  return [
    {'bytes': size, 'source': source, 'arrays': dict(shapes[source])}
    for source, size in sums.most_common()
  ]


def _source(one: Temporary, program: Program, package: str) -> str:
  # What the compiler puts in itself, such as a gathering of shards, is known by its neighbours.
  all_of_them = (one.maker, *one.near)
  sources = (program.source(instruction, package) for instruction in all_of_them)
  names = (instruction.attribute(r'op_name="([^"]*)"') for instruction in all_of_them)
  name = next(filter(None, names), one.maker.name)
  # An argument's: state.trainable[\'policy\']... .value
  name = re.sub(r"\[\\'(\w+)\\'\]", r'.\1', name).removesuffix('.value')
  return next(filter(None, sources), name)


def _peak(computation: Computation, known: dict[int, Peak]) -> Peak:
  if id(computation) in known:
    return known[id(computation)]
  owners = _owners(computation)
  kept = set().union(*owners[computation.root.name])  # the caller's, or the program's results
  last_use = {}
  for step, one in enumerate(computation.values()):
    for name in one.operands:
      for buffer in set().union(*owners.get(name, ())):
        last_use[buffer] = step
  alive, best, now = {}, Peak(0, ()), 0
  for step, one in enumerate(computation.values()):
    for buffer in set().union(*owners[one.name]) - alive.keys():
      if buffer.maker is one and buffer not in kept:
        alive[buffer] = None
        now += buffer.bytes
    inner = max(
      (_peak(other, known) for other in (one.runs if one.opcode in _CONTROLS else ())),
      key=lambda found: found.bytes,
      default=Peak(0, ()),
    )
    if now + inner.bytes > best.bytes:
      best = Peak(now + inner.bytes, (*alive, *inner.alive))
    for buffer in [buffer for buffer in alive if last_use.get(buffer, step) <= step]:
      del alive[buffer]
      now -= buffer.bytes
  known[id(computation)] = best
  return best


def _owners(computation: Computation) -> dict[str, list[set[Temporary]]]:
  """Returns, for each element of each instruction's result, the temporaries that hold it."""
  owners: dict[str, list[set[Temporary]]] = {}
  readers = _first_readers(computation)
  for one in computation.values():
    given = [owners[name] for name in one.operands if name in owners]
    if one.opcode in {'parameter', 'constant'}:
      owners[one.name] = [set() for _ in one.arrays]
    elif one.opcode == 'tuple':
      owners[one.name] = [set().union(*elements) for elements in given]
    elif one.opcode == 'get-tuple-element':
      index = int(one.required(r'index=(\d+)'))
      owners[one.name] = [given[0][index]] if index < len(given[0]) else [set()]
    elif one.opcode.endswith('-done'):
      start = _start(one)
      first = 0 if start.opcode == 'copy-start' or len(given[0]) == 1 else len(start.operands)
      owners[one.name] = given[0][first : first + len(one.arrays)]
    elif one.opcode in _ALIASES or _PASSES_ON.search(one.attributes):
      together = set().union(*(element for elements in given for element in elements))
      same = len(given[0]) == len(one.arrays)
      owners[one.name] = given[0] if same else [together for _ in one.arrays]
    else:
      made_of = [other for other in one.inputs if other.opcode != 'constant']
      near = (*filter(None, [readers.get(one.name)]), *made_of)
      owners[one.name] = _made(one, given, near)
  return owners


def _start(done: Instruction) -> Instruction:
  start = done.inputs[0]
  return _start(start) if start.opcode == 'async-update' else start


def _first_readers(computation: Computation) -> dict[str, Instruction]:
  readers = {}
  for one in reversed(computation.values()):
    readers |= dict.fromkeys(one.operands, one)
  return {
    name: readers.get(one.name, one) if one.opcode == 'get-tuple-element' else one
    for name, one in readers.items()
  }


def _made(
  instruction: Instruction, given: list[list[set[Temporary]]], near: tuple[Instruction, ...]
) -> list[set[Temporary]]:
  """Returns new temporaries for the results of an instruction, but for those updated in place."""
  aliased = {
    int(result or 0): int(operand)
    for result, operand in re.findall(r'\{(\d*)\}: \((\d+),', instruction.attributes)
  }
  if instruction.opcode.endswith('-start') and len(instruction.arrays) > 1:
    # Its result also holds the operands: (to, from, ...) of a copy, (from, to, ...) of others.
    if instruction.opcode == 'copy-start':
      aliased = {1: 0}
    else:
      aliased = {i: i for i in range(len(instruction.operands))}
  updated = _updated_operand(instruction)
  if updated is not None:
    aliased.setdefault(0, updated)
  results = []
  for i, array in enumerate(instruction.arrays):
    if i in aliased and aliased[i] < len(given):
      results.append(set().union(*given[aliased[i]]))
    elif array.space == HBM and array.stored_bytes:
      results.append({Temporary(instruction, near, str(array), array.stored_bytes)})
    else:
      results.append(set())
  return results


def _updated_operand(instruction: Instruction) -> int | None:
  """Returns the index of the operand that an instruction updates in place, if it does."""
  if instruction.opcode == 'dynamic-update-slice':
    return 0
  if instruction.opcode != 'fusion':
    return None
  inner = instruction.runs[0]
  target = inner.root
  while target.opcode in {'bitcast', 'dynamic-update-slice'} and target.operands[0] in inner:
    target = inner[target.operands[0]]
  if target.opcode == 'parameter' and target is not inner.root:
    return int(target.operands[0])
  return None
