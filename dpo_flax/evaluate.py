"""The command that evaluates: python -m dpo_flax.evaluate --base=DIR --adapter=DIR --data=FILE.

Scores every pair of a preference file by a model and, beside it, by a reference: its own base where
--adapter is given, or --reference and --reference_adapter. A base is a directory in Hugging Face
layout, such as a merged export, or a hub id; an adapter is a PEFT directory. Prints the metrics as
one JSON object; --scores=FILE writes a line for each pair.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax import config as config_lib
from dpo_flax.assembly.data import prepare_data
from dpo_flax.assembly.models import load_model, load_onto
from dpo_flax.assembly.sources import check_same_tokenizer, make_model_config
from dpo_flax.config.checks import validate
from dpo_flax.data.batches.split import Side
from dpo_flax.data.prepare import PreparedData
from dpo_flax.huggingface.peft_adapter import open_adapter
from dpo_flax.huggingface.weights import BaseCheckpoint, open_checkpoint
from dpo_flax.losses import metrics
from dpo_flax.losses.objective import Objective, total_loss
from dpo_flax.losses.pair_logps import PairLogps
from dpo_flax.model.config import ModelConfig
from dpo_flax.runtime import command
from dpo_flax.sharding import make_mesh, row_parts
from dpo_flax.training.scoring import score_side

_BASE = flags.DEFINE_string('base', None, 'The model: a directory or a hub id.')
_ADAPTER = flags.DEFINE_string('adapter', None, 'A PEFT adapter on it.')
_REFERENCE = flags.DEFINE_string('reference', None, 'Another model beside it; default: its base.')
_REFERENCE_ADAPTER = flags.DEFINE_string('reference_adapter', None, "The reference's adapter.")
_DATA = flags.DEFINE_string('data', None, 'The pairs: anything that data.train of a config names.')
_SCORES = flags.DEFINE_string('scores', None, 'A file for the scores, one JSON object a pair.')
# Fields of a config, that evaluations need too.
_FIELDS = {
  'batch.tokens': flags.DEFINE_integer('tokens', 2048, 'Tokens in a row.'),
  'batch.rows': flags.DEFINE_integer('rows', None, 'Rows at once; default: 4 a shard.'),
  'data.format': flags.DEFINE_string('data_format', 'auto', "A config's data.format."),
  'data.tokenizer': flags.DEFINE_string('tokenizer', None, "Default: the base's."),
  'data.chat_template': flags.DEFINE_string('chat_template', None, "Default: the tokenizer's."),
  'data.bad_record': flags.DEFINE_string('bad_record', 'raise', 'raise | skip'),
  'data.too_long': flags.DEFINE_string('too_long', 'raise', 'raise | drop | truncate_prompt'),
  'data.cache_dir': flags.DEFINE_string('cache_dir', None, 'Keeps the tokens there.'),
  'model.dtype': flags.DEFINE_string('dtype', None, 'bfloat16 | float32; default: as the device.'),
  'model.weight_dtype': flags.DEFINE_string('weight_dtype', None, 'Also int8; default: dtype.'),
  'objective.beta': flags.DEFINE_float('beta', 0.1, 'Scales the rewards.'),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A model to evaluate."""

  base: str
  adapter: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Log-probs of all pairs, [n, 2] of chosen and rejected, float32."""

  data: PreparedData
  lengths: np.ndarray  # [n, 2] response tokens
  policy: np.ndarray
  reference: np.ndarray | None


def evaluate(config: ConfigDict, policy: Candidate, reference: Candidate | None) -> Evaluation:
  """Scores every pair of `config.data.train` by one model or two, one after the other.

  Raises:
    ValueError: the data, the weights or an adapter are unfit, or the tokenizers differ.
  """
  config = config.copy_and_resolve_references()
  mesh, batch = make_mesh(config_lib.get(config, 'mesh')), config_lib.get(config, 'batch')
  batch.rows = batch.rows or 4 * row_parts(mesh)
  settings = validate(config)
  candidates = [policy, reference] if reference else [policy]
  bases = {path: open_checkpoint(path) for path in dict.fromkeys(each.base for each in candidates)}
  shapes = {
    path: make_model_config(settings.model, base, mesh, tokens=settings.batch.tokens)
    for path, base in bases.items()
  }
  first, *others = bases.values()
  for other in others:
    check_same_tokenizer(first.directory, other.directory)
  vocab_size = min(shape.vocab_size for shape in shapes.values())
  with jax.set_mesh(mesh):
    settings = settings.with_tokenizer_of(first.directory)
    data = prepare_data(settings, vocab_size=vocab_size)
    found = {}
    for path, base in bases.items():
      # A second base replaces the first in memory; adapters of one base share it.
      own = [each for each in candidates if each.base == path]
      chunk = settings.model.logits_chunk
      found |= _score_all(own, shapes[path], base, data, logits_chunk=chunk, mesh=mesh)
  lengths = _response_lengths(data.train)
  return Evaluation(data, lengths, found[policy], reference and found[reference])


def _score_all(
  candidates: Sequence[Candidate],
  shape: ModelConfig,
  checkpoint: BaseCheckpoint,
  data: PreparedData,
  *,
  logits_chunk: int,
  mesh: Mesh,
) -> dict[Candidate, np.ndarray]:
  """Scores models of one base."""
  adapters = [each.adapter and open_adapter(each.adapter, shape) for each in candidates]
  base = load_model(shape, None, checkpoint=checkpoint, mesh=mesh, seed=0)

  def score(adapter):
    model = load_onto(base, adapter, mesh) if adapter else base
    return score_side(model, data, 'train', logits_chunk=logits_chunk, mesh=mesh)

  return dict(zip(candidates, map(score, adapters), strict=True))


def _response_lengths(pairs: Side) -> np.ndarray:
  """Returns [n, 2] how many tokens of chosen and rejected have a log-prob."""
  parts = np.array_split(np.arange(len(pairs)), len(pairs) // 4096 + 1)
  counts = [pair.targets for part in parts for pair in pairs.packed_pairs(part)]
  return np.array(counts, np.int64)


def summarize(found: Evaluation, beta: float) -> dict[str, Any]:
  """Returns the metrics: those of each model alone, and those of DPO for one against the other."""
  report = found.data.report['train']
  left_out = report['dropped'] | {'longer than a row': report['too_long']}
  summary = {
    'pairs': len(found.lengths),
    'left_out': {reason: count for reason, count in left_out.items() if count},
    'policy': _alone(found.policy, found.lengths),
  }
  if found.reference is None:
    return summary
  return summary | {
    'reference': _alone(found.reference, found.lengths),
    'policy_against_reference': _against(found, found.reference, beta),
  }


def _alone(logps: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
  """Returns how a model alone judges the pairs; a tie is a guess, 1/2."""
  logps = logps.astype(np.float64)
  means = logps / np.maximum(lengths, 1)
  found = {
    'accuracy': (np.sign(logps[:, 0] - logps[:, 1]).mean() + 1) / 2,
    'accuracy_per_token': (np.sign(means[:, 0] - means[:, 1]).mean() + 1) / 2,
    'margin': (logps[:, 0] - logps[:, 1]).mean(),
  }
  for i, side in enumerate(('chosen', 'rejected')):
    found[f'{side}_logps'] = logps[:, i].mean()
    found[f'{side}_logps_per_token'] = logps[:, i].sum() / lengths[:, i].sum()
  return {name: float(value) for name, value in found.items()}


def _against(found: Evaluation, reference: np.ndarray, beta: float) -> dict[str, float]:
  """Returns what training reports of the sigmoid loss."""
  objective = Objective(beta=beta)
  policy, other, lengths = (
    jnp.asarray(values.T[:, None], jnp.float32)  # [2, 1, n]
    for values in (found.policy, reference, found.lengths)
  )
  logps = PairLogps(
    policy_chosen=policy[0],
    policy_rejected=policy[1],
    reference_chosen=other[0],
    reference_rejected=other[1],
    chosen_lengths=lengths[0],
    rejected_lengths=lengths[1],
  )
  return metrics.summarize(metrics.metric_sums(logps, total_loss(logps, objective), objective))


def per_pair(found: Evaluation) -> Iterator[dict[str, Any]]:
  """Yields what is known of each pair, in the order of the file."""
  pairs = found.data.train
  models = {'policy': found.policy, 'reference': found.reference}
  for i, index in enumerate(pairs.pairs.tolist()):
    scores = {
      f'{name}_{side}_logps': float(logps[i, j])
      for name, logps in models.items()
      if logps is not None
      for j, side in enumerate(('chosen', 'rejected'))
    }
    ratios = found.policy[i] if found.reference is None else found.policy[i] - found.reference[i]
    yield {
      'index': int(pairs.cache.records[index]),
      'where': pairs.cache.where(index),
      **scores,
      'margin': float(ratios[0] - ratios[1]),
      'chosen_tokens': int(found.lengths[i, 0]),
      'rejected_tokens': int(found.lengths[i, 1]),
    }


def _config(data: str, base: str, directory: str) -> ConfigDict:
  """Returns a config of the flags; what concerns training alone has its default."""
  values = {
    'workdir': directory,
    'initialize_from_hf': base,
    'data.train': data,
    'data.validation_split_fraction': 0.0,
    'train.num_train_steps': 1,
    'model.dtype': 'float32' if jax.default_backend() == 'cpu' else 'bfloat16',
    'batch.rows': 0,
  }
  values |= {field: flag.value for field, flag in _FIELDS.items() if flag.value is not None}
  config = config_lib.default()
  config.update_from_flattened_dict({'model.weight_dtype': values['model.dtype']} | values)
  return config


def main():
  """Evaluates what the flags name."""
  base, data = map(command.required, (_BASE, _DATA))
  policy, reference = Candidate(base, _ADAPTER.value), None
  if _ADAPTER.value or _REFERENCE.value or _REFERENCE_ADAPTER.value:
    reference = Candidate(_REFERENCE.value or base, _REFERENCE_ADAPTER.value)
  if policy == reference:
    raise ValueError('the reference is the policy: give another --reference_adapter or --reference')
  with tempfile.TemporaryDirectory() as directory:
    config = _config(data, base, directory)
    found = evaluate(config, policy, reference)
    if jax.process_index():
      return
    if _SCORES.value:
      lines = (json.dumps(pair) + '\n' for pair in per_pair(found))
      epath.Path(_SCORES.value).write_text(''.join(lines))
    models = {'policy': dataclasses.asdict(policy)}
    models |= {'reference': dataclasses.asdict(reference)} if reference else {}
    summary = summarize(found, config_lib.get(config, 'objective.beta'))
    print(json.dumps({'models': models, **summary}, indent=1))


if __name__ == '__main__':
  command.run_flags(main, on_every_host=True)
