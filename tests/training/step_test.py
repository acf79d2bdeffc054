"""Laws of the step; its log-probs and gradients are those of a plain implementation."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dpo_flax.training.logps import pair_logps
from dpo_flax.training.state import Models, init_train_state, split_models
from dpo_flax.training.step import jit_eval_step, jit_train_step
from helpers import plain_dpo as plain
from helpers.batches import draw_pairs, fill_batch
from helpers.models import (
  BLOCK_PROJECTIONS,
  arrays_in,
  make_lora,
  make_mesh_of,
  make_model_config,
  make_models,
)
from helpers.steps import make_options

SCALE = 10 / 4  # of make_lora's adapters

VOCAB = 97
WITH_HEAD = frozenset([*BLOCK_PROJECTIONS, 'lm_head'])
# Its state is the last gradient, as it was given.
RECORDER = optax.trace(decay=0.0)


def start(models, optimizer, mesh):
  """Returns (graphdef, state, frozen); the state is a copy, because a step consumes it."""
  graphdef, trainable, frozen = split_models(models)
  state = init_train_state(jax.tree.map(jnp.copy, trainable), optimizer, mesh)
  return graphdef, state, frozen


def run_step(models, batch, options, mesh, optimizer=RECORDER):
  """Returns the state and metrics after one step."""
  graphdef, state, frozen = start(models, optimizer, mesh)
  return jit_train_step(graphdef, optimizer, options)(state, frozen, batch)


def gradient_of(state):
  """Returns the gradient that RECORDER saw, as nested dicts of the policy's adapters."""
  return nnx.to_pure_dict(state.opt_state.trace)['policy']


def assert_trees_close(ours, expected, *, relative):
  """Compares leaf by leaf, relative to the largest entry of each."""
  pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(expected), strict=True)
  for (path, our), (their_path, their) in pairs:
    assert path == their_path
    largest = np.abs(their).max()
    assert largest > 0, path
    np.testing.assert_allclose(our, their, atol=relative * largest, rtol=0, err_msg=str(path))


@pytest.fixture(scope='module')
def mesh():
  return make_mesh_of()


@pytest.fixture(scope='module')
def lora():
  return make_lora(targets=WITH_HEAD)


@pytest.fixture(scope='module')
def models(lora):
  """Adapters everywhere, the head too, none of them zero."""
  return make_models(make_model_config(), lora)


@pytest.fixture(scope='module')
def fresh():
  """The models before the first step: B is zero."""
  return make_models(make_model_config(), make_lora(), zero_b=True)


@pytest.fixture(scope='module')
def pairs():
  return draw_pairs(7)


@pytest.fixture(scope='module')
def rows(pairs):
  """Four rows with three, one, no and three pairs."""
  return [pairs[:3], pairs[3:4], [], pairs[4:]]


@pytest.fixture(scope='module')
def options():
  return make_options()


@pytest.fixture(scope='module')
def plain_logps(models, pairs):
  """Returns name -> [N] log-probs of both models, from the plain implementation."""
  policy, reference, targets, mask = plain.token_log_softmax(models, pairs, SCALE)
  found = {}
  for name, logps in (('policy', policy), ('reference', reference)):
    picked = np.take_along_axis(np.asarray(logps), targets[..., None], axis=-1)[..., 0] * mask
    found[f'{name}_chosen'], found[f'{name}_rejected'] = np.split(picked.sum(axis=-1), 2)
  return found


@pytest.mark.parametrize('layout', ['shared', 'separate'])
@pytest.mark.parametrize('packing', ['alone', 'together', 'reversed'])
def test_log_probs_of_a_pair_do_not_depend_on_its_packing(
  models, pairs, rows, options, plain_logps, layout, packing
):
  if packing == 'alone':
    rows = [[pair] for pair in pairs]
  elif packing == 'reversed':
    rows = [row[::-1] for row in rows[::-1]]
  batch = fill_batch(rows, layout=layout)
  logps = jax.jit(lambda batch: pair_logps(models, batch, options.objective))(batch)
  is_real = np.asarray(batch['pair_mask']) == 1
  index = np.asarray(batch['pair_index'])[is_real]
  assert sorted(index) == list(range(len(pairs)))
  for name, expected in plain_logps.items():
    values = np.asarray(getattr(logps, name))
    np.testing.assert_allclose(values[is_real], expected[index], rtol=1e-5, atol=1e-5)
    assert not values[~is_real].any()
  gap = plain_logps['policy_chosen'] - plain_logps['reference_chosen']
  assert np.abs(gap).min() > 0.01, 'the two models must differ for this test to say much'
  lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])[index]
  np.testing.assert_array_equal(np.asarray(logps.chosen_lengths)[is_real], lengths[:, 0])
  np.testing.assert_array_equal(np.asarray(logps.rejected_lengths)[is_real], lengths[:, 1])


