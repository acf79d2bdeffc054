"""Meshes and placements; a run on eight devices is the run on one."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from dpo_flax import sharding
from dpo_flax.model.transformer import Transformer
from dpo_flax.planning.compiled import hlo
from dpo_flax.sharding import AXES, make_mesh, named_shardings, row_parts, row_shard, shard_batch
from dpo_flax.training.state import init_train_state, split_models
from dpo_flax.training.step import jit_train_step
from helpers.batches import draw_pairs, fill_batch
from helpers.models import make_lora, make_mesh_of, make_model_config, make_models
from helpers.steps import make_options


def sizes(data, fsdp, tensor):
  return {'data': data, 'fsdp': fsdp, 'tensor': tensor}


@pytest.mark.parametrize(
  ('asked', 'shape'),
  [
    (sizes(1, -1, 1), (1, 8, 1)),
    (sizes(2, -1, 2), (2, 2, 2)),
    (sizes(-1, 2, 1), (4, 2, 1)),
    (sizes(1, 4, 2), (1, 4, 2)),
  ],
)
def test_one_size_may_be_the_rest(asked, shape):
  mesh = make_mesh(asked)
  assert mesh.devices.shape == shape and mesh.axis_names == AXES
  assert set(mesh.devices.flat) == set(jax.devices())


def test_the_devices_given_are_the_devices_used():
  devices = [jax.devices()[i] for i in (5, 2, 7, 0)]
  mesh = make_mesh(sizes(1, 2, -1), devices)
  assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    (sizes(1, 3, 1), 'fsdp=3 .* does not fit 8 devices'),
    (sizes(1, -1, 3), 'does not fit 8 devices'),
    (sizes(2, 8, 1), 'does not fit 8 devices'),
    (sizes(-1, -1, 1), 'one of them may be -1'),
    (sizes(1, 0, -1), 'sizes are positive'),
    (sizes(-2, 8, 1), 'sizes are positive'),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(asked, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(asked)


def fake_slices(count):
  """TPUs in slices of four."""
  return [
    types.SimpleNamespace(platform='tpu', slice_index=i, process_index=i, id=4 * i + j)
    for i in range(count)
    for j in range(4)
  ]


@pytest.mark.parametrize('asked', [sizes(1, -1, 1), sizes(4, -1, 1)])
def test_weights_are_not_split_over_slices(asked):
  with pytest.raises(ValueError, match=r'on 3 slices: make mesh.data a multiple of 3'):
    make_mesh(asked, fake_slices(3))


@pytest.mark.parametrize('asked', [sizes(2, -1, 1), sizes(-1, 1, 2)])
def test_a_slice_holds_whole_copies_of_the_weights(asked, monkeypatch):
  """By libtpu's own description of two slices, where it is installed."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  assert make_mesh(sizes(1, -1, 1), topologies.get_topology_desc('v5e:2x2', 'tpu').devices)
  devices = topologies.get_topology_desc('v5e:2x2', 'tpu', num_slices=2).devices
  mesh = make_mesh(asked, devices)
  assert set(mesh.devices.flat) == set(devices)
  for copy in mesh.devices:
    assert len({device.slice_index for device in copy.flat}) == 1


@pytest.fixture(scope='module')
def abstract():
  """A model without arrays whose axes eight devices divide."""
  config = make_model_config(vocab_size=96)
  lora = make_lora(targets=frozenset(['q_proj', 'v_proj', 'down_proj', 'lm_head']))
  return nnx.eval_shape(lambda: Transformer(config, lora, nnx.Rngs(0, lora=1)))


