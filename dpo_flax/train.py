"""The command that trains: python -m dpo_flax.train --config=configs/tiny.py.

Reads top to bottom: check the config, prepare the data, build the models, restore or start, then
step after step train, save, evaluate and export.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping

import grain
import jax
from absl import logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from dpo_flax.assembly import assemble
from dpo_flax.assembly.assemble import Run
from dpo_flax.assembly.models import count_parameters
from dpo_flax.assembly.run_record import write_record
from dpo_flax.checkpoints.checkpoint import Checkpoints
from dpo_flax.config.checks import validate
from dpo_flax.config.identity import shared
from dpo_flax.data import loader
from dpo_flax.exports.exporting import check_outputs, export_adapter, export_merged, output_paths
from dpo_flax.exports.model_card import CardFacts
from dpo_flax.files.paths import access_errors
from dpo_flax.losses.metrics import displacement
from dpo_flax.losses.objective import Objective
from dpo_flax.planning.remedies import explained, remedies
from dpo_flax.runtime import command, hosts
from dpo_flax.runtime.lock import holder, sole_writer
from dpo_flax.runtime.preemption import Preempted, Preemption
from dpo_flax.sharding import make_mesh, row_shard, shard_batch
from dpo_flax.training.monitor import Monitor
from dpo_flax.training.optimizer import make_schedule
from dpo_flax.training.reporter import Reporter, data_lines, displacement_warning, summarize
from dpo_flax.training.state import TrainState

# Mean difference per token, in nats, that rounding alone can make between two equal models.
_ROUNDING = {'float32': 1e-4, 'bfloat16': 2e-2}


@dataclasses.dataclass(frozen=True)
class RunOutputs:
  """Where a run reports, saves and exports to, and the signal that stops it."""

  reporter: Reporter
  checkpoints: Checkpoints
  preemption: Preemption
  exports: Mapping[str, epath.Path]  # format -> where the policy is exported to


def train(config: ConfigDict) -> dict[str, float]:
  """Runs or resumes the training that `config` describes; returns the last validation's metrics.

  Raises:
    ValueError: the config, the data, the weights or the checkpoint to resume from are unfit, or
      another process writes to the workdir.
    FloatingPointError: a loss or gradient was not finite.
    SaveError: a checkpoint could not be written.
    Preempted: SIGTERM has stopped it; the same call goes on.
  """
  settings = validate(config)
  workdir = epath.Path(settings.workdir)
  exports = output_paths(
    settings.workdir,
    method=settings.tuning.method,
    peft=settings.peft_save_path,
    merged=settings.merged_hf_save_path,
  )
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    preemption = enter(Preemption(hosts.peers(), grace=settings.train.grace_seconds))
    # Before the devices, which take long to begin and which the run that writes there may hold.
    lock = enter(sole_writer(workdir)) if hosts.peers().index == 0 else None
    mesh = make_mesh(settings.mesh.sizes())
    enter(jax.set_mesh(mesh))
    changes = functools.partial(remedies, settings, mesh)
    enter(explained(changes))
    hosts.check_agreement(shared(settings.flat_json()))
    hosts.check_agreement({'lock in workdir': lock or holder(workdir)})  # a disk of each host's own
    hosts.first_does(
      lambda: check_outputs(exports, workdir=settings.workdir, sources=settings.weight_paths())
    )
    run, state = assemble.build(settings, mesh)
    checkpoints = enter(contextlib.closing(make_checkpoints(run)))
    state, done = checkpoints.resume(state, allow_data_change=settings.allow_data_change)
    check_room_to_learn(run, done)
    hosts.first_does(lambda: write_record(run.record, workdir))
    reporter = Reporter(
      workdir, start_step=done, num_steps=run.num_steps, is_writer=jax.process_index() == 0
    )
    enter(contextlib.closing(reporter))
    announce(run, state, done, reporter)
    loop = TrainingLoop(run, state, done, RunOutputs(reporter, checkpoints, preemption, exports))
    with explained(changes, state, run.frozen):
      loop.run_steps()
    finish(loop)
  return loop.held_out


def make_checkpoints(run: Run) -> Checkpoints:
  """Returns the run's checkpoints, which do with a failed save what the config states."""
  train = run.settings.train
  directory = epath.Path(run.settings.workdir) / 'checkpoints'
  if train.on_save_error == 'stop':
    return Checkpoints(directory, run.identity, keep=train.keep)

  def go_on(error):
    logging.error('%s. Training goes on without it (train.on_save_error=continue).', error)

  return Checkpoints(directory, run.identity, keep=train.keep, on_error=go_on)


