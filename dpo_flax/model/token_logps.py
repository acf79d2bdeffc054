"""Hidden states -> per-token log-probs, KL and entropy, without ever holding [T, V] logits.

Only response tokens meet the vocabulary: they are gathered to the front of each row and walked in
chunks, as many as the fullest row needs. With a frozen head the gradient of every token's numbers
is computed in the same visit and kept ([B, T, D]), so that backward is one multiplication and the
logits are formed once, not twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Head = Callable[[jax.Array], jax.Array]  # [..., D] -> logits [..., V], float32


class Stream(NamedTuple):
  """One model's final hidden states and the head that turns them into logits."""

  hidden: jax.Array  # [B, T, D]
  head: Head


class TokenStatistics(NamedTuple):
  """Numbers of each response token; [B, T] float32, 0 where loss_mask is 0."""

  policy_logps: jax.Array  # log pi(target)
  reference_logps: jax.Array | None = None
  kl: jax.Array | None = None  # KL(policy || reference) over the whole vocabulary, nats
  entropy: jax.Array | None = None  # of the policy, nats
  alignments: jax.Array | None = None  # log pi(target) - log sum_v pi(v)^2 (arXiv:2406.11827)


class TokenStatisticsOptions(NamedTuple):
  """Which statistics are computed beside the log-probs, and which of them are differentiated."""

  kl: bool = False
  kl_gradient: bool = False
  entropy: bool = False
  alignments: bool = False


def token_statistics(
  policy: Stream,
  reference: Stream | None,
  targets: jax.Array,  # [B, T] int32
  loss_mask: jax.Array,  # [B, T], bool or number; 0 where no response token is predicted
  *,
  wanted: TokenStatisticsOptions,
  chunk: int,  # response tokens of a row in one visit to the vocabulary
  head_is_trained: bool = False,
) -> TokenStatistics:
  """Returns the statistics of every response token under both streams.

  `policy_logps`, and `kl` where its gradient is wanted, are differentiable in the policy's hidden
  states; the policy's head has a gradient only with `head_is_trained`, at the price of forming its
  logits again in backward. Nothing else is differentiated, the reference never.
  """
  streams = [policy.hidden] if reference is None else [policy.hidden, reference.hidden]
  chex.assert_equal_shape_prefix([*streams, targets, loss_mask], 2)
  context = {'targets': targets}
  if reference is not None:
    context['reference'] = jax.lax.stop_gradient(reference.hidden)

  def visit(inputs):  # one chunk of them
    hidden, context = inputs
    reference_logits = None
    if reference is not None:
      reference_logits = jax.lax.stop_gradient(reference.head(context['reference']))
    return _chunk_statistics(policy.head(hidden), reference_logits, context['targets'], wanted)

  inputs = (policy.hidden, context)
  if head_is_trained:
    # Under plain autodiff, which forms each chunk's logits again in backward.
    return _map_responses(visit, inputs, loss_mask, chunk)
  differentiable = ('policy_logps', 'kl') if wanted.kl_gradient else ('policy_logps',)
  return _run_saving_gradients(visit, inputs, loss_mask, chunk, differentiable)


