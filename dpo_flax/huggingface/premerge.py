"""A checkpoint with a PEFT adapter merged into it as it is read: in float32, rounded once."""

import collections
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from dpo_flax.huggingface.merging import Factors, check_mergeable, merge
from dpo_flax.huggingface.peft_adapter import AdapterFiles, matched_slots
from dpo_flax.huggingface.peft_config import FACTORS, PREFIX
from dpo_flax.huggingface.placement import Slot, make_slots
from dpo_flax.huggingface.tensor_files import TensorFile
from dpo_flax.huggingface.weights import BaseCheckpoint
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.kernels import Trained
from dpo_flax.model.lora import BASE, TRAINABLE, train_weights
from dpo_flax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class MergedTensor(TensorFile):
  """A tensor of a checkpoint, which reads as what an adapter makes of it."""

  slot: Slot
  factors: Mapping[str, TensorFile]  # of FACTORS; none: `replacement` is read in its stead
  scale: float
  replacement: TensorFile | None

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the indices start ... stop of the first axis, float32."""
    if self.replacement is not None:
      return self.replacement.read(start, stop).astype(np.float32)
    arrays = {
      name: tensor.read(0, tensor.shape[0]).astype(np.float32)
      for name, tensor in self.factors.items()
    }
    a, b, magnitude = arrays['lora_a'].T, arrays['lora_b'].T, arrays.get('magnitude')
    rows = super().read(start, stop)
    if not self.slot.transposed:
      return merge(rows, [Factors(a[start:stop], b, self.scale, None)])
    length = None if magnitude is None else magnitude[start:stop]
    return merge(rows.T, [Factors(a, b[:, start:stop], self.scale, length)]).T


def merge_adapter(
  checkpoint: BaseCheckpoint, adapter: AdapterFiles, config: ModelConfig
) -> BaseCheckpoint:
  """Returns the checkpoint with the adapter in it; nothing is read yet.

  Raises:
    ValueError: the adapter does not fit the checkpoint, or cannot be merged row by row.
  """
  lora = adapter.lora
  if lora.dora and 'embed_tokens' in lora.targets:
    raise ValueError(
      f'{adapter.directory}: DoRA on embed_tokens has one length for all rows of the table, which '
      'are merged as they are read: merge it with PEFT first'
    )

  def make():
    model = Transformer(config, lora, nnx.Rngs(0, lora=1))
    train_weights(model, lora.saved)
    return nnx.split(model)

  model = nnx.merge(*jax.eval_shape(make))
  check_mergeable(model)
  slots = matched_slots(adapter, nnx.state(model, TRAINABLE))
  factors = collections.defaultdict(dict)
  for name, slot in slots.items():
    if slot.path[-1] in FACTORS and slot.repeats is None:
      factors[slot.path[:-3], slot.layer][slot.path[-1]] = adapter.tensors[name]
  base = nnx.state(model, BASE)
  variables = dict(nnx.to_flat_state(base))
  tensors = dict(checkpoint.tensors)
  for name, slot in make_slots(base, adapter.names).items():
    own = factors.get((slot.path[:-1], slot.layer), {}) if len(slot.shape) > 1 else {}
    learned = adapter.tensors[PREFIX + name] if isinstance(variables[slot.path], Trained) else None
    if name in tensors and (own or learned):
      module = slot.path[-2]
      scale = lora.scales(module)[lora.modules[module].index(slot.layer)] if own else 0.0
      tensors[name] = MergedTensor(
        **vars(tensors[name]), slot=slot, factors=own, scale=scale, replacement=learned
      )
  return dataclasses.replace(checkpoint, tensors=tensors)
