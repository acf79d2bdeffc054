"""What a run is, and in what it differs from the one that saved a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# Where data, tokenizer, template and the order of the pairs enter a run's identity.
_OF_THE_DATA = ('data', 'data.', 'batch.rows', 'batch.tokens', 'batch.pairs_per_row')


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
    return any(
      self.name.startswith(name) if name.endswith('.') else self.name == name
      for name in _OF_THE_DATA
    )


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """What a checkpoint may only be continued under."""

  config: Mapping[str, Any]  # the fields that change a run's numbers (config.identity)
  fingerprints: Mapping[str, str]  # of what the config names by path: data, base, reference

  def differences(self, other: 'RunIdentity') -> list[Difference]:
    """Returns each difference to the run that wants to go on."""
    return [
      Difference(name, mine.get(name), theirs.get(name))
      for mine, theirs in ((self.config, other.config), (self.fingerprints, other.fingerprints))
      for name in sorted(mine.keys() | theirs.keys())
      if mine.get(name) != theirs.get(name)
    ]
