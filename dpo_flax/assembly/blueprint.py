"""What is decided of a run before an array exists: for training, planning and exporting."""

import dataclasses
from collections.abc import Callable

import optax
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.assembly.sources import Sources, make_model_config, make_sources
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.checks import validate_rows
from dpo_flax.config.schema import Settings
from dpo_flax.huggingface.weights import open_checkpoint
from dpo_flax.losses.objective import Objective
from dpo_flax.model.lora import LoraConfig
from dpo_flax.sharding import row_parts
from dpo_flax.training.compiler_options import compiler_options
from dpo_flax.training.optimizer import make_optimizer
from dpo_flax.training.step import StepOptions, jit_eval_step, jit_train_step


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """A run's settings, and all that follows from them and from the files they name."""

  settings: Settings  # with the tokenizer's path
  mesh: Mesh  # of devices that need not be there
  sources: Sources
  lora: LoraConfig | None  # None: all weights learn
  options: StepOptions
  keeps_reference: bool  # whether the step runs the reference, so that its weights must stay

  def make_optimizer(self, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run of so many steps."""
    return make_optimizer(self.settings.optimizer, num_steps)

  def make_steps(
    self, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation
  ) -> tuple[Callable, Callable]:
    """Returns train_step and eval_step, jitted for the mesh's devices.

    Training and planning get theirs here, so that what is planned is what runs.
    """
    compiler = compiler_options(self.mesh)
    return (
      jit_train_step(graphdef, optimizer, self.options, compiler_options=compiler),
      jit_eval_step(graphdef, self.options, compiler_options=compiler),
    )


def make_blueprint(settings: Settings, mesh: Mesh, *, trains: bool = True) -> Blueprint:
  """Decides all that can be decided without an array.

  Args:
    settings: the run's.
    mesh: of devices that need not be there.
    trains: whether a step is made; without one, a reference of its own is not opened.

  Raises:
    ValueError: the settings do not fit the files they name, or the mesh. Cheap checks come first.
  """
  if trains:
    validate_rows(settings.batch, row_parts(mesh))
  paths = settings.initialize_from_hf, settings.reference_model_path if trains else None
  base, reference = (open_checkpoint(path) if path else None for path in paths)

  def architecture(checkpoint):
    return make_model_config(settings.model, checkpoint, mesh, tokens=settings.batch.tokens)

  sources = make_sources(
    architecture(base),
    base,
    reference=reference,
    reference_model=reference and architecture(reference),
    reference_model_path=settings.reference_model_path,
    merge_adapter_path=settings.merge_adapter_path,
    initialize_from_adapter=settings.initialize_from_adapter,
    reference_adapter_path=settings.reference_adapter_path,
  )
  lora = make_lora_config(
    settings.lora,
    sources.model,
    method=settings.tuning.method,
    start=sources.adapter,
    reference=sources.reference_adapter,
  )
  settings = settings.with_tokenizer_of(base and base.directory)
  options = _step_options(settings, lora)
  live = settings.reference.source == 'live'
  keeps_reference = trains and live and settings.objective.needs_reference
  return Blueprint(settings, mesh, sources, lora, options, keeps_reference)


def _step_options(settings: Settings, lora: LoraConfig | None) -> StepOptions:
  """Returns what the step needs to know.

  Raises:
    ValueError: the loss would not read what it is given, or compares the pairs of a whole batch,
      which is split into microbatches.
  """
  objective = settings.objective
  _check_cache(objective, settings.reference.source)
  # On top of a reference's adapter, the policy has it too.
  fields = ['reference_model_path']
  fields += ['reference_adapter_path'] if settings.initialize_from_adapter else []
  for field in fields:
    if (path := getattr(settings, field)) and not objective.needs_reference:
      raise ValueError(
        f'{field}={path}: objective.loss={objective.loss} needs no reference; unset it'
      )
  return StepOptions(
    objective=objective,
    logits_chunk=settings.model.logits_chunk,
    microbatches=settings.batch.microbatches,
    dropout_seed=settings.seed if lora is not None and lora.dropout else None,
    spike_factor=settings.optimizer.spike_factor,
  )


def _check_cache(objective: Objective, source: str):
  """Refuses a loss that needs other log-probs than those that are kept, or none."""
  live = objective.kl_penalty_weight or objective.token_statistics or objective.ld_alpha is not None
  if source == 'cache' and (live or not objective.needs_reference):
    raise ValueError(
      "reference.source='cache' keeps each response's summed log-prob. "
      f'objective.loss={objective.loss} needs none, or kl_penalty_weight, token_statistics or '
      'ld_alpha need those of the tokens: set reference.source to live'
    )
