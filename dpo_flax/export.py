"""A trained policy -> the directories that other programs load."""

from etils import epath
from ml_collections import ConfigDict

from dpo_flax.interop.hf_weights import Checkpoint, save_merged
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
    save_adapter(policy, lora, base_name=config.initialize_from_hf or '', output=written[-1])
  if config.merged_hf_save_path or lora is None:
    written.append(epath.Path(config.merged_hf_save_path or f'{config.workdir}/merged'))
    save_merged(policy, checkpoint, written[-1])
  return written
