"""What a run refuses before it makes a model."""

import types

import numpy as np
import pytest

from dpo_flax import config
from dpo_flax.assembly.sources import make_model_config
from dpo_flax.config.settings import settings_of


def make(preset, changes, *, platform='cpu'):
  """Returns the architecture of a preset on devices of which the platform alone counts."""
  settings = config.default()
  settings.model.preset = preset
  settings.update_from_flattened_dict(changes)
  devices = np.array([types.SimpleNamespace(platform=platform)])
  settings = settings_of(settings)
  return make_model_config(
    settings.model,
    None,
    types.SimpleNamespace(devices=devices),
    tokens=settings.batch.tokens,
  )


def test_rows_beyond_the_short_factors_of_longrope_are_refused():
  assert make('phi4-mini', {'batch.tokens': 4096}).longest_sequence == 4096
  with pytest.raises(ValueError, match=r'batch\.tokens=8192: .*longrope.*4096'):
    make('phi4-mini', {'batch.tokens': 8192})
  assert make('phi4', {'batch.tokens': 16_384}).longest_sequence is None


def test_the_kernel_is_for_tpus_alone():
  assert make('llama3-8b', {}, platform='tpu').attention == 'pallas'
  assert make('llama3-8b', {}).attention == 'xla'
  with pytest.raises(ValueError, match=r'model\.attention=pallas runs on TPU, not on cpu'):
    make('llama3-8b', {'model.attention': 'pallas'})
