"""Whether what was written is what was trained: reloaded, it must give the same log-probs."""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from dpo_flax.assembly.models import load_model
from dpo_flax.data.batches import pack
from dpo_flax.huggingface.weights import open_checkpoint
from dpo_flax.model.transformer import Transformer
from dpo_flax.runtime.memory import is_out_of_memory

# What rounding to a dtype can make of a token's log-prob, in nats: twice the most that was seen in
# random models, which amplify it more than trained ones do. Errors of n tokens are independent: in
# their mean they are 1 / sqrt(n) of it. Float32 is allowed as much for the mean as for one.
BOUNDS = {'float32': 1e-4, 'float16': 0.02, 'bfloat16': 0.4, 'int8': 0.6}


@dataclasses.dataclass(frozen=True)
class ReloadCheck:
  """How far the reloaded model's log-probs were from the live one's."""

  difference: float | None  # the largest of all responses, nats per token; None: not compared
  bound: float  # of BOUNDS
  pairs: int


def reload_merged(policy: Transformer, directory: epath.Path, mesh: Mesh) -> Transformer | None:
  """Returns the model of a directory, sharded like the policy; None where it has no room.

  It is a second copy of the weights, in place of what a training step needs for its activations.
  """
  checkpoint = open_checkpoint(str(directory))
  try:
    return load_model(policy.config, None, checkpoint=checkpoint, mesh=mesh, seed=0)
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    logging.warning('%s: the devices have no room to reload it: not compared', directory)
    return None


def compare(
  live: np.ndarray,  # [n, 2] log-probs of chosen and rejected
  reloaded: np.ndarray | None,
  pairs: Sequence[pack.PackedPair],
  *,
  dtypes: Collection[str],  # those that weights and activations were rounded to
  where: epath.Path,  # for the message
) -> ReloadCheck:
  """Returns how far apart two models are on the same pairs.

  Raises:
    ValueError: further than rounding explains.
  """
  bound = max(BOUNDS[dtype] for dtype in dtypes)
  if reloaded is None:
    return ReloadCheck(None, bound, 0)
  lengths = np.maximum([pair.targets for pair in pairs], 1)
  differences = np.abs(live - reloaded) / lengths
  allowed = np.maximum(bound / np.sqrt(lengths), BOUNDS['float32'])
  if not np.all(differences <= allowed):  # NaN fails too
    raise ValueError(
      f'{where}: reloaded, its log-probs differ from those of the trained model by up to '
      f'{differences.max():.3g} nats per token, where rounding explains {bound:g} for one token, '
      "and less for the mean of many. It was not kept. The run's checkpoints are as they were"
    )
  return ReloadCheck(float(differences.max()), bound, len(pairs))
