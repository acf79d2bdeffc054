"""Settings are the config of then: same fields, same defaults, same identity, and nothing moves."""

import dataclasses
import json
import pathlib

import pytest

import dpo_flax
from dpo_flax import config as config_lib
from dpo_flax.config.identity import RunIdentity, identity_of
from dpo_flax.config.row import Role, Row
from dpo_flax.config.schema import ROWS, SECTIONS, Settings
from dpo_flax.config.settings import markdown, settings_from_json, settings_of

SAVED = pathlib.Path(__file__).parent / 'saved_run.json'

# Every field, its default and type. Those of the version that saved SAVED stay as they are.
DEFAULTS = [
  ('workdir', None, 'str'),
  ('seed', 0, 'int'),
  ('initialize_from_hf', None, 'str'),
  ('reference_model_path', None, 'str'),
  ('merge_adapter_path', None, 'str'),
  ('initialize_from_adapter', None, 'str'),
  ('reference_adapter_path', None, 'str'),
  ('peft_save_path', None, 'str'),
  ('merged_hf_save_path', None, 'str'),
  ('allow_data_change', False, 'bool'),
  ('hf_save_steps', 0, 'int'),
  ('model.preset', None, 'str'),
  ('model.dtype', 'bfloat16', 'str'),
  ('model.weight_dtype', 'bfloat16', 'str'),
  ('model.remat', 'full', 'str'),
  ('model.attention', 'auto', 'str'),
  ('model.logits_chunk', 512, 'int'),
  ('tuning.method', 'lora', 'str'),
  ('lora.r', 64, 'int'),
  ('lora.alpha', 64.0, 'float'),
  ('lora.dropout', 0.0, 'float'),
  ('lora.zero_init_b', True, 'bool'),
  ('lora.rslora', False, 'bool'),
  ('lora.target_modules', None, 'object'),
  ('lora.exclude_modules', (), 'object'),
  ('lora.layers_to_transform', None, 'object'),
  ('lora.rank_pattern', None, 'object'),
  ('lora.alpha_pattern', None, 'object'),
  ('lora.modules_to_save', (), 'tuple'),
  ('lora.ensure_weight_tying', False, 'bool'),
  ('objective.loss', 'sigmoid', 'object'),
  ('objective.loss_weights', None, 'tuple'),
  ('objective.beta', 0.1, 'float'),
  ('objective.label_smoothing', None, 'float'),
  ('objective.gamma', None, 'float'),
  ('objective.cpo_alpha', None, 'float'),
  ('objective.orpo_lambda', None, 'float'),
  ('objective.dpop_lambda', None, 'float'),
  ('objective.discopop_temperature', None, 'float'),
  ('objective.divergence', 'reverse_kl', 'str'),
  ('objective.alpha_divergence', None, 'float'),
  ('objective.sft_weight', None, 'float'),
  ('objective.ld_alpha', None, 'float'),
  ('objective.wpo', False, 'bool'),
  ('objective.reference_free', False, 'bool'),
  ('objective.kl_penalty_weight', None, 'float'),
  ('objective.token_statistics', False, 'bool'),
  ('reference.source', 'live', 'str'),
  ('data.train', None, 'object'),
  ('data.validation', None, 'object'),
  ('data.validation_split_fraction', 0.1, 'float'),
  ('data.format', 'auto', 'str'),
  ('data.fields', None, 'object'),
  ('data.completions', 'best_vs_random', 'str'),
  ('data.tokenizer', None, 'str'),
  ('data.chat_template', None, 'str'),
  ('data.template_variables', None, 'object'),
  ('data.history', 'exact', 'str'),
  ('data.shuffle', True, 'bool'),
  ('data.layout', 'shared', 'str'),
  ('data.pack', True, 'bool'),
  ('data.too_long', 'raise', 'str'),
  ('data.bad_record', 'raise', 'str'),
  ('data.cache_dir', None, 'str'),
  ('data.cache_workers', 0, 'int'),
  ('data.workers', 0, 'int'),
  ('batch.rows', 32, 'int'),
  ('batch.tokens', 4096, 'int'),
  ('batch.pairs_per_row', 0, 'int'),
  ('batch.microbatches', 1, 'int'),
  ('train.num_train_steps', 0, 'int'),
  ('train.num_epochs', 0.0, 'float'),
  ('train.log_every', 10, 'int'),
  ('train.eval_every', 200, 'int'),
  ('train.save_every', 200, 'int'),
  ('train.keep', 2, 'int'),
  ('train.on_save_error', 'stop', 'str'),
  ('train.grace_seconds', 10.0, 'float'),
  ('optimizer.name', 'adamw', 'str'),
  ('optimizer.learning_rate', 5e-06, 'float'),
  ('optimizer.warmup', 0.1, 'float'),
  ('optimizer.lr_schedule', 'cosine', 'str'),
  ('optimizer.max_grad_norm', 1.0, 'float'),
  ('optimizer.b1', 0.9, 'float'),
  ('optimizer.b2', 0.999, 'float'),
  ('optimizer.eps', 1e-08, 'float'),
  ('optimizer.weight_decay', 0.0, 'float'),
  ('optimizer.max_skipped_steps', 0, 'int'),
  ('optimizer.spike_factor', 0.0, 'float'),
  ('mesh.data', 1, 'int'),
  ('mesh.fsdp', -1, 'int'),
  ('mesh.tensor', 1, 'int'),
]


