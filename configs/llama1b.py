"""Llama-3.2-1B on one of the slices of configs/llama.py: --config=configs/llama1b.py:SLICE."""

from dpo_flax.configs import llama


def get_config(hardware: str = ''):
  """Returns the run's config for a slice; data.train and workdir are yours to give."""
  return llama.get_config(f'1b:{hardware}')
