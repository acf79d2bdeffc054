"""Checkpoints: adapters, optimizer, step and identity of a run in one atomic Orbax step.

The base is not in them; the place in the data is the step.

Every use of Orbax is in this file, because its names still move.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_flax.learner.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """What a checkpoint may only be continued under."""

  config: Mapping[str, Any]  # the fields that change a run's numbers (config.identity)
  fingerprints: Mapping[str, str]  # of what the config names by path: data, base, reference

  def differences(self, other: 'RunIdentity') -> list[str]:
    """Says each difference to the run that wants to go on: name, saved and new value."""
    found = []
    for mine, theirs in ((self.config, other.config), (self.fingerprints, other.fingerprints)):
      for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
          found.append(f'{name}: saved {mine.get(name)!r}, now {theirs.get(name)!r}')
    return found


# Where Orbax moves a step before it deletes it.
_TRASH = 'trash'


class Checkpoints:
  """The steps of one run, saved in one directory."""

  def __init__(self, directory: epath.PathLike, identity: RunIdentity, *, keep: int):
    self.identity = identity
    self.directory = epath.Path(directory).resolve()  # Orbax wants an absolute path
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      # A step deleted in place is, when a kill comes between, listed and broken; a rename is
      # atomic. Object stores have no rename.
      todelete_subdir=None if '://' in str(self.directory) else _TRASH,
      enable_async_checkpointing=True,
    )
    handlers = {'state': ocp.StandardCheckpointHandler(), 'run': ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def latest(self) -> int | None:
    """Returns the newest complete step, None when there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, step: int):
    """Starts writing `state` as `step`; returns once the arrays are copied off the devices."""
    self._empty_trash()
    record = {'step': step, **dataclasses.asdict(self.identity)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_named_arrays(state)), run=ocp.args.JsonSave(record)
      ),
    )

  def resume(self, state: TrainState) -> tuple[TrainState, int]:
    """Returns the newest step's state and number; `state` and 0 where nothing is saved.

    Raises:
      ValueError: it was saved under another identity; names what differs.
    """
    step = self.latest()
    if step is None:
      return state, 0
    differences = self.saved_identity(step).differences(self.identity)
    if differences:
      raise ValueError(
        f'{self.directory} holds step {step} of another run:\n  '
        + '\n  '.join(differences)
        + '\nSet these back to go on with it, or choose another workdir.'
      )
    return self.restore(state, step), step

  def restore(self, state: TrainState, step: int) -> TrainState:
    """Returns the state saved as `step`, on the shardings of `state`.

    Raises:
      ValueError: a saved array has another shape or dtype than `state` (Orbax would cast it).
    """
    named = _named_arrays(state)
    saved = self._manager.item_metadata(step)['state']
    for name, array in named.items():
      there = saved.get(name)
      if there is None or (tuple(there.shape), there.dtype) != (array.shape, array.dtype):
        found = 'nothing' if there is None else f'{there.dtype}{list(there.shape)}'
        raise ValueError(
          f'checkpoint {self.directory}/{step}: {name} is {found}, '
          f'this run needs {array.dtype}{list(array.shape)}'
        )
    targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
    restored = self._manager.restore(step, args=args)['state']
    return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in named])

  def saved_identity(self, step: int) -> RunIdentity:
    """Returns what the run that saved `step` was."""
    args = ocp.args.Composite(run=ocp.args.JsonRestore())
    record = self._manager.restore(step, args=args)['run']
    return RunIdentity(record['config'], record['fingerprints'])

  def close(self):
    """Waits for the last save and raises its error if it failed."""
    self._manager.wait_until_finished()
    self._manager.close()
    self._empty_trash()

  def _empty_trash(self):
    """Orbax moves old steps out of the way, and leaves it at that."""
    self._manager.wait_until_finished()
    trash = self.directory / _TRASH
    if jax.process_index() == 0 and trash.exists():
      trash.rmtree()


def _named_arrays(state: TrainState) -> dict[str, jax.Array]:
  """Path -> array, in the order of the state's leaves."""
  leaves = jax.tree.leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
