"""The command tells what is in the data, in three forms, exactly as training will see it."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from dpo_flax import inspect_data
from dpo_flax.assembly.data import prepare_data
from dpo_flax.config.checks import validate
from dpo_flax.data.reports import page, text

TINY = pathlib.Path(__file__).parent.parent / 'configs' / 'tiny.py'


def _record(prompt, chosen, rejected):
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


RECORDS = [
  _record('Question: tea?\nAnswer:', ' It is a drink that many like.', ' No.'),
  _record('Question: tea?\nAnswer:', ' It is a drink that many like.', ' No.'),  # a duplicate
  _record('Question: tea?\nAnswer:', ' No.', ' It is a drink that many like.'),  # a contradiction
  _record('Question: <b>?\nAnswer:', ' One of the letters.', ' <script>'),
  _record('Question: us?\nAnswer:', '', ' Empty.'),
  *(_record(f'Question: {i}?\nAnswer:', f' It is {i}, I think.', ' No.') for i in range(20)),
]


@pytest.fixture
def config(tmp_path):
  config = runpy.run_path(str(TINY))['get_config']()
  config.workdir = str(tmp_path / 'run')
  config.data.train = str(tmp_path / 'pairs.jsonl')
  config.data.bad_record = 'skip'
  (tmp_path / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
  return config


def test_statistics_count_what_is_there(config):
  config.data.validation_split_fraction = 0.0
  found, _ = inspect_data.inspect(config, 0)
  prepared = prepare_data(validate(config), vocab_size=1 << 20)
  lengths = prepared.train.lengths
  assert found['read'] == len(RECORDS) == found['kept'] + found['dropped']
  assert found['dropped_by_reason'] == {'empty response': 1}
  assert found['examples']['empty response'][0].startswith(f'{config.data.train}:5: ')
  assert found['rows'] == len(prepared.train_rows.plan(0))
  assert found['steps_per_epoch'] == -(-found['rows'] // config.batch.rows)
  assert found['prefix_saving_tokens'] == (lengths[:, 0] - 1).sum()
  assert found['prefix_saving'] == pytest.approx(
    (lengths[:, 0] - 1).sum() / (lengths.sum() + lengths[:, 0].sum())
  )
  assert found['duplicates'] == 1
  assert found['duplicate_examples'] == [f'{config.data.train}:2']
  assert found['contradictions'] == 3  # both copies, and what denies them
  assert found['distinct_prompts'] == 22
  bias = found['length_bias']
  assert bias['longer_wins'] == pytest.approx((lengths[:, 1] > lengths[:, 2]).mean())
  assert bias['base_rate_accuracy'] == bias['longer_wins'] > 0.8
  assert found['lengths']['chosen']['p100'] == lengths[:, 1].max()
  assert 'validation' not in found
  json.dumps(found)


def test_prompts_on_both_sides_are_counted(config, tmp_path):
  config.data.validation = str(tmp_path / 'validation.jsonl')
  lines = [json.dumps(record) for record in (RECORDS[0], _record('Other?', ' Yes.', ' No.'))]
  (tmp_path / 'validation.jsonl').write_text('\n'.join(lines))
  found, _ = inspect_data.inspect(config, 0)
  assert found['validation']['prompts_also_in_train'] == 1
  assert found['validation']['pairs'] == 2


def test_examples_mark_exactly_what_is_learned(config):
  _, shown = inspect_data.inspect(config, 30)
  texts = {(record['prompt'], record['chosen']) for record in RECORDS}
  for example in shown:
    prompt, chosen, rejected = (
      ''.join(piece.text for piece in pieces)
      for pieces in (example.prompt, example.chosen, example.rejected)
    )
    assert (prompt.removeprefix('<s>'), chosen.removesuffix('</s>')) in texts
    assert rejected.endswith('</s>')
    assert not any(piece.learned for piece in example.prompt)
    assert all(piece.learned for piece in (*example.chosen, *example.rejected))
    assert [piece.text for piece in example.chosen if piece.special] == ['</s>']


def test_text_has_colours_on_a_terminal_and_quotes_elsewhere(config):
  found, shown = inspect_data.inspect(config, 2)
  plain = text.render(found, shown, colour=False)
  coloured = text.render(found, shown, colour=True)
  assert '\033' not in plain
  marks = re.compile('[\u2039\u203a]')
  assert marks.sub('', plain) == re.sub('\033\\[[0-9;]*m', '', coloured)
  assert '\u2039</s>\u203a' in plain
  assert 'longer wins' in plain
  assert 'empty response' in plain


def test_the_page_stands_alone_and_escapes_what_records_say(config):
  found, shown = inspect_data.inspect(config, 30)
  html = page.render(found, shown)
  assert '&lt;script&gt;' in html
  assert '<script' not in html
  assert not re.search(r'(src|href)=', html)
  assert '<span class="learned special">&lt;/s&gt;</span>' in html


def test_the_command_prints_one_json_object(config, tmp_path):
  command = [sys.executable, '-m', 'dpo_flax.inspect_data', f'--config={TINY}', '--json']
  command += [f'--config.workdir={tmp_path}', f'--config.data.train={config.data.train}']
  page = tmp_path / 'page.html'
  done = subprocess.run(
    [*command, '--config.data.bad_record=skip', f'--html={page}'],
    capture_output=True,
    check=True,
    text=True,
  )
  assert json.loads(done.stdout)['read'] == len(RECORDS)
  assert page.read_text().startswith('<!doctype html>')


def test_what_training_would_refuse_is_shown_and_then_said(config, tmp_path):
  command = [sys.executable, '-m', 'dpo_flax.inspect_data', f'--config={TINY}', '--json']
  command += [f'--config.workdir={tmp_path}', f'--config.data.train={config.data.train}']
  command += ['--config.batch.tokens=28']
  done = subprocess.run(command, capture_output=True, check=False, text=True)
  found = json.loads(done.stdout)
  assert (found['read'], found['dropped']) == (len(RECORDS), 1)
  assert found['too_long'] + found['validation']['too_long'] > 0
  assert len(found['refused']) == 2
  assert done.returncode == 2
  assert 'pairs.jsonl:5: empty response' in done.stderr
  assert 'batch.tokens=28' in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_page_in_no_folder_is_refused_first(config, monkeypatch, tmp_path):
  page = type('Flag', (), {'value': str(tmp_path / 'none' / 'page.html')})
  monkeypatch.setattr(inspect_data, '_HTML', page)
  monkeypatch.setattr(inspect_data, 'inspect', None)
  with pytest.raises(ValueError, match='there is no folder'):
    inspect_data.show(config)
