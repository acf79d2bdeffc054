"""The command that trains: python -m dpo_flax.train --config=configs/tiny.py.

Reads top to bottom: check the config, prepare the data, build the models, restore or start, then
step after step train, evaluate, save and export.
"""

import contextlib
import math

import grain
import jax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from dpo_flax import assemble, command
from dpo_flax.assemble import Run
from dpo_flax.checkpoint import Checkpoints
from dpo_flax.data import loader
from dpo_flax.export import export
from dpo_flax.learner.optimizer import make_schedule
from dpo_flax.learner.state import TrainState
from dpo_flax.models import count_parameters
from dpo_flax.objective.metrics import displacement
from dpo_flax.reporting import Monitor, Reporter, displacement_warning, summarize
from dpo_flax.sharding import make_mesh, row_shard, shard_batch
from dpo_flax.validation import validate

# Mean difference per token, in nats, that rounding alone can make between two equal models.
_ROUNDING = {'float32': 1e-4, 'bfloat16': 2e-2}


def train(config: ConfigDict) -> dict[str, float]:
  """Runs or resumes the training that `config` describes; returns the last validation's metrics.

  Raises:
    ValueError: the config, the data, the weights or the checkpoint to resume from are unfit.
    FloatingPointError: a loss or gradient was not finite.
  """
  config = validate(config)
  mesh = make_mesh(config.mesh)
  workdir = epath.Path(config.workdir)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    run, state = assemble.build(config, mesh)
    checkpoints = Checkpoints(workdir / 'checkpoints', run.identity, keep=config.train.keep)
    stack.enter_context(contextlib.closing(checkpoints))
    state, start_step = checkpoints.resume(state)
    reporter = Reporter(
      workdir,
      start_step=start_step,
      num_steps=run.num_steps,
      speaks=jax.process_index() == 0,
    )
    stack.enter_context(contextlib.closing(reporter))
    introduce(run, state, start_step, reporter)
    state, held_out = learn(run, state, start_step, checkpoints, reporter)
    conclude(run, state, held_out, reporter)
  return held_out


def learn(
  run: Run, state: TrainState, start_step: int, checkpoints: Checkpoints, reporter: Reporter
) -> tuple[TrainState, dict[str, float]]:
  """Trains from `start_step` to the end; returns the last state and validation metrics."""
  config, last = run.config, run.num_steps
  train_step, eval_step = assemble.make_steps(
    run.graphdef, run.options, optimizer=run.optimizer, mesh=run.mesh
  )
  monitor = make_monitor(run, reporter)
  held_out = {}

  def evaluate(step):
    nonlocal held_out
    held_out = held_out_metrics(run, state, eval_step)
    if held_out:
      start = reporter.written(0, 'validation') if step else held_out
      held_out.update(displacement(held_out, start))
      reporter.write(step, 'validation', held_out)

  if start_step == 0:
    check_start(run, state, eval_step)
    evaluate(0)
  with contextlib.closing(train_batches(run, start_step)) as batches:
    for step in range(start_step + 1, last + 1):
      batch = next(batches)
      state, metrics = train_step(state, run.frozen, shard_batch(batch, run.mesh))
      monitor.add(step, metrics, batch['pair_index'])
      if is_due(step, config.train.eval_every, last):
        monitor.pause()
        evaluate(step)
      if is_due(step, config.train.save_every, last):
        monitor.pause()
        checkpoints.save(state, step)
      if is_due(step, config.hf_save_steps, last) and step < last:
        monitor.pause()
        save_exports(run, state)
  if start_step == last:
    held_out = reporter.written(last, 'validation')
  return state, held_out


def is_due(step: int, every: int, last: int) -> bool:
  """Whether something done every `every` steps (0: never) and at the end is due after `step`."""
  return step == last or (every > 0 and step % every == 0)


def train_batches(run: Run, start_step: int) -> grain.DatasetIterator:
  """Returns this process's rows of batch `start_step` and all after it."""
  index, count = row_shard(run.mesh)
  return loader.train_batches(
    run.data, run.config, start_step=start_step, shard_index=index, shard_count=count
  )


def held_out_metrics(run: Run, state: TrainState, eval_step) -> dict[str, float]:
  """Returns the metrics over every validation pair, each counted once; {} with no validation."""
  if run.data.validation is None:
    return {}
  index, count = row_shard(run.mesh)
  batches = loader.validation_batches(run.data, run.config, shard_index=index, shard_count=count)
  with contextlib.closing(batches):
    sums = [
      jax.device_get(eval_step(state, run.frozen, shard_batch(batch, run.mesh)))
      for batch in batches
    ]
  return summarize(jax.tree.map(lambda *parts: sum(parts), *sums))


