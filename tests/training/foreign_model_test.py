"""A model that is none of ours: scored and trained by our packing, losses and step."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dpo_flax.data.batches import pack
from dpo_flax.losses.answers import pairs_of, scored
from dpo_flax.losses.metrics import summarize
from dpo_flax.losses.registry import Loss
from dpo_flax.model.hidden import Hidden
from dpo_flax.model.lora import reference_of
from dpo_flax.model.token_logps import TokenStatisticsOptions
from dpo_flax.training.logps import answer_logps, pair_logps
from dpo_flax.training.state import Models, init_state, split_models
from dpo_flax.training.step import jit_train_step, make_train_step
from helpers.batches import draw_pairs
from helpers.models import make_lora, make_mesh_of, make_model_config, make_models
from helpers.steps import make_options

VOCAB, EMBED, TOKENS = 97, 16, 64
ALL = TokenStatisticsOptions(kl=True, entropy=True, alignments=True)


class Low(nnx.Module):
  """y = x W + x A B."""

  def __init__(self, features, rngs, rank=2):
    inside, outside = features
    self.kernel = nnx.Param(rngs.params.normal(features) / math.sqrt(inside))
    self.a = nnx.LoRAParam(rngs.params.normal((inside, rank)) / math.sqrt(inside))
    self.b = nnx.LoRAParam(jnp.zeros((rank, outside)))
    self.adapted = True

  def set_view(self, adapted: bool | None = None):
    """Takes the adapter on and off."""
    self.adapted = self.adapted if adapted is None else adapted

  def __call__(self, x):
    y = jnp.matmul(x, self.kernel[...])
    return y + jnp.matmul(jnp.matmul(x, self.a[...]), self.b[...]) if self.adapted else y


class Theirs(nnx.Module):
  """One layer of attention between a table of tokens and places and a head of its own."""

  def __init__(self, rngs, *, head_learns=False):
    self.tokens = nnx.Param(rngs.params.normal((VOCAB, EMBED)))
    self.positions = nnx.Param(0.3 * rngs.params.normal((TOKENS, EMBED)))
    self.query, self.key, self.value = (Low((EMBED, EMBED), rngs) for _ in range(3))
    low = Low((EMBED, VOCAB), rngs)
    self.head = low if head_learns else nnx.Linear(EMBED, VOCAB, use_bias=False, rngs=rngs)

  def hidden(self, batch):
    """Returns the states alone, and knows neither dropout nor a cache."""
    x = self.tokens[...][batch['tokens']] + self.positions[...][batch['positions']]
    index = jnp.arange(x.shape[1])
    sees = (index[None, :, None] >= index[None, None]) & (
      index[None, :, None] < batch['visible_until'][:, None]
    )
    scores = jnp.einsum('bqd,bkd->bqk', self.query(x), self.key(x)) / math.sqrt(EMBED)
    weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf))
    return x + jnp.einsum('bqk,bkd->bqd', weights, self.value(x))

  def logits(self, hidden):
    """Returns [..., V]."""
    return self.head(hidden)


class Wrapped(nnx.Module):
  """One of our models, behind the two methods alone; its states have a mean square."""

  def __init__(self, model):
    self.model = model

  def hidden(self, batch, *, dropout_key=None, cache=None):
    """Returns statistics too."""
    states = self.model.hidden(batch, dropout_key=dropout_key).states
    return Hidden(states, {'square': jnp.sum(states**2), 'rows': jnp.float32(len(states))})

  def logits(self, hidden):
    """Returns [..., V]."""
    return self.model.logits(hidden)


def make_theirs(**options):
  """Policy and reference, which differ as after some training."""
  policy = Theirs(nnx.Rngs(params=0), **options)
  random = np.random.default_rng(0)
  for _, module in nnx.iter_modules(policy):
    if isinstance(module, Low):
      module.b[...] = jnp.asarray(0.2 * random.standard_normal(module.b.shape), jnp.float32)
  return Models(policy, nnx.view(policy, adapted=False))


def whole_logps(model, batch):
  """Log-probs of all scored targets [B, T], from whole logits."""
  logps = jax.nn.log_softmax(model.logits(model.hidden(batch)))
  return jnp.take_along_axis(logps, batch['targets'][..., None], axis=-1)[..., 0] * scored(batch)


@pytest.fixture(scope='module')
def pairs():
  return draw_pairs(7)


@pytest.fixture(scope='module')
def batch(pairs):
  return pack.pack_pairs(pairs, tokens=TOKENS, multiple=4)


def by_pair(logps, batch):
  """Every field of the real pairs, by their index."""
  order = np.argsort(batch['pair_index'][batch['pair_mask'] > 0])
  return jax.tree.map(lambda leaf: np.asarray(leaf)[batch['pair_mask'] > 0][order], logps)


@pytest.mark.parametrize('layout', pack.LAYOUTS)
def test_numbers_of_a_pair_do_not_depend_on_its_packing(pairs, layout):
  models = make_theirs()

  def run(batch):
    answers = answer_logps(models, batch, wanted=ALL, keep_tokens=True)
    return pairs_of(answers, batch, tails=True)

  alone = [pack.pack_pairs([pair], tokens=TOKENS, layout='separate') for pair in pairs]
  expected = [by_pair(jax.jit(run)(batch), batch) for batch in alone]
  packed = pack.pack_pairs(pairs, tokens=TOKENS, layout=layout, multiple=3)
  found = by_pair(jax.jit(run)(packed), packed)
  expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *expected)
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(found.policy_chosen - found.reference_chosen).min() > 1e-3


def test_padding_answers_are_masked(batch):
  answers = answer_logps(make_theirs(), batch, wanted=ALL)
  np.testing.assert_array_equal(answers.mask, batch['answer_mask'])
  empty = batch['answer_mask'] == 0
  assert empty.any()
  for name in ('policy', 'reference', 'lengths', 'kl', 'entropy', 'alignments'):
    values = getattr(answers, name)
    chex.assert_shape(values, batch['answer_mask'].shape)
    chex.assert_type(values, jnp.float32)
    assert not np.asarray(values)[empty].any(), name
    assert np.asarray(values)[~empty].any(), name


@pytest.mark.parametrize('head_learns', [False, True])
def test_gradient_is_that_of_whole_logits_and_reaches_the_adapters_alone(batch, head_learns):
  models = make_theirs(head_learns=head_learns)
  graphdef, trainable, frozen = split_models(models)

  def ours(trainable):
    answers = answer_logps(nnx.merge(graphdef, trainable, frozen), batch, logits_chunk=8)
    return jnp.sum(answers.policy - 2 * answers.reference)

  def plain(trainable):
    return jnp.sum(whole_logps(nnx.merge(graphdef, trainable, frozen).policy, batch))

  found, expected = jax.jit(jax.grad(ours))(trainable), jax.jit(jax.grad(plain))(trainable)
  assert len(jax.tree.leaves(found)) == (8 if head_learns else 6)
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize('shares', [True, False], ids=['a_view', 'a_second_model'])
def test_training_lowers_the_loss_and_changes_lora_params_alone(batch, shares):
  policy = Theirs(nnx.Rngs(params=0))
  reference = nnx.view(policy, adapted=False) if shares else Theirs(nnx.Rngs(params=0))
  models = Models(policy, reference)
  before = jax.tree.map(np.array, nnx.state(models))
  optimizer = optax.adamw(5e-2, weight_decay=0.1)
  step, state = make_train_step(models, optimizer, 'sigmoid'), init_state(models, optimizer)
  start = jax.tree.map(np.array, state.trainable)
  losses = []
  for _ in range(25):
    state, metrics = step(state, batch)
    losses.append(summarize(jax.device_get(metrics['sums']))['dpo_loss'])
  assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
  assert losses[-1] < 0.5 * losses[0]
  # The models that were given are as they were, and the reference is in the new ones too.
  chex.assert_trees_all_equal(jax.tree.map(np.array, nnx.state(models)), before)
  learned, rest = nnx.split_state(nnx.state(step.policy(state)), nnx.LoRAParam, ...)
  _, expected = nnx.split_state(nnx.state(policy), nnx.LoRAParam, ...)
  chex.assert_trees_all_equal(rest, expected)
  chex.assert_trees_all_equal(learned, state.trainable['policy'])
  assert set(state.trainable) == {'policy'}
  moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.trainable, start)
  assert all(leaf > 1e-3 for leaf in jax.tree.leaves(moved))


def test_two_models_apart_give_what_one_scan_gives(batch):
  ours = make_models(make_model_config(), make_lora())
  theirs = Models(*map(Wrapped, ours))
  objective = make_options(token_statistics=True, wpo=True, ld_alpha=0.5).objective
  expected, found = (
    jax.jit(lambda batch, models=models: pair_logps(models, batch, objective))(batch)
    for models in (ours, theirs)
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_policy_and_reference_may_be_of_two_classes_and_depths(batch):
  policy = make_models(make_model_config(), make_lora()).policy
  other = make_models(make_model_config(num_layers=1), None).policy
  for reference in (other, make_theirs().policy):
    logps = pair_logps(Models(policy, reference), batch)
    alone = pair_logps(reference, batch)
    assert alone.reference_chosen is None
    np.testing.assert_allclose(logps.reference_chosen, alone.policy_chosen, rtol=1e-5)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_statistics_of_the_policy_add_up_in_the_metrics(batch, microbatches):
  models = Models(*map(Wrapped, make_models(make_model_config(), make_lora())))
  step = make_train_step(models, optax.sgd(0.1), 'sigmoid', microbatches=microbatches)
  _, metrics = step(init_state(models, optax.sgd(0.1)), batch)
  states = models.policy.model.hidden(batch).states
  expected = {'square': jnp.sum(states**2), 'rows': len(batch['tokens'])}
  chex.assert_trees_all_close(metrics['sums']['statistics'], expected, rtol=1e-5)


def test_the_step_of_models_is_the_step_of_their_graphdef(batch):
  models, optimizer = make_models(make_model_config(), make_lora()), optax.sgd(0.1)
  state = init_state(models, optimizer)
  graphdef, _, frozen = split_models(models)
  options = make_options(loss='ipo', logits_chunk=16, microbatches=2)
  # A copy of the state, because either step consumes the one it gets.
  expected = jit_train_step(graphdef, optimizer, options)(
    jax.tree.map(jnp.copy, state), frozen, batch
  )
  step = make_train_step(models, optimizer, options.objective, logits_chunk=16, microbatches=2)
  chex.assert_trees_all_equal(step(state, batch), expected)


def test_models_on_a_mesh_need_no_ambient_mesh(batch):
  """The step spreads the rows over the devices itself."""
  results, optimizer = [], optax.sgd(0.1)
  for sizes in ({}, {'fsdp': 2, 'tensor': 2}):
    mesh = make_mesh_of(**sizes)
    models = make_models(make_model_config(vocab_size=98), make_lora(), mesh=mesh)
    step = make_train_step(models, optimizer, 'sigmoid')
    state, metrics = step(init_state(models, optimizer), batch)
    assert step.mesh == mesh
    results.append(jax.device_get((state.trainable, metrics['grad_norm'])))
  assert len(jax.tree.leaves(state.trainable)[0].sharding.device_set) == 4
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


class Switched(nnx.Module):
  """A view of its own, which is of something else than adapters."""

  def __init__(self, rngs):
    self.low = nnx.LoRA(EMBED, 2, VOCAB, rngs=rngs)

  def set_view(self, deterministic: bool | None = None):
    """Takes nothing off."""


class Stacked(nnx.Module):
  """A table, layers that nnx stacks and scans over, and a head."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
    self.layers = nnx.vmap(lambda rngs: Low((EMBED, EMBED), rngs))(rngs.split(3))
    self.head = nnx.Linear(EMBED, VOCAB, rngs=rngs)

  def hidden(self, batch):
    """Returns the states alone."""

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
      return x + jnp.tanh(layer(x))

    return run(self.layers, self.embed(batch['tokens']))

  def logits(self, hidden):
    """Returns [..., V]."""
    return self.head(hidden)


