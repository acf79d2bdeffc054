"""A process that tokenizes chunks: it is sent the tokenizer and options, pickled, and a task."""

import functools
import os
import pickle

from dpo_flax.data.tokens.encode import encode_chunk
from dpo_flax.data.tokens.helper_process import serve

_load = functools.lru_cache(maxsize=1)(pickle.loads)  # they are the same every time


def _answer(request: bytes) -> bytes:
  try:
    setting, task = pickle.loads(request)
    return pickle.dumps(encode_chunk(task, *_load(setting)))
  except Exception as error:  # raised again in the process that asked
    return pickle.dumps(error)


if __name__ == '__main__':
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  serve(_answer)
