"""What a run minimises: its losses, weighted, their constants, and the modifiers around them."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_flax.losses import checks
from dpo_flax.losses.losses import CONSTANTS, links, per_token, scaled, sft
from dpo_flax.losses.pair_logps import Branches, PairLogps
from dpo_flax.losses.registry import MODIFIERS, RECORD_FIELDS, Constant, Loss, users

SomeLoss = str | Loss | Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Objective:
  """One or several losses, weighted, with their constants and modifiers; hashable.

  It checks itself: an option that is out of range, or that none of the losses would use, is a
  ValueError that names the field of the config.

  >>> objective = Objective('simpo', beta=2.0)
  >>> objective.gamma  # was not given: as published
  0.5
  >>> objective.needs_reference
  False
  >>> objective.replace(gamma=1.0)
  Objective(loss='simpo', beta=2.0, gamma=1.0)
  >>> Objective('ipo', gamma=1.0)
  Traceback (most recent call last):
  ValueError: objective.gamma=1.0 is not used by objective.loss='ipo': leave it unset, or use it \
with simpo.
  """

  losses: tuple[Loss, ...]
  loss_weights: tuple[float, ...]
  beta: float
  divergence: str
  alpha_divergence: float | None
  sft_weight: float | None
  ld_alpha: float | None
  wpo: bool
  reference_free: bool
  kl_penalty_weight: float | None
  token_statistics: bool
  constants: tuple[tuple[str, float], ...]  # those given
  given: tuple[tuple[str, Any], ...] = dataclasses.field(compare=False)  # the arguments

  def __init__(
    self,
    loss: SomeLoss | Sequence[SomeLoss] = 'sigmoid',
    *,
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    divergence: str = 'reverse_kl',
    alpha_divergence: float | None = None,
    sft_weight: float | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    reference_free: bool = False,
    kl_penalty_weight: float | None = None,
    token_statistics: bool = False,
    **constants: float | None,
  ):
    """Checks and keeps what is given.

    Args:
      loss: the name of a loss, a function from `PairLogps` to losses, a `Loss`, or several.
      loss_weights: one for each loss; None: 1.0 each.
      beta: strength of the pull to the reference. It also scales the reported rewards.
      divergence: reverse_kl, forward_kl, js or alpha (arXiv:2309.16240).
      alpha_divergence: the alpha of divergence='alpha', in (0, 1).
      sft_weight: adds this times chosen's mean negative log-likelihood per token (RPO).
      ld_alpha: weight of the tokens past the shorter response's length (LD-DPO), in [0, 1].
      wpo: weigh pairs by how on-policy they are (arXiv:2406.11827).
      reference_free: the reference's log-probs count as 0.
      kl_penalty_weight: adds this times the exact KL(policy || reference) per token.
      token_statistics: report the policy's entropy and, with a reference, the KL to it.
      **constants: of the losses, such as label_smoothing; None or left out: the loss's default.

    Raises:
      ValueError: an option is unknown, out of range, or would be ignored.
    """
    general = {name: value for name, value in locals().items() if name in DEFAULTS}
    losses = checks.resolve(loss)
    if mistake := next(checks.mistakes(losses, OPTIONS, general, constants), None):
      raise ValueError(mistake)
    numbers = {name: float(value) for name, value in constants.items() if value is not None}
    given = {name: value for name, value in (general | constants).items() if value is not None}
    values = general | {
      'losses': losses,
      'loss_weights': tuple(map(float, loss_weights or (1.0,) * len(losses))),
      'constants': tuple(sorted(numbers.items())),
      'given': tuple(given.items()),
    }
    del values['loss']
    for name, value in values.items():
      object.__setattr__(self, name, value)

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> 'Objective':
    """Reads the section `objective` of a config."""
    return cls(**config)

  def replace(self, **changes: Any) -> 'Objective':
    """Returns the objective with other options; None takes one back to its default."""
    options = dict(self.given) | changes
    return Objective(**{name: value for name, value in options.items() if value is not None})

  def options(self) -> dict[str, Any]:
    """Returns every option in the order of the config; None for a constant that is not given."""
    return {name: option.default for name, option in OPTIONS.items()} | dict(self.given)

  @property
  def loss(self) -> tuple[str, ...]:
    """The names of the losses."""
    return tuple(loss.name for loss in self.losses)

  @property
  def needs_reference(self) -> bool:
    """Whether the reference's log-probs are needed; without them its forward pass is skipped."""
    compares = any(loss.needs_reference for loss in self.losses) and not self.reference_free
    return compares or self.kl_penalty_weight is not None

  @property
  def per_token(self) -> bool:
    """Whether the first loss, which the logged rewards follow, compares means over tokens."""
    return self.losses[0].per_token

  @property
  def sorts_batch(self) -> bool:
    """Whether a loss compares the pairs of the batch by rank: then it cannot be split."""
    return any(loss.sorts_batch for loss in self.losses)

  def reads(self, option: str) -> bool:
    """Whether any of the losses uses an option or a field of the records."""
    return any(loss.reads(option) for loss in self.losses)

  def __getattr__(self, name: str) -> float:
    """A constant as the losses use it: as given, or the default of the first that has it."""
    fields = self.__dict__  # empty while the objective is being copied
    values = [value for given, value in fields.get('constants', ()) if given == name]
    losses = [loss for loss in fields.get('losses', ()) if name in loss.constants]
    for value in (*values, *(loss.constants[name] for loss in losses)):
      return value
    raise AttributeError(f'no loss of this objective has a constant {name}')

  def _run(self, loss: Loss, logps: PairLogps) -> jax.Array:
    """Calls a loss with those of its constants that the objective has a value for."""
    general = {name: getattr(self, name) for name in ('beta', 'divergence', 'alpha_divergence')}
    values = general | dict(self.constants)
    free = loss.constants.keys() - loss.bound
    return loss(logps, **{name: values[name] for name in free if name in values})

  def __repr__(self) -> str:
    usual = {name: option.default for name, option in OPTIONS.items()} | {'loss': None}
    changed = (f'{name}={value!r}' for name, value in self.given if value != usual.get(name))
    return f'Objective({", ".join(changed)})'


