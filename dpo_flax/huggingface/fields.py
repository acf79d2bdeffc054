"""Checks of the fields of other programs' JSON files: used, known to be harmless, or refused."""

from collections.abc import Collection, Mapping
from typing import Any

from dpo_flax.files.messages import shown


def check_fields(
  values: Mapping[str, Any], *, known: Collection[str], fixed: Mapping[str, Any], where: str
) -> None:
  """Refuses every field that is not known, not at its fixed value and not switched off.

  Raises:
    ValueError: names each such field with its value.
  """
  refused = []
  for name, value in values.items():
    # None, False and empty containers are how a config.json says that it lacks a feature.
    off = value is None or value is False or value in ([], {})
    if name in fixed and value is not None and value != fixed[name]:
      refused.append(f'{shown(name)}={shown(value)} (supported: {fixed[name]!r})')
    elif name not in known and name not in fixed and not off:
      refused.append(f'{shown(name)}={shown(value)} (unknown)')
  if refused:
    raise ValueError(f'{where}: these fields may change the result: {", ".join(refused)}')


def typed(value: Any, name: str, type_: type, where: str) -> Any:
  """Returns the value of a field, a positive number or a truth value, as `type_`.

  Raises:
    ValueError: it is something else.
  """
  right = isinstance(value, (int, float) if type_ is float else type_)
  limit = 10**7 if type_ is int else 1e12  # no model comes near; NaN is not below it
  if not right or (type_ is not bool and (isinstance(value, bool) or not 0 < value < limit)):
    expected = 'true or false' if type_ is bool else f'a positive {type_.__name__}'
    raise ValueError(f'{where}: {name} is {shown(value)}, not {expected}')
  return type_(value)
