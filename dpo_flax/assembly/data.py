"""Settings -> the prepared data of a run."""

from dpo_flax.config.named_values import split_paths
from dpo_flax.config.schema import Settings
from dpo_flax.config.sections import DataSettings
from dpo_flax.data.batches.schedule import RowOptions
from dpo_flax.data.cache.build_cache import ReadOptions
from dpo_flax.data.prepare import PreparedData, prepare
from dpo_flax.data.records.formats import FormatOptions
from dpo_flax.data.records.source import RecordSource
from dpo_flax.data.tokens.tokenizer import Tokenizer, load_tokenizer


def prepare_data(settings: Settings, *, vocab_size: int | None = None) -> PreparedData:
  """Tokenizes the run's data or opens their cache, and plans the rows.

  Args:
    settings: the run's.
    vocab_size: rows of the model's embedding; None: as many as the tokenizer has ids.

  Raises:
    ValueError: for all that is wrong with the data, naming file and line.
  """
  data, batch = settings.data, settings.batch
  tokenizer = _load_tokenizer(data, data.tokenizer or settings.initialize_from_hf)
  source = RecordSource(*split_paths(data.train))
  return prepare(
    source,
    tokenizer,
    validation=_validation_source(data),
    validation_split_fraction=data.validation_split_fraction,
    reading=ReadOptions(
      cache_dir=cache_directory(settings.workdir, data.cache_dir),
      format=FormatOptions(data.format, _fields(data), data.completions),
      bad_record=data.bad_record,
      workers=data.cache_workers,
    ),
    rows=RowOptions(
      rows=batch.rows,
      tokens=batch.tokens,
      pairs_per_row=batch.pairs_per_row,
      layout=data.layout,
      pack=data.pack,
      shuffle=data.shuffle,
      too_long=data.too_long,
      seed=settings.seed,
    ),
    vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
  )


def cache_directory(workdir: str | None, cache_dir: str | None) -> str:
  """Returns where tokens, and the reference's log-probs of them, are kept."""
  directory = cache_dir or (workdir and f'{workdir}/token_cache')
  if not directory:
    raise ValueError('no directory for the token cache: set workdir or data.cache_dir')
  return directory


def _load_tokenizer(data: DataSettings, path: str | None) -> Tokenizer:
  if not path:
    raise ValueError('no tokenizer given: set data.tokenizer, or initialize_from_hf to have one')
  return load_tokenizer(
    path, data.chat_template, variables=dict(data.template_variables), history=data.history
  )


def _validation_source(data: DataSettings) -> RecordSource | None:
  if not data.validation:
    return None
  paths, weights = split_paths(data.validation)
  if weights is not None:
    raise ValueError(
      'data.validation gives weights, but every validation pair counts once: give a path or a list '
      'of them'
    )
  return RecordSource(paths)


def _fields(data: DataSettings) -> dict[str, str]:
  for field, key in data.fields:
    if not isinstance(key, str):
      raise ValueError(f'data.fields takes {field!r} from {key!r}: expected the name of a key')
  return dict(data.fields)
