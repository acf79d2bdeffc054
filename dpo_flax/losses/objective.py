"""What a run minimises: the losses, their constants, and which options go together."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from dpo_flax.losses.divergences import DIVERGENCES, REFUSED

# Options a loss reads, by how it uses the responses' log-probs.
_RATIO = frozenset({'reference_free', 'ld_alpha', 'wpo'})  # log policy - log reference
_DIFFERENCE = _RATIO | {'divergence'}  # only chosen - rejected: the normaliser cancels
_POLICY = frozenset({'wpo'})  # the policy alone: no reference is run

# Beside beta, what each loss reads of the config and (chosen_probability, margin) of the records.
# Anything else that is set is refused.
READS = {
  'sigmoid': _DIFFERENCE | {'label_smoothing', 'chosen_probability', 'margin'},
  'sigmoid_norm': _DIFFERENCE | {'label_smoothing', 'chosen_probability', 'margin'},
  'hinge': _DIFFERENCE | {'margin'},
  'ipo': _DIFFERENCE,
  'exo_pair': _DIFFERENCE | {'label_smoothing'},
  'robust': _DIFFERENCE | {'label_smoothing'},
  'discopop': _DIFFERENCE | {'discopop_temperature'},
  'dpop': _RATIO | {'dpop_lambda'},
  'nca_pair': _RATIO,
  'bco_pair': _RATIO,
  'sppo_hard': _RATIO,
  'apo_zero': _RATIO,
  'apo_down': _RATIO,
  # A slot's loss belongs to a rank in the sorted batch, not to a pair that could be weighted.
  'aot': _RATIO - {'wpo'} | {'label_smoothing'},
  'aot_unpaired': _RATIO - {'wpo'} | {'label_smoothing'},
  'sft': frozenset(),
  'simpo': _POLICY | {'gamma'},
  'cpo': _POLICY | {'cpo_alpha'},
  'orpo': _POLICY | {'orpo_lambda'},
}

# Losses of log-probs per token; rewards are then logged per token too.
LENGTH_NORMALISED = frozenset({'ipo', 'sigmoid_norm', 'sft', 'simpo', 'orpo'})
RECORD_FIELDS = ('chosen_probability', 'margin')  # of the records, what some losses use
SORTED = frozenset({'aot', 'aot_unpaired'})

# The value of an option that is unset and read, as published.
PUBLISHED = {
  'label_smoothing': 0.0,
  'gamma': 0.5,
  'cpo_alpha': 1.0,
  'orpo_lambda': 0.1,
  'dpop_lambda': 50.0,
  'discopop_temperature': 0.05,
}

_POSITIVE = ('above 0', lambda x: x > 0)
_RANGES = {
  'beta': _POSITIVE,
  'label_smoothing': ('in [0, 0.5)', lambda x: 0 <= x < 0.5),
  'alpha_divergence': ('in (0, 1); 0 is reverse_kl, 1 is forward_kl', lambda x: 0 < x < 1),
  'gamma': ('at least 0', lambda x: x >= 0),
  'cpo_alpha': ('at least 0', lambda x: x >= 0),
  'orpo_lambda': _POSITIVE,
  'dpop_lambda': _POSITIVE,
  # Above 1 the exponential would outgrow its weight and the loss would overflow.
  'discopop_temperature': ('in (0, 1]', lambda x: 0 < x <= 1),
  'sft_weight': _POSITIVE,
  'ld_alpha': ('in [0, 1]', lambda x: 0 <= x <= 1),
  'kl_penalty_weight': _POSITIVE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """The validated `config.objective`; hashable, so that it can be a static argument of a jit."""

  loss: tuple[str, ...]
  loss_weights: tuple[float, ...]
  beta: float
  label_smoothing: float
  divergence: str
  alpha_divergence: float | None
  gamma: float
  cpo_alpha: float
  orpo_lambda: float
  dpop_lambda: float
  discopop_temperature: float
  sft_weight: float | None
  ld_alpha: float | None
  wpo: bool
  reference_free: bool
  kl_penalty_weight: float | None
  token_statistics: bool

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> 'Objective':
    """Reads `config.objective`; ValueError where options are unknown, unused or out of range."""
    losses = _losses(config)
    validate(config)
    values = {field.name: config[field.name] for field in dataclasses.fields(cls)}
    for name, published in PUBLISHED.items():
      values[name] = published if values[name] is None else float(values[name])
    values['loss'] = losses
    values['loss_weights'] = tuple(map(float, config['loss_weights'] or (1.0,) * len(losses)))
    return cls(**values)

  def reads(self, option: str) -> bool:
    """Whether any of the losses uses an option or a field of the records."""
    return any(option in READS[name] for name in self.loss)

  @property
  def needs_reference(self) -> bool:
    """Whether the reference's log-probs are needed; without them its forward pass is skipped."""
    compares = self.reads('reference_free') and not self.reference_free
    return compares or self.kl_penalty_weight is not None

  @property
  def per_token(self) -> bool:
    """Whether the first loss, which the logged rewards follow, compares means over tokens."""
    return self.loss[0] in LENGTH_NORMALISED


