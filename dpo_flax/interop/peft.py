"""PEFT adapters (adapter_config.json, adapter_model.safetensors) <-> our adapters."""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_flax.interop.named_arrays import gather_slot, load_arrays, make_slots, match
from dpo_flax.interop.names import NAMES
from dpo_flax.interop.tensor_files import (
  TensorFile,
  new_directory,
  parse_json,
  read_header,
  write_tensors,
)
from dpo_flax.model.fields import check_fields
from dpo_flax.model.lora import LoraConfig
from dpo_flax.model.transformer import Transformer

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'

# Ours -> (theirs, transposed), of each kernel that can be adapted. A is [r, in], lora_a [in, r].
ADAPTER_NAMES = {
  ours.replace('kernel', f'lora_{matrix.lower()}'): (
    f'base_model.model.{theirs.removesuffix(".weight")}.lora_{matrix}.weight',
    transposed,
  )
  for ours, (theirs, transposed) in NAMES.items()
  if ours.endswith('.kernel')
  for matrix in 'AB'
}

# Beside an adapted head PEFT stores that head's base once more.
HARMLESS = re.compile(r'base_model\.model\.lm_head\.base_layer\.weight')

USED_FIELDS = frozenset(['r', 'lora_alpha', 'lora_dropout', 'use_rslora'])
HARMLESS_FIELDS = frozenset().union(
  # The names of the tensors say which modules and layers are adapted.
  ['target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'],
  ['auto_mapping', 'base_model_name_or_path', 'inference_mode', 'peft_version', 'revision'],
  ['ensure_weight_tying', 'megatron_core', 'megatron_config', 'qalora_group_size'],
)
FIXED_FIELDS = {
  'peft_type': 'LORA',
  'task_type': 'CAUSAL_LM',
  'bias': 'none',
  'fan_in_fan_out': False,
}
# Other starts (PiSSA, OLoRA, LoftQ, ...) change the base weights, which the adapter does not hold.
INITIALISERS = (True, False, None, 'gaussian', 'eva', 'orthogonal')


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A PEFT directory; its tensors are still on disk."""

  directory: epath.Path
  lora: LoraConfig  # what a model needs to hold it
  base_name: str | None  # the checkpoint it was trained on
  tensors: Mapping[str, TensorFile]


def open_adapter(path: epath.PathLike) -> Adapter:
  """Opens a PEFT LoRA adapter.

  Raises:
    ValueError: there is none, or it is of a kind that our adapters cannot express.
  """
  directory = epath.Path(path).expanduser()
  for name in (CONFIG, WEIGHTS):
    if not (directory / name).exists():
      raise ValueError(f'{directory} has no {name}: no PEFT adapter in safetensors')
  config = directory / CONFIG
  values = parse_json(config.read_bytes(), config)
  known = {*USED_FIELDS, *HARMLESS_FIELDS, 'init_lora_weights'}
  check_fields(values, known=known, fixed=FIXED_FIELDS, where=str(config))
  if values.get('init_lora_weights') not in INITIALISERS:
    raise ValueError(
      f'{config}: init_lora_weights={values["init_lora_weights"]!r} changes the base weights;'
      ' convert the adapter to a plain LoRA first'
    )
  _, tensors = read_header(directory / WEIGHTS)
  lora = _lora_config(values, tensors, config)
  return Adapter(directory, lora, values.get('base_model_name_or_path'), tensors)


def load_adapter(
  adapter: Adapter,
  abstract: nnx.State,  # the LoRAParams as ShapeDtypeStructs, of a model made with adapter.lora
  mesh: Mesh,
) -> nnx.State:
  """Reads an adapter straight into arrays sharded over `mesh`.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  slots = make_slots(abstract, ADAPTER_NAMES)
  match(adapter.tensors, slots, harmless=HARMLESS, where=str(adapter.directory))
  return load_arrays(adapter.tensors, slots, abstract, mesh)


def save_adapter(
  model: Transformer,
  lora: LoraConfig,
  base_name: str | None,  # what PEFT users load the adapter onto
  output: epath.PathLike,
) -> None:
  """Writes the adapters in float32 as a PEFT directory, from process 0, one tensor at a time.

  Raises:
    ValueError: `lora` does not describe the model's adapters, or `output` holds something else.
  """
  state = nnx.state(model, nnx.LoRAParam)
  slots = make_slots(state, ADAPTER_NAMES)
  adapted = {slot.path[-2] for slot in slots.values()}
  # PEFT drops the tensors of modules that target_modules does not name, without a word.
  if adapted != lora.targets:
    raise ValueError(
      f'lora.target_modules are {sorted(lora.targets)}, the model has adapters on {sorted(adapted)}'
      ' (a head that is tied to the embedding has none)'
    )
  specs = {name: (np.dtype(np.float32), slot.shape) for name, slot in slots.items()}
  arrays = (gather_slot(state, slot).astype(np.float32) for slot in slots.values())
  if jax.process_index() == 0:
    with new_directory(output) as directory:
      write_tensors(directory / WEIGHTS, specs, arrays)
      text = json.dumps(_peft_config(lora, base_name), indent=2, sort_keys=True)
      (directory / CONFIG).write_text(text)
  else:
    collections.deque(arrays, maxlen=0)  # takes part in gathering
  multihost_utils.sync_global_devices(f'wrote {output}')


def _peft_config(lora: LoraConfig, base_name: str | None) -> dict[str, Any]:
  return FIXED_FIELDS | {
    'base_model_name_or_path': base_name,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_alpha': lora.alpha,
    'lora_dropout': lora.dropout,
    'modules_to_save': None,
    'r': lora.r,
    'target_modules': sorted(lora.targets),
    'use_rslora': lora.rslora,
  }


def _lora_config(
  values: Mapping[str, Any], tensors: Mapping[str, TensorFile], where: epath.Path
) -> LoraConfig:
  rank, alpha, dropout = values.get('r'), values.get('lora_alpha'), values.get('lora_dropout', 0.0)
  if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
    raise ValueError(f'{where}: r={rank!r} and lora_alpha={alpha!r} are not a rank and a number')
  if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
    raise ValueError(f'{where}: lora_dropout={dropout!r} is not in [0, 1)')
  ending = '.lora_A.weight'
  modules = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
  return LoraConfig(
    r=rank,
    alpha=float(alpha),
    dropout=float(dropout),
    rslora=bool(values.get('use_rslora')),
    targets=frozenset(module.split('.')[-1] for module in modules),
  )
