"""Illegal values and contradictions fail first, with what was given and what was expected."""

import json
import logging as std_logging

import pytest
from absl import logging as absl_logging

from dpo_flax import config as config_lib
from dpo_flax.config.checks import validate, validate_rows
from dpo_flax.config.sections import BatchSettings
from helpers.configs import set_field


@pytest.fixture
def warnings(caplog, monkeypatch):
  """Lists the messages absl logs as warnings."""
  monkeypatch.setattr(absl_logging.get_absl_logger(), 'propagate', True)
  caplog.set_level(std_logging.WARNING)
  return lambda: [record.getMessage() for record in caplog.records]


def test_the_config_is_valid_and_unchanged(config, warnings):
  before = json.loads(config.to_json_best_effort())
  assert validate(config).to_json() == before == json.loads(config.to_json_best_effort())
  assert warnings() == []


CHOICES = [
  'model.dtype',
  'model.weight_dtype',
  'model.remat',
  'model.attention',
  'data.format',
  'data.layout',
  'data.too_long',
  'data.bad_record',
  'train.on_save_error',
  'optimizer.name',
  'optimizer.lr_schedule',
]

OUT_OF_RANGE = [
  ('model.logits_chunk', 0, 'at least 1'),
  ('lora.r', 0, 'between 1'),
  ('seed', 10**20, 'between 0 and'),
  ('data.cache_workers', 10**8, 'between 0 and 1024'),
  ('lora.dropout', 1.0, 'between 0 and 0.999'),
  ('lora.dropout', -0.1, 'between 0 and 0.999'),
  ('lora.alpha', 0.0, 'greater than 0'),
  ('data.validation_split_fraction', 0.95, 'between 0 and 0.9'),
  ('data.workers', -1, 'between 0 and 1024'),
  ('batch.rows', 0, 'between 1'),
  ('batch.tokens', 3, 'between 4'),
  ('batch.tokens', 10**15, 'between 4 and 16777216'),
  ('train.num_epochs', 1e9, 'between 0'),
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
  ('optimizer.max_skipped_steps', -1, 'at least 0'),
  ('train.grace_seconds', 0.0, 'at least 1'),
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
    validate(config)


def test_the_splash_kernel_of_earlier_versions_is_refused_with_what_is_left(config):
  config.model.attention = 'splash'
  with pytest.raises(ValueError, match=r"attention='splash': expected one of auto, xla, pallas$"):
    validate(config)


@pytest.mark.parametrize(('field', 'value', 'bounds'), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(config, field, value, bounds):
  set_field(config, field, value)
  with pytest.raises(ValueError, match=rf'{field}={value}: must be {bounds}'):
    validate(config)


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
    ({'batch.pairs_per_row': 1025, 'batch.tokens': 4096}, 'pairs_per_row=1025.*at most 1024 pairs'),
    ({'batch.pairs_per_row': 2, 'data.pack': False}, 'pairs_per_row=2.*pack=False'),
    ({'optimizer.spike_factor': 10.0}, 'say by optimizer.max_skipped_steps'),
    ({'batch.rows': 6, 'batch.microbatches': 4}, 'batch.rows=6 is not a multiple .*microbatches=4'),
  ],
)
def test_fields_that_contradict_each_other_are_refused(config, changes, message):
  for field, value in changes.items():
    set_field(config, field, value)
  with pytest.raises(ValueError, match=message):
    validate(config)


def test_a_checkpoint_brings_its_own_tokenizer_and_architecture(config):
  set_field(config, 'model.preset', None)
  set_field(config, 'data.tokenizer', None)
  config.initialize_from_hf = 'llama'
  validate(config)


def test_epochs_may_take_the_place_of_steps(config):
  config.train.num_train_steps = 0
  config.train.num_epochs = 0.5
  assert validate(config).train.num_epochs == 0.5


