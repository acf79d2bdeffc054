"""Losses without a reference do not run one: seen in the compiled step, and in what it reads."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dpo_flax.training.scoring import score_batch
from dpo_flax.training.state import Models, init_train_state, split_models
from dpo_flax.training.step import jit_train_step
from helpers.batches import draw_pairs, fill_batch
from helpers.models import make_lora, make_mesh_of, make_model_config, make_models
from helpers.steps import make_options

FREE = ('simpo', 'cpo', 'orpo', 'sft')
TOKENS = 96
OPTIMIZER = optax.sgd(0.1)


@pytest.fixture(scope='module')
def batch():
  return fill_batch([draw_pairs(4), draw_pairs(4, seed=1)], tokens=TOKENS)


@pytest.fixture(scope='module')
def models():
  """Of one layer: the compiler counts the body of a loop once, however often it runs.

  And wide, so that nearly all of its FLOPs are matrix products.
  """
  return make_models(make_model_config(num_layers=1, embed_dim=256, mlp_dim=512), make_lora())


def step_flops(models, batch, options, mesh):
  graphdef, trainable, frozen = split_models(models)
  state = jax.eval_shape(lambda: init_train_state(trainable, OPTIMIZER, mesh))
  step = jit_train_step(graphdef, OPTIMIZER, options)
  return step.lower(state, frozen, batch).compile().cost_analysis()['flops']


def reference_flops(models, batch):
  """Of the reference's forward pass, to the log-probs of its targets."""
  graphdef, state = nnx.split(models.reference)

  @jax.jit
  def run(state, batch):
    return score_batch(nnx.merge(graphdef, state), batch, chunk=TOKENS)

  return run.lower(state, batch).compile().cost_analysis()['flops']


@pytest.fixture(scope='module')
def flops(models, batch):
  """FLOPs of a step with each loss."""
  return {
    loss: step_flops(models, batch, make_options(loss=loss, logits_chunk=TOKENS), make_mesh_of())
    for loss in ('sigmoid', *FREE)
  }


@pytest.mark.parametrize('loss', FREE)
def test_a_loss_without_reference_saves_its_forward_pass(loss, flops, models, batch):
  saved = flops['sigmoid'] - flops[loss]
  # A little less than a forward pass alone: masks and angles serve both streams.
  assert saved == pytest.approx(reference_flops(models, batch), rel=0.05)


@pytest.mark.parametrize(
  'options',
  (
    *({'loss': loss} for loss in FREE),
    {'loss': 'sigmoid', 'reference_free': True},
    {'loss': 'simpo', 'sft_weight': 1.0, 'token_statistics': True},
  ),
  ids=str,
)
def test_weights_of_the_reference_are_not_read(options, batch):
  """A reference that is not a number leaves no trace; under DPO it ruins the step."""
  policy = make_models(make_model_config(), make_lora()).policy
  graphdef, state = nnx.split(make_models(make_model_config(), None).policy)
  ruined = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * jnp.nan, state))
  graphdef, trainable, frozen = split_models(Models(policy, ruined))

  def is_finite(**options):
    state = init_train_state(jax.tree.map(jnp.copy, trainable), OPTIMIZER, make_mesh_of())
    step = jit_train_step(graphdef, OPTIMIZER, make_options(**options))
    return bool(step(state, frozen, batch)[1]['finite'])

  assert is_finite(**options)
  assert not is_finite(loss='sigmoid')


def test_known_log_probs_of_the_reference_save_its_forward_pass(models, batch, flops):
  known = batch | {'reference_logps': jnp.zeros(batch['answer_mask'].shape)}
  cached = step_flops(models, known, make_options(logits_chunk=TOKENS), make_mesh_of())
  assert cached == pytest.approx(flops['simpo'], rel=0.01)


def test_a_kl_penalty_brings_the_reference_back(models, batch, flops):
  options = make_options(loss='simpo', logits_chunk=TOKENS, kl_penalty_weight=0.1)
  assert step_flops(models, batch, options, make_mesh_of()) > flops['sigmoid']
