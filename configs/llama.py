"""Llama 3, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama.py:8b:v5e-16 \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The model is 1b (Llama-3.2-1B), 8b (Llama-3.1-8B) or 70b (Llama-3.1-70B); without a slice, its first
one below is taken. The weights are bfloat16, or int8 where the slice says so, and split over all
devices; adapters and Adam moments are float32.

What dpo_flax.plan measured for a step: peak HBM of a chip, and estimated cycles.

    1b:v5e-1         v5e:1x1  4 rows of 4,096    7.52 GiB of 15.75   2.09e9
    8b:v5e-16        v5e:4x4  16 rows of 4,096   4.74 GiB of 15.75   2.38e9
    8b:v5e-4         v5e:2x2  4 rows of 4,096    8.00 GiB of 15.75   2.44e9
    8b:v6e-1         v6e:1x1  1 row of 8,192    23.39 GiB of 31.24   1.96e9
    8b:v5e-1-int8    v5e:1x1  1 row of 4,096    13.67 GiB of 15.75   2.52e9
    70b:v6e-4-int8   v6e:2x2  4 rows of 4,096   28.42 GiB of 31.24   9.49e9
    70b:v6e-8        v6e:2x4  8 rows of 4,096   25.68 GiB of 31.24   7.60e9

Those of 70b are of an earlier version, with libtpu 0.0.51, which takes less memory than 0.0.42. The
other slices have not been compiled.
"""

from dpo_flax import config as config_lib

CHECKPOINTS = {
  '1b': 'meta-llama/Llama-3.2-1B',
  '8b': 'meta-llama/Llama-3.1-8B',
  '70b': 'meta-llama/Llama-3.1-70B',
}

# Model -> slice -> rows of a step, one for each chip, and tokens of a row.
SLICES = {
  '1b': {'v5e-1': (4, 4096), 'v6e-1': (8, 4096)},
  '8b': {'v5e-16': (16, 4096), 'v5e-4': (4, 4096), 'v6e-1': (1, 8192), 'v5e-1-int8': (1, 4096)},
  '70b': {
    'v5p-32': (16, 4096),
    'v5p-8': (4, 4096),
    'v6e-4-int8': (4, 4096),
    'v6e-8': (8, 4096),
    'v6e-64': (64, 4096),
  },
}


def get_config(variant: str = '8b'):
  """Returns the run's config for `model` or `model:slice`; data.train and workdir are yours."""
  model, _, hardware = variant.partition(':')
  if model not in SLICES:
    raise ValueError(f'configs/llama.py:{variant}: give one of {", ".join(SLICES)}')
  slices = SLICES[model]
  hardware = hardware or next(iter(slices))
  if hardware not in slices:
    raise ValueError(f'llama {model} on {hardware}: give one of {", ".join(slices)}')
  config = config_lib.default()
  config.initialize_from_hf = CHECKPOINTS[model]
  config.batch.rows, config.batch.tokens = slices[hardware]
  config.train.num_epochs = 1.0
  if hardware.endswith('-int8'):
    config.model.weight_dtype = 'int8'  # in bfloat16 they alone would fill the chips
  return config
