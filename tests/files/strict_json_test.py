"""One reader of JSON from elsewhere; raw_test.py and untrusted_test.py test how it is asked."""

import pickle

import pytest

from dpo_flax.files.strict_json import StrictJsonError, parse_object


@pytest.mark.parametrize(
  ('text', 'reason', 'detail'),
  [
    (b'{"a": {"b": 1, "b": 2}}', 'duplicate key', 'b'),
    (b'{"a": -1e999}', 'number out of range', '-1e999'),
    (b'{"a": Infinity}', 'not JSON', 'Infinity is no JSON number'),
    (b'[1]', 'not a JSON object', 'list'),
    ('{"a": 1}'.encode('utf-16'), 'not UTF-8', None),
    (b'{"a": 1} {}', 'not JSON', None),
    (b'[' * 100_000, 'not JSON', None),
    (b'[1,' * 60_000, 'too many values', 'more than 100001'),
  ],
)
def test_what_is_not_strict_json_is_refused_with_its_reason(text, reason, detail):
  with pytest.raises(StrictJsonError) as error:
    parse_object(text, max_values=100_001)
  assert error.value.reason == reason
  assert detail is None or error.value.detail == detail
  assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_byte_order_mark_is_skipped():
  assert parse_object(b'\xef\xbb\xbf{"a": [1, 2.5, null]}\n') == {'a': [1, 2.5, None]}
