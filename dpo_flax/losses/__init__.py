"""Preference losses: pure functions of log-probs.

- `ipo(pairs, beta=0.2)` and its like: one loss, with its constants.
- `total_loss(pairs, Objective('ipo', beta=0.2))`: what a run minimises.
- `summarize(metric_sums(...))`: what it reports.
"""

from dpo_flax.losses import metrics
from dpo_flax.losses.divergences import DIVERGENCES, link
from dpo_flax.losses.losses import (
  CONSTANTS,
  aot,
  aot_unpaired,
  apo_down,
  apo_zero,
  bco_pair,
  cpo,
  discopop,
  dpop,
  exo_pair,
  hinge,
  ipo,
  log_ratios,
  nca_pair,
  orpo,
  reward_sums,
  robust,
  sft,
  sigmoid,
  sigmoid_norm,
  simpo,
  sppo_hard,
)
from dpo_flax.losses.metrics import displacement, metric_sums, summarize
from dpo_flax.losses.objective import (
  Objective,
  as_objective,
  check_records,
  implicit_rewards,
  total_loss,
  wpo_weights,
)
from dpo_flax.losses.pair_logps import Branches, PairLogps
from dpo_flax.losses.registry import LOSSES, Constant, Loss, register

__all__ = [
  'CONSTANTS',
  'DIVERGENCES',
  'LOSSES',
  'Branches',
  'Constant',
  'Loss',
  'Objective',
  'PairLogps',
  'aot',
  'aot_unpaired',
  'apo_down',
  'apo_zero',
  'as_objective',
  'bco_pair',
  'check_records',
  'cpo',
  'discopop',
  'displacement',
  'dpop',
  'exo_pair',
  'hinge',
  'implicit_rewards',
  'ipo',
  'link',
  'log_ratios',
  'metric_sums',
  'metrics',
  'nca_pair',
  'orpo',
  'register',
  'reward_sums',
  'robust',
  'sft',
  'sigmoid',
  'sigmoid_norm',
  'simpo',
  'sppo_hard',
  'summarize',
  'total_loss',
  'wpo_weights',
]
