"""Every record tokenized once to disk.

A cache is named by the fingerprint of all that decides its content: the data's bytes, the
tokenizer's files, the template, the format and the version of this code. One of many processes
builds it, on as many cores as there are; the others wait.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator

import tqdm
from absl import logging
from etils import epath

from dpo_flax.data.cache import cache_files
from dpo_flax.data.cache.token_cache import TokenCache, local_directory
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.encode import Chunk, Task, encode_all, worker_count
from dpo_flax.data.tokens.tokenizer import Tokenizer
from dpo_flax.files.atomic import SUFFIX
from dpo_flax.files.paths import fresh

VERSION = 4  # of the files and of the code that decides token ids
_CHUNK = 256  # records that go to a process at once; divides cache_files.RECORDS


def open_or_build(
  source: RecordSource,
  tokenizer: Tokenizer,
  *,
  directory: str,
  options: FormatOptions,
  bad_record: str = 'raise',
  workers: int = 0,
) -> TokenCache:
  """Opens the cache of these records under these settings, after building what of it is missing.

  Every byte is checked against its checksum; shards that are damaged are built again.

  Args:
    source: the records.
    tokenizer: makes the ids.
    directory: local or gs://, of many caches.
    options: how records are read.
    bad_record: raise | skip.
    workers: processes that tokenize; 0: one a core, where the data are many.

  Raises:
    ValueError: a record that cannot be used, with its file and line, unless bad_record is 'skip';
      no record that can be used.
  """
  parts = [VERSION, source.fingerprint, tokenizer.fingerprint, dataclasses.astuple(options)]
  fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  path = fresh(epath.Path(directory) / fingerprint[:16])
  local = local_directory(path)
  with cache_files.locked(local, shared=True):
    complete = cache_files.is_complete(local, fingerprint)
  if not complete:
    with cache_files.locked(local):
      if local != path and (path / cache_files.MANIFEST).exists():
        _copy(path, local)
      if not cache_files.is_complete(local, fingerprint):  # no other process was faster
        build = _Build(source, local, bad_record=bad_record)
        shards = build.run(tokenizer, options, workers)
        cache_files.write_manifest(local, fingerprint, source.files, shards)
  if local != path and not fresh(path / cache_files.MANIFEST).exists():
    _copy(local, path)
  cache = TokenCache(str(path))
  cache.files = source.files  # the same bytes may now be under another name
  dropped = cache.report.dropped
  if dropped and bad_record == 'raise':
    raise ValueError(_refusal(next(iter(cache.report.examples.values()))[0]))
  if not len(cache):
    raise ValueError(
      f'none of the {cache.report.read} records in {", ".join(source.files)} can be used: {dropped}'
    )
  return cache


class _Build:
  """Makes the missing shards of a cache. Memory holds one shard and a few chunks."""

  def __init__(self, source: RecordSource, directory: epath.Path, *, bad_record: str):
    self._source, self._directory, self._bad_record = source, directory, bad_record
    for left in directory.glob(f'*{SUFFIX}'):
      left.unlink()
    if (directory / cache_files.MANIFEST).exists():
      logging.warning('%s is damaged; what is wrong is built again.', directory)
      (directory / cache_files.MANIFEST).unlink()
    self._whole = cache_files.whole_shards(directory)
    self._read = 0
    self._tasks: collections.deque[Task] = collections.deque()  # given out and not come back

  def run(self, tokenizer: Tokenizer, options: FormatOptions, workers: int) -> int:
    """Returns the number of shards, all of them whole."""
    workers = worker_count(workers, self._source.size)
    chunks = encode_all(self._missing(), tokenizer, options, workers=workers)
    with tqdm.tqdm(
      desc='tokenizing',
      total=self._source.size,
      unit='B',
      unit_scale=True,
      disable=not sys.stderr.isatty(),
    ) as bar:
      by_shard = itertools.groupby(chunks, lambda chunk: chunk.first // cache_files.RECORDS)
      for number, group in by_shard:
        writer = cache_files.ShardWriter(self._directory, number, self._source.files)
        for chunk in group:
          self._add(writer, chunk)
          bar.update(self._source.position - bar.n)
        writer.close()
    return -(-self._read // cache_files.RECORDS)

  def _missing(self) -> Iterator[Task]:
    """Yields the records of the shards that are not there, and remembers them."""
    records = iter(self._source)
    while chunk := list(itertools.islice(records, _CHUNK)):
      task = Task(self._read, chunk)
      self._read += len(chunk)
      if task.first // cache_files.RECORDS not in self._whole:
        self._tasks.append(task)
        yield task

  def _add(self, writer: cache_files.ShardWriter, chunk: Chunk) -> None:
    task = self._tasks.popleft()
    if chunk.faults and self._bad_record == 'raise':
      place, _, message = chunk.faults[0]
      raise ValueError(_refusal(f'{task.records[place].where}: {message}'))
    writer.add(chunk, task.records)


def _copy(source: epath.Path, target: epath.Path) -> None:
  target.mkdir(parents=True, exist_ok=True)
  for name in cache_files.file_names(source):
    (source / name).copy(target / name, overwrite=True)


def _refusal(message: str) -> str:
  return f'{message}. Mend the record, or set data.bad_record=skip to leave such records out.'
