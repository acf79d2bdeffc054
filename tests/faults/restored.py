"""Resumes a run as the command does, and prints what it found: step, state and next batches.

python tests/faults/restored.py --config=configs/tiny.py --config.workdir=... --config.mesh.fsdp=2
"""

import hashlib
import json

import jax
import numpy as np
from etils import epath

from dpo_flax import train
from dpo_flax.assembly import assemble
from dpo_flax.checkpoints.checkpoint import Checkpoints
from dpo_flax.config.checks import validate
from dpo_flax.runtime import command
from dpo_flax.sharding import make_mesh

BATCHES = 3


def sha256(arrays) -> str:
  """Returns the SHA-256 of arrays' dtypes, shapes and bytes, in order."""
  digest = hashlib.sha256()
  for array in map(np.asarray, arrays):
    digest.update(f'{array.dtype} {array.shape}'.encode() + array.tobytes())
  return digest.hexdigest()


def show(config):
  """Prints the restored step, and digests of the restored state and of the batches after it."""
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run, state = assemble.build(validate(config), mesh)
    checkpoints = Checkpoints(epath.Path(config.workdir) / 'checkpoints', run.identity, keep=9)
    state, step = checkpoints.resume(state)
    checkpoints.close()
    batches = train.train_batches(run, step)
    rows = [array for _ in range(BATCHES) for _, array in sorted(next(batches).items())]
    batches.close()
  named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
  state = sha256(leaf for _, leaf in sorted(named.items()))
  print(json.dumps({'step': step, 'state': state, 'batches': sha256(rows)}))


if __name__ == '__main__':
  command.run(show)
