"""Config -> all the parts of a run on its mesh: what every command builds first."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax import config as config_lib
from dpo_flax.checkpoint import RunIdentity
from dpo_flax.compiler_options import compiler_options
from dpo_flax.data.loader import PreparedData, prepare, steps_for_epochs
from dpo_flax.interop.hf_weights import Checkpoint, fingerprint, load_base, open_checkpoint
from dpo_flax.learner.optimizer import make_optimizer
from dpo_flax.learner.state import Models, TrainState, init_state, split_models
from dpo_flax.learner.step import StepOptions, make_eval_step, make_train_step
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.hf_config import from_hf_config
from dpo_flax.model.lora import LoraConfig, resolve_targets
from dpo_flax.model.presets import from_preset
from dpo_flax.model.transformer import Transformer
from dpo_flax.objective.settings import SORTED, Objective, check_records
from dpo_flax.reference_cache import with_reference_logps
from dpo_flax.sharding import named_shardings, row_parts
from dpo_flax.validation import validate_rows


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that stays the same from the first step to the last."""

  config: ConfigDict
  mesh: Mesh
  data: PreparedData
  num_steps: int
  lora: LoraConfig
  base: Checkpoint | None  # None: random weights
  graphdef: nnx.GraphDef
  frozen: nnx.State
  optimizer: optax.GradientTransformation
  options: StepOptions
  identity: RunIdentity


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
  model_config = make_model_config(config, base, mesh)
  lora = make_lora_config(config, model_config)
  if base and not config.data.tokenizer:
    config.data.tokenizer = str(base.directory)
  options = make_step_options(config, objective, lora)
  data = prepare(config, vocab_size=model_config.vocab_size)
  for pairs in (data.train, data.validation):
    check_records(pairs.columns if pairs else (), objective)
  num_steps = config.train.num_train_steps or steps_for_epochs(data, config)
  models = load_models(config, model_config, lora, base=base, reference=other, mesh=mesh)
  if config.reference.source == 'cache':
    weights = make_fingerprint(config, other or base)
    data = with_reference_logps(data, models.reference, config, fingerprint=weights, mesh=mesh)
  graphdef, trainable, frozen = split_models(models)
  optimizer = make_optimizer(config.optimizer, num_steps)
  run = Run(
    config=config,
    mesh=mesh,
    data=data,
    num_steps=num_steps,
    lora=lora,
    base=base,
    graphdef=graphdef,
    frozen=frozen,
    optimizer=optimizer,
    options=options,
    identity=make_identity(config, data, base, other),
  )
  return run, init_state(trainable, optimizer, mesh)


def make_model_config(config: ConfigDict, checkpoint: Checkpoint | None, mesh: Mesh) -> ModelConfig:
  """Returns the architecture of `checkpoint`, or of `config.model.preset` without one.

  Raises:
    ValueError: the architecture is none of ours, or the attention is not for these devices.
  """
  platform = mesh.devices.flat[0].platform
  attention = config.model.attention
  if attention == 'auto':
    attention = 'pallas' if platform == 'tpu' else 'xla'
  if attention in {'pallas', 'splash'} and platform != 'tpu':
    raise ValueError(f'model.attention={attention} runs on TPU, not on {platform}: set it to auto')
  if attention == 'splash' and config.data.layout != 'separate':
    raise ValueError(
      f'model.attention=splash cannot share prompts (data.layout={config.data.layout}): set it to '
      'auto, or data.layout to separate'
    )
  run = {
    'dtype': jnp.dtype(config.model.dtype),
    'weight_dtype': jnp.dtype(config.model.weight_dtype),
    'remat': config.model.remat,
    'attention': attention,
  }
  if checkpoint is None:
    model_config = from_preset(config.model.preset, **run)
  else:
    where = str(checkpoint.directory / 'config.json')
    model_config = from_hf_config(checkpoint.config, where=where, **run)
  _check_fit(model_config, config)
  return model_config


def _check_fit(model_config: ModelConfig, config: ConfigDict):
  """Refuses rows and kernels that this architecture is not made for."""
  longest, tokens = model_config.longest_sequence, config.batch.tokens
  if longest is not None and tokens > longest:
    raise ValueError(
      f'batch.tokens={tokens}: this model (longrope) takes other positions for sequences of more '
      f'than {longest} tokens, which is not supported: set batch.tokens to {longest} or less'
    )
  if model_config.attention == 'splash' and not model_config.has_plain_attention:
    raise ValueError(
      f'model.attention=splash has no sliding windows and softcaps, as {model_config.model_type} '
      'has: set it to auto'
    )


