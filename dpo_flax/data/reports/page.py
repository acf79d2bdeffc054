"""The report on data as one self-contained page."""

import html
from typing import Any

from dpo_flax.data.reports.examples import Example, Piece
from dpo_flax.data.reports.text import tables

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
td { padding: 0 1.5rem 0 0; vertical-align: top; white-space: pre-wrap; }
td + td { font-family: ui-monospace, monospace; }
pre { white-space: pre-wrap; border-left: 4px solid #8886; padding-left: 1rem; }
.read { opacity: 0.6; }
.chosen .learned { background: #2a84; }
.rejected .learned { background: #c444; }
.special { outline: 1px solid #8888; border-radius: 3px; }
"""


def render(found: dict[str, Any], shown: list[Example]) -> str:
  """Returns the page: the statistics, then the examples with what is learned on a ground."""
  parts = [_table(title, rows) for title, rows in tables(found)]
  parts += [_example(example) for example in shown]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Preference data</title>'
    f'<style>{_STYLE}</style></head>\n<body>\n<h1>Preference data</h1>\n'
    + '\n'.join(parts)
    + '\n</body></html>\n'
  )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
  cells = (f'<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>' for a, b in rows)
  return f'<h2>{html.escape(title)}</h2>\n<table>{"".join(cells)}</table>'


def _example(example: Example) -> str:
  counts = ' + '.join(map(str, example.tokens))
  parts = [f'<h2>{html.escape(example.where)}</h2>\n<p>{counts} tokens</p>']
  for name in ('prompt', 'chosen', 'rejected'):
    pieces = ''.join(map(_piece, getattr(example, name)))
    parts.append(f'<h3>{name}</h3>\n<pre class="{name}">{pieces}</pre>')
  return '\n'.join(parts)


def _piece(piece: Piece) -> str:
  classes = ('learned' if piece.learned else 'read') + (' special' if piece.special else '')
  return f'<span class="{classes}">{html.escape(piece.text)}</span>'
