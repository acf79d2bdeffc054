"""Changes what a run learns from, or how it is ordered: its checkpoint may not go on unawares.

    python tests/faults/change.py --rounds=50

Each round changes one thing at random: a byte of the records, their order or number, the
tokenizer, the template, or a field that the order depends on. The command must refuse with exit
code 2, naming what differs with both values; with allow_data_change it must go on, saying so.
"""

import argparse
import collections
import pathlib
import random
import re

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model

import runs

TOKENIZER = runs.ROOT / 'dpo_flax/examples/tiny/tokenizer.model'
FIELDS = (
  'data.shuffle=False',
  'data.layout=separate --config.data.too_long=drop',
  'data.pack=False',
  'data.too_long=drop',
  'data.validation_split_fraction=0.3',
  'data.format=explicit',
  'batch.rows=2',
  'batch.tokens=160',
  'batch.pairs_per_row=4',
)


def letter(lines: list[str], generator: random.Random) -> list[str]:
  """One letter of a text becomes another."""
  line = generator.randrange(len(lines))
  places = [match.start() for match in re.finditer('(?<=[a-z])e(?=[a-z])', lines[line])]
  place = generator.choice([p for p in places if '"' not in lines[line][p - 8 : p + 8]])
  lines[line] = lines[line][:place] + 'a' + lines[line][place + 1 :]
  return lines


def swap(lines: list[str], generator: random.Random) -> list[str]:
  """Two records change places."""
  one, other = generator.sample(range(len(lines)), 2)
  lines[one], lines[other] = lines[other], lines[one]
  return lines


def drop(lines: list[str], generator: random.Random) -> list[str]:
  """One record goes."""
  del lines[generator.randrange(len(lines))]
  return lines


def repeat(lines: list[str], generator: random.Random) -> list[str]:
  """One record comes twice."""
  return [*lines, generator.choice(lines)]


def changed(kind, directory: pathlib.Path, generator: random.Random) -> list[str]:
  """Returns the flags that make the change."""
  if isinstance(kind, str) and kind not in {'tokenizer', 'template'}:
    return f'--config.{kind}'.split()
  if kind == 'template':
    return ["--config.data.chat_template={{ bos_token }}{{ messages[0]['content'] }}"]
  if kind == 'tokenizer':
    model = sentencepiece_model.ModelProto.FromString(TOKENIZER.read_bytes())
    model.pieces[generator.randrange(300, len(model.pieces))].score -= 0.5
    (directory / 'tokenizer.model').write_bytes(model.SerializeToString())
    return [f'--config.data.tokenizer={directory}/tokenizer.model']
  lines = runs.pairs(directory).read_text().splitlines(keepends=True)
  (directory / 'changed.jsonl').write_text(''.join(kind(lines, generator)))
  return [f'--config.data.train={directory}/changed.jsonl']


def changes(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether every change was refused, and let through when it was allowed."""
  workdir = directory / 'run'
  runs.must(runs.arguments(workdir))
  kinds = [letter, swap, drop, repeat, 'tokenizer', 'template', *FIELDS]
  generator = options.generator
  generator.shuffle(kinds)
  seen, well = collections.Counter(), True
  for number in range(options.rounds):
    kind = kinds[number % len(kinds)]
    flags = changed(kind, directory, generator)
    command = runs.arguments(workdir, *flags)
    refused = runs.run(command)
    both = re.search(r'data: saved \'[0-9a-f]{64}\', now \'[0-9a-f]{64}\'', refused.stderr)
    kept = refused.returncode == 2 and both and 'Traceback' not in refused.stderr
    if number % 4 == 0:
      allowed = runs.run([*command, '--config.allow_data_change'])
      kept = kept and allowed.returncode == 0 and both[0] in allowed.stderr
    name = kind if isinstance(kind, str) else f'{kind.__name__} of the records'
    seen[name, bool(kept)] += 1
    if not kept:
      well = False
      print(f'round {number}, {name}: {refused.returncode}: {refused.stderr[-1500:]}', flush=True)
  for (name, kept), count in sorted(seen.items()):
    print(f'{name:36} {"refused" if kept else "BROKEN"} {count}')
  return well


if __name__ == '__main__':
  runs.main(changes, rounds=50, doc=__doc__)
