"""The schema of a run: every field, one row each.

Files in configs/ start from `default()` and change what they need; the command line changes single
fields (`--config.lora.r=128`). A field set to None is unset. `checks.validate` turns such a config
once into the frozen `Settings` below; named mappings are tuples of (name, value) in them, and lists
are tuples.
"""

import dataclasses
import operator
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dpo_flax.config.row import Role, Row, Section, row, rows_of, section
from dpo_flax.config.sections import (
  BatchSettings,
  DataSettings,
  LoraSettings,
  MeshSettings,
  ModelSettings,
  OptimizerSettings,
  ReferenceSettings,
  TrainSettings,
  TuningSettings,
)
from dpo_flax.losses.objective import OPTIONS, Objective
from dpo_flax.losses.registry import Constant, defaults_of

_SOURCE, _FREE = Role.SOURCE, Role.FREE


def _meaning(name: str, option: Constant) -> str:
  """Returns what an option of the objective means, its range, and what it is where it is unset."""
  sentences = [option.meaning]
  if option.value_type is float:
    sentences.append(option.expected)
  if option.default is None and (used := defaults_of(name)):
    sentences.append('unset: ' + ' or '.join(map(str, used)))
  return ' '.join(f'{sentence[0].upper()}{sentence[1:]}.' for sentence in sentences)


# The objective section: what the losses state of their options, whose values Objective checks.
OBJECTIVE = {
  name: Row(
    default=option.default,
    type=option.value_type if option.default is None or option.value_type is object else None,
    names=name == 'loss',
    meaning=_meaning(name, option),
  )
  for name, option in OPTIONS.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A checked config; nothing in it can be assigned."""

  workdir: str = row(  # None in planning alone
    None, 'Where checkpoints, metrics and exports go.', role=_SOURCE
  )
  seed: int = row(
    0, "Of the adapters' initial values, the data's order and dropout.", low=0, high=2**31 - 1
  )
  initialize_from_hf: str | None = row(
    None,
    'A directory (local or gs://) in Hugging Face layout, or a hub id (needs the hub extra).',
    role=_SOURCE,
  )
  reference_model_path: str | None = row(
    None, "Base weights of the reference, where they differ from the policy's.", role=_SOURCE
  )
  merge_adapter_path: str | None = row(
    None,
    'A PEFT adapter that is merged into the base as it is loaded, and from then on part of it.',
    role=_SOURCE,
  )
  initialize_from_adapter: str | None = row(
    None,
    "A PEFT adapter that the policy's adapters start as; ranks, alphas and targets are this one's, "
    "not lora's.",
    role=_SOURCE,
  )
  reference_adapter_path: str | None = row(
    None,
    'A PEFT adapter that the reference has on the base (of SFT). The policy starts on top of it '
    'with a new adapter, and the two are exported as one; or, with initialize_from_adapter, from '
    'that alone.',
    role=_SOURCE,
  )
  peft_save_path: str | None = row(
    None, 'Where the adapter is exported to; unset: workdir/peft.', role=_FREE
  )
  merged_hf_save_path: str | None = row(
    None,
    'Where the merged model is exported to; unset: nowhere, and with tuning.method=full '
    'workdir/merged.',
    role=_FREE,
  )
  allow_data_change: bool = row(
    False,
    'Go on from a checkpoint although data, tokenizer, template or their order have changed since.',
    role=_FREE,
  )
  hf_save_steps: int = row(
    0, 'Steps between exports; 0: at the end only.', low=0, unit='steps', role=_FREE
  )
  model: ModelSettings = section(ModelSettings)
  tuning: TuningSettings = section(TuningSettings)
  lora: LoraSettings = section(LoraSettings)
  objective: Objective = dataclasses.field(
    metadata={'section': Section(OBJECTIVE, Objective.from_config)}
  )
  reference: ReferenceSettings = section(ReferenceSettings)
  data: DataSettings = section(DataSettings)
  batch: BatchSettings = section(BatchSettings)
  train: TrainSettings = section(TrainSettings)
  optimizer: OptimizerSettings = section(OptimizerSettings)
  mesh: MeshSettings = section(MeshSettings)

  @classmethod
  def of(cls, values: Mapping[str, Any]) -> 'Settings':
    """Returns the settings of dotted field -> canonical value."""
    parts = _nested(values)
    made = {name: section.make(parts[name]) for name, section in SECTIONS.items()}
    return cls(**parts | made)

  def values(self) -> dict[str, Any]:
    """Returns dotted field -> canonical value, in the schema's order."""
    objective = {f'objective.{name}': value for name, value in self.objective.options().items()}
    return {
      field: objective[field] if field in objective else operator.attrgetter(field)(self)
      for field in ROWS
    }

  def replace(self, changes: Mapping[str, Any]) -> 'Settings':
    """Returns settings with other values of some dotted fields: {'batch.rows': 8}."""
    return Settings.of(self.values() | dict(changes))

  def with_tokenizer_of(self, base: epath.PathLike | None) -> 'Settings':
    """Returns the settings with a tokenizer: the one beside a base's weights, if they name none."""
    if base is None or self.data.tokenizer:
      return self
    return self.replace({'data.tokenizer': os.fspath(base)})

  def flat_json(self) -> dict[str, Any]:
    """Returns dotted field -> value as plain JSON values."""
    return {field: ROWS[field].plain(value) for field, value in self.values().items()}

  def to_json(self) -> dict[str, Any]:
    """Returns the settings as nested plain JSON values, by section."""
    return _nested(self.flat_json())

  def weight_paths(self) -> dict[str, str]:
    """Returns field -> path of the checkpoints and adapters that the models are made of."""
    fields = (
      *('initialize_from_hf', 'merge_adapter_path', 'initialize_from_adapter'),
      *('reference_model_path', 'reference_adapter_path'),
    )
    return {field: getattr(self, field) for field in fields if getattr(self, field)}


SECTIONS: dict[str, Section] = {
  field.name: field.metadata['section']
  for field in dataclasses.fields(Settings)
  if 'section' in field.metadata
}

# Dotted field -> its row.
ROWS: dict[str, Row] = rows_of(Settings) | {
  f'{name}.{field}': row
  for name, section in SECTIONS.items()
  for field, row in section.rows.items()
}


def default() -> ConfigDict:
  """Returns the schema with its default values, locked against unknown fields."""
  return ConfigDict(_nested({field: row.initial() for field, row in ROWS.items()})).lock()


def get(config: ConfigDict | Mapping[str, Any], field: str) -> Any:
  """Returns the value of a dotted field: `get(config, 'lora.r')`."""
  value: Any = config
  for name in field.split('.'):
    value = value[name]
  return value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns dotted field -> value as a mapping of sections."""
  nested: dict[str, Any] = {}
  for field, value in values.items():
    section, _, name = field.rpartition('.')
    (nested.setdefault(section, {}) if section else nested)[name] = value
  return nested
