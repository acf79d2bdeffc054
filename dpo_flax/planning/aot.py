"""A run's own training step from shapes alone: nothing is loaded, made or computed."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.assembly.blueprint import Blueprint
from dpo_flax.assembly.models import pair_models
from dpo_flax.config.sections import BatchSettings
from dpo_flax.data.batches import pack
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import named_shardings, row_sharding
from dpo_flax.training.state import TrainState, init_train_state, split_models

_STEPS = 1000  # of a run whose length is not given: the program does not depend on it


def abstract_train_step(
  blueprint: Blueprint, *, pairs_per_row: int
) -> tuple[Callable, tuple[TrainState, nnx.State, dict[str, jax.ShapeDtypeStruct]]]:
  """Returns the jitted step that training would run, and its arguments' shapes and shardings.

  Lower the one for the others under `jax.set_mesh(blueprint.mesh)`.
  """
  mesh, sources, settings = blueprint.mesh, blueprint.sources, blueprint.settings
  optimizer = blueprint.make_optimizer(settings.train.num_train_steps or _STEPS)

  def make_models():
    policy, other = Transformer(sources.model, blueprint.lora, nnx.Rngs(params=0, lora=1)), None
    if sources.reference_model is not None:
      other = Transformer(sources.reference_model, None, nnx.Rngs(params=0))
    keeps = blueprint.keeps_reference
    return split_models(pair_models(policy, blueprint.lora, other=other, keeps_reference=keeps))

  with jax.set_mesh(mesh):
    graphdef, trainable, frozen = jax.eval_shape(make_models)
    state = jax.eval_shape(lambda adapters: init_train_state(adapters, optimizer, mesh), trainable)
  step, _ = blueprint.make_steps(graphdef, optimizer)
  batch = _abstract_batch(
    settings.batch,
    pairs_per_row,
    mesh,
    layout=settings.data.layout,
    cached=settings.reference.source == 'cache',
  )
  return step, (_placed(state, mesh), _placed(frozen, mesh), batch)


def _abstract_batch(
  batch: BatchSettings, pairs_per_row: int, mesh: Mesh, *, layout: str, cached: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and shardings of the loader's batches."""
  fields = pack.fill_batch([[]], tokens=batch.tokens, pairs_per_row=pairs_per_row, layout=layout)
  shapes = {name: (value.shape[1:], value.dtype) for name, value in fields.items()}
  if cached:
    shapes['reference_logps'] = shapes['answer_mask']
  sharding = row_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((batch.rows, *shape), dtype, sharding=sharding)
    for name, (shape, dtype) in shapes.items()
  }


def _placed(tree: TrainState | nnx.State, mesh: Mesh) -> Any:
  """Returns the shapes of `tree` with the shardings that training gives them."""

  def with_sharding(shape, sharding):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, tree, named_shardings(tree, mesh))
