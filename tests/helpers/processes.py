"""Commands as a user runs them: processes of their own on virtual CPU devices."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
  """Returns the environment of a command on so many CPU devices."""
  flags = [
    '--xla_backend_optimization_level=0',  # a few steps do not gain by more
    f'--xla_force_host_platform_device_count={devices}',
  ]
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': ' '.join(flags),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }


def short_run(workdir, *overrides: str, **fields) -> list[str]:
  """Returns the command line of a short run of configs/tiny.py, for the project's root."""
  fields = {
    'workdir': workdir,
    'train.num_epochs': 0,
    'batch.rows': 4,
    'batch.tokens': 256,
    **fields,
  }
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  return [sys.executable, '-m', 'dpo_flax.train', '--config=configs/tiny.py', *flags, *overrides]
