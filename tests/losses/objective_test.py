"""Every option that would be ignored, and every illegal pairing, is refused by name."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax import config, losses
from dpo_flax.losses import CONSTANTS, LOSSES, Loss, Objective, as_objective, register, total_loss
from dpo_flax.losses.objective import OPTIONS
from helpers.pairs import make_pairs


def options_of(**options):
  settings = config.default().objective
  settings.update(**options)
  return settings


@pytest.mark.parametrize('option', (*CONSTANTS, 'ld_alpha', 'wpo', 'reference_free'))
@pytest.mark.parametrize('loss', tuple(LOSSES))
def test_an_option_is_accepted_exactly_where_it_is_read(loss, option):
  value = True if option in ('wpo', 'reference_free') else 0.25
  options = {'loss': loss, option: value}
  if loss == 'exo_pair':
    options.setdefault('label_smoothing', 0.001)
  if LOSSES[loss].reads(option):
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


@pytest.mark.parametrize('loss', tuple(LOSSES))
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


def test_the_config_has_the_options_of_an_objective_and_their_defaults():
  """One list, in one order: saved runs and command lines name these fields."""
  names = ['loss', 'loss_weights', 'beta', 'label_smoothing', 'gamma', 'cpo_alpha', 'orpo_lambda']
  names += ['dpop_lambda', 'discopop_temperature', 'divergence', 'alpha_divergence', 'sft_weight']
  names += ['ld_alpha', 'wpo', 'reference_free', 'kl_penalty_weight', 'token_statistics']
  section = config.default().objective
  assert list(OPTIONS) == list(Objective().options()) == names
  assert Objective().options() == dict(section.items())
  assert Objective() == Objective.from_config(section)


def test_options_that_are_not_given_stay_unset():
  objective = Objective('simpo', beta=2.0)
  assert objective.gamma == 0.5
  assert objective.options()['gamma'] is None
  assert Objective.from_config(objective.options()) == objective
  assert Objective('simpo', gamma=0.5).options()['gamma'] == 0.5


def test_replacing_an_option_checks_it_again():
  objective = Objective(('sigmoid', 'sft'), loss_weights=(1.0, 0.5), kl_penalty_weight=0.1)
  changed = objective.replace(kl_penalty_weight=None, beta=0.3)
  assert (changed.kl_penalty_weight, changed.beta) == (None, 0.3)
  assert changed.loss_weights == (1.0, 0.5)
  with pytest.raises(ValueError, match='must be above 0'):
    objective.replace(beta=-1.0)


@pytest.mark.parametrize(
  'duplicate', (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))
)
def test_a_copy_is_the_same_key(duplicate):
  objective = Objective('simpo', gamma=1.0)
  assert duplicate(objective) == objective
  assert hash(duplicate(objective)) == hash(objective)


def test_an_option_that_does_not_exist_is_named():
  with pytest.raises(TypeError, match='no option gama'):
    Objective('simpo', gama=1.0)
  with pytest.raises(AttributeError, match='no loss of this objective has a constant gamma'):
    _ = Objective('sigmoid').gamma


def squared(logps, *, beta=0.1, target=1.0):
  """A user's loss: the square of DPO's logit less a target."""
  policy, reference = logps.policy, logps.reference
  ratio = policy.chosen - policy.rejected - reference.chosen + reference.rejected
  return jnp.square(beta * ratio - target)


def likelihood(logps):
  return -logps.policy_chosen


def test_a_function_is_taken_wherever_a_name_is():
  pairs = make_pairs()
  objective = Objective(squared, beta=0.3, target=2.0)
  assert objective.loss == ('squared',) and objective.needs_reference
  expected = squared(pairs, beta=0.3, target=2.0)
  assert jnp.array_equal(total_loss(pairs, objective), expected)
  compiled = jax.jit(total_loss, static_argnums=1)
  assert jnp.allclose(compiled(pairs, objective), expected, rtol=1e-6)
  mixed = Objective((squared, 'ipo'), loss_weights=(1.0, 0.5), beta=0.3)
  parts = squared(pairs, beta=0.3) + 0.5 * LOSSES['ipo'](pairs, beta=0.3)
  assert jnp.allclose(total_loss(pairs, mixed), parts, rtol=1e-6)


def test_a_function_is_taken_to_need_the_reference_unless_it_says_otherwise():
  assert Objective(likelihood).needs_reference
  assert not Objective(Loss(likelihood, needs_reference=False)).needs_reference
  with pytest.raises(ValueError, match='reference_free=True is not used'):
    Objective(Loss(likelihood, needs_reference=False), reference_free=True)


def test_a_loss_of_the_package_is_itself_by_name_and_by_function():
  assert Objective(LOSSES['ipo'].function) == Objective('ipo') == as_objective('ipo')
  objective = Objective('ipo', beta=0.3)
  assert as_objective(objective) is objective


def test_what_a_partial_fixes_stays():
  pairs = make_pairs()
  halved = functools.partial(losses.sigmoid, beta=0.5)
  np.testing.assert_array_equal(
    total_loss(pairs, Objective(halved)), losses.sigmoid(pairs, beta=0.5)
  )


def test_a_partial_of_a_registered_loss_is_known_as_it_is():
  assert not Objective(functools.partial(losses.simpo, gamma=1.0)).needs_reference
  assert Objective(functools.partial(losses.aot, beta=0.2)).sorts_batch


def test_a_default_of_ones_own_is_not_overridden():
  pairs = make_pairs()

  def constant(logps, *, beta=0.5):
    return beta * jnp.ones_like(logps.policy_chosen)

  with pytest.raises(ValueError, match=r'constant has the default beta=0\.5'):
    Objective(constant)
  np.testing.assert_allclose(total_loss(pairs, Objective(constant, beta=0.5)), 0.5)


def test_a_function_of_another_shape_is_refused():
  with pytest.raises(ValueError, match=r'mean returns shape \(\) for pairs of shape \(2, 4\)'):
    total_loss(make_pairs(), Objective(Loss(lambda logps: likelihood(logps).mean(), 'mean')))


def test_a_constant_without_a_default_has_to_be_given():
  def needy(logps, *, target):
    return logps.policy_chosen * target

  with pytest.raises(ValueError, match=r'needs objective\.target a value'):
    Objective(needy)
  assert Objective(needy, target=2.0).target == 2.0


def test_a_registered_loss_goes_by_its_name():
  register(records=('margin',), needs_reference=False)(squared)
  try:
    assert Objective('squared', wpo=True).reads('margin')
    with pytest.raises(ValueError, match='registered already'):
      register()(squared)
  finally:
    del LOSSES['squared']