def test_the_default_config_is_that_of_then():
  config = config_lib.default()
  assert config.is_locked
  types = [(name, config_lib.get(config, name), _type(config, name)) for name in ROWS]
  assert types == DEFAULTS
  values = json.loads(config.to_json_best_effort())
  assert list(_flat(values)) == [name for name, _, _ in DEFAULTS]


def _type(config, field):
  section, _, name = field.rpartition('.')
  return (config[section] if section else config).get_type(name).__name__


def _flat(values):
  """Returns dotted field -> value of a config as JSON has it."""
  flat = {}
  for name, value in values.items():
    inner = value.items() if name in SECTIONS else ()
    flat |= {f'{name}.{each}': one for each, one in inner} or {name: value}
  return flat


def test_every_row_has_a_meaning():
  for field, row in ROWS.items():
    assert row.meaning.endswith('.') and row.meaning[0] != ' ', field
    assert not row.choices or row.default in row.choices, field
    row.check(field, row.default)


def test_the_table_of_fields_has_every_row():
  page = pathlib.Path(dpo_flax.__file__).parents[1] / 'docs' / 'fields.md'
  head, table = page.read_text().split('\n\n|', maxsplit=1)
  again = f'write markdown() of dpo_flax/config/settings.py to {page} again, below its first lines'
  assert f'|{table}' == markdown() and head.startswith('# '), again
  lines = markdown().splitlines()
  assert len(lines) == 2 + len(ROWS)
  assert all(f'| `{field}` |' in line for field, line in zip(ROWS, lines[2:], strict=True))
  (r,) = [line for line in lines if line.startswith('| `lora.r` |')]
  assert r == '| `lora.r` | `64` | Rank. Between 1 and 65536. |'


def test_settings_hold_what_the_config_holds(config):
  config.lora.target_modules = ['q_proj']
  settings = config_lib.validate(config)
  assert settings.to_json() == json.loads(config.to_json_best_effort())
  assert settings.lora.target_modules == ('q_proj',)
  assert settings_from_json(settings.to_json()) == settings


def test_nothing_in_settings_can_be_assigned(config):
  settings = config_lib.validate(config)
  hash(settings)
  parts = [settings, *(getattr(settings, name) for name in SECTIONS)]
  for part in parts:
    for field in dataclasses.fields(part):
      with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, field.name, None)


def test_values_are_replaced_in_a_copy(config):
  settings = config_lib.validate(config)
  changed = settings.replace({'batch.rows': 8, 'objective.loss': 'ipo', 'seed': 3})
  assert (changed.batch.rows, changed.objective.loss, changed.seed) == (8, ('ipo',), 3)
  assert (settings.batch.rows, settings.objective.loss, settings.seed) == (32, ('sigmoid',), 0)
  with pytest.raises(TypeError, match='row'):
    settings.replace({'batch.row': 8})


