"""Settings -> what of the policy learns: adapters, single modules, or all weights."""

import dataclasses

from dpo_flax.config.sections import LoraSettings
from dpo_flax.huggingface.peft_adapter import AdapterFiles
from dpo_flax.huggingface.peft_targets import check_trainable, resolve
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import Lora, LoraConfig


def make_lora_config(
  settings: LoraSettings,
  model: ModelConfig,
  *,
  method: str = 'lora',  # lora | dora | full
  start: AdapterFiles | None = None,  # what the policy's adapters start as
  reference: AdapterFiles | None = None,  # what the reference has
) -> LoraConfig | None:
  """Returns what learns beside the frozen base; None: all of the policy does.

  Raises:
    ValueError: what `settings` asks for is not in this model, or cannot be trained so.
  """
  if method == 'full':
    return None
  dora = method == 'dora'
  if start is None:
    lora = resolve(_asked(settings, dora), model)
  elif start.lora.dora == dora:
    lora = dataclasses.replace(start.lora, dropout=settings.dropout)
    check_trainable(lora, model)
  else:
    raise ValueError(
      f'initialize_from_adapter={start.directory} is an adapter of the other method: '
      f'set tuning.method={"dora" if start.lora.dora else "lora"}'
    )
  return _stack_on_reference(lora, reference and reference.lora, continues=start is None)


def _asked(lora: LoraSettings, dora: bool) -> Lora:
  """Returns what the section `lora` of the settings asks for."""
  fields = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
  del fields['zero_init_b']  # always True
  return Lora(rank=fields.pop('r'), dora=dora, **fields)


def _stack_on_reference(
  lora: LoraConfig, reference: LoraConfig | None, *, continues: bool
) -> LoraConfig:
  """Returns the policy's adapters on top of the reference's, or beside them."""
  if reference is None:
    return lora
  if continues and (lora.dora or reference.dora):
    raise ValueError(
      'reference_adapter_path: a new adapter on top of another is exact for plain LoRA alone, and '
      'one of the two is DoRA. Give it as merge_adapter_path, or as initialize_from_adapter as well'
    )
  shares = 'embed_tokens' in {*lora.modules, *reference.modules}
  if shares and lora.tied != reference.tied:
    raise ValueError(
      f'reference_adapter_path: it was made with ensure_weight_tying={reference.tied}, and '
      f'lora.ensure_weight_tying is {lora.tied}'
    )
  return dataclasses.replace(lora, reference=reference, continues=continues)