def test_token_means_and_tails_of_a_pair_equal_plain_ones(models, pairs, rows):
  options = make_options(wpo=True, token_statistics=True, kl_penalty_weight=0.1, ld_alpha=0.5)
  batch = fill_batch(rows)
  logps = jax.jit(lambda batch: pair_logps(models, batch, options.objective))(batch)
  policy, reference, targets, mask = map(np.asarray, plain.token_log_softmax(models, pairs, SCALE))
  picked = np.take_along_axis(policy, targets[..., None], axis=-1)[..., 0]
  probs = np.exp(policy)
  tokens = {
    'kl': np.sum(probs * (policy - reference), axis=-1),
    'entropy': -np.sum(probs * policy, axis=-1),
    'alignments': picked - np.log(np.sum(probs**2, axis=-1)),
  }
  lengths = mask.sum(axis=-1)
  expected = {name: (value * mask).sum(axis=-1) / lengths for name, value in tokens.items()}
  shorter = np.tile(np.minimum(*np.split(lengths, 2)), 2)
  is_tail = mask * (np.cumsum(mask, axis=-1) > shorter[:, None])
  expected['policy_tails'] = (picked * is_tail).sum(axis=-1)
  is_real = np.asarray(batch['pair_mask']) == 1
  for name, value in expected.items():
    for ours, theirs in zip(getattr(logps, name), np.split(value, 2), strict=True):
      np.testing.assert_allclose(ours[is_real], theirs, rtol=2e-5, atol=2e-5, err_msg=name)
      assert not np.asarray(ours)[~is_real].any()


def test_reference_runs_only_for_losses_that_use_it(models, rows):
  batch = fill_batch(rows)
  for loss, needed in (('sigmoid', True), ('simpo', False)):
    options = make_options(loss=loss)
    logps = jax.eval_shape(lambda batch, o=options: pair_logps(models, batch, o.objective), batch)
    assert (logps.reference_chosen is not None) == needed


@pytest.mark.parametrize(
  ('layout', 'microbatches'), [('shared', 1), ('separate', 1), ('shared', 2), ('shared', 4)]
)
def test_gradient_equals_plain_implementation(models, pairs, rows, mesh, layout, microbatches):
  """However the batch is cut, with rows that hold three pairs, one and none."""
  options = make_options(microbatches=microbatches, beta=0.5)
  state, metrics = run_step(models, fill_batch(rows, layout=layout), options, mesh)
  loss, expected = plain.loss_and_gradient(
    models, pairs, np.ones(len(pairs)), scale=SCALE, beta=0.5
  )
  total, count = metrics['sums']['means']['dpo_loss']
  assert count == len(pairs)
  assert float(total / count) == pytest.approx(float(loss), abs=1e-5)
  assert_trees_close(gradient_of(state), expected, relative=2e-5)
  norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(expected)))
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize('tied', [False, True], ids=['untied', 'tied'])
def test_gradient_under_a_frozen_head_equals_plain_implementation(pairs, rows, mesh, tied):
  models = make_models(make_model_config(tie_word_embeddings=tied), make_lora())
  state, _ = run_step(models, fill_batch(rows), make_options(beta=0.5), mesh)
  weights = np.ones(len(pairs))
  _, expected = plain.loss_and_gradient(models, pairs, weights, scale=SCALE, beta=0.5)
  assert_trees_close(gradient_of(state), expected, relative=2e-5)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_pairs_weight_counts_it_that_many_times(models, pairs, mesh, microbatches):
  weights = np.array([2.0, 1.0, 0.5, 3.0, 0.25, 1.0, 0.0])
  weighted = [
    pair._replace(pair_weight=weight) for pair, weight in zip(pairs, weights, strict=True)
  ]
  rows = [weighted[:3], weighted[3:4], [], weighted[4:]]
  batch = fill_batch(rows, columns=('pair_weight',))
  options = make_options(microbatches=microbatches)
  state, metrics = run_step(models, batch, options, mesh)
  loss, expected = plain.loss_and_gradient(models, pairs, weights, scale=SCALE, beta=0.1)
  total, count = metrics['sums']['means']['dpo_loss']
  assert float(total / count) == pytest.approx(float(loss), abs=1e-5)
  assert_trees_close(gradient_of(state), expected, relative=2e-5)


