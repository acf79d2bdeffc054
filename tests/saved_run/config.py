"""The run whose workdir is saved beside this file, as version 0.1.0 was told of it."""

from dpo_flax import config as config_lib


def get_config():
  """Returns the run's config."""
  config = config_lib.default()
  config.workdir = 'workdir'
  config.model.preset = 'tiny'
  config.model.dtype = 'float32'
  config.model.weight_dtype = 'float32'
  config.lora.r = 2
  config.lora.alpha = 4.0
  config.lora.target_modules = ('q_proj', 'down_proj')
  config.objective.label_smoothing = 0.1
  config.data.train = 'pairs.jsonl'
  config.data.tokenizer = 'tokenizer.model'
  config.data.validation_split_fraction = 0.25
  config.batch.rows = 4
  config.batch.tokens = 256
  config.train.num_train_steps = 8
  config.train.log_every = 1
  config.train.eval_every = 4
  config.train.save_every = 4
  config.optimizer.learning_rate = 2e-3
  return config
