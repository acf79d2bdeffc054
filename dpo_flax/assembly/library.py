"""Models and pairs from and to disk in one call each, for programs of one's own."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dpo_flax.assembly import models
from dpo_flax.assembly.data import prepare_data
from dpo_flax.assembly.sources import make_model_config
from dpo_flax.config.checks import validate_fields
from dpo_flax.data.pairs import Pairs, TokenPair, packed_pairs
from dpo_flax.huggingface import peft_adapter, weights
from dpo_flax.huggingface.peft_targets import resolve
from dpo_flax.model.hidden import Model
from dpo_flax.model.kernels import Trained
from dpo_flax.model.linear import adapters_of
from dpo_flax.model.lora import Lora, LoraConfig
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import make_mesh
from dpo_flax.training import scoring
from dpo_flax.training.state import mesh_of


def load_model(
  path: epath.PathLike,
  lora: Lora | None = None,
  *,
  mesh: Mesh | None = None,
  dtype: DTypeLike | None = None,
  weight_dtype: DTypeLike | None = None,
  remat: str = 'full',
  attention: str = 'auto',
  seed: int = 0,
) -> Transformer:
  """Loads a model, each weight read from disk straight into its shards.

  >>> policy = load_model('hf_llama', Lora(rank=4))
  >>> policy.config.num_layers
  2

  Args:
    path: a directory in Hugging Face layout, local or gs://, or a hub id (needs the `hub` extra).
    lora: the adapters that it gets; they change nothing until they have learned. None: no adapters.
    mesh: where it lies, of `sharding.make_mesh`; None: split over all devices.
    dtype: of activations and products; None: float32 on CPU, bfloat16 elsewhere.
    weight_dtype: of the base weights: bfloat16, float32 or int8; None: as dtype.
    remat: what backward recomputes: full, offload, dots or none.
    attention: auto, xla or pallas (on TPU).
    seed: of the adapters' initial values.

  Raises:
    ValueError: an argument has no legal value, there is no such checkpoint, its architecture is not
      supported, or it lacks a module that `lora` names.
  """
  if not isinstance(lora, Lora | None):
    raise ValueError(f'lora={lora!r}: expected Lora(rank=...), or None for no adapters')
  mesh = mesh or make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})
  dtype = dtype or ('float32' if mesh.devices.flat[0].platform == 'cpu' else 'bfloat16')
  settings = validate_fields(
    {
      'seed': seed,
      'model.dtype': _dtype_name(dtype),
      'model.weight_dtype': _dtype_name(weight_dtype or dtype),
      'model.remat': remat,
      'model.attention': attention,
    }
  )
  checkpoint = weights.open_checkpoint(os.fspath(path))
  config = make_model_config(settings.model, checkpoint, mesh, tokens=0)
  adapters = None if lora is None else resolve(lora, config)
  model = models.load_model(config, adapters, checkpoint=checkpoint, mesh=mesh, seed=seed)
  if adapters is not None and adapters.saved:
    models.train_weights(model, adapters.saved)
  return model


def load_adapter(model: Transformer, directory: epath.PathLike) -> Transformer:
  """Returns a PEFT adapter on a model's base, of which no copy is made.

  >>> save_adapter(load_model('hf_llama', Lora(rank=4)), 'adapter')
  >>> policy = load_adapter(load_model('hf_llama'), 'adapter')

  Raises:
    ValueError: there is no such adapter, or it is for another architecture; the model is not of
      `load_model`.
  """
  _check_ours(model)
  adapter = peft_adapter.open_adapter(directory, model.config)
  return models.load_onto(model, adapter, _mesh_of(model))


def save_adapter(
  model: nnx.Module,
  directory: epath.PathLike,
  *,
  base_name: str = '',
  names: Mapping[str, str] | None = None,
) -> None:
  """Writes what a model learned as a PEFT adapter in float32.

  >>> policy = load_model('hf_llama', Lora(rank=4, target_modules=['q_proj']))
  >>> save_adapter(policy, 'adapter', base_name='meta-llama/Llama-3.2-1B')
  >>> sorted(file.name for file in epath.Path('adapter').iterdir())
  ['adapter_config.json', 'adapter_model.safetensors']

  Args:
    model: of `load_model`, or any module whose adapters are those of its `Linear` maps.
    directory: made if it is missing; it gets adapter_config.json and adapter_model.safetensors.
    base_name: the checkpoint that PEFT users load the adapter onto.
    names: of a model of your own: path of each adapted map, `layers.0.q_proj` -> its name in the
      torch model, `model.layers.0.self_attn.q_proj`.

  Raises:
    ValueError: the model has no adapters, or `names` lacks one.
  """
  peft_adapter.save_adapter(model, lora_of(model), base_name, directory, names=names)


def save_merged(model: Transformer, directory: epath.PathLike, *, base: str | None = None) -> None:
  """Writes base and adapters as one Hugging Face checkpoint, which serves anywhere.

  >>> save_merged(load_model('hf_llama', Lora(rank=4)), 'merged', base='hf_llama')

  Args:
    model: of `load_model`.
    directory: made if it is missing.
    base: the checkpoint it was loaded from: its dtypes, tokenizer and untouched tensors are kept.
      None: every tensor is the model's own, and there is no tokenizer.

  Raises:
    ValueError: `base` is not this model's, or the layout cannot hold the model; it is not of
      `load_model`.
  """
  _check_ours(model)
  checkpoint = None if base is None else weights.open_checkpoint(base)
  weights.save_merged(model, checkpoint, directory)


def load_pairs(
  files: epath.PathLike | Sequence[epath.PathLike] | Mapping[str, float],
  tokenizer: epath.PathLike,
  *,
  tokens: int,
  rows: int,
  layout: str = 'shared',
  seed: int = 0,
  shuffle: bool = True,
  format: str = 'auto',
  fields: Mapping[str, str] | None = None,
  chat_template: str | None = None,
  template_variables: Mapping[str, Any] | None = None,
  too_long: str = 'raise',
  bad_record: str = 'raise',
  cache_dir: epath.PathLike | None = None,
) -> Pairs:
  """Reads and tokenizes preference files, and plans their rows.

  >>> pairs = load_pairs('pairs.jsonl', 'hf_llama', tokens=512, rows=8)
  >>> for batch in pairs.batches(steps=2):
  ...   print(batch['tokens'].shape)
  (8, 512)
  (8, 512)

  Args:
    files: a path, a glob or several; or a mixture, path -> passes over it in an epoch.
    tokenizer: a directory in Hugging Face layout, or a tokenizer file.
    tokens: of a row.
    rows: of a batch.
    layout: shared (a prompt stands once for both answers) or separate.
    seed: of the order of the pairs.
    shuffle: whether each epoch has an order of its own.
    format: of the records: auto, explicit, implicit, messages, hh, ...
    fields: keys that have other names in the records, {'chosen': 'good'}.
    chat_template: a file, or the template itself; None: the tokenizer's.
    template_variables: what the template is given besides the messages.
    too_long: what becomes of a pair longer than a row: raise, drop or truncate_prompt.
    bad_record: what becomes of a record that cannot be read: raise or skip.
    cache_dir: keeps the token ids for the next time; None: a temporary directory.

  Raises:
    ValueError: for all that is wrong with the arguments, by the names that they have in a config,
      and with the data, naming file and line.
  """
  with contextlib.ExitStack() as cleanup:
    if cache_dir is None:
      cache_dir = tempfile.mkdtemp(prefix='dpo_flax_tokens')
      cleanup.callback(shutil.rmtree, cache_dir, ignore_errors=True)
    settings = validate_fields(
      {
        'seed': seed,
        'data.train': _plain_paths(files),
        'data.validation_split_fraction': 0.0,
        'data.format': format,
        'data.fields': fields,
        'data.tokenizer': os.fspath(tokenizer),
        'data.chat_template': chat_template,
        'data.template_variables': template_variables,
        'data.shuffle': shuffle,
        'data.layout': layout,
        'data.too_long': too_long,
        'data.bad_record': bad_record,
        'data.cache_dir': os.fspath(cache_dir),
        'batch.rows': rows,
        'batch.tokens': tokens,
      }
    )
    pairs = Pairs(prepare_data(settings))
    weakref.finalize(pairs, cleanup.pop_all().close)  # its tokens are read as long as it lives
  return pairs


def score_pairs(
  model: Model, pairs: Pairs | Iterable[TokenPair], *, logits_chunk: int = 512
) -> np.ndarray:
  """Returns the log-probs of chosen and rejected of every pair, [n, 2] float32.

  >>> policy = load_model('hf_llama', Lora(rank=4))
  >>> pairs = [([1, 5], [7, 2], [8, 2])]  # prompt, chosen, rejected
  >>> margins = score_pairs(policy, pairs) - score_pairs(reference_of(policy), pairs)
  >>> print(margins)
  [[0. 0.]]

  Args:
    model: any model (`Model`); on a mesh, its rows are split over it.
    pairs: of `load_pairs`, or token ids as `pack` takes them.
    logits_chunk: the scored positions of a row that meet the vocabulary at once.

  Raises:
    ValueError: a pair has an empty part, or ids that the model has not.
  """
  mesh = _mesh_of(model)
  if isinstance(pairs, Pairs):
    return scoring.score_side(model, pairs.prepared, 'train', logits_chunk=logits_chunk, mesh=mesh)
  return scoring.score_pairs(
    model, packed_pairs(pairs), layout='shared', logits_chunk=logits_chunk, mesh=mesh
  )


def lora_of(model: nnx.Module) -> LoraConfig:
  """Returns what the adapters of a model were made of, as the adapters themselves know it.

  Raises:
    ValueError: it has none.
  """
  learned = [adapter for _, adapter in adapters_of(model) if adapter.learns]
  saved = {
    '.'.join(map(str, path))
    for path, module in nnx.iter_modules(model)
    if any(isinstance(variable, Trained) for variable in vars(module).values())
  }
  if not learned and not saved:
    raise ValueError('the model has no adapters: load it with lora=Lora(...)')
  first = learned[0] if learned else None
  return LoraConfig(
    modules={adapter.name: adapter.low_rank for adapter in learned},
    dropout=first.dropout if first else 0.0,
    rslora=first is not None and first.scales != first.low_rank.scales(rslora=False),
    dora=first is not None and first.magnitude is not None,
    tied=bool(getattr(getattr(model, 'embed_tokens', None), 'shares_adapters', False)),
    saved=frozenset(saved),
  )


def _check_ours(model: nnx.Module) -> None:
  if not isinstance(model, Transformer):
    raise ValueError(f'{type(model).__name__} is no model of load_model: its layout is unknown')


def _mesh_of(model: Model) -> Mesh:
  """Returns the mesh that a model lies on, or one of the first device alone."""
  alone = {'data': 1, 'fsdp': 1, 'tensor': 1}
  return mesh_of(nnx.state(model)) or make_mesh(alone, jax.devices()[:1])


def _dtype_name(dtype: DTypeLike) -> str:
  """Returns the name of a data type; what is none stays as it is."""
  return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name


def _plain_paths(files: Any) -> Any:
  """Returns files with their paths as strings."""
  if isinstance(files, Mapping):
    return {os.fspath(path): weight for path, weight in files.items()}
  if isinstance(files, str | os.PathLike):
    return os.fspath(files)
  return [os.fspath(path) for path in files]
