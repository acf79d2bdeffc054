"""The command that looks at data: python -m dpo_flax.inspect_data --config=configs/tiny.py.

Tokenizes and plans exactly as training would, then reports what it found: what was dropped and
where, lengths, padding, steps per epoch, duplicates, contradictions, how far length alone predicts
the chosen answer; and shows examples with the tokens that bear loss marked. --html=FILE writes the
same as a page, --json prints it as one object.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from dpo_flax.assembly.data import prepare_data
from dpo_flax.assembly.sources import vocabulary_size
from dpo_flax.config.checks import validate
from dpo_flax.config.schema import get
from dpo_flax.data.reports import examples, page, statistics, text
from dpo_flax.huggingface.weights import open_checkpoint
from dpo_flax.runtime import command

_EXAMPLES = flags.DEFINE_integer('examples', 3, 'Pairs to show.', lower_bound=0)
_HTML = flags.DEFINE_string('html', None, 'A file to write the report to, as a page.')
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object, and nothing else.', allow_override=True
)  # other commands have one too


def inspect(config: ConfigDict, count: int) -> tuple[dict, list[examples.Example]]:
  """Prepares the data as training would; returns its statistics and some pairs of it.

  Records that training would refuse are left out and counted, so that all of them are seen at once.

  Raises:
    ValueError: the config or the data are unfit.
  """
  settings = validate(config)
  seen = {'data.bad_record': 'skip'}
  if settings.data.too_long == 'raise':
    seen['data.too_long'] = 'drop'
  path, preset = settings.initialize_from_hf, settings.model.preset
  vocab_size = vocabulary_size(open_checkpoint(path) if path else None, preset)
  prepared = prepare_data(settings.replace(seen), vocab_size=vocab_size)
  found = statistics.describe(prepared)
  shown = examples.pick(prepared.train, prepared.tokenizer, count, seed=settings.seed)
  return found, shown


def refusals(found: dict, data: Mapping[str, Any], tokens: int) -> list[str]:
  """Returns why training would not start on what was found.

  Args:
    found: what `inspect` returned.
    data: the config's data section.
    tokens: of a row.
  """
  sides = [found, found['validation']] if 'validation' in found else [found]
  # Held-out pairs are of the same files, unless they have their own.
  read = sides if data['validation'] else sides[:1]
  bad = [where for side in read for group in side['examples'].values() for where in group]
  long = [where for side in sides for where in side['too_long_examples']]
  reasons = []
  if bad and data['bad_record'] == 'raise':
    count = sum(side['dropped'] for side in read)
    reasons.append(
      f'{count:,} bad records, such as {bad[0]} (data.bad_record=skip leaves them out)'
    )
  if long and data['too_long'] == 'raise':
    count = sum(side['too_long'] for side in sides)
    reasons.append(
      f'{count:,} pairs longer than batch.tokens={tokens}, such as {long[0]} '
      '(data.too_long=drop leaves them out, truncate_prompt cuts their prompts)'
    )
  return reasons


def show(config: ConfigDict):
  """Prints what was found, as text or JSON, and writes the page that --html asks for.

  Raises:
    ValueError: training would refuse these data; raised after all is printed.
  """
  if _HTML.value and not epath.Path(_HTML.value).parent.is_dir():
    raise ValueError(f'--html={_HTML.value}: there is no folder {epath.Path(_HTML.value).parent}')
  found, shown = inspect(config, _EXAMPLES.value)
  reasons = refusals(found, get(config, 'data'), get(config, 'batch.tokens'))
  found['refused'] = reasons
  if _HTML.value:
    epath.Path(_HTML.value).write_text(page.render(found, shown))
  if _JSON.value:
    lines = json.dumps(found, indent=1)
  else:
    lines = text.render(found, shown, colour=sys.stdout.isatty())
  _print(lines)
  if reasons:
    raise ValueError(f'training with this config would refuse {" and ".join(reasons)}')


def _print(lines: str):
  with contextlib.suppress(BrokenPipeError):  # of a pager that was left
    print(lines, flush=True)
    return
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  command.run(show)
