"""Weights and adapters -> merged weights, in float32 on the host."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from dpo_flax.huggingface.peft_targets import low_rank
from dpo_flax.huggingface.placement import gather
from dpo_flax.model.linear import Adapter, Adapters
from dpo_flax.model.lora import LoraConfig, LowRank
from dpo_flax.model.transformer import Transformer


class Factors(NamedTuple):
  """An adapter of one matrix, in our orientation."""

  a: np.ndarray  # [in, r]
  b: np.ndarray  # [r, out]
  scale: float
  magnitude: np.ndarray | None  # [out], of DoRA


def merge(weight: np.ndarray, adapters: Iterable[Factors]) -> np.ndarray:  # [in, out], then float32
  """Returns W + scale * A B of each adapter in turn; with DoRA, its channels at their lengths."""
  merged = weight.astype(np.float32)
  for a, b, scale, magnitude in adapters:
    merged = merged + np.float32(scale) * (a @ b)
    if magnitude is not None:
      norms = np.linalg.norm(merged, axis=0)
      merged *= np.divide(magnitude, norms, out=np.ones_like(norms), where=norms > 0)
  return merged


def gather_factors(adapter: Adapter, layer: int | None) -> Factors | None:
  """Returns an adapter's factors in one layer, None where it has none there.

  All processes must call it together.
  """
  index = adapter.low_rank.index(layer)
  if not adapter.ranks[index]:
    return None

  def of_layer(variable):
    return gather(variable[...] if layer is None else variable[...][layer])

  rank = adapter.ranks[index]
  magnitude = None if adapter.magnitude is None else of_layer(adapter.magnitude)
  a, b = of_layer(adapter.lora_a)[:, :rank], of_layer(adapter.lora_b)[:rank]
  return Factors(a, b, adapter.scales[index], magnitude)


def check_mergeable(model: Transformer):
  """Refuses a model whose head is tied, but adapted apart from the token table.

  Raises:
    ValueError: it is so; merged, one tensor would have to be two.
  """
  table = model.embed_tokens
  if not model.config.tie_word_embeddings or table.shares_adapters:
    return
  if any(each is not None and each.active for each in (table.adapters, table.head_adapters)):
    raise ValueError(
      'the head is tied to the token table, and one of them has an adapter of its own: merged, '
      'they would be two tensors. Set lora.ensure_weight_tying=True, or leave merged_hf_save_path '
      'unset'
    )


def side_by_side(model: Transformer, lora: LoraConfig) -> tuple[nnx.State, LoraConfig]:
  """Returns one adapter that is the frozen and the learned one together.

  Their ranks come one after the other, and their scales go into B: both sums are exact. All
  processes must call it together.
  """
  arrays, modules = {}, {}
  for path, module in nnx.iter_modules(model):
    if isinstance(module, Adapters) and module.active:
      name = module.active[0].name
      a, b, modules[name] = _concatenated(module.active)
      arrays |= {(*path, 'learned', 'lora_a'): a, (*path, 'learned', 'lora_b'): b}
  state = nnx.from_flat_state([(path, nnx.LoRAParam(array)) for path, array in arrays.items()])
  own = dataclasses.replace(lora, modules=modules, rslora=False, reference=None, continues=False)
  return state, own


def _concatenated(adapters: Sequence[Adapter]) -> tuple[np.ndarray, np.ndarray, LowRank]:
  """Returns A and B of all `adapters` of a module, for a scale of 1, and their ranks."""
  (inputs, outputs), is_stacked = adapters[0].features, adapters[0].lora_a.ndim > 2
  pairs = []
  for layer in range(adapters[0].lora_a.shape[0]) if is_stacked else (None,):
    found = [factors for adapter in adapters if (factors := gather_factors(adapter, layer))]
    a = [np.zeros((inputs, 0), np.float32), *(factors.a for factors in found)]
    b = [np.zeros((0, outputs), np.float32), *(np.float32(f.scale) * f.b for f in found)]
    pairs.append((np.concatenate(a, axis=1), np.concatenate(b)))
  ranks = [a.shape[1] for a, _ in pairs]
  missing = [max(ranks) - rank for rank in ranks]
  a = np.stack([np.pad(a, ((0, 0), (0, n))) for (a, _), n in zip(pairs, missing, strict=True)])
  b = np.stack([np.pad(b, ((0, n), (0, 0))) for (_, b), n in zip(pairs, missing, strict=True)])
  if not is_stacked:
    a, b = a[0], b[0]
  return a, b, low_rank(list(zip(ranks, map(float, ranks), strict=True)))
