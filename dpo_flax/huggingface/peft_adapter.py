"""PEFT adapters (adapter_config.json, adapter_model.safetensors) <-> a model's adapters."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.files.untrusted import find_file, read_json
from dpo_flax.huggingface import peft_config, placement
from dpo_flax.huggingface.merging import side_by_side
from dpo_flax.huggingface.names import Table, names_of
from dpo_flax.huggingface.peft_config import FACTORS, PREFIX
from dpo_flax.huggingface.placement import Path, Slot
from dpo_flax.huggingface.tensor_files import TensorFile, read_header, write_tensors
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.linear import adapters_of
from dpo_flax.model.lora import TRAINABLE, Lora, LoraConfig, LowRank
from dpo_flax.model.transformer import Transformer

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'

# Beside an adapted table or head PEFT stores that module's base once more.
_HARMLESS = re.compile(r'base_model\.model\.(model\.embed_tokens|lm_head)\.base_layer\.weight')


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
  """A PEFT directory; its tensors are still on disk."""

  directory: epath.Path
  lora: LoraConfig  # what a model needs to hold it
  tensors: Mapping[str, TensorFile]
  names: Table  # of the parameters of the model that it is for


def open_adapter(path: epath.PathLike, config: ModelConfig) -> AdapterFiles:
  """Opens a PEFT adapter, made for a model of this architecture.

  Raises:
    ValueError: there is none, or it is a type of adapter that a model here cannot hold.
  """
  directory = epath.Path(path).expanduser()
  for name in (CONFIG, WEIGHTS):
    if find_file(directory, name) is None:
      raise ValueError(f'{directory} has no {name}: no PEFT adapter in safetensors')
  values = read_json(directory / CONFIG)
  _, tensors = read_header(directory / WEIGHTS)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  lora = peft_config.read_config(values, shapes, config, directory / CONFIG)
  return AdapterFiles(directory, lora, tensors, names_of(config))


def fingerprint(adapter: AdapterFiles) -> str:
  """Returns a SHA-256 of the configuration and of every tensor's name, type and bytes."""
  digest = hashlib.sha256((adapter.directory / CONFIG).read_bytes())
  for name, tensor in sorted(adapter.tensors.items()):
    digest.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())
    digest.update(tensor.read(0, tensor.shape[0]).tobytes())
  return digest.hexdigest()


def load_adapter(
  adapter: AdapterFiles,
  abstract: nnx.State,  # what is TRAINABLE, as ShapeDtypeStructs, of a model made for adapter.lora
  mesh: Mesh,
) -> nnx.State:
  """Reads an adapter into arrays sharded over `mesh`, one of them in host memory at a time.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  slots = matched_slots(adapter, abstract)
  return placement.load_arrays(adapter.tensors, slots, abstract, mesh)


def matched_slots(adapter: AdapterFiles, state: nnx.State) -> dict[str, Slot]:
  """Returns which part of what a model learns each tensor of an adapter is.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  slots = _make_slots(state, adapter.lora, adapter.names)
  placement.match(adapter.tensors, slots, harmless=_HARMLESS, where=str(adapter.directory))
  return slots


def save_adapter(
  model: nnx.Module,
  lora: LoraConfig | Lora,
  base_name: str | None,  # what PEFT users load the adapter onto
  directory: epath.PathLike,  # made if it is missing; what it holds is not looked at
  *,
  names: Mapping[str, str] | None = None,
) -> None:
  """Writes what the policy learned in float32 in PEFT's layout, from process 0.

  Where it learned on top of an adapter of the reference, the two are written as one.

  Args:
    model: a Transformer, or any module whose adapters are those of its `Linear` maps.
    lora: what its adapters were made of.
    base_name: the checkpoint that PEFT users load the adapter onto.
    directory: where adapter_config.json and adapter_model.safetensors go.
    names: of a model that is not a Transformer: path of each adapted map, `layers.0.q_proj` -> its
      name in the torch model, `model.layers.0.self_attn.q_proj`. `{}` in a name stands for the
      index on the leading axis of stacked layers.

  Raises:
    ValueError: `lora` or `names` does not describe what the model learned.
  """
  state = nnx.state(model, TRAINABLE)
  if names is not None:
    slots, values = _named_slots(model, state, lora, names, base_name)
  else:
    if not isinstance(model, Transformer) or not isinstance(lora, LoraConfig):
      raise ValueError('names: only a Transformer made of a LoraConfig can be saved without them')
    if lora.continues:
      state, lora = side_by_side(model, lora)
    slots = _make_slots(state, lora, names_of(model.config))
    values = peft_config.write_config(lora, model.config, base_name)
  specs = {name: (np.dtype(np.float32), slot.shape) for name, slot in slots.items()}
  variables = dict(nnx.to_flat_state(state))
  arrays = (placement.gather_slot(variables, slot).astype(np.float32) for slot in slots.values())

  def write(directory, arrays):
    write_tensors(directory / WEIGHTS, specs, arrays)
    (directory / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))

  placement.write_gathered(directory, arrays, write)


