"""What a run writes down: whole, true, and once for every step."""

import errno
import io
import json
import math
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from dpo_flax.losses.metrics import metric_sums
from dpo_flax.losses.pair_logps import PairLogps
from dpo_flax.training import monitor as monitor_module
from dpo_flax.training import reporter as reporting
from dpo_flax.training.monitor import Monitor
from dpo_flax.training.reporter import Reporter, read_metrics, summarize
from helpers.steps import make_options

METRICS = {'dpo_loss': 0.5, 'dpo_accuracy': 0.75, 'pairs': 8}


@pytest.fixture
def open_reporter(tmp_path):
  """Opens the reporter of one workdir, and closes it."""
  opened = []

  def open_it(start_step=0, **options):
    opened.append(Reporter(tmp_path, start_step=start_step, num_steps=100, **options))
    return opened[-1]

  yield open_it
  for reporter in opened:
    reporter.close()


def read_lines(tmp_path):
  """Returns the objects of metrics.jsonl; a line that is not standard JSON fails."""

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  assert not text or text.endswith('\n')
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_scalars(tmp_path):
  """Returns (tag, step) -> value of all TensorBoard files of a workdir, and their purge steps."""
  scalars, purges = {}, []
  for path in sorted((tmp_path / 'tensorboard').iterdir()):
    data = path.read_bytes()
    at = 0
    while at < len(data):
      (length,) = struct.unpack('<Q', data[at : at + 8])
      event = Event.FromString(data[at + 12 : at + 12 + length])
      at += length + 16
      if event.HasField('session_log'):
        purges.append(event.step)
      scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
  return scalars, purges


def test_every_line_is_an_object_with_step_and_split(open_reporter, tmp_path):
  reporter = open_reporter()
  reporter.write(0, 'validation', METRICS)
  reporter.write(1, 'train', METRICS | {'learning_rate': 1e-7})
  assert read_lines(tmp_path) == [
    {'step': 0, 'split': 'validation', **METRICS},
    {'step': 1, 'split': 'train', **METRICS, 'learning_rate': 1e-7},
  ]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(open_reporter, tmp_path, value):
  open_reporter().write(1, 'train', METRICS | {'entropy': value})
  (line,) = read_lines(tmp_path)
  assert line == {'step': 1, 'split': 'train', **METRICS, 'entropy': None}


def test_a_line_is_on_disk_as_soon_as_it_is_written(open_reporter, tmp_path):
  reporter = open_reporter()
  for step in (1, 2):
    reporter.write(step, 'train', METRICS)
    assert len(read_lines(tmp_path)) == step


def test_tensorboard_holds_the_same_numbers(open_reporter, tmp_path):
  reporter = open_reporter()
  reporter.write(3, 'train', METRICS)
  reporter.write(3, 'validation', {'dpo_loss': 0.25})
  reporter.close()
  scalars, _ = read_scalars(tmp_path)
  expected = {('train/' + name, 3): value for name, value in METRICS.items()}
  assert scalars == expected | {('validation/dpo_loss', 3): 0.25}


def test_resume_takes_back_what_lies_beyond_the_restored_step(open_reporter, tmp_path):
  first = open_reporter()
  for step in range(6):
    first.write(step, 'train', METRICS | {'run': 1})
    first.write(step, 'validation', METRICS | {'run': 1})
  first.close()
  # One process makes one reporter: the next file would take this one's place.
  (events,) = (tmp_path / 'tensorboard').iterdir()
  events.rename(events.with_name('events.out.tfevents.0'))
  second = open_reporter(start_step=3)
  for step in (4, 5):
    second.write(step, 'train', METRICS | {'run': 2})
  second.close()
  found = [(line['step'], line['split'], line['run']) for line in read_lines(tmp_path)]
  kept = [(step, split, 1) for step in range(4) for split in ('train', 'validation')]
  assert found == [*kept, (4, 'train', 2), (5, 'train', 2)]
  scalars, purges = read_scalars(tmp_path)
  assert purges == [
    0,
    4,
  ]  # a new run hides what lies in its directory, a resumed one the steps redone
  assert scalars['train/run', 3] == 1 and scalars['train/run', 4] == 2


