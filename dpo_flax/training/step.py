"""The learning step: packed rows -> pair losses -> gradient of the adapters -> new state."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.losses.losses import reward_sums
from dpo_flax.losses.metrics import Sums, metric_sums
from dpo_flax.losses.objective import Objective, as_objective, modified, total_loss
from dpo_flax.losses.pair_logps import PairLogps
from dpo_flax.model.hidden import Model, check_tokens
from dpo_flax.sharding import shard_batch
from dpo_flax.training.logps import Batch, objective_logps
from dpo_flax.training.state import Models, TrainState, as_models, mesh_of, split_models


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step computes its loss.

  Raises:
    ValueError: a number is out of range, or the loss compares the pairs of a whole batch, which is
      split into microbatches.
  """

  objective: Objective
  logits_chunk: int = 512  # scored positions of a row in one visit to the vocabulary
  microbatches: int = 1  # equal parts of a batch's rows, one after the other
  dropout_seed: int | None = None  # None: no dropout
  spike_factor: float = 0.0  # gradient norms above so many medians make no update; 0: no limit

  def __post_init__(self):
    for name in ('logits_chunk', 'microbatches'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: it must be at least 1')
    if not 0 <= self.spike_factor < math.inf:
      raise ValueError(f'spike_factor={self.spike_factor}: it must be a finite number, at least 0')
    if self.objective.sorts_batch and self.microbatches > 1:
      raise ValueError(
        f'objective.loss={self.objective.loss} sorts the pairs of the whole batch, so '
        f'batch.microbatches={self.microbatches} would change it: set it to 1'
      )


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The jitted step of a pair of models: (state, batch) -> (state, metrics).

  It consumes `state`: the arrays of the state that went in are gone, only the new one holds. The
  batch is `pack.fill_batch`'s, as NumPy or JAX arrays. On models that lie on a mesh, NumPy arrays
  are this process's rows of the batch. No mesh need be set (jax.set_mesh), on one device or on
  many; inside a jit of one's own, call `jitted`, under the mesh where there is one.

  The metrics are `sums` of (numerator, denominator) pairs, which add up over batches and which
  `losses.metrics.summarize` turns into numbers; `grad_norm`; `updates`, those made before; `finite`
  and `spikes`. A loss or gradient that is not finite leaves the state as it was, and so does a
  gradient that spikes.
  """

  jitted: Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Any]]]
  frozen: nnx.State  # what does not learn: the second argument of `jitted`
  graphdef: nnx.GraphDef
  mesh: Mesh | None  # that the models lie on
  vocab_size: int | None = None  # of the policy; None: unknown

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step.

    Raises:
      ValueError: NumPy arrays hold token ids that the policy has not.
    """
    check_tokens(batch, self.vocab_size)
    if self.mesh is None:
      return self.jitted(state, self.frozen, batch)
    if any(isinstance(array, np.ndarray) for array in batch.values()):
      batch = shard_batch(batch, self.mesh)
    with jax.set_mesh(self.mesh):
      return self.jitted(state, self.frozen, batch)

  def policy(self, state: TrainState) -> Model:
    """Returns the policy as it is in `state`, whose arrays it shares: the next step ends both."""
    return nnx.merge(self.graphdef, state.trainable, self.frozen).policy


def make_train_step(
  models: Models | Model,
  optimizer: optax.GradientTransformation,
  loss: str | Objective | Callable[[PairLogps], jax.Array],
  *,
  logits_chunk: int = 512,
  microbatches: int = 1,
  dropout_seed: int | None = None,
  spike_factor: float = 0.0,
  compiler_options: dict[str, Any] | None = None,
) -> TrainStep:
  """Returns the step that trains the policy's adapters: every nnx.LoRAParam, and nothing else.

  >>> models = Models(policy, reference_of(policy))
  >>> step = make_train_step(models, optax.adamw(1e-4), 'ipo')
  >>> state = init_state(models, optax.adamw(1e-4))
  >>> state, metrics = step(state, batch)
  >>> int(state.step)
  1

  The step minimises sum(losses * logps.weights) / sum(logps.weights) over the pairs of a batch.

  Args:
    models: policy and reference, of any class that has the methods of `hidden.Model`. A policy
      alone will do where the loss needs no reference, or the batches hold `reference_logps`.
    optimizer: of optax; it sees the adapters alone.
    loss: the name of a loss, or an Objective, or a function PairLogps -> losses [B, P].
    logits_chunk: the scored positions of a row that meet the vocabulary at once.
    microbatches: the parts into which the rows of a batch are cut, to need less memory.
    dropout_seed: dropout is a function of this seed and the step; None: no dropout.
    spike_factor: a gradient norm above so many times the median of the last 64 makes no update; 0:
      no limit.
    compiler_options: of XLA.

  Raises:
    ValueError: the objective is unfit, or does not go with microbatches; nothing learns.
  """
  options = StepOptions(as_objective(loss), logits_chunk, microbatches, dropout_seed, spike_factor)
  graphdef, trainable, frozen = split_models(as_models(models))
  jitted = jit_train_step(graphdef, optimizer, options, compiler_options=compiler_options)
  vocab_size = getattr(as_models(models).policy, 'vocab_size', None)
  return TrainStep(jitted, frozen, graphdef, mesh_of((trainable, frozen)), vocab_size)


def jit_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  options: StepOptions,
  *,
  compiler_options: dict[str, Any] | None = None,  # of XLA
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Any]]]:
  """Returns the jitted step (state, frozen, batch) -> (state, metrics) of split models.

  It needs no arrays, only the graphdef of `split_models`. It consumes `state`; see `TrainStep`.
  """

  def train_step(state, frozen, batch):
    def loss(trainable, part, index):
      # Copies, as modules that scan over their layers may not change variables of an outer trace.
      models = nnx.merge(graphdef, trainable, frozen, copy=True)
      key = _dropout_key(options, state.step, index)
      logps, statistics = objective_logps(
        models,
        part,
        options.objective,
        logits_chunk=options.logits_chunk,
        reward_mean=state.rewards.mean,
        dropout_key=key,
      )
      losses = total_loss(logps, options.objective)
      # Divided by the pairs of the whole batch: the parts' losses and gradients simply add up.
      share = jnp.sum(losses * logps.weights) / _total_weight(batch)
      report = _report(logps, losses, part, options.objective)
      if statistics:
        report['statistics'] = jax.lax.stop_gradient(dict(statistics))
      return share, report | {'rewards': _reward_sums(logps, options.objective)}

    gradients, sums = _accumulate(loss, state.trainable, batch, options.microbatches)
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    numbers = jnp.stack([grad_norm, optax.tree.norm(updates), sums['means']['dpo_loss'][0]])
    finite = jnp.all(jnp.isfinite(numbers))
    spikes = finite & state.norms.spikes(grad_norm, options.spike_factor or jnp.inf)
    updated = TrainState(
      step=state.step + 1,
      trainable=cast(nnx.State, optax.apply_updates(state.trainable, updates)),
      opt_state=opt_state,
      rewards=state.rewards.add(*sums.pop('rewards')),
      norms=state.norms.add(grad_norm),
    )
    metrics = {'sums': sums, 'grad_norm': grad_norm, 'finite': finite, 'spikes': spikes}
    metrics['updates'] = state.step
    learns = finite & ~spikes
    state = jax.tree.map(lambda new, old: jnp.where(learns, new, old), updated, state)
    return state, metrics

  return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def jit_eval_step(
  graphdef: nnx.GraphDef,
  options: StepOptions,
  *,
  compiler_options: dict[str, Any] | None = None,  # of XLA
) -> Callable[[TrainState, nnx.State, Batch], Sums]:
  """Returns the jitted (state, frozen, batch) -> metric sums, without dropout."""

  def eval_step(state, frozen, batch):
    models = nnx.merge(graphdef, state.trainable, frozen, copy=True)
    objective, mean = options.objective, state.rewards.mean
    logps, _ = objective_logps(
      models, batch, objective, logits_chunk=options.logits_chunk, reward_mean=mean
    )
    return _report(logps, total_loss(logps, objective), batch, objective)

  return jax.jit(eval_step, compiler_options=compiler_options)


