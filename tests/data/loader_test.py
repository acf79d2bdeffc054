"""Batch s is a pure function of s: any number of hosts and workers, any step reached by seeking."""

import json

import numpy as np
import pytest

from dpo_flax import config as schema
from dpo_flax.assembly.data import prepare_data
from dpo_flax.config.settings import settings_of
from dpo_flax.data import loader

ROWS, TOKENS = 4, 64


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """150 pairs over 50 prompts."""
  path = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
  random = np.random.RandomState(0)
  words = ['the cat', 'reads', 'tea.', 'a model', 'us', 'answers', 'nothing']

  def text(n):
    return ''.join(f' {words[i]}' for i in random.randint(0, len(words), n))

  records = [
    {'prompt': f'Question {i % 50}:', 'chosen': text(2 + i % 5), 'rejected': text(1 + i % 3) + '!'}
    for i in range(150)
  ]
  path.write_text('\n'.join(map(json.dumps, records)))
  return path


@pytest.fixture
def config(data, json_directory, tmp_path_factory):
  config = schema.default()
  config.workdir = str(tmp_path_factory.getbasetemp() / 'workdir')
  config.data.train = str(data)
  config.data.tokenizer = str(json_directory)
  config.batch.rows, config.batch.tokens = ROWS, TOKENS
  return config


def _prepare(config, vocab_size=500):
  return prepare_data(settings_of(config), vocab_size=vocab_size)


def _take(config, prepared, n, *, start=0, shard=0, shards=1):
  batches = loader.train_batches(
    prepared,
    start_step=start,
    shard_index=shard,
    shard_count=shards,
    workers=config.data.workers,
  )
  try:
    return [next(batches) for _ in range(n)]
  finally:
    batches.close()


def _validate(prepared, *, shard=0, shards=1):
  batches = loader.validation_batches(prepared, shard_index=shard, shard_count=shards)
  try:
    return list(batches)
  finally:
    batches.close()


def _assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _join(shards):
  """Puts the shards' batches together, host after host."""
  return [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*shards, strict=True)
  ]


def _indices(batches):
  return np.concatenate([batch['pair_index'][batch['pair_mask'] > 0] for batch in batches])


def test_four_hosts_read_the_batches_of_one(config):
  prepared = _prepare(config)
  whole = _take(config, prepared, 12)
  parts = [_take(config, prepared, 12, shard=i, shards=4) for i in range(4)]
  _assert_same(_join(parts), whole)
  parts = [_validate(prepared, shard=i, shards=4) for i in range(4)]
  _assert_same(_join(parts), _validate(prepared))


def test_a_host_may_read_parts_that_lie_apart(config):
  prepared = _prepare(config)
  parts = [_take(config, prepared, 3, shard=i, shards=4) for i in (0, 3)]
  _assert_same(_take(config, prepared, 3, shard=(0, 3), shards=4), _join(parts))


def test_seeking_to_a_step_equals_streaming_to_it(config):
  whole = _take(config, _prepare(config), 30)
  for start in (1, 7, 25):
    _assert_same(_take(config, _prepare(config), 3, start=start), whole[start : start + 3])


def test_worker_processes_give_the_same_batches(config):
  whole = _take(config, _prepare(config), 6)
  config.data.workers = 2
  _assert_same(_take(config, _prepare(config), 4, start=2), whole[2:])


