"""What a config may hold: every mistake is refused by name, and overrides cannot be misspelt."""

import json
import logging as std_logging
import sys

import pytest
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dpo_flax import config as config_lib
from dpo_flax.objective import settings

# ml_collections loads config files by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture
def config():
  """The smallest config of a run."""
  config = config_lib.default()
  config.workdir = '/tmp/run'
  config.model.preset = 'tiny'
  config.data.tokenizer = 'tokenizer.model'
  config.data.train = 'pairs.jsonl'
  config.train.num_train_steps = 10
  config.optimizer.learning_rate = 1e-5
  return config


def set_field(config: ConfigDict, field: str, value):
  *sections, name = field.split('.')
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[name] = value


@pytest.fixture
def warnings(caplog, monkeypatch):
  """Lists the messages absl logs as warnings."""
  monkeypatch.setattr(absl_logging.get_absl_logger(), 'propagate', True)
  caplog.set_level(std_logging.WARNING)
  return lambda: [record.getMessage() for record in caplog.records]


def test_the_smallest_config_is_valid_and_unchanged(config, warnings):
  checked = config_lib.validate(config)
  assert checked == config and checked is not config
  assert warnings() == []


def test_the_defaults_are_the_published_ones():
  config = config_lib.default()
  assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 64.0, 0.0)
  assert config.lora.zero_init_b and not config.lora.rslora
  assert config.lora.target_modules is None
  assert config.objective.beta == 0.1
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.warmup) == (5e-6, 0.1)
  assert (optimizer.name, optimizer.lr_schedule, optimizer.max_grad_norm) == (
    'adamw',
    'cosine',
    1.0,
  )
  settings.validate(config.objective)


CHOICES = [
  'model.dtype',
  'model.weight_dtype',
  'model.remat',
  'model.attention',
  'data.format',
  'data.layout',
  'data.too_long',
  'data.bad_record',
  'optimizer.name',
  'optimizer.lr_schedule',
]

OUT_OF_RANGE = [
  ('model.logits_chunk', 0, 'at least 1'),
  ('lora.r', 0, 'at least 1'),
  ('lora.dropout', 1.0, 'between 0 and 0.999'),
  ('lora.dropout', -0.1, 'between 0 and 0.999'),
  ('lora.alpha', 0.0, 'greater than 0'),
  ('data.validation_split_fraction', 0.95, 'between 0 and 0.9'),
  ('data.workers', -1, 'at least 0'),
  ('batch.rows', 0, 'at least 1'),
  ('batch.tokens', 3, 'at least 4'),
  ('batch.pairs_per_row', -1, 'at least 0'),
  ('batch.microbatches', 0, 'at least 1'),
  ('train.log_every', 0, 'at least 1'),
  ('train.eval_every', -1, 'at least 0'),
  ('train.save_every', -1, 'at least 0'),
  ('train.keep', 0, 'at least 1'),
  ('hf_save_steps', -1, 'at least 0'),
  ('optimizer.learning_rate', 0.0, 'greater than 0'),
  ('optimizer.learning_rate', float('nan'), 'greater than 0'),
  ('optimizer.warmup', 1.5, 'between 0 and 1'),
  ('optimizer.max_grad_norm', -1.0, 'at least 0'),
  ('optimizer.b1', 1.0, 'between 0 and'),
  ('optimizer.b2', 1.0, 'between 0 and'),
  ('optimizer.eps', 0.0, 'greater than 0'),
  ('optimizer.weight_decay', -0.1, 'at least 0'),
]


@pytest.mark.parametrize('field', CHOICES)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(config, field):
  value = config_lib.get(config, field)
  set_field(config, field, 'nonsense')
  with pytest.raises(ValueError, match=rf"{field}='nonsense': expected one of .*{value}"):
    config_lib.validate(config)


@pytest.mark.parametrize(('field', 'value', 'bounds'), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(config, field, value, bounds):
  set_field(config, field, value)
  with pytest.raises(ValueError, match=rf'{field}={value}: must be {bounds}'):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'workdir': None}, 'workdir is not set: give --config.workdir'),
    ({'data.train': None}, 'data.train is not set'),
    ({'model.preset': None}, 'exactly one source'),
    ({'initialize_from_hf': 'llama'}, "exactly one source.*'llama'.*'tiny'"),
    ({'data.tokenizer': None}, 'data.tokenizer is not set'),
    ({'train.num_train_steps': 0}, 'length of the run exactly once'),
    ({'train.num_epochs': 1.0}, 'length of the run exactly once.*10.*1.0'),
    ({'batch.rows': 6, 'batch.microbatches': 4}, 'batch.rows=6 is not a multiple .*microbatches=4'),
  ],
)
def test_fields_that_contradict_each_other_are_refused(config, changes, message):
  for field, value in changes.items():
    set_field(config, field, value)
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config)


def test_a_checkpoint_brings_its_own_tokenizer_and_architecture(config):
  set_field(config, 'model.preset', None)
  set_field(config, 'data.tokenizer', None)
  config.initialize_from_hf = 'llama'
  config_lib.validate(config)


def test_epochs_may_take_the_place_of_steps(config):
  config.train.num_train_steps = 0
  config.train.num_epochs = 0.5
  assert config_lib.validate(config).train.num_epochs == 0.5


@pytest.mark.parametrize(
  ('rows', 'microbatches', 'shards', 'fits'),
  [(32, 1, 8, True), (32, 4, 8, True), (32, 8, 8, False), (12, 1, 8, False), (8, 1, 8, True)],
)
def test_rows_divide_among_the_shards_of_every_microbatch(config, rows, microbatches, shards, fits):
  config.batch.rows, config.batch.microbatches = rows, microbatches
  if fits:
    config_lib.validate_rows(config, shards)
    return
  with pytest.raises(ValueError, match=f'batch.rows={rows} .* multiple of {microbatches * shards}'):
    config_lib.validate_rows(config, shards)


