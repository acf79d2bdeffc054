"""The reference's log-probs of every pair, computed once and kept beside the token cache.

Training then runs no reference stream. A file is named by all that decides its numbers, and carries
its own SHA-256: what does not fit, or is damaged, is computed again.
"""

import dataclasses
import hashlib
import json

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_flax.data.batches.split import Side
from dpo_flax.data.prepare import PreparedData
from dpo_flax.files.atomic import write_file
from dpo_flax.files.paths import fresh
from dpo_flax.model.hidden import Model
from dpo_flax.training.scoring import score_side

_VERSION = 1  # of how the numbers are computed
_DIGEST = 32  # bytes of a SHA-256


def with_reference_logps(
  data: PreparedData,
  reference: Model,
  *,
  directory: str,  # the token cache's
  fingerprint: str,  # of the reference's weights
  dtypes: tuple[str, str],  # of activations and of weights
  logits_chunk: int,
  mesh: Mesh,
) -> PreparedData:
  """Returns the data with `reference_logps` in every batch, read from disk or computed and kept.

  Raises:
    ValueError: a log-prob is not finite.
  """
  sides = {'train': data.train, 'validation': data.validation}
  filled = {}
  for side, pairs in sides.items():
    if pairs is None:
      continue
    path = epath.Path(directory) / f'reference-{_key(pairs, fingerprint, dtypes)}.float32'
    logps = _read(path, len(pairs))
    # Where any process lacks the file, all compute together.
    if np.any(multihost_utils.process_allgather(np.array(logps is None))):
      logps = score_side(reference, data, side, logits_chunk=logits_chunk, mesh=mesh)
      _check_finite(pairs, logps)
      if jax.process_index() == 0:
        _write(path, logps)
    filled[side] = dataclasses.replace(pairs, reference_logps=logps)
  return dataclasses.replace(data, **filled)


def _key(pairs: Side, fingerprint: str, dtypes: tuple[str, str]) -> str:
  """Names all that decides the numbers: weights, data, tokenizer, lengths, dtypes, this code."""
  lengths = hashlib.sha256(pairs.pairs.tobytes() + pairs.lengths.tobytes()).hexdigest()
  parts = [_VERSION, fingerprint, pairs.cache.fingerprint, lengths, *dtypes]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(path: epath.Path, count: int) -> np.ndarray | None:
  """Returns [count, 2] float32 chosen, rejected; None where there is no intact file."""
  if not fresh(path).exists():
    return None
  content = path.read_bytes()
  digest, data = content[:_DIGEST], content[_DIGEST:]
  if len(data) != count * 2 * 4 or hashlib.sha256(data).digest() != digest:
    logging.warning('%s is damaged: computing it again', path)
    return None
  return np.frombuffer(data, np.float32).reshape(count, 2)


def _write(path: epath.Path, logps: np.ndarray):
  """Writes the SHA-256 of the numbers, then the numbers."""
  data = logps.astype(np.float32).tobytes()
  path.parent.mkdir(parents=True, exist_ok=True)
  write_file(path, hashlib.sha256(data).digest() + data, concurrent=True)


def _check_finite(pairs: Side, logps: np.ndarray):
  """Refuses log-probs that are not finite, naming the first pair's file and line."""
  bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
  if len(bad):
    first = int(bad[0])
    raise ValueError(
      f'{pairs.cache.where(pairs.pairs[first])}: the log-probs of the reference are '
      f'{logps[first].tolist()}, not finite ({len(bad)} of {len(pairs)} pairs). '
      'Check its weights, or compute in model.dtype=float32.'
    )
