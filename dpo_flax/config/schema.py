"""The schema of a run: every field, its default, unit and meaning.

Files in configs/ start from `default()` and change what they need; the command line changes single
fields (`--config.lora.r=128`). A field set to None is unset; its type is given by the placeholder.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from dpo_flax.losses.objective import OPTIONS

# Where things are read: their contents are fingerprinted, and every host may have its own.
_SOURCES = (
  'workdir',
  'initialize_from_hf',
  'reference_model_path',
  'merge_adapter_path',
  'initialize_from_adapter',
  'reference_adapter_path',
  'data.train',
  'data.validation',
  'data.tokenizer',
  'data.chat_template',
  'data.cache_dir',
  'data.cache_workers',
  'data.workers',
)

# What else a run may change when it goes on: where it writes, how often it reports, and how the
# same numbers are spread over devices. Every other field is part of the run's identity.
_FREE_ON_RESUME = (
  'peft_save_path',
  'merged_hf_save_path',
  'hf_save_steps',
  'train.log_every',
  'train.eval_every',
  'train.save_every',
  'train.keep',
  'train.on_save_error',
  'train.grace_seconds',
  'allow_data_change',
  'mesh.data',
  'mesh.fsdp',
  'mesh.tensor',
)


def default() -> ConfigDict:
  """Returns the whole schema with its default values, locked against unknown fields."""
  config = ConfigDict()
  config.workdir = config_dict.placeholder(str)  # where checkpoints, metrics and exports go
  config.seed = 0  # adapters' initial values, data order, dropout
  # Directory (local or gs://) in Hugging Face layout, or a hub id (needs the `hub` extra).
  config.initialize_from_hf = config_dict.placeholder(str)
  # Base weights of the reference, where they differ from the policy's.
  config.reference_model_path = config_dict.placeholder(str)
  # PEFT adapters. Merged into the base as it is loaded, and from then on part of it:
  config.merge_adapter_path = config_dict.placeholder(str)
  # what the policy's adapters start as; ranks, alphas and targets are this one's, not lora's:
  config.initialize_from_adapter = config_dict.placeholder(str)
  # what the reference has on the base (an SFT adapter). The policy starts on top of it with a new
  # adapter, and the two are exported as one; or, with initialize_from_adapter, from that alone.
  config.reference_adapter_path = config_dict.placeholder(str)
  config.peft_save_path = config_dict.placeholder(str)  # default: workdir/peft
  # unset: no merged export; of tuning.method=full: workdir/merged
  config.merged_hf_save_path = config_dict.placeholder(str)
  # Go on from a checkpoint although data, tokenizer, template or their order have changed since.
  config.allow_data_change = False
  config.hf_save_steps = 0  # steps between exports; 0: at the end only

  config.model = _model()
  config.tuning = _tuning()
  config.lora = _lora()
  config.objective = _objective()
  config.reference = _reference()
  config.data = _data()
  config.batch = _batch()
  config.train = _train()
  config.optimizer = _optimizer()
  config.mesh = _mesh()
  return config.lock()


def _model() -> ConfigDict:
  model = ConfigDict()
  model.preset = config_dict.placeholder(str)  # a name in model/presets.py, for random weights
  model.dtype = 'bfloat16'  # of activations and matrix products: bfloat16 | float32
  # Of the frozen base weights in memory: bfloat16 | float32 | int8 (a scale for each channel).
  model.weight_dtype = 'bfloat16'
  # What backward recomputes: full | dots | none; offload: as full, layer inputs in host memory.
  model.remat = 'full'
  model.attention = 'auto'  # pallas on TPU alone, xla; auto: pallas on TPU, xla elsewhere
  model.logits_chunk = 512  # response tokens per row that meet the vocabulary at once
  return model


def _tuning() -> ConfigDict:
  tuning = ConfigDict()
  # What of the policy learns. lora: low-rank adapters; dora: they, and the length of each output
  # channel (arXiv:2402.09353); full: every weight, in float32 beside a frozen copy.
  tuning.method = 'lora'
  return tuning


def _lora() -> ConfigDict:
  lora = ConfigDict()
  lora.r = 64  # rank (Hu et al. 2021, arXiv:2106.09685)
  lora.alpha = 64.0  # the adapter's output is scaled by alpha / r
  lora.dropout = 0.0  # on the adapter's input, policy stream only
  lora.zero_init_b = True  # kept True: otherwise policy and reference differ at step 0
  lora.rslora = False  # scale by alpha / sqrt(r) instead (arXiv:2312.03732)
  # None: every linear layer of the blocks. A list of names, or a regex over module names; also
  # embed_tokens and lm_head.
  lora.target_modules = config_dict.placeholder(object)
  lora.exclude_modules = config_dict.FieldReference((), field_type=object)  # out of the above
  lora.layers_to_transform = config_dict.placeholder(object)  # these layers alone: a number or list
  # Other ranks and alphas for modules that a name or regex matches: {'down_proj': 32}; names with
  # dots as pairs: (('layers.0.mlp.down_proj', 32),).
  lora.rank_pattern = config_dict.placeholder(object)
  lora.alpha_pattern = config_dict.placeholder(object)
  lora.modules_to_save = ()  # names of modules that learn whole, beside the adapters
  # Where the head is tied to the token table, what one of them learns is the other's too.
  lora.ensure_weight_tying = False
  return lora


def _objective() -> ConfigDict:
  """What losses/objective.py says of its options; a constant set beside another loss is refused."""
  objective = ConfigDict()
  for name, option in OPTIONS.items():
    objective[name] = config_dict.FieldReference(option.default, field_type=option.value_type)
  return objective


def _reference() -> ConfigDict:
  reference = ConfigDict()
  # live: the reference runs beside the policy. cache: its log-probs of every pair are computed once
  # before the run and kept beside the token cache; training then runs the policy alone.
  reference.source = 'live'
  return reference


def _data() -> ConfigDict:
  data = ConfigDict()
  # A path, a glob or a list of them (local or gs://): .jsonl, .json, .parquet, .array_record, text
  # also .gz and .zst; or the directory of a saved Hugging Face data set. Pairs are a mixture:
  # (path, passes over it in an epoch), such as (('hh.jsonl', 1), ('mine.parquet', 2.5)).
  data.train = config_dict.placeholder(object)
  data.validation = config_dict.placeholder(object)  # unset: split off from train
  data.validation_split_fraction = 0.1  # of the pairs, when data.validation is unset; 0: none
  # auto | explicit | implicit | messages | hh: see data/formats.py. shp | webgpt | binarized |
  # ultrafeedback | orca: see data/published.py.
  data.format = 'auto'
  # Keys that have other names in the records, {ours: theirs}: {'chosen': 'good', 'margin': 'gap'};
  # names with dots as pairs: (('completions.overall_score', 'score'),).
  data.fields = config_dict.placeholder(object)
  # ultrafeedback, several answers: best_vs_worst | best_vs_random | all (of different scores)
  data.completions = 'best_vs_random'
  data.tokenizer = config_dict.placeholder(str)  # default: beside the weights
  data.chat_template = config_dict.placeholder(str)  # a file or the template itself
  # What the template is given besides the messages: {'enable_thinking': False}. strftime_now is the
  # date that it takes for today; unset: 2024-07-26, so that ids do not depend on the day.
  data.template_variables = config_dict.placeholder(object)
  # exact | rendered: whether a template may leave things out of earlier turns, as those of thinking
  # models do. `exact` refuses it; `rendered` trains on what the model will see.
  data.history = 'exact'
  data.shuffle = True
  data.layout = 'shared'  # shared (one prompt for both branches) | separate
  data.pack = True  # False: exactly one pair per row
  data.too_long = 'raise'  # a pair longer than a row: raise | drop | truncate_prompt
  data.bad_record = 'raise'  # a record that cannot be read: raise | skip (counted)
  data.cache_dir = config_dict.placeholder(str)  # default: workdir/token_cache
  data.cache_workers = 0  # processes that tokenize, once; 0: one a core, for much data
  data.workers = 0  # processes that fill rows; 0: in the main process
  return data


def _batch() -> ConfigDict:
  batch = ConfigDict()
  batch.rows = 32  # rows per optimizer step, over all devices
  batch.tokens = 4096  # tokens per row
  batch.pairs_per_row = 0  # pair slots per row; 0: the largest number the plan needs
  batch.microbatches = 1  # parts of a step run one after the other; divides rows
  return batch


def _train() -> ConfigDict:
  train = ConfigDict()
  train.num_train_steps = 0  # optimizer steps; 0: as many as num_epochs takes
  train.num_epochs = 0.0  # passes over the training pairs; 0: num_train_steps says how long
  train.log_every = 10  # steps
  train.eval_every = 200  # steps; 0: only before the first and after the last
  train.save_every = 200  # steps; 0: only at the end
  train.keep = 2  # newest checkpoints kept
  # What a checkpoint that cannot be written does to the run: stop | continue (until the last one).
  train.on_save_error = 'stop'
  train.grace_seconds = 10.0  # from SIGTERM to the end of the process, a checkpoint included
  return train


def _optimizer() -> ConfigDict:
  optimizer = ConfigDict()
  optimizer.name = 'adamw'
  optimizer.learning_rate = 5e-6  # the peak
  optimizer.warmup = 0.1  # fraction of the steps over which the rate rises from 0
  optimizer.lr_schedule = 'cosine'  # after the warm-up: cosine (to 0) | linear (to 0) | constant
  optimizer.max_grad_norm = 1.0  # global norm above which gradients are scaled down; 0: never
  optimizer.b1 = 0.9
  optimizer.b2 = 0.999
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.0
  # Steps whose loss or gradient is not finite make no update. After more than so many in a row the
  # run stops; 0: at the first.
  optimizer.max_skipped_steps = 0
  # Gradient norms above so many times the median of the last 64 make none either; 0: no limit.
  optimizer.spike_factor = 0.0
  return optimizer


def _mesh() -> ConfigDict:
  mesh = ConfigDict()  # devices along each axis; one of them may be -1: the rest
  mesh.data = 1  # copies of the weights
  mesh.fsdp = -1  # shards of weights and rows
  mesh.tensor = 1  # shards of heads, mlp and vocabulary
  return mesh


def get(config: ConfigDict, field: str) -> Any:
  """Returns the value of a dotted field: `get(config, 'lora.r')`."""
  for name in field.split('.'):
    config = config[name]
  return config


def identity_of(config: ConfigDict) -> dict[str, Any]:
  """Returns dotted field -> value of all that decides a run's numbers, as plain JSON values."""
  fields = shared(config)
  return {field: value for field, value in fields.items() if field not in _FREE_ON_RESUME}


def shared(config: ConfigDict) -> dict[str, Any]:
  """Returns dotted field -> value of all that must be the same on every host of a run."""
  fields = _flatten(json.loads(config.to_json_best_effort()))
  return {field: value for field, value in fields.items() if field not in _SOURCES}


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
