"""A raw record: strict JSON, and the error of a record that cannot be used."""

from typing import Any

from dpo_flax.files.strict_json import StrictJsonError, parse_object


class RecordError(ValueError):
  """A record that cannot be used; `reason` is short, so that equal reasons can be counted."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason, detail)  # both, so that the error can be pickled
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f'{self.reason}: {self.detail}' if self.detail else self.reason


def parse(line: bytes) -> dict[str, Any]:
  """Parses one JSON object strictly: no NaN or infinity, no key twice.

  Raises:
    RecordError: anything else.
  """
  try:
    return parse_object(line)
  except StrictJsonError as error:
    details = {
      'duplicate key': repr(error.detail),
      'not a JSON object': f'it is a {error.detail}',
    }
    raise RecordError(error.reason, details.get(error.reason, str(error.detail))) from None