def check_start(run: Run, state: TrainState, eval_step):
  """Stops a run whose policy is to start as its reference, and does not.

  Where the two are the same function, every log-ratio is 0 and DPO's loss is ln 2.
  """
  if not (run.starts_as_reference and run.options.objective.needs_reference):
    return
  with contextlib.closing(train_batches(run, 0)) as batches:
    sums = eval_step(state, run.frozen, shard_batch(next(batches), run.mesh))
  metrics = summarize(jax.device_get(sums))
  drift = max(
    abs(math.log(metrics[f'policy_perplexity_{side}'] / metrics[f'reference_perplexity_{side}']))
    for side in ('chosen', 'rejected')
  )
  rounding = _ROUNDING[run.config.model.dtype]
  # Plain DPO's loss is known; others' are not, but their policy must be the reference all the same.
  off = abs(metrics['dpo_loss'] - math.log(2)) if is_plain_dpo(run) else 0.0
  if not (drift <= rounding and off <= rounding):
    raise ValueError(
      f'before the first step dpo_loss is {metrics["dpo_loss"]:.6f}, and policy and reference '
      f'differ by {drift:.2g} nats per token, where they are to be equal (ln 2 = 0.693147 for the '
      'sigmoid loss). Their adapters or weights disagree; no step was made.'
    )


def is_plain_dpo(run: Run) -> bool:
  """Whether the loss is ln 2 where policy and reference agree."""
  objective = run.options.objective
  return objective.loss == ('sigmoid',) and not (
    objective.sft_weight or objective.reference_free or 'margin' in run.data.train.columns
  )


def make_monitor(run: Run, reporter: Reporter) -> Monitor:
  """Returns what checks and reports the training steps."""

  def describe(pair_index):
    return ', '.join(run.data.where('train', i) for i in pair_index[pair_index >= 0].tolist())

  return Monitor(
    reporter,
    log_every=run.config.train.log_every,
    learning_rate=make_schedule(run.config.optimizer, run.num_steps),
    describe=describe,
  )


def save_exports(run: Run, state: TrainState) -> list[epath.Path]:
  """Writes the policy as it is now for other programs to load; returns where."""
  policy = nnx.merge(run.graphdef, state.trainable, run.frozen).policy
  return export(run.config, policy, run.lora, run.base)


def introduce(run: Run, state: TrainState, start_step: int, reporter: Reporter):
  """Says what is about to run."""
  policy = nnx.merge(run.graphdef, state.trainable, run.frozen).policy
  total, trainable = count_parameters(policy)
  if start_step == 0:
    counts = {
      'parameter_count': total,
      'trainable_parameter_count': trainable,
      'fraction_trainable': trainable / total,
    }
    reporter.write(0, 'train', counts)
  for side, report in run.data.report.items():
    reporter.say(
      f'{side}: {report["pairs"]} pairs in {report["rows"]} rows of {run.config.batch.tokens} '
      f'tokens, {report["padding_fraction"]:.2%} padding'
    )
    left_out = report['dropped'] | {'longer than a row': report['too_long']}
    for reason, count in left_out.items():
      if count:
        examples = report['examples'].get(reason) or report['too_long_examples']
        reporter.say(f'  {count} left out: {reason}, such as {examples[0]}')
    if report['truncated']:
      reporter.say(
        f'  {report["truncated"]} prompts cut, such as {report["truncated_examples"][0]}'
      )
  reporter.say(
    f'{total:,} parameters, {trainable:,} trainable ({trainable / total:.2%}); '
    f'mesh {dict(run.mesh.shape)} on {jax.devices()[0].device_kind}'
  )
  if start_step:
    reporter.say(f'resuming after step {start_step} of {run.num_steps}')


def conclude(run: Run, state: TrainState, held_out: dict[str, float], reporter: Reporter):
  """Exports the result, and says how it went."""
  if held_out:
    reporter.say(
      f'held-out dpo_accuracy {held_out["dpo_accuracy"]:.3f} over {held_out["pairs"]} pairs'
    )
  if warning := displacement_warning(held_out):
    reporter.say(warning)
  for path in save_exports(run, state):
    reporter.say(f'wrote {path}')


if __name__ == '__main__':
  command.run(train, on_every_host=True)
