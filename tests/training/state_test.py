"""What is trainable, and where the optimizer keeps its moments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dpo_flax.assembly.models import load_model
from dpo_flax.training.state import Models, RecentNorms, RewardMean, init_train_state, split_models
from helpers.models import make_lora, make_mesh_of, make_model_config, make_models


def names(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, _ in jax.tree.leaves_with_path(tree)
  }


@pytest.fixture(scope='module')
def models():
  config = make_model_config(dtype=jnp.dtype('bfloat16'), weight_dtype=jnp.dtype('bfloat16'))
  return make_models(config, make_lora(targets=frozenset(['q_proj', 'down_proj'])))


def test_the_adapters_learn_and_everything_else_is_frozen(models):
  _, trainable, frozen = split_models(models)
  places = ('attention.q_proj', 'mlp.down_proj')
  expected = {
    f'policy.blocks.{place}.adapters.learned.lora_{ab}.value' for place in places for ab in 'ab'
  }
  assert names(trainable) == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype('float32')}
  assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype('bfloat16')}


def test_the_base_of_both_views_is_held_once(models):
  _, _, frozen = split_models(models)
  base, _ = nnx.split_state(nnx.state(models.policy), nnx.Not(nnx.LoRAParam), ...)
  assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(base))


def test_a_reference_of_its_own_is_frozen_whole(models):
  config = make_model_config(num_layers=2)
  other = load_model(config, None, checkpoint=None, mesh=make_mesh_of(), seed=5)
  _, trainable, frozen = split_models(Models(models.policy, other))
  assert all(name.startswith('policy.') for name in names(trainable))
  assert 'reference.lm_head.kernel.value' in names(frozen)


def test_merged_models_are_the_same_two_views_of_one_base(models):
  policy, reference = nnx.merge(*split_models(models))
  assert policy.blocks.attention.q_proj.adapters.active
  assert not reference.blocks.attention.q_proj.adapters.active
  assert policy.blocks.attention.q_proj.kernel is reference.blocks.attention.q_proj.kernel


def test_moments_lie_where_their_parameters_lie():
  mesh = make_mesh_of(fsdp=4, tensor=2)
  models = make_models(make_model_config(vocab_size=96), make_lora(), mesh=mesh)
  _, trainable, _ = split_models(models)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = init_train_state(trainable, optimizer, mesh)
  moments = state.opt_state[1][0]
  # q_proj's A is split over its inputs, B over its heads.
  attention = moments.mu['policy']['blocks']['attention']['q_proj']['adapters']['learned']
  assert attention['lora_a'][...].sharding.spec == P(None, 'fsdp', None)
  assert attention['lora_b'][...].sharding.spec == P(None, None, ('tensor', 'fsdp'))
  for tree in (state.trainable, moments.mu, moments.nu):
    leaves, parameters = jax.tree.leaves(tree), jax.tree.leaves(trainable)
    chex.assert_type(leaves, jnp.float32)
    chex.assert_trees_all_equal_shapes(leaves, parameters)
    for leaf, parameter in zip(leaves, parameters, strict=True):
      assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)
      assert not leaf.is_fully_replicated
  scalars = (state.step, moments.count, state.rewards.mean, state.rewards.count, state.norms.count)
  assert all(leaf.is_fully_replicated and leaf == 0 for leaf in scalars)


def test_a_spike_is_known_by_the_median_of_the_last_64_norms():
  random = np.random.default_rng(0)
  seen = []
  norms = RecentNorms(jnp.zeros(64), jnp.zeros((), jnp.int32))
  for size in random.lognormal(size=150).astype(np.float32):
    if len(seen) >= 16:
      median = np.sort(seen[-64:])[(len(seen[-64:]) - 1) // 2]
      for factor in (0.99, 1.01):
        norm = jnp.float32(3.0 * median * factor)
        assert bool(norms.spikes(norm, 3.0)) == (factor > 1)
    else:
      assert not norms.spikes(jnp.float32(1e30), 3.0)
    norms = norms.add(size)
    seen.append(size)


def test_reward_mean_is_that_of_everything_seen():
  random = np.random.default_rng(0)
  batches = [random.normal(3, 2, size) for size in (4, 0, 1, 30)]
  running = RewardMean(jnp.zeros(()), jnp.zeros(()))
  for batch in batches:
    running = running.add(jnp.float32(batch.sum()), jnp.float32(len(batch)))
  assert float(running.count) == 35
  assert float(running.mean) == pytest.approx(np.concatenate(batches).mean(), rel=1e-5)
