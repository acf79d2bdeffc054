"""The work of a compiled program, its loops multiplied out."""

import collections
import dataclasses

from dpo_flax.planning.compiled.arithmetic import matrix_flops
from dpo_flax.planning.compiled.hlo import Computation, Instruction, Program
from dpo_flax.planning.compiled.loops import trip_count
from dpo_flax.planning.compiled.traffic import collective, hbm_bytes, received_bytes

_KERNEL_FLOPS = r'"cost_estimate":\{[^}]*?"flops":"?(\d+)'
_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has no number of cycles


@dataclasses.dataclass
class Work:
  """What one device does in one run of a program."""

  estimated_cycles: float = 0.0  # the compiler's; collectives and kernels carry none
  flops: float = 0.0  # of matrix products, and of kernels that state their number
  flops_without_cycles: float = 0.0  # of them, those outside estimated_cycles
  hbm_traffic_bytes: float = 0.0
  collective_bytes: float = 0.0  # received from other devices
  collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unknown_loops: int = 0  # counted as if run once
  conditionals: int = 0  # counted by their busiest branch

  def add(self, other: 'Work', times: float = 1):
    """Adds the work of running another part `times` times."""
    for field in dataclasses.fields(self):
      mine, added = getattr(self, field.name), getattr(other, field.name)
      if isinstance(mine, collections.Counter):
        mine.update({name: count * times for name, count in added.items()})
      elif field.name == 'unknown_loops':
        self.unknown_loops += added
      else:
        setattr(self, field.name, mine + added * times)


def measure(program: Program) -> Work:
  """Sums the work of a program from its entry.

  Loops count as often as they run, conditionals by their busiest branch: what only some batches
  need is counted for all.
  """
  return _Measure(program.num_partitions).of(program.entry)


class _Measure:
  def __init__(self, num_partitions: int):
    self.num_partitions = num_partitions
    self.known: dict[int, Work] = {}

  def of(self, computation: Computation) -> Work:
    """Returns the work of one run of a computation."""
    if id(computation) not in self.known:
      work, channels = Work(), set()
      for instruction in computation.values():
        self._add(work, instruction, channels)
      self.known[id(computation)] = work
    return self.known[id(computation)]

  def _add(self, work: Work, instruction: Instruction, channels: set[str]):
    called = instruction.runs
    if instruction.opcode == 'while':
      trips = trip_count(instruction)
      work.unknown_loops += trips is None
      for part in called:
        work.add(self.of(part), 1 if trips is None else trips)
    elif instruction.opcode == 'conditional':
      work.add(max(map(self.of, called), key=lambda one: (one.flops, one.estimated_cycles)))
      work.conditionals += 1
    elif instruction.opcode in {'call', 'async-start'}:
      for part in called:
        work.add(self.of(part))
    else:
      before = work.flops
      self._add_arithmetic(work, instruction, channels)
      work.hbm_traffic_bytes += hbm_bytes(instruction)
      cycles = instruction.attribute(r'"estimated_cycles":"?(\d+)')
      if cycles is None or int(cycles) == _NO_ESTIMATE:
        work.flops_without_cycles += work.flops - before
      else:
        work.estimated_cycles += float(cycles)

  def _add_arithmetic(self, work: Work, instruction: Instruction, channels: set[str]):
    work.flops += matrix_flops(instruction)
    name = collective(instruction.opcode)
    channel = instruction.attribute(r'channel_id=(\d+)') or instruction.name
    if name and channel not in channels:
      # One that runs beside other work is printed in each fusion that it runs beside.
      channels.add(channel)
      work.collectives[name] += 1
      work.collective_bytes += received_bytes(instruction, self.num_partitions)
    if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
      kernel = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
      work.kernels[kernel.rpartition('/')[2]] += 1
      work.flops += float(instruction.attribute(_KERNEL_FLOPS) or 0)
    if instruction.opcode == 'fusion':
      for one in instruction.runs[0].values():
        self._add_arithmetic(work, one, channels)
