"""What a run says: lines on the screen, workdir/metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from etils import epath

from dpo_flax.objective import metrics
from dpo_flax.objective.metrics import Sums

StepMetrics = dict[str, Any]  # of learner.step's train_step: sums, grad_norm, finite

# What a progress line shows, as (metric, label, format).
_COLUMNS = (
  ('dpo_loss', 'dpo_loss', '.4f'),
  ('dpo_accuracy', 'dpo_accuracy', '.3f'),
  ('dpo_margin_policy', 'margin_policy', '.3f'),
  ('dpo_margin_ref', 'margin_ref', '.3f'),
  ('tokens_per_second', 'tokens/s', ',.0f'),
)


class Reporter:
  """Writes metrics to every place at once. Only the first process has one that speaks.

  After a resume, what was written beyond the restored step is taken back, so that every step is
  reported once.
  """

  def __init__(self, workdir: epath.Path, *, start_step: int, num_steps: int, speaks: bool = True):
    self._file = workdir / 'metrics.jsonl'
    self._speaks = speaks
    self.num_steps = num_steps
    self._start: tuple[int, float] | None = None  # step and time of the first report
    self._lines = _kept_lines(self._file, start_step)  # all processes agree on what was written
    if not speaks:
      return
    rewritten = self._file.with_name(f'{self._file.name}.tmp')
    rewritten.write_text(''.join(self._lines))
    rewritten.replace(self._file)  # in one step: a kill must not lose what was there
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start_step + 1 if start_step else 0
    )
    self._bar = None
    if sys.stdout.isatty():
      self._bar = tqdm.tqdm(total=num_steps, initial=start_step, unit='step', file=sys.stdout)

  def write(self, step: int, split: str, metrics: Mapping[str, float]):
    """Reports the metrics of `split` (train or validation) after `step` optimizer steps."""
    if not self._speaks:
      return
    # JSON has no NaN: a mean over nothing is null.
    values = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
    self._append(json.dumps({'step': step, 'split': split, **values}) + '\n')
    for name, value in metrics.items():
      self._board.add_scalar(f'{split}/{name}', value, step)
    self._board.flush()
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
    if not self._speaks:
      return
    if self._bar is None:
      print(text, flush=True)
    else:
      self._bar.write(text, file=sys.stdout)

  def close(self):
    """Writes out what is still held back."""
    if not self._speaks:
      return
    self._board.close()
    if self._bar is not None:
      self._bar.close()

  def _append(self, line: str):
    self._lines.append(line)
    if '://' in str(self._file):  # object stores cannot append
      self._file.write_text(''.join(self._lines))
      return
    with self._file.open('a') as file:
      file.write(line)

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
  return _find(path.read_text().splitlines(), step, split) if path.exists() else {}


def _find(lines: Iterable[str], step: int, split: str) -> dict[str, Any]:
  found = (
    line for line in map(json.loads, lines) if (line['step'], line['split']) == (step, split)
  )
  return next(found, {})


def _kept_lines(path: epath.Path, start_step: int) -> list[str]:
  """The whole lines of an earlier run that its checkpoint at `start_step` has seen."""
  if not start_step or not path.exists():
    return []
  lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]
  return [line for line in lines if json.loads(line)['step'] <= start_step]


class Monitor:
  """Watches the training steps, one behind the device: checks each, reports every `log_every`.

  The first and the last step are reported too. The metrics of a step are read after the next one is
  dispatched, so that the device never waits.
  """

  def __init__(
    self,
    reporter: Reporter,
    *,
    log_every: int,  # steps
    learning_rate: Callable[[int], float],  # of a step, from 0
    describe: Callable[[np.ndarray], str],  # pair_index [B, P] -> where the records are
  ):
    self._reporter = reporter
    self._log_every = log_every
    self._learning_rate = learning_rate
    self._describe = describe
    self._held: tuple[int, StepMetrics, np.ndarray] | None = None
    self._sums: Sums | None = None  # since the last report
    self._timed = {'tokens': 0, 'pairs': 0}  # of them, in steps whose time is known
    self._seconds = 0.0  # those took
    self._since: float | None = None  # None: the next step's time is not training's alone

  def add(self, step: int, metrics: StepMetrics, pair_index: np.ndarray):
    """Takes the metrics of `step`, still on the device, and handles those of the step before."""
    self.flush()
    self._held = (step, metrics, pair_index)

  def flush(self):
    """Handles the step held back.

    Raises:
      FloatingPointError: its loss or gradient is not finite; names the step and its records.
    """
    if self._held is None:
      return
    step, metrics, pair_index = self._held
    self._held = None
    metrics = jax.device_get(metrics)
    if not metrics['finite']:
      raise FloatingPointError(
        f'step {step}: the loss or its gradient is not finite (gradient norm '
        f'{metrics["grad_norm"]}); no update was made from it. The records in this batch: '
        f'{self._describe(pair_index)}'
      )
    self._count(metrics['sums'])
    if step % self._log_every == 0 or step in (1, self._reporter.num_steps):
      self._report(step, float(metrics['grad_norm']))

  def pause(self):
    """Brings the report up to date, and takes the time until the next step out of its rates."""
    self.flush()
    self._since = None

  def _count(self, sums: Sums):
    self._sums = sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
    now = time.monotonic()
    if self._since is not None:
      self._seconds += now - self._since
      self._timed = {name: n + int(sums['counts'][name]) for name, n in self._timed.items()}
    self._since = now

  def _report(self, step: int, grad_norm: float):
    values = summarize(self._sums)
    values |= {'learning_rate': float(self._learning_rate(step - 1)), 'grad_norm': grad_norm}
    if self._seconds:
      rates = {f'{name}_per_second': n / self._seconds for name, n in self._timed.items()}
      values |= rates
    self._reporter.write(step, 'train', values)
    self._sums, self._timed, self._seconds = None, dict.fromkeys(self._timed, 0), 0.0


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


def displacement_warning(held_out: Mapping[str, float]) -> str | None:
  """Returns what to tell of a run after which held-out chosen responses are less likely, or None.

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
