"""The command that exports: python -m dpo_flax.export --workdir=runs/mine --output=DIR.

Writes any checkpoint of a run for other programs to load: --format=peft, the adapter, or merged,
base and adapter in one model. Without --step it takes the newest. It reads the run's config from
its workdir and needs neither the data nor the devices of the training; JAX_PLATFORMS=cpu does it on
any machine that holds the model in memory.
"""

import jax
from absl import flags
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax import config as config_lib
from dpo_flax.assembly.models import load_models
from dpo_flax.assembly.run_record import NAME, RunRecord, read_record
from dpo_flax.assembly.sources import Sources, make_sources
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.checkpoints.checkpoint import check_intact, newest_step, restore, saved_identity
from dpo_flax.config.identity import RunIdentity
from dpo_flax.exports.exporting import check_outputs, export_adapter, export_merged
from dpo_flax.exports.model_card import Facts
from dpo_flax.huggingface.weights import open_checkpoint
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
  place, output = epath.Path(workdir), epath.Path(output)
  record = read_record(place)
  config = record.config
  if config.tuning.method == 'full' and not merged:
    raise ValueError(f'{place}: the whole policy has learned, so there is no adapter: give merged')
  check_outputs(config, {'merged' if merged else 'peft': output})
  if step is None:
    step = newest_step(place / 'checkpoints')
  check_intact(place / 'checkpoints', step)
  _check_record(record, place, step)
  facts = Facts(record, step, read_metrics(place / 'metrics.jsonl', step, 'validation'))
  mesh = _make_mesh(config)
  with jax.set_mesh(mesh):
    sources = _open_sources(record, mesh)
    lora = make_lora_config(
      config, sources.model, start=sources.adapter, reference=sources.reference_adapter
    )
    models = load_models(config, sources, lora, keeps_reference=False, mesh=mesh)
    graphdef, trainable, frozen = split_models(models)
    trainable = restore(place / 'checkpoints', step, trainable, part='trainable')
    policy = nnx.merge(graphdef, trainable, frozen).policy
    if merged:
      export_merged(policy, sources.base, facts, output, mesh)
    else:
      export_adapter(policy, lora, facts, output, mesh)


def _check_record(record: RunRecord, place: epath.Path, step: int):
  """Refuses a record that is not of the run that saved the step, which is sealed."""
  now = RunIdentity(config_lib.identity_of(record.config), record.fingerprints)
  for found in saved_identity(place / 'checkpoints', step, RunIdentity).differences(now):
    if not found.is_of_the_data:
      raise ValueError(f'{place}/{NAME} is not that of step {step}. {found}')


def _open_sources(record: RunRecord, mesh: Mesh) -> Sources:
  """Opens what the policy of a run was made of, which must not have changed since."""
  config = record.config
  base = config.initialize_from_hf and open_checkpoint(config.initialize_from_hf)
  sources = make_sources(config, base, None, mesh)
  for field, found in sources.fingerprints().items():
    if field != 'reference_model_path' and found != record.fingerprints[field]:
      raise ValueError(f'{field}={config[field]} holds something else than when the run began')
  return sources


def _make_mesh(config: ConfigDict) -> Mesh:
  """Returns the run's own mesh where it fits these devices, or one that does.

  The devices of a CPU share their memory: one of them holds as much as all. What was asked of the
  training's devices is set to what any can do.
  """
  config.model.attention, config.model.remat = 'auto', 'none'
  if jax.default_backend() == 'cpu' and jax.process_count() == 1:
    return make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  try:
    return make_mesh(config.mesh)
  except ValueError:
    return make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})


def main():
  """Exports what the flags ask for."""
  for flag in (_WORKDIR, _OUTPUT):
    if not flag.value:
      raise ValueError(f'--{flag.name} is not set')
  export(_WORKDIR.value, _OUTPUT.value, merged=_FORMAT.value == 'merged', step=_STEP.value)
  if jax.process_index() == 0:
    print(f'wrote {_OUTPUT.value}')


if __name__ == '__main__':
  command.run_flags(main, on_every_host=True)