def make_lora_config(config: ConfigDict, model_config: ModelConfig) -> LoraConfig:
  """Returns the adapters that `config.lora` asks of this model."""
  lora = config.lora
  targets = resolve_targets(lora.target_modules, lora.exclude_modules, config=model_config)
  if lora.dropout and 'lm_head' in targets:
    raise ValueError(
      f'lora.dropout={lora.dropout} would not reach the adapter of lm_head: set it to 0, or take '
      'lm_head out of lora.target_modules'
    )
  return LoraConfig(
    r=lora.r, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora, targets=targets
  )


def make_step_options(config: ConfigDict, objective: Objective, lora: LoraConfig) -> StepOptions:
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
  if config.reference_model_path and not objective.needs_reference:
    raise ValueError(
      f'reference_model_path={config.reference_model_path}: objective.loss={objective.loss} needs '
      'no reference; unset it'
    )
  if SORTED.intersection(objective.loss) and config.batch.microbatches > 1:
    raise ValueError(
      f'objective.loss={objective.loss} sorts the pairs of the whole batch, so '
      f'batch.microbatches={config.batch.microbatches} would change it: set it to 1'
    )
  return StepOptions(
    objective=objective,
    logits_chunk=config.model.logits_chunk,
    microbatches=config.batch.microbatches,
    head_is_trained='lm_head' in lora.targets,
    dropout_seed=config.seed if config.lora.dropout else None,
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
    make_train_step(graphdef, optimizer, options, compiler_options=compiler),
    make_eval_step(graphdef, options, compiler_options=compiler),
  )


def make_fingerprint(config: ConfigDict, checkpoint: Checkpoint | None) -> str:
  """Returns what tells base weights from others: a checkpoint's content, or a preset and seed."""
  return fingerprint(checkpoint) if checkpoint else f'{config.model.preset} {config.seed}'


def make_identity(
  config: ConfigDict, data: PreparedData, base: Checkpoint | None, reference: Checkpoint | None
) -> RunIdentity:
  """Returns what a checkpoint of this run may be continued under."""
  fingerprints = {
    'data': data.fingerprint,
    'initialize_from_hf': base and fingerprint(base),
    'reference_model_path': reference and fingerprint(reference),
  }
  return RunIdentity(config_lib.identity(config), fingerprints)


def load_models(
  config: ConfigDict,
  model_config: ModelConfig,
  lora: LoraConfig,
  *,
  base: Checkpoint | None,  # None: random weights
  reference: Checkpoint | None,  # None: the policy's own base
  mesh: Mesh,
) -> Models:
  """Returns the policy with fresh adapters, and its reference.

  The reference is the policy with its adapters off: the same variables, not a copy. Only another
  `reference` is loaded beside it.

  Raises:
    ValueError: the two models differ in vocabulary or depth; nothing is loaded then.
  """

  def load_policy():
    return load_model(model_config, lora, checkpoint=base, mesh=mesh, seed=config.seed)

  if reference is None:
    policy = load_policy()
    return Models(policy, nnx.view(policy, adapted=False))
  other = make_model_config(config, reference, mesh)
  for field in ('vocab_size', 'num_layers'):
    theirs, ours = getattr(other, field), getattr(model_config, field)
    if theirs != ours:
      raise ValueError(
        f'reference_model_path={config.reference_model_path}: its {field} is {theirs}, the '
        f"policy's is {ours}"
      )
  return Models(load_policy(), load_model(other, None, checkpoint=reference, mesh=mesh, seed=0))


def load_model(
  model_config: ModelConfig,
  lora: LoraConfig | None,
  *,
  checkpoint: Checkpoint | None,
  mesh: Mesh,
  seed: int,
) -> Transformer:
  """Returns a model whose every array is made or read straight into its shards."""

  def make():
    return nnx.split(Transformer(model_config, lora, nnx.Rngs(params=seed, lora=seed + 1)))

  graphdef, abstract = jax.eval_shape(make)

  def init(kind):
    shardings = named_shardings(nnx.filter_state(abstract, kind), mesh)
    # Whatever the state leaves out, the compiler does not compute.
    return jax.jit(lambda: nnx.filter_state(make()[1], kind), out_shardings=shardings)()

  if checkpoint is None:
    return nnx.merge(graphdef, init(...))
  adapters, base = nnx.split_state(abstract, nnx.LoRAParam, ...)
  adapters = init(nnx.LoRAParam) if adapters else adapters
  return nnx.merge(graphdef, adapters, load_base(checkpoint, base, mesh))
