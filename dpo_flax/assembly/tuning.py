"""Settings -> what of the policy learns: adapters, single modules, or the whole of it."""

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Any

from dpo_flax.config.sections import LoraSettings, NamedValues
from dpo_flax.huggingface.names import names_of
from dpo_flax.huggingface.peft_adapter import Adapter
from dpo_flax.huggingface.peft_targets import Targets, match_names, resolve
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import LoraConfig

_LARGEST = 2**16  # rank or alpha of a module
_TABLE_AND_HEAD = frozenset(['embed_tokens', 'lm_head'])


def make_lora_config(
  settings: LoraSettings,
  model: ModelConfig,
  *,
  method: str = 'lora',  # lora | dora | full
  start: Adapter | None = None,  # what the policy's adapters start as
  reference: Adapter | None = None,  # what the reference has
) -> LoraConfig | None:
  """Returns what learns beside the frozen base; None: all of the policy does.

  Raises:
    ValueError: what `settings` asks for is not in this model, or cannot be trained so.
  """
  if method == 'full':
    return None
  dora = method == 'dora'
  if start is None:
    lora = _from_settings(settings, model, dora)
  elif start.lora.dora == dora:
    lora = dataclasses.replace(start.lora, dropout=settings.dropout)
  else:
    raise ValueError(
      f'initialize_from_adapter={start.directory} is an adapter of the other kind: '
      f'set tuning.method={"dora" if start.lora.dora else "lora"}'
    )
  if lora.dropout and 'lm_head' in lora.modules:
    raise ValueError(
      f'lora.dropout={lora.dropout} would not reach the adapter of lm_head: set it to 0, or take '
      'lm_head out of lora.target_modules'
    )
  matrices = {ours.rpartition('.')[0] for ours in names_of(model) if not ours.endswith('.scale')}
  if model.is_quantized and lora.saved & matrices:
    raise ValueError(
      f'lora.modules_to_save: {", ".join(sorted(lora.saved & matrices))} cannot learn in int8: set '
      'model.weight_dtype=bfloat16'
    )
  return _on(lora, reference and reference.lora, continues=start is None)


def _from_settings(lora: LoraSettings, model: ModelConfig, dora: bool) -> LoraConfig:
  tied, asked = model.tie_word_embeddings, lora.target_modules
  if lora.ensure_weight_tying and not tied:
    raise ValueError('lora.ensure_weight_tying=True: the head of this model is not tied')
  targets = Targets(
    r=lora.r,
    lora_alpha=lora.alpha,
    target_modules=_tied_targets(asked) if lora.ensure_weight_tying else asked,
    exclude_modules=lora.exclude_modules,
    layers_to_transform=lora.layers_to_transform,
    rank_pattern=_pattern('lora.rank_pattern', lora.rank_pattern, int),
    alpha_pattern=_pattern('lora.alpha_pattern', lora.alpha_pattern, int | float),
    modules_to_save=lora.modules_to_save,
  )
  modules = resolve(targets, model)
  saved = _saved(lora.modules_to_save, model)
  if 'embed_tokens' in saved and tied and not lora.ensure_weight_tying:
    raise ValueError(
      f'lora.modules_to_save={tuple(lora.modules_to_save)}: the head of this model is tied to the '
      'token table, and they would part: set lora.ensure_weight_tying=True'
    )
  if lora.ensure_weight_tying:
    modules.pop('lm_head', None)
    if 'embed_tokens' not in saved | set(modules):
      raise ValueError(
        'lora.ensure_weight_tying=True, but neither lora.target_modules nor lora.modules_to_save '
        'has embed_tokens or lm_head'
      )
    if dora and 'embed_tokens' in modules:
      raise ValueError(
        'lora.ensure_weight_tying=True with tuning.method=dora: table and head would have lengths '
        'of different channels; adapt them apart or not at all'
      )
  return LoraConfig(
    modules=modules,
    dropout=lora.dropout,
    rslora=lora.rslora,
    dora=dora,
    tied=lora.ensure_weight_tying,
    saved=saved,
    reference=None,
    continues=False,
  )


def _pattern(field: str, values: NamedValues, kind: type | UnionType) -> dict[str, Any]:
  """Returns name or regex of modules -> the value that they have instead of the common one."""
  for name, value in values:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < _LARGEST:
      raise ValueError(
        f'{field} gives {name} {value!r}: expected '
        + ('a whole number' if kind is int else 'a number')
        + f' greater than 0 and less than {_LARGEST}'
      )
  return dict(values)


def _tied_targets(targets: Sequence[str] | str | None) -> Sequence[str] | str | None:
  """Adapts the token table where the head is asked for, as PEFT does."""
  if targets is None or targets == 'all-linear':
    return targets
  if isinstance(targets, str):
    return rf'(?:{targets}|model\.embed_tokens)'
  asked = [name for name in targets if name not in _TABLE_AND_HEAD]
  return [*asked, 'embed_tokens'] if len(asked) < len(targets) else targets


def _saved(entries: Sequence[str], model: ModelConfig) -> frozenset[str]:
  """Returns the modules that learn whole, by our paths."""
  if model.tie_word_embeddings:
    entries = ['embed_tokens' if entry == 'lm_head' else entry for entry in entries]
  # With two layers, what names single layers is seen to be partial.
  modules = {
    ours.rpartition('.')[0]: [theirs.rpartition('.')[0].format(layer) for layer in range(2)]
    for ours, (theirs, _) in names_of(model).items()
  }
  return match_names(entries, modules, 'lora.modules_to_save')


def _on(lora: LoraConfig, reference: LoraConfig | None, *, continues: bool) -> LoraConfig:
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
