"""What the models of a run come from, opened and compared before anything is loaded."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dpo_flax.config.sections import ModelSettings
from dpo_flax.files.untrusted import parse_json
from dpo_flax.huggingface import peft_adapter, weights
from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.huggingface.peft_adapter import AdapterFiles, open_adapter
from dpo_flax.huggingface.premerge import merge_adapter
from dpo_flax.huggingface.presets import from_preset
from dpo_flax.huggingface.weights import BaseCheckpoint
from dpo_flax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sources:
  """Checkpoints and adapters whose tensors are still on disk, and the shapes of the models."""

  model: ModelConfig
  base: BaseCheckpoint | None  # with what is merged into it; None: random weights
  reference: BaseCheckpoint | None  # None: the policy's own base
  reference_model: ModelConfig | None
  merged: AdapterFiles | None  # into the base
  adapter: AdapterFiles | None  # what the policy's adapters start as
  reference_adapter: AdapterFiles | None  # what the reference has beside the base

  @functools.cached_property
  def fingerprints(self) -> Mapping[str, str | None]:
    """The fingerprint of each, by the config's field that names it; read from disk once."""
    return {
      'initialize_from_hf': self.base and weights.fingerprint(self.base),
      'reference_model_path': self.reference and weights.fingerprint(self.reference),
      'merge_adapter_path': self.merged and peft_adapter.fingerprint(self.merged),
      'initialize_from_adapter': self.adapter and peft_adapter.fingerprint(self.adapter),
      'reference_adapter_path': self.reference_adapter
      and peft_adapter.fingerprint(self.reference_adapter),
    }

  def starts_as_reference(self) -> bool:
    """Whether the policy is its reference before the first step."""
    found = self.fingerprints
    adapter, other = found['initialize_from_adapter'], found['reference_adapter_path']
    return self.reference is None and (adapter is None or adapter == other)


def make_sources(
  model: ModelConfig,
  base: BaseCheckpoint | None,  # None: random weights
  *,
  reference: BaseCheckpoint | None = None,  # None: the policy's own base
  reference_model: ModelConfig | None = None,
  reference_model_path: str | None = None,  # as it was given, for the message
  merge_adapter_path: str | None = None,
  initialize_from_adapter: str | None = None,
  reference_adapter_path: str | None = None,
) -> Sources:
  """Opens the adapters of these paths, and checks that all fit together.

  Raises:
    ValueError: an adapter is not for the model, or the reference's vocabulary, tokenizer or depth
      is another than the policy's.
  """
  if reference is not None:
    assert reference_model is not None
    _check_same_shape(model, reference_model, reference_model_path)
    if base is not None:
      check_same_tokenizer(base.directory, reference.directory)
  merged, adapter, reference_adapter = (
    open_adapter(path, model) if path else None
    for path in (merge_adapter_path, initialize_from_adapter, reference_adapter_path)
  )
  if reference_adapter is not None and reference_adapter.lora.saved:
    raise ValueError(
      f'{reference_adapter.directory}: modules_to_save={sorted(reference_adapter.lora.saved)}: as '
      'reference_adapter_path an adapter of factors alone is supported; give this one as '
      'merge_adapter_path'
    )
  if merged is not None:
    assert base is not None  # validate sees to it
    base = merge_adapter(base, merged, model)
  return Sources(model, base, reference, reference_model, merged, adapter, reference_adapter)


