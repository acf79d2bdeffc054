"""Preference losses: pure functions of log-probs.

- `ipo(pairs, beta=0.2)` and its like: one loss, with its constants.
- `total_loss(pairs, Objective('ipo', beta=0.2))`: what a run minimises.
- `summarize(metric_sums(...))`: what it reports.

>>> print(sigmoid(pairs, beta=0.1).round(4))
[0.5981]
"""

from dpo_flax.losses import metrics as metrics
from dpo_flax.losses.divergences import DIVERGENCES as DIVERGENCES
from dpo_flax.losses.divergences import link as link
from dpo_flax.losses.losses import CONSTANTS as CONSTANTS
from dpo_flax.losses.losses import aot as aot
from dpo_flax.losses.losses import aot_unpaired as aot_unpaired
from dpo_flax.losses.losses import apo_down as apo_down
from dpo_flax.losses.losses import apo_zero as apo_zero
from dpo_flax.losses.losses import bco_pair as bco_pair
from dpo_flax.losses.losses import cpo as cpo
from dpo_flax.losses.losses import discopop as discopop
from dpo_flax.losses.losses import dpop as dpop
from dpo_flax.losses.losses import exo_pair as exo_pair
from dpo_flax.losses.losses import hinge as hinge
from dpo_flax.losses.losses import ipo as ipo
from dpo_flax.losses.losses import log_ratios as log_ratios
from dpo_flax.losses.losses import nca_pair as nca_pair
from dpo_flax.losses.losses import orpo as orpo
from dpo_flax.losses.losses import reward_sums as reward_sums
from dpo_flax.losses.losses import robust as robust
from dpo_flax.losses.losses import sft as sft
from dpo_flax.losses.losses import sigmoid as sigmoid
from dpo_flax.losses.losses import sigmoid_norm as sigmoid_norm
from dpo_flax.losses.losses import simpo as simpo
from dpo_flax.losses.losses import sppo_hard as sppo_hard
from dpo_flax.losses.metrics import displacement as displacement
from dpo_flax.losses.metrics import metric_sums as metric_sums
from dpo_flax.losses.metrics import summarize as summarize
from dpo_flax.losses.objective import Objective as Objective
from dpo_flax.losses.objective import as_objective as as_objective
from dpo_flax.losses.objective import check_records as check_records
from dpo_flax.losses.objective import implicit_rewards as implicit_rewards
from dpo_flax.losses.objective import total_loss as total_loss
from dpo_flax.losses.objective import wpo_weights as wpo_weights
from dpo_flax.losses.pair_logps import Branches as Branches
from dpo_flax.losses.pair_logps import PairLogps as PairLogps
from dpo_flax.losses.registry import LOSSES as LOSSES
from dpo_flax.losses.registry import Constant as Constant
from dpo_flax.losses.registry import Loss as Loss
from dpo_flax.losses.registry import register as register
