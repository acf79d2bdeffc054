"""Small models of random weights."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.assembly.models import load_model
from dpo_flax.model.config import AttentionType, ModelConfig, Rope
from dpo_flax.model.lora import LoraConfig, LowRank
from dpo_flax.sharding import AXES, make_mesh
from dpo_flax.training.state import Models

# The linear maps of a block, by the names that adapters give them.
BLOCK_PROJECTIONS = (
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
)


def make_model_config(**changes) -> ModelConfig:
  """Makes a ModelConfig of two small float32 layers; fields may be given."""
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
    'attention_types': (AttentionType(None, Rope(10_000.0, dim=8, scaling=None)),),
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


def make_lora(*, r=4, alpha=10.0, targets=BLOCK_PROJECTIONS, **changes) -> LoraConfig:
  """Makes a LoraConfig on every linear layer of the blocks, with a scale that is not 1."""
  values = {'dropout': 0.0, 'rslora': False, 'dora': False, 'tied': False, 'saved': frozenset()}
  values |= {'reference': None, 'continues': False}
  modules = dict.fromkeys(targets, LowRank((r,), (alpha,)))
  return LoraConfig(**{'modules': modules} | values | changes)


def make_mesh_of(**sizes):
  """Makes a mesh of sizes such as `fsdp=4, tensor=2` over the first devices that fill it."""
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def make_models(
  model_config: ModelConfig, lora: LoraConfig | None, *, zero_b=False, mesh=None
) -> Models:
  """Makes policy and reference; unless `zero_b`, trained-looking adapters tell them apart.

  The norms' scales are random too, because ones would hide a forgotten scale.
  """
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


def arrays_in(function, *inputs):
  """Lists every array a function computes, inside its loops and branches too."""
  return list(_walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def _walk(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval for variable in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _walk(inner)