class TrainingLoop:
  """The steps of a run, from the one that is done to the last."""

  def __init__(self, run: Run, state: TrainState, done: int, outputs: RunOutputs):
    self.run, self.outputs, self.state = run, outputs, state
    self.done = self.saved = done
    self.held_out = outputs.reporter.written(done, 'validation')
    self._monitor = make_monitor(run, outputs.reporter)
    self._train_step, self._eval_step = run.make_steps()
    outputs.preemption.save_unless(lambda: (outputs.checkpoints.latest() or 0) == self.done)

  def run_steps(self):
    """Trains, saves, evaluates and exports until the last step is done."""
    settings = self.run.settings
    try:
      if self.done == 0:
        check_start(self.run, self.state, self._eval_step)
      # A run that was stopped while it evaluated has saved that step already.
      if not self.held_out and (self.done == 0 or self._is_due(settings.train.eval_every)):
        self._evaluate()
      with contextlib.closing(train_batches(self.run, self.done)) as batches:
        while self.done < self.run.num_steps:
          self.outputs.preemption.check()
          self._train(next(batches))
          is_export_due = self.done < self.run.num_steps and self._is_due(settings.hf_save_steps)
          if is_export_due or self._is_due(settings.train.save_every):
            self._save()
          if self._is_due(settings.train.eval_every):
            self._evaluate()
          if is_export_due:
            self._export()
    except Preempted:
      self._save_and_stop()

  def _train(self, batch):
    run = self.run
    self.state, metrics = self._train_step(self.state, run.frozen, shard_batch(batch, run.mesh))
    self.done += 1
    self._monitor.add(self.done, metrics, batch['pair_index'])
    self.outputs.checkpoints.check()

  def _save(self):
    self._monitor.pause()
    self.outputs.checkpoints.save(self.state, self.done)
    self.saved = self.done

  def _evaluate(self):
    self._monitor.pause()
    reporter = self.outputs.reporter
    held_out = held_out_metrics(self.run, self.state, self._eval_step, self.outputs.preemption)
    if held_out:
      start = reporter.written(0, 'validation') if self.done else held_out
      held_out.update(displacement(held_out, start))
      reporter.write(self.done, 'validation', held_out)
    self.held_out = held_out

  def _export(self):
    self._monitor.pause()
    try:
      save_exports(self.run, self.state, self.done, self.outputs)
    except access_errors() as error:
      # Several processes can only go on together.
      if self.run.settings.train.on_save_error == 'stop' or jax.process_count() > 1:
        raise
      logging.error('no export after step %d: %s', self.done, error)

  def _save_and_stop(self):
    if self.saved != self.done:
      self._save()
    if self.done:
      self.outputs.checkpoints.finish(self.done)
    raise Preempted(f'step {self.done} of {self.run.num_steps} is saved')

  def _is_due(self, every: int) -> bool:
    """Whether something done every `every` steps (0: never) and at the end is due now."""
    return self.done == self.run.num_steps or (every > 0 and self.done % every == 0)


def check_room_to_learn(run: Run, done: int):
  """Refuses a checkpoint from beyond the end, as after `allow_data_change` to fewer data."""
  if done > run.num_steps:
    raise ValueError(
      f'{run.settings.workdir} holds step {done}, and with these data the run ends after step '
      f'{run.num_steps}: raise train.num_epochs, or choose another workdir'
    )


def train_batches(run: Run, start_step: int) -> grain.DatasetIterator:
  """Returns this process's rows of batch `start_step` and all after it."""
  index, count = row_shard(run.mesh)
  return loader.train_batches(
    run.data,
    start_step=start_step,
    shard_index=index,
    shard_count=count,
    workers=run.settings.data.workers,
  )


def held_out_metrics(
  run: Run, state: TrainState, eval_step, preemption: Preemption
) -> dict[str, float]:
  """Returns the metrics over every validation pair, each counted once; {} with no validation."""
  if run.data.validation is None:
    return {}
  index, count = row_shard(run.mesh)
  batches = loader.validation_batches(run.data, shard_index=index, shard_count=count)
  sums = []
  with contextlib.closing(batches):
    for batch in batches:
      preemption.check()
      sums.append(jax.device_get(eval_step(state, run.frozen, shard_batch(batch, run.mesh))))
  return summarize(jax.tree.map(lambda *parts: sum(parts), *sums))


