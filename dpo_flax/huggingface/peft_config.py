"""PEFT's adapter_config.json <-> LoraConfig."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dpo_flax.files.messages import shown
from dpo_flax.huggingface.fields import check_fields, typed
from dpo_flax.huggingface.names import modules_of, names_of
from dpo_flax.huggingface.peft_targets import adapted_modules, module_names, pattern_lookup
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import Lora, LoraConfig, LowRank

_KNOWN_FIELDS = frozenset().union(
  ['r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern'],
  ['ensure_weight_tying', 'init_lora_weights'],
  # Not read: the names of the tensors say which modules and layers are adapted, and which are
  # saved in full.
  ['target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern', 'modules_to_save'],
  ['auto_mapping', 'base_model_name_or_path', 'inference_mode', 'peft_version', 'revision'],
  ['megatron_core', 'megatron_config', 'qalora_group_size'],
)
_FIXED_FIELDS = {
  'peft_type': 'LORA',
  'task_type': 'CAUSAL_LM',
  'bias': 'none',
  'fan_in_fan_out': False,
}
# Other starts (PiSSA, OLoRA, LoftQ, ...) change the base weights, which the adapter does not hold.
INITIALISERS = (True, False, None, 'gaussian', 'eva', 'orthogonal')

PREFIX = 'base_model.model.'

# Attribute of an Adapter -> PEFT's name, below an adapted module.
FACTORS = {
  'lora_a': 'lora_A.weight',
  'lora_b': 'lora_B.weight',
  'magnitude': 'lora_magnitude_vector',
}
_EMBEDDING_FACTORS = FACTORS | {'lora_a': 'lora_embedding_A', 'lora_b': 'lora_embedding_B'}

_REPETITIONS = 3  # in one pattern


def read_config(
  values: Mapping[str, Any],  # of adapter_config.json
  shapes: Mapping[str, tuple[int, ...]],  # of the adapter's tensors, by their names
  config: ModelConfig,
  where: epath.Path,
) -> LoraConfig:
  """Returns what a model needs to hold the adapter.

  Raises:
    ValueError: it is a type of adapter that a model here cannot hold; names what.
  """
  check_fields(values, known=_KNOWN_FIELDS, fixed=_FIXED_FIELDS, where=str(where))
  if values.get('init_lora_weights') not in INITIALISERS:
    raise ValueError(
      f'{where}: init_lora_weights={shown(values["init_lora_weights"])} changes the base weights;'
      ' convert the adapter to a plain LoRA first'
    )
  _check_numbers(values, where)
  saved = _saved(shapes, config)
  tied = bool(config.tie_word_embeddings and values.get('ensure_weight_tying'))
  if config.tie_word_embeddings and not tied and saved & {'embed_tokens', 'lm_head'}:
    given = shown(values.get('modules_to_save'))
    raise ValueError(
      f'{where}: modules_to_save={given} unties the head from the token table; supported with '
      'ensure_weight_tying=true'
    )
  modules = _modules(values, shapes, config, where)
  if tied and 'embed_tokens' in modules:
    if values.get('use_dora'):
      raise ValueError(f'{where}: ensure_weight_tying with use_dora is not supported')
    modules.pop('lm_head', None)  # PEFT stores the shared adapter twice
  return LoraConfig(
    modules=modules,
    dropout=float(values.get('lora_dropout') or 0.0),
    rslora=bool(values.get('use_rslora')),
    dora=bool(values.get('use_dora')),
    tied=tied and 'embed_tokens' in saved | set(modules),
    saved=saved - {'lm_head'} if config.tie_word_embeddings else saved,
  )


def write_config(lora: LoraConfig, config: ModelConfig, base_name: str | None) -> dict[str, Any]:
  """Returns the adapter_config.json of a model's adapters."""
  names = module_names(config)
  adapted = {
    hf_name: pair
    for name, low_rank in lora.modules.items()
    for hf_name, pair in zip(names[name], low_rank.of_layers(len(names[name])), strict=True)
    if pair[0]
  }
  in_every_layer = all(all(low_rank.ranks) for low_rank in lora.modules.values())
  values = config_values(
    lora, adapted, base_name, target_modules=sorted(lora.modules if in_every_layer else adapted)
  )
  # PEFT finds a module in all layers by the end of its name.
  ends = {module: name.rpartition('{}.')[2] for module, name in modules_of(config).items()}
  saved = [ends[module] for module in sorted(lora.saved)]
  return values | {'ensure_weight_tying': lora.tied, 'modules_to_save': saved or None}


