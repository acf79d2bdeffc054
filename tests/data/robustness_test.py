"""No record can crash the pipeline; the long form of this is tests/faults/mutate_records.py."""

import pathlib
import runpy

import pytest

from dpo_flax.data.tokens.tokenizer import load_tokenizer

FAULTS = runpy.run_path(str(pathlib.Path(__file__).parent.parent / 'faults' / 'mutate_records.py'))


@pytest.mark.parametrize('kind', ['json_directory', 'sentencepiece_directory'])
def test_every_damaged_record_is_kept_or_dropped(kind, request, tmp_path):
  tokenizer = load_tokenizer(str(request.getfixturevalue(kind)), FAULTS['CHATML'])
  report = FAULTS['run'](600, 0, tokenizer, tmp_path)
  assert report.read == report.kept + sum(report.dropped.values())
  assert report.read > 590  # some lines are cut to nothing
  assert report.kept > 100
  assert len(report.dropped) > 10
  assert set(report.formats) >= {'explicit', 'hh', 'shp', 'webgpt', 'ultrafeedback', 'orca'}