def check_records(fields: Collection[str], objective: Objective) -> None:
  """Raises ValueError where records give what the loss would ignore.

  Args:
    fields: the optional fields of a batch that the data has, such as margin.
    objective: whose losses each read some of them.
  """
  for field in RECORD_FIELDS:
    deaf = [name for name in objective.loss if name != 'sft' and field not in READS[name]]
    if field in fields and (deaf or objective.loss == ('sft',)):
      users = ', '.join(name for name in READS if field in READS[name])
      raise ValueError(
        f'The records give {field}, which {", ".join(deaf) or "sft"} does not use: remove it from '
        f'the records, or set objective.loss to {users}.'
      )
  unweighted = SORTED.intersection(objective.loss)
  if 'pair_weight' in fields and unweighted:
    raise ValueError(
      f'The records give pair_weight, which {", ".join(sorted(unweighted))} cannot use: it sorts '
      'the batch, in which a pair has no loss of its own. Remove the weights or change the loss.'
    )


def validate(config: Mapping[str, Any]) -> None:
  """Raises ValueError for anything in `config.objective` that is wrong or would be ignored."""
  losses = _losses(config)
  unknown = [name for name in losses if name not in READS]
  if unknown or not losses:
    raise ValueError(
      f'objective.loss={config["loss"]!r}: {unknown or "no loss"} is not one of '
      f'{", ".join(READS)}. Give one name, or a tuple with objective.loss_weights.'
    )
  if len(set(losses)) < len(losses):
    raise ValueError(f'objective.loss={losses!r} names a loss twice: add up its weights instead.')
  _validate_weights(config, losses)
  _validate_ranges(config)
  _validate_divergence(config, losses)
  _validate_use(config, losses)
  _validate_reference(config)


def _losses(config: Mapping[str, Any]) -> tuple[str, ...]:
  return (config['loss'],) if isinstance(config['loss'], str) else tuple(config['loss'])


def _validate_weights(config: Mapping[str, Any], losses: tuple[str, ...]) -> None:
  weights = config['loss_weights']
  if weights is not None and len(weights) != len(losses):
    raise ValueError(
      f'objective.loss_weights has {len(weights)} numbers for {len(losses)} losses '
      f'({", ".join(losses)}): give one for each, or leave it unset for 1.0 each.'
    )
  sound = (isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights or ())
  if not all(sound):
    raise ValueError(
      f'objective.loss_weights={tuple(weights)}: every weight must be a finite number above 0.'
    )


def _validate_ranges(config: Mapping[str, Any]) -> None:
  for name, (expected, is_inside) in _RANGES.items():
    value = config[name]
    if value is not None and not (math.isfinite(value) and is_inside(value)):
      raise ValueError(f'objective.{name}={value}: it must be {expected}.')


def _validate_divergence(config: Mapping[str, Any], losses: tuple[str, ...]) -> None:
  divergence, alpha = config['divergence'], config['alpha_divergence']
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
  others = [name for name in losses if name != 'sft' and 'divergence' not in READS[name]]
  if divergence != 'reverse_kl' and (others or losses == ('sft',)):
    raise ValueError(
      f'objective.divergence={divergence!r} cannot go with {", ".join(others) or "sft alone"}: the '
      'normaliser of the optimal policy cancels only in losses on the difference of two rewards '
      f'({", ".join(name for name in READS if "divergence" in READS[name])}).'
    )


def _validate_use(config: Mapping[str, Any], losses: tuple[str, ...]) -> None:
  for option in (*PUBLISHED, 'ld_alpha', 'wpo', 'reference_free'):
    is_set = config[option] is not None and config[option] is not False
    if is_set and not any(option in READS[name] for name in losses):
      users = ', '.join(name for name in READS if option in READS[name])
      raise ValueError(
        f'objective.{option}={config[option]} is not used by objective.loss={config["loss"]!r}: '
        f'leave it unset, or use it with {users}.'
      )
  if 'exo_pair' in losses and not config['label_smoothing']:
    raise ValueError(
      "objective.loss='exo_pair' needs objective.label_smoothing above 0 (at 0 the loss is "
      'infinite); the paper uses 0.001 (arXiv:2402.00856).'
    )


def _validate_reference(config: Mapping[str, Any]) -> None:
  if not config['reference_free']:
    return
  if config['kl_penalty_weight'] is not None:
    raise ValueError(
      f'objective.reference_free=True with objective.kl_penalty_weight='
      f'{config["kl_penalty_weight"]}: the KL is measured from the reference. Drop one of them.'
    )
  if config['divergence'] != 'reverse_kl':
    raise ValueError(
      f'objective.reference_free=True with objective.divergence={config["divergence"]!r}: a '
      'divergence is measured from the reference. Drop one of them.'
    )
