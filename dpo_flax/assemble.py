"""Config -> the models of a run on its mesh: what every command builds first."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax.interop.hf_weights import Checkpoint, load_base
from dpo_flax.learner.state import Models
from dpo_flax.model.config import ModelConfig, from_hf_config, from_preset
from dpo_flax.model.lora import LoraConfig, resolve_targets
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import named_shardings


def make_model_config(config: ConfigDict, checkpoint: Checkpoint | None) -> ModelConfig:
  """Returns the architecture of `checkpoint`, or of `config.model.preset` without one."""
  run = {
    'dtype': jnp.dtype(config.model.dtype),
    'weight_dtype': jnp.dtype(config.model.weight_dtype),
    'remat': config.model.remat,
    'attention': config.model.attention,
  }
  if checkpoint is None:
    return from_preset(config.model.preset, **run)
  return from_hf_config(checkpoint.config, where=str(checkpoint.directory / 'config.json'), **run)


def make_lora_config(config: ConfigDict, model_config: ModelConfig) -> LoraConfig:
  """Returns the adapters that `config.lora` asks of this model."""
  lora = config.lora
  targets = resolve_targets(lora.target_modules, lora.exclude_modules, config=model_config)
  return LoraConfig(
    r=lora.r, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora, targets=targets
  )


def load_models(
  config: ConfigDict,
  model_config: ModelConfig,
  lora: LoraConfig,
  *,
  base: Checkpoint | None,  # None: random weights
  reference: Checkpoint | None,  # None: the policy's own base
  mesh: Mesh,
) -> Models:
  """Returns the policy with fresh adapters, and its reference.

  The reference is the policy with its adapters off: the same variables, not a copy. Only another
  `reference` is loaded beside it.

  Raises:
    ValueError: the two models do not share a vocabulary.
  """
  policy = load_model(model_config, lora, checkpoint=base, mesh=mesh, seed=config.seed)
  if reference is None:
    return Models(policy, nnx.view(policy, adapted=False))
  other = make_model_config(config, reference)
  if other.vocab_size != model_config.vocab_size:
    raise ValueError(
      f'reference_model_path={config.reference_model_path}: its vocabulary has {other.vocab_size} '
      f'tokens, the policy has {model_config.vocab_size}'
    )
  return Models(policy, load_model(other, None, checkpoint=reference, mesh=mesh, seed=0))


def load_model(
  model_config: ModelConfig,
  lora: LoraConfig | None,
  *,
  checkpoint: Checkpoint | None,
  mesh: Mesh,
  seed: int,
) -> Transformer:
  """Returns a model whose every array is made or read straight into its shards."""

  def make():
    return nnx.split(Transformer(model_config, lora, nnx.Rngs(params=seed, lora=seed + 1)))

  graphdef, abstract = jax.eval_shape(make)

  def init(kind):
    shardings = named_shardings(nnx.filter_state(abstract, kind), mesh)
    # Whatever the state leaves out, the compiler does not compute.
    return jax.jit(lambda: nnx.filter_state(make()[1], kind), out_shardings=shardings)()

  if checkpoint is None:
    return nnx.merge(graphdef, init(...))
  adapters, base = nnx.split_state(abstract, nnx.LoRAParam, ...)
  adapters = init(nnx.LoRAParam) if adapters else adapters
  return nnx.merge(graphdef, adapters, load_base(checkpoint, base, mesh))
