"""Rotary positions in a config.json, old and new, and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dpo_flax.huggingface.fields import typed
from dpo_flax.model.config import LinearScaling, Llama3Scaling, LongScaling, Rope

ROPE_FIELDS = ('rope_parameters', 'rope_theta', 'rope_scaling')
FULL, SLIDING = 'full_attention', 'sliding_attention'  # transformers' types of layers

_SCALINGS = {'linear': LinearScaling, 'llama3': Llama3Scaling, 'longrope': LongScaling}
# transformers' earlier names.
_RENAMED = {'su': 'longrope'}


def read_rope(
  values: Mapping[str, Any],  # of a config.json, completed by its family's defaults
  layer_type: str,
  *,
  head_dim: int,
  scalings: tuple[str, ...],  # those that the family may have
  where: str,
) -> Rope:
  """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

  A family that has `rope_local_base_freq` gives layers with a window positions of their own.

  Raises:
    ValueError: they are malformed, or of a type that the family has not.
  """
  parameters, theta = _parameters(values, layer_type, where)
  # Writers of old changed `type` to `rope_type`, and some wrote both.
  types = {str(parameters.pop(name)) for name in ('rope_type', 'type') if name in parameters}
  types = {_RENAMED.get(type_, type_) for type_ in types} or {'default'}
  theta = typed(parameters.pop('rope_theta', theta), 'rope_theta', float, where)
  dim = head_dim
  if 'partial_rotary_factor' in values:
    part = parameters.pop('partial_rotary_factor', values['partial_rotary_factor'])
    dim = int(head_dim * typed(part, 'partial_rotary_factor', float, where))
  if dim % 2 or not 0 < dim <= head_dim:
    raise ValueError(f'{where}: head_dim {head_dim}: {dim} of it cannot be rotated in pairs')
  if types == {'default'} and not parameters:
    return Rope(theta, dim, None)
  (type_, *others) = types
  if others or type_ not in scalings:
    raise ValueError(
      f'{where}: rotary positions of type {sorted(types)} with {parameters}; supported: '
      f'default (without parameters), {", ".join(scalings)}'
    )
  if type_ == 'longrope':
    parameters = _long_parameters(parameters, values, where)
  return Rope(theta, dim, _scaling(type_, parameters, dim, where))


def rope_fields(ropes: Mapping[str, Rope], family: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields for a config.json, which old and new transformers read.

  Args:
    ropes: of the layers of each type there is.
    family: the fields that the family has.
  """
  rope = ropes.get(FULL) or ropes[SLIDING]
  fields: dict[str, Any] = {'rope_theta': rope.theta}
  if 'rope_local_base_freq' in family and SLIDING in ropes:
    fields['rope_local_base_freq'] = ropes[SLIDING].theta
  if rope.scaling is None:
    return fields
  type_ = next(name for name, scaling in _SCALINGS.items() if isinstance(rope.scaling, scaling))
  scaling: dict[str, Any] = {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in dataclasses.asdict(rope.scaling).items()
  }
  fields['rope_scaling'] = {'rope_type': type_} | scaling
  if type_ == 'llama3':
    stretched = scaling['factor'] * scaling['original_max_position_embeddings']
    fields['max_position_embeddings'] = int(stretched)
  if type_ == 'longrope':
    fields['original_max_position_embeddings'] = scaling['original_max_position_embeddings']
  return fields


def _parameters(
  values: Mapping[str, Any], layer_type: str, where: str
) -> tuple[dict[str, Any], Any]:
  """Returns the parameters of one type of layers, and theta where they have none."""
  given = [values[name] for name in ('rope_parameters', 'rope_scaling') if values.get(name)]
  if len(given) > 1 or not all(isinstance(each, Mapping) for each in given):
    raise ValueError(f'{where}: expected one object, rope_parameters or rope_scaling: {given}')
  parameters = dict(given[0]) if given else {}
  if 'rope_local_base_freq' not in values:
    return parameters, values['rope_theta']
  theta = values['rope_theta' if layer_type == FULL else 'rope_local_base_freq']
  if values.get('rope_parameters'):
    if not set(parameters) <= {FULL, SLIDING}:
      raise ValueError(
        f'{where}: rotary parameters of {sorted(parameters)}, not of types of layers'
      )
    return dict(parameters.get(layer_type) or {}), theta
  return parameters if layer_type == FULL else {}, theta


def _long_parameters(
  parameters: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """Completes the parameters of longrope as transformers does."""
  # The family's own field outweighs that of the parameters.
  names = ('max_position_embeddings', 'original_max_position_embeddings')
  longest, original = (typed(values[name], name, int, where) for name in names)
  parameters = dict(parameters) | {'original_max_position_embeddings': original}
  factor = typed(parameters.pop('factor', longest / original), 'factor', float, where)
  computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  given = parameters.get('attention_factor')
  return parameters | {'attention_factor': computed if given is None else given}


def _scaling(
  type_: str, parameters: Mapping[str, Any], dim: int, where: str
) -> LinearScaling | Llama3Scaling | LongScaling:
  """Makes a scaling of parameters that are exactly its own."""
  scaling = _SCALINGS[type_]
  expected = scaling.__annotations__
  if set(parameters) != set(expected):
    raise ValueError(
      f'{where}: {type_} rotary scaling has {sorted(parameters)}, not {sorted(expected)}'
    )
  fields = {}
  for name, of_type in expected.items():
    value = parameters[name]
    if of_type is float or of_type is int:
      fields[name] = typed(value, name, of_type, f'{where}: rotary scaling')
    elif isinstance(value, (list, tuple)) and len(value) == dim // 2:
      fields[name] = tuple(typed(one, name, float, where) for one in value)
    else:
      raise ValueError(f'{where}: rotary {name} is no list of {dim // 2} numbers')
  return scaling(**fields)
