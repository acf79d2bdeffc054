"""Checkpoints: adapters, optimizer, step and identity of a run in one atomic step.

The base is not in them; the place in the data is the step. Orbax writes and reads the arrays; which
step is whole is steps.py's to say.

Every use of Orbax is in this file, because its names still move.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from dpo_flax.checkpoints import steps
from dpo_flax.config.identity import RunIdentity
from dpo_flax.files.paths import absolute, access_errors, is_remote
from dpo_flax.runtime import hosts
from dpo_flax.training.state import TrainState

_STATE = 'state'

# What a save may take beyond the arrays' bytes: their names, the manifest, file system blocks.
_OVERHEAD_BYTES = 1 << 20


class SaveError(OSError):
  """A step could not be saved; those before it are as they were."""


def _raise(error: SaveError):
  raise error


class Checkpoints:
  """The steps of one run, saved in one directory.

  Every process of the run makes the same calls in the same order.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    identity: RunIdentity,
    *,
    keep: int,  # newest steps
    on_error: Callable[[SaveError], None] = _raise,
  ):
    self.identity = identity
    self.directory = absolute(directory)  # as Orbax wants it
    self._keep = keep
    self._on_error = on_error
    self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'commit')
    self._writing: tuple[int, concurrent.futures.Future] | None = None
    self._failed: SaveError | None = None  # the newest failure

  def latest(self) -> int | None:
    """Returns the newest finished step, None when there is none."""
    found = steps.finished(self.directory)
    return found[-1] if found else None

  def save(self, state: TrainState, step: int):
    """Starts writing `state` as `step`; returns once the arrays are copied off the devices.

    What goes wrong meanwhile is `on_error`'s, with the step that it befell: by the next call of
    `check`, `save` or `close` at the latest.

    Raises:
      FloatingPointError: the state holds a value that is not finite.
    """
    self.check(wait=True)
    _check_finite(state, step)
    if not self._begin(state, step):
      return
    place = steps.place(self.directory, step) / _STATE
    self._checkpointer.save(place, args=ocp.args.StandardSave(_named_arrays(state)))
    self._writing = step, self._thread.submit(self._commit, step)

  def check(self, *, wait: bool = False):
    """Hands the last save's error to `on_error`, if it is done and has failed."""
    if self._writing is None or not (wait or self._writing[1].done()):
      return
    (step, writing), self._writing = self._writing, None
    error = writing.exception()
    if error is not None:
      self._handle(step, error)

  def finish(self, step: int):
    """Waits until `step` is saved.

    Raises:
      SaveError: it is not.
    """
    self.check(wait=True)

    def require():
      if self.latest() != step:
        raise self._failed or SaveError(f'step {step} is not in {self.directory}')

    hosts.first_does(require)

  def resume(self, state: TrainState, *, allow_data_change: bool = False) -> tuple[TrainState, int]:
    """Returns the newest whole step's state and number; `state` and 0 where nothing is saved.

    Raises:
      ValueError: it was saved under another identity; names what differs.
    """
    step = self._newest_whole()
    if step is None:
      return state, 0
    found = saved_identity(self.directory, step).differences(self.identity)
    refused = [each for each in found if not (allow_data_change and each.is_of_the_data)]
    if refused:
      hint = (
        '\nTo go on in changed data all the same, set allow_data_change.'
        if all(each.is_of_the_data for each in refused)
        else ''
      )
      raise ValueError(
        f'{self.directory} holds step {step} of another run:\n  '
        + '\n  '.join(map(str, refused))
        + f'\nSet these back to go on with it, or choose another workdir.{hint}'
      )
    for each in found:
      logging.warning(
        'allow_data_change: going on from step %d in OTHER data or another order, so that pairs '
        'may be seen twice or never. %s',
        step,
        each,
      )
    return self.restore(state, step), step

  def restore(self, state: TrainState, step: int) -> TrainState:
    """Returns the state saved as `step`, on the shardings of `state`.

    Raises:
      ValueError: a saved array has another shape or dtype than `state` (Orbax would cast it).
    """
    named = _named_arrays(state)
    place = self.directory / str(step) / _STATE
    saved = self._checkpointer.metadata(place).item_metadata
    for name, array in named.items():
      there = saved.get(name)
      if there is None or (tuple(there.shape), there.dtype) != (array.shape, array.dtype):
        found = 'nothing' if there is None else f'{there.dtype}{list(there.shape)}'
        raise ValueError(
          f'checkpoint {self.directory}/{step}: {name} is {found}, '
          f'this run needs {array.dtype}{list(array.shape)}'
        )
    targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
    restored = self._checkpointer.restore(place, args=ocp.args.StandardRestore(targets))
    return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in named])

  def close(self):
    """Waits for the last save and handles its error if it failed."""
    try:
      self.check(wait=True)
    finally:
      self._thread.shutdown()
      self._checkpointer.close()

  def _newest_whole(self) -> int | None:
    """The newest step without a fault, as the first process finds it."""
    found = None
    if jax.process_index() == 0:
      steps.clean(self.directory)
      found = steps.newest_whole(self.directory)
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
    return None if agreed < 0 else agreed

  def _begin(self, state: TrainState, step: int) -> bool:
    """Makes the place to write to, on the first process; whether all may go on."""

    def make():
      self._check_room(state)
      steps.begin(self.directory, step)
      record = {'step': step, **dataclasses.asdict(self.identity)}
      (steps.place(self.directory, step) / steps.RECORD).write_text(json.dumps(record, indent=2))

    try:
      hosts.first_does(make)
    except (ValueError, *access_errors()) as error:
      self._handle(step, error)
      return False
    return True

  def _commit(self, step: int):
    """Runs beside training: waits for the arrays, then makes the step count."""
    self._checkpointer.wait_until_finished()  # for those of all processes
    if jax.process_index() == 0:
      steps.commit(self.directory, step)
      steps.keep_newest(self.directory, self._keep)

  def _check_room(self, state: TrainState):
    if is_remote(self.directory):
      return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD_BYTES
    self.directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(self.directory).free
    if free < needed:
      raise OSError(f'{free / 1e6:,.1f} MB are free, {needed / 1e6:,.1f} MB are needed')

  def _handle(self, step: int, error: BaseException):
    if jax.process_index() == 0:
      with contextlib.suppress(*access_errors()):
        steps.abandon(self.directory, step)  # it takes room
    newest = self.latest()
    kept = 'there is no earlier one' if newest is None else f'the newest one is step {newest}'
    self._failed = SaveError(f'step {step} could not be saved in {self.directory}: {error}; {kept}')
    self._on_error(self._failed)


