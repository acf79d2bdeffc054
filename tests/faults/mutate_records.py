"""Feeds damaged records to the data pipeline: none may crash it, each must be accounted for.

    python tests/faults/mutate_records.py --tokenizer=/path/to/tokenizer --records=10000

Takes records of every format, changes each in some way that a file might be wrong in, and builds a
token cache of them, skipping what cannot be used. Prints what became of them. The test suite runs a
short form.
"""

import argparse
import collections
import copy
import json
import pathlib
import random
import tempfile
from typing import Any

from dpo_flax.data.cache.build_cache import ReadOptions, open_or_build
from dpo_flax.data.cache.cache_files import Report
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer, load_tokenizer

CHATML = (
  '{% if tools %}{{ tools | tojson }}{% endif %}'
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_USER, _GOOD, _BAD = (
  {'role': role, 'content': text}
  for role, text in (('user', 'a cat?'), ('assistant', 'tea.'), ('assistant', 'the river.'))
)
_TURN = '\n\nHuman: a cat?\n\nAssistant:'
SEEDS = [
  {'prompt': 'the cat', 'chosen': ' likes tea.', 'rejected': ' reads', 'weight': 2.0},
  {'prompt': [_USER], 'chosen': [_GOOD], 'rejected': [_BAD], 'margin': 0.5, 'tools': [{'a': 1}]},
  {'chosen': [_USER, _GOOD, _USER, _BAD], 'rejected': [_USER, _BAD], 'chosen_probability': 0.7},
  {'messages': [_USER, _GOOD], 'rejected': 'no'},
  {'chosen': f'{_TURN} tea{_TURN} us', 'rejected': f'{_TURN} no'},
  {'history': 'why?', 'human_ref_A': 'so', 'human_ref_B': 'because', 'labels': 1},
  {
    'question': {'full_text': 'why?'},
    **{'answer_0': 'so', 'score_0': 0.5, 'answer_1': 'because', 'score_1': -0.5},
  },
  {'prompt': 'a cat?', 'chosen': [_USER, _GOOD], 'rejected': [_USER, _BAD]},
  {
    'instruction': 'why?',
    'completions': [{'response': text, 'overall_score': i} for i, text in enumerate('abc')],
  },
  {'system': 'Be brief.', 'question': 'why?', 'chosen': 'so', 'rejected': 'because'},
]
_VALUES = [None, True, -1, 2**70, 1e300, '', ' ', '\n', [], {}, [[]], [None], {'role': 'user'}]
_TEXTS = ['<s>', '</s>', '<|im_end|>', '{{ 1 / 0 }}', '\0', '\u2581', '\ufdd0', '\ufffe', '\x1b[2J']
_TEXTS += ['\ud800', 'é\u0301', '\U0001f468\u200d\U0001f469', '\u202e', 'x' * 1000, '\n\nHuman:']
_RAW = [b'NaN', b'-Infinity', b'1e999', b'"\xff"', b'"\\ud800"', b'{"a": 1, "a": 2}', b'01', b'"']


def mutate(record: dict[str, Any], generator: random.Random) -> bytes:
  """Returns a line of jsonl that is like the record, but for some faults."""
  record = copy.deepcopy(record)
  for _ in range(generator.randint(1, 2)):
    _change(record, generator)
  line = json.dumps(record).encode()
  if generator.random() < 0.3:
    line = _damage(line, generator)
  return line.replace(b'\n', b' ')


def _change(record: dict[str, Any], generator: random.Random) -> None:
  """Changes some value, deep inside or not."""
  holder: Any = record
  while True:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    if not keys:
      return
    key = generator.choice(keys)
    if not isinstance(holder[key], dict | list) or generator.random() < 0.3:
      break
    holder = holder[key]
  value, kind = holder[key], generator.randrange(6)
  if kind == 0:
    del holder[key]
  elif kind == 1 and isinstance(holder, dict):
    holder[generator.choice(['prompt', 'messages', 'tools', 'x'])] = copy.deepcopy(value)
  elif kind < 4 and isinstance(value, str):
    at = generator.randint(0, len(value))
    holder[key] = value[:at] + generator.choice(_TEXTS) + value[at:]
  elif kind == 4 and isinstance(value, str) and generator.random() < 0.02:
    holder[key] = value + ' word' * 200_000  # a megabyte
  else:
    holder[key] = copy.deepcopy(generator.choice(_VALUES))


def _damage(line: bytes, generator: random.Random) -> bytes:
  """Changes the bytes of a line."""
  at, kind = generator.randrange(len(line)), generator.randrange(5)
  if kind == 0:
    return line[:at]
  if kind == 1:
    return line[:at] + bytes([generator.randrange(256)]) + line[at + 1 :]
  if kind == 2:
    return line[:-1] + b', "extra": ' + generator.choice(_RAW) + b'}'
  if kind == 3:
    return line[:at] + line[at:][::-1]
  return b'[' * 2000 + line


def run(count: int, seed: int, tokenizer: Tokenizer, directory: pathlib.Path) -> Report:
  """Builds a cache of `count` damaged records; returns what became of them."""
  generator = random.Random(seed)
  path = directory / 'mutated.jsonl'
  lines = [mutate(generator.choice(SEEDS), generator) for _ in range(count)]
  path.write_bytes(b''.join(line + b'\n' for line in lines if line.strip()))
  reading = ReadOptions(
    cache_dir=str(directory / 'cache'),
    format=FormatOptions(completions='all'),
    bad_record='skip',
  )
  return open_or_build(RecordSource(str(path)), tokenizer, reading).report


def main():
  """Runs the long form."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--tokenizer', required=True, help='a directory or file of a tokenizer')
  parser.add_argument('--records', type=int, default=10_000)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  tokenizer = load_tokenizer(arguments.tokenizer, CHATML)
  with tempfile.TemporaryDirectory() as directory:
    report = run(arguments.records, arguments.seed, tokenizer, pathlib.Path(directory))
  print(f'read {report.read}, kept {report.kept}, dropped {sum(report.dropped.values())}')
  for reason, number in collections.Counter(report.dropped).most_common():
    print(f'{number:8} {reason}')


if __name__ == '__main__':
  main()