def _report(logps: PairLogps, losses: jax.Array, batch: Batch, objective: Objective) -> Sums:
  """The sums that metrics are made of, and the batch's true counts."""
  # Padding sees itself alone; so does the last token of a sequence, which is never at position 0.
  after = jnp.arange(1, batch['tokens'].shape[1] + 1)[None]
  is_padding = (batch['visible_until'] == after) & (batch['positions'] == 0)
  counts = {
    'pairs': jnp.sum(batch['pair_mask']),
    'tokens': jnp.sum(~is_padding),
    'positions': jnp.array(batch['tokens'].size),
  }
  return metric_sums(logps, losses, objective) | {'counts': counts}


def _reward_sums(logps: PairLogps, objective: Objective) -> tuple[jax.Array, jax.Array]:
  if 'bco_pair' in objective.loss:
    return reward_sums(modified(logps, objective), beta=objective.beta)
  return jnp.zeros(()), jnp.zeros(())


def _total_weight(batch: Batch) -> jax.Array:
  weights = batch['pair_mask'] * batch.get('pair_weight', 1.0)
  # An all-empty batch has no loss, not an undefined one.
  return jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)


def _accumulate(loss, trainable: nnx.State, batch: Batch, parts: int):
  """Sums the gradient and the metrics of `loss` over equal parts of the batch's rows."""
  gradient = jax.grad(loss, has_aux=True)
  if parts == 1:
    return gradient(trainable, batch, 0)

  def split(array):
    # Row i goes to part i % parts, so that every device keeps the rows it holds.
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

  def add(total, step):
    part, index = step
    return jax.tree.map(jnp.add, total, gradient(trainable, part, index)), None

  rows = len(batch['tokens'])
  if rows % parts:
    raise ValueError(f'microbatches={parts} does not divide the {rows} rows of the batch')
  split_batch = jax.tree.map(split, dict(batch))
  first = jax.tree.map(lambda array: array[0], split_batch)
  shapes = jax.eval_shape(gradient, trainable, first, 0)
  zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, (split_batch, jnp.arange(parts)))
  return total


def _dropout_key(options: StepOptions, step: jax.Array, part: jax.Array) -> jax.Array | None:
  if options.dropout_seed is None:
    return None
  key = jax.random.fold_in(jax.random.key(options.dropout_seed), step)
  return jax.random.fold_in(key, part)
