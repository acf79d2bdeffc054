"""The schedule at steps computed by hand, and AdamW against torch's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.model.lora import TRAINABLE, train_weights
from dpo_flax.training.optimizer import make_optimizer, make_schedule
from helpers.models import make_lora, make_model_config, make_models


def settings(**changes):
  config = config_lib.default().optimizer
  config.update(changes)
  return config


HALF = 0.5 * (1 + math.cos(math.pi / 4))  # a quarter of the way down the cosine


@pytest.mark.parametrize(
  ('changes', 'num_steps', 'expected'),
  [
    # 10 of 50 steps rise to the peak; 40 more fall to 0.
    ({'lr_schedule': 'cosine', 'warmup': 0.2}, 50, {0: 0, 5: 0.5, 10: 1, 20: HALF, 30: 0.5, 50: 0}),
    ({'lr_schedule': 'linear', 'warmup': 0.2}, 50, {0: 0, 1: 0.1, 10: 1, 20: 0.75, 30: 0.5, 50: 0}),
    ({'lr_schedule': 'constant', 'warmup': 0.2}, 50, {0: 0, 9: 0.9, 10: 1, 49: 1, 200: 1}),
    ({'lr_schedule': 'linear', 'warmup': 0.0}, 4, {0: 1, 1: 0.75, 3: 0.25, 4: 0, 9: 0}),
    ({'lr_schedule': 'cosine', 'warmup': 1.0}, 4, {0: 0, 1: 0.25, 3: 0.75}),
    # A tenth of two steps is no whole step: no warm-up.
    ({'lr_schedule': 'cosine', 'warmup': 0.1}, 2, {0: 1, 1: 0.5, 2: 0}),
    ({'lr_schedule': 'constant', 'warmup': 0.1}, 1, {0: 1}),
  ],
)
def test_schedule_at_hand_computed_steps(changes, num_steps, expected):
  schedule = make_schedule(settings(learning_rate=2e-5, **changes), num_steps)
  values = {step: float(schedule(step)) for step in expected}
  assert values == pytest.approx(
    {step: 2e-5 * share for step, share in expected.items()}, abs=1e-11
  )


@pytest.mark.parametrize('name', ['cosine', 'linear'])
def test_schedule_equals_transformers(name):
  """That of TRL's runs, at every step."""
  num_steps, warmup = 30, 6
  parameter = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([parameter], lr=1e-5)
  make = getattr(transformers, f'get_{name}_schedule_with_warmup')
  theirs = make(optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
  ours = make_schedule(settings(learning_rate=1e-5, lr_schedule=name, warmup=0.2), num_steps)
  for step in range(num_steps):
    assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-11)
    optimizer.step()
    theirs.step()


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'weight_decay': 0.1},
    {'b1': 0.5, 'b2': 0.9, 'eps': 1e-3},
    {'max_grad_norm': 0.5},
    {'max_grad_norm': 0.0},
  ],
  ids=str,
)
def test_updates_equal_torch_adamw(changes):
  """Eight steps of two parameters, gradients of very different sizes, clipped by torch as well."""
  config = settings(learning_rate=1e-2, warmup=0.25, **changes)
  schedule = make_schedule(config, 8)
  random = np.random.default_rng(0)
  ours = {'a': jnp.asarray(random.standard_normal((3, 4)), jnp.float32), 'b': jnp.ones(5)}
  theirs = {name: torch.nn.Parameter(torch.tensor(np.array(v))) for name, v in ours.items()}
  optimizer = make_optimizer(config, 8)
  state = optimizer.init(ours)
  torch_optimizer = torch.optim.AdamW(
    theirs.values(),
    lr=0.0,
    betas=(config.b1, config.b2),
    eps=config.eps,
    weight_decay=config.weight_decay,
  )
  for step in range(8):
    scale = 10.0 ** random.integers(-3, 2)
    gradients = {
      name: (scale * random.standard_normal(value.shape)).astype(np.float32)
      for name, value in ours.items()
    }
    updates, state = optimizer.update(
      {name: jnp.asarray(g) for name, g in gradients.items()}, state, ours
    )
    ours = optax.apply_updates(ours, updates)
    for name, gradient in gradients.items():
      theirs[name].grad = torch.tensor(gradient)
    if config.max_grad_norm:
      torch.nn.utils.clip_grad_norm_(theirs.values(), config.max_grad_norm)
    torch_optimizer.param_groups[0]['lr'] = float(schedule(step))
    torch_optimizer.step()
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value.detach().numpy(), atol=1e-6)


def test_clipping_bounds_the_norm_over_all_parameters_together():
  """Gradients (3, 4) have norm 5: under a bound of 1 Adam sees (0.6, 0.8)."""
  config = settings(learning_rate=1.0, warmup=0.0, max_grad_norm=1.0, lr_schedule='constant')
  optimizer = make_optimizer(config, 10)
  parameters = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  gradients = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
  moments = state[1][0].mu
  assert float(moments['a'][0]) == pytest.approx(0.1 * 0.6)
  assert float(moments['b'][0]) == pytest.approx(0.1 * 0.8)


def test_what_has_one_number_per_channel_does_not_decay():
  """Without gradients, weight decay alone moves: no norm and no magnitude, in no layer."""
  lora = make_lora(dora=True, saved=frozenset(['blocks.attention_norm', 'final_norm', 'lm_head']))
  policy = make_models(make_model_config(), lora).policy
  train_weights(policy, lora.saved)
  trainable = nnx.state(policy, TRAINABLE)
  config = settings(learning_rate=0.1, warmup=0.0, weight_decay=0.5, lr_schedule='constant')
  optimizer = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, trainable)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(trainable), trainable)
  for path, update in nnx.to_flat_state(updates):
    is_vector = 'norm' in str(path) or path[-1] == 'magnitude'
    expected = 0 if is_vector else -0.05 * dict(nnx.to_flat_state(trainable))[path][...]
    np.testing.assert_allclose(update[...], expected, rtol=1e-5)
