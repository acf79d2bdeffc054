"""No directory can crash the loader; the long form of this is tests/faults/fuzz_weights.py."""

import pathlib
import runpy

FAULTS = runpy.run_path(str(pathlib.Path(__file__).parent.parent / 'faults' / 'fuzz_weights.py'))


def test_every_damaged_directory_is_loaded_or_refused_in_bounds(tmp_path):
  found, failures = FAULTS['run'](150, 0, tmp_path)
  assert not failures
  outcomes = {tuple(what.split()[:2]) for what in found}
  assert outcomes == {
    (k, o) for k in ('whole', 'sharded', 'adapter') for o in ('loaded', 'refused')
  }
