"""Every record tokenized once to disk.

A cache is a directory named by the fingerprint of all that decides its content: the data's bytes,
the tokenizer's files, the template, the format and the version of this code. It is written under a
temporary name and renamed when complete, so it is whole or absent.

  tokens.bin    int32, pair after pair: prompt, chosen, rejected
  pairs.npz     lengths [N, 3] int32, records [N] (index in the source), files, lines [N],
                prompts [N] uint64 (hash of the prompt), and the columns that some record has
  manifest.json the source's files, counts of what was read, kept and dropped, sizes
"""

import array
import collections
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import uuid
from typing import Any

import numpy as np
from etils import epath

from dpo_flax.data import formats
from dpo_flax.data.source import Record, RecordError, RecordSource
from dpo_flax.data.tokenizer import EncodedPair, Tokenizer

VERSION = 1  # of the files and of the code that decides token ids
COLUMNS = ('chosen_probability', 'margin', 'weight')
_SHOWN = 5  # places named for each reason a record was dropped
_FILES = ('tokens.bin', 'pairs.npz', 'manifest.json')


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the records: read = kept + the sum of dropped."""

  read: int
  kept: int
  formats: dict[str, int]  # format -> records recognised as such
  dropped: dict[str, int]  # reason -> records
  examples: dict[str, list[str]]  # reason -> 'file:line: message' of the first few


class TokenCache:
  """An opened cache; tokens are memory-mapped. Pickles as its path alone."""

  def __init__(self, path: str):
    self.path = path
    self._local = _mirror(epath.Path(path))
    manifest = json.loads((self._local / 'manifest.json').read_text())
    self.fingerprint: str = manifest['fingerprint']
    self.files: list[str] = manifest['files']
    self.report = Report(**manifest['report'])
    with np.load(self._local / 'pairs.npz') as pairs:
      columns = {name: pairs[name] for name in pairs.files}
    self.lengths: np.ndarray = columns.pop('lengths')  # [N, 3]
    self.records: np.ndarray = columns.pop('records')  # [N], increasing
    self.prompts: np.ndarray = columns.pop('prompts')  # [N] uint64
    self._file, self._line = columns.pop('files'), columns.pop('lines')
    self.columns: dict[str, np.ndarray] = columns  # [N] float32, NaN where a record has none
    self.starts = np.zeros(len(self.lengths) + 1, np.int64)
    np.cumsum(self.lengths.sum(axis=1, dtype=np.int64), out=self.starts[1:])
    size = (self._local / 'tokens.bin').stat().length
    if size != 4 * self.starts[-1]:
      raise ValueError(
        f'{path}/tokens.bin has {size} bytes, expected {4 * self.starts[-1]}: delete {path} and '
        'run again.'
      )

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, pair: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prompt, chosen and rejected ids, int32."""
    start = self.starts[pair]
    prompt, chosen, _ = self.lengths[pair]
    ids = self.tokens[start : self.starts[pair + 1]]
    return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]

  def __reduce__(self) -> tuple[Any, ...]:
    return TokenCache, (self.path,)

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """All ids, int32, mapped from disk."""
    if not self.starts[-1]:
      return np.zeros(0, np.int32)
    # A plain array over the mapped bytes: slicing an np.memmap costs several times as much.
    return np.asarray(np.memmap(self._local / 'tokens.bin', np.int32, 'r'))

  def where(self, pair: int) -> str:
    """Returns 'file:line' of a pair, by its place in the cache."""
    return f'{self.files[self._file[pair]]}:{self._line[pair]}'

  def check_ids(self, vocab_size: int) -> None:
    """Raises ValueError if a token id has no row in the embedding."""
    block = 1 << 24
    for start in range(0, len(self.tokens), block):
      ids = self.tokens[start : start + block]
      ids = np.where(ids < 0, ~ids, ids)
      if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        pair = int(np.searchsorted(self.starts, start + at, side='right')) - 1
        raise ValueError(
          f'{self.where(pair)}: token id {ids[at]} is beyond the embedding, which has {vocab_size} '
          'rows. The tokenizer is not the one the model was trained with: set data.tokenizer.'
        )


def open_or_build(
  source: RecordSource,
  tokenizer: Tokenizer,
  *,
  directory: str,
  format: str = 'auto',
  bad_record: str = 'raise',
) -> TokenCache:
  """Opens the cache of these records under these settings, after building it if it is absent.

  Raises:
    ValueError: a record that cannot be used, with its file and line, unless bad_record is 'skip';
      no record that can be used.
  """
  parts = [VERSION, source.fingerprint, tokenizer.fingerprint, format]
  fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  path = epath.Path(directory) / fingerprint[:16]
  if not (path / 'manifest.json').exists():
    _build(source, tokenizer, path, format=format, bad_record=bad_record, fingerprint=fingerprint)
  cache = TokenCache(str(path))
  # The same bytes may now be under another name.
  cache.files = source.files
  dropped = cache.report.dropped
  if dropped and bad_record == 'raise':
    raise ValueError(_refusal(next(iter(cache.report.examples.values()))[0]))
  if not len(cache):
    raise ValueError(
      f'none of the {cache.report.read} records in {", ".join(source.files)} can be used: {dropped}'
    )
  return cache