def check_start(run: Run, state: TrainState, eval_step):
  """Stops a run whose policy is to start as its reference, and does not.

  Where the two are the same function, every log-ratio is 0 and DPO's loss is ln 2.
  """
  objective = run.options.objective
  if not (run.blueprint.sources.starts_as_reference() and objective.needs_reference):
    return
  with contextlib.closing(train_batches(run, 0)) as batches:
    sums = eval_step(state, run.frozen, shard_batch(next(batches), run.mesh))
  metrics = summarize(jax.device_get(sums))
  drift = max(
    abs(math.log(metrics[f'policy_perplexity_{side}'] / metrics[f'reference_perplexity_{side}']))
    for side in ('chosen', 'rejected')
  )
  rounding = _ROUNDING[run.settings.model.dtype]
  # Plain DPO's loss is known; others' are not, but their policy must be the reference all the same.
  is_plain = is_plain_dpo(objective, run.data.train.columns)
  off = abs(metrics['dpo_loss'] - math.log(2)) if is_plain else 0.0
  if not (drift <= rounding and off <= rounding):
    raise ValueError(
      f'before the first step dpo_loss is {metrics["dpo_loss"]:.6f}, and policy and reference '
      f'differ by {drift:.2g} nats per token, where they are to be equal (ln 2 = 0.693147 for the '
      'sigmoid loss). Their adapters or weights disagree; no step was made.'
    )


def is_plain_dpo(objective: Objective, columns: Collection[str]) -> bool:
  """Whether the loss is ln 2 where policy and reference agree.

  Args:
    objective: of the run.
    columns: the optional fields that the records give.
  """
  changes_loss = (
    objective.sft_weight
    or objective.kl_penalty_weight
    or objective.wpo
    or objective.reference_free
    or 'margin' in columns
  )
  is_sigmoid = objective.loss == ('sigmoid',) and objective.loss_weights == (1.0,)
  return is_sigmoid and not changes_loss


def make_monitor(run: Run, reporter: Reporter) -> Monitor:
  """Returns what checks and reports the training steps."""

  def describe(pair_index):
    return ', '.join(run.data.where('train', i) for i in pair_index[pair_index >= 0].tolist())

  return Monitor(
    reporter,
    log_every=run.settings.train.log_every,
    max_skipped=run.settings.optimizer.max_skipped_steps,
    learning_rate=make_schedule(run.settings.optimizer, run.num_steps),
    describe=describe,
  )


def save_exports(run: Run, state: TrainState, step: int, outputs: RunOutputs):
  """Writes the policy as it is after `step` for other programs to load, and reports where."""
  policy = nnx.merge(run.graphdef, state.trainable, run.frozen).policy
  facts = CardFacts(run.record, step, outputs.reporter.written(step, 'validation'))
  for name, output in outputs.exports.items():
    if name == 'peft':
      assert run.blueprint.lora is not None
      export_adapter(policy, run.blueprint.lora, facts, output, run.mesh)
    else:
      export_merged(policy, run.blueprint.sources.base, facts, output, run.mesh)
    outputs.reporter.say(f'wrote {output}')


def announce(run: Run, state: TrainState, start_step: int, reporter: Reporter):
  """Reports what is about to run."""
  policy = nnx.merge(run.graphdef, state.trainable, run.frozen).policy
  total, trainable = count_parameters(policy)
  if start_step == 0:
    counts = {
      'parameter_count': total,
      'trainable_parameter_count': trainable,
      'fraction_trainable': trainable / total,
    }
    reporter.write(0, 'train', counts)
  for line in data_lines(run.data.report, run.settings.batch.tokens):
    reporter.say(line)
  reporter.say(
    f'{total:,} parameters, {trainable:,} trainable ({trainable / total:.2%}); '
    f'mesh {dict(run.mesh.shape)} on {jax.devices()[0].device_kind}'
  )
  if start_step:
    reporter.say(f'resuming after step {start_step} of {run.num_steps}')


def finish(loop: TrainingLoop):
  """Exports the result, and reports how the run went."""
  run, reporter, held_out = loop.run, loop.outputs.reporter, loop.held_out
  loop.outputs.checkpoints.finish(run.num_steps)
  if held_out:
    reporter.say(
      f'held-out dpo_accuracy {held_out["dpo_accuracy"]:.3f} over {held_out["pairs"]} pairs'
    )
  if warning := displacement_warning(held_out):
    reporter.say(warning)
  save_exports(run, loop.state, run.num_steps, loop.outputs)


if __name__ == '__main__':
  command.run(train, on_every_host=True)
