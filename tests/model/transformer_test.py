"""Laws of the network: what a sequence's hidden states may depend on, and what they may not."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpo_flax.model.attention import make_attention_inputs
from dpo_flax.model.config import AttentionType, Rope
from dpo_flax.model.transformer import Transformer, run_streams
from helpers.batches import draw_pairs, fill_batch
from helpers.models import BLOCK_PROJECTIONS, make_lora, make_model_config, make_models


@pytest.fixture(scope='module')
def models():
  """Policy and reference whose adapters differ from zero; remat full."""
  return make_models(make_model_config(), make_lora())


@pytest.fixture(scope='module')
def batch():
  """Two rows of pairs and an empty one."""
  pairs = draw_pairs(5)
  return fill_batch([pairs[:3], pairs[3:], []])


@nnx.jit
def streams(models, batch, key=None):
  return run_streams(models.policy, models.reference, batch, dropout_key=key)


@nnx.jit
def stream(model, batch):
  return run_streams(model, None, batch)[0]


# Three attention types: a window, other frequencies and no positions, no window.
TYPES = (
  AttentionType(5, Rope(100.0, dim=8, scaling=None)),
  AttentionType(5, None),
  AttentionType(None, Rope(10_000.0, dim=8, scaling=None)),
)


@pytest.mark.parametrize(
  ('dropout', 'changes'), [(0.0, {}), (0.5, {}), (0.0, {'attention_types': TYPES, 'num_layers': 5})]
)
def test_scan_over_stacked_blocks_equals_the_blocks_one_by_one(batch, dropout, changes):
  """Each layer has its own weights, its own dropout and its own attention type."""
  models = make_models(make_model_config(**changes), make_lora(dropout=dropout))
  policy, key = models.policy, jax.random.key(0)
  graphdef, layers = nnx.split(policy.blocks)
  inputs = make_attention_inputs(batch['positions'], batch['visible_until'], policy.config)

  @jax.jit
  def unrolled(layers, keys):
    hidden = policy.embed_tokens.embedding[...][batch['tokens']]
    for layer in range(policy.config.num_layers):
      block = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(layer), layers))
      hidden, _, _ = block(hidden, inputs[layer % len(inputs)], None, keys[layer])
    return policy.final_norm(hidden)

  outputs, _ = streams(models, batch, key)
  expected = unrolled(layers, jax.random.split(key, policy.config.num_layers))
  np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_types_that_differ_in_nothing_a_row_can_show_share_their_inputs(batch):
  """Rows shorter than a window know of none, and select nothing."""
  rope = Rope(10_000.0, dim=8, scaling=None)
  types = (AttentionType(96, rope), AttentionType(None, rope))
  config = make_model_config(attention_types=types)
  first, second = make_attention_inputs(batch['positions'], batch['visible_until'], config)
  assert first.mask.window is None
  leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  assert all(one is other for one, other in leaves)
  narrower = make_model_config(attention_types=(AttentionType(95, rope), types[1]))
  inputs = make_attention_inputs(batch['positions'], batch['visible_until'], narrower)
  assert all(each.mask.window is not None for each in inputs)


def test_layers_start_different():
  model = Transformer(make_model_config(), make_lora(), nnx.Rngs(0, lora=1))
  q_proj = model.blocks.attention.q_proj
  for first, second in (q_proj.kernel[...], q_proj.adapters.learned.lora_a[...]):
    assert not np.array_equal(first, second)
  q, k = model.blocks.mlp.gate_proj.kernel[...], model.blocks.mlp.up_proj.kernel[...]
  assert not np.array_equal(q, k)


def test_two_streams_equal_each_model_alone(models, batch):
  policy, reference = streams(models, batch)
  np.testing.assert_allclose(policy, stream(models.policy, batch), atol=1e-5)
  np.testing.assert_allclose(reference, stream(models.reference, batch), atol=1e-5)
  assert np.abs(policy - reference).max() > 0.1


def test_adapters_off_equals_the_base_bit_for_bit(models, batch):
  base = nnx.eval_shape(lambda: Transformer(make_model_config(), None, nnx.Rngs(0)))
  _, weights = nnx.split_state(nnx.state(models.policy), nnx.LoRAParam, ...)
  base = nnx.merge(nnx.graphdef(base), weights)
  np.testing.assert_array_equal(stream(models.reference, batch), stream(base, batch))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_policy_equals_reference_bit_for_bit_while_b_is_zero(batch, dtype):
  config = make_model_config(dtype=jnp.dtype(dtype))
  lora = make_lora(targets=frozenset([*BLOCK_PROJECTIONS, 'lm_head']))
  fresh = make_models(config, lora, zero_b=True)
  policy, reference = streams(fresh, batch)
  np.testing.assert_array_equal(policy, reference)
  np.testing.assert_array_equal(fresh.policy.logits(policy), fresh.reference.logits(reference))


def test_reference_is_a_view_of_the_policys_own_variables(models):
  policy, reference = models
  own = {id(leaf) for leaf in jax.tree.leaves(nnx.state(policy))}
  assert {id(leaf) for leaf in jax.tree.leaves(nnx.state(reference))} == own


def test_contents_of_padding_reach_no_response(models, batch):
  is_padding = np.asarray((batch['positions'] == 0) & (batch['tokens'] == 0))
  assert is_padding[:2].any() and is_padding[2].all()
  noise = np.random.default_rng(0).integers(1, 97, is_padding.shape)
  noisy = batch | {
    'tokens': jnp.where(is_padding, noise, batch['tokens']),
    'positions': jnp.where(is_padding, noise, batch['positions']),
  }
  for plain, changed in zip(streams(models, batch), streams(models, noisy), strict=True):
    np.testing.assert_array_equal(np.asarray(plain)[~is_padding], np.asarray(changed)[~is_padding])
    assert np.isfinite(changed).all()


def test_a_token_reaches_those_that_see_it_and_no_other(models, batch):
  """Changing the first chosen token of the first pair moves the rest of that branch alone."""
  changed_at = int(np.flatnonzero(np.asarray(batch['answer_ids'][0]) == 0)[0]) + 1
  until = int(batch['visible_until'][0, changed_at])
  changed = batch | {'tokens': batch['tokens'].at[0, changed_at].add(1)}
  before, after = stream(models.policy, batch), stream(models.policy, changed)
  moved = np.abs(before - after).max(axis=-1) > 1e-6
  assert not moved[1:].any()
  np.testing.assert_array_equal(np.flatnonzero(moved[0]), np.arange(changed_at, until))


def gradient(models, batch, *, key=None):
  """Returns the gradient of a sum over both streams, for every variable of both models."""
  graphdef, state = nnx.split(models)

  @jax.jit
  def function(state):
    def total(state):
      policy, reference = nnx.merge(graphdef, state)
      outputs = run_streams(policy, reference, batch, dropout_key=key)
      return sum(jnp.sum(jnp.sin(jnp.arange(o.size).reshape(o.shape)) * o) for o in outputs)

    return jax.grad(total)(state)

  return function(state)


def test_remat_changes_no_gradient(batch):
  gradients = [
    gradient(
      make_models(
        make_model_config(remat=remat, tie_word_embeddings=True, attention_types=TYPES[1:]),
        make_lora(dropout=0.2),
      ),
      batch,
      key=jax.random.key(3),
    )
    for remat in ('none', 'full', 'dots', 'offload')
  ]
  flat = [jax.tree.leaves_with_path(each) for each in gradients]
  for (path, expected), *others in zip(*flat, strict=True):
    assert np.abs(expected).max() > 0, path
    for _, other in others:
      scale = np.abs(expected).max()
      np.testing.assert_allclose(other, expected, atol=1e-5 * scale, err_msg=str(path))


def test_nothing_is_learned_through_the_reference(models, batch):
  """A stream that is all reference has no gradient, though it shares the policy's variables."""
  graphdef, state = nnx.split(models)

  def total(state):
    policy, reference = nnx.merge(graphdef, state)
    return jnp.sum(run_streams(policy, reference, batch)[1] ** 2)

  for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(state)):
    assert not np.any(leaf)


