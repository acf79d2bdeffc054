"""Models and a packed batch -> the log-probs of its answers and its pairs."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx

from dpo_flax.losses.answers import (
  AnswerLogps,
  TokenLogps,
  check_batch,
  pairs_of,
  scored,
  sum_by_answer,
)
from dpo_flax.losses.objective import Objective, SomeLoss, as_objective
from dpo_flax.losses.pair_logps import PairLogps
from dpo_flax.model.hidden import Hidden, Model, check_tokens, run_model
from dpo_flax.model.lora import TRAINABLE
from dpo_flax.model.token_logps import (
  Stream,
  TokenStatistics,
  TokenStatisticsOptions,
  token_statistics,
)
from dpo_flax.model.transformer import Transformer, run_streams
from dpo_flax.training.state import Models, as_models

Batch = Mapping[str, jax.Array]  # the fields of pack.fill_batch, [B, ...]


def answer_logps(
  models: Models | Model,
  batch: Batch,
  *,
  wanted: TokenStatisticsOptions | None = None,
  keep_tokens: bool = False,  # for pairs_of(tails=True)
  logits_chunk: int = 512,
  dropout_key: jax.Array | None = None,
) -> AnswerLogps:
  """Returns log-probs and statistics of every answer of a batch, float32 [B, S].

  Differentiable in the policy, never in the reference. The head of a policy that is an nnx.Module
  has a gradient only where its logits read an nnx.LoRAParam (or a weight that `train_weights` lets
  learn), at the price of forming them twice.

  >>> answer_logps(policy, batch).policy.shape  # one row of two answers
  (1, 2)

  Args:
    models: policy and reference, or a policy alone. A reference's log-probs that the batch itself
      holds (`reference_logps`) take the place of the reference.
    batch: the fields of `pack.fill_batch`, as NumPy or JAX arrays.
    wanted: which numbers are computed beside the log-probs; None: no others.
    keep_tokens: also return the log-prob of each token.
    logits_chunk: the scored positions of a row that meet the vocabulary at once. More are faster
      and take more memory: B x logits_chunk x V floats.
    dropout_key: None: no dropout. The reference never has any.

  Raises:
    ValueError: a model's hidden states have another shape; the KL is wanted, and no reference run;
      NumPy arrays hold token ids that the policy has not; the batch's fields have shapes that do
      not go together.
  """
  policy, reference = as_models(models)
  wanted = wanted or TokenStatisticsOptions()
  if 'reference_logps' in batch:
    reference = None
  if wanted.kl and reference is None:
    raise ValueError(
      'the KL needs a reference that runs: pass Models(policy, reference), and a batch without '
      'reference_logps, which are those of the answers alone'
    )
  check_batch(batch)
  check_tokens(batch, getattr(policy, 'vocab_size', None))
  hidden, other = _run(policy, reference, batch, dropout_key)
  tokens = token_statistics(
    Stream(hidden.states, policy.logits),
    None if other is None or reference is None else Stream(other.states, reference.logits),
    batch['targets'],
    scored(batch),
    wanted=wanted,
    chunk=logits_chunk,
    head_is_trained=_head_learns(policy, hidden.states),
  )
  answers = _sum_tokens(tokens, batch)
  kept = TokenLogps(tokens.policy_logps, tokens.reference_logps) if keep_tokens else None
  return dataclasses.replace(answers, tokens=kept, statistics=hidden.statistics)


def pair_logps(
  models: Models | Model,
  batch: Batch,
  objective: Objective | SomeLoss | None = None,
  *,
  logits_chunk: int = 512,
  dropout_key: jax.Array | None = None,
) -> PairLogps:
  """Returns what `objective` reads of each pair, [B, P]: see `answer_logps`.

  Without an objective, it is the log-probs and lengths by all models that are given.

  >>> print(pair_logps(policy, batch).chosen_lengths)
  [[2.]]

  Raises:
    ValueError: the objective needs a reference, and there is none.
  """
  options = {'logits_chunk': logits_chunk, 'dropout_key': dropout_key}
  if objective is None:
    return pairs_of(answer_logps(models, batch, **options), batch)
  return objective_logps(models, batch, as_objective(objective), **options)[0]


def objective_logps(
  models: Models | Model,
  batch: Batch,
  objective: Objective,
  *,
  logits_chunk: int,
  reward_mean: jax.Array | None = None,  # [] of all pairs seen so far, for bco_pair
  dropout_key: jax.Array | None = None,
) -> tuple[PairLogps, Mapping[str, jax.Array]]:
  """Returns what the objective reads of each pair, and the policy's statistics of the batch."""
  policy, reference = as_models(models)
  if objective.needs_reference and reference is None and 'reference_logps' not in batch:
    raise ValueError(
      f'objective.loss={objective.loss} needs a reference: pass Models(policy, reference), or '
      'batches with reference_logps. A function of your own that reads none is '
      'Loss(function, needs_reference=False)'
    )
  has_tails = objective.ld_alpha is not None
  answers = answer_logps(
    Models(policy, reference if objective.needs_reference else None),
    batch,
    wanted=_wanted(objective),
    keep_tokens=has_tails,
    logits_chunk=logits_chunk,
    dropout_key=dropout_key,
  )
  logps = pairs_of(answers, batch, tails=has_tails)
  if 'bco_pair' in objective.loss:
    logps = dataclasses.replace(logps, reward_mean=reward_mean)
  return logps, answers.statistics


