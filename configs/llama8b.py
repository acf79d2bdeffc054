"""Llama-3.1-8B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama8b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.

By `python -m dpo_flax.plan`, of a chip's memory: v5e-16 3.78 GiB of 15.75, v5e-4 6.87 GiB of 15.75,
v6e-1 21.37 GiB of 31.24, v5e-1-int8 12.07 GiB of 15.75. Nothing was timed on hardware.
"""

from dpo_flax import config as config_lib

# Hardware -> rows of a step, one for each chip, and tokens of a row.
VARIANTS = {
  'v5e-16': (16, 4096),
  'v5e-4': (4, 4096),
  'v6e-1': (1, 8192),
  'v5e-1-int8': (1, 4096),
}


def get_config(hardware: str = 'v5e-16'):
  """Returns the run's config for one of VARIANTS; data.train and workdir are yours to give."""
  if hardware not in VARIANTS:
    raise ValueError(f'configs/llama8b.py:{hardware}: give one of {", ".join(VARIANTS)}')
  config = config_lib.default()
  config.initialize_from_hf = 'meta-llama/Llama-3.1-8B'
  config.batch.rows, config.batch.tokens = VARIANTS[hardware]
  config.train.num_epochs = 1.0
  if hardware.endswith('-int8'):
    config.model.weight_dtype = 'int8'  # in bfloat16 they alone would fill the chip
  return config
