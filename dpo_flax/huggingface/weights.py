"""Hugging Face checkpoints <-> parameters of a Transformer, by one name table."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from dpo_flax.files.messages import shown, shown_list
from dpo_flax.files.paths import is_remote
from dpo_flax.files.untrusted import find_file, read_json
from dpo_flax.huggingface import placement
from dpo_flax.huggingface.config_json import to_hf_config
from dpo_flax.huggingface.language_model import has_language_model, language_model
from dpo_flax.huggingface.merging import check_mergeable, gather_factors, merge
from dpo_flax.huggingface.names import HARMLESS, name_table
from dpo_flax.huggingface.placement import Slot
from dpo_flax.huggingface.tensor_files import DTYPES, TensorFile, read_header, write_tensors
from dpo_flax.model.kernels import Trained
from dpo_flax.model.lora import BASE
from dpo_flax.model.transformer import Transformer

COPIED_FILES = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
)

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SAMPLED_BYTES = 4096  # of a sample of a tensor, in a fingerprint
SAMPLES = 4  # of a tensor, the first at its beginning, the last at its end
_READERS = 16  # tensors sampled at a time: in a bucket each takes long
SHARD_BYTES = 5 * 10**9  # of a written file; a larger tensor gets a file of its own

Specs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """A directory in Hugging Face layout; its tensors are still on disk."""

  directory: epath.Path
  config: Mapping[str, Any]  # of config.json, or of the language model inside it
  tensors: Mapping[str, TensorFile]


def open_checkpoint(path: str) -> BaseCheckpoint:
  """Opens a directory, local or gs://, or downloads a hub id (needs the `hub` extra).

  Raises:
    ValueError: there is no such checkpoint, its files contradict each other, or one of them is a
      link that leads elsewhere.
  """
  directory = epath.Path(path).expanduser()
  if not directory.is_dir():
    directory = _download(path)
  files = {name: find_file(directory, name) for name in COPIED_FILES}
  config = files['config.json']
  if config is None:
    raise ValueError(f'{directory} has no config.json: no checkpoint in Hugging Face layout')
  values, tensors = read_json(config), _open_tensors(directory)
  if has_language_model(values):
    values, tensors = language_model(values, tensors, str(directory))
  layers = values.get('num_hidden_layers')
  if isinstance(layers, int) and layers > len(tensors):
    raise ValueError(f'{config}: num_hidden_layers is {layers}, for {len(tensors)} tensors')
  return BaseCheckpoint(directory, values, tensors)


def fingerprint(checkpoint: BaseCheckpoint) -> str:
  """Returns a SHA-256 of config.json and of every tensor's name, type, shape and samples.

  It keeps models apart without reading all of them.
  """
  digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
  tensors = sorted(checkpoint.tensors.items())
  with futures.ThreadPoolExecutor(_READERS) as readers:
    samples = readers.map(_samples, (tensor for _, tensor in tensors))
    for (name, tensor), sampled in zip(tensors, samples, strict=True):
      digest.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())
      digest.update(sampled)
  return digest.hexdigest()


def _samples(tensor: TensorFile) -> bytes:
  if tensor.dtype not in DTYPES:
    return b''  # whoever reads it refuses it
  size = tensor.row_bytes * math.prod(tensor.shape[:1])
  last = max(0, size - SAMPLED_BYTES)
  starts = sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)})
  found = []
  with tensor.path.open('rb') as file:
    for start in starts:
      file.seek(tensor.offset + start)
      found.append(file.read(min(SAMPLED_BYTES, size)))
  return b''.join(found)


def load_base(
  checkpoint: BaseCheckpoint,
  abstract: nnx.State,  # the base's Params as ShapeDtypeStructs, with their logical axes
  mesh: Mesh,
) -> nnx.State:
  """Reads the base weights straight into arrays sharded over `mesh`, cast to `abstract`'s dtypes.

  Raises:
    ValueError: names every tensor that is missing, unexpected, misshapen or of a foreign dtype.
  """
  tensors, slots = _matched(checkpoint, abstract)
  return placement.load_arrays(tensors, slots, abstract, mesh)


def save_merged(
  model: Transformer,
  checkpoint: BaseCheckpoint | None,  # None: random weights, which no checkpoint holds
  directory: epath.PathLike,  # made if it is missing; what it holds is not looked at
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes base + adapters in Hugging Face layout from process 0, one tensor at a time.

  What is adapted or trained is computed in float32 and rounded to the checkpoint's dtype. All other
  tensors and files are the checkpoint's own; without one they are the model's.

  Raises:
    ValueError: `checkpoint` is not this model's, or its layout cannot hold the model.
  """
  check_mergeable(model)
  base = nnx.state(model, BASE)
  if checkpoint is None:
    tensors, slots = {}, placement.make_slots(base, name_table(model.config.model_type))
    dtypes = dict.fromkeys(slots, np.dtype(model.config.float_dtype))
  else:
    tensors, slots = _matched(checkpoint, base)
    dtypes = {name: DTYPES[tensors[name].dtype] for name in slots}
  # Wide dtypes first: no tensor is then misaligned in its file.
  order = sorted(slots, key=lambda name: -dtypes[name].itemsize)
  specs = {name: (dtypes[name], slots[name].shape) for name in order}
  variables = dict(nnx.to_flat_state(base))
  arrays = (
    _merged(model, variables, slots[name], tensors.get(name), dtypes[name]) for name in order
  )

  def write(directory, arrays):
    _write_shards(directory, specs, arrays, shard_bytes)
    _write_sidecars(directory, model, checkpoint)

  placement.write_gathered(directory, arrays, write)


