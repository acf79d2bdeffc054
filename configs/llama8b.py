"""Llama-3.1-8B on one of the slices of configs/llama.py: --config=configs/llama8b.py:SLICE."""

from dpo_flax.configs import llama


def get_config(hardware: str = ''):
  """Returns the run's config for a slice; data.train and workdir are yours to give."""
  return llama.get_config(f'8b:{hardware}')