@pytest.mark.parametrize('tail', ['{"step": 3, "spl', '{"step": 3}', '{"step'])
def test_resume_drops_a_half_written_line(open_reporter, tmp_path, tail):
  open_reporter().write(2, 'train', METRICS)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(tail)
  open_reporter(start_step=3).write(4, 'train', METRICS)
  assert [line['step'] for line in read_lines(tmp_path)] == [2, 4]


@pytest.mark.parametrize('damaged', [b'garbage', b'null', b'{}', b'\xff\xfe', b'{"step": "3"}'])
def test_resume_leaves_out_a_damaged_line_and_names_it(open_reporter, tmp_path, caplog, damaged):
  first = open_reporter()
  for step in (1, 2, 3):
    first.write(step, 'train', METRICS)
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + damaged + b'\n' + lines[2])
  assert read_metrics(path, 3, 'train')['step'] == 3
  open_reporter(start_step=3)
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 3]
  assert f'{path}:2: no report, and left out' in caplog.text


@pytest.mark.parametrize('broken', ['metrics.jsonl', 'tensorboard'])
def test_a_full_disk_loses_no_line_once_there_is_room(
  open_reporter, tmp_path, caplog, monkeypatch, broken
):
  reporter = open_reporter()
  reporter.write(1, 'train', METRICS)
  with monkeypatch.context() as full:
    if broken == 'tensorboard':
      full.setattr(RecordWriter, 'flush', raise_no_space)
    else:
      (tmp_path / 'metrics.jsonl').rename(tmp_path / 'kept')
      (tmp_path / 'metrics.jsonl').mkdir()  # cannot be appended to
    reporter.write(2, 'train', METRICS)
  assert 'the report of step 2 could not be written' in caplog.text
  if broken == 'metrics.jsonl':
    (tmp_path / 'metrics.jsonl').rmdir()
    text = (tmp_path / 'kept').read_text()
    (tmp_path / 'metrics.jsonl').write_text(text + '{"step": 2, "sp')  # half a line
  reporter.write(3, 'train', METRICS)
  reporter.close()
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3]
  scalars, _ = read_scalars(tmp_path)
  assert {step for _, step in scalars} >= {1, 3}


def raise_no_space(self):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_run_from_the_start_keeps_no_line_of_an_earlier_one(open_reporter, tmp_path):
  open_reporter().write(0, 'train', METRICS)
  open_reporter()
  assert read_lines(tmp_path) == []


def test_resume_without_an_earlier_file_starts_one(open_reporter, tmp_path):
  open_reporter(start_step=3).write(4, 'train', METRICS)
  assert [line['step'] for line in read_lines(tmp_path)] == [4]


def test_other_processes_write_and_say_nothing(open_reporter, tmp_path, capsys):
  reporter = open_reporter(is_writer=False)
  reporter.write(1, 'train', METRICS)
  reporter.say('hello')
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().out == ''


def test_plain_lines_name_step_loss_and_accuracy(open_reporter, capsys):
  reporter = open_reporter()
  reporter.write(0, 'train', {'parameter_count': 10})
  reporter.write(7, 'validation', METRICS)
  (line,) = capsys.readouterr().out.splitlines()
  assert 'step 7/100' in line and 'validation' in line
  assert 'dpo_loss 0.5000' in line and 'dpo_accuracy 0.750' in line


