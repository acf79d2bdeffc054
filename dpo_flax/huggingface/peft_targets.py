"""Which modules are adapted or trained whole: PEFT's rules over Hugging Face's module names."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_flax.files.messages import shown
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import LowRank

# Projection -> where Hugging Face puts it in a layer: the names that target patterns speak of.
BLOCK_PROJECTIONS = {
  'q_proj': 'self_attn.q_proj',
  'k_proj': 'self_attn.k_proj',
  'v_proj': 'self_attn.v_proj',
  'o_proj': 'self_attn.o_proj',
  'gate_proj': 'mlp.gate_proj',
  'up_proj': 'mlp.up_proj',
  'down_proj': 'mlp.down_proj',
}

FUSED_PROJECTIONS = {
  'qkv_proj': 'self_attn.qkv_proj',
  'o_proj': 'self_attn.o_proj',
  'gate_up_proj': 'mlp.gate_up_proj',
  'down_proj': 'mlp.down_proj',
}

Modules = Mapping[str, Sequence[str]]  # ours -> theirs, one for each layer or a single one
Pattern = Sequence[str] | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
  """What the user asks for, in PEFT's terms (the names of peft.LoraConfig)."""

  r: int
  lora_alpha: float
  target_modules: Pattern
  exclude_modules: Pattern
  layers_to_transform: Sequence[int] | int | None
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  modules_to_save: Sequence[str]


def block_projections(config: ModelConfig) -> dict[str, str]:
  """Returns the projections of a layer, and where Hugging Face puts them."""
  return FUSED_PROJECTIONS if config.fused_projections else BLOCK_PROJECTIONS


def module_names(config: ModelConfig) -> dict[str, list[str]]:
  """Returns what can be adapted: our names -> the module names in a Hugging Face model."""
  layers = range(config.num_layers)
  blocks = {
    name: [f'model.layers.{layer}.{place}' for layer in layers]
    for name, place in block_projections(config).items()
  }
  return blocks | {'embed_tokens': ['model.embed_tokens'], 'lm_head': ['lm_head']}


def resolve(targets: Targets, config: ModelConfig) -> dict[str, LowRank]:
  """Returns the rank and alpha of every adapted module, by PEFT's rules.

  A list of target_modules holds module names or their ends (`q_proj`, `self_attn.q_proj`), a string
  is a regex that must match a whole module name (`model.layers.0.self_attn.q_proj`), None and
  'all-linear' mean every linear layer but the head. Patterns of ranks and alphas are regexes of
  names or their ends; the first that matches counts.

  Raises:
    ValueError: an entry matches nothing, or nothing is left to adapt.
  """
  modules = module_names(config)
  matches = _target_matcher(targets, modules)
  excluded = _matcher(targets.exclude_modules or (), modules, 'lora.exclude_modules')
  saved = _saved_matcher(targets.modules_to_save)
  rank_of = pattern_lookup(targets.rank_pattern, modules, 'lora.rank_pattern')
  alpha_of = pattern_lookup(targets.alpha_pattern, modules, 'lora.alpha_pattern')
  resolved = {}
  for name, places in modules.items():
    ranks = [
      rank_of(place, targets.r)
      if matches(place) and not excluded(place) and not saved(place)
      else 0
      for place in places
    ]
    alphas = [
      float(alpha_of(place, targets.lora_alpha)) if rank else 0.0
      for place, rank in zip(places, ranks, strict=True)
    ]
    if any(ranks):
      resolved[name] = low_rank(ranks, alphas)
  if not resolved:
    raise ValueError(
      f'lora.target_modules={targets.target_modules!r} less lora.exclude_modules='
      f'{targets.exclude_modules!r} leaves no module to adapt; the model has {", ".join(modules)}'
    )
  return resolved


def low_rank(ranks: Sequence[int], alphas: Sequence[float]) -> LowRank:
  """Returns one entry where all layers are alike, and one for each layer elsewhere."""
  if len(set(zip(ranks, alphas, strict=True))) == 1:
    ranks, alphas = ranks[:1], alphas[:1]
  return LowRank(tuple(ranks), tuple(alphas))


def match_names(entries: Sequence[str], modules: Modules, field: str) -> frozenset[str]:
  """Returns ours of `modules` whose names end with an entry (PEFT's rule of modules_to_save).

  Raises:
    ValueError: an entry matches nothing, or only some of the layers.
  """
  found = set()
  for entry in entries:
    hits = {name: [place.endswith(entry) for place in places] for name, places in modules.items()}
    partial = [name for name, hit in hits.items() if any(hit) and not all(hit)]
    if partial:
      raise ValueError(f'{field}: {entry!r} matches only some layers of {", ".join(partial)}')
    whole = {name for name, hit in hits.items() if all(hit)}
    if not whole:
      raise ValueError(f'{field}: {entry!r} matches none of {_ends(modules)}')
    found |= whole
  return frozenset(found)


def _target_matcher(targets: Targets, modules: Modules) -> Callable[[str], bool]:
  asked, layers = targets.target_modules, targets.layers_to_transform
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
  layers = {layers} if isinstance(layers, int) else set(layers)
  count = max(map(len, modules.values()))
  if not layers <= set(range(count)):
    raise ValueError(f'lora.layers_to_transform={sorted(layers)}: the layers are 0 to {count - 1}')

  def in_layers(module: str) -> bool:
    number = re.match(r'model\.layers\.(\d+)\.', module)
    # What is named in full is meant, whatever its layer.
    return module in asked or (number is not None and int(number[1]) in layers)

  return lambda module: matches(module) and in_layers(module)


def _matcher(pattern: Pattern, modules: Modules, field: str) -> Callable[[str], bool]:
  """Returns whether a pattern names a module; every entry of a list must name at least one."""
  if isinstance(pattern, str):
    regex = _compiled(pattern, field)
    entries = {pattern: lambda module: regex.fullmatch(module) is not None}
  else:
    entries = {
      entry: lambda module, entry=entry: module == entry or module.endswith('.' + entry)
      for entry in pattern
    }
  for entry, matches in entries.items():
    if not any(matches(place) for places in modules.values() for place in places):
      raise ValueError(f'{field}: {entry!r} matches none of {", ".join(modules)}')
  return lambda module: any(matches(module) for matches in entries.values())


def _saved_matcher(entries: Sequence[str]) -> Callable[[str], bool]:
  """Returns whether a module learns whole, and then has no adapter."""
  regexes = [_compiled(rf'(^|.*\.){entry}($|\..*)', 'lora.modules_to_save') for entry in entries]
  return lambda module: any(regex.match(module) for regex in regexes)


def pattern_lookup(
  patterns: Mapping[str, Any],  # regex of a name or its end -> value
  modules: Modules,
  field: str,
) -> Callable[[str, Any], Any]:
  """Returns the (module, default) -> value of rank_pattern and alpha_pattern."""
  regexes = {_compiled(rf'(.*\.)?({key})$', field): value for key, value in patterns.items()}
  for regex, key in zip(regexes, patterns, strict=True):
    if not any(regex.match(place) for places in modules.values() for place in places):
      raise ValueError(f'{field}: {shown(key)} matches none of {", ".join(modules)}')
  return lambda module, default: next(
    (value for regex, value in regexes.items() if regex.match(module)), default
  )


def _compiled(pattern: str, field: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(f'{field}={shown(pattern)} is not a regular expression: {error}') from None


def _ends(modules: Modules) -> str:
  return ', '.join(sorted({places[0].rpartition('.')[2] for places in modules.values()}))
