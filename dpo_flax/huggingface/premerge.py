"""A checkpoint with a PEFT adapter merged into it as it is read: in float32, rounded once."""

import collections
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from flax import nnx

from dpo_flax.huggingface.merging import Factors, check_mergeable, merge
from dpo_flax.huggingface.peft_adapter import FACTORS, HARMLESS, Adapter, make_parts
from dpo_flax.huggingface.peft_config import PREFIX
from dpo_flax.huggingface.placement import Slot, make_slots, match
from dpo_flax.huggingface.tensor_files import TensorFile
from dpo_flax.huggingface.weights import Checkpoint
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.kernels import Trained
from dpo_flax.model.lora import BASE, TRAINABLE, train_weights
from dpo_flax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class MergedTensor:
  """A tensor of a checkpoint, and what an adapter makes of it; of the interface of TensorFile."""

  source: TensorFile
  slot: Slot
  factors: Mapping[str, TensorFile]  # of FACTORS; none: `whole` takes the tensor's place
  scale: float
  whole: TensorFile | None

  @property
  def path(self) -> epath.Path:
    """The file of the checkpoint's tensor."""
    return self.source.path

  @property
  def offset(self) -> int:
    """Where that begins."""
    return self.source.offset

  @property
  def dtype(self) -> str:
    """The checkpoint's, of which the merged tensor is one more."""
    return self.source.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of both."""
    return self.source.shape

  @property
  def row_bytes(self) -> int:
    """The size on disk of one index of the first axis."""
    return self.source.row_bytes

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the indices start ... stop of the first axis, float32."""
    if self.whole is not None:
      return self.whole.read(start, stop).astype(np.float32)
    arrays = {
      name: tensor.read(0, tensor.shape[0]).astype(np.float32)
      for name, tensor in self.factors.items()
    }
    a, b, magnitude = arrays['lora_a'].T, arrays['lora_b'].T, arrays.get('magnitude')
    rows = self.source.read(start, stop)
    if not self.slot.transposed:
      return merge(rows, [Factors(a[start:stop], b, self.scale, None)])
    length = None if magnitude is None else magnitude[start:stop]
    return merge(rows.T, [Factors(a, b[:, start:stop], self.scale, length)]).T


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter, config: ModelConfig) -> Checkpoint:
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
  parts = make_parts(nnx.state(model, TRAINABLE), lora, adapter.names)
  match(adapter.tensors, parts, harmless=HARMLESS, where=str(adapter.directory))
  factors = collections.defaultdict(dict)
  for name, part in parts.items():
    if part.path[-1] in FACTORS and not part.repeated:
      factors[part.path[:-3], part.layer][part.path[-1]] = adapter.tensors[name]
  base = nnx.state(model, BASE)
  variables = dict(nnx.to_flat_state(base))
  tensors = dict(checkpoint.tensors)
  for name, slot in make_slots(base, adapter.names).items():
    own = factors.get((slot.path[:-1], slot.layer)) if len(slot.shape) > 1 else None
    whole = isinstance(variables[slot.path], Trained) and adapter.tensors[PREFIX + name]
    if name in tensors and (own or whole):
      scale = _scale(lora.scales(_module_name(slot)), slot.layer) if own else 0.0
      tensors[name] = MergedTensor(tensors[name], slot, own or {}, scale, whole or None)
  return dataclasses.replace(checkpoint, tensors=tensors)


def _module_name(slot: Slot) -> str:
  return slot.path[-2]


def _scale(scales: tuple[float, ...], layer: int | None) -> float:
  return scales[0] if len(scales) == 1 else scales[layer]
