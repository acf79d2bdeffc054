"""The schema of a run: names, defaults, overrides, and what makes two runs the same."""

import json
import re
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_flax import config as config_lib
from dpo_flax.config import identity
from dpo_flax.losses import Objective
from dpo_flax.runtime import command

# ml_collections loads config files by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


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
  Objective.from_config(config.objective)


FREE = {
  'workdir': '/elsewhere',
  'allow_data_change': True,
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
  'train.grace_seconds': 3.0,
  'train.on_save_error': 'continue',
  'mesh.data': 2,
  'mesh.fsdp': 2,
  'mesh.tensor': 2,
}

# Named by path, and so known by their contents' fingerprints instead.
FINGERPRINTED = {
  'merge_adapter_path': 'moved',
  'initialize_from_adapter': 'moved',
  'reference_adapter_path': 'moved',
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
  values = config_lib.validate(config).flat_json()
  before = identity.identity_of(values)
  assert set(values) == set(leaf_fields(config))
  for field in leaf_fields(config):
    free = FREE | FINGERPRINTED
    value = free[field] if field in free else other_value(config_lib.get(config, field))
    changed = identity.identity_of(values | {field: value})
    assert (changed == before) == (field in free), field


def test_an_identity_is_plain_json(config):
  config.lora.target_modules = ('q_proj', 'v_proj')
  found = config_lib.identity_of(config_lib.validate(config).flat_json())
  assert json.loads(json.dumps(found)) == found
  assert found['lora.target_modules'] == ['q_proj', 'v_proj']
  assert found['lora.r'] == 64 and found['optimizer.lr_schedule'] == 'cosine'


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


def test_what_a_config_file_raises_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  config_flags.DEFINE_config_file('config', flag_values=flags.FLAGS)
  with pytest.raises(SystemExit) as stopped:
    command._parse(['plan', '--config=configs/llama8b.py:v9'])
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and said.count('\n') == 1
  assert re.match(r'--config: .*configs/llama.py:\d+: ValueError: .*give one of v5e-16', said)


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