def test_a_plan_may_lack_what_a_run_needs(config):
  config.workdir = config.data.train = config.data.tokenizer = None
  config.train.num_train_steps = 0
  settings = config_lib.validate(config, planning=True)
  assert settings.workdir is settings.data.train is settings.data.tokenizer is None
  config.train.num_train_steps, config.train.num_epochs = 3, 1.0
  with pytest.raises(ValueError, match='exactly once'):
    config_lib.validate(config, planning=True)


def test_a_saved_run_is_read_as_it_was():
  saved = json.loads(SAVED.read_text())
  settings = settings_from_json(saved['config'])
  kept = _flat(saved['config'])
  assert [field for field in ROWS if field in kept] == list(kept)
  # What came later has the value that its row gives to older runs.
  expected = {field: kept.get(field, row.plain(row.when_absent)) for field, row in ROWS.items()}
  assert json.dumps(settings.flat_json()) == json.dumps(expected)
  identity = identity_of(settings.flat_json())
  assert identity == {field: saved['step'].get(field, expected[field]) for field in identity}
  assert saved['step'].keys() <= identity.keys()
  now = RunIdentity(identity_of(settings.flat_json()), {})
  assert RunIdentity(saved['step'], {}).differences(now) == []


def test_a_field_that_a_record_lacks_is_as_its_row_says(monkeypatch):
  saved = json.loads(SAVED.read_text())
  settings = settings_from_json(saved['config'])
  now = RunIdentity(identity_of(settings.flat_json()), {})
  older = {field: value for field, value in saved['step'].items() if field != 'model.remat'}
  assert RunIdentity(older, {}).differences(now) == []
  # A field that came later, and that then changed its default.
  row = dataclasses.replace(ROWS['model.remat'], absent='none')
  monkeypatch.setitem(ROWS, 'model.remat', row)
  (found,) = RunIdentity(older, {}).differences(now)
  assert found == ('model.remat', 'none', 'full')
  del saved['config']['model']['remat']
  assert settings_from_json(saved['config']).model.remat == 'none'


@pytest.mark.parametrize('place', ['remta', 'objective', 'data'])
def test_a_record_with_an_unknown_field_is_refused(place):
  values = settings_of(_complete()).to_json()
  values.get(place, values)['remta'] = 1
  with pytest.raises((KeyError, AttributeError), match='remta'):
    settings_from_json(values)


def _complete():
  config = config_lib.default()
  config.model.preset = 'tiny'
  return config


FIELDS = {'chosen': 'good', 'rejected': 'bad'}


@pytest.mark.parametrize(
  'saved',
  [
    {f'data.fields.{name}': value for name, value in FIELDS.items()},
    {'data.fields': [list(pair) for pair in FIELDS.items()]},
    {'data.fields': json.dumps(FIELDS)},
  ],
  ids=['as fields', 'pairs', 'JSON'],
)
def test_a_mapping_is_the_same_in_every_form_it_was_saved_in(saved):
  config = _complete()
  config.data.fields = FIELDS
  now = identity_of(settings_of(config).flat_json())
  older = {field: value for field, value in now.items() if field != 'data.fields'} | saved
  assert RunIdentity(older, {}).differences(RunIdentity(now, {})) == []
  other = now | {'data.fields': [['chosen', 'better']]}
  (found,) = RunIdentity(older, {}).differences(RunIdentity(other, {}))
  assert found.name == 'data.fields' and found.is_of_the_data


def test_roles_say_what_may_change():
  settings = settings_of(_complete())
  shared = config_lib.shared(settings.flat_json())
  for field, row in ROWS.items():
    assert (field in shared) == (row.role is not Role.SOURCE)
    assert (field in identity_of(settings.flat_json())) == (row.role in {Role.NUMBERS, Role.DATA})


def test_a_range_is_said_as_it_is_checked():
  row = Row(default=0.5, meaning='x.', low=0, high=1)
  with pytest.raises(ValueError, match='f=nan: must be between 0 and 1'):
    row.check('f', float('nan'))
  assert Row(default=1, meaning='x.', above=0).bounds == 'greater than 0, and finite'
  assert isinstance(settings_of(_complete()), Settings)
