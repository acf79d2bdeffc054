"""Settings, small models and small batches that tests share. Eight virtual CPU devices."""

import os
import pathlib
import shutil

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most programs here run once: compiling them well takes longer than they do.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
  ]
)
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

# The flags above must be set before the first import of jax.
import hypothesis
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from dpo_flax import config as config_lib
from dpo_flax.assembly.models import load_model
from dpo_flax.data.batches import pack
from dpo_flax.examples import make_tiny
from dpo_flax.huggingface.peft_targets import BLOCK_PROJECTIONS
from dpo_flax.losses.objective import Objective
from dpo_flax.model.config import AttentionKind, ModelConfig, Rope
from dpo_flax.model.lora import LoraConfig, LowRank
from dpo_flax.sharding import AXES, make_mesh
from dpo_flax.training.state import Models
from dpo_flax.training.step import StepOptions

pytest_plugins = ['helpers.tokenizer_directories']

CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

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


@pytest.fixture(scope='session')
def set_field():
  """Sets a dotted field of a config to a value of any type."""

  def set_to(settings: ConfigDict, field: str, value):
    *sections, name = field.split('.')
    for section in sections:
      settings = settings[section]
    with settings.ignore_type():
      settings[name] = value

  return set_to


@pytest.fixture(scope='session')
def make_model_config():
  """Makes a ModelConfig of two small float32 layers; fields may be given."""

  def make(**changes) -> ModelConfig:
    values = {
      'model_type': 'llama',
      'vocab_size': 97,
      'embed_dim': 32,
      'mlp_dim': 48,
      'num_layers': 2,
      'num_heads': 4,
      'num_kv_heads': 2,
      'head_dim': 8,
      'activation': 'silu',
      'fused_projections': False,
      'biases': frozenset(),
      'rms_norm_eps': 1e-5,
      'norm_offset': 0.0,
      'input_norms': True,
      'output_norms': False,
      'qk_norm': None,
      'attention_kinds': (AttentionKind(None, Rope(10_000.0, dim=8, scaling=None)),),
      'attention_scale': 8**-0.5,
      'attention_softcap': None,
      'logits_softcap': None,
      'embed_scale': 1.0,
      'tie_word_embeddings': False,
      'initializer_range': 0.2,
      'dtype': jnp.dtype('float32'),
      'weight_dtype': jnp.dtype('float32'),
      'remat': 'full',
      'attention': 'xla',
    }
    return ModelConfig(**values | changes)

  return make


@pytest.fixture(scope='session')
def make_lora():
  """Makes a LoraConfig on every linear layer of the blocks, with a scale that is not 1."""

  def make(*, r=4, alpha=10.0, targets=BLOCK_PROJECTIONS, **changes) -> LoraConfig:
    values = {'dropout': 0.0, 'rslora': False, 'dora': False, 'tied': False, 'saved': frozenset()}
    values |= {'reference': None, 'continues': False}
    modules = dict.fromkeys(targets, LowRank((r,), (alpha,)))
    return LoraConfig(**{'modules': modules} | values | changes)

  return make


@pytest.fixture(scope='session')
def make_mesh_of():
  """Makes a mesh of sizes such as `fsdp=4, tensor=2` over the first devices that fill it."""

  def make(**sizes):
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])

  return make


@pytest.fixture(scope='session')
def make_models(make_mesh_of):
  """Makes policy and reference; unless `zero_b`, trained-looking adapters tell them apart.

  The norms' scales are random too, because ones would hide a forgotten scale.
  """

  def make(
    model_config: ModelConfig, lora: LoraConfig | None, *, zero_b=False, mesh=None
  ) -> Models:
    mesh = mesh or make_mesh_of()
    policy = load_model(model_config, lora, checkpoint=None, mesh=mesh, seed=0)
    random = np.random.default_rng(0)

    def draw(path, leaf):
      name = jax.tree_util.keystr(path)
      if 'norm' not in name and ('lora_b' not in name or zero_b):
        return leaf
      value = (1.0 if 'norm' in name else 0.0) + 0.2 * random.standard_normal(leaf.shape)
      return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    graphdef, state = nnx.split(policy)
    policy = nnx.merge(graphdef, jax.tree.map_with_path(draw, state))
    return Models(policy, nnx.view(policy, adapted=False))

  return make


@pytest.fixture(scope='session')
def write_example_base():
  """Writes a random Llama with the example's tokenizer in Hugging Face layout, by transformers."""
  # Most tests need neither, and both take seconds to import.
  import torch
  import transformers

  def write(directory: pathlib.Path, *, seed=0, initializer_range=0.2, max_shard_size='5GB'):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
      vocab_size=make_tiny.VOCABULARY,
      hidden_size=64,
      intermediate_size=96,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=initializer_range,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer = pathlib.Path(make_tiny.__file__).parent / 'tiny' / 'tokenizer.model'
    shutil.copy(tokenizer, directory)
    return directory

  return write


@pytest.fixture(scope='session')
def draw_pairs():
  """Draws `count` tokenized pairs from a seed: prompts of 1-8 tokens, responses of 1-10."""

  def draw(count: int, *, seed: int = 0, vocab: int = 97) -> list[pack.PackedPair]:
    random = np.random.default_rng(seed)

    def ids(longest):
      return random.integers(1, vocab, random.integers(1, longest + 1), dtype=np.int32)

    return [pack.PackedPair(i, ids(8), ids(10), ids(10)) for i in range(count)]

  return draw


@pytest.fixture(scope='session')
def fill_batch():
  """Packs rows of pairs into a batch of 96 tokens a row, in jax arrays."""

  def fill(rows, *, layout='shared', tokens=96, pairs_per_row=4, **options):
    options |= {'layout': layout, 'tokens': tokens, 'pairs_per_row': pairs_per_row}
    return jax.tree.map(jnp.asarray, pack.fill_batch(rows, **options))

  return fill


@pytest.fixture(scope='session')
def make_options():
  """Makes StepOptions; arguments that are no field of theirs belong to the objective."""

  def make(
    *,
    logits_chunk=16,
    microbatches=1,
    dropout_seed=None,
    spike_factor=0.0,
    **objective,
  ) -> StepOptions:
    settings = config_lib.default().objective
    settings.update(objective)
    return StepOptions(
      objective=Objective.from_config(settings),
      logits_chunk=logits_chunk,
      microbatches=microbatches,
      dropout_seed=dropout_seed,
      spike_factor=spike_factor,
    )

  return make


@pytest.fixture(scope='session')
def arrays_in():
  """Lists every array a function computes, inside its loops and branches too."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval for variable in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  return lambda function, *inputs: list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


@pytest.fixture
def without_compilation_cache():
  """Programs compiled for a TPU that is not there cannot be read back from the cache."""
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)