def factor_names(module: str) -> Mapping[str, str]:
  """Returns attribute of an Adapter -> PEFT's name, below the adapted module of this name."""
  return _EMBEDDING_FACTORS if module == 'embed_tokens' else FACTORS


def config_values(
  lora: LoraConfig | Lora,
  adapted: Mapping[str, tuple[int, float]],  # checkpoint name of each module -> its rank and alpha
  base_name: str | None,
  *,
  target_modules: Sequence[str],  # names of them or ends of names
) -> dict[str, Any]:
  """Returns the adapter_config.json of these modules' adapters."""
  ranks = collections.Counter(rank for rank, _ in adapted.values())
  alphas = collections.Counter(alpha for _, alpha in adapted.values())
  rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
  return _FIXED_FIELDS | {
    'alpha_pattern': {name: own for name, (_, own) in adapted.items() if own != alpha},
    'base_model_name_or_path': base_name,
    'ensure_weight_tying': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_alpha': alpha,
    'lora_dropout': lora.dropout,
    'modules_to_save': None,
    'r': rank,
    'rank_pattern': {name: own for name, (own, _) in adapted.items() if own != rank},
    'target_modules': list(target_modules),
    'use_dora': lora.dora,
    'use_rslora': lora.rslora,
  }


def _check_numbers(values: Mapping[str, Any], where: epath.Path):
  for field, type_ in (('r', int), ('lora_alpha', float)):
    typed(values.get(field), field, type_, str(where))
  dropout = values.get('lora_dropout') or 0.0
  if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
    raise ValueError(f'{where}: lora_dropout={shown(dropout)} is not in [0, 1)')
  for field, type_ in (('rank_pattern', int), ('alpha_pattern', float)):
    patterns = values.get(field) or {}
    if not isinstance(patterns, Mapping):
      raise ValueError(f'{where}: {field}={shown(patterns)} is no mapping')
    for pattern, value in patterns.items():
      typed(value, pattern, type_, f'{where}: {field}')
      # A regular expression of anyone's: repeated groups can take forever.
      if len(re.findall(r'[*+{]', pattern)) > _REPETITIONS or re.search(r'\)[*+{]', pattern):
        raise ValueError(f'{where}: {field}: {shown(pattern)} is too complex an expression')


def _modules(
  values: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  config: ModelConfig,
  where: epath.Path,
) -> dict[str, LowRank]:
  """Returns rank and alpha of each module that has tensors."""
  names = module_names(config)
  largest = max((shape[0] for shape in shapes.values() if shape), default=0)
  rank_of, alpha_of = (
    pattern_lookup(values.get(field) or {}, names, f'{where}: {field}', values[default])
    for field, default in (('rank_pattern', 'r'), ('alpha_pattern', 'lora_alpha'))
  )

  def held(name, hf_name):
    return f'{PREFIX}{hf_name}.{factor_names(name)["lora_a"]}' in shapes

  modules = adapted_modules(names, held, rank_of, alpha_of)
  for name, module in modules.items():
    # Before anything of that size is made.
    if max(module.ranks) > largest:
      raise ValueError(
        f'{where}: {name} has rank {max(module.ranks)}, no factor more than {largest} rows'
      )
  return modules


def _saved(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> frozenset[str]:
  """Returns the modules whose weights the adapter holds in full, by parameter path."""
  return frozenset(
    parameter.rpartition('.')[0]
    for parameter, (hf_name, _) in names_of(config).items()
    if any(PREFIX + hf_name.format(layer) in shapes for layer in range(config.num_layers))
  )