def _chunk_statistics(
  policy_logits: jax.Array,  # [B, C, V] float32
  reference_logits: jax.Array | None,
  targets: jax.Array,  # [B, C]
  wanted: TokenStatisticsOptions,
) -> TokenStatistics:
  # A comparison, where indexing would gather a vocabulary that is split over devices.
  is_target = jnp.arange(policy_logits.shape[-1])[None, None] == targets[..., None]

  def log_prob(logits):
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)

  policy_logps = log_prob(policy_logits)
  statistics = TokenStatistics(policy_logps)
  if reference_logits is not None:
    statistics = statistics._replace(reference_logps=log_prob(reference_logits))
  if wanted.kl and reference_logits is not None:
    difference = jax.nn.log_softmax(policy_logits) - jax.nn.log_softmax(reference_logits)
    kl = jnp.sum(jax.nn.softmax(policy_logits) * difference, axis=-1)
    statistics = statistics._replace(kl=kl if wanted.kl_gradient else jax.lax.stop_gradient(kl))
  # What follows is reported or weighs a loss, and has no gradient.
  log_probs = jax.nn.log_softmax(jax.lax.stop_gradient(policy_logits))
  if wanted.entropy:
    statistics = statistics._replace(entropy=-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
  if wanted.alignments:
    collision = jax.nn.logsumexp(2 * log_probs, axis=-1)
    alignments = jax.lax.stop_gradient(policy_logps) - collision
    statistics = statistics._replace(alignments=alignments)
  return statistics


def _run_saving_gradients(visit, inputs, loss_mask, chunk, differentiable) -> TokenStatistics:
  """Differentiable in the hidden states alone, their gradients computed in the forward visit."""
  hidden, context = inputs

  def visit_with_gradients(inputs):
    hidden, context = inputs
    statistics, pullback = jax.vjp(lambda hidden: visit((hidden, context)), hidden)
    zeros = jax.tree.map(jnp.zeros_like, statistics)
    # A token's numbers depend on no other token: one pullback gives every token's gradient.
    ones = {name: jnp.ones_like(getattr(statistics, name)) for name in differentiable}
    gradients = {name: pullback(zeros._replace(**{name: ones[name]}))[0] for name in ones}
    return statistics, gradients

  stopped = jax.lax.stop_gradient(hidden)
  found = _map_responses(visit_with_gradients, (stopped, context), loss_mask, chunk)
  statistics, gradients = jax.lax.stop_gradient(found)
  return statistics._replace(
    **{
      name: _with_gradient(getattr(statistics, name), hidden, gradient)
      for name, gradient in gradients.items()
    }
  )


@jax.custom_vjp
def _with_gradient(
  values: jax.Array,  # [B, T]
  hidden: jax.Array,  # [B, T, D], what they were computed from
  gradients: jax.Array,  # [B, T, D], of each value in its own token's hidden state
) -> jax.Array:  # [B, T]
  """Returns `values`, differentiable in `hidden`."""
  return values


def _forward(values, hidden, gradients):
  return values, gradients


def _backward(gradients, cotangents):
  return None, (cotangents[..., None] * gradients).astype(gradients.dtype), None


_with_gradient.defvjp(_forward, _backward)


def _map_responses(
  function: Callable[[Any], Any],  # a tree of [B, C, ...] -> a tree of [B, C, ...]
  arrays: Any,  # a tree of [B, T, ...]
  loss_mask: jax.Array,  # [B, T]
  chunk: int,  # C
) -> Any:  # a tree of [B, T, ...]
  """Applies `function` to the response tokens alone, a chunk at a time; 0 at all others."""
  rows, tokens = loss_mask.shape
  chunk = min(chunk, tokens)
  visits = -(-tokens // chunk)
  is_response = loss_mask != 0
  # Response tokens first; the end repeats the last token to fill a whole number of chunks.
  order = jnp.argsort(~is_response, axis=1, stable=True)
  padded = jnp.pad(order, ((0, 0), (0, visits * chunk - tokens)), mode='edge')
  fullest = jnp.max(jnp.sum(is_response, axis=1))

  def visit(_, step):
    number, index = step
    inputs = jax.tree.map(lambda array: _take(array, index), arrays)
    idle = jax.tree.map(
      lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, inputs)
    )
    return None, jax.lax.cond(number * chunk < fullest, function, lambda _: idle, inputs)

  indices = padded.reshape(rows, visits, chunk).swapaxes(0, 1)
  # Around the condition: inside it, autodiff would keep the head's weights for each visit.
  visit = jax.checkpoint(visit, prevent_cse=False)
  _, results = jax.lax.scan(visit, None, (jnp.arange(visits), indices))
  position = jnp.argsort(order, axis=1)

  def restore(result):  # [visits, B, C, ...] -> [B, T, ...]
    flat = result.swapaxes(0, 1).reshape(rows, visits * chunk, *result.shape[3:])
    keep = is_response.reshape(rows, tokens, *[1] * (flat.ndim - 2))
    return jnp.where(keep, _take(flat, position), 0)

  return jax.tree.map(restore, results)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
  """[B, T, ...], [B, C] -> [B, C, ...]: the tokens of each row at `index`."""
  return jax.vmap(lambda row, where: row[where])(array, index)
