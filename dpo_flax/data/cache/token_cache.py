"""Reading the tokenized pairs: cache_files.py describes the files of a cache."""

import collections
import functools
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from dpo_flax.data.cache import cache_files
from dpo_flax.data.records.preference import COLUMNS
from dpo_flax.files.paths import is_remote

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected, int32


class TokenCache:
  """An opened cache of N pairs; tokens are memory-mapped. Pickles as its path alone."""

  def __init__(self, path: str):
    self.path = path
    self._directory = local_directory(epath.Path(path))
    manifest = cache_files.read_manifest(self._directory)
    self.fingerprint: str = manifest['fingerprint']
    self.files: list[str] = manifest['files']
    self._shards = range(len(manifest['sha256']))
    arrays = collections.defaultdict(list)
    for number in self._shards:
      with np.load(self._directory / f'{cache_files.shard_name(number)}.npz') as shard:
        for name in shard.files:
          arrays[name].append(shard[name])
    columns = {name: np.concatenate(parts) for name, parts in arrays.items()}
    self.lengths: np.ndarray = columns['lengths']  # [N, 3]
    self.records: np.ndarray = columns['records']  # [N], increasing
    self.prompts: np.ndarray = columns['prompts']  # [N] uint64
    self.file: np.ndarray = columns['files']  # [N] index in `files`
    self._line: np.ndarray = columns['lines']  # [N]
    # [N] float32, NaN where a record has none; those that some record has
    self.columns = {name: columns[name] for name in COLUMNS if not np.isnan(columns[name]).all()}
    counts = [len(lengths) for lengths in arrays['lengths']]
    self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # [N]
    ends = [lengths.sum(axis=1, dtype=np.int64).cumsum() for lengths in arrays['lengths']]
    self._end = np.concatenate(ends)  # [N] of the pair, in its shard's tokens

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, pair: int) -> Ids:
    """Returns prompt, chosen and rejected ids, int32."""
    return self.many(np.array([pair]))[0]

  def many(self, pairs: np.ndarray) -> list[Ids]:
    """Returns the ids of several pairs."""
    lengths = self.lengths[pairs]
    starts = self._end[pairs] - lengths.sum(axis=1)
    shards = [self._tokens[shard] for shard in self._shard[pairs].tolist()]
    ends = (starts[:, None] + lengths.cumsum(axis=1)).tolist()
    return [
      (tokens[a:b], tokens[b:c], tokens[c:d])
      for tokens, a, (b, c, d) in zip(shards, starts.tolist(), ends, strict=True)
    ]

  def __reduce__(self) -> tuple[Any, ...]:
    return TokenCache, (self.path,)

  @functools.cached_property
  def report(self) -> cache_files.Report:
    """What became of the records."""
    reports = self._reports
    examples = collections.defaultdict(list)
    for report in reports:
      for reason, found in report.examples.items():
        examples[reason] += [f'{self.files[file]}:{line}: {text}' for file, line, text in found]
    return cache_files.Report(
      read=sum(report.read for report in reports),
      kept=sum(report.kept for report in reports),
      formats=_total(report.formats for report in reports),
      dropped=_total(report.dropped for report in reports),
      examples={reason: shown[: cache_files.SHOWN] for reason, shown in examples.items()},
    )

  @functools.cached_property
  def _reports(self) -> list[cache_files.ShardReport]:
    return [cache_files.read_report(self._directory, number) for number in self._shards]

  @functools.cached_property
  def _tokens(self) -> list[np.ndarray]:
    """The ids of each shard, int32, mapped from disk."""
    paths = [
      self._directory / f'{cache_files.shard_name(number)}.tokens' for number in self._shards
    ]
    # Plain arrays over the mapped bytes: slicing an np.memmap costs several times as much.
    return [
      np.asarray(np.memmap(path, np.int32, 'r')) if path.stat().length else np.zeros(0, np.int32)
      for path in paths
    ]

  def where(self, pair: int) -> str:
    """Returns 'file:line' of a pair, by its index in the cache."""
    return f'{self.files[self.file[pair]]}:{self._line[pair]}'

  def check_ids(self, vocab_size: int) -> None:
    """Raises ValueError if a token id has no row in the embedding."""
    for number, report in zip(self._shards, self._reports, strict=True):
      if report.largest_id >= vocab_size:
        pair = int(np.searchsorted(self._shard, number)) + report.largest_id_pair
        raise ValueError(
          f'{self.where(pair)}: token id {report.largest_id} is beyond the embedding, which has '
          f'{vocab_size} rows. The tokenizer is not the one the model was trained with: set '
          'data.tokenizer.'
        )


def local_directory(path: epath.Path) -> epath.Path:
  """Returns the directory whose files are mapped: `path`, or its mirror on a local disk."""
  if not is_remote(path):
    return path
  return epath.Path(tempfile.gettempdir()) / 'dpo_flax_token_cache' / path.name


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
  return dict(sum(map(collections.Counter, counts), collections.Counter()))