def _build(
  source: RecordSource,
  tokenizer: Tokenizer,
  path: epath.Path,
  *,
  format: str,
  bad_record: str,
  fingerprint: str,
) -> None:
  with tempfile.TemporaryDirectory() as scratch:
    local = '://' not in str(path)
    work = path.parent / f'.{path.name}.{uuid.uuid4().hex}' if local else epath.Path(scratch)
    work.mkdir(parents=True, exist_ok=True)
    try:
      report = _write(source, tokenizer, work, format, bad_record)
      manifest = {
        'fingerprint': fingerprint,
        'files': source.files,
        'report': dataclasses.asdict(report),
      }
      (work / 'manifest.json').write_text(json.dumps(manifest, indent=2))
      _publish(work, path, local)
    finally:
      if local:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: epath.Path, path: epath.Path, local: bool) -> None:
  if not local:
    path.mkdir(parents=True, exist_ok=True)
    for name in _FILES:  # the manifest last: without it the cache does not exist
      (work / name).copy(path / name, overwrite=True)
    return
  try:
    work.rename(path)
  except OSError:
    if not (path / 'manifest.json').exists():  # else another process was faster: the same content
      raise


def _write(
  source: RecordSource, tokenizer: Tokenizer, work: epath.Path, format: str, bad_record: str
) -> Report:
  """Streams the records through the tokenizer to disk; memory holds a few numbers a pair."""
  files = {file: i for i, file in enumerate(source.files)}
  numbers = {name: array.array('q') for name in ('lengths', 'records', 'files', 'lines')}
  prompts = array.array('Q')
  columns = {name: array.array('d') for name in COLUMNS}
  dropped, seen = collections.Counter(), collections.Counter()
  examples = collections.defaultdict(list)
  read = 0
  with (work / 'tokens.bin').open('wb') as tokens:
    for index, record in enumerate(source):
      read += 1
      try:
        preference, name, pair = _tokenize(record, tokenizer, format)
      except RecordError as error:
        message = f'{record.where}: {error}'
        if bad_record == 'raise':
          raise ValueError(_refusal(message)) from None
        dropped[error.reason] += 1
        if len(examples[error.reason]) < _SHOWN:
          examples[error.reason].append(message)
        continue
      seen[name] += 1
      tokens.write(np.array([*pair.prompt, *pair.chosen, *pair.rejected], np.int32).tobytes())
      file, _, line = record.where.rpartition(':')
      numbers['lengths'].extend(map(len, pair))
      numbers['records'].append(index)
      numbers['files'].append(files[file])
      numbers['lines'].append(int(line))
      prompts.append(_prompt_hash(preference))
      for key, values in columns.items():
        value = getattr(preference, key)
        values.append(float('nan') if value is None else value)
  _save_pairs(work, numbers, prompts, columns)
  return Report(read, len(prompts), dict(seen), dict(dropped), dict(examples))


def _save_pairs(
  work: epath.Path,
  numbers: dict[str, array.array],
  prompts: array.array,
  columns: dict[str, array.array],
) -> None:
  arrays = {name: np.array(values, np.int32) for name, values in numbers.items()}
  arrays['lengths'] = arrays['lengths'].reshape(-1, 3)
  arrays['prompts'] = np.array(prompts, np.uint64)
  for name, values in columns.items():
    column = np.array(values, np.float32)
    if not np.isnan(column).all():
      arrays[name] = column
  with (work / 'pairs.npz').open('wb') as file:
    np.savez(file, **arrays)


def _tokenize(
  record: Record, tokenizer: Tokenizer, format: str
) -> tuple[formats.Preference, str, EncodedPair]:
  if record.error:
    raise record.error
  preference, name = formats.to_preference(record.value, format)
  return preference, name, tokenizer.encode(preference)


def _prompt_hash(preference: formats.Preference) -> int:
  return int.from_bytes(hashlib.blake2b(preference.prompt_key, digest_size=8).digest(), 'little')


def _refusal(message: str) -> str:
  return f'{message}. Mend the record, or set data.bad_record=skip to leave such records out.'


def _mirror(path: epath.Path) -> epath.Path:
  """Returns a local directory with the cache's files: mapping them needs a local disk."""
  if '://' not in str(path):
    return path
  local = epath.Path(tempfile.gettempdir()) / 'dpo_flax_token_cache' / path.name
  if not (local / 'manifest.json').exists():
    work = local.parent / f'.{path.name}.{uuid.uuid4().hex}'
    work.mkdir(parents=True)
    for name in _FILES:
      (path / name).copy(work / name)
    _publish(work, local, local=True)
    shutil.rmtree(work, ignore_errors=True)
  return local
