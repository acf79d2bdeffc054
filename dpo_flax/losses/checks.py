"""What is wrong with an objective, in the words of the config's fields."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from dpo_flax.losses.divergences import DIVERGENCES, REFUSED
from dpo_flax.losses.registry import (
  LOSSES,
  MODIFIERS,
  Constant,
  Loss,
  as_loss,
  users,
)


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


def check(
  losses: tuple[Loss, ...],
  options: Mapping[str, Constant],  # the fields of the config, with their ranges
  general: Mapping[str, Any],  # every option but
  constants: Mapping[str, Any],  # those of single losses, as far as they are given
) -> None:
  """Raises ValueError for any option that is wrong or would be ignored."""
  _check_weights(losses, general['loss_weights'])
  _check_ranges(options, {**general, **constants})
  _check_divergence(losses, general['divergence'], general['alpha_divergence'])
  _check_names(losses, options, constants)
  _check_use(losses, general, {name: constants.get(name) for name in options})
  _check_needs(losses, general, constants)
  _check_reference(general)


def unread(losses: tuple[Loss, ...], option: str) -> list[str]:
  """Returns the names of the losses that would ignore an option; sft beside others may."""
  comparing = [loss for loss in losses if not loss.chosen_only]
  return [loss.name for loss in comparing or losses if not loss.reads(option)]


def _names(losses: tuple[Loss, ...]) -> tuple[str, ...]:
  return tuple(loss.name for loss in losses)


def _check_weights(losses: tuple[Loss, ...], weights: Any) -> None:
  if weights is not None and len(weights) != len(losses):
    raise ValueError(
      f'objective.loss_weights has {len(weights)} numbers for {len(losses)} losses '
      f'({", ".join(_names(losses))}): give one for each, or leave it unset for 1.0 each.'
    )
  valid = (isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights or ())
  if not all(valid):
    raise ValueError(
      f'objective.loss_weights={tuple(weights or ())}: every weight must be a finite number '
      'above 0.'
    )


def _check_ranges(options: Mapping[str, Constant], values: Mapping[str, Any]) -> None:
  for name, option in options.items():
    value = values.get(name)
    if value is None or option.value_type is not float:
      continue
    if not (math.isfinite(value) and option.is_inside(value)):
      raise ValueError(f'objective.{name}={value}: it must be {option.expected}.')


def _check_divergence(losses: tuple[Loss, ...], divergence: str, alpha: float | None) -> None:
  if divergence in REFUSED:
    raise ValueError(
      f'objective.divergence={divergence!r} gives no implicit reward: {REFUSED[divergence]} '
      f'(arXiv:2309.16240, Theorem 1). Use one of {", ".join(DIVERGENCES)}.'
    )
  if divergence not in DIVERGENCES:
    raise ValueError(f'objective.divergence={divergence!r}: use one of {", ".join(DIVERGENCES)}.')
  if (divergence == 'alpha') != (alpha is not None):
    raise ValueError(
      f'objective.divergence={divergence!r} with objective.alpha_divergence={alpha}: '
      "alpha_divergence goes with divergence='alpha', and only with it."
    )
  others = unread(losses, 'divergence')
  if divergence != 'reverse_kl' and others:
    alone = ' alone' if all(loss.chosen_only for loss in losses) else ''
    raise ValueError(
      f'objective.divergence={divergence!r} cannot go with {", ".join(others)}{alone}: the '
      'normaliser of the optimal policy cancels only in losses on the difference of two rewards '
      f'({users("divergence")}).'
    )


def _check_names(
  losses: tuple[Loss, ...], options: Mapping[str, Constant], constants: Mapping[str, Any]
) -> None:
  known = {*options, *(name for loss in losses for name in loss.constants)}
  unknown = ', '.join(sorted(constants.keys() - known))
  if unknown:
    raise TypeError(f'Objective has no option {unknown}; it has {", ".join(sorted(known))}')


def _check_use(
  losses: tuple[Loss, ...], general: Mapping[str, Any], constants: Mapping[str, Any]
) -> None:
  shown = general['loss'] if isinstance(general['loss'], str) else _names(losses)
  for option, value in {**constants, **{name: general[name] for name in MODIFIERS}}.items():
    is_set = value is not None and value is not False
    if is_set and not any(loss.reads(option) for loss in losses):
      raise ValueError(
        f'objective.{option}={value} is not used by objective.loss={shown!r}: '
        f'leave it unset, or use it with {users(option)}.'
      )


def _check_needs(
  losses: tuple[Loss, ...], general: Mapping[str, Any], constants: Mapping[str, Any]
) -> None:
  for loss in losses:
    required = {
      name: 'a value: it has no default.'
      for name, default in loss.constants.items()
      if default is inspect.Parameter.empty and name not in general
    }
    for name, why in {**required, **loss.needs}.items():
      if not constants.get(name):
        raise ValueError(f'objective.loss={loss.name!r} needs objective.{name} {why}')


def _check_reference(general: Mapping[str, Any]) -> None:
  if not general['reference_free']:
    return
  if general['kl_penalty_weight'] is not None:
    raise ValueError(
      f'objective.reference_free=True with objective.kl_penalty_weight='
      f'{general["kl_penalty_weight"]}: the KL is measured from the reference. Drop one of them.'
    )
  if general['divergence'] != 'reverse_kl':
    raise ValueError(
      f'objective.reference_free=True with objective.divergence={general["divergence"]!r}: a '
      'divergence is measured from the reference. Drop one of them.'
    )