@pytest.mark.parametrize(
  ('rows', 'microbatches', 'shards', 'fits'),
  [(32, 1, 8, True), (32, 4, 8, True), (32, 8, 8, False), (12, 1, 8, False), (8, 1, 8, True)],
)
def test_rows_divide_among_the_shards_of_every_microbatch(rows, microbatches, shards, fits):
  batch = BatchSettings(rows=rows, microbatches=microbatches)
  if fits:
    validate_rows(batch, shards)
    return
  with pytest.raises(ValueError, match=f'batch.rows={rows} .* multiple of {microbatches * shards}'):
    validate_rows(batch, shards)


def test_zero_init_b_is_put_right_and_said(config, warnings):
  config.lora.zero_init_b = False
  assert validate(config).lora.zero_init_b is True
  assert config.lora.zero_init_b is False, "the caller's own is left alone"
  (message,) = warnings()
  assert 'lora.zero_init_b=False is overridden to True' in message


def test_a_high_learning_rate_is_allowed_and_said(config, warnings):
  config.optimizer.learning_rate = 6e-5
  assert validate(config).optimizer.learning_rate == 6e-5
  (message,) = warnings()
  assert 'optimizer.learning_rate=6e-05 is high' in message


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'tuning.method': 'full', 'lora.r': 8}, 'lora.r=8 would be ignored'),
    ({'tuning.method': 'full', 'lora.dropout': 0.1}, 'lora.dropout=0.1 would be ignored'),
    ({'tuning.method': 'full', 'model.weight_dtype': 'int8'}, 'cannot learn'),
    ({'tuning.method': 'full', 'peft_save_path': 'p'}, 'peft_save_path=p has no meaning'),
    ({'tuning.method': 'full', 'initialize_from_adapter': 'p'}, 'has no meaning'),
    ({'initialize_from_adapter': 'p', 'lora.alpha': 8.0}, r'lora.alpha=8.0 would be ignored'),
    ({'merge_adapter_path': 'p'}, 'random weights have no adapter'),
    (
      {'reference_adapter_path': 'p', 'reference_model_path': 'q'},
      'reference_model_path=q is another',
    ),
    ({'lora.rank_pattern': {'layers.0': 3}}, 'give pairs'),
  ],
)
def test_what_a_way_of_tuning_would_ignore_is_refused(config, fields, message):
  for field, value in fields.items():
    set_field(config, field, value)
  with pytest.raises(ValueError, match=message):
    validate(config)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('initialize_from_hf', 'https://me:passw0rd@example.com/model'),
    ('data.train', 'pairs-hf_' + 'aB3' * 10 + '.jsonl'),
    ('data.template_variables', {'key': 'AKIA' + 'A1' * 8}),
    ('data.chat_template', "{% set key = 'sk-" + 'x' * 24 + "' %}"),
    ('workdir', 'runs/ghp_' + 'a' * 36),
    ('data.template_variables', {'key': 'github_pat_' + 'aB3' * 10}),
    ('data.template_variables', {'key': 'AIza' + 'aB3' * 11 + '-_'}),
    ('data.template_variables', {'key': 'xoxb-1234567890-abc'}),
    ('data.template_variables', {'key': 'eyJhbGciOiJI.eyJzdWIiOiIx.abc'}),
    ('data.train', 'https://example.com/pairs.jsonl?token=abc'),
  ],
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(config, field, value):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f'{field} holds what looks like a token') as error:
    validate(config)
  assert str(value)[-6:] not in str(error.value)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('lora.target_modules', 5), ('lora.modules_to_save', (3,)), ('objective.loss', 5)],
)
def test_names_must_be_texts(config, field, value):
  set_field(config, field, value)
  with pytest.raises(ValueError, match=f'{field}=.*: expected a name, or a list of names'):
    validate(config)


def test_a_path_that_orbax_takes_for_a_pattern_is_refused(config):
  config.workdir = 'runs/[a]'
  with pytest.raises(ValueError, match=r'workdir=runs/\[a\]: Orbax takes \[ and \]'):
    validate(config)


@pytest.mark.parametrize('path', ['gs://bucket/sk-small/hf_model', 'runs/2026-11-21@12:00'])
def test_ordinary_names_are_no_secrets(config, path):
  config.workdir = path
  validate(config)