def make_model_config(
  settings: ModelSettings,
  checkpoint: BaseCheckpoint | None,  # None: the preset's architecture
  mesh: Mesh,
  *,
  tokens: int,  # of a row
) -> ModelConfig:
  """Returns the architecture of `checkpoint`, or of the preset without one.

  Raises:
    ValueError: the architecture is not supported, or the attention is not for these devices.
  """
  attention, platform = settings.attention, mesh.devices.flat[0].platform
  if attention == 'auto':
    attention = 'pallas' if platform == 'tpu' else 'xla'
  if attention == 'pallas' and platform != 'tpu':
    raise ValueError(f'model.attention=pallas runs on TPU, not on {platform}: set it to auto')
  run = {
    'dtype': jnp.dtype(settings.dtype),
    'weight_dtype': jnp.dtype(settings.weight_dtype),
    'remat': settings.remat,
    'attention': attention,
  }
  model_config = _architecture(checkpoint, settings.preset, run)
  longest = model_config.longest_sequence
  if longest is not None and tokens > longest:
    raise ValueError(
      f'batch.tokens={tokens}: this model (longrope) takes other positions for sequences of more '
      f'than {longest} tokens, which is not supported: set batch.tokens to {longest} or less'
    )
  return model_config


def vocabulary_size(checkpoint: BaseCheckpoint | None, preset: str | None) -> int:
  """Returns the rows of a checkpoint's token table, or of the preset's without one."""
  run = {'dtype': jnp.float32, 'weight_dtype': jnp.float32, 'remat': 'none', 'attention': 'xla'}
  return _architecture(checkpoint, preset, run).vocab_size


def _architecture(
  checkpoint: BaseCheckpoint | None, preset: str | None, run: Mapping[str, Any]
) -> ModelConfig:
  if checkpoint is None:
    assert preset is not None
    return from_preset(preset, **run)
  return from_hf_config(checkpoint.config, where=str(checkpoint.directory / 'config.json'), **run)


def reference_fingerprint(sources: Sources, *, preset: str | None, seed: int) -> str:
  """Returns the fingerprint of the reference: of its weights, and the adapters in and on them.

  Of random weights, preset and seed.
  """
  found = sources.fingerprints
  of_weights = found['reference_model_path'] or found['initialize_from_hf']
  parts = {
    'weights': of_weights or f'{preset} {seed}',
    # Merged and applied, an adapter is rounded differently.
    'merged': None if sources.reference else found['merge_adapter_path'],
    'adapter': found['reference_adapter_path'],
  }
  return ', '.join(f'{name} {value}' for name, value in parts.items() if value)


def _check_same_shape(policy: ModelConfig, reference: ModelConfig, path: str | None):
  for field in ('vocab_size', 'num_layers'):
    found, expected = getattr(reference, field), getattr(policy, field)
    if found != expected:
      raise ValueError(
        f"reference_model_path={path}: its {field} is {found}, the policy's is {expected}"
      )


def check_same_tokenizer(policy: epath.Path, reference: epath.Path):
  """Compares the tokenizers where both directories hold one in the same format.

  Raises:
    ValueError: their tokens or rules differ; the reference would read other text.
  """
  for name, read in (('tokenizer.json', _read_tokenizer), ('tokenizer.model', _read_bytes)):
    files = [directory / name for directory in (policy, reference)]
    if all(file.exists() for file in files):
      first, second = map(read, files)
      if first != second:
        differs = [part for part in first if first[part] != second[part]]
        raise ValueError(
          f'{files[1]} is another tokenizer than {files[0]} (other {", ".join(differs)}): a '
          'reference must read the same token ids'
        )
      return


def _read_tokenizer(file: epath.Path) -> dict[str, Any]:
  """Returns what of a tokenizer.json decides the ids of a text."""
  values = parse_json(file.read_bytes(), file, max_values=math.inf)
  model = dict(values.get('model') or {})
  # Older files write a merge as one string.
  merges = [
    ' '.join(pair) if isinstance(pair, list) else pair for pair in model.get('merges') or ()
  ]
  added = {token['content']: token['id'] for token in values.get('added_tokens') or ()}
  return {
    'vocabulary': model.get('vocab'),
    'merges': merges,
    'added tokens': added,
    'rules': json.dumps([values.get('normalizer'), values.get('pre_tokenizer')], sort_keys=True),
  }


def _read_bytes(file: epath.Path) -> dict[str, bytes]:
  return {'content': file.read_bytes()}