def test_weights_lie_as_their_axes_say(abstract):
  placed = named_shardings(nnx.state(abstract), make_mesh_of(fsdp=4, tensor=2))
  specs = {
    jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): tuple(leaf.spec)
    for path, leaf in jax.tree.leaves_with_path(placed)
  }
  expected = {
    'embed_tokens.embedding': ('tensor', 'fsdp'),
    'blocks.attention_norm.scale': (None, None),
    'blocks.attention.q_proj.kernel': (None, 'fsdp', 'tensor'),
    'blocks.attention.q_proj.adapters.learned.lora_a': (None, 'fsdp', None),
    'blocks.attention.q_proj.adapters.learned.lora_b': (None, None, ('tensor', 'fsdp')),
    'blocks.attention.v_proj.kernel': (None, 'fsdp', 'tensor'),
    'blocks.attention.o_proj.kernel': (None, 'tensor', 'fsdp'),
    'blocks.mlp.gate_proj.kernel': (None, 'fsdp', 'tensor'),
    'blocks.mlp.down_proj.kernel': (None, 'tensor', 'fsdp'),
    'blocks.mlp.down_proj.adapters.learned.lora_a': (None, ('tensor', 'fsdp'), None),
    'blocks.mlp.down_proj.adapters.learned.lora_b': (None, None, 'fsdp'),
    'final_norm.scale': (None,),
    'lm_head.kernel': ('fsdp', 'tensor'),
    'lm_head.adapters.learned.lora_a': ('fsdp', None),
  }
  assert {name: specs[name] for name in expected} == expected


def test_an_axis_that_the_mesh_does_not_divide_is_refused():
  """97 tokens on two devices: named before the compiler would say it."""
  model = nnx.eval_shape(lambda: Transformer(make_model_config(), None, nnx.Rngs(0)))
  with pytest.raises(
    ValueError, match=r'mesh.tensor=2 does not divide an axis of 97 in .*embedding'
  ):
    named_shardings(nnx.state(model), make_mesh_of(fsdp=4, tensor=2))


def test_arrays_without_axes_are_replicated():
  mesh = make_mesh_of(fsdp=8)
  placed = named_shardings({'count': jax.ShapeDtypeStruct((3,), jnp.float32)}, mesh)
  assert placed['count'].is_fully_replicated and placed['count'].mesh == mesh


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
  mesh = make_mesh_of(data=2, fsdp=2, tensor=2)
  batch = {'tokens': np.arange(24).reshape(8, 3), 'pair_mask': np.ones((8, 1), np.float32)}
  sharded = shard_batch(batch, mesh)
  assert row_parts(mesh) == 4
  for name, array in sharded.items():
    np.testing.assert_array_equal(array, batch[name])
    assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
  # Devices that differ along `tensor` alone hold the same rows.
  held = {shard.device: shard.index[0] for shard in sharded['tokens'].addressable_shards}
  for first, second in mesh.devices.reshape(-1, 2):
    assert held[first] == held[second]


@pytest.mark.parametrize(
  ('shape', 'owners', 'expected'),
  [
    # Two processes of four devices: each its half of the rows.
    ((1, 8, 1), [0, 0, 0, 0, 1, 1, 1, 1], [((0, 1, 2, 3), 8), ((4, 5, 6, 7), 8)]),
    ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], [((0, 1), 4), ((2, 3), 4)]),
    # As on a grid of chips, where neighbours in the mesh may be on two hosts.
    ((1, 8, 1), [0, 0, 1, 1, 1, 1, 0, 0], [((0, 1, 6, 7), 8), ((2, 3, 4, 5), 8)]),
    # All of a row's shards span both processes: both feed the same rows.
    ((1, 4, 2), [0, 1, 0, 1, 0, 1, 0, 1], [((0, 1, 2, 3), 4), ((0, 1, 2, 3), 4)]),
    # Four processes, pairs of which share rows.
    ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),
  ],
)
def test_each_process_feeds_the_rows_its_devices_hold(monkeypatch, shape, owners, expected):
  found = []
  for process in range(len(expected)):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    found.append(row_shard(fake_mesh(shape, owners)))
  assert found == expected


def fake_mesh(shape, owners):
  """A mesh of devices that say which process they belong to, and are nothing else."""
  devices = np.empty(len(owners), object)
  devices[:] = [types.SimpleNamespace(process_index=owner) for owner in owners]
  return types.SimpleNamespace(
    devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True))
  )


def test_activations_are_constrained_on_a_mesh_and_left_alone_without():
  array = jnp.zeros((8, 4, 32))

  @jax.jit
  def place(array):
    return sharding.constrain(array, 'rows', 'tokens', 'activation')

  assert place(array).sharding.is_fully_replicated
  with jax.set_mesh(make_mesh_of(data=2, fsdp=4)):
    placed = place(array)
  assert placed.sharding.spec == PartitionSpec(('data', 'fsdp'))


