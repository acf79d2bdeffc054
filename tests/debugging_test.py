"""The helpers for users: true for sound packing, and loud for packing that is not."""

import math
import types

import numpy as np
import pytest

from dpo_flax import debugging
from dpo_flax.data.batches import pack
from dpo_flax.debugging import as_text, pair_table, separate_and_packed_losses
from helpers.batches import draw_pairs
from helpers.models import make_lora, make_model_config, make_models
from helpers.steps import make_options

LOSSES = (
  {'loss': 'sigmoid'},
  {'loss': 'sigmoid', 'kl_penalty_weight': 0.3},
  {'loss': 'ipo', 'divergence': 'js', 'ld_alpha': 0.5},
  {'loss': 'sppo_hard', 'wpo': True},
  {'loss': ('bco_pair', 'sft')},
  {'loss': 'aot'},
  {'loss': 'simpo'},
)


@pytest.fixture(scope='module')
def models():
  return make_models(make_model_config(), make_lora())


@pytest.fixture(scope='module')
def tokenizer():
  """Writes ids as numbers."""
  return types.SimpleNamespace(decode=lambda ids: ' '.join(map(str, ids)))


@pytest.mark.parametrize('layout', pack.LAYOUTS)
@pytest.mark.parametrize('objective', LOSSES, ids=str)
def test_separate_and_packed_losses_agree(objective, layout, models):
  pairs = draw_pairs(7)
  table = separate_and_packed_losses(
    models, pairs, make_options(**objective), tokens=96, layout=layout
  )
  assert [row['pair_index'] for row in table] == [pair.index for pair in pairs]
  for suffix in ('', '_with_kl'):
    separate, packed = ([row[name + suffix] for row in table] for name in ('separate', 'packed'))
    np.testing.assert_allclose(packed, separate, rtol=2e-4, atol=1e-5)
  assert len({row['packed'] for row in table}) == len(pairs)


def test_the_penalty_is_added_with_the_weight_of_the_objective(models):
  """The two extra columns differ from the first two by weight x KL; 1 x KL where it has none."""
  tables = [
    separate_and_packed_losses(models, draw_pairs(5), make_options(**options), tokens=96)
    for options in ({}, {'kl_penalty_weight': 0.25})
  ]
  for name in ('separate', 'packed'):
    ones, quarters = (
      np.array([row[f'{name}_with_kl'] - row[name] for row in table]) for table in tables
    )
    assert (ones > 0).all()
    np.testing.assert_allclose(quarters, 0.25 * ones, rtol=1e-3, atol=1e-5)


def test_broken_packing_shows(models, monkeypatch):
  """Pairs that see their neighbours in a row have other losses than by themselves."""
  fill_batch = pack.fill_batch

  def leaky(rows, **options):
    batch = fill_batch(rows, **options)
    if options['layout'] == 'shared':
      batch['visible_until'][:] = options['tokens']
    return batch

  monkeypatch.setattr(debugging.pack, 'fill_batch', leaky)
  table = separate_and_packed_losses(models, draw_pairs(7), make_options(), tokens=96)
  assert max(abs(row['separate'] - row['packed']) for row in table) > 1e-2


def test_a_pair_longer_than_a_row_is_refused(models):
  with pytest.raises(ValueError, match=r'tokens=8: the longest of the pairs takes \d+'):
    separate_and_packed_losses(models, draw_pairs(7), make_options(), tokens=8)


def test_without_a_reference_there_is_no_kl_to_compare(models):
  table = separate_and_packed_losses(
    models, draw_pairs(3), make_options(reference_free=True), tokens=96
  )
  assert set(table[0]) == {'pair_index', 'separate', 'packed'}


def test_weights_and_margins_of_the_records_are_kept(models):
  pairs = draw_pairs(5)
  plain = separate_and_packed_losses(models, pairs, make_options(), tokens=96)
  pairs[3] = pairs[3]._replace(margin=2.0)
  changed = separate_and_packed_losses(models, pairs, make_options(), tokens=96)
  assert [a['packed'] < b['packed'] for a, b in zip(plain, changed, strict=True)] == [
    i == 3 for i in range(5)
  ]


@pytest.mark.parametrize('layout', pack.LAYOUTS)
def test_table_reads_every_pair_back(layout, models, tokenizer):
  pairs = draw_pairs(7)
  # What is read but not learned, such as a tool's output, belongs to the text.
  pairs[2] = pairs[2]._replace(chosen=np.array([5, ~6, ~7, 8], np.int32))
  rows = [pairs[:3], [], pairs[3:]]
  batch = pack.fill_batch(rows, tokens=96, pairs_per_row=5, layout=layout)
  table = pair_table(models, batch, make_options(), tokenizer)
  for row, pair in zip(table, pairs, strict=True):
    assert row['pair_index'] == pair.index
    for name in ('prompt', 'chosen', 'rejected'):
      ids = getattr(pair, name)
      assert row[name] == tokenizer.decode(np.where(ids < 0, ~ids, ids))
    for name in ('chosen', 'rejected'):
      assert row[f'{name}_tokens'] == np.sum(getattr(pair, name) >= 0)


def test_table_judges_as_the_loss_does(models, tokenizer):
  pairs = draw_pairs(7)
  batch = pack.fill_batch([pairs[:3], pairs[3:]], tokens=96, pairs_per_row=4, layout='shared')
  losses = separate_and_packed_losses(models, pairs, make_options(), tokens=96)
  for row, loss in zip(pair_table(models, batch, make_options(), tokenizer), losses, strict=True):
    assert row['margin'] == pytest.approx(row['chosen_reward'] - row['rejected_reward'], abs=1e-5)
    assert row['loss'] == pytest.approx(math.log1p(math.exp(-row['margin'])), rel=1e-4)
    assert row['loss'] == pytest.approx(loss['separate'], rel=1e-4)


def test_an_empty_batch_has_an_empty_table(models, tokenizer):
  batch = pack.fill_batch([[]], tokens=16, pairs_per_row=2, layout='shared')
  assert pair_table(models, batch, make_options(), tokenizer) == []
  assert as_text([]) == ''


def test_text_is_one_line_a_pair_under_its_columns():
  rows = [
    {'pair_index': 7, 'prompt': 'Two\nlines', 'margin': 0.125},
    {'pair_index': 11, 'prompt': 'long ' * 40, 'margin': -1.0},
  ]
  head, first, second = as_text(rows).splitlines()
  assert head.split() == ['pair_index', 'prompt', 'margin']
  assert first.startswith('7 ') and r'Two\nlines' in first and first.endswith('0.125')
  assert '…' in second and len(second) < 80
  assert first.index('0.125') == second.index('-1') == head.index('margin')
