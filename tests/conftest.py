"""Settings every test shares: eight virtual CPU devices, strict JAX, a compilation cache."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import jax  # noqa: E402  (the flags above must be set before the first import)
from absl import flags  # noqa: E402

CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

# Grain's worker processes read absl flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()
