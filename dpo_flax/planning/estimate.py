"""What one training step takes of the chips of a slice, by the compiler for them."""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from dpo_flax.assembly.blueprint import Blueprint
from dpo_flax.planning.aot import abstract_train_step
from dpo_flax.planning.chips import Slice
from dpo_flax.planning.compiled import hlo, memory, work
from dpo_flax.runtime.memory import bytes_on_a_device, is_out_of_memory

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SHOWN = 8  # sources of temporaries


@dataclasses.dataclass(frozen=True)
class Pairs:
  """The pairs of a packed row."""

  slots: int
  mean: float
  source: str  # where the numbers are from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """All numbers are of one chip and one optimizer step; None where the step does not fit.

  It has every field of `work.Work`.
  """

  fits: bool
  peak_hbm_bytes: int | None  # of a step that does not fit: what it needs by the compiler
  argument_bytes: int
  temp_bytes: int | None = None
  hbm_capacity_bytes: int
  flops: float | None = None
  collective_bytes: float | None = None  # received from other chips
  estimated_cycles: float | None = None
  compile_seconds: float
  hbm_traffic_bytes: float | None = None
  flops_without_cycles: float | None = None
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  conditionals: int = 0
  largest_temporaries: tuple[dict[str, Any], ...] = ()
  bounds_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  pairs_per_second: float | None = None  # of all chips, at the largest bound
  message: str | None = None  # the compiler's, of a step that does not fit


def estimate(blueprint: Blueprint, slice_: Slice, *, pairs: Pairs) -> Estimate:
  """Compiles the step that training would run on a slice and reads its cost.

  Args:
    blueprint: of a run on the slice's devices.
    slice_: the chips.
    pairs: of a packed row.
  """
  step, arguments = abstract_train_step(blueprint, pairs_per_row=pairs.slots)
  start = time.perf_counter()
  try:
    with jax.set_mesh(blueprint.mesh):
      compiled, text = compile_with_text(step.lower(*arguments))
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    return refused(str(error), arguments, slice_, seconds=time.perf_counter() - start)
  seconds = time.perf_counter() - start
  program = hlo.parse(text)
  in_step = blueprint.settings.batch.rows * pairs.mean
  return _read(compiled.memory_analysis(), program, slice_, pairs=in_step, seconds=seconds)


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """Compiles a program; returns its text as well.

  That of a TPU program is written by its compiler: `Compiled.as_text` fails on instructions newer
  than jaxlib, such as a gather on a SparseCore.
  """
  with tempfile.TemporaryDirectory() as directory:
    options = {'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
    compiled = lowered.compile(compiler_options=options)
    # Modules called 'extracted' are parts of this one, for other cores of the chip.
    texts = list(pathlib.Path(directory).glob('*.jit_train_step.*after_codegen.txt'))
    return compiled, texts[0].read_text() if texts else compiled.as_text() or ''


def _read(
  sizes: Any,  # bytes, as jax.stages.Compiled.memory_analysis() gives them
  program: hlo.Program,
  slice_: Slice,
  *,
  pairs: float,  # of a step
  seconds: float,  # of compilation
) -> Estimate:
  done = work.measure(program)
  counts: dict[str, Any] = vars(done) | {
    'collectives': dict(done.collectives),
    'kernels': dict(done.kernels),
  }
  sources = memory.by_source(memory.peak(program).alive, program, 'dpo_flax')
  bounds = {
    'compute': done.flops / slice_.chip.flops,
    'HBM': done.hbm_traffic_bytes / slice_.chip.hbm_bandwidth,
  }
  if len(slice_.devices) > 1:
    bounds['ICI'] = done.collective_bytes / slice_.ici_bandwidth
  return Estimate(
    fits=True,
    peak_hbm_bytes=sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    + sizes.temp_size_in_bytes
    - sizes.alias_size_in_bytes,
    argument_bytes=sizes.argument_size_in_bytes,
    temp_bytes=sizes.temp_size_in_bytes,
    hbm_capacity_bytes=int(slice_.chip.hbm_bytes),
    compile_seconds=seconds,
    largest_temporaries=tuple(sources[:_SHOWN]),
    bounds_seconds=bounds,
    pairs_per_second=pairs / max(bounds.values()),
    **counts,
  )


def refused(message: str, arguments: Any, slice_: Slice, *, seconds: float) -> Estimate:
  """Reads the compiler's refusal: how much it would need."""
  first = message.partition('\n')[0]
  sizes = re.findall(r'([\d.]+)([KMGT]?)(?:i?B)?\b', re.sub(r'E\d+:', '', first))
  needed = [float(number) * _UNITS[unit] for number, unit in sizes if unit]
  return Estimate(
    fits=False,
    peak_hbm_bytes=int(max(needed)) if needed else None,
    argument_bytes=bytes_on_a_device(arguments),
    hbm_capacity_bytes=int(slice_.chip.hbm_bytes),
    compile_seconds=seconds,
    message=first,
  )
