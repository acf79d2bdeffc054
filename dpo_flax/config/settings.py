"""ConfigDict or JSON -> typed settings, and the docs' table of fields."""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dpo_flax.config.schema import ROWS, SECTIONS, Settings, get


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

  A field that they lack has the value `absent` of its row.

  Raises:
    KeyError: the schema has no such field; names those that are close.
  """
  given: dict[str, Any] = {}
  for name, value in values.items():
    # A mapping that is no section is the value of a field.
    given |= (
      {f'{name}.{each}': one for each, one in value.items()} if name in SECTIONS else {name: value}
    )
  if unknown := given.keys() - ROWS:
    near = difflib.get_close_matches(min(unknown), ROWS)
    raise KeyError(f'no field {", ".join(sorted(unknown))}; close to it: {", ".join(near)}')
  return Settings.of(
    {field: row.canonical(field, given.get(field, row.when_absent)) for field, row in ROWS.items()}
  )


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
