"""Laws of attention: the mask is the one a reader would draw, blocks change nothing but memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax.model import attention
from dpo_flax.model.attention import QUERY_BLOCK
from dpo_flax.model.mask import Mask, make_mask
from helpers.batches import draw_pairs, fill_batch
from helpers.models import arrays_in, make_model_config

LAYOUTS = ('shared', 'separate')


def plain_attention(queries, keys, values, visible):
  """Softmax attention written out; keys and values repeated for each query head they serve."""
  group = queries.shape[2] // keys.shape[2]
  keys, values = jnp.repeat(keys, group, axis=2), jnp.repeat(values, group, axis=2)
  scores = jnp.einsum('bqhd,bkhd->bhqk', queries, keys) / np.sqrt(queries.shape[-1])
  weights = jnp.exp(scores) * visible[:, None]
  weights /= weights.sum(axis=-1, keepdims=True)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, values)


def xla_attention(queries, keys, values, visible_until):
  """Without window and softcap, scaled as usual."""
  mask = Mask(visible_until, None, None)
  scale = queries.shape[-1] ** -0.5
  return attention.xla_attention(queries, keys, values, mask, scale=scale, softcap=None)


def drawn_mask(pairs, layout, tokens):
  """[query, key] of one row: each branch sees its prompt and itself, up to the query."""
  visible = np.eye(tokens, dtype=bool)  # padding sees itself
  start = 0
  for pair in pairs:
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    if layout == 'shared':
      prefix = np.arange(start, start + prompt - 1)
      branches = [1 + chosen, 1 + rejected]  # each opens with the prompt's last token
      start += prompt - 1
    else:
      prefix = np.arange(0)
      branches = [prompt + chosen, prompt + rejected]
    visible[np.ix_(prefix, prefix)] = True
    for length in branches:
      branch = np.arange(start, start + length)
      visible[np.ix_(branch, prefix)] = True
      visible[np.ix_(branch, branch)] = True
      start += length
  return visible & np.tri(tokens, dtype=bool)


def random_heads(rows, tokens, heads, kv_heads, head_dim=8):
  random = np.random.default_rng(0)
  shapes = [(rows, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
  return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('block', [16, QUERY_BLOCK])
def test_each_token_sees_its_own_branch_and_prompt_alone(monkeypatch, layout, block):
  monkeypatch.setattr(attention, 'QUERY_BLOCK', block)
  pairs = draw_pairs(5)
  rows, tokens = [pairs[:3], pairs[3:], []], 100
  batch = fill_batch(rows, layout=layout, tokens=tokens)
  # Equal scores and one-hot values: what comes out is each query's weight on every key.
  zeros = jnp.zeros((3, tokens, 1, tokens))
  values = jnp.tile(jnp.eye(tokens)[None, :, None], (3, 1, 1, 1))
  weights = xla_attention(zeros, zeros, values, batch['visible_until'])[:, :, 0]
  expected = np.stack([drawn_mask(row, layout, tokens) for row in rows])
  expected = expected / expected.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize('tokens', [1, 15, 32, 41])
@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 2), (3, 1), (2, 2)])
def test_attention_in_blocks_equals_plain_softmax(monkeypatch, tokens, heads, kv_heads):
  monkeypatch.setattr(attention, 'QUERY_BLOCK', 16)
  check_against_plain(draw_pairs(2), tokens, heads, kv_heads)


def test_attention_equals_plain_softmax_past_the_real_block_size():
  check_against_plain(draw_pairs(20), 2 * QUERY_BLOCK + 37, 4, 2)


def check_against_plain(pairs, tokens, heads, kv_heads):
  """Compares values and all three gradients, under a weighting that tells outputs apart."""
  fits = tokens > 100
  batch = fill_batch([pairs if fits else [], []], tokens=tokens, pairs_per_row=len(pairs))
  # Beside the mask of packed rows, one long prefix that opens twice.
  visible_until = (
    batch['visible_until']
    .at[1]
    .set(
      jnp.where(jnp.arange(tokens) % 3 == 0, tokens, jnp.minimum(jnp.arange(tokens) + 5, tokens))
    )
  )
  query, key = np.arange(tokens)[:, None], np.arange(tokens)[None]
  visible = (key <= query)[None] & (query[None] < np.asarray(visible_until)[:, None])
  inputs = random_heads(2, tokens, heads, kv_heads)
  weight = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape, np.float32))

  @jax.jit
  def both(*inputs):
    def ours(*inputs):
      outputs = xla_attention(*inputs, visible_until)
      return jnp.sum(outputs * weight), outputs

    def theirs(*inputs):
      outputs = plain_attention(*inputs, visible)
      return jnp.sum(outputs * weight), outputs

    return [jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*inputs) for f in (ours, theirs)]

  (ours, our_gradients), (theirs, their_gradients) = both(*inputs)
  np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
  for our, their in zip(our_gradients, their_gradients, strict=True):
    np.testing.assert_allclose(our, their, atol=2e-5)


def test_scores_of_bfloat16_heads_are_float32():
  """Scores of 64 and 64.25, which bfloat16 would both call 64."""
  queries = jnp.array([8, 0.125], jnp.bfloat16)
  keys = jnp.array([[8, 0], [8, 2]], jnp.bfloat16)
  values = jnp.array([[0, 0], [1, 1]], jnp.bfloat16)
  outputs = xla_attention(
    jnp.tile(queries, (1, 2, 1, 1)),
    keys[None, :, None],
    values[None, :, None],
    jnp.full((1, 2), 2),
  )
  assert outputs.dtype == jnp.bfloat16
  expected = 1 / (1 + np.exp(-0.25 / np.sqrt(2)))
  np.testing.assert_allclose(float(outputs[0, 1, 0, 0]), expected, rtol=2**-8)


def test_scores_of_all_queries_never_exist_at_once():
  heads, tokens = 4, 4 * QUERY_BLOCK
  inputs = random_heads(1, tokens, heads, 2)
  visible_until = jnp.full((1, tokens), tokens)

  def total(*inputs):
    return jnp.sum(xla_attention(*inputs, visible_until))

  largest = max(array.size for array in arrays_in(jax.grad(total, (0, 1, 2)), *inputs))
  assert largest == heads * QUERY_BLOCK * tokens


def test_the_kernel_needs_no_mesh_on_one_device():
  """On several, each device runs it on its own rows and heads."""
  queries, keys, values = random_heads(2, 256, 4, 2, head_dim=128)
  config = make_model_config(attention='pallas', head_dim=128)

  def run(visible_until):
    mask = make_mask(visible_until, None, 'pallas')
    return attention.attend(queries, keys, values, mask, config=config)

  mixed = jax.eval_shape(run, jnp.full((2, 256), 256))
  chex.assert_equal_shape((mixed, queries))
