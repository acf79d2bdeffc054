"""Llama-3.1-8B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama8b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.
"""

from dpo_flax import config as config_lib


def get_config():
  """Returns the run's config; initialize_from_hf, data.train and workdir are yours to give."""
  config = config_lib.default()
  config.batch.rows = 32
  config.batch.tokens = 4096
  config.train.num_epochs = 1.0
  return config
