"""What a run reports: lines on the screen, workdir/metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import tqdm
from absl import logging
from etils import epath

from dpo_flax.files.atomic import write_file
from dpo_flax.files.paths import access_errors, fresh, is_remote
from dpo_flax.losses import metrics
from dpo_flax.losses.metrics import Sums
from dpo_flax.training.tensorboard import EventFiles

# What a progress line shows, as (metric, label, format).
_COLUMNS = (
  ('dpo_loss', 'dpo_loss', '.4f'),
  ('dpo_accuracy', 'dpo_accuracy', '.3f'),
  ('dpo_margin_policy', 'margin_policy', '.3f'),
  ('dpo_margin_ref', 'margin_ref', '.3f'),
  ('tokens_per_second', 'tokens/s', ',.0f'),
)


class Reporter:
  """Writes metrics to the screen, metrics.jsonl and TensorBoard at once.

  After a resume, what was written beyond the restored step is taken back, so that every step is
  reported once.

  Args:
    workdir: of the run.
    start_step: the step that was restored; 0 for a new run.
    num_steps: of the run.
    is_writer: whether this process writes; of several, the first one alone.
  """

  def __init__(
    self, workdir: epath.Path, *, start_step: int, num_steps: int, is_writer: bool = True
  ):
    self._file = workdir / 'metrics.jsonl'
    self._is_writer = is_writer
    self.num_steps = num_steps
    self._start: tuple[int, float] | None = None  # step and time of the first report
    # What the checkpoint at `start_step` has seen; all processes agree on what was written.
    lines = _complete_lines(self._file) if start_step else []
    self._lines = [line for line in lines if json.loads(line)['step'] <= start_step]
    self._behind = False  # a line could not be written
    self._events: EventFiles | None = None
    self._bar: tqdm.tqdm | None = None
    if not is_writer:
      return
    self._rewrite()
    purge_step = start_step + 1 if start_step else 0
    self._events = EventFiles(workdir / 'tensorboard', purge_step=purge_step)
    if sys.stdout.isatty():
      self._bar = tqdm.tqdm(total=num_steps, initial=start_step, unit='step', file=sys.stdout)

  def write(self, step: int, split: str, metrics: Mapping[str, float]):
    """Reports the metrics of `split` (train or validation) after `step` optimizer steps."""
    if self._events is None:
      return
    # JSON has no NaN: a mean over nothing is null.
    values = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
    try:
      self._append(json.dumps({'step': step, 'split': split, **values}) + '\n')
      self._events.write(step, {f'{split}/{name}': value for name, value in metrics.items()})
    except access_errors() as error:
      logging.error('the report of step %d could not be written: %s', step, error)
    if 'dpo_loss' not in metrics:
      return
    shown = [(label, format(metrics[name], f)) for name, label, f in _COLUMNS if name in metrics]
    if self._bar is not None and split == 'train':
      self._bar.set_postfix(dict(shown), refresh=False)
      self._bar.update(step - self._bar.n)
      return
    text = '  '.join(f'{label} {value}' for label, value in shown)
    left = self._time_left(step) if split == 'train' else ''
    self.say(f'step {step}/{self.num_steps}  {split:10}  {text}{left}')

  def written(self, step: int, split: str) -> dict[str, Any]:
    """Returns what this run, or what it resumes, wrote of `split` after `step`; {} if nothing."""
    return _find(self._lines, step, split)

  def say(self, text: str):
    """Prints a line without disturbing the progress bar."""
    if not self._is_writer:
      return
    if self._bar is None:
      print(text, flush=True)
    else:
      self._bar.write(text, file=sys.stdout)

  def close(self):
    """Writes out what is still held back."""
    if self._events is not None:
      self._events.close()
    if self._bar is not None:
      self._bar.close()

  def _append(self, line: str):
    self._lines.append(line)
    behind, self._behind = self._behind, True
    if behind or is_remote(self._file):  # object stores cannot append
      self._rewrite()
    else:
      with self._file.open('a') as file:
        file.write(line)
    self._behind = False

  def _rewrite(self):
    """Writes all lines in one step: a kill must not lose what was there."""
    write_file(self._file, ''.join(self._lines))

  def _time_left(self, step: int) -> str:
    """The time to the end at the rate since the first report, which waited for the compiler."""
    if self._start is None:
      self._start = step, time.monotonic()
      return ''
    first, since = self._start
    seconds = (time.monotonic() - since) / (step - first) * (self.num_steps - step)
    return f'  left {int(seconds) // 60}:{int(seconds) % 60:02d}'


def read_metrics(path: epath.Path, step: int, split: str) -> dict[str, Any]:
  """Returns what a run wrote of `split` after `step`; {} if nothing."""
  return _find(_complete_lines(path), step, split)


def _find(lines: Iterable[str], step: int, split: str) -> dict[str, Any]:
  found = (
    line for line in map(json.loads, lines) if (line['step'], line['split']) == (step, split)
  )
  return next(found, {})


def _complete_lines(path: epath.Path) -> list[str]:
  """The lines of a file of metrics; one that a kill cut short, or that is damaged, is left out."""
  lines = path.read_bytes().splitlines(keepends=True) if fresh(path).exists() else []
  complete = {number: line for number, line in enumerate(lines, start=1) if line.endswith(b'\n')}
  damaged = [number for number, line in complete.items() if not _is_report(line)]
  if damaged:
    logging.warning(
      '%s:%d: no report, and left out%s',
      path,
      damaged[0],
      f', as are {len(damaged) - 1} more' if len(damaged) > 1 else '',
    )
  return [line.decode() for number, line in complete.items() if number not in damaged]


def _is_report(line: bytes) -> bool:
  try:
    values = json.loads(line)
  except ValueError:  # of UTF-8 too
    return False
  is_report = isinstance(values, dict) and isinstance(values.get('step'), int)
  return is_report and isinstance(values.get('split'), str)


def summarize(sums: Sums) -> dict[str, float]:
  """Returns the metrics of merged sums: the objective's, and the true counts of what was seen."""
  sums = dict(sums)
  counts = sums.pop('counts')
  return {
    **metrics.summarize(sums),
    'pairs': int(counts['pairs']),
    'tokens': int(counts['tokens']),
    'padding_fraction': 1 - float(counts['tokens']) / float(counts['positions']),
  }