def _run(
  policy: Model, reference: Model | None, batch: Batch, dropout_key: jax.Array | None
) -> tuple[Hidden, Hidden | None]:
  """Runs both models over a batch; the reference's states have no gradient."""
  if reference is None:
    return run_model(policy, batch, dropout_key=dropout_key), None
  if (
    isinstance(policy, Transformer)
    and isinstance(reference, Transformer)
    and policy.config.num_layers == reference.config.num_layers
  ):
    # One scan can run both, in which each layer's weights are gathered once.
    hidden, other = run_streams(policy, reference, batch, dropout_key=dropout_key)
    assert other is not None
    return Hidden(hidden), Hidden(other)
  hidden = run_model(policy, batch, dropout_key=dropout_key)
  return hidden, jax.lax.stop_gradient(run_model(reference, batch))


def _head_learns(policy: Model, states: jax.Array) -> bool:
  """Whether the policy's logits read any variable that learns, as a trace of them shows."""
  if not isinstance(policy, nnx.Module):
    return True  # unknown: the gradient is right in any case, and dearer
  graphdef, trainable, frozen = nnx.split(policy, TRAINABLE, ...)
  one = jnp.zeros((1, 1, states.shape[-1]), states.dtype)

  def logits(trainable):
    return nnx.merge(graphdef, trainable, frozen).logits(one)

  jaxpr = jax.make_jaxpr(logits)(trainable).jaxpr
  learned = set(jaxpr.invars)
  for equation in jaxpr.eqns:
    inputs = (x for x in equation.invars if not isinstance(x, jax.extend.core.Literal))
    if not learned.isdisjoint(inputs):
      learned.update(equation.outvars)
  return not learned.isdisjoint(x for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var))


def _wanted(objective: Objective) -> TokenStatisticsOptions:
  penalised = objective.kl_penalty_weight is not None
  reported = objective.token_statistics
  return TokenStatisticsOptions(
    kl=penalised or (reported and objective.needs_reference),
    kl_gradient=penalised,
    entropy=reported,
    alignments=objective.wpo,
  )


def _sum_tokens(tokens: TokenStatistics, batch: Batch) -> AnswerLogps:
  """Sums, or averages, each answer's tokens."""
  ids, count = batch['answer_ids'], batch['answer_mask'].shape[1]

  def total(values: jax.Array) -> jax.Array:
    return sum_by_answer(values, ids, answers=count)

  def mean(values: jax.Array | None) -> jax.Array | None:
    return None if values is None else total(values) / jnp.maximum(lengths, 1)

  lengths, reference = total(scored(batch)), batch.get('reference_logps')
  if reference is None and tokens.reference_logps is not None:
    reference = total(tokens.reference_logps)
  return AnswerLogps(
    policy=total(tokens.policy_logps),
    reference=reference,
    lengths=lengths,
    mask=batch['answer_mask'],
    kl=mean(tokens.kl),
    entropy=mean(tokens.entropy),
    alignments=mean(tokens.alignments),
  )
