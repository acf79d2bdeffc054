"""Settings -> all the parts of a run on its mesh: what every command builds first."""

import dataclasses
from collections.abc import Callable

import optax
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.assembly.blueprint import Blueprint, make_blueprint
from dpo_flax.assembly.data import cache_directory, prepare_data
from dpo_flax.assembly.models import load_models
from dpo_flax.assembly.run_record import RunRecord, make_record
from dpo_flax.assembly.sources import reference_fingerprint
from dpo_flax.config.identity import RunIdentity, identity_of
from dpo_flax.config.schema import Settings
from dpo_flax.data.loader import steps_for_epochs
from dpo_flax.data.prepare import PreparedData
from dpo_flax.losses.objective import check_records
from dpo_flax.runtime import hosts
from dpo_flax.training.reference_cache import with_reference_logps
from dpo_flax.training.state import Models, TrainState, init_train_state, split_models
from dpo_flax.training.step import StepOptions


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that stays the same from the first step to the last."""

  blueprint: Blueprint
  data: PreparedData
  num_steps: int
  graphdef: nnx.GraphDef
  frozen: nnx.State
  optimizer: optax.GradientTransformation
  identity: RunIdentity
  record: RunRecord

  @property
  def settings(self) -> Settings:
    """The run's settings, with the tokenizer's path."""
    return self.blueprint.settings

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.blueprint.mesh

  @property
  def options(self) -> StepOptions:
    """What the step needs to know."""
    return self.blueprint.options

  def make_steps(self) -> tuple[Callable, Callable]:
    """Returns train_step and eval_step, jitted for the mesh's devices."""
    return self.blueprint.make_steps(self.graphdef, self.optimizer)


def build(settings: Settings, mesh: Mesh) -> tuple[Run, TrainState]:
  """Prepares the data and the models; the state is that of step 0.

  Raises:
    ValueError: the settings, the data or the weights are unfit. Cheap checks come first.
  """
  blueprint = make_blueprint(settings, mesh)
  settings, sources = blueprint.settings, blueprint.sources
  data = prepare_data(settings, vocab_size=sources.model.vocab_size)
  for pairs in (data.train, data.validation):
    check_records(pairs.columns if pairs else (), settings.objective)
  num_steps = settings.train.num_train_steps or steps_for_epochs(data, settings.train.num_epochs)
  fingerprints = {'data': data.fingerprint, **sources.fingerprints}
  hosts.check_agreement({**fingerprints, 'steps': num_steps})
  models = load_models(
    sources,
    blueprint.lora,
    seed=settings.seed,
    keeps_reference=blueprint.keeps_reference,
    mesh=mesh,
  )
  if settings.reference.source == 'cache':
    data = _with_reference_logps(data, models, blueprint)
  graphdef, trainable, frozen = split_models(models)
  optimizer = blueprint.make_optimizer(num_steps)
  identity = RunIdentity(identity_of(settings.flat_json()), fingerprints)
  run = Run(
    blueprint=blueprint,
    data=data,
    num_steps=num_steps,
    graphdef=graphdef,
    frozen=frozen,
    optimizer=optimizer,
    identity=identity,
    record=make_record(settings, data, identity, num_steps),
  )
  return run, init_train_state(trainable, optimizer, mesh)


def _with_reference_logps(data: PreparedData, models: Models, blueprint: Blueprint) -> PreparedData:
  settings = blueprint.settings
  return with_reference_logps(
    data,
    # Without a reference of its own, the policy still is it.
    models.reference or models.policy,
    directory=cache_directory(settings.workdir, settings.data.cache_dir),
    fingerprint=reference_fingerprint(
      blueprint.sources, preset=settings.model.preset, seed=settings.seed
    ),
    dtypes=(settings.model.dtype, settings.model.weight_dtype),
    logits_chunk=settings.model.logits_chunk,
    mesh=blueprint.mesh,
  )
