"""Which run a saved step is of, and whether another may go on from it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from absl import logging
from etils import epath

from dpo_flax.checkpoints import steps
from dpo_flax.files.messages import shown_list


class Difference(Protocol):
  """What is not as it was when a step was saved; its text names it, with both values."""

  @property
  def is_of_the_data(self) -> bool:
    """Whether it decides only which data are seen, and when."""
    ...


class Identity(Protocol):
  """What a step may only be continued under: a dataclass of values that JSON can hold."""

  __dataclass_fields__: ClassVar[dict[str, Any]]

  def differences(self, other: Any) -> Sequence[Difference]:
    """Returns each difference to another of the same class that wants to go on."""
    ...


AnIdentity = TypeVar('AnIdentity', bound=Identity)


def saved_identity(directory: epath.Path, step: int, of: type[AnIdentity]) -> AnIdentity:
  """Returns what the run that saved `step` was.

  Raises:
    ValueError: the step does not say.
  """
  record = steps.read_record(directory / str(step))
  names = [field.name for field in dataclasses.fields(of)]
  if missing := [name for name in names if name not in record]:
    raise ValueError(f'{directory}/{step} does not say of which run it is: no {missing[0]}')
  return of(**{name: record[name] for name in names})


def check_identity(directory: epath.Path, step: int, identity: Identity, allow_data_change: bool):
  """Checks that a run may go on from `step`; warns where its data are others.

  Raises:
    ValueError: it was saved under another identity; names what differs.
  """
  found = saved_identity(directory, step, type(identity)).differences(identity)
  refused = [each for each in found if not (allow_data_change and each.is_of_the_data)]
  if refused:
    only_data = all(each.is_of_the_data for each in refused)
    hint = '\nTo go on in changed data all the same, set allow_data_change.' if only_data else ''
    raise ValueError(
      f'{directory} holds step {step} of another run:{shown_list(map(str, refused))}\n'
      f'Set these back to go on with it, or choose another workdir.{hint}'
    )
  for each in found:
    logging.warning(
      'allow_data_change: going on from step %d in OTHER data or another order, so that pairs '
      'may be seen twice or never. %s',
      step,
      each,
    )
