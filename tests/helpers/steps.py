"""Options of the training step."""

from dpo_flax import config as config_lib
from dpo_flax.losses.objective import Objective
from dpo_flax.training.step import StepOptions


def make_options(
  *,
  logits_chunk=16,
  microbatches=1,
  dropout_seed=None,
  spike_factor=0.0,
  **objective,
) -> StepOptions:
  """Makes StepOptions; arguments that are no field of theirs belong to the objective."""
  settings = config_lib.default().objective
  settings.update(objective)
  return StepOptions(
    objective=Objective.from_config(settings),
    logits_chunk=logits_chunk,
    microbatches=microbatches,
    dropout_seed=dropout_seed,
    spike_factor=spike_factor,
  )
