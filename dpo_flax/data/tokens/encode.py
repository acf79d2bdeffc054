"""Records -> tokenized pairs, a chunk at a time, in this process or in several."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import pickle
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import numpy as np

from dpo_flax.data.records.fields import RecordError
from dpo_flax.data.records.formats import FormatOptions, to_preferences
from dpo_flax.data.records.preference import COLUMNS, Preference
from dpo_flax.data.records.source import Record
from dpo_flax.data.tokens.chat_template import TemplateDied
from dpo_flax.data.tokens.helper_process import Child
from dpo_flax.data.tokens.tokenizer import EncodedPair, Tokenizer

_MUCH = 8 << 20  # bytes of data from which starting processes is worth it
_MOST = 64  # processes: more would wait for the one that reads


Task = tuple[int, list[Record]]  # the index of the first in the source, and the records


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The pairs that a task's records gave, n of them, and what became of the other records."""

  first: int
  read: int  # records
  arrays: dict[str, np.ndarray]  # see below
  lines: list[tuple[str, int]]  # [n] file and line
  formats: collections.Counter[str]  # records recognised as each
  faults: list[tuple[str, int, str, str]]  # file, line, reason, message of each record dropped


def encode_chunk(task: Task, tokenizer: Tokenizer, options: FormatOptions) -> Chunk:
  """Tokenizes the records of a task.

  Returns:
    A chunk with the arrays tokens (int32: prompt, chosen, rejected of each pair in turn), lengths
    [n, 3] int32, records [n] int32 (indices in the source), prompts [n] uint64 (hashes), and each
    of COLUMNS, [n] float32, NaN where the record has none.

  Raises:
    ValueError: the chat template had to be ended, at a record that is named.
  """
  first, records = task
  pairs: list[tuple[int, Preference, EncodedPair]] = []
  lines, formats, faults = [], collections.Counter(), []
  for i, record in enumerate(records, start=first):
    try:
      preferences, name = to_preferences(record.value(), options)
      encoded = [tokenizer.encode(preference) for preference in preferences]
    except RecordError as error:
      faults.append((record.file, record.number, error.reason, str(error)))
      continue
    except TemplateDied as death:  # not the record's fault: to skip it would cost as much for each
      raise ValueError(f'{record.where}: {death}. Mend the template.') from None
    formats[name] += 1
    lines += [(record.file, record.number)] * len(preferences)
    pairs += [(i, *pair) for pair in zip(preferences, encoded, strict=True)]
  ids = [part for *_, pair in pairs for part in pair]
  arrays = {
    'tokens': np.fromiter(itertools.chain.from_iterable(ids), np.int32),
    'lengths': np.array([len(part) for part in ids], np.int32).reshape(-1, 3),
    'records': np.array([index for index, *_ in pairs], np.int32),
    'prompts': np.array([preference.prompt_hash for _, preference, _ in pairs], np.uint64),
  }
  for name in COLUMNS:
    values = [getattr(preference, name) for _, preference, _ in pairs]
    arrays[name] = np.array(values, np.float32)
  return Chunk(first, len(records), arrays, lines, formats, faults)


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
  with contextlib.ExitStack() as stack:
    for _ in range(workers):
      child = Child('dpo_flax.data.tokens.encode_process')
      children.put(stack.enter_context(contextlib.closing(child)))
    threads = stack.enter_context(futures.ThreadPoolExecutor(workers))
    function = functools.partial(_ask, children, setting)
    yield from _ordered(threads, function, tasks, ahead=2 * workers)


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
