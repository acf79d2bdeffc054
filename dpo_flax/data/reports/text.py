"""The report on data as text for a terminal."""

from collections.abc import Iterator
from typing import Any

from dpo_flax.data.reports.examples import Example, Piece

_OPEN, _CLOSE = '\u2039', '\u203a'  # single angle quotation marks
_DIM, _GREEN, _RED, _REVERSE = '2', '32', '31', '7'


def render(found: dict[str, Any], shown: list[Example], *, colour: bool) -> str:
  """Returns the statistics and examples as text.

  Args:
    found: of statistics.describe.
    shown: of examples.pick.
    colour: whether escape codes mark what is learned; otherwise it stands in angle quotes.
  """
  lines = [line for title, rows in tables(found) for line in _table(title, rows)]
  for example in shown:
    lines += ['', *_example(example, colour=colour)]
  return '\n'.join(lines)


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
  """Yields (title, rows) of everything but the examples; a row is (name, value)."""
  sides = {'train': found, 'validation': found.get('validation')}
  for name, side in sides.items():
    if side is None:
      continue
    yield f'{name}: records', _records(side)
    yield f'{name}: rows', _rows(side)
    yield f'{name}: lengths in tokens', _lengths(side)
    yield f'{name}: what to look at', _remarks(side)


def _records(side: dict[str, Any]) -> list[tuple[str, str]]:
  rows = [(name, f'{side[name]:,}') for name in ('read', 'kept', 'dropped')]
  formats = ', '.join(f'{name} ({count:,})' for name, count in side['formats'].items())
  rows.append(('format', formats))
  for reason, count in side['dropped_by_reason'].items():
    rows.append((f'  {reason}', f'{count:,}'))
    rows += [('', example) for example in side['examples'][reason]]
  rows.append(('pairs on this side', f'{side["pairs"]:,}'))
  for name in ('too_long', 'truncated'):
    if side[name]:
      rows.append((name.replace('_', ' '), f'{side[name]:,}'))
      rows += [('', location) for location in side[f'{name}_examples']]
  return rows


def _rows(side: dict[str, Any]) -> list[tuple[str, str]]:
  saved = f'{side["prefix_saving"]:.1%} ({side["prefix_saving_tokens"]:,} tokens)'
  rows = [
    ('rows per epoch', f'{side["rows"]:,}'),
    ('tokens per epoch', f'{side["tokens"]:,}'),
    ('padding', f'{side["padding_fraction"]:.2%}'),
    ('pairs per row', f'{side["mean_pairs_per_row"]:.1f}, at most {side["pairs_per_row"]}'),
    ('saved by sharing prompts', saved),
  ]
  if 'steps_per_epoch' in side:
    rows.append(('steps per epoch', f'{side["steps_per_epoch"]:,}'))
  return rows


def _lengths(side: dict[str, Any]) -> list[tuple[str, str]]:
  names = list(next(iter(side['lengths'].values())))
  rows = [('', ''.join(f'{name:>9}' for name in names))]
  for name, values in side['lengths'].items():
    rows.append((name, ''.join(f'{value:9,.0f}' for value in values.values())))
  return rows


def _remarks(side: dict[str, Any]) -> list[tuple[str, str]]:
  bias = side['length_bias']
  rows = [
    ('length bias', f'longer wins {bias["longer_wins"]:.0%}, {bias["equal"]:.0%} are equally long'),
    ('base-rate accuracy', f'{bias["base_rate_accuracy"]:.1%} by length alone'),
    ('distinct prompts', f'{side["distinct_prompts"]:,}'),
    ('duplicates', f'{side["duplicates"]:,}'),
    *(('', location) for location in side['duplicate_examples']),
    ('contradictions', f'{side["contradictions"]:,}'),
    *(('', location) for location in side['contradiction_examples']),
  ]
  if 'prompts_also_in_train' in side:
    rows.append(('pairs whose prompt is in train', f'{side["prompts_also_in_train"]:,}'))
  return rows


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
  return ['', title, *(f'  {name:<32}{value}'.rstrip() for name, value in rows)]


def _example(example: Example, *, colour: bool) -> Iterator[str]:
  counts = ' + '.join(map(str, example.tokens))
  yield f'{example.where} ({counts} tokens)'
  for name, code in (('prompt', _DIM), ('chosen', _GREEN), ('rejected', _RED)):
    pieces = getattr(example, name)
    yield f'{name}: ' + ''.join(_piece(piece, code, colour=colour) for piece in pieces)


def _piece(piece: Piece, code: str, *, colour: bool) -> str:
  text = ''.join(c if c.isprintable() or c == '\n' else f'\\x{ord(c):02x}' for c in piece.text)
  if not colour:
    return f'{_OPEN}{text}{_CLOSE}' if piece.learned else text
  codes = [code if piece.learned else _DIM, *([_REVERSE] if piece.special else [])]
  return f'\033[{";".join(codes)}m{text}\033[0m'
