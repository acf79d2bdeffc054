"""The chunked pass equals whole logits, in values and gradients, without ever holding them."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax.model.token_logps import (
  Stream,
  TokenStatistics,
  TokenStatisticsOptions,
  token_statistics,
)
from helpers.models import arrays_in

ROWS, TOKENS, EMBED, VOCAB = 4, 37, 8, 53
ALL = TokenStatisticsOptions(kl=True, kl_gradient=True, entropy=True, alignments=True)
# Chunks that divide 37 tokens, do not, are one token, or are longer than the row.
CHUNKS = (1, 8, 37, 100)


def normal(seed, *shape, scale=1.0):
  values = scale * np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope='module')
def inputs():
  """Hidden states, heads and a mask: scattered, none, all, and a single last token."""
  random = np.random.default_rng(0)
  mask = np.stack([random.random(TOKENS) < 0.4, *np.zeros((3, TOKENS), bool)])
  mask[2], mask[3, -1] = True, True
  return {
    'policy': normal(1, ROWS, TOKENS, EMBED),
    'policy_head': normal(2, EMBED, VOCAB),
    'reference': normal(3, ROWS, TOKENS, EMBED),
    'reference_head': normal(4, EMBED, VOCAB),
    'targets': jnp.asarray(random.integers(0, VOCAB, (ROWS, TOKENS))),
    'loss_mask': jnp.asarray(mask, jnp.float32),
  }


def plain(inputs) -> TokenStatistics:
  """All statistics from whole logits, [B, T, V]."""
  policy, reference = (
    jax.nn.log_softmax(inputs[name] @ inputs[f'{name}_head'][None])
    for name in ('policy', 'reference')
  )
  policy_logps, reference_logps = (
    jnp.take_along_axis(logps, inputs['targets'][..., None], axis=-1)[..., 0]
    for logps in (policy, reference)
  )
  probs = jnp.exp(policy)
  statistics = TokenStatistics(
    policy_logps=policy_logps,
    reference_logps=reference_logps,
    kl=jnp.sum(probs * (policy - reference), axis=-1),
    entropy=-jnp.sum(probs * policy, axis=-1),
    alignments=policy_logps - jnp.log(jnp.sum(probs**2, axis=-1)),
  )
  return jax.tree.map(lambda values: values * inputs['loss_mask'], statistics)


def chunked(inputs, *, wanted=ALL, chunk=8, head_is_trained=False, reference=True):
  """The same through the code under test."""

  def stream(name):
    return Stream(inputs[name], lambda hidden: hidden @ inputs[f'{name}_head'][None])

  return token_statistics(
    stream('policy'),
    stream('reference') if reference else None,
    inputs['targets'],
    inputs['loss_mask'],
    wanted=wanted,
    chunk=chunk,
    head_is_trained=head_is_trained,
  )


def weigh(statistics, names):
  """A sum that tells every token of every statistic apart."""
  return sum(
    jnp.sum(normal(10 + i, ROWS, TOKENS) * getattr(statistics, name))
    for i, name in enumerate(names)
  )


def gradients(function, inputs, by, names):
  """Returns the gradient of the weighed statistics by some of the inputs."""

  def total(chosen):
    return weigh(function(inputs | chosen), names)

  return jax.jit(jax.grad(total))({name: inputs[name] for name in by})


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
@pytest.mark.parametrize('chunk', CHUNKS)
def test_statistics_equal_those_of_whole_logits(inputs, chunk, head_is_trained):
  ours = jax.jit(lambda x: chunked(x, chunk=chunk, head_is_trained=head_is_trained))(inputs)
  for name, expected in plain(inputs)._asdict().items():
    np.testing.assert_allclose(getattr(ours, name), expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
@pytest.mark.parametrize('chunk', CHUNKS)
@pytest.mark.parametrize('names', [('policy_logps',), ('policy_logps', 'kl')], ids=len)
def test_gradients_equal_those_of_whole_logits(inputs, chunk, head_is_trained, names):
  by = ('policy', 'policy_head') if head_is_trained else ('policy',)
  wanted = ALL._replace(kl_gradient='kl' in names)

  def function(inputs):
    return chunked(inputs, chunk=chunk, head_is_trained=head_is_trained, wanted=wanted)

  ours = gradients(function, inputs, by, names)
  expected = gradients(plain, inputs, by, names)
  for name in by:
    np.testing.assert_allclose(ours[name], expected[name], atol=2e-5, err_msg=name)
    assert np.abs(expected[name]).max() > 0.1


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_a_jitted_loss_has_the_gradient_of_the_loss(inputs, head_is_trained):
  def loss(hidden, inputs):
    statistics = chunked(inputs | {'policy': hidden}, head_is_trained=head_is_trained)
    return weigh(statistics, ('policy_logps',))

  inside = jax.grad(jax.jit(loss))(inputs['policy'], inputs)
  outside = jax.jit(jax.grad(loss))(inputs['policy'], inputs)
  np.testing.assert_allclose(inside, outside, atol=1e-6)


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_what_is_only_reported_has_no_gradient(inputs, head_is_trained):
  """Entropy, alignments, the reference, and KL where no penalty asks for its gradient."""
  by = ['policy', 'reference']
  if head_is_trained:
    by += ['policy_head', 'reference_head']

  def function(inputs):
    wanted = ALL._replace(kl_gradient=False)
    return chunked(inputs, wanted=wanted, head_is_trained=head_is_trained)

  reported = ('reference_logps', 'kl', 'entropy', 'alignments')
  for name, gradient in gradients(function, inputs, by, reported).items():
    assert not np.any(gradient), name


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_reference_has_no_gradient_through_a_kl_penalty(inputs, head_is_trained):
  by = ('reference', 'reference_head') if head_is_trained else ('reference',)

  def function(inputs):
    return chunked(inputs, head_is_trained=head_is_trained)

  for gradient in gradients(function, inputs, by, ('policy_logps', 'kl')).values():
    assert not np.any(gradient)


def test_only_what_is_wanted_is_computed(inputs):
  statistics = chunked(inputs, wanted=TokenStatisticsOptions(), reference=False)
  present = {name for name, values in statistics._asdict().items() if values is not None}
  assert present == {'policy_logps'}
  np.testing.assert_allclose(statistics.policy_logps, plain(inputs).policy_logps, atol=1e-5)
  expected = gradients(plain, inputs, ('policy',), ('policy_logps',))['policy']

  def function(inputs):
    return chunked(inputs, wanted=TokenStatisticsOptions(), reference=False)

  ours = gradients(function, inputs, ('policy',), ('policy_logps',))['policy']
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_tokens_outside_the_responses_matter_to_nothing(inputs, head_is_trained):
  outside = inputs['loss_mask'] == 0
  noise = inputs | {
    'policy': jnp.where(outside[..., None], normal(20, ROWS, TOKENS, EMBED), inputs['policy']),
    'targets': jnp.where(outside, 7, inputs['targets']),
  }

  def function(inputs):
    return chunked(inputs, head_is_trained=head_is_trained)

  by, names = ('policy', 'policy_head')[: 1 + head_is_trained], ('policy_logps', 'kl')
  first, second = (gradients(function, each, by, names) for each in (inputs, noise))
  np.testing.assert_array_equal(function(inputs).kl, function(noise).kl)
  assert not np.any(np.asarray(first['policy'])[outside])
  for name in by:
    np.testing.assert_allclose(first[name], second[name], atol=1e-6)


def test_extreme_logits_stay_finite(inputs):
  """A certain token has log-prob 0, an impossible one its logit's distance; nothing is nan."""
  sharp = inputs | {'policy_head': 1e4 * inputs['policy_head']}
  statistics = chunked(sharp)
  chex.assert_tree_all_finite(statistics)
  logits = np.asarray(sharp['policy'] @ sharp['policy_head'][None], np.float64)
  shifted = logits - logits.max(axis=-1, keepdims=True)
  logps = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
  expected = np.take_along_axis(logps, np.asarray(sharp['targets'])[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(
    statistics.policy_logps, expected * np.asarray(sharp['loss_mask']), rtol=1e-5, atol=0.05
  )
  (gradient,) = gradients(chunked, sharp, ('policy',), ('policy_logps', 'kl')).values()
  chex.assert_tree_all_finite(gradient)


def test_bfloat16_hidden_states_give_float32_statistics_and_bfloat16_gradients(inputs):
  hidden = inputs['policy'].astype(jnp.bfloat16)

  def total(hidden):
    head = inputs['policy_head'].astype(jnp.bfloat16)

    def logits(hidden):
      return jnp.matmul(hidden, head[None], preferred_element_type=jnp.float32)

    stream = Stream(hidden, logits)
    statistics = token_statistics(
      stream, None, inputs['targets'], inputs['loss_mask'], wanted=TokenStatisticsOptions(), chunk=8
    )
    return jnp.sum(statistics.policy_logps), statistics.policy_logps

  gradient, logps = jax.grad(total, has_aux=True)(hidden)
  assert (gradient.dtype, logps.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = inputs | {
    'policy': hidden.astype(jnp.float32),
    'policy_head': inputs['policy_head'].astype(jnp.bfloat16).astype(jnp.float32),
  }
  np.testing.assert_allclose(logps, plain(rounded).policy_logps, atol=1e-4)


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_no_array_of_tokens_by_vocabulary_exists(inputs, head_is_trained):
  """Neither forward nor backward, not even for a single row."""
  assert any(array.size >= TOKENS * VOCAB for array in arrays_in(plain, inputs)), 'a blind test'

  def total(inputs):
    statistics = chunked(inputs, chunk=4, head_is_trained=head_is_trained)
    return weigh(statistics, ('policy_logps', 'kl'))

  def backward(inputs, chosen):
    return jax.grad(lambda chosen: total(inputs | chosen))(chosen)

  by = ('policy', 'policy_head')[: 1 + head_is_trained]
  for arrays in (
    arrays_in(total, inputs),
    arrays_in(backward, inputs, {name: inputs[name] for name in by}),
  ):
    assert max(array.size for array in arrays) < TOKENS * VOCAB


@pytest.mark.parametrize('longest', [0, 1, 8, 9, 37])
def test_vocabulary_is_met_only_as_often_as_the_fullest_row_needs(inputs, longest):
  visits = []

  def head(hidden):
    jax.debug.callback(lambda: visits.append(None))
    return hidden @ inputs['policy_head'][None]

  mask = np.zeros((ROWS, TOKENS), np.float32)
  mask[0, TOKENS - longest :] = 1
  mask[1, : longest // 2] = 1
  stream = Stream(inputs['policy'], head)
  mask, wanted = jnp.asarray(mask), TokenStatisticsOptions()
  jax.block_until_ready(
    token_statistics(stream, None, inputs['targets'], mask, wanted=wanted, chunk=8)
  )
  jax.effects_barrier()
  assert len(visits) == math.ceil(longest / 8)
