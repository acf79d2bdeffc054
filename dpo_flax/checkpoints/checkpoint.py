"""Checkpoints: a pytree of arrays, its step and the identity of its run in one atomic step.

Of a training run the arrays are adapters and optimizer; the base is not among them, and the
position in the data is the step. Orbax writes and reads the arrays; steps.py knows which steps are
intact, identity.py which run may go on from one.

Every use of Orbax is in this file, because its names still move.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dpo_flax.checkpoints import steps
from dpo_flax.checkpoints.identity import Identity, check_identity
from dpo_flax.files.messages import first_of
from dpo_flax.files.paths import absolute, access_errors, is_remote
from dpo_flax.runtime import hosts

_STATE = 'state'

# What a save may take beyond the arrays' bytes: their names, the manifest, file system blocks.
_OVERHEAD_BYTES = 1 << 20

Tree = TypeVar('Tree')  # a pytree of arrays


class SaveError(OSError):
  """A step could not be saved; those before it are as they were."""


def _raise(error: SaveError) -> NoReturn:
  raise error


class Checkpoints:
  """The steps of one run, saved in one directory.

  Every process of the run makes the same calls in the same order.

  >>> import tempfile
  >>> directory = tempfile.mkdtemp()
  >>> checkpoints = Checkpoints(directory, keep=2)
  >>> checkpoints.save({'weight': jnp.ones(3)}, 7)
  >>> checkpoints.finish(7)
  >>> tree, step = checkpoints.resume({'weight': jnp.zeros(3)})
  >>> tree['weight'].sum().item(), step
  (3.0, 7)
  >>> checkpoints.close()

  Args:
    directory: local or in an object store; made where it does not exist.
    identity: of the run; None: any run goes on from here.
    keep: how many of the newest steps are kept.
    on_error: is called with the error of a step that could not be saved; raises it by default.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    identity: Identity | None = None,
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
    return max(steps.finished(self.directory), default=None)

  def save(self, state: Any, step: int):
    """Starts writing a pytree of arrays as `step`; returns once they are copied off the devices.

    What goes wrong meanwhile is passed to `on_error`, with its step: by the next call of
    `check`, `save` or `close` at the latest.

    Raises:
      FloatingPointError: the state holds a value that is not finite.
      ValueError: the state is no tree of arrays, or a later step is saved already.
    """
    self.check(wait=True)
    arrays = _named_arrays(state)
    _check_arrays(arrays, count=len(jax.tree.leaves(state)))
    if (latest := self.latest()) is not None and step < latest:
      raise ValueError(f'step {step} would be dropped: {self.directory} holds step {latest}')
    _check_finite(arrays, step)
    if not self._begin(state, step):
      return
    path = steps.unfinished_path(self.directory, step) / _STATE
    self._checkpointer.save(path, args=ocp.args.StandardSave(arrays))
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

  def resume(self, state: Tree, *, allow_data_change: bool = False) -> tuple[Tree, int]:
    """Returns the newest intact step's state and number; `state` and 0 where nothing is saved.

    Raises:
      ValueError: it was saved under another identity; names what differs.
    """
    step = self._newest_intact()
    if step is None:
      return state, 0
    if self.identity is not None:
      check_identity(self.directory, step, self.identity, allow_data_change)
    return self.restore(state, step), step

  def restore(self, state: Tree, step: int) -> Tree:
    """Returns the state saved as `step`, on the shardings of `state`.

    Raises:
      ValueError: a saved array has another shape or dtype than `state` (Orbax would cast it).
    """
    return restore(self.directory, step, state)

  def close(self):
    """Waits for the last save and handles its error if it failed."""
    try:
      self.check(wait=True)
    finally:
      self._thread.shutdown()
      self._checkpointer.close()

  def _newest_intact(self) -> int | None:
    """The newest step without a fault, as the first process finds it."""
    found = None
    if jax.process_index() == 0:
      steps.clean(self.directory)
      found = steps.newest_intact(self.directory)
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
    return None if agreed < 0 else agreed

  def _begin(self, state: Any, step: int) -> bool:
    """Makes the directory to write to, on the first process; whether all may go on."""

    def make():
      self._check_room(state)
      steps.begin(self.directory, step)
      identity = {} if self.identity is None else dataclasses.asdict(self.identity)
      record = {'step': step, **identity}
      (steps.unfinished_path(self.directory, step) / steps.RECORD).write_text(
        json.dumps(record, indent=2)
      )

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

  def _check_room(self, state: Any):
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


def _check_arrays(arrays: dict[str, Any], *, count: int):
  if len(arrays) < count:
    raise ValueError('two arrays of the state have one name: its keys must not have dots')
  for name, array in arrays.items():
    if not isinstance(array, jax.Array | np.ndarray):
      raise ValueError(f'{name} is a {type(array).__name__}: a state is saved as arrays')
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
      raise ValueError(f'{name} is a key: save jax.random.key_data of it')


def _check_finite(arrays: dict[str, jax.Array], step: int):
  finite = jax.device_get(_are_finite(arrays))
  bad = [name for name, is_finite in finite.items() if not is_finite]
  if bad:
    raise FloatingPointError(
      f'step {step} is not saved: values that are not finite in {first_of(bad)}'
    )


def restore(directory: epath.PathLike, step: int, tree: Tree, *, part: str = '') -> Tree:
  """Returns arrays of `step` in the structure and on the shardings of `tree`.

  The step must be intact (`steps.find_intact`). A running training is not touched.

  Args:
    directory: of the steps.
    step: its number.
    tree: a pytree of arrays or of jax.ShapeDtypeStruct with shardings.
    part: the path in what was saved at which `tree` was, such as 'trainable'; the rest is not read.

  Raises:
    ValueError: a saved array has another shape or dtype than in `tree` (Orbax would cast it).
  """
  prefix = f'{part}.' if part else ''
  wanted = {prefix + name: array for name, array in _named_arrays(tree).items()}
  path = absolute(directory) / str(step) / _STATE
  targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  args = ocp.args.PyTreeRestore(
    targets,
    restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
    partial_restore=bool(part),
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    saved = checkpointer.metadata(path).item_metadata
    for name, array in wanted.items():
      there = saved.get(name)
      if there is None or (tuple(there.shape), there.dtype) != (array.shape, array.dtype):
        found = 'nothing' if there is None else f'{there.dtype}{list(there.shape)}'
        raise ValueError(
          f'checkpoint {directory}/{step}: {name} is {found}, '
          f'this run needs {array.dtype}{list(array.shape)}'
        )
    restored = checkpointer.restore(path, args=args)
  return jax.tree.unflatten(jax.tree.structure(tree), [restored[name] for name in wanted])


def _named_arrays(tree: Any) -> dict[str, jax.Array]:
  """Path -> array, in the order of the tree's leaves."""
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
