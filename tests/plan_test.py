"""Tests that what is planned is what trains, and that plans say what to do."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from dpo_flax import config, plan
from dpo_flax.assembly import assemble
from dpo_flax.assembly import blueprint as blueprint_module
from dpo_flax.assembly.blueprint import make_blueprint
from dpo_flax.assembly.data import prepare_data
from dpo_flax.config.checks import validate
from dpo_flax.config.settings import settings_of
from dpo_flax.planning import aot, chips, estimate, search
from dpo_flax.planning.remedies import remedies
from dpo_flax.sharding import make_mesh, shard_batch
from dpo_flax.train import train_batches
from helpers.configs import set_field

TINY = pathlib.Path(plan.__file__).parent / 'examples' / 'tiny'

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu, the compiler for TPU, is no part of the test extra: pip install dpo_flax[tpu]',
)


@pytest.fixture
def tiny(tmp_path):
  """The shipped example, short rows."""
  settings = config.default()
  settings.workdir = str(tmp_path)
  settings.model.preset = 'tiny'
  settings.model.dtype = settings.model.weight_dtype = 'float32'
  settings.lora.r = 8
  settings.data.train = str(TINY / 'pairs.jsonl')
  settings.data.tokenizer = str(TINY / 'tokenizer.model')
  settings.batch.rows, settings.batch.tokens = 8, 256
  settings.train.num_train_steps = 1
  return settings


@pytest.fixture
def cpu_slice():
  """Four CPUs in place of four chips."""
  return chips.Slice(chips.CHIPS['v5e'], '2x2', jax.devices()[:4])


def blueprint(config, slice_):
  settings = validate(config)
  return make_blueprint(settings, make_mesh(settings.mesh.sizes(), slice_.devices))


def describe(tree):
  return [
    (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape))
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {
      'tuning.method': 'dora',
      'lora.layers_to_transform': [1],
      'lora.modules_to_save': ('lm_head',),
      'lora.rank_pattern': {'up_proj': 3},
    },
    {'tuning.method': 'full', 'lora.r': 64, 'objective.loss': 'simpo'},
    {'tuning.method': 'full', 'lora.r': 64},
  ],
  ids=['lora', 'dora', 'full_without_reference', 'full'],
)
def test_planned_arguments_are_those_of_training(tiny, changes):
  for field, value in changes.items():
    set_field(tiny, field, value)
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  with jax.set_mesh(mesh):
    run, state = assemble.build(validate(tiny), mesh)
    batches = train_batches(run, 0)
    batch = shard_batch(next(batches), mesh)
    batches.close()
  _, planned = aot.abstract_train_step(
    make_blueprint(validate(tiny), mesh), pairs_per_row=run.data.pairs_per_row
  )
  assert describe(planned[0]) == describe(state)
  assert describe(planned[1]) == describe(run.frozen)
  assert describe(planned[2]) == describe(batch)


def test_estimate_reads_a_step_of_any_devices(tiny, cpu_slice):
  pairs = estimate.Pairs(slots=3, mean=2.5, source='a test')
  found = estimate.estimate(blueprint(tiny, cpu_slice), cpu_slice, pairs=pairs)
  assert found.fits
  assert found.peak_hbm_bytes >= found.argument_bytes > 0
  # Forward of policy and reference, forward again and backward to the inputs: four passes over
  # the blocks' weights. Adapters, attention and the vocabulary come on top.
  weights = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
  passes = 4 * 2 * weights * (8 * 256 / 4)
  assert passes < found.flops < 1.7 * passes
  assert found.collective_bytes > 0
  assert found.largest_temporaries
  assert found.pairs_per_second == pytest.approx(8 * 2.5 / max(found.bounds_seconds.values()))


def test_the_step_is_compiled_with_the_options_of_training(tiny, cpu_slice, monkeypatch):
  monkeypatch.setattr(
    blueprint_module, 'compiler_options', lambda mesh: {'xla_no_such_option': '1'}
  )
  pairs = estimate.Pairs(slots=3, mean=2.5, source='a test')
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
    estimate.estimate(blueprint(tiny, cpu_slice), cpu_slice, pairs=pairs)


@pytest.mark.parametrize(
  ('message', 'gib'),
  [
    ('E1000: the total memory required (147.44G) exceeds available HBM (15.75G).', 147.44),
    ('Ran out of memory in memory space hbm. Used 17.54G of 15.75G hbm. Exceeded by 1.79G.', 17.54),
    ('Used 900.0M of 15.75G hbm by an array alone', 15.75),
    ('something else altogether', None),
  ],
)
def test_refusal_says_how_much_is_needed(message, gib, cpu_slice):
  found = estimate.refused(f'RESOURCE_EXHAUSTED: {message}\nmore', [], cpu_slice, seconds=1.0)
  assert not found.fits
  assert found.peak_hbm_bytes == (None if gib is None else pytest.approx(gib * 2**30))


def test_remedies_leave_out_what_is_done_or_too_little(tiny, cpu_slice):
  def fields(argument_bytes=0, **changes):
    settings = tiny.copy_and_resolve_references()
    settings.update_from_flattened_dict(changes)
    matter = argument_bytes < cpu_slice.chip.hbm_bytes
    found = settings_of(settings)
    mesh = make_mesh(found.mesh.sizes(), cpu_slice.devices)
    lines = remedies(found, mesh, temporaries_matter=matter)
    return [line.partition('=')[0].removeprefix('config.') for line in lines][:-1]

  everything = {'model.remat': 'none', 'batch.tokens': 4096, 'batch.rows': 16, 'mesh.data': 2}
  assert fields(**everything) == [
    'model.remat',
    'model.remat',
    'batch.microbatches',
    'model.logits_chunk',
    'batch.tokens',
    'model.weight_dtype',
    'mesh.data',
  ]
  # Split already, or held back by the arguments alone.
  small = {'batch.rows': 16, 'batch.microbatches': 4, 'model.logits_chunk': 128}
  assert fields(**small) == ['model.remat', 'model.weight_dtype']
  assert fields(**small, **{'model.remat': 'offload'}) == ['model.weight_dtype']
  assert fields(argument_bytes=2**40, **everything) == ['model.weight_dtype', 'mesh.data']


@hypothesis.given(
  fixed=st.floats(0, 14), full=st.floats(0.05, 9), dots=st.floats(0.05, 9), kept=st.floats(0.05, 9)
)
def test_search_finds_the_most_rows_that_fit(fixed, full, dots, kept):
  slice_ = chips.Slice(chips.CHIPS['v5e'], '2x2', jax.devices()[:4])
  per_row = {'full': full, 'dots': full + dots, 'none': full + dots + kept, 'offload': full / 2}
  cycles = {'offload': 4.1, 'full': 4.0, 'dots': 3.5, 'none': 3.0}

  def compiled(**changes):
    rows, remat = changes['batch.rows'] // 4, changes['model.remat']
    needed = int((fixed + per_row[remat] * rows) * 2**30)
    found = estimate.refused('', [], slice_, seconds=0.0)
    return dataclasses.replace(
      found,
      fits=needed <= slice_.chip.hbm_bytes,
      peak_hbm_bytes=needed,
      temp_bytes=int(per_row[remat] * rows * 2**30),
      estimated_cycles=cycles[remat] * rows,
    )

  room = {remat: min(int((15.75 - fixed) / size), 64) for remat, size in per_row.items()}
  fitting = [remat for remat in ('none', 'dots', 'full', 'offload') if room[remat]]
  sizes = {'shards': 4, 'tokens': 4096}
  if not fitting:
    with pytest.raises(ValueError, match='not one row'):
      search.largest(compiled, **sizes, report=lambda _: None)
    return
  changes, found = search.largest(compiled, **sizes, report=lambda _: None)
  assert changes['model.remat'] == fitting[0]
  assert changes['batch.rows'] // 4 == room[fitting[0]]
  assert found.fits


@pytest.mark.parametrize(
  ('name', 'preset'),
  [
    ('meta-llama/Llama-3.1-8B', 'llama3.1-8b'),
    ('meta-llama/Meta-Llama-3-8B-Instruct', 'llama3-8b'),
    ('meta-llama/Llama-3.1-70B', 'llama3.1-70b'),
    ('meta-llama/Llama-2-7b-hf', 'llama2-7b'),
    ('mistralai/Mistral-7B-v0.3', 'mistral-7b-v0.3'),
    ('Qwen/Qwen2.5-7B-Instruct', 'qwen2.5-7b'),
    ('google/gemma-3-27b-it', 'gemma3-27b'),
    ('microsoft/Phi-4-mini-instruct', 'phi4-mini'),
  ],
)
def test_published_model_needs_no_checkpoint(name, preset, monkeypatch):
  monkeypatch.setattr(plan, 'make_slice', lambda name: None)
  settings = config.default()
  settings.initialize_from_hf = name
  made = plan.make_plan(settings, 'v5e:2x2', preset=None, lengths=None)
  assert (made.settings.model.preset, made.settings.initialize_from_hf) == (preset, None)
  assert (made.pairs.slots, made.pairs.mean) == (1, 1.0)


def test_pairs_are_those_of_the_data_or_the_flag(tiny, monkeypatch):
  monkeypatch.setattr(plan, 'make_slice', lambda name: None)

  def pairs(lengths):
    return plan.make_plan(tiny, 'v5e:2x2', preset=None, lengths=lengths).pairs

  measured = pairs(None)
  report = prepare_data(validate(tiny), vocab_size=512).report['train']
  assert measured.mean == report['pairs'] / report['rows']
  assert measured.slots == report['pairs_per_row']
  assert pairs(['100', '13', '14']).mean == 2.0  # the prompt once, its last token twice: 128
  tiny.data.pack = False
  assert pairs(['100', '13', '14']).mean == 1.0
  for bad, message in (
    (['1', '2'], 'three counts'),
    (['a', '2', '3'], 'three'),
    (['900', '1', '1'], '903'),
  ):
    with pytest.raises(ValueError, match=message):
      pairs(bad)


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v5f:2x2', 'v5e, v5p, v6e; did you mean v5p:2x2'),
    ('4x4', 'such as v5e:4x4'),
    ('v5e', 'one of v5e:1x1, v5e:2x2, v5e:2x4'),
    ('v5e:0x4', 'one of v5e:1x1'),
    ('v5e:2x2x2', 'expected 2 counts .* one of v5e:1x1'),
    ('v5p:2x2', 'expected 3 counts .* one of v5p:2x2x1'),
    pytest.param('v5e:3x3', 'not divisible .* one of v5e:1x1', marks=needs_libtpu),
  ],
)
def test_a_slice_that_does_not_exist_is_told_those_that_do(topology, message):
  with pytest.raises(ValueError, match=message):
    chips.make_slice(topology)


def test_missing_compiler_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'dpo_flax\[tpu\]'):
    chips.make_slice('v5e:2x2')


def test_links_are_those_of_the_grid():
  def bandwidth(kind, topology):
    return chips.Slice(chips.CHIPS[kind], topology, []).ici_bandwidth

  assert bandwidth('v5e', '1x1') == 0
  assert bandwidth('v5e', '2x2') == 2 * 50e9
  assert bandwidth('v5e', '4x4') == 4 * 50e9
  assert bandwidth('v5p', '2x2x4') == 4 * 100e9


def run_plan(*flags):
  command = [sys.executable, '-m', 'dpo_flax.plan', *flags]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_libtpu
def test_command_prints_one_object(tmp_path):
  done = run_plan(
    '--config=configs/tiny.py',
    '--topology=v5e:2x2',
    '--json',
    f'--config.workdir={tmp_path}',
    '--config.model.dtype=bfloat16',
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  wanted = ['fits', 'peak_hbm_bytes', 'argument_bytes', 'temp_bytes', 'hbm_capacity_bytes', 'flops']
  wanted += ['collective_bytes', 'estimated_cycles', 'compile_seconds']
  assert list(found)[: len(wanted)] == wanted
  assert found['fits'] is True
  assert found['hbm_capacity_bytes'] == 15.75 * 2**30
  assert found['kernels'] and 0 < found['flops_without_cycles'] < found['flops']
  assert found['unknown_loops'] == 0
  assert not [line for line in done.stderr.splitlines() if 'learning_rate' not in line]


@needs_libtpu
def test_command_says_what_to_change_when_it_does_not_fit(tmp_path):
  done = run_plan(
    '--config=configs/tiny.py',
    '--topology=v5e:1x1',
    f'--config.workdir={tmp_path}',
    '--config.batch.rows=8192',
    '--config.batch.tokens=4096',
    '--config.model.remat=none',
  )
  assert done.returncode == 0, done.stderr
  assert 'does not fit 15.75 GiB a chip' in done.stdout
  assert done.stdout.index('model.remat=full') < done.stdout.index('batch.microbatches=8192')
