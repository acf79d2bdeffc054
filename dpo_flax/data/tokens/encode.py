"""Records -> tokenized pairs, a chunk at a time, in this process or in several."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import pickle
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import numpy as np

from dpo_flax.data.records.formats import FormatOptions, to_preferences
from dpo_flax.data.records.preference import COLUMNS, Preference
from dpo_flax.data.records.raw import RecordError
from dpo_flax.data.records.source import Record
from dpo_flax.data.tokens.chat_template import TemplateDied
from dpo_flax.data.tokens.helper_process import Child
from dpo_flax.data.tokens.tokenizer import EncodedPair, Tokenizer

_MUCH = 8 << 20  # bytes of data from which starting processes is worth it
_MOST = 64  # processes: more would wait for the one that reads


@dataclasses.dataclass(frozen=True)
class Task:
  """Records to tokenize, and where they stand among all."""

  first: int  # index of the first record in the source
  records: list[Record]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The pairs that a task's records gave, n of them, and what became of the other records."""

  first: int
  read: int
  tokens: np.ndarray  # int32: prompt, chosen, rejected of each pair in turn
  lengths: np.ndarray  # [n, 3] int32
  records: np.ndarray  # [n] int32, indices in the source
  prompts: np.ndarray  # [n] uint64, hashes
  columns: dict[str, np.ndarray]  # each of COLUMNS, [n] float32, NaN where the record has none
  formats: collections.Counter[str]  # records recognised as each
  faults: list[tuple[int, str, str]]  # index in the task, reason, message of each record dropped


def encode_chunk(task: Task, tokenizer: Tokenizer, options: FormatOptions) -> Chunk:
  """Tokenizes the records of a task.

  Raises:
    ValueError: the chat template had to be ended, at a record that is named.
  """
  pairs: list[tuple[int, Preference, EncodedPair]] = []
  formats, faults = collections.Counter(), []
  for i, record in enumerate(task.records):
    try:
      preferences, name = to_preferences(record.value(), options)
      encoded = [tokenizer.encode(preference) for preference in preferences]
    except RecordError as error:
      faults.append((i, error.reason, str(error)))
      continue
    except TemplateDied as death:  # not the record's fault: to skip it would cost as much for each
      raise ValueError(f'{record.where}: {death}. Mend the template.') from None
    formats[name] += 1
    pairs += [(task.first + i, *pair) for pair in zip(preferences, encoded, strict=True)]
  parts = itertools.chain.from_iterable(pair for *_, pair in pairs)
  columns = {
    name: np.array([getattr(preference, name) for _, preference, _ in pairs], np.float32)
    for name in COLUMNS
  }
  return Chunk(
    first=task.first,
    read=len(task.records),
    tokens=np.fromiter(itertools.chain.from_iterable(parts), np.int32),
    lengths=np.array([[len(part) for part in pair] for *_, pair in pairs], np.int32).reshape(-1, 3),
    records=np.array([index for index, *_ in pairs], np.int32),
    prompts=np.array([_prompt_hash(preference) for _, preference, _ in pairs], np.uint64),
    columns=columns,
    formats=formats,
    faults=faults,
  )


def encode_all(
  tasks: Iterable[Task], tokenizer: Tokenizer, options: FormatOptions, *, workers: int
) -> Iterator[Chunk]:
  """Yields the chunks of all tasks in their order; reads only a few tasks ahead."""
  if workers == 1:
    for task in tasks:
      yield encode_chunk(task, tokenizer, options)
    return
  setting = pickle.dumps((tokenizer, options))
  children: queue.SimpleQueue[Child] = queue.SimpleQueue()
  started = [Child('dpo_flax.data.tokens.encode_process') for _ in range(workers)]
  for child in started:
    children.put(child)
  try:
    with futures.ThreadPoolExecutor(workers) as threads:
      function = functools.partial(_ask, children, setting)
      yield from _ordered(threads, function, tasks, ahead=2 * workers)
  finally:
    for child in started:
      child.close()


def worker_count(wanted: int, size: int) -> int:
  """Returns how many processes tokenize `size` bytes: `wanted`, or where that is 0 one a core."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return wanted or (min(cores, _MOST) if size > _MUCH else 1)


def _ask(children: queue.SimpleQueue[Child], setting: bytes, task: Task) -> Chunk:
  child = children.get()
  try:
    answer = pickle.loads(child.ask(pickle.dumps((setting, task))))
  finally:
    children.put(child)
  if isinstance(answer, Exception):
    raise answer
  return answer


def _ordered(
  threads: futures.Executor, function: Callable, items: Iterable, *, ahead: int
) -> Iterator:
  pending = collections.deque()
  try:
    for item in items:
      pending.append(threads.submit(function, item))
      if len(pending) > ahead:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    for future in pending:
      future.cancel()


def _prompt_hash(preference: Preference) -> int:
  return int.from_bytes(hashlib.blake2b(preference.prompt_key, digest_size=8).digest(), 'little')