def test_a_terminal_gets_a_progress_bar(open_reporter, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdout', terminal)
  reporter = open_reporter(start_step=40)
  reporter.write(50, 'train', METRICS)
  reporter.say('a line of its own')
  reporter.close()
  text = terminal.getvalue()
  assert '50/100' in text and 'dpo_loss=0.5000' in text
  assert 'a line of its own\n' in text


class Recorder:
  """Stands where a Reporter would."""

  num_steps = 100

  def __init__(self):
    self.written = []
    self.said = []

  def say(self, text):
    self.said.append(text)

  def write(self, step, split, metrics):
    self.written.append((step, split, metrics))


@pytest.fixture
def recorder():
  return Recorder()


def make_monitor(recorder, log_every, max_skipped=0):
  return Monitor(
    recorder,
    log_every=log_every,
    max_skipped=max_skipped,
    learning_rate=lambda step: 0.001 * step,
    describe=lambda pair_index: f'records {sorted(pair_index[pair_index >= 0].tolist())}',
  )


@pytest.fixture
def clock(monkeypatch):
  """Time that passes only when told to: `clock[0] += seconds`."""
  now = [0.0]
  monkeypatch.setattr(monitor_module.time, 'monotonic', lambda: now[0])
  return now


@pytest.fixture(scope='module')
def make_step():
  """Makes the metrics of a step of `pairs` pairs, [2, 4] slots, and its mean loss."""
  objective = make_options().objective

  def make(pairs, *, seed=0, tokens=100, finite=True, spikes=False):
    random = np.random.default_rng(seed)
    mask = np.zeros((2, 4), np.float32)
    mask.flat[:pairs] = 1

    def draw():
      return jnp.asarray(random.normal(-20, 5, (2, 4)) * mask, jnp.float32)

    names = ('policy_chosen', 'policy_rejected', 'reference_chosen', 'reference_rejected')
    lengths = {name: jnp.asarray(9.0 * mask) for name in ('chosen_lengths', 'rejected_lengths')}
    logps = PairLogps(**{name: draw() for name in names}, **lengths, pair_mask=jnp.asarray(mask))
    losses = jnp.asarray(random.uniform(0, 2, (2, 4)), jnp.float32)
    counts = {'pairs': jnp.float32(pairs), 'tokens': jnp.int32(tokens), 'positions': jnp.int32(256)}
    sums = metric_sums(logps, losses, objective) | {'counts': counts}
    metrics = {'sums': sums, 'grad_norm': jnp.float32(seed), 'updates': jnp.int32(max(seed - 1, 0))}
    metrics |= {'finite': jnp.array(finite), 'spikes': jnp.array(spikes)}
    return metrics, np.asarray(losses)[mask == 1], mask

  return make


def indices(mask, first):
  """pair_index [B, P] of a batch whose records are first, first + 1, ..."""
  index = np.full(mask.shape, -1)
  index[mask == 1] = first + np.arange(int(mask.sum()))
  return index


def test_a_report_is_the_mean_over_the_pairs_of_its_window(make_step, recorder):
  """Steps 1 | 2 3 | 4 5 6, of unequal numbers of pairs; a mean of means would be another number."""
  monitor = make_monitor(recorder, log_every=3)
  losses = {}
  for step, pairs in enumerate([5, 1, 8, 2, 7, 3], start=1):
    metrics, losses[step], mask = make_step(pairs, seed=step, tokens=10 * step)
    monitor.add(step, metrics, indices(mask, 0))
  monitor.pause()
  assert [(step, split) for step, split, _ in recorder.written] == [
    (1, 'train'),
    (3, 'train'),
    (6, 'train'),
  ]
  for (step, _, values), window in zip(recorder.written, ([1], [2, 3], [4, 5, 6]), strict=True):
    seen = np.concatenate([losses[each] for each in window])
    assert values['dpo_loss'] == pytest.approx(seen.mean(), rel=1e-5)
    assert values['pairs'] == len(seen)
    assert values['tokens'] == sum(10 * each for each in window)
    expected = 1 - values['tokens'] / (256 * len(window))
    assert values['padding_fraction'] == pytest.approx(expected)
    assert values['grad_norm'] == step
    assert values['learning_rate'] == pytest.approx(0.001 * (step - 1))


def test_a_step_is_read_only_after_the_next_was_handed_over(make_step, recorder):
  monitor = make_monitor(recorder, log_every=1)
  metrics, _, mask = make_step(2)
  monitor.add(1, metrics, indices(mask, 0))
  assert recorder.written == []
  monitor.add(2, metrics, indices(mask, 0))
  assert [step for step, _, _ in recorder.written] == [1]
  monitor.flush()
  monitor.flush()
  assert [step for step, _, _ in recorder.written] == [1, 2]


def test_rates_leave_out_the_compiler_and_what_is_not_training(make_step, recorder, clock):
  monitor = make_monitor(recorder, log_every=2)
  for step in (1, 2, 3, 4, 5, 6):
    clock[0] += 1000 if step == 1 else 2
    metrics, _, mask = make_step(4, tokens=10 * step)
    monitor.add(step, metrics, indices(mask, 0))
    if step == 3:
      clock[0] += 2
      monitor.pause()
      clock[0] += 500  # an evaluation
  clock[0] += 2
  monitor.pause()
  rates = [values.get('tokens_per_second') for _, _, values in recorder.written]
  # Step 1 compiles; step 4 follows an evaluation: neither's time is known, so neither counts.
  assert rates == [None, 20 / 2, 30 / 2, (50 + 60) / 4]
  assert recorder.written[1][2]['pairs_per_second'] == 4 / 2


@pytest.mark.parametrize('read', ['add', 'pause'])
def test_a_step_that_is_not_finite_stops_the_run_naming_step_and_records(make_step, recorder, read):
  monitor = make_monitor(recorder, log_every=1)
  good, _, mask = make_step(2)
  bad, _, _ = make_step(2, finite=False, seed=9)
  monitor.add(1, good, indices(mask, 0))
  monitor.add(2, bad, indices(mask, 10))
  with pytest.raises(FloatingPointError, match=r'step 2: .*records \[10, 11\]'):
    monitor.pause() if read == 'pause' else monitor.add(3, good, indices(mask, 20))
  assert [step for step, _, _ in recorder.written] == [1]


@pytest.mark.parametrize('kind', [{'finite': False}, {'spikes': True}], ids=str)
def test_skipped_steps_are_named_and_counted_until_there_are_too_many_in_a_row(
  make_step, recorder, kind
):
  monitor = make_monitor(recorder, log_every=4, max_skipped=2)
  good, losses, mask = make_step(2)
  bad, _, _ = make_step(2, seed=9, **kind)
  for step, metrics in enumerate([good, bad, bad, good, bad, bad, bad], start=1):
    monitor.add(step, metrics, indices(mask, 10 * step))
  assert [told.split(':')[0] for told in recorder.said] == ['step 2', 'step 3', 'step 5', 'step 6']
  assert 'records [20, 21]' in recorder.said[0]
  with pytest.raises(FloatingPointError, match=r'step 7: .* 3 steps in a row'):
    monitor.flush()
  last = recorder.written[-1]
  assert (last[0], last[2]['skipped_steps']) == (4, 2)
  assert last[2]['dpo_loss'] == pytest.approx(losses.mean(), rel=1e-5)  # of what made an update


def test_a_window_of_skipped_steps_alone_is_reported(make_step, recorder):
  monitor = make_monitor(recorder, log_every=1, max_skipped=3)
  bad, _, mask = make_step(2, finite=False)
  monitor.add(1, bad, indices(mask, 0))
  monitor.flush()
  assert recorder.written[-1][2]['skipped_steps'] == 1
  assert 'dpo_loss' not in recorder.written[-1][2]


def test_sums_of_any_number_of_batches_give_one_mean(make_step):
  parts = [make_step(pairs, seed=pairs) for pairs in (1, 4, 8)]
  sums = jax.tree.map(lambda *leaves: sum(leaves), *(metrics['sums'] for metrics, _, _ in parts))
  values = summarize(sums)
  seen = np.concatenate([losses for _, losses, _ in parts])
  assert values['dpo_loss'] == pytest.approx(seen.mean(), rel=1e-5)
  assert (values['pairs'], values['tokens']) == (13, 300)
  assert values['padding_fraction'] == pytest.approx(1 - 300 / 768)
  assert all(isinstance(value, int | float) for value in values.values())


@pytest.mark.parametrize('split', [True, False])
def test_what_is_left_out_of_a_file_is_told_once(split):
  places = {'train': ['a.jsonl:7'], 'validation': ['a.jsonl:7' if split else 'b.jsonl:2']}
  shared = {'pairs': 3, 'rows': 1, 'padding_fraction': 0.5, 'dropped': {'empty response': 1}}
  shared |= {'too_long': 2, 'truncated': 0, 'too_long_examples': ['a.jsonl:9']}
  reports = {side: shared | {'examples': {'empty response': at}} for side, at in places.items()}
  lines = '\n'.join(reporting.data_lines(reports, 128))
  assert lines.count('1 left out: empty response') == (1 if split else 2)
  assert lines.count('2 left out: longer than a row, such as a.jsonl:9') == 2
