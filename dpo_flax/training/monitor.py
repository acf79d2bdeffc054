"""Watches the training steps, one behind the device."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from dpo_flax.losses.metrics import Sums
from dpo_flax.training.reporter import Reporter, summarize

StepMetrics = dict[str, Any]  # of training.step's train_step


class Monitor:
  """Watches the training steps, one behind the device: checks each, reports every `log_every`.

  A step that made no update is reported, with the records that it came from; more than
  `max_skipped` of them in a row stop the run.

  The first and the last step are reported too. The metrics of a step are read after the next one is
  dispatched, so that the device never waits.
  """

  def __init__(
    self,
    reporter: Reporter,
    *,
    log_every: int,  # steps
    max_skipped: int,  # in a row
    learning_rate: optax.Schedule,  # after so many updates
    describe: Callable[[np.ndarray], str],  # pair_index [B, P] -> where the records are
  ):
    self._reporter = reporter
    self._log_every = log_every
    self._max_skipped = max_skipped
    self._skipped = 0  # since the last report
    self._in_a_row = 0  # skipped
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
    if metrics['finite'] and not metrics['spikes']:
      self._in_a_row = 0
      self._count(metrics['sums'])
    else:
      self._skip(step, metrics, pair_index)
    if step % self._log_every == 0 or step in (1, self._reporter.num_steps):
      self._report(step, metrics)

  def pause(self):
    """Brings the report up to date, and takes the time until the next step out of its rates."""
    self.flush()
    self._since = None

  def _skip(self, step: int, metrics: StepMetrics, pair_index: np.ndarray):
    self._skipped += 1
    self._in_a_row += 1
    norm = metrics['grad_norm']
    reason = (
      f'the gradient spikes (norm {norm:.3g}, far above the median of those before)'
      if metrics['spikes']
      else f'the loss or its gradient is not finite (gradient norm {norm})'
    )
    message = (
      f'step {step}: {reason}; no update was made from it. The records in this batch: '
      f'{self._describe(pair_index)}'
    )
    if self._in_a_row > self._max_skipped:
      row = f' {self._in_a_row} steps in a row were skipped.' if self._max_skipped else ''
      raise FloatingPointError(message + row)
    self._reporter.say(message)

  def _count(self, sums: Sums):
    self._sums = sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
    now = time.monotonic()
    if self._since is not None:
      self._seconds += now - self._since
      self._timed = {name: n + int(sums['counts'][name]) for name, n in self._timed.items()}
    self._since = now

  def _report(self, step: int, metrics: StepMetrics):
    values = {} if self._sums is None else summarize(self._sums)
    rate = float(np.asarray(self._learning_rate(int(metrics['updates']))))
    values |= {'learning_rate': rate, 'grad_norm': float(metrics['grad_norm'])}
    if self._max_skipped:
      values['skipped_steps'] = self._skipped
    if self._seconds:
      values |= {f'{name}_per_second': n / self._seconds for name, n in self._timed.items()}
    self._reporter.write(step, 'train', values)
    self._sums, self._timed, self._seconds = None, dict.fromkeys(self._timed, 0), 0.0
    self._skipped = 0
