"""The learning step: packed rows -> pair losses -> gradient of the adapters -> new state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dpo_flax.losses.losses import reward_sums
from dpo_flax.losses.metrics import Sums, metric_sums
from dpo_flax.losses.objective import Objective, modified, total_loss
from dpo_flax.losses.pair_logps import Branches, PairLogps, sum_by_response, tail_mask
from dpo_flax.model.token_logps import Stream, TokenStatistics, Wanted, token_statistics
from dpo_flax.model.transformer import Transformer, run_streams
from dpo_flax.training.state import Models, TrainState

Batch = Mapping[str, jax.Array]  # the fields of a packed row, [B, ...]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """What the step needs to know of the run's config."""

  objective: Objective
  logits_chunk: int  # response tokens per row in one visit to the vocabulary
  microbatches: int
  head_is_trained: bool
  dropout_seed: int | None  # None: no dropout
  spike_factor: float  # gradient norms above so many medians make no update; 0: no limit


def pair_logps(
  models: Models,
  batch: Batch,
  options: StepOptions,
  *,
  reward_mean: jax.Array | None = None,  # [] of all pairs seen so far
  dropout_key: jax.Array | None = None,
) -> PairLogps:
  """Returns what the objective needs to know of each pair, [B, P]."""
  objective = options.objective
  is_live = objective.needs_reference and 'reference_logps' not in batch
  policy, reference = models.policy, models.reference if is_live else None
  policy_hidden, reference_hidden = run_streams(policy, reference, batch, dropout_key=dropout_key)
  tokens = token_statistics(
    Stream(policy_hidden, policy.logits),
    reference and Stream(reference_hidden, reference.logits),
    batch['targets'],
    batch['loss_mask'],
    wanted=_wanted(objective),
    chunk=options.logits_chunk,
    head_is_trained=options.head_is_trained,
  )
  return _sum_tokens(tokens, batch, objective, reward_mean)


def reference_logps(
  reference: Transformer, batch: Batch, *, chunk: int
) -> jax.Array:  # [B, P, 2] chosen, rejected
  """Returns the log-probs that the field `reference_logps` holds, by a model on its own."""
  hidden, _ = run_streams(reference, None, batch)
  tokens = token_statistics(
    Stream(hidden, reference.logits),
    None,
    batch['targets'],
    batch['loss_mask'],
    wanted=Wanted(),
    chunk=chunk,
  )
  pairs = batch['pair_mask'].shape[1]
  sums = sum_by_response(tokens.policy_logps, batch['sequence_ids'], pairs=pairs)
  return jnp.stack(sums, axis=-1)


def _wanted(objective: Objective) -> Wanted:
  penalised = objective.kl_penalty_weight is not None
  reported = objective.token_statistics
  return Wanted(
    kl=penalised or (reported and objective.needs_reference),
    kl_gradient=penalised,
    entropy=reported,
    alignments=objective.wpo,
  )


def _sum_tokens(
  tokens: TokenStatistics, batch: Batch, objective: Objective, reward_mean: jax.Array | None
) -> PairLogps:
  """Sums, or averages, each response's tokens."""
  ids, pairs = batch['sequence_ids'], batch['pair_mask'].shape[1]

  def total(values):
    return Branches(None, None) if values is None else sum_by_response(values, ids, pairs=pairs)

  def mean(values):
    return (
      None
      if values is None
      else jax.tree.map(
        lambda value, length: value / jnp.maximum(length, 1), total(values), lengths
      )
    )

  lengths = total(batch['loss_mask'])
  tails = None if objective.ld_alpha is None else tail_mask(ids, lengths)

  def tail(values):
    return None if tails is None or values is None else total(values * tails)

  policy, reference = total(tokens.policy_logps), total(tokens.reference_logps)
  if 'reference_logps' in batch:
    reference = Branches(*jnp.moveaxis(batch['reference_logps'], -1, 0))
  return PairLogps(
    policy_chosen=policy.chosen,
    policy_rejected=policy.rejected,
    reference_chosen=reference.chosen,
    reference_rejected=reference.rejected,
    chosen_lengths=lengths.chosen,
    rejected_lengths=lengths.rejected,
    pair_mask=batch['pair_mask'],
    pair_weight=batch.get('pair_weight'),
    chosen_probability=batch.get('chosen_probability'),
    margin=batch.get('margin'),
    policy_tails=tail(tokens.policy_logps),
    reference_tails=tail(tokens.reference_logps),
    alignments=mean(tokens.alignments),
    kl=mean(tokens.kl),
    entropy=mean(tokens.entropy),
    reward_mean=reward_mean if 'bco_pair' in objective.loss else None,
  )


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  options: StepOptions,
  *,
  compiler_options: Mapping[str, str] | None = None,  # of XLA
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Any]]]:
  """Returns the jitted step (state, frozen, batch) -> (state, metrics); it consumes `state`.

  A loss or gradient that is not finite leaves the state as it was, and `metrics['finite']` False;
  so does a gradient that spikes, with `metrics['spikes']` True. Other metrics: `sums` of
  (numerator, denominator) pairs that add up over batches, `grad_norm`, and the `updates` before.
  """

  def train_step(state, frozen, batch):
    def loss(trainable, part, index):
      models = nnx.merge(graphdef, trainable, frozen)
      key = _dropout_key(options, state.step, index)
      mean = state.rewards.mean
      logps = pair_logps(models, part, options, reward_mean=mean, dropout_key=key)
      losses = total_loss(logps, options.objective)
      # Divided by the pairs of the whole batch: the parts' losses and gradients simply add up.
      share = jnp.sum(losses * logps.weights) / _total_weight(batch)
      report = _report(logps, losses, part, options.objective)
      return share, report | {'rewards': _reward_sums(logps, options.objective)}

    gradients, sums = _accumulate(loss, state.trainable, batch, options.microbatches)
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    numbers = jnp.stack([grad_norm, optax.tree.norm(updates), sums['means']['dpo_loss'][0]])
    finite = jnp.all(jnp.isfinite(numbers))
    spikes = finite & state.norms.spikes(grad_norm, options.spike_factor or jnp.inf)
    updated = TrainState(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
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


def make_eval_step(
  graphdef: nnx.GraphDef,
  options: StepOptions,
  *,
  compiler_options: Mapping[str, str] | None = None,  # of XLA
) -> Callable[[TrainState, nnx.State, Batch], Sums]:
  """Returns the jitted (state, frozen, batch) -> metric sums, without dropout."""

  def eval_step(state, frozen, batch):
    models = nnx.merge(graphdef, state.trainable, frozen)
    logps = pair_logps(models, batch, options, reward_mean=state.rewards.mean)
    return _report(logps, total_loss(logps, options.objective), batch, options.objective)

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
