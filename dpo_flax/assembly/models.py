"""Config and opened sources -> the policy and its reference on a mesh."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.assembly.sources import Sources
from dpo_flax.huggingface.peft_adapter import AdapterFiles, load_adapter
from dpo_flax.huggingface.weights import BaseCheckpoint, load_base
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.kernels import Trained
from dpo_flax.model.linear import adapters_of, fit_magnitudes
from dpo_flax.model.lora import BASE, TRAINABLE, Frozen, LoraConfig, reference_of, train_weights
from dpo_flax.model.quantization import ChannelScale
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import named_shardings
from dpo_flax.training.state import Models


def load_models(
  sources: Sources,
  lora: LoraConfig | None,  # None: all weights learn
  *,
  seed: int,
  keeps_reference: bool,
  mesh: Mesh,
) -> Models:
  """Returns the policy as it starts, and its reference."""
  policy = load_model(sources.model, lora, checkpoint=sources.base, mesh=mesh, seed=seed)
  other = None
  if sources.reference_model is not None:
    other = load_model(
      sources.reference_model, None, checkpoint=sources.reference, mesh=mesh, seed=0
    )
  models = pair_models(policy, lora, other=other, keeps_reference=keeps_reference)
  if sources.adapter is not None:
    nnx.update(policy, load_adapter(sources.adapter, nnx.state(policy, TRAINABLE), mesh))
  if sources.reference_adapter is not None:
    nnx.update(policy, load_adapter(sources.reference_adapter, nnx.state(policy, Frozen), mesh))
  return models


def pair_models(
  policy: Transformer,
  lora: LoraConfig | None,  # None: all weights learn
  *,
  other: Transformer | None,  # the reference, where it is another model
  keeps_reference: bool,
) -> Models:
  """Returns the policy, given its own copies of the base weights that learn, and the reference.

  The reference is the policy with its adapters off: the same variables, but for those that the
  policy got copies of. `keeps_reference=False` drops it where it would take memory.
  """
  reference = other
  if other is None and (lora is not None or keeps_reference):
    reference = reference_of(policy)
  train_weights(policy, None if lora is None else lora.saved)
  return Models(policy, reference)


def load_model(
  model_config: ModelConfig,
  lora: LoraConfig | None,
  *,
  checkpoint: BaseCheckpoint | None,  # None: random weights
  mesh: Mesh,
  seed: int,
) -> Transformer:
  """Returns a model with fresh adapters, whose every array is made or read into its shards."""
  find_base = None if checkpoint is None else lambda base: load_base(checkpoint, base, mesh)
  return _make_model(model_config, lora, find_base, mesh, seed)


def load_onto(policy: Transformer, adapter: AdapterFiles, mesh: Mesh) -> Transformer:
  """Returns an adapter on the policy's own base, of which it makes no copy."""

  def share(base):
    own = dict(nnx.to_flat_state(nnx.state(policy, BASE)))
    wanted = nnx.to_flat_state(base)
    return nnx.from_flat_state([(path, each.replace(own[path][...])) for path, each in wanted])

  model = _make_model(policy.config, adapter.lora, share, mesh, seed=0)
  train_weights(model, adapter.lora.saved)
  nnx.update(model, load_adapter(adapter, nnx.state(model, TRAINABLE), mesh))
  return model


def _make_model(
  model_config: ModelConfig,
  lora: LoraConfig | None,
  find_base: Callable[[nnx.State], nnx.State] | None,  # the arrays of abstract ones; None: random
  mesh: Mesh,
  seed: int,
) -> Transformer:
  def make():
    return nnx.split(Transformer(model_config, lora, nnx.Rngs(params=seed, lora=seed + 1)))

  graphdef, abstract = jax.eval_shape(make)

  def init(variables):
    shardings = named_shardings(nnx.filter_state(abstract, variables), mesh)
    # Whatever the state leaves out, the compiler does not compute.
    return jax.jit(lambda: nnx.filter_state(make()[1], variables), out_shardings=shardings)()

  if find_base is None:
    return nnx.merge(graphdef, init(...))
  base, others = nnx.split_state(abstract, BASE, ...)
  others = init(nnx.Not(BASE)) if others else others
  model = nnx.merge(graphdef, find_base(base), others)
  fit_magnitudes(model)
  return model


def count_parameters(policy: Transformer) -> tuple[int, int]:
  """Returns how many parameters the policy has, and how many of them learn.

  Ranks that only other layers have do not count.
  """
  base = nnx.to_flat_state(nnx.state(policy, nnx.All(BASE, nnx.Not(ChannelScale))))
  total = sum(variable.size for _, variable in base)
  trained = sum(variable.size for _, variable in base if isinstance(variable, Trained))
  learned, frozen = (
    sum(adapter.size for _, adapter in adapters_of(policy) if adapter.learns is learns)
    for learns in (True, False)
  )
  return total + learned + frozen, trained + learned
