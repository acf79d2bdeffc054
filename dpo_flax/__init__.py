"""Direct Preference Optimization of language models over LoRA adapters, in JAX.

The commands are modules: `python -m dpo_flax.train --config=configs/tiny.py`. As a library,

    import dpo_flax as dpo

    policy = dpo.load_model('path/to/hf_llama', dpo.Lora(rank=16))
    models = dpo.Models(policy, dpo.reference_of(policy))

gives losses, objectives, models, packing, steps and checkpoints for loops of one's own. Importing
it imports nothing else, jax neither, until a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.2.0.dev0'

# Public name -> the module that has it.
_HOMES = {
  'AnswerLogps': 'dpo_flax.losses.answers',
  'Checkpoints': 'dpo_flax.checkpoints.checkpoint',
  'Hidden': 'dpo_flax.model.hidden',
  'Linear': 'dpo_flax.model.linear',
  'Lora': 'dpo_flax.model.lora',
  'Loss': 'dpo_flax.losses.registry',
  'Models': 'dpo_flax.training.state',
  'Objective': 'dpo_flax.losses.objective',
  'PairLogps': 'dpo_flax.losses.pair_logps',
  'Pairs': 'dpo_flax.data.pairs',
  'answer_logps': 'dpo_flax.training.logps',
  'init_state': 'dpo_flax.training.state',
  'load_adapter': 'dpo_flax.assembly.library',
  'load_model': 'dpo_flax.assembly.library',
  'load_pairs': 'dpo_flax.assembly.library',
  'make_mesh': 'dpo_flax.sharding',
  'make_train_step': 'dpo_flax.training.step',
  'pack': 'dpo_flax.data.pairs',
  'pair_logps': 'dpo_flax.training.logps',
  'pairs_of': 'dpo_flax.losses.answers',
  'reference_of': 'dpo_flax.model.lora',
  'save_adapter': 'dpo_flax.assembly.library',
  'save_merged': 'dpo_flax.assembly.library',
  'score_pairs': 'dpo_flax.assembly.library',
  'summarize': 'dpo_flax.losses.metrics',
}

__all__ = ['losses', *_HOMES]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name == 'losses':
    return importlib.import_module('dpo_flax.losses')
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(_HOMES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])


if TYPE_CHECKING:  # what editors and type checkers see
  from dpo_flax import losses as losses
  from dpo_flax.assembly.library import load_adapter as load_adapter
  from dpo_flax.assembly.library import load_model as load_model
  from dpo_flax.assembly.library import load_pairs as load_pairs
  from dpo_flax.assembly.library import save_adapter as save_adapter
  from dpo_flax.assembly.library import save_merged as save_merged
  from dpo_flax.assembly.library import score_pairs as score_pairs
  from dpo_flax.checkpoints.checkpoint import Checkpoints as Checkpoints
  from dpo_flax.data.pairs import Pairs as Pairs
  from dpo_flax.data.pairs import pack as pack
  from dpo_flax.losses.answers import AnswerLogps as AnswerLogps
  from dpo_flax.losses.answers import pairs_of as pairs_of
  from dpo_flax.losses.metrics import summarize as summarize
  from dpo_flax.losses.objective import Objective as Objective
  from dpo_flax.losses.pair_logps import PairLogps as PairLogps
  from dpo_flax.losses.registry import Loss as Loss
  from dpo_flax.model.hidden import Hidden as Hidden
  from dpo_flax.model.linear import Linear as Linear
  from dpo_flax.model.lora import Lora as Lora
  from dpo_flax.model.lora import reference_of as reference_of
  from dpo_flax.sharding import make_mesh as make_mesh
  from dpo_flax.training.logps import answer_logps as answer_logps
  from dpo_flax.training.logps import pair_logps as pair_logps
  from dpo_flax.training.state import Models as Models
  from dpo_flax.training.state import init_state as init_state
  from dpo_flax.training.step import make_train_step as make_train_step
