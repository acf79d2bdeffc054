"""What a run is, kept in its workdir, so that its checkpoints can be exported without its data."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from etils import epath

from dpo_flax.config.identity import RunIdentity
from dpo_flax.config.schema import Settings
from dpo_flax.config.settings import settings_from_json
from dpo_flax.data.batches import pack
from dpo_flax.data.prepare import PreparedData
from dpo_flax.files.atomic import write_file
from dpo_flax.files.paths import fresh

NAME = 'run.json'
_CHECKED = 4  # pairs


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """A run's settings, what it was made of, and the pairs on which its exports are checked."""

  settings: Settings
  fingerprints: Mapping[str, str | None]  # of data and weights
  num_steps: int
  pairs: Mapping[str, int]  # side -> how many
  held_out: bool  # whether `checks` are of the validation side
  checks: tuple[pack.PackedPair, ...]


def make_record(
  settings: Settings, data: PreparedData, identity: RunIdentity, num_steps: int
) -> RunRecord:
  """Returns the record of a run; exports are checked on its first short pairs."""
  side = data.validation or data.train
  lengths = pack.row_lengths(side.lengths, data.rows.layout)
  indices = np.argsort(lengths > np.median(lengths), kind='stable')[:_CHECKED]
  return RunRecord(
    settings,
    identity.fingerprints,
    num_steps,
    {name: report['pairs'] for name, report in data.report.items()},
    held_out=data.validation is not None,
    checks=tuple(side.packed_pairs(indices)),
  )


def write_record(record: RunRecord, workdir: epath.Path):
  """Writes the record in one step."""
  values = {
    'config': record.settings.to_json(),
    'fingerprints': dict(record.fingerprints),
    'num_steps': record.num_steps,
    'pairs': dict(record.pairs),
    'held_out': record.held_out,
    'checks': [
      {
        'index': pair.index,
        **{name: getattr(pair, name).tolist() for name in ('prompt', 'chosen', 'rejected')},
      }
      for pair in record.checks
    ],
  }
  workdir.mkdir(parents=True, exist_ok=True)
  write_file(workdir / NAME, json.dumps(values))


def read_record(workdir: epath.Path) -> RunRecord:
  """Reads the record of a run.

  Raises:
    ValueError: there is none, or it is of another version of this library.
  """
  path = fresh(workdir / NAME)
  if not path.exists():
    raise ValueError(f'{path} does not exist: give the workdir of a run')
  try:
    values = json.loads(path.read_text())
    checks = tuple(
      pack.PackedPair(
        index=pair['index'],
        prompt=np.array(pair['prompt'], np.int32),
        chosen=np.array(pair['chosen'], np.int32),
        rejected=np.array(pair['rejected'], np.int32),
      )
      for pair in values['checks']
    )
    if not checks:
      raise ValueError('it has no pairs to check exports on')
    return RunRecord(
      settings_from_json(values['config']),
      dict(values['fingerprints']),
      values['num_steps'],
      dict(values['pairs']),
      values['held_out'],
      checks,
    )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path} cannot be read ({error}): was it written by another version of dpo_flax?'
    ) from error
