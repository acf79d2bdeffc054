"""Ends runs at any moment by SIGKILL or SIGTERM: the next one goes on, to the same bits.

    python tests/faults/kill.py --rounds=200
    python tests/faults/kill.py --rounds=200 --signal=TERM
    python tests/faults/kill.py --rounds=100 --processes=2
    python tests/faults/kill.py --rounds=50 --method=full

A round is one signal, at a random time after the start or as soon as the run does something that
is to be disturbed: builds the token cache, compiles, saves, deletes an old step, exports. After it
every listed step must be whole; after five of them in one workdir, or at the end of the run, the
command runs to its end, and its final state and metrics must be those of a run that nothing befell.
With two processes the signal goes to either, and the other must end within 30 s, non-zero, naming
it; here SIGSTOP, which freezes it, and SIGINT, by which it leaves, may be sent as well. Prints how
often each moment was met and what the runs had to say.
"""

import argparse
import collections
import glob
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from etils import epath

import runs
from dpo_flax.checkpoints import manifest

SIGNALS_PER_RUN = 5
PATIENCE = {'TERM': 10, 'KILL': 30, 'STOP': 30, 'INT': 30}  # seconds until the processes end
PREEMPTED, LOST_PEER, INTERRUPTED = 75, 69, 130

# What is seen in the workdir at the moments worth disturbing.
MOMENTS = {
  'any time': None,
  'tokenizing': 'token_cache',
  'starting': 'metrics.jsonl',
  'saving': 'checkpoints/*.unfinished',
  'writing arrays': 'checkpoints/*.unfinished/state*',
  'sealing': f'checkpoints/*.unfinished/{manifest.NAME}',
  'saved': 'checkpoints/?',
  'deleting': 'checkpoints/*.deleted',
  'exporting': '.[mp]e*',
  'exported': '[mp]e*',
}

METHODS = {
  'lora': (),
  'dora': ('--config.tuning.method=dora',),
  'full': ('--config.tuning.method=full', *runs.WITHOUT_ADAPTERS),
}


