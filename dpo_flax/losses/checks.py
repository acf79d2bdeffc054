"""What is wrong with an objective, in the words of the config's fields."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_flax.losses.divergences import DIVERGENCES, REFUSED
from dpo_flax.losses.registry import LOSSES, MODIFIERS, Constant, Loss, as_loss, users


def resolve(loss: Any) -> tuple[Loss, ...]:
  """Returns the losses that one, or a sequence of names, functions and `Loss`es, stands for."""
  several = tuple(loss) if isinstance(loss, list | tuple) else (loss,)
  found = [as_loss(each) for each in several]
  unknown = [each for each, one in zip(several, found, strict=True) if one is None]
  losses = tuple(one for one in found if one is not None)
  if unknown or not losses:
    raise ValueError(
      f'objective.loss={loss!r}: {unknown or "no loss"} is not one of '
      f'{", ".join(LOSSES)}. Give one name, or a tuple with objective.loss_weights.'
    )
  if len(set(losses)) < len(losses):
    raise ValueError(f'objective.loss={several!r} names a loss twice: add up its weights instead.')
  return losses


def mistakes(
  losses: tuple[Loss, ...],
  options: Mapping[str, Constant],  # the fields of the config, with their ranges
  general: Mapping[str, Any],  # every option but
  constants: Mapping[str, Any],  # those of single losses, as far as they are given
) -> Iterator[str]:
  """Yields what is wrong with an objective: options out of range, or that would be ignored.

  Raises:
    TypeError: no loss of the objective has such a constant.
  """
  known = {*options, *(name for loss in losses for name in loss.constants)}
  if unknown := ', '.join(sorted(constants.keys() - known)):
    raise TypeError(f'Objective has no option {unknown}; it has {", ".join(sorted(known))}')
  yield from _weight_mistakes(losses, general['loss_weights'])
  given = {**general, **constants}
  numbers = (name for name, option in options.items() if option.value_type is float)
  for name in (name for name in numbers if given.get(name) is not None):
    if not (math.isfinite(given[name]) and options[name].is_inside(given[name])):
      yield f'objective.{name}={given[name]}: it must be {options[name].expected}.'
  yield from _overridden(losses, options, general)
  yield from _divergence_mistakes(losses, general['divergence'], general['alpha_divergence'])
  yield from _ignored(losses, general, {name: constants.get(name) for name in options})
  yield from _missing(losses, general, constants)
  if general['reference_free']:
    yield from _reference_mistakes(general['kl_penalty_weight'], general['divergence'])


def unread(losses: tuple[Loss, ...], option: str) -> list[str]:
  """Returns the names of the losses that would ignore an option; sft beside others may."""
  comparing = [loss for loss in losses if not loss.chosen_only]
  return [loss.name for loss in comparing or losses if not loss.reads(option)]


def _overridden(
  losses: tuple[Loss, ...], options: Mapping[str, Constant], general: Mapping[str, Any]
) -> Iterator[str]:
  for loss in losses:
    for name in general.keys() & (loss.constants.keys() - loss.bound):
      own, usual = loss.constants[name], options[name].default
      if own not in (usual, inspect.Parameter.empty) and general[name] == usual:
        yield (
          f'the loss {loss.name} has the default {name}={own!r}, and objective.{name}={usual!r} '
          f'would take its place: give the objective {name}, or fix it by functools.partial'
        )


def _weight_mistakes(losses: tuple[Loss, ...], weights: Any) -> Iterator[str]:
  if weights is None:
    return
  if len(weights) != len(losses):
    yield (
      f'objective.loss_weights has {len(weights)} numbers for {len(losses)} losses '
      f'({", ".join(loss.name for loss in losses)}): give one for each, or leave it unset for 1.0 '
      'each.'
    )
  if not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights):
    yield f'objective.loss_weights={tuple(weights)}: every weight must be a finite number above 0.'


def _divergence_mistakes(
  losses: tuple[Loss, ...], divergence: str, alpha: float | None
) -> Iterator[str]:
  if divergence in REFUSED:
    yield (
      f'objective.divergence={divergence!r} gives no implicit reward: {REFUSED[divergence]} '
      f'(arXiv:2309.16240, Theorem 1). Use one of {", ".join(DIVERGENCES)}.'
    )
  if divergence not in DIVERGENCES:
    yield f'objective.divergence={divergence!r}: use one of {", ".join(DIVERGENCES)}.'
  if (divergence == 'alpha') != (alpha is not None):
    yield (
      f'objective.divergence={divergence!r} with objective.alpha_divergence={alpha}: '
      "alpha_divergence goes with divergence='alpha', and only with it."
    )
  others = unread(losses, 'divergence')
  if divergence != 'reverse_kl' and others:
    alone = ' alone' if all(loss.chosen_only for loss in losses) else ''
    yield (
      f'objective.divergence={divergence!r} cannot go with {", ".join(others)}{alone}: the '
      'normaliser of the optimal policy cancels only in losses on the difference of two rewards '
      f'({users("divergence")}).'
    )


def _ignored(
  losses: tuple[Loss, ...], general: Mapping[str, Any], constants: Mapping[str, Any]
) -> Iterator[str]:
  loss = general['loss']
  shown = loss if isinstance(loss, str) else tuple(each.name for each in losses)
  for option, value in {**constants, **{name: general[name] for name in MODIFIERS}}.items():
    is_set = value is not None and value is not False
    if is_set and not any(loss.reads(option) for loss in losses):
      yield (
        f'objective.{option}={value} is not used by objective.loss={shown!r}: '
        f'leave it unset, or use it with {users(option)}.'
      )


def _missing(
  losses: tuple[Loss, ...], general: Mapping[str, Any], constants: Mapping[str, Any]
) -> Iterator[str]:
  for loss in losses:
    required = {
      name: 'a value: it has no default.'
      for name, default in loss.constants.items()
      if default is inspect.Parameter.empty and name not in general
    }
    for name, why in {**required, **loss.needs}.items():
      if not constants.get(name):
        yield f'objective.loss={loss.name!r} needs objective.{name} {why}'


def _reference_mistakes(kl_penalty_weight: float | None, divergence: str) -> Iterator[str]:
  measured = []
  if kl_penalty_weight is not None:
    measured.append(f'objective.kl_penalty_weight={kl_penalty_weight}: the KL')
  if divergence != 'reverse_kl':
    measured.append(f'objective.divergence={divergence!r}: a divergence')
  for each in measured:
    yield (
      f'objective.reference_free=True with {each} is measured from the reference. Drop one of them.'
    )
