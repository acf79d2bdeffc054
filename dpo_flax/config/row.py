"""One row a field: default, meaning, unit, choices or range, and role on resume."""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from dpo_flax.config.named_values import data_paths, named_pairs

_DEFAULT = object()


class Role(enum.Enum):
  """What a field may do when a run goes on from a checkpoint."""

  NUMBERS = 'numbers'  # decides the run's numbers: a change is refused
  DATA = 'data'  # decides which pairs are seen, and when: allow_data_change lets it change
  SOURCE = 'source'  # where a host reads or works: free, as what is read is fingerprinted
  FREE = 'free'  # where and how often a run reports, how it is spread over devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A field of the schema."""

  default: Any  # None: unset
  meaning: str
  type: Any = None  # of a value; None: the default's, else of mappings and paths object, or str
  unit: str | None = None
  choices: tuple[str, ...] = ()
  low: float | None = None  # smallest value
  high: float | None = None  # largest value
  above: float | None = None  # what a value must be greater than
  names: bool = False  # a name, or a list of names
  # A mapping: what its names are of, and a (name, value) for the message.
  mapping: tuple[str, tuple[str, Any]] | None = None
  paths: bool = False  # data files: a path, a list of paths, or a mixture
  role: Role = Role.NUMBERS
  absent: Any = _DEFAULT  # what an older record that lacks the field means; default: the default

  @property
  def when_absent(self) -> Any:
    """The value that a run had that was saved before the field was added."""
    return self.default if self.absent is _DEFAULT else self.absent

  def initial(self) -> Any:
    """Returns what a ConfigDict gets: the default, or a placeholder of the field's type."""
    value_type = self.type or (object if self.mapping or self.paths else None)
    if self.default is None:
      return config_dict.placeholder(value_type or str)
    return FieldReference(self.default, field_type=value_type) if value_type else self.default

  def canonical(self, field: str, value: Any) -> Any:
    """Returns the one form of a value: tuples, and mappings as tuples of (name, value).

    Raises:
      ValueError: it is no mapping, or no data files, in any of their forms.
    """
    if self.mapping:
      of, example = self.mapping
      return named_pairs(field, value, of=of, example=example)
    if self.paths and value:
      return data_paths(value)
    return value.to_dict() if isinstance(value, ConfigDict) else _tuples(value)

  def plain(self, value: Any) -> Any:
    """Returns a canonical value as JSON has it; an empty mapping is null, as it is unset."""
    return None if self.mapping and not value else _lists(value)

  def check(self, field: str, value: Any):
    """Raises ValueError where this row does not allow the value."""
    if self.choices and value not in self.choices:
      raise ValueError(f'{field}={value!r}: expected one of {", ".join(self.choices)}')
    if self.low is not None or self.high is not None:
      # Written so that NaN, which no comparison holds for, fails.
      inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
      if not (inside and math.isfinite(value)):
        raise ValueError(f'{field}={value}: must be {self.bounds}')
    if self.above is not None and not self.above < value < math.inf:
      raise ValueError(f'{field}={value}: must be {self.bounds}')
    if self.names and value is not None:
      several = value if isinstance(value, list | tuple | dict) else [value]
      if not all(isinstance(name, str) for name in several):
        raise ValueError(f'{field}={value!r}: expected a name, or a list of names')

  @property
  def bounds(self) -> str:
    """The range in words; empty where there is none."""
    if self.above is not None:
      return f'greater than {self.above}, and finite'
    if self.low is None and self.high is None:
      return ''
    return f'at least {self.low}' if self.high is None else f'between {self.low} and {self.high}'


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
  return list(map(_lists, value)) if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Section:
  """The fields of one section, and what makes its typed settings of their values."""

  rows: Mapping[str, Row]
  make: Callable[[Mapping[str, Any]], Any]  # of the values by name


def row(default: Any, meaning: str, **options: Any) -> Any:
  """Declares a field of a settings dataclass; the options are those of `Row`."""
  one = Row(default=default, meaning=meaning, **options)
  return dataclasses.field(default=() if one.mapping else default, metadata={'row': one})


def section(settings: type) -> Any:
  """Declares a section, whose fields are the rows of another settings dataclass."""
  return dataclasses.field(
    default_factory=settings,
    metadata={'section': Section(rows_of(settings), lambda values: settings(**values))},
  )


def rows_of(settings: type) -> dict[str, Row]:
  """Returns name -> row of a settings dataclass, in order, without its sections."""
  return {
    field.name: field.metadata['row']
    for field in dataclasses.fields(settings)
    if 'row' in field.metadata
  }
