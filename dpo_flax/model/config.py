"""The architecture of a model: everything that the network's code needs to know."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's stretching of the rotary wavelengths (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Everything the network's code needs to know; no field has a default below the run's config."""

  vocab_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  rope_scaling: Llama3Scaling | None
  tie_word_embeddings: bool
  initializer_range: float  # standard deviation of random initial weights
  dtype: Any  # of activations and matrix products
  weight_dtype: Any  # of the base weights in memory; int8: see quantization.py
  remat: str  # full | offload | dots | none
  attention: str  # xla | pallas | splash; the last two on TPU

  @property
  def is_quantized(self) -> bool:
    """Whether the matrices are int8."""
    return np.dtype(self.weight_dtype) == np.int8

  @property
  def float_dtype(self) -> Any:
    """The dtype of the base weights that are floats in any case: the norms' scales."""
    return self.dtype if self.is_quantized else self.weight_dtype
