"""int8 base weights: how far they are from the floats, and that they are all that differs."""

import dataclasses

import chex
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies

from dpo_flax.model.quantization import LARGEST, SMALLEST, ChannelScale, quantize, scale_path
from dpo_flax.model.transformer import run_streams
from dpo_flax.training.logps import pair_logps
from dpo_flax.training.state import Models, split_models
from helpers.batches import draw_pairs, fill_batch
from helpers.models import make_lora, make_model_config, make_models
from helpers.steps import make_options

MATRICES = hypothesis.extra.numpy.arrays(
  np.float32,
  hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=2, max_side=9),
  elements=strategies.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


@given(MATRICES, strategies.sampled_from([0, 1]))
def test_no_weight_moves_by_more_than_half_a_step(weights, axis):
  quantized, scales = quantize(weights, axis)
  assert quantized.dtype == np.int8 and scales.dtype == np.float32
  chex.assert_shape(scales, (weights.shape[1 - axis],))
  steps = np.expand_dims(scales, axis).astype(np.float64)
  # Dividing in float32 may round a weight half-way between two steps to the other one.
  assert (np.abs(weights - quantized * steps) <= steps * (0.5 + LARGEST * 2.0**-22)).all()
  np.testing.assert_array_equal(quantized == 0, np.abs(weights / steps) <= 0.5)


@given(MATRICES)
def test_the_largest_weight_of_a_channel_is_the_largest_integer(weights):
  quantized, scales = quantize(weights, axis=0)
  largest = np.abs(weights).max(axis=0)
  np.testing.assert_array_equal(
    np.abs(quantized).max(axis=0), np.where(largest >= SMALLEST, LARGEST, 0)
  )
  np.testing.assert_array_equal(
    scales, np.where(largest >= SMALLEST, largest / np.float32(LARGEST), 1)
  )


@given(MATRICES, strategies.sampled_from([0, 1]))
def test_host_and_device_agree(weights, axis):
  ours, theirs = quantize(weights, axis), quantize(jnp.asarray(weights), axis)
  np.testing.assert_allclose(theirs[1], ours[1], rtol=1e-6)
  # Half-way between two steps, either is right.
  np.testing.assert_allclose(theirs[0].astype(int), ours[0].astype(int), atol=1)


def dequantized(model):
  """Returns the model of floats that holds exactly the values an int8 model stands for."""
  config = dataclasses.replace(model.config, weight_dtype=model.config.dtype)
  lora = nnx.state(model, nnx.LoRAParam)
  values = dict(nnx.to_flat_state(nnx.state(model, BASE)))
  floats = {}
  for path, variable in values.items():
    if isinstance(variable, ChannelScale):
      continue
    value = variable[...]
    if value.dtype == jnp.int8:
      axis = -1 if path[-1] == 'embedding' else -2  # the one a channel's inputs are on
      value = value * jnp.expand_dims(values[scale_path(path)][...], axis)
    floats[path] = variable.replace(value)
  return config, lora, floats


@pytest.fixture(scope='module', params=[False, True], ids=['head', 'tied'])
def models(request):
  """An int8 policy and its reference, and the same in floats."""
  config = make_model_config(tie_word_embeddings=request.param, weight_dtype=jnp.dtype('int8'))
  ours = make_models(config, make_lora())
  float_config, lora, floats = dequantized(ours.policy)
  graphdef = nnx.graphdef(make_models(float_config, make_lora()).policy)
  policy = nnx.merge(graphdef, nnx.merge_state(lora, nnx.from_flat_state(list(floats.items()))))
  return ours, Models(policy, nnx.view(policy, adapted=False))


def test_matrices_are_int8_and_everything_else_is_float(models):
  for path, variable in nnx.to_flat_state(nnx.state(models[0].policy)):
    is_matrix = path[-1] in ('kernel', 'embedding')
    assert (variable[...].dtype == jnp.int8) == is_matrix, path


@pytest.fixture(scope='module')
def batch():
  pairs = draw_pairs(6)
  return fill_batch([pairs[:2], pairs[2:3], pairs[3:]])


def test_log_probs_and_gradients_are_those_of_the_dequantized_floats(models, batch):
  """So rounding weights is all that int8 changes; adapters and their gradients are exact."""

  def run(models):
    graphdef, trainable, frozen = split_models(models)

    def loss(trainable):
      logps = pair_logps(nnx.merge(graphdef, trainable, frozen), batch, make_options().objective)
      both = jnp.stack([logps.policy_chosen, logps.reference_rejected])
      return jnp.sum(both * logps.pair_mask[None]), both

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)

  (_, ours), our_gradient = run(models[0])
  (_, expected), gradient = run(models[1])
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
  for left, right in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4 * float(jnp.abs(right).max()))


def test_log_probs_are_as_near_as_half_a_step_of_each_weight(batch):
  """To first order |change| <= sum over weights of |d logp / d weight| * step / 2."""
  config = make_model_config(initializer_range=0.05)  # second-order terms are then small
  floats = make_models(config, None).policy
  graphdef, state = nnx.split(floats)

  @jax.jit
  def logps(state):
    policy = nnx.merge(graphdef, state)
    hidden, _ = run_streams(policy, None, batch)
    return jax.nn.log_softmax(policy.logits(hidden))

  def total(state):
    picked = jnp.take_along_axis(logps(state), batch['targets'][..., None], axis=-1)[..., 0]
    return jnp.sum(picked * (batch['answer_ids'] < batch['answer_mask'].shape[1]))

  gradient = dict(nnx.to_flat_state(jax.grad(total)(state)))
  bound, rounded = 0.0, []
  for path, variable in nnx.to_flat_state(state):
    value = variable[...]
    if path[-1] in ('kernel', 'embedding'):
      axis = value.ndim - (1 if path[-1] == 'embedding' else 2)
      quantized, scales = quantize(value, axis)
      steps = jnp.expand_dims(scales, axis)
      bound += float(jnp.sum(jnp.abs(gradient[path][...]) * steps / 2))
      value = quantized * steps
    rounded.append((path, variable.replace(value)))
  change = abs(float(total(nnx.from_flat_state(rounded)) - total(state)))
  assert 0 < change <= bound
  # Errors of so many weights cancel: the bound is no tight one, and still a small one.
  assert bound < 0.2 * abs(float(total(state)))


def test_policy_equals_reference_while_b_is_zero(batch):
  for dtype in ('float32', 'bfloat16'):
    config = make_model_config(dtype=jnp.dtype(dtype), weight_dtype=jnp.dtype('int8'))
    models = make_models(config, make_lora(), zero_b=True)
    logps = jax.jit(pair_logps, static_argnums=2)(models, batch, make_options().objective)
    np.testing.assert_allclose(logps.policy_chosen, logps.reference_chosen, rtol=1e-6)
    np.testing.assert_allclose(logps.policy_rejected, logps.reference_rejected, rtol=1e-6)
