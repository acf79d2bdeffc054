"""What of a model learns: low-rank adapters, and weights that learn beside them."""

import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_flax.model.kernels import Trained

_LARGEST = 2**16  # rank or alpha of a module


class Frozen(nnx.Variable):
  """An array of an adapter that belongs to the reference and does not learn."""


Module = TypeVar('Module', bound=nnx.Module)

# What a model learns, and what a checkpoint of the model holds; a Trained weight is both.
TRAINABLE = nnx.Any(nnx.LoRAParam, Trained)
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """The adapters that a user asks for, by the rules of PEFT's LoraConfig.

  `huggingface.peft_targets.resolve` finds the modules of one of our models; a `Linear` of its own
  takes rank, alpha, dropout, rslora and dora from it.

  >>> Lora(rank=16, target_modules=['q_proj', 'v_proj']).alpha
  16

  Raises:
    ValueError: a rank, an alpha or the dropout is out of range.
  """

  rank: int = 64
  alpha: float | None = None  # default: rank
  dropout: float = 0.0  # on the input of linear layers' adapters
  rslora: bool = False  # scales by alpha / sqrt(rank) (arXiv:2312.03732), not alpha / rank
  dora: bool = False  # arXiv:2402.09353
  # Names or ends of names; or a regex of whole names; None: every linear layer but the head.
  target_modules: Sequence[str] | str | None = None
  exclude_modules: Sequence[str] | str = ()
  layers_to_transform: Sequence[int] | int | None = None  # None: all
  rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()  # regex of names -> rank
  alpha_pattern: Mapping[str, float] | Sequence[tuple[str, float]] = ()
  modules_to_save: Sequence[str] = ()  # ends of names of modules that learn without adapters
  ensure_weight_tying: bool = False  # a tied head shares what the token table learns

  def __post_init__(self):
    def fix(name, value):
      object.__setattr__(self, name, value)

    fix('alpha', self.rank if self.alpha is None else self.alpha)
    for field in ('target_modules', 'exclude_modules', 'layers_to_transform', 'modules_to_save'):
      value = getattr(self, field)
      fix(field, tuple(value) if isinstance(value, Sequence) and type(value) is not str else value)
    for field in ('rank_pattern', 'alpha_pattern'):
      fix(field, tuple(dict(getattr(self, field)).items()))
    _check_range('lora.rank is', self.rank, int)
    _check_range('lora.alpha is', self.alpha, float, below=math.inf)
    for name, value in self.rank_pattern:
      _check_range(f'lora.rank_pattern gives {name}', value, int)
    for name, value in self.alpha_pattern:
      _check_range(f'lora.alpha_pattern gives {name}', value, float)
    if not 0 <= self.dropout < 1:
      raise ValueError(f'lora.dropout is {self.dropout!r}: expected at least 0 and less than 1')

  def for_module(self, name: str) -> 'LoraConfig':
    """Returns the adapter of one module alone.

    Raises:
      ValueError: a field chooses among modules, which would be ignored.
    """
    of_one = {'rank', 'alpha', 'dropout', 'rslora', 'dora'}
    chosen = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in of_one and getattr(self, field.name) != field.default
    }
    assert self.alpha is not None  # __post_init__ has set it
    if chosen:
      raise ValueError(f'a Linear has one adapter, and these fields choose among modules: {chosen}')
    return LoraConfig(
      modules={name: LowRank((self.rank,), (float(self.alpha),))},
      dropout=self.dropout,
      rslora=self.rslora,
      dora=self.dora,
    )


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Rank and alpha of one module's adapter: a single one of each, or one for every layer."""

  ranks: tuple[int, ...]  # 0: no adapter in that layer
  alphas: tuple[float, ...]

  def scales(self, *, rslora: bool) -> tuple[float, ...]:
    """Returns the factor on the adapter's output in each layer, 0 where it has none.

    It is alpha / r, or with rslora alpha / sqrt(r) (arXiv:2312.03732).
    """
    return tuple(
      alpha / (math.sqrt(rank) if rslora else rank) if rank else 0.0
      for rank, alpha in zip(self.ranks, self.alphas, strict=True)
    )

  def index(self, layer: int | None) -> int:
    """Returns which of the ranks is that of a layer; None: the module is in no layer."""
    return 0 if layer is None or len(self.ranks) == 1 else layer

  def of_layers(self, count: int) -> list[tuple[int, float]]:
    """Returns (rank, alpha) of each of `count` layers."""
    pairs = list(zip(self.ranks, self.alphas, strict=True))
    return pairs * count if len(pairs) == 1 else pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """The adapters of a model, module by module, and what else of the policy learns beside them."""

  modules: Mapping[str, LowRank]  # by name: q_proj, ..., embed_tokens, lm_head
  dropout: float  # on the input of linear layers' adapters
  rslora: bool
  dora: bool
  tied: bool = False  # whether a tied head shares what the token table learns
  # Modules whose weights learn, by their paths: final_norm, blocks.mlp.up_proj.
  saved: frozenset[str] = frozenset()
  # An adapter that the reference has and that does not learn; the policy's own comes on top of it
  # (`continues`), or in its stead.
  reference: 'LoraConfig | None' = None
  continues: bool = False
  layer: jax.Array | None = None  # [] the layer whose adapters are being made; see `at_layer`

  @property
  def targets(self) -> frozenset[str]:
    """Names of the modules that have an adapter."""
    return frozenset(self.modules)

  def scales(self, name: str) -> tuple[float, ...]:
    """Returns the factor on the output of a module's adapter in each layer."""
    return self.modules[name].scales(rslora=self.rslora)

  def at_layer(self, layer: jax.Array) -> 'LoraConfig':
    """Returns what makes the adapters of one layer, whose index may be traced."""
    reference = self.reference and self.reference.at_layer(layer)
    return dataclasses.replace(self, layer=layer, reference=reference)


