"""The command that plans: python -m dpo_flax.plan --config=configs/llama8b.py --topology=v5e:4x4.

Compiles the config's own training step for a slice of TPUs, on a machine that has none, and reports
what it needs of each chip: memory, arithmetic, traffic, and the least time that the chip's limits
allow. --search finds the most rows and the best remat that fit, --json prints one object.

Nothing is loaded. Where initialize_from_hf names no directory, --preset, or the published model of
that name, gives the shapes.
"""

import dataclasses
import functools
import json
import re
import sys

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_flax.assembly.blueprint import make_blueprint
from dpo_flax.assembly.data import prepare_data
from dpo_flax.assembly.sources import vocabulary_size
from dpo_flax.config.checks import validate
from dpo_flax.config.schema import Settings, get
from dpo_flax.config.sections import BatchSettings, DataSettings
from dpo_flax.data.batches import pack
from dpo_flax.huggingface.presets import PRESETS
from dpo_flax.huggingface.weights import BaseCheckpoint, open_checkpoint
from dpo_flax.planning import search
from dpo_flax.planning.chips import Slice, make_slice
from dpo_flax.planning.estimate import Estimate, Pairs, estimate
from dpo_flax.planning.remedies import remedies
from dpo_flax.runtime import command
from dpo_flax.sharding import make_mesh, row_parts

_TOPOLOGY = flags.DEFINE_string('topology', None, 'Chips and their grid, such as v5e:4x4.')
_PRESET = flags.DEFINE_string('preset', None, 'A model whose shapes to plan for, without weights.')
_LENGTHS = flags.DEFINE_list(
  'lengths', None, 'Mean tokens of prompt,chosen,rejected; default: those of data.train.'
)
_SEARCH = flags.DEFINE_bool('search', False, 'Find the most rows and the best remat that fit.')
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object, and nothing else.', allow_override=True
)  # other commands have one too


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is planned: the settings, their slice, and the pairs of a row."""

  settings: Settings
  slice: Slice
  pairs: Pairs

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices of the slice."""
    return make_mesh(self.settings.mesh.sizes(), self.slice.devices)

  def estimate(self, **changes) -> Estimate:
    """Returns the cost of the step, with dotted fields of the settings changed."""
    blueprint = make_blueprint(self.settings.replace(changes), self.mesh)
    return estimate(blueprint, self.slice, pairs=self.pairs)


def make_plan(
  config: ConfigDict, topology: str, *, preset: str | None, lengths: list[str] | None
) -> Plan:
  """Completes a config with what planning can do without.

  Raises:
    ValueError: the config or a flag is unfit.
  """
  config = config.copy_and_resolve_references()
  slice_ = make_slice(topology)
  base, name = _shapes(get(config, 'initialize_from_hf'), preset, get(config, 'model.preset'))
  if base is None:
    # What is merged into weights changes no shape.
    weights = {'initialize_from_hf': None, 'merge_adapter_path': None, 'model.preset': name}
    config.update_from_flattened_dict(weights)
  settings = validate(config, planning=True).with_tokenizer_of(base and base.directory)
  measured = settings.data.train and settings.data.tokenizer and settings.workdir
  if lengths is None and measured:
    prepared = prepare_data(settings, vocab_size=vocabulary_size(base, name))
    report = prepared.report['train']
    mean = report['pairs'] / report['rows']
    pairs = Pairs(prepared.pairs_per_row, mean, str(get(config, 'data.train')))
  else:
    pairs = _given_pairs(settings.batch, settings.data, lengths)
  return Plan(settings, slice_, pairs)


def _shapes(
  path: str | None, preset: str | None, default: str | None
) -> tuple[BaseCheckpoint | None, str | None]:
  """Returns the weights' directory and the config's preset, or no directory and a preset."""
  if preset is None and path and epath.Path(path).expanduser().is_dir():
    return open_checkpoint(path), default
  name = preset or default or _published(path)
  if name not in PRESETS:
    given = f'no preset is called {name!r}' if name else f'initialize_from_hf={path}: no directory'
    raise ValueError(f'{given}; give --preset, one of {", ".join(sorted(PRESETS))}')
  return None, name


def _published(path: str | None) -> str | None:
  """Returns the preset of a hub id: meta-llama/Llama-3.1-8B is llama3.1-8b."""
  name = (path or '').rpartition('/')[2].lower().removeprefix('meta-')
  name = re.sub(r'-(instruct|it|pt|hf)$', '', name).replace('-', '')
  return {preset.replace('-', ''): preset for preset in PRESETS}.get(name)


def _given_pairs(batch: BatchSettings, data: DataSettings, lengths: list[str] | None) -> Pairs:
  if lengths is None:
    return Pairs(
      batch.pairs_per_row or 1, 1.0, 'no data.train and no --lengths: one pair fills a row'
    )
  if len(lengths) != 3 or not all(length.isdecimal() and int(length) for length in lengths):
    raise ValueError(
      f'--lengths={",".join(lengths)}: expected three counts of tokens, prompt,chosen,rejected'
    )
  (length,) = pack.row_lengths(np.array([lengths], int), data.layout)
  if length > batch.tokens:
    raise ValueError(
      f'--lengths={",".join(lengths)}: such a pair takes {length} tokens of a row, and '
      f'batch.tokens is {batch.tokens}'
    )
  mean = batch.tokens / length if data.pack else 1.0
  return Pairs(batch.pairs_per_row or int(np.ceil(mean)), mean, '--lengths')


