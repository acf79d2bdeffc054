"""Llama-3.1-70B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama70b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.

By `python -m dpo_flax.plan`, of a chip's memory: v6e-8 25.68 GiB of 31.24, v5p-8 (4 chips) 50.8 GiB
of 95.7. With --config.model.weight_dtype=int8 four v6e chips take 28.42 GiB each. Nothing was timed
on hardware.
"""

from dpo_flax import config as config_lib

# Hardware -> rows of a step, one for each chip, and tokens of a row.
VARIANTS = {
  'v5p-8': (4, 4096),
  'v5p-32': (16, 4096),
  'v6e-4-int8': (4, 4096),
  'v6e-8': (8, 4096),
  'v6e-64': (64, 4096),
}


def get_config(hardware: str = 'v5p-32'):
  """Returns the run's config for one of VARIANTS; data.train and workdir are yours to give."""
  if hardware not in VARIANTS:
    raise ValueError(f'configs/llama70b.py:{hardware}: give one of {", ".join(VARIANTS)}')
  config = config_lib.default()
  config.initialize_from_hf = 'meta-llama/Llama-3.1-70B'
  config.batch.rows, config.batch.tokens = VARIANTS[hardware]
  config.train.num_epochs = 1.0
  if hardware.endswith('-int8'):
    config.model.weight_dtype = 'int8'  # in bfloat16 they alone would fill the chips
  return config