def test_layers_that_nnx_scans_over_learn(batch):
  models = Models(Stacked(nnx.Rngs(0)), Stacked(nnx.Rngs(0)))
  optimizer = optax.adam(1e-2)
  step, state = make_train_step(models, optimizer, 'sigmoid'), init_state(models, optimizer)
  found = []
  for _ in range(3):
    state, metrics = step(state, batch)
    found.append(summarize(metrics['sums'])['dpo_loss'])
  assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[2] < found[1] < found[0]


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('reference_logps', lambda array: array[:, :1]),
    ('pair_mask', lambda array: array[:, :1]),
    ('pairs', lambda array: array[:, :, :1]),
    ('targets', lambda array: array[:, 1:]),
    ('answer_ids', lambda array: array[:1]),
    ('positions', lambda array: array[0]),
  ],
)
def test_fields_that_do_not_go_together_are_refused(batch, name, change):
  batch = batch | {'reference_logps': jnp.zeros_like(batch['answer_mask'])}
  batch = batch | {name: change(batch[name])}
  with pytest.raises(ValueError, match=f'the batch has .*{"" if name == "pair_mask" else name}'):
    pair_logps(Theirs(nnx.Rngs(0)), batch)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'microbatches': 0}, 'microbatches=0'),
    ({'logits_chunk': -3}, 'logits_chunk=-3'),
    ({'spike_factor': -1.0}, 'spike_factor=-1.0'),
    ({'spike_factor': math.nan}, 'spike_factor=nan'),
  ],
)
def test_options_of_a_step_are_in_their_range(options, message):
  policy = Theirs(nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    make_train_step(policy, optax.sgd(1.0), 'simpo', **options)


def test_a_reference_that_would_learn_is_refused():
  policy = Theirs(nnx.Rngs(0))
  with pytest.raises(ValueError, match='the same object'):
    make_train_step((policy, policy), optax.sgd(1.0), 'ipo')
  policy.head = nnx.LoRALinear(EMBED, VOCAB, lora_rank=2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'head\.lora\.lora_a learns in the policy'):
    reference_of(policy)
  policy.head = Switched(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'head\.low\.lora_a learns in the policy'):
    reference_of(policy)


def test_a_loss_is_named_where_an_objective_is_taken(batch):
  policy = Theirs(nnx.Rngs(0))
  for loss in ('simpo', Loss(lambda logps: -logps.policy_chosen, needs_reference=False)):
    assert pair_logps(policy, batch, loss).reference_chosen is None
  with pytest.raises(ValueError, match='needs_reference=False'):
    pair_logps(policy, batch, lambda logps: -logps.policy_chosen)


def test_rows_that_devices_cannot_share_are_refused(batch):
  mesh = make_mesh_of(data=2)
  step = make_train_step(
    make_models(make_model_config(), make_lora(), mesh=mesh), optax.sgd(0.1), 'sigmoid'
  )
  with pytest.raises(ValueError, match='3 rows cannot be split over 2 devices'):
    step(None, {name: array[:3] for name, array in batch.items()})


class Plain:
  """A model that is no nnx.Module: its states are its one parameter."""

  def __init__(self, table, head):
    self.table, self.head = table, head

  def hidden(self, batch):
    """Returns the table's entry of each token."""
    return self.table[batch['tokens']]

  def logits(self, hidden):
    """Returns [..., V]."""
    return jnp.matmul(hidden, self.head)


def test_a_model_that_is_no_module_is_differentiated_whole(batch):
  random = np.random.default_rng(0)
  shapes = ((VOCAB, EMBED), (EMBED, VOCAB))
  weights = tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)

  def ours(weights):
    return jnp.sum(answer_logps(Plain(*weights), batch).policy)

  def plain(weights):
    return jnp.sum(whole_logps(Plain(*weights), batch))

  found, expected = jax.jit(jax.grad(ours))(weights), jax.jit(jax.grad(plain))(weights)
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
  assert all(np.any(gradient) for gradient in found)


def test_what_does_not_go_together_is_refused(batch):
  policy, reference = make_theirs()
  objective = make_options().objective
  with pytest.raises(ValueError, match='needs a reference'):
    pair_logps(policy, batch, objective)
  with pytest.raises(ValueError, match='needs a reference that runs'):
    known = batch | {'reference_logps': np.zeros_like(batch['answer_mask'])}
    answer_logps(Models(policy, reference), known, wanted=TokenStatisticsOptions(kl=True))
  with pytest.raises(ValueError, match='set it to 1'):
    make_train_step(Models(policy, reference), optax.sgd(0.1), 'aot', microbatches=2)
  with pytest.raises(ValueError, match='nothing learns'):
    init_state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
  policy.hidden = lambda batch: jnp.zeros((4, EMBED))
  with pytest.raises(ValueError, match=r'states of shape \(4, 16\)'):
    answer_logps(policy, batch)