def data_lines(reports: Mapping[str, Mapping[str, Any]], tokens: int) -> list[str]:
  """Returns what to report of a run's data: for each side its pairs, and what of them is left out.

  Args:
    reports: of `PreparedData`.
    tokens: of a row.
  """
  lines = []
  for side, report in reports.items():
    lines.append(
      f'{side}: {report["pairs"]} pairs in {report["rows"]} rows of {tokens} tokens, '
      f'{report["padding_fraction"]:.2%} padding'
    )
    # A validation side that was split off has the same files, which train has reported already.
    of_train = side != 'train' and report['examples'] == reports['train']['examples']
    left_out = ({} if of_train else report['dropped']) | {'longer than a row': report['too_long']}
    for reason, count in left_out.items():
      if count:
        examples = report['examples'].get(reason) or report['too_long_examples']
        lines.append(f'  {count} left out: {reason}, such as {examples[0]}')
    if report['truncated']:
      lines.append(
        f'  {report["truncated"]} prompts cut, such as {report["truncated_examples"][0]}'
      )
  return lines


def displacement_warning(held_out: Mapping[str, float]) -> str | None:
  """Returns what to report of a run after which held-out chosen responses are less likely, or None.

  The reward margin grows as well when both responses fall and rejected only falls faster: the
  probability then goes to answers that nobody has asked for.
  """
  chosen, rejected = (held_out.get(f'{side}_logps_change') for side in ('chosen', 'rejected'))
  if chosen is None or round(chosen, 2) >= 0:
    return None
  before = held_out['chosen_logps'] - chosen
  return (
    f'held-out chosen responses have become less likely: chosen_logps fell by {-chosen:.2f} nats '
    f'per response, {before:.2f} to {held_out["chosen_logps"]:.2f} (rejected_logps changed by '
    f'{rejected:+.2f}). If the answers got worse, try a lower optimizer.learning_rate, a higher '
    'objective.beta, objective.sft_weight, or objective.loss=dpop'
  )
