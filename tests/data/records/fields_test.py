"""A record is a strict JSON object, or an error with a short reason."""

import pickle

import pytest

from dpo_flax.data.records.fields import RecordError, parse


@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    (b'{"a": NaN}', 'not JSON'),
    (b'{"a": -Infinity}', 'not JSON'),
    (b'{"a": 1e999}', 'number out of range'),
    (b'{"a": 1, "a": 2}', 'duplicate key'),
    (b'{"a": {"b": 1, "b": 2}}', 'duplicate key'),
    (b'[1, 2]', 'not a JSON object'),
    (b'{"a": ', 'not JSON'),
    (b'{"a": "\xff"}', 'not UTF-8'),
    (b'{"a": ' + b'[' * 100_000, 'not JSON'),
    (b'{"a": ' + b'1' * 10_000 + b'}', 'not JSON'),
  ],
)
def test_lines_that_are_not_strict_json_objects_are_refused(line, reason):
  with pytest.raises(RecordError) as error:
    parse(line)
  assert error.value.reason == reason


def test_errors_cross_from_process_to_process():
  error = pickle.loads(pickle.dumps(RecordError('not JSON', 'line 3')))
  assert (error.reason, str(error)) == ('not JSON', 'not JSON: line 3')
