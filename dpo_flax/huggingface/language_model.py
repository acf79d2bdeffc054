"""The language model inside a checkpoint that has one of images beside it: Gemma 3 from 4B on.

It is read, trained and written as if it stood alone; transformers loads what is written as
Gemma3ForCausalLM.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from dpo_flax.files.messages import shown
from dpo_flax.huggingface.config_json import HARMLESS_FIELDS
from dpo_flax.huggingface.families import FAMILIES
from dpo_flax.huggingface.fields import check_fields

Tensor = TypeVar('Tensor')

_TEXT = {'gemma3': 'gemma3_text'}  # model_type of both -> of the language model
_KNOWN = HARMLESS_FIELDS.union(
  ['text_config', 'vision_config', 'mm_tokens_per_image', 'initializer_range'],
  ['boi_token_index', 'eoi_token_index', 'image_token_index'],
)
_OF_IMAGES = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\..*')
_PREFIX = re.compile(r'language_model\.(?=model\.|lm_head\.)|(?<=^model\.)language_model\.')


def has_language_model(config: Mapping[str, Any]) -> bool:
  """Whether config.json describes a language model and something else."""
  return str(config.get('model_type')) in _TEXT


def language_model(
  config: Mapping[str, Any],  # of config.json
  tensors: Mapping[str, Tensor],  # by their names
  where: str,  # the directory, for messages
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Returns the config.json and the tensors that the language model alone would have.

  Raises:
    ValueError: a field is unknown, or two tensors have one name.
  """
  check_fields(config, known=_KNOWN, fixed={'tie_word_embeddings': True}, where=where)
  inner = config.get('text_config')
  model_type = _TEXT[config['model_type']]
  if not isinstance(inner, Mapping) or inner.get('model_type', model_type) != model_type:
    raise ValueError(f'{where}: text_config is {shown(inner)}, not the config of a {model_type}')
  alone = {'architectures': [FAMILIES[model_type].architecture], 'model_type': model_type}
  alone |= {name: config[name] for name in ('dtype', 'torch_dtype') if name in config}
  found = {}
  for name, tensor in tensors.items():
    if _OF_IMAGES.fullmatch(name):
      continue
    inner_name = _PREFIX.sub('', name)
    if inner_name in found:
      raise ValueError(f'{where}: {name} is there twice, under two prefixes')
    found[inner_name] = tensor
  return alone | dict(inner), found
