"""The environment of all tests, eight virtual CPU devices, and the smallest config."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most programs here run once: compiling them well takes longer than they do. Half of that time is
# spent in the fusion emitters.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
  ]
)
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

# The flags above must be set before the first import of jax.
import hypothesis
import jax
import pytest
from absl import flags

from dpo_flax import config as config_lib

pytest_plugins = ['helpers.tokenizer_directories']

CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile('untimed', deadline=None)
hypothesis.settings.load_profile('untimed')

# Grain's worker processes read absl flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def config(tmp_path):
  """The fewest fields that make a config of a run."""
  smallest = config_lib.default()
  smallest.workdir = str(tmp_path)
  smallest.model.preset = 'tiny'
  smallest.data.tokenizer = 'tokenizer.model'
  smallest.data.train = 'pairs.jsonl'
  smallest.train.num_train_steps = 10
  smallest.optimizer.learning_rate = 1e-5
  return smallest


@pytest.fixture
def without_compilation_cache():
  """Programs compiled for a TPU that is not there cannot be read back from the cache."""
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)