def test_dropout_is_on_the_policy_alone_and_follows_its_key(batch):
  models = make_models(make_model_config(), make_lora(dropout=0.5))
  first, second = jax.random.key(0), jax.random.key(1)
  policy, reference = streams(models, batch, first)
  again, _ = streams(models, batch, first)
  other, same_reference = streams(models, batch, second)
  without, same = streams(models, batch)
  np.testing.assert_array_equal(policy, again)
  np.testing.assert_array_equal(reference, same_reference)
  np.testing.assert_array_equal(reference, same)
  assert len({float(jnp.sum(each)) for each in (policy, other, without)}) == 3


def test_tied_head_is_the_embedding(batch):
  models = make_models(make_model_config(tie_word_embeddings=True), make_lora())
  policy = models.policy
  hidden = stream(policy, batch)
  assert not hasattr(policy, 'lm_head')
  expected = np.asarray(hidden) @ np.asarray(policy.embed_tokens.embedding[...]).T
  np.testing.assert_allclose(policy.logits(hidden), expected, atol=1e-4)


@pytest.mark.parametrize('tied', [False, True])
def test_logits_of_bfloat16_leave_the_head_in_float32(tied):
  """Rounded to bfloat16 they would take few distinct values."""
  config = make_model_config(
    dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16, tie_word_embeddings=tied
  )
  lora = make_lora() if tied else make_lora(targets=frozenset(['lm_head']))
  model = Transformer(config, lora, nnx.Rngs(0, lora=1))
  hidden = jax.random.normal(jax.random.key(0), (1, 4, 32), jnp.bfloat16)
  logits = model.logits(hidden)
  assert logits.dtype == jnp.float32
  assert not np.array_equal(logits, logits.astype(jnp.bfloat16))
