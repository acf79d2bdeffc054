"""What a run learns: the trainable part of a model, the optimizer's state and the step."""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dpo_flax.model.hidden import Model
from dpo_flax.model.lora import TRAINABLE
from dpo_flax.sharding import named_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardMean:
  """The running mean of the implicit rewards of both responses of every pair, for bco_pair."""

  mean: jax.Array  # [] float32
  count: jax.Array  # [] float32, responses seen

  def add(self, total: jax.Array, count: jax.Array) -> 'RewardMean':
    """Returns the mean after `count` more rewards that sum to `total`."""
    seen = self.count + count
    return RewardMean(self.mean + (total - count * self.mean) / jnp.maximum(seen, 1), seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentNorms:
  """The gradient norms of the last updates, by which a spike is known."""

  values: jax.Array  # [64] float32, a ring
  count: jax.Array  # [] int32, updates seen

  def add(self, norm: jax.Array) -> 'RecentNorms':
    """Returns the norms with one more, in place of the oldest."""
    index = self.count % len(self.values)
    return RecentNorms(self.values.at[index].set(norm), self.count + 1)

  def spikes(self, norm: jax.Array, factor: float) -> jax.Array:
    """Whether a norm exceeds `factor` times their median, [] bool; never before 16 updates."""
    held = jnp.minimum(self.count, len(self.values))
    absent = jnp.arange(len(self.values)) >= held
    median = jnp.sort(jnp.where(absent, jnp.inf, self.values))[jnp.maximum(held - 1, 0) // 2]
    return (self.count >= 16) & (norm > factor * median)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes from step to step, and all that a checkpoint must hold of it."""

  step: jax.Array  # [] int32, updates made
  trainable: nnx.State  # float32
  opt_state: Any
  rewards: RewardMean
  norms: RecentNorms


class Models(NamedTuple):
  """The two models of a run. What the policy does not learn whole, they may share.

  >>> from dpo_flax.model.linear import Linear
  >>> from dpo_flax.model.lora import Lora, reference_of
  >>> policy = Linear(4, 4, lora=Lora(rank=2), rngs=nnx.Rngs(0))
  >>> models = Models(policy, reference_of(policy))  # one copy of the weights
  """

  policy: Model
  reference: Model | None = None  # None: no loss needs it, and it would take memory


def as_models(models: Models | Model | tuple) -> Models:
  """Returns Models also of a policy alone, or of a tuple or list of policy and reference."""
  return Models(*cast(tuple, models)) if isinstance(models, tuple | list) else Models(models)


def split_models(models: Models) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Returns (graphdef, trainable, frozen): the policy's adapters and what of it is Trained learn.

  Nothing of a reference does, should it have adapters of its own. Variables that both models hold
  appear once, as the policy's; `nnx.merge` of the three gives both models back.

  Raises:
    ValueError: nothing learns, or the reference would learn as well.
  """
  if models.policy is models.reference:
    raise ValueError('policy and reference are the same object: pass reference_of(policy)')
  learns = nnx.All(TRAINABLE, lambda path, _: path[0] == 'policy')
  graphdef, trainable, frozen = nnx.split(models, learns, ...)
  if not jax.tree.leaves(trainable):
    raise ValueError('nothing learns: the policy has no nnx.LoRAParam. Load it with lora=Lora(...)')
  return graphdef, trainable, frozen


def init_state(models: Models | Model, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state at step 0 of what learns in the policy: its adapters, every nnx.LoRAParam.

  The state holds copies, so that the step, which consumes its state, leaves the models as they are.

  >>> from dpo_flax.model.linear import Linear
  >>> from dpo_flax.model.lora import Lora
  >>> policy = Linear(4, 4, lora=Lora(rank=2), rngs=nnx.Rngs(0))
  >>> int(init_state(policy, optax.adamw(1e-4)).step)
  0

  Raises:
    ValueError: nothing learns.
  """
  _, trainable, _ = split_models(as_models(models))
  return init_train_state(jax.tree.map(jnp.copy, trainable), optimizer, mesh_of(trainable))


def init_train_state(
  trainable: nnx.State,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None,  # None: all arrays are on one device
) -> TrainState:
  """Returns the state at step 0, which takes `trainable` over.

  The optimizer's moments are sharded like their parameters.
  """

  def init(trainable):
    rewards = RewardMean(mean=jnp.zeros(()), count=jnp.zeros(()))
    norms = RecentNorms(values=jnp.zeros(64), count=jnp.zeros((), jnp.int32))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, trainable, optimizer.init(trainable), rewards, norms)

  if mesh is None:
    return jax.jit(init)(trainable)
  # Left alone, jit would replicate the moments.
  shardings = named_shardings(jax.eval_shape(init, trainable), mesh)
  return jax.jit(init, out_shardings=shardings)(trainable)


def mesh_of(arrays: Any) -> Mesh | None:
  """Returns the mesh that a tree of arrays lies on; None where they are not on one."""
  shardings = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(arrays))
  meshes = (each.mesh for each in shardings if isinstance(each, NamedSharding))
  return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)