def test_metrics_of_microbatches_add_up_to_those_of_the_batch(models, pairs, rows, mesh):
  batch = fill_batch(rows)
  whole, parts, evaluated = (
    run_step(models, batch, make_options(microbatches=n), mesh)[1]['sums'] for n in (1, 2, 4)
  )
  graphdef, state, frozen = start(models, RECORDER, mesh)
  evaluated = jit_eval_step(graphdef, make_options())(state, frozen, batch)
  for other in (parts, evaluated):
    chex.assert_trees_all_close(whole, other, rtol=1e-4, atol=1e-4)
  real = sum(len(p.prompt) + 1 + len(p.chosen) + len(p.rejected) for p in pairs)
  for sums in (whole, parts, evaluated):
    counts = {name: int(value) for name, value in sums['counts'].items()}
    assert counts == {'pairs': 7, 'tokens': real, 'positions': 4 * 96}


@pytest.mark.parametrize('layout', ['shared', 'separate'])
def test_tokens_are_counted_for_the_shortest_pairs_too(fresh, mesh, layout):
  """A prompt and responses of one token each are mostly ends of sequences, not padding."""
  (pair,) = draw_pairs(1)
  pair = pair._replace(prompt=pair.prompt[:1], chosen=pair.chosen[:1], rejected=pair.rejected[:1])
  graphdef, state, frozen = start(fresh, RECORDER, mesh)
  batch = fill_batch([[pair, pair]], layout=layout)
  counts = jit_eval_step(graphdef, make_options())(state, frozen, batch)['counts']
  assert int(counts['tokens']) == 8


def test_an_empty_batch_has_no_gradient_and_no_loss(fresh, mesh):
  state, metrics = run_step(fresh, fill_batch([[], []]), make_options(), mesh)
  assert bool(metrics['finite'])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient_of(state)))
  np.testing.assert_array_equal(metrics['sums']['means']['dpo_loss'], [0.0, 0.0])


def test_loss_is_log_two_and_only_b_learns_while_policy_equals_reference(fresh, rows, mesh):
  state, metrics = run_step(fresh, fill_batch(rows), make_options(), mesh)
  means = metrics['sums']['means']
  assert float(means['dpo_loss'][0] / 7) == pytest.approx(math.log(2), abs=1e-6)
  assert means['dpo_chosen_reward'][0] == means['dpo_rejected_reward'][0] == 0.0
  np.testing.assert_array_equal(means['dpo_margin_policy'], means['dpo_margin_ref'])
  for path, leaf in jax.tree.leaves_with_path(gradient_of(state)):
    assert np.any(leaf) == ('lora_b' in str(path)), path


def test_step_reaches_only_adapters(models, rows, options, mesh):
  """The optimizer knows of nothing else, and no bit of the base moves."""
  optimizer = optax.adamw(1e-2, weight_decay=0.1)
  graphdef, state, frozen = start(models, optimizer, mesh)
  adapters = {str(path) for path, _ in jax.tree.leaves_with_path(state.trainable)}
  assert adapters and all('lora_' in path for path in adapters)
  assert not any('lora_' in str(path) for path, _ in jax.tree.leaves_with_path(frozen))
  moments = state.opt_state[0]
  for tree in (moments.mu, moments.nu):
    assert {str(path) for path, _ in jax.tree.leaves_with_path(tree)} == adapters
  size = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
  assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2 * size + 4

  before, base = jax.tree.map(np.array, (state.trainable, frozen))
  state, _ = jit_train_step(graphdef, optimizer, options)(state, frozen, fill_batch(rows))
  for path, leaf in jax.tree.leaves_with_path(
    jax.tree.map(lambda new, old: np.abs(new - old).max(), state.trainable, before)
  ):
    assert leaf > 1e-3, path
  chex.assert_trees_all_equal(frozen, base)
  assert int(state.step) == 1


