"""PEFT's rules of which modules are adapted, of what rank, and which are trained whole."""

import peft
import pytest
import transformers

from dpo_flax.huggingface.peft_targets import module_names, resolve
from dpo_flax.model.lora import Lora, LowRank
from helpers.models import BLOCK_PROJECTIONS, make_model_config

# peft asks transformers by a name that transformers has deprecated.
pytestmark = [
  pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning'),
  pytest.mark.filterwarnings('ignore:Model has .tie_word_embeddings=True.:UserWarning'),
]

LAYERS = 3


def ask(target_modules=None, **changes):
  """Returns what a user asks for, with a scale that is not 1."""
  return Lora(rank=4, alpha=10.0, target_modules=target_modules, **changes)


@pytest.fixture(scope='module')
def config():
  return make_model_config(num_layers=LAYERS)


def peft_modules(asked, **changes):
  """Returns {module name: (rank, scale)} of what PEFT adapts."""
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=16,
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=LAYERS,
      num_attention_heads=2,
      num_key_value_heads=1,
    )
  )
  values = {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in vars(asked).items()
    if value and name not in ('rank', 'alpha')
  }
  values |= {'r': asked.rank, 'lora_alpha': asked.alpha}
  values |= {name: dict(getattr(asked, name)) for name in ('rank_pattern', 'alpha_pattern')}
  if asked.layers_to_transform == 0:
    values['layers_to_transform'] = 0
  adapted = peft.get_peft_model(model, peft.LoraConfig(**values | changes)).base_model.model
  return {
    name: (module.r['default'], module.scaling['default'])
    for name, module in adapted.named_modules()
    if hasattr(module, 'lora_A')
  }


def our_modules(asked, config):
  """Returns the same of ours."""
  found = {}
  for name, module in resolve(asked, config).modules.items():
    places = module_names(config)[name]
    pairs = list(zip(module.ranks, module.alphas, strict=True))
    for place, (rank, alpha) in zip(places, pairs * (len(places) // len(pairs)), strict=True):
      if rank:
        found[place] = (rank, alpha / rank)
  return found


ASKED = {
  'all_linear': ask('all-linear'),
  'all_linear_but_some': ask('all-linear', exclude_modules=['down_proj', 'mlp.up_proj']),
  'names': ask(['q_proj', 'v_proj']),
  'places': ask(['self_attn.q_proj', 'mlp.down_proj']),
  'one_layer_by_its_place': ask(['layers.1.self_attn.q_proj', 'up_proj']),
  'head': ask(['lm_head', 'k_proj']),
  'table_and_head': ask(['embed_tokens', 'lm_head']),
  'names_less_place': ask(['q_proj', 'k_proj', 'up_proj'], exclude_modules=['self_attn.k_proj']),
  'less_regex': ask(['q_proj', 'k_proj', 'gate_proj'], exclude_modules=r'.*self_attn\.q.*'),
  'less_one_layer': ask(['q_proj', 'k_proj'], exclude_modules=r'.*\.2\..*k_proj'),
  'regex': ask(r'.*\.(q|o)_proj'),
  'regex_from_the_start': ask(r'model\.layers\.\d+\.mlp\.\w+_proj'),
  'regex_of_layers': ask(r'.*\.[02]\.mlp\.\w+_proj'),
  'regex_with_the_head': ask(r'(.*\.gate_proj|lm_head)'),
  'regex_less_name': ask(r'.*\.(q|k|v)_proj', exclude_modules=['v_proj']),
  'layers': ask(['q_proj', 'up_proj', 'lm_head'], layers_to_transform=[0, 2]),
  'first_layer': ask(['q_proj'], layers_to_transform=0),
  'ranks': ask(['q_proj', 'mlp.up_proj'], rank_pattern={'q_proj': 2, 'up_proj': 8}),
  'ranks_and_alphas_of_layers': ask(
    ['q_proj', 'down_proj'],
    rank_pattern={r'layers\.1\..*proj': 1, 'q_proj': 2},
    alpha_pattern={'model.layers.0.self_attn.q_proj': 3.0, 'down_proj': 5.0},
  ),
  'first_pattern_counts': ask(['q_proj'], rank_pattern={'.*': 1, 'q_proj': 2}),
  'saved_is_not_adapted': ask(['q_proj', 'lm_head'], modules_to_save=['lm_head']),
}


@pytest.mark.parametrize('asked', ASKED.values(), ids=ASKED)
def test_modules_ranks_and_scales_are_pefts(config, asked):
  found = our_modules(asked, config)
  assert found == peft_modules(asked)
  assert found


def test_unset_targets_are_all_linear_layers_but_the_head(config):
  assert resolve(ask(), config).targets == set(BLOCK_PROJECTIONS)


def test_layers_alike_are_told_once(config):
  resolved = resolve(
    ask(['q_proj', 'o_proj'], rank_pattern={'1.self_attn.o_proj': 2}), config
  ).modules
  assert resolved['q_proj'] == LowRank((4,), (10.0,))
  assert resolved['o_proj'] == LowRank((4, 2, 4), (10.0, 10.0, 10.0))


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    (ask(['q_prj']), "target_modules: 'q_prj' matches none"),
    (ask(['q_proj', 'proj']), "'proj' matches none"),
    (ask('q_proj'), "'q_proj' matches none"),  # a string is a regex over whole names
    (ask('q_proj['), 'not a regular expression'),
    (ask(exclude_modules=('q_prj',)), "exclude_modules: 'q_prj' matches none"),
    (ask(['q_proj'], exclude_modules=('q_proj',)), 'leaves no module'),
    (ask([]), 'leaves no module'),
    (ask(rank_pattern={'q_prj': 2}), 'rank_pattern: q_prj matches none'),
    (ask(layers_to_transform=[0, 3]), r'layers_to_transform=\[0, 3\]: the layers are 0 to 2'),
    (ask('.*q_proj', layers_to_transform=[0]), 'can name the layers itself'),
  ],
)
def test_what_misses_is_refused(config, asked, message):
  with pytest.raises(ValueError, match=message):
    resolve(asked, config)
