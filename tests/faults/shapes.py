"""Saves on one shape of machine, restores on others: the same bits, the same place in the data.

    python tests/faults/shapes.py --rounds=20

Each round saves on 8, 4, 2 or 1 devices under a random mesh, on one process or two, and restores
on smaller machines, one after the other, down to one device; then the command goes on from there to
the end, on one device.
"""

import argparse
import json
import pathlib
import random
import shutil

import kill
import runs

HALF = runs.STEPS // 2


def mesh(devices: int, generator: random.Random) -> list[str]:
  """Returns the flags of a random mesh over so many devices; four rows are to divide among it."""
  tensor = generator.choice([size for size in (1, 2, 4) if devices % size == 0])
  rest = devices // tensor
  if rest > 4:
    tensor, rest = devices // 4, 4
  data = generator.choice([size for size in (1, 2, 4) if rest % size == 0])
  sizes = {'data': data, 'fsdp': rest // data, 'tensor': tensor}
  return [f'--config.mesh.{axis}={size}' for axis, size in sizes.items()]


def restored(workdir: pathlib.Path, flags: list[str], devices: int) -> dict[str, str | int]:
  """Returns what is found on so many devices."""
  command = runs.arguments(workdir, *flags, program='tests/faults/restored.py')
  return json.loads(runs.must(command, devices=devices).stdout.splitlines()[-1])


def shapes(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether all shapes found the same."""
  generator, faults = options.generator, []
  half = f'--config.train.num_train_steps={HALF}'
  for number in range(options.rounds):
    workdir = directory / f'run{number}'
    devices, processes = generator.choice([(8, 1), (4, 1), (2, 1), (2, 2), (4, 2)])
    flags = [half, *mesh(devices, generator)]
    for process in kill.start(workdir, processes, devices // processes, flags):
      _, errors = process.communicate()
      assert process.returncode == 0, errors
    sizes = [size for size in (8, 4, 2, 1) if size <= devices]
    found = [restored(workdir, [half, *mesh(size, generator)], size) for size in sizes]
    if any(each != found[0] for each in found) or found[0]['step'] != HALF:
      faults.append(f'{found}')
    finished = runs.run(runs.arguments(workdir, half))
    if finished.returncode or f'resuming after step {HALF}' not in finished.stdout:
      faults.append(finished.stderr[-1000:])
    print(f'{processes} x {devices // processes} devices {flags[1:]} -> {sizes}', flush=True)
    shutil.rmtree(workdir)
  print(*faults, f'{len(faults)} faults', sep='\n')
  return not faults


if __name__ == '__main__':
  runs.main(shapes, rounds=20, doc=__doc__)
