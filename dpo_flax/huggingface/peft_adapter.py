"""PEFT adapters (adapter_config.json, adapter_model.safetensors) <-> our adapters."""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_flax.files.untrusted import find_file, read_json
from dpo_flax.huggingface.merging import side_by_side
from dpo_flax.huggingface.names import Table, names_of
from dpo_flax.huggingface.peft_config import PREFIX, read_config, write_config
from dpo_flax.huggingface.placement import gather, match
from dpo_flax.huggingface.tensor_files import TensorFile, read_header, write_tensors
from dpo_flax.model.config import ModelConfig
from dpo_flax.model.lora import TRAINABLE, LoraConfig
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import named_shardings

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'

# Ours -> theirs, below an adapted module.
FACTORS = {
  'lora_a': 'lora_A.weight',
  'lora_b': 'lora_B.weight',
  'magnitude': 'lora_magnitude_vector',
}
EMBEDDING_FACTORS = FACTORS | {'lora_a': 'lora_embedding_A', 'lora_b': 'lora_embedding_B'}

# Beside an adapted table or head PEFT stores that module's base once more.
HARMLESS = re.compile(r'base_model\.model\.(model\.embed_tokens|lm_head)\.base_layer\.weight')


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A PEFT directory; its tensors are still on disk."""

  directory: epath.Path
  lora: LoraConfig  # what a model needs to hold it
  base_name: str | None  # the checkpoint it was trained on
  tensors: Mapping[str, TensorFile]
  names: Table  # of the parameters of the model that it is for


@dataclasses.dataclass(frozen=True)
class Part:
  """Which part of our arrays one tensor of an adapter is."""

  path: tuple[str, ...]  # of our array
  layer: int | None  # its index there; None: the array is not stacked
  sizes: tuple[int, ...]  # of our array without its layers; the largest rank may be larger
  transposed: bool
  repeated: bool = False  # another tensor is the same part

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of their tensor."""
    return self.sizes[::-1] if self.transposed else self.sizes

  def of(self, array: np.ndarray) -> np.ndarray:
    """Returns the view of the part in our whole array."""
    layer = array if self.layer is None else array[self.layer]
    return layer[tuple(slice(size) for size in self.sizes)]


def open_adapter(path: epath.PathLike, config: ModelConfig) -> Adapter:
  """Opens a PEFT adapter, made for a model of this architecture.

  Raises:
    ValueError: there is none, or it is of a kind that our adapters cannot express.
  """
  directory = epath.Path(path).expanduser()
  for name in (CONFIG, WEIGHTS):
    if find_file(directory, name) is None:
      raise ValueError(f'{directory} has no {name}: no PEFT adapter in safetensors')
  values = read_json(directory / CONFIG)
  _, tensors = read_header(directory / WEIGHTS)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  lora = read_config(values, shapes, config, directory / CONFIG)
  base_name = values.get('base_model_name_or_path')
  return Adapter(directory, lora, base_name, tensors, names_of(config))


def fingerprint(adapter: Adapter) -> str:
  """Returns a SHA-256 of the configuration and of every tensor's name, type and bytes."""
  digest = hashlib.sha256((adapter.directory / CONFIG).read_bytes())
  for name, tensor in sorted(adapter.tensors.items()):
    digest.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())
    digest.update(tensor.read(0, tensor.shape[0]).tobytes())
  return digest.hexdigest()


