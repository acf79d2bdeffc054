"""A trained policy -> the directories that other programs load, each checked before it is there."""

import contextlib
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_flax.assembly.models import load_onto
from dpo_flax.exports import model_card, staging
from dpo_flax.exports.model_card import CardFacts
from dpo_flax.exports.verification import compare, reload_merged
from dpo_flax.huggingface.peft_adapter import open_adapter, save_adapter
from dpo_flax.huggingface.tensor_files import DTYPES
from dpo_flax.huggingface.weights import BaseCheckpoint, save_merged
from dpo_flax.model.lora import LoraConfig
from dpo_flax.model.transformer import Transformer
from dpo_flax.runtime import hosts
from dpo_flax.training.scoring import score_pairs

# What a run writes to its workdir, beside its exports.
_OWN = ('checkpoints', 'token_cache', 'tensorboard', 'metrics.jsonl', 'run.json', 'lock')


def output_paths(
  workdir: str, *, method: str, peft: str | None = None, merged: str | None = None
) -> dict[str, epath.Path]:
  """Returns format -> where a run writes it.

  Of a policy that learns in full (method full) there is no adapter, and always the merged model.
  """
  full = method == 'full'
  paths = {
    'peft': None if full else peft or f'{workdir}/peft',
    'merged': merged or (f'{workdir}/merged' if full else None),
  }
  return {name: epath.Path(path) for name, path in paths.items() if path}


def check_outputs(
  outputs: Mapping[str, epath.Path],  # by format
  *,
  workdir: str,
  sources: Mapping[str, str],  # what the policy is made of, by the field that names it
):
  """Checks, before there is anything to export, that it can be written.

  Raises:
    ValueError: an output would replace something else, or what it is made of, or cannot be written.
  """
  own = {f"the run's {name}": f'{workdir}/{name}' for name in _OWN}
  for name, output in outputs.items():
    for other, path in sources.items():
      if staging.same_path(output, path):
        raise ValueError(f'{output}: the {name} export and {other} are in the same place')
    others = {f'the export {each}': path for each, path in outputs.items() if each != name}
    for other, path in (own | others).items():
      if staging.is_inside(output, path):
        raise ValueError(f'{output}: the {name} export would be inside {other}, {path}')
    staging.check_writable(output)
    staging.check_replaceable(output)


def export_adapter(
  policy: Transformer, lora: LoraConfig, facts: CardFacts, output: epath.Path, mesh: Mesh
):
  """Writes the adapters as a PEFT directory in float32.

  They are checked on the policy's own base, which is not copied. An earlier export at the same
  path is replaced in one rename, after the check.

  Raises:
    ValueError: `output` holds something else, or what was written is not what was trained.
  """
  settings = facts.record.settings

  def write(directory):
    save_adapter(policy, lora, settings.initialize_from_hf or '', directory)
    return load_onto(policy, open_adapter(directory, policy.config), mesh)

  _export(write, policy, facts, output, mesh, dtypes={settings.model.dtype}, merged=False)


def export_merged(
  policy: Transformer, base: BaseCheckpoint | None, facts: CardFacts, output: epath.Path, mesh: Mesh
):
  """Writes base + adapters as a Hugging Face directory, in the base's dtype.

  It is checked as a second model beside the policy, sharded like it. An earlier export at the same
  path is replaced in one rename, after the check.

  Raises:
    ValueError: `output` holds something else, or what was written is not what was trained.
  """

  def write(directory):
    save_merged(policy, base, directory)
    return reload_merged(policy, directory, mesh)

  _export(write, policy, facts, output, mesh, dtypes=_dtypes(policy, base, mesh), merged=True)


def _export(
  write: Callable[[epath.Path], Transformer | None],  # returns the model that it reloads, if it can
  policy: Transformer,
  facts: CardFacts,
  output: epath.Path,
  mesh: Mesh,
  *,
  dtypes: Collection[str],
  merged: bool,
):
  """Writes a directory, compares what is in it with the policy, and renames it to its path."""
  pairs, settings = facts.record.checks, facts.record.settings

  def score(model):
    layout, chunk = settings.data.layout, settings.model.logits_chunk
    return score_pairs(model, pairs, layout=layout, logits_chunk=chunk, mesh=mesh)

  live = score(policy)
  with contextlib.ExitStack() as stack:  # process 0 makes the directory, and puts it there
    hosts.first_does(lambda: stack.enter_context(staging.new_directory(output)))
    directory = staging.staging_path(output)
    model = write(directory)
    reloaded = None if model is None else score(model)
    check = compare(live, reloaded, pairs, dtypes=dtypes, where=output)
    if jax.process_index() == 0:
      (directory / 'README.md').write_text(model_card.render(facts, check, merged=merged))
  multihost_utils.sync_global_devices(f'wrote {output}')


def _dtypes(policy: Transformer, base: BaseCheckpoint | None, mesh: Mesh) -> set[str]:
  """The dtypes that a merged model's numbers are rounded to."""
  found = {np.dtype(policy.config.dtype).name, np.dtype(policy.config.weight_dtype).name}
  if base is not None:
    found |= {DTYPES[t.dtype].name for t in base.tensors.values() if t.dtype in DTYPES}
  if mesh.devices.flat[0].platform != 'cpu':
    found.add('bfloat16')  # accelerators round the factors of float32 products too
  return found
