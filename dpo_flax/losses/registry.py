"""What a loss states about itself, once, above its function; and the table of all that do.

    @register(records=('margin',))
    def hinge(logps, *, beta=0.1, ...): ...

The checks of an objective, the fields of the config and the needs of the step follow from that
statement and the function's signature.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

RECORD_FIELDS = ('chosen_probability', 'margin')  # optional fields of the records
MODIFIERS = ('ld_alpha', 'wpo', 'reference_free')  # what an objective does around its losses

Function = TypeVar('Function', bound=Callable[..., jax.Array])


@dataclasses.dataclass(frozen=True)
class Constant:
  """An option of an objective: what it means and, of a number, which values make sense."""

  meaning: str
  expected: str = 'a finite number'  # as messages put it: 'above 0'
  is_inside: Callable[[float], bool] = lambda x: True
  value_type: type = float
  default: Any = None  # None: not given


@dataclasses.dataclass(frozen=True)
class Loss:
  """A function from pairs to their losses, and what an objective has to know about it.

  The function takes a `PairLogps`, then its constants by keyword, each with a default, and returns
  one loss for each pair, in the shape of `policy_chosen`. A function that is given to an
  `Objective` as it is counts as `Loss(function)`.

  >>> likelihood = Loss(lambda logps: -logps.policy_chosen, 'likelihood', needs_reference=False)
  >>> likelihood.modifiers
  ('wpo',)
  """

  function: Callable[..., Any]
  name: str = ''  # the function's
  _: dataclasses.KW_ONLY
  needs_reference: bool = True  # reads reference_chosen and reference_rejected
  per_token: bool = False  # compares means over tokens; rewards are then logged per token too
  sorts_batch: bool = False  # a loss belongs to a rank in the batch, not to a pair
  chosen_only: bool = False  # reads no rejected; what others of a mixture use may be set beside it
  records: tuple[str, ...] = RECORD_FIELDS  # what it reads of the records; it sees nothing else
  modifiers: tuple[str, ...] = MODIFIERS  # which apply; wpo alone where no reference is read
  needs: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # constant: why

  def __post_init__(self):
    if not self.needs_reference:
      modifiers = tuple(name for name in self.modifiers if name == 'wpo')
      object.__setattr__(self, 'modifiers', modifiers)
    if not self.name:
      function = getattr(self.function, 'func', self.function)  # of a partial
      object.__setattr__(self, 'name', getattr(function, '__name__', type(function).__name__))

  @functools.cached_property
  def constants(self) -> dict[str, Any]:
    """The arguments after the pairs, and their defaults."""
    _, *others = inspect.signature(self.function).parameters.values()
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {each.name: each.default for each in others if each.kind in by_keyword}

  @property
  def bound(self) -> Mapping[str, Any]:
    """The constants that a `functools.partial` fixes: no objective changes them."""
    return getattr(self.function, 'keywords', {})

  def reads(self, option: str) -> bool:
    """Whether an option of the objective or a field of the records makes a difference."""
    return option in (*self.records, *self.modifiers, *self.constants)

  def __call__(self, *args: Any, **constants: Any) -> jax.Array:
    """Calls the function."""
    return self.function(*args, **constants)


LOSSES: dict[str, Loss] = {}  # by the name that a config gives


def register(*, records: tuple[str, ...] = (), **facts: Any) -> Callable[[Function], Function]:
  """Returns a decorator that makes a function known by its name, and leaves it as it is.

  Args:
    records: which of `RECORD_FIELDS` the loss reads.
    **facts: other fields of `Loss`.
  """

  def add(function: Function) -> Function:
    loss = Loss(function, records=records, **facts)
    if loss.name in LOSSES:
      raise ValueError(f'a loss named {loss.name} is registered already')
    LOSSES[loss.name] = loss
    return function

  return add


def as_loss(loss: Any) -> Loss | None:
  """Returns what a name, a function or a `Loss` stands for; None where it is none of them."""
  if isinstance(loss, Loss):
    return loss
  if isinstance(loss, str):
    return LOSSES.get(loss)
  function = getattr(loss, 'func', loss)  # of a partial
  for registered in LOSSES.values():
    if registered.function is function:
      return dataclasses.replace(registered, function=loss)
  return Loss(loss) if callable(loss) else None


def defaults_of(option: str) -> list[Any]:
  """Returns the different defaults that the registered losses have for an option."""
  found = (loss.constants.get(option) for loss in LOSSES.values())
  known = (default for default in found if default not in (None, inspect.Parameter.empty))
  return list(dict.fromkeys(known))


def users(option: str) -> str:
  """Returns the names of the registered losses that read an option, for messages."""
  return ', '.join(loss.name for loss in LOSSES.values() if loss.reads(option))
