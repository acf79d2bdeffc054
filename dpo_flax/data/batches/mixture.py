"""Which pairs an epoch sees, and in which order.

A part of weight 1 is seen once in every epoch. One of weight 2.5 is seen two and a half times; the
other half of its third pass comes in the next epoch. After any integer number of passes, each of
its pairs was seen equally often.
"""

import dataclasses
import fractions
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The parts of the data; they hold indices of the pairs of a side."""

  parts: tuple[np.ndarray, ...]  # of each: its pairs, int
  weights: tuple[float, ...]  # of each: passes over it in an epoch

  def epoch(self, number: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the pairs that an epoch sees, [n] int32."""
    passes = [
      self._passes(part, number, seed=seed, shuffle=shuffle) for part in range(len(self.parts))
    ]
    pairs = np.concatenate(passes).astype(np.int32)
    if shuffle and len(passes) > 1:
      return pairs[permutation(len(pairs), 'mixture', seed, number)]
    return pairs

  def _passes(self, part: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns what an epoch sees of one part: a piece of the endless sequence of passes over it."""
    pairs = self.parts[part]
    size = fractions.Fraction(self.weights[part]).limit_denominator(1_000_000) * len(pairs)
    start, end = int(epoch * size), int((epoch + 1) * size)
    pieces = [np.zeros(0, np.int32)]
    while start < end:
      number, first = divmod(start, len(pairs))
      last = min(len(pairs), first + end - start)
      salt = ('pairs', seed, number, part)
      order = permutation(len(pairs), *salt) if shuffle else np.arange(len(pairs))
      pieces.append(pairs[order[first:last]])
      start += last - first
    return np.concatenate(pieces)


def hashed(values: np.ndarray, *salt: int | str) -> np.ndarray:
  """Returns a hash of every value, uint64: splitmix64, the same on every machine and version."""
  seed = zlib.crc32(repr(salt).encode()) * 0x9E3779B97F4A7C15 % 2**64
  x = values.astype(np.uint64) + np.uint64(seed)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def permutation(n: int, *salt: int | str) -> np.ndarray:
  """Returns a random order of 0 .. n - 1 that depends on the salt alone."""
  return np.argsort(hashed(np.arange(n), *salt), kind='stable')
