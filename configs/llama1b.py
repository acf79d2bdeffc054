"""Llama-3.2-1B, LoRA of rank 64 on every linear layer, on your own preference pairs.

    python -m dpo_flax.train --config=configs/llama1b.py \
      --config.initialize_from_hf=/path/to/hf_llama --config.data.train=pairs.jsonl.gz \
      --config.workdir=runs/mine

The weights are bfloat16 and split over all devices; adapters and Adam moments are float32.

What dpo_flax.plan measured for a step: peak HBM of a chip, and estimated cycles.

    v5e-1       v5e:1x1  4 rows of 4,096    7.52 GiB of 15.75   2.09e9

v6e-1 has not been compiled.
"""

from dpo_flax import config as config_lib

# Hardware -> rows of a step, one for each chip, and tokens of a row.
VARIANTS = {
  'v5e-1': (4, 4096),
  'v6e-1': (8, 4096),
}


def get_config(hardware: str = 'v5e-1'):
  """Returns the run's config for one of VARIANTS; data.train and workdir are yours to give."""
  if hardware not in VARIANTS:
    raise ValueError(f'configs/llama1b.py:{hardware}: give one of {", ".join(VARIANTS)}')
  config = config_lib.default()
  config.initialize_from_hf = 'meta-llama/Llama-3.2-1B'
  config.batch.rows, config.batch.tokens = VARIANTS[hardware]
  config.train.num_epochs = 1.0
  return config