@pytest.fixture(scope='module')
def train():
  """Returns what trains three steps on a mesh: losses, adapters, whether they stayed in place."""
  pairs = draw_pairs(18, vocab=96)
  batches = [
    [pairs[i : i + 2], pairs[i + 2 : i + 3], [], pairs[i + 3 : i + 6]] * 2 for i in (0, 6, 12)
  ]

  def run(mesh, *, microbatches=1, dropout=None):
    config = make_model_config(vocab_size=96)
    lora = make_lora(
      targets=frozenset(['q_proj', 'o_proj', 'down_proj', 'lm_head']), dropout=dropout or 0.0
    )
    options = make_options(microbatches=microbatches, dropout_seed=dropout and 0)
    with jax.set_mesh(mesh):
      graphdef, trainable, frozen = split_models(make_models(config, lora, mesh=mesh))
      # Adam's first steps would blow rounding up to the size of the learning rate.
      optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
      state = init_train_state(trainable, optimizer, mesh)
      placements = jax.tree.map(lambda leaf: leaf.sharding, state)
      step = jit_train_step(graphdef, optimizer, options)
      losses = []
      for rows in batches:
        batch = shard_batch(jax.tree.map(np.asarray, fill_batch(rows)), mesh)
        state, metrics = step(state, frozen, batch)
        total, count = metrics['sums']['means']['dpo_loss']
        losses.append(float(total / count))
    stays = jax.tree.map(
      lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, placements
    )
    return losses, jax.device_get(state.trainable), all(jax.tree.leaves(stays))

  return run


@pytest.fixture(scope='module')
def on_one_device(train):
  return train(make_mesh_of())


def assert_same_run(ours, expected):
  chex.assert_trees_all_close(ours[0], expected[0], rtol=1e-5)
  chex.assert_trees_all_close(ours[1], expected[1], rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize(
  'shape',
  [sizes(1, 4, 2), sizes(2, 2, 2), sizes(8, 1, 1)],
  ids=lambda s: 'x'.join(map(str, s.values())),
)
def test_a_run_on_eight_devices_equals_the_run_on_one(train, on_one_device, shape):
  losses = on_one_device[0]
  assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
  run = train(make_mesh(shape))
  assert_same_run(run, on_one_device)
  assert run[2], 'a step must leave the state where it was'


@pytest.mark.parametrize('tied', [False, True], ids=['own_head', 'tied_head'])
def test_no_device_ever_holds_the_whole_vocabulary(tied):
  """Split over `tensor`, it is never gathered: not the weights, not the logits of one token."""
  vocab, mesh = 1006, make_mesh(sizes(1, 4, 2))
  config = make_model_config(vocab_size=vocab, tie_word_embeddings=tied)
  options = make_options(token_statistics=True, kl_penalty_weight=0.1, wpo=True)
  with jax.set_mesh(mesh):
    graphdef, trainable, frozen = split_models(make_models(config, make_lora(), mesh=mesh))
    state = init_train_state(trainable, optax.sgd(0.1), mesh)
    rows = fill_batch([[pair] for pair in draw_pairs(4)], pairs_per_row=1)
    batch = shard_batch(jax.tree.map(np.asarray, rows), mesh)
    step = jit_train_step(graphdef, optax.sgd(0.1), options)
    text = step.lower(state, frozen, batch).compile().as_text()
  instructions = [one for part in hlo.parse(text).computations.values() for one in part.values()]
  lengths = {size for one in instructions for array in one.arrays for size in array.dims}
  assert vocab // 2 in lengths and vocab not in lengths


def test_microbatches_on_a_mesh_equal_the_batch_on_one_device(train, on_one_device):
  assert_same_run(train(make_mesh(sizes(1, 4, 2)), microbatches=2), on_one_device)


def test_the_order_of_devices_does_not_matter(train, on_one_device):
  order = np.random.default_rng(0).permutation(8)
  devices = [jax.devices()[i] for i in order]
  assert_same_run(train(make_mesh(sizes(1, 4, 2), devices)), on_one_device)


def test_dropout_is_the_same_on_any_mesh(train, on_one_device):
  alone = train(make_mesh_of(), dropout=0.3)
  assert alone[0][0] != pytest.approx(on_one_device[0][0], rel=1e-4)
  assert_same_run(train(make_mesh(sizes(1, 4, 2)), dropout=0.3), alone)
