"""Every record tokenized once to disk.

A cache is named by the fingerprint of all that decides its content: the data's bytes, the
tokenizer's files, the template, the format and the version of this code. One of many processes
builds it, on as many cores as there are; the others wait.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Set

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
  """How records become tokens, and where these are kept."""

  cache_dir: str
  format: FormatOptions
  bad_record: str = 'raise'  # raise | skip
  workers: int = 0  # processes that tokenize; 0: one a core, for much data


def open_or_build(source: RecordSource, tokenizer: Tokenizer, reading: ReadOptions) -> TokenCache:
  """Opens the cache of these records under these settings, after building what of it is missing.

  Every byte is checked against its checksum; shards that are damaged are built again.

  Args:
    source: the records.
    tokenizer: makes the ids.
    reading: how records are read, and the directory of many caches, local or gs://.

  Raises:
    ValueError: a record that cannot be used, with its file and line, unless bad_record is 'skip';
      no record that can be used.
  """
  parts = [VERSION, source.fingerprint, tokenizer.fingerprint, dataclasses.astuple(reading.format)]
  fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  path = fresh(epath.Path(reading.cache_dir) / fingerprint[:16])
  local = local_directory(path)
  with cache_files.locked(local, shared=True):
    complete = cache_files.is_complete(local, fingerprint)
  if not complete:
    with cache_files.locked(local):
      if local != path and (path / cache_files.MANIFEST).exists():
        cache_files.copy_cache(path, local)
      if not cache_files.is_complete(local, fingerprint):  # no other process was faster
        shards = _build(source, tokenizer, local, reading)
        cache_files.write_manifest(local, fingerprint, source.files, shards)
  if local != path and not fresh(path / cache_files.MANIFEST).exists():
    cache_files.copy_cache(local, path)
  cache = TokenCache(str(path))
  cache.files = source.files  # the same bytes may now be under another name
  dropped = cache.report.dropped
  if dropped and reading.bad_record == 'raise':
    raise ValueError(_refusal(next(iter(cache.report.examples.values()))[0]))
  if not len(cache):
    raise ValueError(
      f'none of the {cache.report.read} records in {", ".join(source.files)} can be used: {dropped}'
    )
  return cache


def _build(
  source: RecordSource, tokenizer: Tokenizer, directory: epath.Path, reading: ReadOptions
) -> int:
  """Makes the missing shards of a cache, with one of them in memory; returns the number of all."""
  for left in directory.glob(f'*{SUFFIX}'):
    left.unlink()
  if (directory / cache_files.MANIFEST).exists():
    logging.warning('%s is damaged; what is wrong is built again.', directory)
    (directory / cache_files.MANIFEST).unlink()
  shards = cache_files.intact_shards(directory)
  tasks = _missing(source, frozenset(shards))
  workers = worker_count(reading.workers, source.size)
  chunks = encode_all(tasks, tokenizer, reading.format, workers=workers)
  checked = _checked(chunks, source, reading.bad_record)
  for number, of_shard in itertools.groupby(checked, lambda chunk: _shard(chunk.first)):
    cache_files.write_shard(directory, number, source.files, of_shard)
    shards.add(number)
  return len(shards)


def _missing(source: RecordSource, intact: Set[int]) -> Iterator[Task]:
  """Yields the records whose shards are not intact."""
  records, first = iter(source), 0
  while chunk := list(itertools.islice(records, _CHUNK)):
    if _shard(first) not in intact:
      yield first, chunk
    first += len(chunk)


def _shard(record: int) -> int:
  return record // cache_files.RECORDS


def _checked(chunks: Iterator[Chunk], source: RecordSource, bad_record: str) -> Iterator[Chunk]:
  """Yields the chunks and shows how far they are; refuses a bad record unless these are skipped."""
  hidden = not sys.stderr.isatty()
  options = {'desc': 'tokenizing', 'unit': 'B', 'unit_scale': True, 'disable': hidden}
  with tqdm.tqdm(total=source.size, **options) as bar:
    for chunk in chunks:
      if chunk.faults and bad_record == 'raise':
        file, line, _, message = chunk.faults[0]
        raise ValueError(_refusal(f'{file}:{line}: {message}'))
      yield chunk
      bar.update(source.position - bar.n)


def _refusal(message: str) -> str:
  return f'{message}. Mend the record, or set data.bad_record=skip to leave such records out.'
