"""What a run is, and in what it differs from the one that saved a checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dpo_flax.config.row import Role
from dpo_flax.config.schema import ROWS

_DATA = 'data'  # the fingerprint of data, tokenizer, template and the order of the pairs


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns those of `Settings.flat_json` that decide a run's numbers."""
  return _without(values, Role.SOURCE, Role.FREE)


def shared(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns those of `Settings.flat_json` that must be the same on every host of a run."""
  return _without(values, Role.SOURCE)


def _without(values: Mapping[str, Any], *roles: Role) -> dict[str, Any]:
  left_out = {field for field, row in ROWS.items() if row.role in roles}
  return {field: value for field, value in values.items() if field not in left_out}


class Difference(NamedTuple):
  """What is not as it was when a checkpoint was saved."""

  name: str
  saved: Any
  now: Any

  def __str__(self) -> str:
    return f'{self.name}: saved {self.saved!r}, now {self.now!r}'

  @property
  def is_of_the_data(self) -> bool:
    """Whether it decides only which pairs are seen, and when."""
    return self.name == _DATA or (self.name in ROWS and ROWS[self.name].role is Role.DATA)


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """What a checkpoint may only be continued under."""

  config: Mapping[str, Any]  # the fields that change a run's numbers (identity_of)
  fingerprints: Mapping[str, str | None]  # of what the config names by path: data, base, reference

  def differences(self, other: 'RunIdentity') -> list[Difference]:
    """Returns each difference to the run that wants to go on."""
    return [
      *_differences(_meant(self.config), _meant(other.config)),
      *_differences(self.fingerprints, other.fingerprints),
    ]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
  for name in sorted(saved.keys() | now.keys()):
    # A record may lack the fields that were added after it was written.
    absent = ROWS[name].plain(ROWS[name].when_absent) if name in ROWS else None
    before, after = saved.get(name, absent), now.get(name, absent)
    if before != after:
      yield Difference(name, before, after)


def _meant(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an identity with its mappings in one form: pairs, as the first that matches may count.

  Earlier versions saved a mapping as it was given: its names as fields (lora.rank_pattern.q_proj),
  a list of pairs, or a JSON object in a text.
  """
  meant: dict[str, Any] = {}
  for name, value in identity_of(config).items():
    field = next((each for each in _MAPPINGS if name.startswith(f'{each}.')), None)
    if field is not None:
      _put(meant.setdefault(field, {}), name[len(field) + 1 :].split('.'), value)
    else:
      meant[name] = value
  for field in _MAPPINGS & meant.keys():
    row = ROWS[field]
    meant[field] = row.plain(row.canonical(field, meant[field]))
  return meant


def _put(tree: dict[str, Any], path: list[str], value: Any):
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


_MAPPINGS = {field for field, row in ROWS.items() if row.mapping}