@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('packed', [True, False])
def test_every_epoch_holds_every_pair_once_across_batch_borders(config, shuffle, packed):
  config.data.shuffle, config.data.pack = shuffle, packed
  prepared = _prepare(config)
  rows = [len(prepared.train_rows.plan(epoch)) for epoch in range(3)]
  assert any(sum(rows[: i + 1]) % ROWS for i in range(3))  # some epoch ends inside a batch
  batches = _join([[b] for b in _take(config, prepared, -(-sum(rows) // ROWS))])[0]
  start = 0
  for count in rows:
    epoch = {name: array[start : start + count] for name, array in batches.items()}
    expected = prepared.train.cache.records[prepared.train.pairs]
    assert sorted(_indices([epoch])) == sorted(expected)
    assert packed or (epoch['pair_mask'].sum(axis=1) == 1).all()
    start += count


def test_epochs_have_orders_of_their_own_and_the_seed_decides_them(config):
  prepared = _prepare(config)
  first, second = (list(prepared.train_rows.plan(epoch).pairs) for epoch in (0, 1))
  assert first != second
  assert list(_prepare(config).train_rows.plan(1).pairs) == second
  config.seed = 1
  assert list(_prepare(config).train_rows.plan(0).pairs) != first


def test_without_shuffling_unpacked_rows_follow_the_source(config):
  config.data.shuffle, config.data.pack = False, False
  config.data.validation_split_fraction = 0.0
  prepared = _prepare(config)
  assert prepared.validation is None
  assert list(_indices(_take(config, prepared, 5))) == list(range(5 * ROWS))


def test_validation_holds_every_pair_once_and_ends_in_empty_rows(config):
  prepared = _prepare(config)
  batches = _validate(prepared)
  records = prepared.validation.cache.records[prepared.validation.pairs]
  assert sorted(_indices(batches)) == sorted(records)
  assert all(batch['tokens'].shape == (ROWS, TOKENS) for batch in batches)
  last = _join([[batches[-1]]])[0]
  empty = last['pair_mask'].sum(axis=1) == 0
  used = len(prepared.every_row('validation')) - ROWS * (len(batches) - 1)
  assert list(empty) == [row >= used for row in range(ROWS)]
  assert not last['tokens'][empty].any()
  assert (last['visible_until'][empty] == np.arange(1, TOKENS + 1)).all()


def test_no_prompt_is_trained_on_and_held_out(config, data):
  prepared = _prepare(config)
  prompts = [json.loads(line)['prompt'] for line in data.read_text().splitlines()]
  train = {prompts[i] for i in prepared.train.cache.records[prepared.train.pairs]}
  held = {prompts[i] for i in prepared.validation.cache.records[prepared.validation.pairs]}
  assert not train & held
  assert len(train | held) == 50
  assert len(prepared.train) + len(prepared.validation) == 150
  assert 15 <= len(prepared.validation) <= 17


def test_batches_name_their_records(config, data):
  prepared = _prepare(config)
  batch = _take(config, prepared, 1)[0]
  lines = data.read_text().splitlines()
  row, slot = np.argwhere(batch['pair_mask'])[-1]
  where = prepared.where('train', batch['pair_index'][row, slot])
  record = json.loads(lines[int(where.removeprefix(f'{data}:')) - 1])
  at = batch['answer_ids'][row] == batch['pairs'][row, slot, 0]
  text = prepared.tokenizer.decode(batch['targets'][row][at])
  assert text == record['chosen'] + '</s>'
  with pytest.raises(ValueError, match='pair_index 999'):
    prepared.where('train', 999)


def test_a_validation_file_leaves_train_whole(config, data, tmp_path):
  lines = data.read_text().splitlines()
  (tmp_path / 'validation.jsonl').write_text('\n'.join(lines[:7]))
  config.data.validation = str(tmp_path / 'validation.jsonl')
  prepared = _prepare(config)
  assert len(prepared.train) == 150
  assert sorted(_indices(_validate(prepared))) == list(range(7))
  assert prepared.where('validation', 3) == f'{tmp_path}/validation.jsonl:4'


def test_epochs_of_a_mixture_hold_each_file_by_its_weight(config, data, tmp_path):
  lines = data.read_text().splitlines()
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines[:60]))
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines[60:100]))
  config.data.train = {str(tmp_path / 'a.jsonl'): 0.5, str(tmp_path / 'b.jsonl'): 2.0}
  config.data.validation = str(data)
  prepared = _prepare(config)
  rows = [len(prepared.train_rows.plan(epoch)) for epoch in range(2)]
  batches = _join([[b] for b in _take(config, prepared, -(-sum(rows) // ROWS))])[0]
  first, both = (
    np.bincount(_indices([{name: a[:n] for name, a in batches.items()}]), minlength=100)
    for n in (rows[0], sum(rows))
  )
  assert first[:60].sum() == 30
  assert list(first[60:]) == [2] * 40
  assert list(both) == [1] * 60 + [4] * 40
  fingerprint = prepared.fingerprint
  config.data.train = {str(tmp_path / 'a.jsonl'): 1.0, str(tmp_path / 'b.jsonl'): 2.0}
  assert _prepare(config).fingerprint != fingerprint
  assert prepared.report['train']['padding_fraction'] < 0.2


def test_pairs_per_row_caps_every_plan(config):
  chosen = _prepare(config)
  assert chosen.pairs_per_row == chosen.train_rows.plan(0).pairs_per_row > 1
  for cap in (1, 2):
    config.batch.pairs_per_row = cap
    prepared = _prepare(config)
    assert prepared.pairs_per_row == cap
    assert _take(config, prepared, 1)[0]['pair_mask'].shape == (ROWS, cap)
    assert max(prepared.train_rows.plan(e).pairs_per_row for e in range(3)) <= cap
  config.data.pack = False
  assert _prepare(config).pairs_per_row == 1


def test_steps_cover_the_epochs_that_were_asked_for(config):
  prepared = _prepare(config)
  rows = [len(prepared.train_rows.plan(epoch)) for epoch in range(3)]
  for epochs, needed in ((1.0, rows[0]), (2.5, rows[0] + rows[1] + rows[2] / 2), (3.0, sum(rows))):
    steps = loader.steps_for_epochs(prepared, epochs)
    assert (steps - 1) * ROWS < needed <= steps * ROWS


def test_fingerprint_changes_with_what_decides_the_batches_and_only_then(config, data, tmp_path):
  first = _prepare(config).fingerprint
  config.workdir = str(tmp_path)
  config.train.log_every = 3
  assert _prepare(config).fingerprint == first
  changed = {first}
  for path, value in (
    ('seed', 1),
    ('data.layout', 'separate'),
    ('batch.rows', 8),
    ('data.shuffle', False),
    ('data.chat_template', '{{ messages }}'),
  ):
    with config.unlocked():
      config.update_from_flattened_dict({path: value})
    changed.add(_prepare(config).fingerprint)
  (tmp_path / 'fewer.jsonl').write_text('\n'.join(data.read_text().splitlines()[:-1]))
  config.data.train = str(tmp_path / 'fewer.jsonl')
  changed.add(_prepare(config).fingerprint)
  assert len(changed) == 7


def test_optional_fields_appear_when_the_data_has_them(config, tmp_path):
  records = [
    {'prompt': f'p{i}', 'chosen': ' us', 'rejected': ' tea.', 'weight': float(i)} for i in range(9)
  ]
  records[3].pop('weight')
  records[4]['chosen_probability'] = 0.75
  records[5]['margin'] = 1.5
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
  assert 'pair_weight' not in _take(config, _prepare(config), 1)[0]
  config.data.train = str(tmp_path / 'a.jsonl')
  config.data.validation_split_fraction = 0.0
  batch = _take(config, _prepare(config), 1)[0]
  real = batch['pair_mask'] > 0
  fields = ('pair_index', 'pair_weight', 'chosen_probability', 'margin')
  assert all(batch[field].dtype == np.float32 for field in fields[1:])
  for i, *values in zip(*(batch[field][real] for field in fields), strict=True):
    assert values == [1.0 if i == 3 else i, 0.75 if i == 4 else 1.0, 1.5 if i == 5 else 0.0]
  assert not batch['margin'][~real].any()


def test_report_accounts_for_every_pair_and_token(config):
  prepared = _prepare(config)
  report = json.loads(json.dumps(prepared.report))
  assert report['train']['read'] == report['train']['kept'] == 150
  assert report['train']['pairs'] + report['validation']['pairs'] == 150
  plan = prepared.train_rows.plan(0)
  batches = _take(config, prepared, -(-len(plan) // ROWS))
  tokens = np.concatenate([b['visible_until'] for b in batches])[: len(plan)]
  own = (tokens != np.arange(1, TOKENS + 1)).sum()  # all but padding and each branch's last token
  assert report['train']['rows'] == len(plan)
  branches_that_end = 2 * len(prepared.train)
  assert report['train']['tokens'] == own + branches_that_end
  assert report['train']['padding_fraction'] == pytest.approx(
    1 - report['train']['tokens'] / (len(plan) * TOKENS)
  )


def test_rows_that_hosts_cannot_share_are_refused(config):
  with pytest.raises(ValueError, match=r'batch\.rows=4 cannot be divided among 3'):
    _take(config, _prepare(config), 1, shards=3)


def test_settings_that_cannot_be_meant_are_refused(config, data):
  config.data.validation = {str(data): 2.0}
  with pytest.raises(ValueError, match='every validation pair counts once'):
    _prepare(config)
  config.data.validation = None
  for field in ('fields', 'template_variables'):
    config.data[field] = 'chosen'
    with pytest.raises(ValueError, match=f"data.{field}='chosen': expected a mapping"):
      _prepare(config)
    config.data[field] = None


def test_missing_settings_are_named(config):
  config.data.tokenizer = None
  with pytest.raises(ValueError, match=r'set data\.tokenizer'):
    _prepare(config)


def test_without_a_place_for_the_cache_nothing_is_written(config):
  config.workdir = None
  with pytest.raises(ValueError, match=r'set workdir or data\.cache_dir'):
    _prepare(config)


def test_a_small_embedding_is_refused_with_file_and_line(config):
  with pytest.raises(ValueError, match=r'pairs\.jsonl:\d+: token id \d+ is beyond'):
    _prepare(config, vocab_size=100)


def test_an_epoch_has_one_plan_whenever_it_is_asked_for(config):
  """Also where the cap on pairs per row is taken from the data."""
  prepared = _prepare(config)
  before = prepared.train_rows.plan(0)
  prepared.train_rows.start(5)  # the plans of the first epochs are forgotten on the way
  after = prepared.train_rows.plan(0)
  np.testing.assert_array_equal(before.pairs, after.pairs)
  np.testing.assert_array_equal(before.starts, after.starts)
