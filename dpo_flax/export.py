"""The command that exports: python -m dpo_flax.export --workdir=runs/mine --output=DIR.

Writes any checkpoint of a run for other programs to load: --format=peft, the adapter, or merged,
base and adapter in one model. Without --step it takes the newest. It reads the run's config from
its workdir and needs neither the data nor the devices of the training; JAX_PLATFORMS=cpu does it on
any machine that holds the model in memory.
"""

from collections.abc import Mapping

import jax
from absl import flags
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.assembly.blueprint import Blueprint, make_blueprint
from dpo_flax.assembly.models import load_models
from dpo_flax.assembly.run_record import NAME, RunRecord, read_record
from dpo_flax.checkpoints import steps
from dpo_flax.checkpoints.checkpoint import restore
from dpo_flax.checkpoints.identity import saved_identity
from dpo_flax.config.identity import RunIdentity, identity_of
from dpo_flax.exports.exporting import check_outputs, export_adapter, export_merged
from dpo_flax.exports.model_card import CardFacts
from dpo_flax.runtime import command
from dpo_flax.sharding import make_mesh
from dpo_flax.training.reporter import read_metrics
from dpo_flax.training.state import split_models

_WORKDIR = flags.DEFINE_string('workdir', None, 'That of the run.')
_OUTPUT = flags.DEFINE_string('output', None, 'A new directory, or an earlier export.')
_FORMAT = flags.DEFINE_enum('format', 'peft', ['peft', 'merged'], 'The adapter, or all weights.')
_STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; default: the newest.')


def export(workdir: str, output: str, *, merged: bool, step: int | None = None):
  """Writes a checkpoint of the run in `workdir` to `output`.

  Raises:
    ValueError: there is no such step, its base has changed, `output` holds something else, or what
      was written is not what was trained.
  """
  directory, target = epath.Path(workdir), epath.Path(output)
  record = read_record(directory)
  settings = record.settings
  if settings.tuning.method == 'full' and not merged:
    raise ValueError(
      f'{directory}: the whole policy has learned, so there is no adapter: give merged'
    )
  check_outputs(
    {'merged' if merged else 'peft': target},
    workdir=settings.workdir or workdir,
    sources=settings.weight_paths(),
  )
  step = steps.find_intact(directory / 'checkpoints', step)
  _check_record(record, directory, step)
  facts = CardFacts(record, step, read_metrics(directory / 'metrics.jsonl', step, 'validation'))
  mesh = _make_mesh(settings.mesh.sizes())
  with jax.set_mesh(mesh):
    blueprint = _open(record, mesh)
    models = load_models(
      blueprint.sources, blueprint.lora, seed=settings.seed, keeps_reference=False, mesh=mesh
    )
    graphdef, trainable, frozen = split_models(models)
    trainable = restore(directory / 'checkpoints', step, trainable, part='trainable')
    policy = nnx.merge(graphdef, trainable, frozen).policy
    if merged or blueprint.lora is None:
      export_merged(policy, blueprint.sources.base, facts, target, mesh)
    else:
      export_adapter(policy, blueprint.lora, facts, target, mesh)


def _check_record(record: RunRecord, workdir: epath.Path, step: int):
  """Refuses a record that is not of the run that saved the step, which is sealed."""
  now = RunIdentity(identity_of(record.settings.flat_json()), record.fingerprints)
  for found in saved_identity(workdir / 'checkpoints', step, RunIdentity).differences(now):
    if not found.is_of_the_data:
      raise ValueError(f'{workdir}/{NAME} is not that of step {step}. {found}')


def _open(record: RunRecord, mesh: Mesh) -> Blueprint:
  """Opens what the policy of a run was made of, which must not have changed since.

  What was asked of the training's devices is set to what any can do.
  """
  anywhere = {'model.attention': 'auto', 'model.remat': 'none'}
  blueprint = make_blueprint(record.settings.replace(anywhere), mesh, trains=False)
  paths = record.settings.weight_paths()
  for field, found in blueprint.sources.fingerprints.items():
    if field != 'reference_model_path' and found != record.fingerprints[field]:
      raise ValueError(f'{field}={paths.get(field)} holds something else than when the run began')
  return blueprint


def _make_mesh(sizes: Mapping[str, int]) -> Mesh:
  """Returns the run's own mesh where it fits these devices, or one that does.

  The devices of a CPU share their memory: one of them holds as much as all.
  """
  if jax.default_backend() == 'cpu' and jax.process_count() == 1:
    return make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  try:
    return make_mesh(sizes)
  except ValueError:
    return make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})


def main():
  """Exports what the flags ask for."""
  workdir, output = map(command.required, (_WORKDIR, _OUTPUT))
  export(workdir, output, merged=_FORMAT.value == 'merged', step=_STEP.value)
  if jax.process_index() == 0:
    print(f'wrote {output}')


if __name__ == '__main__':
  command.run_flags(main, on_every_host=True)
