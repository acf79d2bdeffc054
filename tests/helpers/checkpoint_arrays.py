"""The arrays of a saved step, as Orbax alone reads them."""

import pathlib

import numpy as np
import orbax.checkpoint as ocp


def read(step: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns path -> array of the step in a directory."""
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.metadata(step / 'state').item_metadata
    targets = {name: np.zeros(array.shape, array.dtype) for name, array in saved.items()}
    return checkpointer.restore(step / 'state', targets)  # whatever devices they were saved on
