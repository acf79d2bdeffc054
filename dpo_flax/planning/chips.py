"""The TPUs that a run can be planned for: their published limits, and their devices without them.

The limits are those of Cloud TPU's documentation, cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read in
2026. Usable HBM is what the compiler itself allows a program (libtpu 0.0.42).
"""

import dataclasses
import difflib
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from dpo_flax.sharding import Devices

_GIB = 2**30

# libtpu looks for the machine it runs on, and guards chips that are not there.
_NO_MACHINE = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do at most."""

  name: str
  hbm_bytes: float  # that a program may use
  flops: float  # bfloat16, per second
  hbm_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second into the chip over one of its links to neighbours
  topologies: tuple[str, ...]  # of its slices, the larger ones left out


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')

# A chip's documented bidirectional bandwidth is that of all its ports, both ways.
CHIPS = {
  'v5e': Chip('v5e', 15.75 * _GIB, 197e12, 819e9, 400e9 / 4 / 2, _FLAT),
  'v5p': Chip('v5p', 95.73 * _GIB, 459e12, 2765e9, 1200e9 / 6 / 2, _CUBES),
  'v6e': Chip('v6e', 31.24 * _GIB, 918e12, 1638e9, 800e9 / 4 / 2, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Some chips joined to a grid."""

  chip: Chip
  topology: str  # such as 4x4
  devices: Devices  # for compiling alone

  @property
  def ici_bandwidth(self) -> float:
    """Bytes per second into the best connected chip, over all its links."""
    sizes = [int(size) for size in self.topology.split('x')]
    return self.chip.link_bandwidth * sum(min(size - 1, 2) for size in sizes)


def make_slice(name: str) -> Slice:
  """Returns the devices of a topology, such as v5e:4x4, on a machine that has none.

  Raises:
    ValueError: there is no such chip or grid, or no compiler for TPU is installed.
  """
  chip, _, topology = name.partition(':')
  if chip not in CHIPS:
    near = difflib.get_close_matches(chip, CHIPS, n=1)
    hint = f'did you mean {near[0]}:{topology or "2x2"}?' if near else 'such as v5e:4x4'
    raise ValueError(f'--topology={name}: chips are {", ".join(CHIPS)}; {hint}')
  # libtpu takes a grid of too many axes, and ends the process at one of no chips.
  axes = CHIPS[chip].topologies[0].count('x') + 1
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * axes), topology):
    raise ValueError(_no_slice(name, chip, f'expected {axes} counts of chips'))
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      "planning needs libtpu, the compiler for TPU (but no TPU): pip install 'dpo_flax[tpu]'"
    )
  for variable, value in _NO_MACHINE.items():
    os.environ.setdefault(variable, value)
  # Older compilers take every host to have four chips.
  single = {'chips_per_host_bounds': [1, 1, 1]} if set(topology.split('x')) == {'1'} else {}
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **single).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(_no_slice(name, chip, str(error).partition(':')[2].strip())) from None
  return Slice(CHIPS[chip], topology, devices)


def _no_slice(name: str, chip: str, reason: str) -> str:
  known = ', '.join(f'{chip}:{topology}' for topology in CHIPS[chip].topologies)
  return f'--topology={name} is no slice of {chip} ({reason}): give one of {known}, or a larger one'