@jax.jit
def _are_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return jax.tree.map(lambda array: jnp.all(jnp.isfinite(array)), arrays)


def _check_finite(state: TrainState, step: int):
  bad = [
    name for name, finite in jax.device_get(_are_finite(_named_arrays(state))).items() if not finite
  ]
  if bad:
    raise FloatingPointError(
      f'step {step} is not saved: values that are not finite in {", ".join(bad[:3])}'
      + (f' and {len(bad) - 3} more' if len(bad) > 3 else '')
    )


def newest_step(directory: epath.Path) -> int:
  """Returns the newest finished step.

  Raises:
    ValueError: there is none.
  """
  found = steps.finished(directory)
  if not found:
    raise ValueError(f'{directory} holds no checkpoint')
  return found[-1]


def saved_identity(directory: epath.Path, step: int) -> RunIdentity:
  """Returns what the run that saved `step` was."""
  record = json.loads((directory / str(step) / steps.RECORD).read_text())
  return RunIdentity(record['config'], record['fingerprints'])


def check_whole(directory: epath.Path, step: int):
  """Checks that a step is there and as it was saved.

  Raises:
    ValueError: there is no such step, or it is damaged.
  """
  found = steps.finished(directory)
  if step not in found:
    raise ValueError(f'{directory} holds no step {step}, but {", ".join(map(str, found))}')
  if faults := steps.faults(directory / str(step)):
    raise ValueError(f'{directory}/{step} is damaged: {faults[0]}')


def restore_trainable(directory: epath.Path, step: int, trainable: nnx.State) -> nnx.State:
  """Returns what the state saved as `step` learned, on the shardings of `trainable`.

  The step must be whole (`check_whole`). Neither the optimizer's part of its state nor a running
  training is touched.
  """
  arrays = {f'trainable.{name}': array for name, array in _named_arrays(trainable).items()}
  targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
  args = ocp.args.PyTreeRestore(
    targets,
    restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
    partial_restore=True,
  )
  place = absolute(directory) / str(step) / _STATE
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(place, args=args)
  return jax.tree.unflatten(jax.tree.structure(trainable), [restored[name] for name in arrays])


def _named_arrays(state: TrainState | nnx.State) -> dict[str, jax.Array]:
  """Path -> array, in the order of the state's leaves."""
  leaves = jax.tree.leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
