"""The sections of the schema: one dataclass each, one row a field."""

import dataclasses
from typing import Any

from dpo_flax.config.row import Role, row

Names = str | tuple[str, ...] | None
NamedValues = tuple[tuple[str, Any], ...]

_DATA, _SOURCE, _FREE = Role.DATA, Role.SOURCE, Role.FREE
_NAMED = ('names', ('a', 'b'))
_MODULES = ('modules', ('q_proj', 16))
_FORMATS = (
  *('auto', 'explicit', 'implicit', 'messages', 'hh'),
  *('shp', 'webgpt', 'binarized', 'ultrafeedback', 'orca'),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """The model's weights in memory, and how it is computed."""

  preset: str | None = row(None, 'A name in huggingface/presets.py, for random weights.')
  dtype: str = row(
    'bfloat16', 'Of activations and matrix products.', choices=('bfloat16', 'float32')
  )
  weight_dtype: str = row(
    'bfloat16',
    'Of the frozen base weights in memory; int8 has a scale for each channel.',
    choices=('bfloat16', 'float32', 'int8'),
  )
  remat: str = row(
    'full',
    'What backward recomputes; offload: as full, with layer inputs in host memory.',
    choices=('full', 'offload', 'dots', 'none'),
  )
  attention: str = row(
    'auto', 'auto: pallas on TPU, xla elsewhere.', choices=('auto', 'xla', 'pallas')
  )
  logits_chunk: int = row(
    512, 'Response tokens per row that meet the vocabulary at once.', low=1, unit='tokens'
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningSettings:
  """What of the policy learns."""

  method: str = row(
    'lora',
    'lora: low-rank adapters; dora: they, and the length of each output channel '
    '(arXiv:2402.09353); full: every weight, in float32 beside a frozen copy.',
    choices=('lora', 'dora', 'full'),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
  """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

  r: int = row(64, 'Rank.', low=1, high=2**16)
  alpha: float = row(64.0, "The adapter's output is scaled by alpha / r.", above=0)
  dropout: float = row(
    0.0, "Share of the adapter's input, in the policy stream only.", low=0, high=0.999
  )
  zero_init_b: bool = row(
    True, 'Kept True: otherwise policy and reference differ before the first step.'
  )
  rslora: bool = row(False, 'Scale by alpha / sqrt(r) instead (arXiv:2312.03732).')
  target_modules: Names = row(
    None,
    'Unset: every linear layer of the blocks. A list of names, or a regex over module names; also '
    'embed_tokens and lm_head.',
    type=object,
    names=True,
  )
  exclude_modules: str | tuple[str, ...] = row(
    (), 'Left out of the above.', type=object, names=True
  )
  layers_to_transform: int | tuple[int, ...] | None = row(
    None, 'These layers alone: an index or a list of them.', type=object
  )
  rank_pattern: NamedValues = row(
    None,
    "Other ranks for modules that a name or regex matches: {'down_proj': 32}; names with dots as "
    "pairs: (('layers.0.mlp.down_proj', 32),).",
    mapping=_MODULES,
  )
  alpha_pattern: NamedValues = row(None, 'Other alphas, as rank_pattern.', mapping=_MODULES)
  modules_to_save: tuple[str, ...] = row(
    (), 'Names of modules whose own weights learn, beside the adapters.', names=True
  )
  ensure_weight_tying: bool = row(
    False, "Where the head is tied to the token table, what one of them learns is the other's too."
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
  """Where the reference's log-probs come from."""

  source: str = row(
    'live',
    'live: the reference runs beside the policy. cache: its log-probs of every pair are computed '
    'once before the run and kept beside the token cache; training then runs the policy alone.',
    choices=('live', 'cache'),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """Which pairs are learned from, and how they become tokens and rows."""

  train: str | tuple[str, ...] | NamedValues | None = row(
    None,
    'A path, a glob or a list of them (local or gs://): .jsonl, .json, .parquet, .array_record, '
    'text also .gz and .zst; or the directory of a saved Hugging Face data set. Pairs are a '
    "mixture: (path, passes over it in an epoch), such as (('hh.jsonl', 1), ('mine.parquet', "
    '2.5)).',
    paths=True,
    role=_SOURCE,
  )
  validation: str | tuple[str, ...] | NamedValues | None = row(
    None, 'Held-out pairs; unset: split off from train.', paths=True, role=_SOURCE
  )
  validation_split_fraction: float = row(
    0.1, 'Share of the pairs, when data.validation is unset; 0: none.', low=0, high=0.9, role=_DATA
  )
  format: str = row(
    'auto',
    'How records are written: data/records/formats.py, and for shp to orca '
    'data/records/published.py.',
    choices=_FORMATS,
    role=_DATA,
  )
  fields: NamedValues = row(
    None,
    "Keys that have other names in the records: {'chosen': 'good', 'margin': 'gap'}; names with "
    "dots as pairs: (('completions.overall_score', 'score'),).",
    mapping=_NAMED,
    role=_DATA,
  )
  completions: str = row(
    'best_vs_random',
    'Which of several answers of ultrafeedback make a pair; all: all of different scores.',
    choices=('best_vs_worst', 'best_vs_random', 'all'),
    role=_DATA,
  )
  tokenizer: str | None = row(
    None, 'A directory or a file; unset: beside the weights.', role=_SOURCE
  )
  chat_template: str | None = row(None, 'A file, or the template itself.', role=_SOURCE)
  template_variables: NamedValues = row(
    None,
    "What the template gets besides the messages: {'enable_thinking': False}. strftime_now is the "
    'date that it takes for today; unset: 2024-07-26, so that ids do not depend on the day.',
    mapping=_NAMED,
    role=_DATA,
  )
  history: str = row(
    'exact',
    'Whether a template may leave things out of earlier turns, as those of thinking models do: '
    'exact refuses it, rendered trains on what the model will see.',
    choices=('exact', 'rendered'),
    role=_DATA,
  )
  shuffle: bool = row(True, 'Whether each epoch has an order of its own.', role=_DATA)
  layout: str = row(
    'shared',
    'shared: one prompt for both responses. separate: one for each.',
    choices=('shared', 'separate'),
    role=_DATA,
  )
  pack: bool = row(True, 'False: exactly one pair per row.', role=_DATA)
  too_long: str = row(
    'raise',
    'What happens to a pair longer than a row.',
    choices=('raise', 'drop', 'truncate_prompt'),
    role=_DATA,
  )
  bad_record: str = row(
    'raise',
    'What happens to a record that cannot be read; skip: it is counted.',
    choices=('raise', 'skip'),
    role=_DATA,
  )
  cache_dir: str | None = row(
    None, 'Where tokens are kept; unset: workdir/token_cache.', role=_SOURCE
  )
  cache_workers: int = row(
    0,
    'Processes that tokenize, once; 0: one a core, for much data.',
    low=0,
    high=1024,
    role=_SOURCE,
  )
  workers: int = row(
    0, 'Processes that fill rows; 0: in the main process.', low=0, high=1024, role=_SOURCE
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
  """The rows of an optimizer step."""

  rows: int = row(32, 'Rows per optimizer step, over all devices.', low=1, high=2**24, role=_DATA)
  tokens: int = row(4096, 'Tokens per row.', low=4, high=2**24, unit='tokens', role=_DATA)
  pairs_per_row: int = row(
    0, 'Pair slots per row; 0: the largest number the plan needs.', low=0, role=_DATA
  )
  microbatches: int = row(1, 'Parts of a step that run one after the other; divides rows.', low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """How long a run is, and how often it reports and saves."""

  num_train_steps: int = row(
    0, 'Optimizer steps; 0: as many as num_epochs takes.', low=0, high=2**31 - 1, unit='steps'
  )
  num_epochs: float = row(
    0.0, 'Passes over the training pairs; 0: num_train_steps says how long.', low=0, high=10**6
  )
  log_every: int = row(10, 'Steps between reports.', low=1, unit='steps', role=_FREE)
  eval_every: int = row(
    200,
    'Steps between evaluations; 0: only before the first and after the last.',
    low=0,
    unit='steps',
    role=_FREE,
  )
  save_every: int = row(
    200, 'Steps between checkpoints; 0: only at the end.', low=0, unit='steps', role=_FREE
  )
  keep: int = row(2, 'Newest checkpoints kept.', low=1, role=_FREE)
  on_save_error: str = row(
    'stop',
    'What a checkpoint that cannot be written does to the run; continue: until the last one.',
    choices=('stop', 'continue'),
    role=_FREE,
  )
  grace_seconds: float = row(
    10.0,
    'From SIGTERM to the end of the process, a checkpoint included.',
    low=1,
    unit='seconds',
    role=_FREE,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
  """AdamW (arXiv:1711.05101), its learning rate and what it skips."""

  name: str = row('adamw', 'The optimizer.', choices=('adamw',))
  learning_rate: float = row(5e-6, 'The peak.', above=0)
  warmup: float = row(0.1, 'Fraction of the steps over which the rate rises from 0.', low=0, high=1)
  lr_schedule: str = row(
    'cosine',
    'After the warm-up; cosine and linear fall to 0.',
    choices=('cosine', 'linear', 'constant'),
  )
  max_grad_norm: float = row(
    1.0, 'Global norm above which gradients are scaled down; 0: never.', low=0
  )
  b1: float = row(0.9, "Decay of the gradient's mean.", low=0, high=0.9999999)
  b2: float = row(0.999, "Decay of the squared gradient's mean.", low=0, high=0.9999999)
  eps: float = row(1e-8, 'Added to the denominator of the update.', above=0)
  weight_decay: float = row(0.0, 'Decoupled decay of matrices.', low=0)
  max_skipped_steps: int = row(
    0,
    'Steps whose loss or gradient is not finite make no update. After more than so many in a row '
    'the run stops; 0: at the first.',
    low=0,
    unit='steps',
  )
  spike_factor: float = row(
    0.0,
    'Gradient norms above so many times the median of the last 64 make no update either; 0: no '
    'limit.',
    low=0,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
  """Devices along each axis; one of them may be -1: the rest."""

  data: int = row(1, 'Copies of the weights.', unit='devices', role=_FREE)
  fsdp: int = row(-1, 'Shards of weights and rows.', unit='devices', role=_FREE)
  tensor: int = row(1, 'Shards of heads, mlp and vocabulary.', unit='devices', role=_FREE)

  def sizes(self) -> dict[str, int]:
    """Returns axis -> devices along it."""
    return dataclasses.asdict(self)
