"""The architecture of a model: everything that the network's code needs to know."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from dpo_flax.model.kernels import float_dtype


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions divided by a factor (`rope_type: linear`)."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's stretching of the rotary wavelengths (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LongScaling:
  """Phi-3's stretching, a factor for each wavelength (`rope_type: longrope`, arXiv:2402.13753).

  A sequence of at most the original length takes the short factors. Longer ones would take the
  long factors, in all their positions; here they are refused.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  attention_factor: float  # on both rotated queries and keys, whatever the length
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions (arXiv:2104.09864)."""

  theta: float
  dim: int  # how much of each head is rotated, from its start
  scaling: LinearScaling | Llama3Scaling | LongScaling | None


@dataclasses.dataclass(frozen=True)
class AttentionType:
  """In what the attention of some layers differs from that of others."""

  window: int | None  # keys are less than this many positions back; None: any number
  rope: Rope | None  # None: no positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Everything the network's code needs to know; no field has a default below the run's config."""

  model_type: str  # whose config.json and tensor names its files have: see families.py
  vocab_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  activation: str  # silu | gelu_tanh
  fused_projections: bool  # qkv_proj and gate_up_proj are one matrix each
  biases: frozenset[str]  # projections that have one
  rms_norm_eps: float
  norm_offset: float  # what is added to the norms' scales
  input_norms: bool  # attention and MLP are given normed inputs
  output_norms: bool  # what they give is normed before it is added to the stream
  qk_norm: str | None  # norms of queries and keys: over each `head`, or over `all` at once
  attention_types: tuple[AttentionType, ...]  # layers take these in turn
  attention_scale: float  # of the scores
  attention_softcap: float | None  # scores are softly kept below this
  logits_softcap: float | None
  embed_scale: float  # of the token embeddings, where they enter the first layer
  tie_word_embeddings: bool
  initializer_range: float  # standard deviation of random initial weights
  dtype: Any  # of activations and matrix products
  weight_dtype: Any  # of the base weights in memory; int8: see quantization.py
  remat: str  # full | offload | dots | none
  attention: str  # xla | pallas; the latter on TPU

  @property
  def is_quantized(self) -> bool:
    """Whether the matrices are int8."""
    return np.dtype(self.weight_dtype) == np.int8

  @property
  def float_dtype(self) -> Any:
    """The dtype of the base weights that are floats in any case: norms' scales and biases."""
    return float_dtype(self.dtype, self.weight_dtype)

  @property
  def layer_types(self) -> tuple[AttentionType, ...]:
    """The attention type of each layer."""
    return tuple(itertools.islice(itertools.cycle(self.attention_types), self.num_layers))

  @property
  def distinct_types(self) -> tuple[AttentionType, ...]:
    """The attention types that any layer has, each once."""
    return tuple(dict.fromkeys(self.layer_types))

  @property
  def longest_sequence(self) -> int | None:
    """The tokens of a sequence beyond which this is another function; None: no such bound."""
    scalings = [each.rope.scaling for each in self.distinct_types if each.rope]
    lengths = [
      scaling.original_max_position_embeddings
      for scaling in scalings
      if isinstance(scaling, LongScaling)
    ]
    return min(lengths, default=None)