def load_adapter(
  adapter: Adapter,
  abstract: nnx.State,  # what is TRAINABLE, as ShapeDtypeStructs, of a model made for adapter.lora
  mesh: Mesh,
) -> nnx.State:
  """Reads an adapter into arrays sharded over `mesh`, one of them in host memory at a time.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  parts = make_parts(abstract, adapter.lora, adapter.names)
  match(adapter.tensors, parts, harmless=HARMLESS, where=str(adapter.directory))
  by_path = collections.defaultdict(list)
  for name, part in parts.items():
    by_path[part.path].append((name, part))
  shardings = dict(nnx.to_flat_state(named_shardings(abstract, mesh)))
  loaded = []
  for path, variable in nnx.to_flat_state(abstract):
    whole = np.zeros(variable.shape, np.float32)
    for name, part in by_path[path]:
      _fill(whole, part, adapter.tensors[name], name)
    sharding = shardings[path].get_value()
    array = jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
    loaded.append((path, variable.replace(jax.block_until_ready(array))))
  return nnx.from_flat_state(loaded)


def save_adapter(
  model: Transformer,
  lora: LoraConfig,
  base_name: str | None,  # what PEFT users load the adapter onto
  directory: epath.PathLike,  # made if it is missing; what it holds is not looked at
) -> None:
  """Writes what the policy learned in float32 in PEFT's layout, from process 0.

  Where it learned on top of an adapter of the reference, the two are written as one.

  Raises:
    ValueError: `lora` does not describe the model's adapters.
  """
  state = nnx.state(model, TRAINABLE)
  if lora.continues:
    state, lora = side_by_side(model, lora)
  parts = make_parts(state, lora, names_of(model.config))
  specs = {name: (np.dtype(np.float32), part.shape) for name, part in parts.items()}
  arrays = _gather_parts(dict(nnx.to_flat_state(state)), parts)
  if jax.process_index() == 0:
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, specs, arrays)
    values = write_config(lora, model.config, base_name)
    (directory / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))
  else:
    collections.deque(arrays, maxlen=0)  # takes part in gathering
  multihost_utils.sync_global_devices(f'wrote {directory}')


def make_parts(state: nnx.State, lora: LoraConfig, names: Table) -> dict[str, Part]:
  """Returns what PEFT calls each part of what a model learns.

  Raises:
    ValueError: `lora` does not describe the model's adapters.
  """
  parts, adapted = {}, set()
  for path, variable in nnx.to_flat_state(state):
    if path[-1] in FACTORS:
      name, module = _adapted_module(path, names)
      adapted.add(name)
      parts |= _adapter_parts(path, variable.shape, lora, name, module)
    else:
      theirs, transposed = names['.'.join(path)]
      parts |= _layers(theirs, Part(path, None, variable.shape, transposed))
      if lora.tied and path[0] == 'embed_tokens':
        repeated = Part(path, None, variable.shape, transposed, repeated=True)
        parts[f'{PREFIX}lm_head.weight'] = repeated
  # PEFT drops the tensors of modules that target_modules does not name, without a word.
  if adapted != lora.targets:
    raise ValueError(
      f'lora.target_modules are {sorted(lora.targets)}, the model has adapters on {sorted(adapted)}'
    )
  return parts


def _adapted_module(path: tuple[str, ...], names: Table) -> tuple[str, str]:
  """Returns our name of the module that an adapter's array belongs to, and theirs."""
  *module, holder, _, _ = path
  if holder == 'head_adapters':
    return 'lm_head', 'lm_head'
  weight = 'embedding' if module == ['embed_tokens'] else 'kernel'
  theirs, _ = names['.'.join((*module, weight))]
  return module[-1], theirs.removesuffix('.weight')


def _adapter_parts(
  path: tuple[str, ...], shape: tuple[int, ...], lora: LoraConfig, name: str, module: str
) -> dict[str, Part]:
  """Returns the parts of one array: a factor or the magnitudes of a module in all layers."""
  stacked = '{}' in module
  count, sizes = (shape[0], shape[1:]) if stacked else (1, shape)
  ranks = lora.modules[name].ranks
  ending = (EMBEDDING_FACTORS if name == 'embed_tokens' else FACTORS)[path[-1]]
  parts = {}
  for layer, rank in enumerate(ranks * count if len(ranks) == 1 else ranks):
    if not rank:
      continue
    own = {'lora_a': (sizes[0], rank), 'lora_b': (rank, sizes[-1]), 'magnitude': sizes}[path[-1]]
    part = Part(path, layer if stacked else None, own, transposed=len(own) == 2)
    parts[f'{PREFIX}{module.format(layer)}.{ending}'] = part
    if lora.tied and name == 'embed_tokens':
      # The head maps back: its A is the table's B, neither transposed.
      other = {'lora_a': 'lora_B', 'lora_b': 'lora_A'}[path[-1]]
      repeated = dataclasses.replace(part, transposed=False, repeated=True)
      parts[f'{PREFIX}lm_head.{other}.weight'] = repeated
  return parts


def _layers(theirs: str, part: Part) -> dict[str, Part]:
  """Returns the parts of a whole weight, one for each layer that it has."""
  if '{}' not in theirs:
    return {PREFIX + theirs: part}
  count, *sizes = part.sizes
  return {
    PREFIX + theirs.format(layer): dataclasses.replace(part, layer=layer, sizes=tuple(sizes))
    for layer in range(count)
  }


def _fill(whole: np.ndarray, part: Part, tensor: TensorFile, name: str):
  """Copies a tensor to its place, or checks that it says what is there.

  Raises:
    ValueError: it is to be the same as another tensor, and is not.
  """
  values = tensor.read(0, tensor.shape[0])
  values, place = values.T if part.transposed else values, part.of(whole)
  if not part.repeated:
    place[...] = values
  elif not np.array_equal(place, values.astype(np.float32)):
    raise ValueError(f"{tensor.path}: ensure_weight_tying, but {name} is not the token table's")


def _gather_parts(
  variables: Mapping[tuple[str, ...], nnx.Variable], parts: Mapping[str, Part]
) -> Iterator[np.ndarray]:
  """Gathers the tensors one at a time, in their orientation."""
  for part in parts.values():
    array = variables[part.path][...]
    whole = gather(array if part.layer is None else array[part.layer])
    values = dataclasses.replace(part, layer=None).of(whole).astype(np.float32)
    yield np.ascontiguousarray(values.T if part.transposed else values)
