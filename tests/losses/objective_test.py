"""Every option that would be ignored, and every illegal pairing, is refused by name."""

import pytest

from dpo_flax import config
from dpo_flax.losses.objective import PUBLISHED, READS, Objective


def options_of(**options):
  settings = config.default().objective
  settings.update(**options)
  return settings


@pytest.mark.parametrize('option', (*PUBLISHED, 'ld_alpha', 'wpo', 'reference_free'))
@pytest.mark.parametrize('loss', tuple(READS))
def test_an_option_is_accepted_exactly_where_it_is_read(loss, option):
  value = True if option in ('wpo', 'reference_free') else 0.25
  options = {'loss': loss, option: value}
  if loss == 'exo_pair':
    options.setdefault('label_smoothing', 0.001)
  if option in READS[loss]:
    assert getattr(Objective.from_config(options_of(**options)), option) == value
  else:
    with pytest.raises(ValueError, match=rf'{option}=.*not used by objective.loss'):
      Objective.from_config(options_of(**options))


REFUSED = {
  'an unknown loss': ({'loss': 'dpo'}, 'is not one of sigmoid'),
  'no loss': ({'loss': ()}, 'no loss'),
  'a loss twice': ({'loss': ('ipo', 'ipo')}, 'names a loss twice'),
  'too few weights': (
    {'loss': ('sigmoid', 'sft'), 'loss_weights': (1.0,)},
    '1 numbers for 2 losses',
  ),
  'a weight of zero': ({'loss': ('sigmoid', 'sft'), 'loss_weights': (1.0, 0.0)}, 'above 0'),
  'beta of zero': ({'beta': 0.0}, 'must be above 0'),
  'beta not a number': ({'beta': float('nan')}, 'must be above 0'),
  'half the labels wrong': ({'label_smoothing': 0.5}, r'must be in \[0, 0.5\)'),
  'exo without smoothing': ({'loss': 'exo_pair'}, 'needs objective.label_smoothing'),
  'total variation': ({'divergence': 'total_variation'}, 'cannot be inverted'),
  'chi-squared': ({'divergence': 'chi_squared'}, '0 is in the domain'),
  'an unknown divergence': ({'divergence': 'renyi'}, 'use one of reverse_kl'),
  'alpha missing': ({'divergence': 'alpha'}, "goes with divergence='alpha'"),
  'alpha unused': ({'alpha_divergence': 0.5}, "goes with divergence='alpha'"),
  'alpha of one': ({'divergence': 'alpha', 'alpha_divergence': 1.0}, '1 is forward_kl'),
  'a divergence for sft': ({'loss': 'sft', 'divergence': 'js'}, 'sft alone'),
  'a free reference with a KL': (
    {'reference_free': True, 'kl_penalty_weight': 0.1},
    'KL is measured from the reference',
  ),
  'a free reference with a divergence': (
    {'reference_free': True, 'divergence': 'js'},
    'divergence is measured from the reference',
  ),
}


@pytest.mark.parametrize('case', tuple(REFUSED))
def test_refuses(case):
  options, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    Objective.from_config(options_of(**options))


@pytest.mark.parametrize('loss', tuple(READS))
def test_a_divergence_goes_only_where_the_normaliser_cancels(loss):
  allowed = {'sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'exo_pair', 'robust', 'discopop'}
  options = {'loss': (loss, 'sft') if loss != 'sft' else 'sft', 'divergence': 'js'}
  if loss == 'exo_pair':
    options['label_smoothing'] = 0.001
  if loss in allowed:
    assert Objective.from_config(options_of(**options)).divergence == 'js'
  else:
    with pytest.raises(ValueError, match='normaliser'):
      Objective.from_config(options_of(**options))


def test_unset_constants_are_those_published():
  objective = Objective.from_config(options_of(loss=('sigmoid', 'simpo')))
  assert objective.gamma == 0.5
  assert objective.label_smoothing == 0.0
  assert objective.loss_weights == (1.0, 1.0)


def test_the_reference_is_run_only_where_it_is_read():
  def needs(**options):
    return Objective.from_config(options_of(**options)).needs_reference

  assert needs()
  assert needs(loss=('simpo', 'sigmoid'))
  assert needs(loss='simpo', kl_penalty_weight=0.1)
  assert not needs(loss='simpo')
  assert not needs(reference_free=True)


def test_equal_settings_are_one_key_so_that_a_step_compiles_once():
  assert {Objective.from_config(options_of()): 'compiled'}[Objective.from_config(options_of())]
  assert Objective.from_config(options_of(beta=0.2)) != Objective.from_config(options_of())
