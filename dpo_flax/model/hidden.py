"""What a model is to the losses and the training step: two methods, and what the first returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
  """Final hidden states, and what else a model returns.

  >>> Hidden(jax.numpy.zeros((2, 8, 16)), statistics={'load_balance': jax.numpy.ones(())}).cache
  """

  states: jax.Array  # [B, T, D]
  # Scalars that add up over the rows of a batch, such as an auxiliary loss of routed experts.
  statistics: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  cache: Any = None  # of keys and values; None: the model was given none


class Model(Protocol):
  """A language model, as everything that scores or trains it sees it; usually an nnx.Module.

  Its log-probs are right only if position q reads no others than those t <= q < visible_until[t].
  A model that is never sampled from, nor trained with dropout, may leave out the keywords. Where it
  has an attribute `vocab_size`, larger token ids are refused.
  """

  def hidden(
    self,
    batch: Mapping[str, jax.Array],  # tokens, positions, visible_until [B, T] int32
    *,
    dropout_key: jax.Array | None = None,  # None: no dropout
    cache: Any = None,
  ) -> Hidden | jax.Array:
    """Returns the final hidden states [B, T, D], alone or as Hidden."""
    ...

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Applies the head: [..., D] -> [..., V], float32."""
    ...


def check_tokens(batch: Mapping[str, Any], vocab_size: int | None) -> None:
  """Raises ValueError where NumPy arrays hold token ids outside of a vocabulary that is known.

  An embedding would take the nearest row of its table for them. Arrays on devices are not read.
  """
  tokens = batch['tokens']
  if vocab_size is None or not isinstance(tokens, np.ndarray) or not tokens.size:
    return
  smallest, largest = tokens.min(), tokens.max()
  if smallest < 0 or largest >= vocab_size:
    outside = smallest if smallest < 0 else largest
    raise ValueError(f'the batch holds the token id {outside}, and the model has {vocab_size}')


def run_model(
  model: Model, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
) -> Hidden:
  """Runs a model over a batch, whichever of its two forms the result has.

  Raises:
    ValueError: the states are no [B, T, D] of the batch.
  """
  keywords = {} if dropout_key is None else {'dropout_key': dropout_key}
  found = model.hidden(batch, **keywords)
  hidden = found if isinstance(found, Hidden) else Hidden(found)
  expected, shape = batch['tokens'].shape, getattr(hidden.states, 'shape', ())
  if len(shape) != 3 or shape[:2] != expected:
    raise ValueError(
      f'{type(model).__name__}.hidden returned states of shape {shape} for tokens of shape '
      f'{expected}: expected [B, T, D] with the same B and T'
    )
  return hidden
