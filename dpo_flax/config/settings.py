"""ConfigDict or JSON -> typed settings, and the docs' table of fields."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dpo_flax.config.schema import ROWS, Settings, default, get


def settings_of(config: ConfigDict) -> Settings:
  """Returns a config's values as settings, in their canonical form but not checked.

  Raises:
    ValueError: a mapping, data files or the objective are none in any of their forms.
  """
  return Settings.of(
    {field: row.canonical(field, get(config, field)) for field, row in ROWS.items()}
  )


def settings_from_json(values: Mapping[str, Any]) -> Settings:
  """Returns the settings that `Settings.to_json` gave, in this version or an earlier one.

  A field that they lack is as its row says.

  Raises:
    KeyError: the schema has no such field; names those that are close.
  """
  config = default()
  with config.ignore_type():
    for field, row in ROWS.items():
      section, _, name = field.rpartition('.')
      (config[section] if section else config)[name] = row.when_absent
    for name, value in values.items():
      # A mapping that is no section is the value of a field.
      if isinstance(config[name], ConfigDict) and isinstance(value, dict):
        for inner, one in value.items():
          config[name][inner] = _as(config[name][inner], one)
      else:
        config[name] = _as(config[name], value)
  return settings_of(config)


def _as(old: Any, value: Any) -> Any:
  return tuple(value) if isinstance(old, tuple) else value


def markdown() -> str:
  """Returns the table of all fields for the docs."""
  lines = ['| field | default | meaning |', '|---|---|---|']
  for field, row in ROWS.items():
    notes = [row.meaning]
    if row.choices:
      notes.append('One of ' + ', '.join(f'`{choice}`' for choice in row.choices) + '.')
    if row.bounds:
      notes.append(f'{row.bounds[0].upper()}{row.bounds[1:]}.')
    if row.unit:
      notes.append(f'In {row.unit}.')
    shown = 'unset' if row.default is None else f'`{row.default!r}`'
    meaning = ' '.join(notes).replace('|', r'\|')
    lines.append(f'| `{field}` | {shown} | {meaning} |')
  return '\n'.join(lines) + '\n'