def test_reference_never_moves(models, rows, options, mesh):
  """After a step of the policy, the reference still gives the log-probs it gave."""
  optimizer, batch = optax.sgd(1.0), fill_batch(rows)
  graphdef, state, frozen = start(models, optimizer, mesh)
  evaluate = jit_eval_step(graphdef, options)
  before = evaluate(state, frozen, batch)['means']
  state, _ = jit_train_step(graphdef, optimizer, options)(state, frozen, batch)
  after = evaluate(state, frozen, batch)['means']
  np.testing.assert_array_equal(before['dpo_margin_ref'], after['dpo_margin_ref'])
  assert before['dpo_margin_policy'][0] != after['dpo_margin_policy'][0]
  assert float(after['dpo_loss'][0]) < float(before['dpo_loss'][0])


@pytest.fixture(scope='module')
def dropped(rows, mesh):
  """Returns run(seed, step) -> (metric sums, gradient) of a step under dropout, and without it."""
  models = make_models(make_model_config(), make_lora(dropout=0.3))
  graphdef, trainable, frozen = split_models(models)
  batch = fill_batch(rows)
  steps = {
    seed: jit_train_step(graphdef, RECORDER, make_options(dropout_seed=seed))
    for seed in (0, 1, None)
  }

  def run(seed, step):
    state = init_train_state(jax.tree.map(jnp.copy, trainable), RECORDER, mesh)
    moved = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf + step if str(path[0]) == '.step' else leaf, state
    )
    state, metrics = steps[seed](moved, frozen, batch)
    assert int(state.step) == step + 1
    return metrics['sums']['means'], gradient_of(state)

  def evaluate():
    state = init_train_state(jax.tree.map(jnp.copy, trainable), RECORDER, mesh)
    return jit_eval_step(graphdef, make_options(dropout_seed=0))(state, frozen, batch)['means']

  return run, evaluate


def test_dropout_is_a_function_of_seed_and_step(dropped):
  run, _ = dropped
  chex.assert_trees_all_equal(run(0, 5), run(0, 5))
  losses = [float(run(seed, step)[0]['dpo_loss'][0]) for seed, step in ((0, 5), (0, 6), (1, 5))]
  assert len(set(losses)) == 3


def test_dropout_spares_the_reference_and_evaluation(dropped):
  run, evaluate = dropped
  with_dropout, without, evaluated = run(0, 5)[0], run(None, 5)[0], evaluate()
  np.testing.assert_array_equal(with_dropout['dpo_margin_ref'], without['dpo_margin_ref'])
  assert with_dropout['dpo_margin_policy'][0] != without['dpo_margin_policy'][0]
  np.testing.assert_allclose(evaluated['dpo_loss'], without['dpo_loss'], rtol=1e-6)


def test_microbatches_draw_different_dropout(pairs, mesh):
  """Twice the same row: with the same masks, the sum of both would be twice either."""
  models = make_models(make_model_config(), make_lora(dropout=0.3))
  sums = [
    float(
      run_step(
        models,
        fill_batch([pairs[:2]] * rows),
        make_options(dropout_seed=0, microbatches=rows),
        mesh,
      )[1]['sums']['means']['dpo_margin_policy'][0]
    )
    for rows in (1, 2)
  ]
  assert sums[1] != pytest.approx(2 * sums[0], rel=1e-3)


