"""A trained policy -> the directories that other programs load."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_flax.interop.hf_weights import Checkpoint, save_merged
from dpo_flax.interop.output import new_directory, staging_path
from dpo_flax.interop.peft import save_adapter
from dpo_flax.model.lora import LoraConfig
from dpo_flax.model.transformer import Transformer


def export(
  config: ConfigDict,
  policy: Transformer,
  lora: LoraConfig | None,  # None: the whole policy learned
  checkpoint: Checkpoint | None,
) -> list[epath.Path]:
  """Writes the PEFT adapter and, if `merged_hf_save_path` is set, the merged model.

  Of a policy that learned whole there is no adapter, and always the merged model. An earlier export
  in the same place is replaced in one rename. Returns where they are.
  """
  written = []
  if lora is not None:
    written.append(epath.Path(config.peft_save_path or f'{config.workdir}/peft'))
    with _staged(written[-1]) as directory:
      save_adapter(policy, lora, config.initialize_from_hf or '', directory)
  if config.merged_hf_save_path or lora is None:
    written.append(epath.Path(config.merged_hf_save_path or f'{config.workdir}/merged'))
    with _staged(written[-1]) as directory:
      save_merged(policy, checkpoint, directory)
  return written


@contextlib.contextmanager
def _staged(output: epath.Path) -> Iterator[epath.Path]:
  """Yields the directory that process 0 makes and puts in the place of `output`."""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(new_directory(output))
    yield staging_path(output)
  multihost_utils.sync_global_devices(f'wrote {output}')