def _make_slots(state: nnx.State, lora: LoraConfig, names: Table) -> dict[str, Slot]:
  """Returns what PEFT calls each part of what a model learns.

  Raises:
    ValueError: `lora` does not describe the model's adapters.
  """
  variables = dict(nnx.to_flat_state(state))
  modules = {path: _adapted_module(path, names) for path in variables if path[-1] in FACTORS}
  # PEFT drops the tensors of modules that target_modules does not name, silently.
  adapted = {name for name, _ in modules.values()}
  if adapted != lora.targets:
    raise ValueError(
      f'lora.target_modules are {sorted(lora.targets)}, the model has adapters on {sorted(adapted)}'
    )
  slots = {}
  for path, variable in variables.items():
    if path in modules:
      name, hf_name = modules[path]
      endings = peft_config.factor_names(name)
      found = _factor_slots(path, variable.shape, hf_name, lora.modules[name], endings)
      # The head maps back: its A is the table's B, neither transposed.
      heads = {'lora_a': f'lm_head.{FACTORS["lora_b"]}', 'lora_b': f'lm_head.{FACTORS["lora_a"]}'}
      head = heads.get(str(path[-1]))
    else:
      name, head = path[0], 'lm_head.weight'
      hf_name, transposed = names['.'.join(map(str, path))]
      found = placement.layer_slots(path, variable.shape, PREFIX + hf_name, transposed=transposed)
    slots |= found
    if lora.tied and name == 'embed_tokens':
      ((first, slot),) = found.items()
      slots[f'{PREFIX}{head}'] = dataclasses.replace(slot, transposed=False, repeats=first)
  return slots


def _adapted_module(path: Path, names: Table) -> tuple[str, str]:
  """Returns the module that an adapter's array belongs to: its name here and its PEFT name."""
  *module, holder, _, _ = path
  if holder == 'head_adapters':
    return 'lm_head', 'lm_head'
  weight = 'embedding' if module == ['embed_tokens'] else 'kernel'
  hf_name, _ = names['.'.join((*module, weight))]
  return module[-1], hf_name.removesuffix('.weight')


def _factor_slots(
  path: Path, shape: tuple[int, ...], module: str, low_rank: LowRank, endings: Mapping[str, str]
) -> dict[str, Slot]:
  """Returns the slots of one array: a factor or the magnitudes of a module in all layers."""
  stacked = '{}' in module
  sizes = shape[1:] if stacked else shape
  slots = {}
  for layer, (rank, _) in enumerate(low_rank.of_layers(shape[0] if stacked else 1)):
    own = {'lora_a': (sizes[0], rank), 'lora_b': (rank, sizes[-1]), 'magnitude': sizes}[path[-1]]
    if rank:
      slot = Slot(path, layer if stacked else None, tuple(own), transposed=len(own) == 2)
      slots[f'{PREFIX}{module.format(layer)}.{endings[path[-1]]}'] = slot
  return slots


def _named_slots(
  model: nnx.Module,
  state: nnx.State,
  lora: LoraConfig | Lora,
  names: Mapping[str, str],
  base_name: str | None,
) -> tuple[dict[str, Slot], dict[str, Any]]:
  """Returns the slots and the adapter_config.json of a model whose modules `names` names."""
  adapters = {
    '.'.join(map(str, path[:-2])): (path, adapter)
    for path, adapter in adapters_of(model)
    if adapter.learns
  }
  if set(adapters) != set(names):
    raise ValueError(
      f'names has {sorted(names)}, the model has adapters on {sorted(adapters)}: one for each'
    )
  if len(set(names.values())) < len(names):
    raise ValueError(f'names gives two modules the same name: {sorted(names.values())}')
  slots, adapted = {}, {}
  learned = dict(nnx.to_flat_state(state))
  for module, (path, adapter) in adapters.items():
    stacked = adapter.lora_a.ndim > 2
    if not names[module] or names[module].endswith('.weight'):
      raise ValueError(f'names[{module!r}]={names[module]!r}: expected the name of a module')
    if stacked != ('{}' in names[module]):
      raise ValueError(
        f'names[{module!r}]={names[module]!r}: a name has {{}} in place of the layer where the map '
        f'is stacked over layers, and nowhere else; this one is{"" if stacked else " not"}'
      )
    scales = adapter.low_rank.scales(rslora=lora.rslora)
    if scales != adapter.scales or lora.dora != (adapter.magnitude is not None):
      raise ValueError(
        f'the adapter of {module} was not made with rslora={lora.rslora}, dora={lora.dora}'
      )
    hf_name = names[module]
    for own in [(*path, name) for name in FACTORS if (*path, name) in learned]:
      shape = learned.pop(own).shape
      slots |= _factor_slots(own, shape, hf_name, adapter.low_rank, FACTORS)
    layers = adapter.lora_a.shape[0] if '{}' in hf_name else 1
    for layer, pair in enumerate(adapter.low_rank.of_layers(layers)):
      adapted[hf_name.format(layer)] = pair
  if learned:
    others = ', '.join('.'.join(map(str, path)) for path in learned)
    raise ValueError(f'{others}: no adapter of a Linear, so names cannot say what PEFT calls it')
  values = peft_config.config_values(lora, adapted, base_name, target_modules=sorted(adapted))
  # PEFT wraps a CAUSAL_LM only if it has all that transformers' models have.
  return slots, values | {'task_type': None}
