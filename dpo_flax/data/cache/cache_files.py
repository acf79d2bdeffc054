"""The files of a token cache.

A cache is a directory of shards, each of the same number of records, and a manifest:

  00000.tokens   int32, pair after pair: prompt, chosen, rejected
  00000.npz      lengths [n, 3] int32, records [n] (index in the source), files, lines [n],
                 prompts [n] uint64 (hash of the prompt), columns [n] float32 (NaN: none)
  00000.json     what became of the records, the largest id, SHA-256 of the other two files
  manifest.json  SHA-256 of the .json files; written last

A shard exists when its .json does, a cache when its manifest does: a build that was killed goes on
with the next shard. Every file comes into being by a rename.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath

from dpo_flax.data.tokens.encode import Chunk
from dpo_flax.files.atomic import sha256_of, write_file
from dpo_flax.files.paths import access_errors

RECORDS = 1 << 14  # of a shard
SHOWN = 5  # lines named for each reason a record was dropped
MANIFEST = 'manifest.json'
# Where a file system knows no locks, others may build this cache as well.
_write = functools.partial(write_file, concurrent=True)


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the records: read = kept + the sum of dropped."""

  read: int
  kept: int  # a record of several comparisons is one record
  formats: dict[str, int]  # format -> records recognised as such
  dropped: dict[str, int]  # reason -> records
  examples: dict[str, list[Any]]  # reason -> 'file:line: message' of the first few


@dataclasses.dataclass(frozen=True)
class ShardReport(Report):
  """What a shard's .json holds; an example is [index of the file, line, message]."""

  largest_id: int
  largest_id_pair: int  # the first pair that has it, by its index in the shard
  sha256: dict[str, str]  # of the other files


def shard_name(number: int) -> str:
  """Returns the common part of the names of a shard's files."""
  return f'{number:05}'


def write_shard(
  directory: epath.Path,
  number: int,
  files: list[str],  # of the source
  chunks: Iterable[Chunk],  # of the shard
) -> None:
  """Writes the files of one shard, its .json last."""
  chunks = list(chunks)
  arrays: dict[str, Any] = {
    name: np.concatenate([chunk.arrays[name] for chunk in chunks]) for name in chunks[0].arrays
  }
  tokens = arrays.pop('tokens')
  index = {file: i for i, file in enumerate(files)}
  lines = [(index[file], line) for chunk in chunks for file, line in chunk.lines]
  arrays['files'], arrays['lines'] = np.array(lines, np.int32).reshape(-1, 2).T
  examples, dropped = collections.defaultdict(list), collections.Counter()
  for file, line, reason, message in itertools.chain(*(chunk.faults for chunk in chunks)):
    dropped[reason] += 1
    if len(examples[reason]) < SHOWN:
      examples[reason].append((index[file], line, message))
  stem = directory / shard_name(number)
  sha256 = {
    f'{stem.name}.tokens': _write(f'{stem}.tokens', tokens.tobytes()),
    f'{stem.name}.npz': _write(f'{stem}.npz', lambda file: np.savez(file, **arrays)),
  }
  read = sum(chunk.read for chunk in chunks)
  largest_id, largest_id_pair = _largest_id(tokens, arrays['lengths'])
  report = ShardReport(
    read=read,
    kept=read - dropped.total(),
    formats=dict(sum((chunk.formats for chunk in chunks), collections.Counter())),
    dropped=dict(dropped),
    examples=dict(examples),
    largest_id=largest_id,
    largest_id_pair=largest_id_pair,
    sha256=sha256,
  )
  _write(f'{stem}.json', json.dumps(dataclasses.asdict(report)))


def _largest_id(tokens: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
  """Returns the largest id, -1 where there is none, and the first pair that has it."""
  if not len(tokens):
    return -1, 0
  ids = np.where(tokens < 0, ~tokens, tokens)
  at = int(ids.argmax())
  return int(ids[at]), int(np.searchsorted(lengths.sum(axis=1).cumsum(), at, side='right'))


def write_manifest(directory: epath.Path, fingerprint: str, files: list[str], shards: int) -> None:
  """Completes a cache."""
  names = [f'{shard_name(number)}.json' for number in range(shards)]
  sha256 = {name: sha256_of(directory / name) for name in names}
  manifest = {'fingerprint': fingerprint, 'files': files, 'sha256': sha256}
  _write(directory / MANIFEST, json.dumps(manifest, indent=1))


def read_manifest(directory: epath.Path) -> dict[str, Any]:
  """Returns the manifest of a complete cache."""
  return json.loads((directory / MANIFEST).read_text())


def read_report(directory: epath.Path, number: int) -> ShardReport:
  """Returns what the .json of a shard holds."""
  return ShardReport(**json.loads((directory / f'{shard_name(number)}.json').read_text()))


def copy_cache(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a complete cache, the manifest last."""
  target.mkdir(parents=True, exist_ok=True)
  shards = range(len(read_manifest(source)['sha256']))
  names = [f'{shard_name(i)}.{suffix}' for i in shards for suffix in ('tokens', 'npz', 'json')]
  for name in [*names, MANIFEST]:
    (source / name).copy(target / name, overwrite=True)


def intact_shards(directory: epath.Path) -> set[int]:
  """Returns the shards whose files are there and as they were written."""
  numbers = [int(path.stem) for path in directory.glob('*.json') if path.stem.isdigit()]
  with futures.ThreadPoolExecutor() as threads:
    intact = threads.map(lambda number: _is_intact(directory, number), numbers)
    return set(itertools.compress(numbers, intact))


def is_complete(directory: epath.Path, fingerprint: str) -> bool:
  """Whether the cache of this fingerprint is there and every byte of it is as it was written."""
  try:
    manifest = read_manifest(directory)
    sha256, files = manifest['sha256'], manifest['files']
    if manifest['fingerprint'] != fingerprint or not isinstance(files, list) or not sha256:
      return False
    if any(sha256_of(directory / name) != digest for name, digest in sha256.items()):
      return False
  except (ValueError, KeyError, TypeError, AttributeError, *access_errors()):
    return False
  return intact_shards(directory) >= set(range(len(sha256)))


def _is_intact(directory: epath.Path, number: int) -> bool:
  try:
    report = read_report(directory, number)
    return all(sha256_of(directory / name) == digest for name, digest in report.sha256.items())
  except (ValueError, TypeError, *access_errors()):
    return False


@contextlib.contextmanager
def locked(directory: epath.Path, *, shared: bool = False) -> Iterator[None]:
  """Waits until no other process, on any host of a shared disk, builds this cache.

  A process that is killed gives its lock back. Where a file system knows no locks, several may
  build at once; they write the same bytes.
  """
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / 'lock').open('ab') as file:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    yield
