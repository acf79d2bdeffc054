"""What can be said of prepared data before any of it is trained on."""

import hashlib
import math
from typing import Any

import numpy as np

from dpo_flax.data.batches import pack
from dpo_flax.data.batches.split import Side
from dpo_flax.data.prepare import PreparedData

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_BLOCK = 4096  # pairs read at once
_SHOWN = 5  # locations named of each fault


def describe(prepared: PreparedData) -> dict[str, Any]:
  """Returns all statistics as plain JSON values: those of the training side, and 'validation'."""
  result = _describe_side(prepared, 'train')
  if prepared.validation is not None:
    result['validation'] = _describe_side(prepared, 'validation')
    held, trained = (s.cache.prompts[s.pairs] for s in (prepared.validation, prepared.train))
    result['validation']['prompts_also_in_train'] = int(np.isin(held, trained).sum())
  result['steps_per_epoch'] = math.ceil(result['rows'] / prepared.rows.rows)
  return result


def _describe_side(prepared: PreparedData, side: str) -> dict[str, Any]:
  pairs: Side = getattr(prepared, side)
  report = dict(prepared.report[side])
  reasons = report.pop('dropped')
  shared, separate = (int(pack.row_lengths(pairs.lengths, name).sum()) for name in pack.LAYOUTS)
  return {
    **report,
    'dropped': sum(reasons.values()),
    'dropped_by_reason': reasons,
    'prefix_saving': 1 - shared / separate,
    'prefix_saving_tokens': separate - shared,
    'mean_pairs_per_row': report['pairs'] / report['rows'],
    'lengths': _lengths(pairs.lengths, prepared.rows.layout),
    'length_bias': _length_bias(pairs.lengths),
    **_repetitions(pairs),
  }


def _lengths(lengths: np.ndarray, layout: str) -> dict[str, dict[str, float]]:
  """Returns mean and percentiles, in tokens, of the prompt, both responses and of the pair."""
  prompt, chosen, rejected = lengths.T
  pair = pack.row_lengths(lengths, layout)
  columns = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, 'pair': pair}
  return {
    name: {
      'mean': float(values.mean()),
      **{f'p{p}': float(np.percentile(values, p)) for p in _PERCENTILES},
    }
    for name, values in columns.items()
  }


def _length_bias(lengths: np.ndarray) -> dict[str, float]:
  """Returns how often the longer answer is chosen, and the accuracy of betting on length alone."""
  _, chosen, rejected = lengths.T
  unequal = chosen != rejected
  longer = float((chosen > rejected)[unequal].mean()) if unequal.any() else 0.5
  return {
    'longer_wins': longer,
    'equal': float(1 - unequal.mean()),
    'base_rate_accuracy': max(longer, 1 - longer),
    'mean_difference': float((chosen - rejected).mean()),
  }


def _repetitions(pairs: Side) -> dict[str, Any]:
  """Counts pairs that repeat an earlier one, and those that another one contradicts."""
  prompt = pairs.cache.prompts[pairs.pairs]
  chosen, rejected = _response_hashes(pairs)
  same, contradicting = _mix(prompt, chosen, rejected), _mix(prompt, rejected, chosen)
  _, first = np.unique(same, return_index=True)
  again = np.ones(len(same), bool)
  again[first] = False
  contrary = np.isin(same, contradicting)
  return {
    'distinct_prompts': len(np.unique(prompt)),
    'duplicates': int(again.sum()),
    'duplicate_examples': _locations(pairs, again),
    'contradictions': int(contrary.sum()),
    'contradiction_examples': _locations(pairs, contrary),
  }


def _response_hashes(pairs: Side) -> np.ndarray:
  """Returns a hash of the chosen and of the rejected ids of every pair, [2, n] uint64."""
  hashes = np.empty((2, len(pairs)), np.uint64)
  for start in range(0, len(pairs), _BLOCK):
    for i, ids in enumerate(pairs.cache.many(pairs.pairs[start : start + _BLOCK]), start=start):
      for branch, response in enumerate(ids[1:]):
        digest = hashlib.blake2b(response.tobytes(), digest_size=8).digest()
        hashes[branch, i] = int.from_bytes(digest, 'little')
  return hashes


def _mix(*hashes: np.ndarray) -> np.ndarray:
  """Returns one hash of several, uint64, in which their order counts."""
  total = np.zeros_like(hashes[0])
  for values in hashes:
    total = (total ^ values) * np.uint64(0x9E3779B97F4A7C15)
    total ^= total >> np.uint64(29)
  return total


def _locations(pairs: Side, chosen: np.ndarray) -> list[str]:
  return list(map(pairs.cache.where, pairs.pairs[chosen][:_SHOWN].tolist()))
