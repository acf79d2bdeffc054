"""Tokens for the random models of the tests."""

import numpy as np
import pytest


@pytest.fixture(scope='session')
def tokens():
  """Two rows of 40 random tokens: longer than the random models' unscaled positions."""
  return np.random.default_rng(0).integers(0, 96, (2, 40), dtype=np.int32)
