"""The optimizer: learning-rate schedule, gradient clipping and AdamW."""

from typing import Any

import jax
import optax
from flax import nnx

from dpo_flax.config.sections import OptimizerSettings


def make_schedule(settings: OptimizerSettings, num_train_steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear rise from 0, then `settings.lr_schedule` to the end.

  Args:
    settings: the run's `optimizer` section.
    num_train_steps: optimizer steps of the whole run.
  """
  warmup_steps = round(settings.warmup * num_train_steps)
  decay_steps = max(num_train_steps - warmup_steps, 1)
  peak = settings.learning_rate
  after = {
    'cosine': optax.cosine_decay_schedule(peak, decay_steps),
    'linear': optax.linear_schedule(peak, 0.0, decay_steps),
    'constant': optax.constant_schedule(peak),
  }[settings.lr_schedule]
  if not warmup_steps:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(
  settings: OptimizerSettings, num_train_steps: int
) -> optax.GradientTransformation:
  """Returns AdamW (arXiv:1711.05101) behind a clip of the gradient's global norm.

  Weights decay, but for what has one number per channel: norms' scales, biases, magnitudes.
  """
  adamw = optax.adamw(
    make_schedule(settings, num_train_steps),
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    mask=_decays,
  )
  if not settings.max_grad_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def _decays(trainable: Any) -> Any:
  """Returns whether each variable decays; the vectors of many layers are stacked to a matrix."""

  def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)

  def decays(leaf):
    axes = is_variable(leaf) and leaf.get_metadata().get('out_sharding')
    return not axes or leaf.ndim - ('layers' in axes) > 1

  return jax.tree.map(decays, trainable, is_leaf=is_variable)