def test_zero_init_b_is_put_right_and_said(config, warnings):
  config.lora.zero_init_b = False
  assert config_lib.validate(config).lora.zero_init_b is True
  assert config.lora.zero_init_b is False, "the caller's own is left alone"
  (message,) = warnings()
  assert 'lora.zero_init_b=False is overridden to True' in message


def test_a_high_learning_rate_is_allowed_and_said(config, warnings):
  config.optimizer.learning_rate = 6e-5
  assert config_lib.validate(config).optimizer.learning_rate == 6e-5
  (message,) = warnings()
  assert 'optimizer.learning_rate=6e-05 is high' in message


FREE = {
  'workdir': '/elsewhere',
  'initialize_from_hf': 'moved',
  'peft_save_path': 'p',
  'merged_hf_save_path': 'm',
  'hf_save_steps': 5,
  'data.cache_dir': 'c',
  'data.cache_workers': 3,
  'data.workers': 3,
  'train.log_every': 1,
  'train.eval_every': 7,
  'train.save_every': 7,
  'train.keep': 9,
  'mesh.data': 2,
  'mesh.fsdp': 2,
  'mesh.tensor': 2,
}

# Named by path, and so known by their contents' fingerprints instead.
FINGERPRINTED = {
  'reference_model_path': 'r',
  'data.train': 'b.jsonl',
  'data.validation': 'v.jsonl',
  'data.tokenizer': 't',
  'data.chat_template': 'c',
}


def leaf_fields(config, prefix=''):
  for name in config:
    value = config[name]
    if isinstance(value, ConfigDict):
      yield from leaf_fields(value, f'{prefix}{name}.')
    else:
      yield prefix + name


def other_value(value):
  """A value that is not `value`."""
  if isinstance(value, bool):
    return not value
  return value + 1 if isinstance(value, int | float) else 'other'


def test_every_field_but_the_free_ones_is_part_of_a_runs_identity(config):
  before = config_lib.identity(config)
  for field in list(leaf_fields(config)):
    changed = config.copy_and_resolve_references()
    free = FREE | FINGERPRINTED
    value = free[field] if field in free else other_value(config_lib.get(config, field))
    set_field(changed, field, value)
    assert (config_lib.identity(changed) == before) == (field in free), field


def test_an_identity_is_plain_json(config):
  config.lora.target_modules = ('q_proj', 'v_proj')
  identity = config_lib.identity(config)
  assert json.loads(json.dumps(identity)) == identity
  assert identity['lora.target_modules'] == ['q_proj', 'v_proj']
  assert identity['lora.r'] == 64 and identity['optimizer.lr_schedule'] == 'cosine'


@pytest.fixture
def parse(tmp_path, monkeypatch):
  """Parses a command line as `python -m dpo_flax.train` does; returns its config."""
  file = tmp_path / 'run.py'
  file.write_text('from dpo_flax import config\n\n\ndef get_config():\n  return config.default()\n')

  def parse(*overrides):
    line = ['train', f'--config={file}', *(f'--config.{override}' for override in overrides)]
    monkeypatch.setattr(sys, 'argv', line)  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(line)
    return values['config'].value

  return parse


def test_overrides_reach_every_kind_of_field(parse):
  config = parse(
    'workdir=runs/a',
    'lora.r=128',
    'lora.alpha=16',
    'lora.rslora=True',
    "lora.target_modules=('q_proj','v_proj')",
    "lora.exclude_modules=('down_proj',)",
    'data.train=a.jsonl',
    'train.num_epochs=1',
    'objective.label_smoothing=0.1',
    "objective.loss=('sigmoid','sft')",
    'objective.loss_weights=(1.0,0.5)',
    'mesh.fsdp=-1',
  )
  assert (config.workdir, config.lora.r, config.lora.alpha) == ('runs/a', 128, 16.0)
  assert config.lora.rslora is True
  assert config.lora.target_modules == ('q_proj', 'v_proj')
  assert config.lora.exclude_modules == ('down_proj',)
  assert config.data.train == 'a.jsonl' and config.train.num_epochs == 1.0
  assert config.objective.loss == ('sigmoid', 'sft')
  assert config.objective.loss_weights == (1.0, 0.5)
  assert config.mesh.fsdp == -1


@pytest.mark.parametrize(
  ('override', 'suggestion'),
  [('batch.row=4', 'batch.rows'), ('data.trian=x', 'data.train'), ('worker_dir=x', 'workdir')],
)
def test_an_unknown_field_fails_with_a_suggestion(parse, override, suggestion):
  with pytest.raises(Exception, match='Did you mean') as error:
    parse(override)
  assert suggestion.rsplit('.', maxsplit=1)[-1] in str(error.value)


@pytest.mark.parametrize(
  'override', ['lora.r=many', 'lora.r=1.5', 'optimizer.learning_rate=fast', 'data.shuffle=7']
)
def test_a_value_of_the_wrong_type_fails(parse, override):
  field, value = override.split('=')
  with pytest.raises((flags.IllegalFlagValueError, TypeError)) as error:
    parse(override)
  assert field.split('.')[1] in str(error.value) and value in str(error.value)


def test_a_config_file_cannot_misspell_a_field(config):
  with pytest.raises(AttributeError, match='Did you mean "rows"'):
    config.batch.row = 8