def as_objective(loss: Objective | SomeLoss | Sequence[SomeLoss]) -> Objective:
  """Returns the objective of a loss with its defaults; an `Objective` as it is."""
  return loss if isinstance(loss, Objective) else Objective(loss)


DEFAULTS = {
  name: parameter.default
  for name, parameter in inspect.signature(Objective).parameters.items()
  if name != 'constants'
}

# Every field of the config's section `objective`, in its order.
_MEANINGS = {
  'loss': Constant('a loss of losses/losses.py, or a tuple of them', value_type=object),
  'loss_weights': Constant('one for each loss of a tuple; unset: 1.0 each', value_type=tuple),
  'beta': Constant(
    'strength of the pull to the reference (arXiv:2305.18290, eq. 7); it also scales the reported '
    'rewards, which is all it does beside losses that have none (sft, orpo)',
    'above 0',
    lambda x: x > 0,
  ),
  **CONSTANTS,
  'divergence': Constant(
    'one of reverse_kl, forward_kl, js, alpha (arXiv:2309.16240)', value_type=str
  ),
  'alpha_divergence': Constant(
    "the paper's alpha", 'in (0, 1); 0 is reverse_kl, 1 is forward_kl', lambda x: 0 < x < 1
  ),
  'sft_weight': Constant("RPO: adds this times chosen's mean NLL", 'above 0', lambda x: x > 0),
  'ld_alpha': Constant(
    'LD-DPO: weight of tokens past the shorter response', 'in [0, 1]', lambda x: 0 <= x <= 1
  ),
  'wpo': Constant('weigh pairs by how on-policy they are (arXiv:2406.11827)', value_type=bool),
  'reference_free': Constant("the reference's log-probs count as 0", value_type=bool),
  'kl_penalty_weight': Constant('of the exact KL to the reference', 'above 0', lambda x: x > 0),
  'token_statistics': Constant(
    "report the policy's entropy and, where the loss runs the reference, the KL to it",
    value_type=bool,
  ),
}
OPTIONS = {
  name: dataclasses.replace(option, default=DEFAULTS.get(name))
  for name, option in _MEANINGS.items()
}


def check_records(fields: Collection[str], objective: Objective) -> None:
  """Raises ValueError where records give what the loss would ignore.

  Args:
    fields: the optional fields of a batch that the data has, such as margin.
    objective: whose losses each read some of them.
  """
  for field in RECORD_FIELDS:
    losses = checks.unread(objective.losses, field)
    if field in fields and losses:
      raise ValueError(
        f'The records give {field}, which {", ".join(losses)} does not use: remove it from '
        f'the records, or set objective.loss to {users(field)}.'
      )
  unweighted = sorted(loss.name for loss in objective.losses if loss.sorts_batch)
  if 'pair_weight' in fields and unweighted:
    raise ValueError(
      f'The records give pair_weight, which {", ".join(unweighted)} cannot use: it sorts '
      'the batch, in which a pair has no loss of its own. Remove the weights or change the loss.'
    )


