"""Options of the XLA compiler that its own cost estimates show to help; all of them are here.

Measured on the training step of Llama-3.1-8B, LoRA of rank 64, v5e:4x4, one row of 4,096 tokens per
chip, when they were chosen: 3.17e9 estimated cycles without, 2.49e9 with both (what was tried since
is in tests/benchmarks/README.md).
"""

from jax.sharding import Mesh

_TPU = {
  # A matrix product whose weights are split over chips is not cut into one small product per chip,
  # each waiting for its neighbour's piece: the weights are gathered ahead of it. 3.17e9 -> 2.85e9
  # cycles, and 80 -> 34 GiB through the interconnect.
  'xla_jf_spmd_threshold_for_windowed_einsum_mib': '100000',
  # A fused product may keep 64 MiB of the chip's 128 MiB vector memory, not 16: larger tiles.
  # 2.85e9 -> 2.49e9 cycles.
  'xla_tpu_scoped_vmem_limit_kib': '65536',
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Returns the options for `jax.jit` of a program for the mesh's devices."""
  return dict(_TPU) if mesh.devices.flat[0].platform == 'tpu' else {}
