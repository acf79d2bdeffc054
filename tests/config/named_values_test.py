"""Mixtures and mappings mean the same in a config file, as a flag and in Python."""

import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_flax.assembly.data import prepare_data
from dpo_flax.config.checks import validate
from dpo_flax.config.named_values import named_values, split_paths
from dpo_flax.data.records.source import RecordSource

# ml_collections loads config files by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

ROW = '{"question?": "the cat", "good.text": "tea.", "bad": "us"}\n'
FIELDS = [('prompt', 'question?'), ('chosen', 'good.text'), ('rejected', 'bad')]


@pytest.fixture
def parse(tmp_path, json_directory, monkeypatch):
  """Returns the validated config of a config file with these data, and of flags for the others."""
  for name in ('a.jsonl', 'b'):
    lines = ROW.replace('cat', f'cat {name}') + ROW.replace('cat', 'book') * 3
    (tmp_path / name).write_text(lines)
  monkeypatch.chdir(tmp_path)

  def parse(in_file, in_flags):
    path = tmp_path / 'config.py'
    path.write_text(
      'from dpo_flax import config as schema\n'
      'def get_config():\n'
      '  config = schema.default()\n'
      "  config.workdir, config.model.preset = 'run', 'tiny'\n"
      f'  config.data.tokenizer = {str(json_directory)!r}\n'
      '  config.train.num_epochs = 1.0\n'
      + ''.join(f'  config.data.{field} = {value!r}\n' for field, value in in_file.items())
      + '  return config\n'
    )
    line = ['train', f'--config={path}']
    line += [f'--config.data.{field}={value}' for field, value in in_flags.items()]
    monkeypatch.setattr(sys, 'argv', line)  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(line)
    return validate(values['config'].value)

  return parse


MIXTURES = {
  'pairs': (('a.jsonl', 2), ('b', 1)),
  'lists': [['a.jsonl', 2], ['b', 1]],
  'JSON': '{"a.jsonl": 2, "b": 1}',
}


@pytest.mark.parametrize('fields', [FIELDS, dict(FIELDS), tuple(FIELDS)], ids=repr)
@pytest.mark.parametrize('mixture', MIXTURES)
@pytest.mark.parametrize('by_flag', [False, True], ids=['file', 'flag'])
def test_weights_and_fields_are_those_that_were_given(parse, mixture, fields, by_flag):
  given = {'train': MIXTURES[mixture], 'fields': fields}
  if by_flag and mixture == 'JSON':
    pytest.skip('a flag that is a mapping arrives as a mapping')
  config = parse(*(({}, given) if by_flag else (given, {})))
  assert RecordSource(*split_paths(config.data.train)).weights == [2.0, 1.0]
  prepared = prepare_data(config, vocab_size=500)
  assert prepared.report['train']['formats'] == {'explicit': 8}


@pytest.mark.parametrize('by_flag', [False, True], ids=['file', 'flag'])
def test_a_mapping_without_dots_is_a_mixture_too(parse, by_flag):
  train = {'train': {'b': 3}}
  config = parse(*(({}, train) if by_flag else (train, {})))
  assert RecordSource(*split_paths(config.data.train)).weights == [3.0]


@pytest.mark.parametrize('by_flag', [False, True], ids=['file', 'flag'])
@pytest.mark.parametrize('field', ['train', 'fields'])
def test_a_mapping_with_dots_is_refused_with_what_to_write(parse, field, by_flag):
  given = {'train': 'b', field: {'a.jsonl': 'b'}}
  with pytest.raises(ValueError, match=rf"data\.{field} .* give pairs, \(\('a\.jsonl', 'b'\),\)"):
    parse(*(({}, given) if by_flag else (given, {})))


@pytest.mark.parametrize('value', [{'thinking': False}, [('thinking', False)]], ids=repr)
@pytest.mark.parametrize('by_flag', [False, True], ids=['file', 'flag'])
def test_template_variables_reach_the_template(parse, value, by_flag):
  given = {'train': 'b', 'template_variables': value}
  config = parse(*(({}, given) if by_flag else (given, {})))
  assert config.data.template_variables == (('thinking', False),)


@pytest.mark.parametrize(
  'paths', [('a.jsonl', 2), 3, [3], [('a.jsonl', 2), 'b'], [('a.jsonl', 1, 2)]], ids=repr
)
def test_what_is_no_paths_and_no_mixture_is_refused(parse, paths):
  with pytest.raises(ValueError, match='expected a path'):
    parse({'train': paths}, {})


@pytest.mark.parametrize(
  ('field', 'value'), [('fields', 'chosen'), ('fields', [('chosen', 1)]), ('fields', ['chosen'])]
)
def test_what_is_no_mapping_is_refused(parse, field, value):
  with pytest.raises(ValueError, match=r'data\.fields.*expected'):
    prepare_data(parse({'train': 'b', field: value}, {}), vocab_size=500)


def test_a_name_has_one_value():
  assert named_values(ConfigDict({'a': {'b': 1}})) == {'a': {'b': 1}}
  assert named_values([]) is named_values('a.jsonl') is named_values(['ab', 'cd']) is None
  for twice in ([('a', 1), ('a', 2)], '{"a": 1, "a": 2}'):
    with pytest.raises(ValueError, match='a is named more than once'):
      named_values(twice)
  with pytest.raises(ValueError, match='is not JSON'):
    named_values('{"a": ')