def total_loss(logps: PairLogps, objective: Objective) -> jax.Array:
  """Returns what the run minimises, for each pair, float32 in the shape of `policy_chosen`.

  The step minimises sum(total_loss * logps.weights) / sum(logps.weights), both sums over the whole
  batch. Beside the weighted losses: WPO's weights on them, `sft_weight` times the likelihood of
  chosen (RPO: Pang et al. 2024, arXiv:2404.19733, eq. 1), and `kl_penalty_weight` times the exact
  KL(policy || reference), a mean over tokens, then over the pair's two responses.

  >>> pairs = PairLogps(policy_chosen=jnp.array([-4.0]), policy_rejected=jnp.array([-10.0]))
  >>> print(total_loss(pairs, Objective(lambda logps: -logps.policy_chosen)))
  [4.]

  Raises:
    ValueError: the pairs lack a field that is needed, or a loss is not one number for each pair.
  """
  logps.check_shapes()
  total = jnp.zeros_like(logps.policy.chosen)
  for loss, weight in zip(objective.losses, objective.loss_weights, strict=True):
    values = objective._run(loss, _as_read(logps, objective, loss))
    if jnp.shape(values) != total.shape:
      raise ValueError(
        f'the loss {loss.name} returns shape {jnp.shape(values)} for pairs of shape '
        f'{total.shape}: it has to return one number for each pair'
      )
    if objective.wpo and 'wpo' in loss.modifiers:
      values = wpo_weights(logps) * values
    total += weight * values
  if objective.sft_weight is not None:
    total += objective.sft_weight * sft(logps)
  if objective.kl_penalty_weight is not None:
    kl = logps.branches('kl')
    total += objective.kl_penalty_weight * (kl.chosen + kl.rejected) / 2
  return total


def wpo_weights(logps: PairLogps) -> jax.Array:
  """WPO's weight of each pair: how near to on-policy it is, without gradient.

  The product over both responses of exp(mean over tokens of log(pi(y_t) / sum_v pi(v)^2)), the
  "sampled alignment" of Zhou et al. 2024 (arXiv:2406.11827, eq. 2). The ratio is 1 in expectation
  where y_t is the policy's own sample; as in the authors' code, a pair of likelier tokens than that
  counts no more than 1.
  """
  alignments = logps.branches('alignments')
  total = alignments.chosen + alignments.rejected
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(total, 0.0)))


def implicit_rewards(logps: PairLogps, objective: Objective) -> Branches:
  """Returns the reward the policy stands for: beta s (up to a constant per prompt).

  Without a reference it is beta log policy. It is a mean over tokens where the (first) loss is.
  """
  seen = modified(logps, objective)
  if seen.reference_chosen is None:
    rewards = logps.policy
  else:
    rewards = links(seen, objective.divergence, objective.alpha_divergence)
  if objective.per_token:
    rewards = per_token(rewards, logps)
  return scaled(objective.beta, rewards)


def modified(
  logps: PairLogps, objective: Objective, modifiers: Sequence[str] = MODIFIERS
) -> PairLogps:
  """Returns the pairs after the objective's modifiers of log-probs, as the losses compare them.

  With `reference_free` the reference's log-probs are 0. With `ld_alpha`, tokens past the length of
  the pair's shorter response count `ld_alpha` each: LD-DPO, length desensitisation (Liu et al.
  2024, arXiv:2409.06411).
  """
  if objective.reference_free and 'reference_free' in modifiers:
    zeros = jax.tree.map(jnp.zeros_like, logps.policy)
    logps = _with_reference(logps, zeros, tails=zeros)
  kept = objective.ld_alpha
  if kept is None or 'ld_alpha' not in modifiers:
    return logps

  def cut(sums: Branches, tails: Branches) -> Branches:
    return jax.tree.map(lambda each, tail: each - (1 - kept) * tail, sums, tails)

  policy = cut(logps.policy, logps.branches('policy_tails'))
  logps = dataclasses.replace(logps, policy_chosen=policy.chosen, policy_rejected=policy.rejected)
  return _with_reference(logps, cut(logps.reference, logps.branches('reference_tails')))


def _with_reference(logps: PairLogps, sums: Branches, **tails: Branches) -> PairLogps:
  fields = {f'reference_{name}': value for name, value in (sums._asdict() | tails).items()}
  return dataclasses.replace(logps, **fields)


def _as_read(logps: PairLogps, objective: Objective, loss: Loss) -> PairLogps:
  """Returns the pairs as a loss sees them, without the fields of records that it does not use."""
  unread = {field: None for field in RECORD_FIELDS if field not in loss.records}
  return modified(dataclasses.replace(logps, **unread), objective, loss.modifiers)
