"""A run's own training step from shapes alone: nothing is loaded, made or computed."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax.assembly.assemble import make_step_options, make_steps, runs_reference
from dpo_flax.assembly.models import pair_models
from dpo_flax.assembly.sources import make_sources
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.checks import validate_rows
from dpo_flax.data.batches import pack
from dpo_flax.huggingface.weights import BaseCheckpoint
from dpo_flax.losses.objective import Objective
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import named_shardings, row_parts, row_sharding
from dpo_flax.training.optimizer import make_optimizer
from dpo_flax.training.state import TrainState, init_train_state, split_models

_STEPS = 1000  # of a run whose length is not given: the program does not depend on it


def abstract_train_step(
  config: ConfigDict,
  mesh: Mesh,  # of devices that need not be there
  *,
  base: BaseCheckpoint | None,  # None: the shapes of config.model.preset
  reference: BaseCheckpoint | None,  # None: the policy's own base
  pairs_per_row: int,
) -> tuple[Callable, tuple[TrainState, nnx.State, dict[str, jax.ShapeDtypeStruct]]]:
  """Returns the jitted step that training would run, and its arguments' shapes and shardings.

  Lower the one for the others under `jax.set_mesh(mesh)`.

  Raises:
    ValueError: the config is unfit.
  """
  validate_rows(config, row_parts(mesh))
  objective = Objective.from_config(config.objective)
  sources = make_sources(config, base, reference, mesh)
  lora = make_lora_config(
    config, sources.model, start=sources.adapter, reference=sources.reference_adapter
  )
  options = make_step_options(config, objective, lora)
  optimizer = make_optimizer(config.optimizer, config.train.num_train_steps or _STEPS)

  def make_models():
    policy, other = Transformer(sources.model, lora, nnx.Rngs(params=0, lora=1)), None
    if sources.reference_model is not None:
      other = Transformer(sources.reference_model, None, nnx.Rngs(params=0))
    keeps = runs_reference(config, objective)
    return split_models(pair_models(policy, lora, other=other, keeps_reference=keeps))

  with jax.set_mesh(mesh):
    graphdef, trainable, frozen = jax.eval_shape(make_models)
    state = jax.eval_shape(lambda adapters: init_train_state(adapters, optimizer, mesh), trainable)
  step, _ = make_steps(graphdef, options, optimizer=optimizer, mesh=mesh)
  batch = abstract_batch(config, mesh, pairs_per_row)
  return step, (_placed(state, mesh), _placed(frozen, mesh), batch)


def abstract_batch(
  config: ConfigDict, mesh: Mesh, pairs_per_row: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and shardings of the loader's batches."""
  rows = config.batch.rows
  fields = pack.fill_batch(
    [[]], tokens=config.batch.tokens, pairs_per_row=pairs_per_row, layout=config.data.layout
  )
  shapes = {name: (value.shape[1:], value.dtype) for name, value in fields.items()}
  if config.reference.source == 'cache':
    shapes['reference_logps'] = shapes['answer_mask']
  sharding = row_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
    for name, (shape, dtype) in shapes.items()
  }


def _placed(tree: TrainState | nnx.State, mesh: Mesh) -> Any:
  """Returns the shapes of `tree` with the shardings that training gives them."""

  def place(shape, sharding):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(place, tree, named_shardings(tree, mesh))
