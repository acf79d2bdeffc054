"""Which modules are adapted or trained in full: PEFT's rules over Hugging Face's module names."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_flax.files.messages import shown
from dpo_flax.huggingface.names import modules_of, names_of
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import Lora, LoraConfig, LowRank

# Module -> its names in a checkpoint, one for each layer or a single one.
Modules = Mapping[str, Sequence[str]]
Pattern = Sequence[str] | str | None


def module_names(config: ModelConfig) -> dict[str, list[str]]:
  """Returns what can be adapted: module -> its names in a Hugging Face model."""
  blocks = {
    parameter.split('.')[-2]: [
      hf_name.removesuffix('.weight').format(layer) for layer in range(config.num_layers)
    ]
    for parameter, (hf_name, _) in names_of(config).items()
    if parameter.startswith('blocks.') and parameter.endswith('.kernel')
  }
  return blocks | {'embed_tokens': ['model.embed_tokens'], 'lm_head': ['lm_head']}


def resolve(lora: Lora, config: ModelConfig) -> LoraConfig:
  """Returns the adapters of a model of this architecture, by PEFT's rules.

  A list of target_modules holds module names or their ends (`q_proj`, `self_attn.q_proj`), a string
  is a regex that must match a complete module name (`model.layers.0.self_attn.q_proj`), None and
  'all-linear' mean every linear layer but the head. Patterns of ranks and alphas are regexes of
  names or their ends; the first that matches counts.

  Raises:
    ValueError: an entry matches nothing, nothing is left to adapt, or what is asked for is not in
      this model or cannot be trained so.
  """
  tied = lora.ensure_weight_tying
  if tied and not config.tie_word_embeddings:
    raise ValueError('lora.ensure_weight_tying=True: the head of this model is not tied')
  modules, saved = _adapted(lora, config), _saved(lora.modules_to_save, config)
  if 'embed_tokens' in saved and config.tie_word_embeddings and not tied:
    raise ValueError(
      f'lora.modules_to_save={lora.modules_to_save}: the head of this model is tied to the '
      'token table, and they would part: set lora.ensure_weight_tying=True'
    )
  if tied:
    modules.pop('lm_head', None)
    if 'embed_tokens' not in saved | set(modules):
      raise ValueError(
        'lora.ensure_weight_tying=True, but neither lora.target_modules nor lora.modules_to_save '
        'has embed_tokens or lm_head'
      )
    if lora.dora and 'embed_tokens' in modules:
      raise ValueError(
        'lora.ensure_weight_tying=True with tuning.method=dora: table and head would have lengths '
        'of different channels; adapt them apart or not at all'
      )
  resolved = LoraConfig(
    modules=modules,
    dropout=lora.dropout,
    rslora=lora.rslora,
    dora=lora.dora,
    tied=tied,
    saved=saved,
  )
  check_trainable(resolved, config)
  return resolved


def check_trainable(lora: LoraConfig, config: ModelConfig) -> None:
  """Refuses what cannot be trained.

  Raises:
    ValueError: dropout would not reach an adapter, or weights of int8 were to learn.
  """
  if lora.dropout and 'lm_head' in lora.modules:
    raise ValueError(
      f'lora.dropout={lora.dropout} would not reach the adapter of lm_head: set it to 0, or take '
      'lm_head out of lora.target_modules'
    )
  names = [name for name in names_of(config) if not name.endswith('.scale')]
  matrices = {name.rpartition('.')[0] for name in names}
  if config.is_quantized and lora.saved & matrices:
    raise ValueError(
      f'lora.modules_to_save: {", ".join(sorted(lora.saved & matrices))} cannot learn in int8: set '
      'model.weight_dtype=bfloat16'
    )


def _adapted(lora: Lora, config: ModelConfig) -> dict[str, LowRank]:
  """Returns the rank and alpha of every adapted module."""
  modules = module_names(config)
  targets = _tied_targets(lora.target_modules) if lora.ensure_weight_tying else lora.target_modules
  matches = _target_matcher(targets, lora.layers_to_transform, modules)
  excluded = _matcher(lora.exclude_modules or (), modules, 'lora.exclude_modules')
  field = 'lora.modules_to_save'
  saved = [_compiled(rf'(^|.*\.){entry}($|\..*)', field) for entry in lora.modules_to_save]

  def is_adapted(_, module):  # what learns as a full weight has no adapter
    return matches(module) and not excluded(module) and not any(r.match(module) for r in saved)

  adapted = adapted_modules(
    modules,
    is_adapted,
    pattern_lookup(dict(lora.rank_pattern), modules, 'lora.rank_pattern', lora.rank),
    pattern_lookup(dict(lora.alpha_pattern), modules, 'lora.alpha_pattern', lora.alpha),
  )
  if not adapted:
    raise ValueError(
      f'lora.target_modules={targets!r} less lora.exclude_modules={lora.exclude_modules!r} leaves '
      f'no module to adapt; the model has {", ".join(modules)}'
    )
  return adapted


def _tied_targets(targets: Pattern) -> Pattern:
  """Adapts the token table where the head is asked for, as PEFT does."""
  if targets is None or targets == 'all-linear':
    return targets
  if isinstance(targets, str):
    return rf'(?:{targets}|model\.embed_tokens)'
  asked = [name for name in targets if name not in {'embed_tokens', 'lm_head'}]
  return [*asked, 'embed_tokens'] if len(asked) < len(targets) else targets


def _saved(entries: Sequence[str], config: ModelConfig) -> frozenset[str]:
  """Returns the modules that learn without adapters, by parameter path.

  As in PEFT, an entry names every module whose name ends with it.

  Raises:
    ValueError: an entry matches nothing, or only some of the layers.
  """
  if config.tie_word_embeddings:
    entries = ['embed_tokens' if entry == 'lm_head' else entry for entry in entries]
  # With two layers, what names single layers is seen to be partial.
  modules = {
    module: [name.format(layer) for layer in range(2)]
    for module, name in modules_of(config).items()
  }
  found = set()
  for entry in entries:
    hits = {name: [each.endswith(entry) for each in hf_names] for name, hf_names in modules.items()}
    partial = [name for name, hit in hits.items() if any(hit) and not all(hit)]
    if partial:
      raise ValueError(
        f'lora.modules_to_save: {entry!r} matches only some layers of {", ".join(partial)}'
      )
    matching = {name for name, hit in hits.items() if all(hit)}
    if not matching:
      ends = sorted({hf_names[0].rpartition('.')[2] for hf_names in modules.values()})
      raise ValueError(f'lora.modules_to_save: {entry!r} matches none of {", ".join(ends)}')
    found |= matching
  return frozenset(found)


def adapted_modules(
  modules: Modules,
  is_adapted: Callable[[str, str], bool],  # by a module and its checkpoint name
  rank_of: Callable[[str], int],  # by checkpoint name
  alpha_of: Callable[[str], float],
) -> dict[str, LowRank]:
  """Returns rank and alpha of every module that is adapted in any layer."""
  found = {
    name: [
      (rank_of(each), float(alpha_of(each))) if is_adapted(name, each) else (0, 0.0)
      for each in hf_names
    ]
    for name, hf_names in modules.items()
  }
  return {name: low_rank(pairs) for name, pairs in found.items() if any(map(any, pairs))}


def low_rank(pairs: Sequence[tuple[int, float]]) -> LowRank:
  """Returns rank and alpha: one entry where all layers are alike, else one for each layer."""
  ranks, alphas = zip(*(pairs[:1] if len(set(pairs)) == 1 else pairs), strict=True)
  return LowRank(ranks, alphas)


def _target_matcher(
  asked: Pattern, layers: Sequence[int] | int | None, modules: Modules
) -> Callable[[str], bool]:
  if asked is None or asked == 'all-linear':
    asked = tuple(name for name in modules if name not in {'embed_tokens', 'lm_head'})
  elif isinstance(asked, str) and layers is not None:
    raise ValueError(
      f'lora.layers_to_transform={layers} goes with a list of lora.target_modules; the regex '
      f'{asked!r} can name the layers itself'
    )
  matches = _matcher(asked, modules, 'lora.target_modules')
  if layers is None:
    return matches
  chosen = {layers} if isinstance(layers, int) else set(layers)
  count = max(map(len, modules.values()))
  if not chosen <= set(range(count)):
    raise ValueError(f'lora.layers_to_transform={sorted(chosen)}: the layers are 0 to {count - 1}')

  def in_layers(module: str) -> bool:
    number = re.match(r'model\.layers\.(\d+)\.', module)
    # What is named in full is meant, whatever its layer.
    return module in asked or (number is not None and int(number[1]) in chosen)

  return lambda module: matches(module) and in_layers(module)


def _matcher(pattern: Sequence[str] | str, modules: Modules, field: str) -> Callable[[str], bool]:
  """Returns whether a pattern names a module; every entry of a list must name at least one."""
  if isinstance(pattern, str):
    regexes = {pattern: _compiled(pattern, field)}
  else:
    regexes = {entry: re.compile(rf'(.*\.)?{re.escape(entry)}') for entry in pattern}
  for entry, regex in regexes.items():
    if not any(regex.fullmatch(each) for hf_names in modules.values() for each in hf_names):
      raise ValueError(f'{field}: {entry!r} matches none of {", ".join(modules)}')
  return lambda module: any(regex.fullmatch(module) for regex in regexes.values())


def pattern_lookup(
  patterns: Mapping[str, Any],  # regex of a name or its end -> value
  modules: Modules,
  field: str,
  default: Any,
) -> Callable[[str], Any]:
  """Returns the module -> value of rank_pattern and alpha_pattern."""
  regexes = {_compiled(rf'(.*\.)?({key})$', field): value for key, value in patterns.items()}
  for regex, key in zip(regexes, patterns, strict=True):
    if not any(regex.match(each) for hf_names in modules.values() for each in hf_names):
      raise ValueError(f'{field}: {shown(key)} matches none of {", ".join(modules)}')
  return lambda module: next(
    (value for regex, value in regexes.items() if regex.match(module)), default
  )


def _compiled(pattern: str, field: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(f'{field}={shown(pattern)} is not a regular expression: {error}') from None
