"""Config -> all the parts of a run on its mesh: what every command builds first."""

import dataclasses
from collections.abc import Callable

import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax import config as config_lib
from dpo_flax.assembly.models import load_models
from dpo_flax.assembly.run_record import RunRecord, make_record
from dpo_flax.assembly.sources import make_sources, reference_fingerprint
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.checks import validate_rows
from dpo_flax.config.identity import RunIdentity
from dpo_flax.data.loader import steps_for_epochs
from dpo_flax.data.prepare import PreparedData, prepare
from dpo_flax.huggingface.weights import BaseCheckpoint, open_checkpoint
from dpo_flax.losses.objective import Objective, check_records
from dpo_flax.model.lora import LoraConfig
from dpo_flax.runtime import hosts
from dpo_flax.sharding import row_parts
from dpo_flax.training.compiler_options import compiler_options
from dpo_flax.training.optimizer import make_optimizer
from dpo_flax.training.reference_cache import with_reference_logps
from dpo_flax.training.state import TrainState, init_train_state, split_models
from dpo_flax.training.step import StepOptions, jit_eval_step, jit_train_step


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that stays the same from the first step to the last."""

  config: ConfigDict
  mesh: Mesh
  data: PreparedData
  num_steps: int
  lora: LoraConfig | None  # None: the whole policy learns
  base: BaseCheckpoint | None  # None: random weights
  graphdef: nnx.GraphDef
  frozen: nnx.State
  optimizer: optax.GradientTransformation
  options: StepOptions
  identity: RunIdentity
  starts_as_reference: bool  # policy and reference are one before the first step
  record: RunRecord


def build(config: ConfigDict, mesh: Mesh) -> tuple[Run, TrainState]:
  """Prepares the data and the models; the state is that of step 0.

  Raises:
    ValueError: the config, the data or the weights are unfit. Cheap checks come first.
  """
  validate_rows(config, row_parts(mesh))
  objective = Objective.from_config(config.objective)
  base, other = (
    open_checkpoint(path) if path else None
    for path in (config.initialize_from_hf, config.reference_model_path)
  )
  sources = make_sources(config, base, other, mesh)
  lora = make_lora_config(
    config, sources.model, start=sources.adapter, reference=sources.reference_adapter
  )
  if base and not config.data.tokenizer:
    config.data.tokenizer = str(base.directory)
  options = make_step_options(config, objective, lora)
  data = prepare(config, vocab_size=sources.model.vocab_size)
  for pairs in (data.train, data.validation):
    check_records(pairs.columns if pairs else (), objective)
  num_steps = config.train.num_train_steps or steps_for_epochs(data, config)
  fingerprints = {'data': data.fingerprint, **sources.fingerprints()}
  hosts.check_agreement({**fingerprints, 'steps': num_steps})
  models = load_models(
    config, sources, lora, keeps_reference=runs_reference(config, objective), mesh=mesh
  )
  if config.reference.source == 'cache':
    # Without a reference of its own, the policy still is it.
    reference = models.reference or models.policy
    weights = reference_fingerprint(config, sources)
    data = with_reference_logps(data, reference, config, fingerprint=weights, mesh=mesh)
  graphdef, trainable, frozen = split_models(models)
  optimizer = make_optimizer(config.optimizer, num_steps)
  identity = RunIdentity(config_lib.identity_of(config), fingerprints)
  run = Run(
    config=config,
    mesh=mesh,
    data=data,
    num_steps=num_steps,
    lora=lora,
    base=sources.base,
    graphdef=graphdef,
    frozen=frozen,
    optimizer=optimizer,
    options=options,
    identity=identity,
    starts_as_reference=sources.starts_as_reference(),
    record=make_record(config, data, identity, num_steps),
  )
  return run, init_train_state(trainable, optimizer, mesh)


def runs_reference(config: ConfigDict, objective: Objective) -> bool:
  """Whether the step runs the reference, so that its weights must stay."""
  return objective.needs_reference and config.reference.source == 'live'


def make_step_options(
  config: ConfigDict,
  objective: Objective,
  lora: LoraConfig | None,  # None: the whole policy learns
) -> StepOptions:
  """Returns what the step needs to know.

  Raises:
    ValueError: the loss compares the pairs of a whole batch, which is split into microbatches.
  """
  live = objective.kl_penalty_weight or objective.token_statistics or objective.ld_alpha is not None
  if config.reference.source == 'cache' and (live or not objective.needs_reference):
    raise ValueError(
      "reference.source='cache' keeps each response's summed log-prob. "
      f'objective.loss={objective.loss} needs none, or kl_penalty_weight, token_statistics or '
      'ld_alpha need those of the tokens: set reference.source to live'
    )
  # On top of a reference's adapter, the policy has it too.
  fields = ['reference_model_path']
  fields += ['reference_adapter_path'] if config.initialize_from_adapter else []
  for field in fields:
    if config[field] and not objective.needs_reference:
      raise ValueError(
        f'{field}={config[field]}: objective.loss={objective.loss} needs no reference; unset it'
      )
  return StepOptions(
    objective=objective,
    logits_chunk=config.model.logits_chunk,
    microbatches=config.batch.microbatches,
    dropout_seed=config.seed if lora is not None and lora.dropout else None,
    spike_factor=config.optimizer.spike_factor,
  )


def make_steps(
  graphdef: nnx.GraphDef,
  options: StepOptions,
  *,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> tuple[Callable, Callable]:
  """Returns train_step and eval_step, jitted with the options for the mesh's devices.

  Training and planning get theirs here, so that what is planned is what runs.
  """
  compiler = compiler_options(mesh)
  return (
    jit_train_step(graphdef, optimizer, options, compiler_options=compiler),
    jit_eval_step(graphdef, options, compiler_options=compiler),
  )
