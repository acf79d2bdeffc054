"""Which pairs an epoch sees, and in which order.

A part of weight 1 is seen once in every epoch. One of weight 2.5 is seen two and a half times; the
other half of its third pass comes in the next epoch, so that after any whole number of passes each
of its pairs was seen equally often.
"""

import dataclasses
import fractions
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The parts of the data; the places in them count the pairs of a split."""

  parts: tuple[np.ndarray, ...]  # of each: its places, int
  weights: tuple[float, ...]  # of each: passes over it in an epoch

  def epoch(self, number: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the places that an epoch sees, [n] int32."""
    passes = [
      self._passes(part, number, seed=seed, shuffle=shuffle) for part in range(len(self.parts))
    ]
    places = np.concatenate(passes).astype(np.int32)
    if shuffle and len(passes) > 1:
      return places[permutation(len(places), 'mixture', seed, number)]
    return places

  def _passes(self, part: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Returns what an epoch sees of one part: a piece of the endless sequence of passes over it."""
    places = self.parts[part]
    size = fractions.Fraction(self.weights[part]).limit_denominator(1_000_000) * len(places)
    start, end = int(epoch * size), int((epoch + 1) * size)
    pieces = [np.zeros(0, np.int32)]
    while start < end:
      number, first = divmod(start, len(places))
      last = min(len(places), first + end - start)
      salt = ('pairs', seed, number, part)
      order = permutation(len(places), *salt) if shuffle else np.arange(len(places))
      pieces.append(places[order[first:last]])
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