@pytest.fixture(scope='module')
def poisoned(models):
  """The models with an embedding of token 96 that is not a number."""
  graphdef, state = nnx.split(models)

  def poison(path, leaf):
    return leaf.at[96].set(jnp.nan) if 'embedding' in str(path) else leaf

  return Models(*nnx.merge(graphdef, jax.tree.map_with_path(poison, state)))


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(poisoned, mesh, microbatches):
  healthy = draw_pairs(4, vocab=96)
  sick = healthy[0]._replace(chosen=np.array([5, 96, 7], np.int32))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
  options = make_options(microbatches=microbatches)
  graphdef, state, frozen = start(poisoned, optimizer, mesh)
  step = jit_train_step(graphdef, optimizer, options)

  state, metrics = step(state, frozen, fill_batch([healthy[:2], healthy[2:]]))
  assert bool(metrics['finite']) and int(state.step) == 1
  before = jax.tree.map(np.array, state)
  state, metrics = step(state, frozen, fill_batch([healthy[:2], [*healthy[2:], sick]]))
  assert not bool(metrics['finite'])
  chex.assert_trees_all_equal(state, before)
  state, metrics = step(state, frozen, fill_batch([healthy[:2], healthy[2:]]))
  assert bool(metrics['finite']) and int(state.step) == 2


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(models, rows, mesh):
  """With beta 1e25 the loss is finite; the square of its gradient is not."""
  optimizer = optax.adamw(1e-2)
  options = make_options(beta=1e25)
  graphdef, state, frozen = start(models, optimizer, mesh)
  before = jax.tree.map(np.array, state)
  state, metrics = jit_train_step(graphdef, optimizer, options)(state, frozen, fill_batch(rows))
  assert np.isfinite(metrics['sums']['means']['dpo_loss']).all()
  assert not np.isfinite(metrics['grad_norm']) and not bool(metrics['finite'])
  chex.assert_trees_all_equal(state, before)


def test_a_gradient_that_spikes_leaves_the_state_as_it_was(models, rows, mesh):
  optimizer = optax.sgd(0.0)  # a batch's gradient stays the same
  batches = [fill_batch([rows[0]]), fill_batch([rows[1]])]
  options = make_options()
  graphdef, state, frozen = start(models, optimizer, mesh)
  step = jit_train_step(graphdef, optimizer, options)
  norms = []
  for batch in batches:
    state, metrics = step(state, frozen, batch)
    norms.append(float(metrics['grad_norm']))
  (low, usual), (high, larger) = sorted(zip(norms, batches, strict=True), key=lambda pair: pair[0])
  options = dataclasses.replace(options, spike_factor=(1 + high / low) / 2)
  step = jit_train_step(graphdef, optimizer, options)
  for _ in range(29):
    state, metrics = step(state, frozen, usual)
    assert not bool(metrics['spikes'])
  before = jax.tree.map(np.array, state)
  state, metrics = step(state, frozen, larger)
  assert bool(metrics['spikes']) and bool(metrics['finite'])
  chex.assert_trees_all_equal(state, before)
  state, metrics = step(state, frozen, usual)
  assert not bool(metrics['spikes']) and int(state.step) == 32


@pytest.mark.parametrize('head_is_trained', [False, True], ids=['frozen_head', 'trained_head'])
def test_no_step_holds_the_logits_of_a_row(models, fresh, rows, mesh, head_is_trained):
  """Neither as traced nor as compiled: no array with a vocabulary axis is larger than the head."""
  chosen = models if head_is_trained else fresh
  options = make_options(logits_chunk=4, kl_penalty_weight=0.1)
  graphdef, state, frozen = start(chosen, RECORDER, mesh)
  step, batch = jit_train_step(graphdef, RECORDER, options), fill_batch(rows)
  largest = max(VOCAB * chosen.policy.config.embed_dim, 4 * 4 * VOCAB)
  assert largest < 96 * VOCAB
  shapes = [array.shape for array in arrays_in(step, state, frozen, batch)]
  compiled = step.lower(state, frozen, batch).compile().as_text()
  shapes += [tuple(map(int, dims.split(','))) for dims in re.findall(r'\w+\[([\d,]+)\]', compiled)]
  with_vocabulary = [shape for shape in shapes if VOCAB in shape]
  assert with_vocabulary
  assert max(map(math.prod, with_vocabulary)) <= largest
