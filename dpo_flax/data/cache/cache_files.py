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
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import IO, Any

import numpy as np
from etils import epath

from dpo_flax.data.records.source import Record
from dpo_flax.data.tokens.encode import Chunk
from dpo_flax.files.atomic import sha256_of, write_file
from dpo_flax.files.paths import access_errors

RECORDS = 1 << 14  # of a shard
SHOWN = 5  # places named for each reason a record was dropped
MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class ShardReport:
  """What a shard's .json holds."""

  read: int
  kept: int
  formats: dict[str, int]
  dropped: dict[str, int]  # reason -> records
  examples: dict[str, list[tuple[int, int, str]]]  # reason -> the first (file, line, message)
  largest_id: int
  largest_id_pair: int  # the first pair that has it, by its place in the shard
  sha256: dict[str, str]  # of the other files


def shard_name(number: int) -> str:
  """Returns the common part of the names of a shard's files."""
  return f'{number:05}'


class ShardWriter:
  """Collects the chunks of one shard; `close` writes it."""

  def __init__(self, directory: epath.Path, number: int, files: list[str]):
    self._directory, self._name = directory, shard_name(number)
    self._files = {file: i for i, file in enumerate(files)}
    self._chunks: list[Chunk] = []
    self._places: list[tuple[int, int]] = []  # (file, line) of every pair
    self._examples: dict[str, list[tuple[int, int, str]]] = collections.defaultdict(list)
    self._dropped: collections.Counter[str] = collections.Counter()

  def add(self, chunk: Chunk, records: list[Record]) -> None:
    """Takes a chunk and the records it was made of."""
    place = [(self._files[record.file], record.number) for record in records]
    self._chunks.append(chunk)
    self._places += [place[i - chunk.first] for i in chunk.records.tolist()]
    for i, reason, message in chunk.faults:
      self._dropped[reason] += 1
      if len(self._examples[reason]) < SHOWN:
        self._examples[reason].append((*place[i], message))

  def close(self) -> None:
    """Writes the shard's files, its .json last."""
    chunks = self._chunks
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    places = np.array(self._places, np.int32).reshape(-1, 2)
    arrays = {
      'lengths': np.concatenate([chunk.lengths for chunk in chunks]),
      'records': np.concatenate([chunk.records for chunk in chunks]),
      'prompts': np.concatenate([chunk.prompts for chunk in chunks]),
      'files': places[:, 0],
      'lines': places[:, 1],
    }
    for name in chunks[0].columns:
      arrays[name] = np.concatenate([chunk.columns[name] for chunk in chunks])
    sha256 = {
      f'{self._name}.tokens': self._write('tokens', tokens.tobytes()),
      f'{self._name}.npz': self._write('npz', lambda file: np.savez(file, **arrays)),
    }
    report = self._report(tokens, arrays['lengths'], sha256)
    self._write('json', json.dumps(dataclasses.asdict(report)))

  def _report(self, tokens: np.ndarray, lengths: np.ndarray, sha256: dict[str, str]) -> ShardReport:
    ids = np.where(tokens < 0, ~tokens, tokens)
    at = int(ids.argmax()) if len(ids) else 0
    read, dropped = sum(chunk.read for chunk in self._chunks), dict(self._dropped)
    return ShardReport(
      read=read,
      kept=read - sum(dropped.values()),
      formats=dict(sum((chunk.formats for chunk in self._chunks), collections.Counter())),
      dropped=dropped,
      examples=dict(self._examples),
      largest_id=int(ids[at]) if len(ids) else -1,
      largest_id_pair=int(np.searchsorted(lengths.sum(axis=1).cumsum(), at, side='right')),
      sha256=sha256,
    )

  def _write(self, suffix: str, content: str | bytes | Callable[[IO[bytes]], Any]) -> str:
    # Where a file system knows no locks, others may build this cache as well.
    return write_file(self._directory / f'{self._name}.{suffix}', content, concurrent=True)


def write_manifest(directory: epath.Path, fingerprint: str, files: list[str], shards: int) -> None:
  """Completes a cache."""
  names = [f'{shard_name(number)}.json' for number in range(shards)]
  sha256 = {name: sha256_of(directory / name) for name in names}
  manifest = {'fingerprint': fingerprint, 'files': files, 'sha256': sha256}
  write_file(directory / MANIFEST, json.dumps(manifest, indent=1), concurrent=True)


def read_manifest(directory: epath.Path) -> dict[str, Any]:
  """Returns the manifest of a complete cache."""
  return json.loads((directory / MANIFEST).read_text())


def read_report(directory: epath.Path, number: int) -> ShardReport:
  """Returns what the .json of a shard says."""
  return ShardReport(**json.loads((directory / f'{shard_name(number)}.json').read_text()))


def file_names(directory: epath.Path) -> list[str]:
  """Returns the files of a complete cache, the manifest last."""
  shards = range(len(read_manifest(directory)['sha256']))
  suffixes = ('tokens', 'npz', 'json')
  return [f'{shard_name(i)}.{suffix}' for i in shards for suffix in suffixes] + [MANIFEST]


def whole_shards(directory: epath.Path) -> set[int]:
  """Returns the shards whose files are there and as they were written."""
  names = sorted(path.stem for path in directory.glob('*.json') if path.stem.isdigit())
  with futures.ThreadPoolExecutor() as threads:
    whole = list(threads.map(lambda name: _is_whole(directory, int(name)), names))
  return {int(name) for name, is_whole in zip(names, whole, strict=True) if is_whole}


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
  return whole_shards(directory) >= set(range(len(sha256)))


def _is_whole(directory: epath.Path, number: int) -> bool:
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
