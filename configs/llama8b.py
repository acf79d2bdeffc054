"""Llama-3.1-8B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama8b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.

What dpo_flax.plan measured for a step: peak HBM of a chip, and estimated cycles.

    v5e-16      v5e:4x4  16 rows of 4,096   4.74 GiB of 15.75   2.38e9
    v5e-4       v5e:2x2  4 rows of 4,096    8.00 GiB of 15.75   2.44e9
    v6e-1       v6e:1x1  1 row of 8,192    23.39 GiB of 31.24   1.96e9
    v5e-1-int8  v5e:1x1  1 row of 4,096    13.67 GiB of 15.75   2.52e9
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