def show(config: ConfigDict):
  """Prints the plan, as text or JSON."""
  jax.config.update('jax_platforms', 'cpu')
  # What is compiled for chips that are not there cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  if not _TOPOLOGY.value:
    raise ValueError('--topology is not set: give the chips and their grid, such as v5e:4x4')
  plan = make_plan(config, _TOPOLOGY.value, preset=_PRESET.value, lengths=_LENGTHS.value)
  if _SEARCH.value:
    best, found = search.largest(
      plan.estimate,
      shards=row_parts(plan.mesh),
      tokens=plan.settings.batch.tokens,
      report=functools.partial(print, file=sys.stderr, flush=True),
    )
    plan = dataclasses.replace(plan, settings=plan.settings.replace(best))
  else:
    found = plan.estimate()
  if _JSON.value:
    print(json.dumps(_plain(plan, found), indent=1))
  else:
    print('\n'.join([*_introduction(plan), *_lines(found, plan)]))


# Fields of the config that are in the JSON object: a search changes them.
_PLANNED_FIELDS = ('batch.rows', 'batch.tokens', 'batch.microbatches', 'model.remat')


def _plain(plan: Plan, found: Estimate) -> dict:
  fields = plan.settings.flat_json()
  return dataclasses.asdict(found) | {
    'topology': _TOPOLOGY.value,
    'chips': len(plan.slice.devices),
    'pairs_per_row': plan.pairs.mean,
    **{name: fields[name] for name in _PLANNED_FIELDS},
  }


def _introduction(plan: Plan) -> list[str]:
  settings, chips = plan.settings, len(plan.slice.devices)
  batch, model = settings.batch, settings.model
  weights = settings.initialize_from_hf or model.preset
  parts = f', in {batch.microbatches} parts' if batch.microbatches > 1 else ''
  method = settings.tuning.method
  learns = 'every weight learns' if method == 'full' else f'{method} r={settings.lora.r}'
  return [
    f'{weights} ({model.weight_dtype}, {learns}) on {plan.slice.chip.name}, {chips} '
    f'chip{"s" if chips > 1 else ""}',
    f'{batch.rows} x {batch.tokens} tokens a step{parts}, remat {model.remat}; pairs a row: '
    f'{plan.pairs.mean:.1f} ({plan.pairs.source})',
    '',
  ]


def _lines(found: Estimate, plan: Plan) -> list[str]:
  if not found.fits:
    return _refusal(found, plan)
  peak, capacity = found.peak_hbm_bytes, found.hbm_capacity_bytes
  assert peak is not None
  lines = [
    f'fits: {_size(peak)} of {_size(capacity)} a chip ({peak / capacity:.0%}): arguments '
    f'{_size(found.argument_bytes)}, temporaries {_size(found.temp_bytes)}',
    'largest temporaries at the peak, by the line that asks for them (an estimate):',
  ]
  for one in found.largest_temporaries:
    arrays = ', '.join(
      f'{count} x {shape}' if count > 1 else shape for shape, count in one['arrays'].items()
    )
    lines.append(f'  {_size(one["bytes"]):>10}  {one["source"]}  {_shortened(arrays)}')
  return [*lines, '', *_work(found), '', *_bounds(found, plan)]


def _refusal(found: Estimate, plan: Plan) -> list[str]:
  needed, capacity = found.peak_hbm_bytes, found.hbm_capacity_bytes
  is_room_left = found.argument_bytes < capacity
  changes = remedies(plan.settings, plan.mesh, temporaries_matter=is_room_left)
  excess = f': {_size(needed - capacity)} too much, of {_size(needed)}' if needed else ''
  return [
    f'does not fit {_size(capacity)} a chip{excess}',
    f'  arguments alone take {_size(found.argument_bytes)}',
    f'  the compiler: {found.message}',
    'what to change, the cheapest first:',
    *(f'  {change}' for change in changes),
  ]


def _work(found: Estimate) -> list[str]:
  assert found.flops is not None and found.flops_without_cycles is not None
  kernels = ', '.join(f'{count} of {name}' for name, count in found.kernels.items())
  lines = [
    f'a step does, on each chip, {found.flops / 1e12:.4g} TFLOP of matrix products, in '
    f'{found.estimated_cycles:.3e} estimated cycles,',
    f'  moves {_size(found.hbm_traffic_bytes)} to and from HBM and gets '
    f'{_size(found.collective_bytes)} from other chips',
  ]
  if kernels:
    inside = f'{found.flops_without_cycles / 1e12:.4g} TFLOP of the above'
    lines.append(f'  kernels take cycles beside these, for {inside} at most: {kernels}')
  if found.conditionals:
    lines.append('  with every token a response token: rows with fewer visit the vocabulary less')
  if found.unknown_loops:
    lines.append(f'  with {found.unknown_loops} loops of unknown length counted as if run once')
  return lines


def _bounds(found: Estimate, plan: Plan) -> list[str]:
  pairs = plan.settings.batch.rows * plan.pairs.mean
  lines = [f'a step of {pairs:.4g} pairs takes at least, by the limits of {plan.slice.chip.name}:']
  for name, seconds in sorted(found.bounds_seconds.items(), key=lambda one: -one[1]):
    lines.append(f'  {name:8} {seconds:8.3g} s   {pairs / seconds:8.1f} pairs a second at most')
  return [*lines, f'compiled in {found.compile_seconds:.0f} s']


def _size(count: float | None) -> str:
  assert count is not None
  return f'{count / 2**30:.2f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def _shortened(text: str, width: int = 90) -> str:
  return text if len(text) <= width else text[: width - 4] + ' ...'


if __name__ == '__main__':
  command.run(show)
