"""Llama-3.1-70B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama70b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.

What dpo_flax.plan measured for a step of an earlier version, with libtpu 0.0.51, which takes less
memory than 0.0.42: peak HBM of a chip, and estimated cycles.

    v6e-4-int8  v6e:2x2  4 rows of 4,096   28.42 GiB of 31.24   9.49e9
    v6e-8       v6e:2x4  8 rows of 4,096   25.68 GiB of 31.24   7.60e9

The variants for v5p and v6e-64 have not been compiled.
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