def start(
  workdir: pathlib.Path, processes: int, devices: int = 0, flags: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
  """Starts the run on so many processes of so many devices each; 0: two devices in all."""
  command, devices = runs.arguments(workdir, *flags), devices or 2 // processes
  if processes == 1:
    return [runs.start(command, devices=devices)]
  with socket.create_server(('127.0.0.1', 0)) as server:
    shared = [f'--coordinator=127.0.0.1:{server.getsockname()[1]}', f'--num_processes={processes}']
  shared.append('--join_timeout=20')
  numbers = [f'--process_id={i}' for i in range(processes)]
  return [runs.start([*command, *shared, number], devices=devices) for number in numbers]


class Trial:
  """Signals to the runs of one workdir, until one of them comes to the end."""

  def __init__(self, options: argparse.Namespace, workdir: pathlib.Path, seconds: float):
    self.options, self.workdir, self.seconds = options, workdir, seconds
    self.faults: list[str] = []
    self._ended: dict[subprocess.Popen[str], tuple[int, str]] = {}

  def run(self) -> list[tuple[int, str]]:
    """Runs to the end; returns the exit codes and errors of all processes."""
    return self._finish(self._start())

  def disturb(self, seen: collections.Counter) -> bool:
    """Starts the run and ends it by one signal; returns whether it was still running."""
    generator, name = self.options.generator, self.options.signal
    # What is in the workdir from the first start on cannot be met again.
    gone = {'tokenizing', 'starting'} if (self.workdir / 'metrics.jsonl').exists() else set()
    moment = generator.choice([moment for moment in MOMENTS if moment not in gone])
    processes = self._start()
    victim = generator.randrange(len(processes))
    if not self._wait(moment, processes, generator):
      self._finish(processes)
      return False
    processes[victim].send_signal(signal.Signals[f'SIG{name}'])
    if name == 'TERM' and generator.random() < 0.5:
      time.sleep(generator.uniform(0, 0.5))
      processes[victim].send_signal(signal.SIGTERM)
    since = time.monotonic()
    if name == 'STOP':
      self._finish([process for process in processes if process is not processes[victim]])
      processes[victim].kill()
    ended = self._finish(processes)
    waited = time.monotonic() - since
    if waited > PATIENCE[name]:
      self.faults.append(f'{moment}: took {waited:.0f} s to end')
    self._judge(moment, ended, victim)
    seen[moment, ', '.join(str(code) for code, _ in ended)] += 1
    self._check_steps()
    return True

  def _start(self) -> list[subprocess.Popen[str]]:
    flags = METHODS[self.options.method]
    return start(self.workdir, self.options.processes, flags=flags)

  def _wait(self, moment: str, processes, generator: random.Random) -> bool:
    """Waits for a moment that was not there before; whether it came before the end."""
    pattern = MOMENTS[moment]
    before = self._seen(pattern)
    until = time.monotonic() + (generator.uniform(0, self.seconds) if pattern is None else 600)
    while time.monotonic() < until:
      if any(process.poll() is not None for process in processes):
        return False
      if self._seen(pattern) - before:
        time.sleep(generator.expovariate(1 / 0.02))
        break
      time.sleep(0.001)
    return all(process.poll() is None for process in processes)

  def _seen(self, pattern: str | None) -> set[str]:
    # pathlib's glob fails when a directory goes away under it.
    return set(glob.glob(pattern, root_dir=self.workdir)) if pattern else set()

  def _finish(self, processes) -> list[tuple[int, str]]:
    """Waits for all; returns their exit codes and errors."""
    ended = []
    for process in processes:
      if process in self._ended:
        ended.append(self._ended[process])
        continue
      try:
        _, errors = process.communicate(timeout=120)
      except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        self.faults.append(f'did not end: {errors[-500:]}')
      self._ended[process] = process.returncode, errors
      ended.append(self._ended[process])
    return ended

  def _judge(self, moment: str, ended: list[tuple[int, str]], victim: int):
    code, errors = ended[victim]
    if self.options.signal == 'TERM':
      # Before the flags are read it is Python that ends; and a run may just have come to its end.
      well = code in {PREEMPTED, -signal.SIGTERM, 0}
      if saved := re.search(r'step (\d+) of \d+ is saved', errors):
        well = well and int(saved[1]) == runs.listed_steps(self.workdir)[-1]
      others = {PREEMPTED, LOST_PEER, 0}
    else:
      well, others = code in {-signal.SIGKILL, 0, INTERRUPTED, -signal.SIGINT}, {LOST_PEER, 0}
    if not well:
      self.faults.append(f'{moment}: exit code {code}: {errors[-800:]}')
    for number, (other, said) in enumerate(ended):
      named = f'process {victim} of' in said or other in {0, PREEMPTED}
      if number != victim and not (other in others and named):
        self.faults.append(f'{moment}, {victim} hit: {number} ended with {other}: {said[-800:]}')

  def _check_steps(self):
    for step in runs.listed_steps(self.workdir):
      if found := manifest.faults(epath.Path(self.workdir / 'checkpoints' / str(step))):
        self.faults.append(f'step {step} is listed and broken: {found}')

  def compare(self, expected: pathlib.Path):
    """Runs to the end and compares with a run that nothing befell."""
    ended = self.run()
    if any(code for code, _ in ended):
      self.faults.append(f'did not go on: {ended}')
      return
    for what in (lambda workdir: runs.digest(workdir, runs.STEPS), runs.metrics):
      if what(self.workdir) != what(expected):
        self.faults.append(f'the end differs: {what(self.workdir)} for {what(expected)}')


def kills(options: argparse.Namespace, directory: pathlib.Path) -> bool:
  """Returns whether nothing was lost in any round."""
  # Where a shell's background job ignores it, so would the runs.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  whole = directory / 'whole'
  for _ in range(2):  # the second finds the programs compiled
    shutil.rmtree(whole, ignore_errors=True)
    since = time.monotonic()
    ended = Trial(options, whole, 0).run()
    assert not any(code for code, _ in ended), ended
  seconds = time.monotonic() - since
  seen, faults, done, trials = collections.Counter(), [], 0, 0
  while done < options.rounds:
    workdir = directory / f'trial{trials}'
    trial = Trial(options, workdir, seconds)
    for _ in range(min(SIGNALS_PER_RUN, options.rounds - done)):
      done += trial.disturb(seen)
    trial.compare(whole)
    trials += 1
    print(f'{done} signals, {trials} runs to the end', flush=True)
    faults += trial.faults
    for fault in trial.faults:
      print(f'trial {trials}, after {done} signals: {fault}', flush=True)
    shutil.rmtree(workdir)
  for (moment, codes), count in sorted(seen.items()):
    print(f'{count:4} x {moment:16} exit codes {codes}')
  print(f'{done} signals, {trials} runs to the end, {len(faults)} faults')
  return not faults


if __name__ == '__main__':
  runs.main(
    kills,
    rounds=200,
    doc=__doc__,
    options={
      'signal': {'choices': list(PATIENCE), 'default': 'KILL'},
      'processes': {'type': int, 'default': 1},
      'method': {'choices': list(METHODS), 'default': 'lora'},
    },
  )