def _download(path: str) -> epath.Path:
  """Fetches a hub id into huggingface_hub's cache."""
  if is_remote(path):
    raise ValueError(f'{path}: no such directory, or this account may not read it')
  if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', path):
    raise ValueError(f'{path}: no such directory (and no hub id, which reads owner/name)')
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"{path}: no such directory; to get it from the hub, run pip install 'dpo_flax[hub]'"
    ) from error
  patterns = [*COPIED_FILES, '*.safetensors', INDEX]
  try:
    found = huggingface_hub.snapshot_download(path, allow_patterns=patterns, ignore_patterns='*/*')
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: no such directory, and the hub did not give it: {error}') from error
  return epath.Path(found)


def _open_tensors(directory: epath.Path) -> dict[str, TensorFile]:
  """Reads the headers of the one file, or of all that the index lists."""
  single, index = (find_file(directory, name) for name in (FILE, INDEX))
  if single is not None:
    return read_header(single)[1]
  if index is None:
    raise ValueError(f'{directory} has no {FILE} and no {INDEX}; .bin and .pt files are not read')
  listed = read_json(index).get('weight_map')
  if not isinstance(listed, dict):
    raise ValueError(f'{index}: no weight_map')
  tensors, faults = {}, []
  for file in sorted(set(map(str, listed.values()))):
    for name, tensor in read_header(_find_shard(directory, file))[1].items():
      if listed.get(name) != file:
        said = shown(listed.get(name, 'nothing of it'))
        faults.append(f'{name}: in {file}, but the index says {said}')
      tensors[name] = tensor
  faults += [
    f'{shown(name)}: not in {file}' for name, file in listed.items() if name not in tensors
  ]
  if faults:
    raise ValueError(f'{index} contradicts the files:{shown_list(faults)}')
  return tensors


def _find_shard(directory: epath.Path, name: str) -> epath.Path:
  """Returns a file that the index lists."""
  # Only plain names, so that no path leads out of the directory, and no pickle is opened.
  if not re.fullmatch(r'\w[\w.-]{0,200}\.safetensors', name, re.ASCII):
    raise ValueError(
      f'{directory / INDEX}: {shown(repr(name))} is no plain name of a .safetensors file beside it'
    )
  file = find_file(directory, name)
  if file is None:
    raise ValueError(
      f'{directory / INDEX}: {directory / name} does not exist: an incomplete download?'
    )
  return file


def _matched(
  checkpoint: BaseCheckpoint, base: nnx.State
) -> tuple[dict[str, TensorFile], dict[str, Slot]]:
  """Returns the checkpoint's tensors and their slots, which fit one another."""
  table = name_table(checkpoint.config['model_type'])
  slots, tensors = placement.make_slots(base, table), dict(checkpoint.tensors)
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  # Some writers store a tied head again. An equal copy is harmless, another one is no tied head.
  copy = None if head in slots else tensors.pop(head, None)
  placement.match(tensors, slots, harmless=HARMLESS, where=str(checkpoint.directory))
  if copy is not None and not placement.equal_tensors(copy, tensors[embedding]):
    raise ValueError(
      f'{checkpoint.directory}: tie_word_embeddings, but {head} differs from {embedding}'
    )
  return tensors, slots


def _merged(
  model: Transformer,
  variables: Mapping[Any, nnx.Variable],  # of the base, by their paths
  slot: Slot,
  source: TensorFile | None,
  dtype: np.dtype,
) -> np.ndarray | None:
  """Returns base + adapter of one tensor; None where nothing is written."""
  if source is not None and not isinstance(variables[slot.path], Trained):
    weight = None if jax.process_index() else source.read(0, source.shape[0])
  else:
    weight = placement.gather_slot(variables, slot)
    if weight.dtype == np.int8:
      scales = placement.gather_slot(variables, slot.scales)
      weight = (weight * scales[:, None]).astype(model.config.float_dtype)
  module: Any = functools.reduce(getattr, slot.path[:-1], model)
  adapters = module.adapters.active if slot.path[-1] in {'kernel', 'embedding'} else ()
  factors = list(filter(None, (gather_factors(adapter, slot.layer) for adapter in adapters)))
  if weight is None or jax.process_index():
    return None
  if factors:
    wide = merge(weight.T if slot.transposed else weight, factors)
    weight = wide.T if slot.transposed else wide
  return weight.astype(dtype)


def _write_shards(
  directory: epath.Path, specs: Specs, arrays: Iterator[np.ndarray], shard_bytes: int
) -> None:
  """Writes model.safetensors, or several files and their index."""
  sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
  shards, room = [], 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  count = len(shards)
  files = [f'model-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)]
  files = [FILE] if count == 1 else files
  for file, names in zip(files, shards, strict=True):
    parts = {name: specs[name] for name in names}
    write_tensors(directory / file, parts, (next(arrays) for _ in names))
  if count > 1:
    listed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': listed}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


def _write_sidecars(directory: epath.Path, model: Transformer, checkpoint: BaseCheckpoint | None):
  """Copies everything beside the weights byte for byte, or describes a model that had none."""
  config = directory / 'config.json'
  if checkpoint is None:
    config.write_text(json.dumps(to_hf_config(model.config), indent=2))
    return
  for name in COPIED_FILES:
    if (checkpoint.directory / name).exists():
      (directory / name).write_bytes((checkpoint.directory / name).read_bytes())
  if has_language_model(read_json(config)):
    config.write_text(json.dumps(checkpoint.config, indent=2))