def reference_of(policy: Module) -> Module:
  """Returns the policy as it was before it learned: the same variables, its adapters off.

  Of a model of your own, every part must be a `Linear` or have `set_view(adapted=)`. Weights that
  learn without adapters are the policy's in both: pass a second model as the reference then.

  >>> from dpo_flax.model.linear import Linear
  >>> policy = Linear(4, 4, lora=Lora(rank=2), rngs=nnx.Rngs(0))
  >>> reference_of(policy).kernel is policy.kernel
  True

  Raises:
    ValueError: no part of the model can take adapters off, or what learns would move both.
  """
  switched = [path for path, module in nnx.iter_modules(policy) if _takes_adapters_off(module)]
  for path, variable in nnx.to_flat_state(nnx.state(policy, TRAINABLE)):
    inside = any(path[: len(module)] == module for module in switched)
    if isinstance(variable, Trained) or not inside:
      raise ValueError(
        f'{".".join(map(str, path))} learns in the policy and would move the reference too: pass a '
        'second model as the reference'
      )
  reference = nnx.view(policy, adapted=False)
  return nnx.view(reference, reference_adapted=True, raise_if_not_found=False)


def _takes_adapters_off(module: nnx.Module) -> bool:
  # Other modules of nnx have a set_view for other switches, such as dropout.
  set_view = getattr(module, 'set_view', None)
  return set_view is not None and 'adapted' in inspect.signature(set_view).parameters


def train_weights(model: nnx.Module, modules: Collection[str] | None) -> None:
  """Gives a model its own float32 copies of the weights of `modules` (None: all), which learn.

  What shared the variables, such as another view of the model, keeps the old ones.
  """
  for path, module in list(nnx.iter_modules(model)):
    if modules is None or '.'.join(map(str, path)) in modules:
      for name, variable in list(vars(module).items()):
        if isinstance(variable, nnx.Param):
          # A copy in any case: the step consumes what it updates.
          copy = jnp.copy(variable[...].astype(jnp.float32))
          setattr(module, name, Trained(copy, **variable.get_metadata()))


def _check_range(subject: str, value: Any, numeric: type, below: float = _LARGEST) -> None:
  right = isinstance(value, int if numeric is int else int | float) and not isinstance(value, bool)
  if not right or not 0 < value < below:
    expected = 'a whole number' if numeric is int else 'a number'
    raise ValueError(
      f'{subject} {value!r}: expected {expected} greater than 0 and less than {below}'
    )
