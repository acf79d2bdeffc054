"""What of the policy learns, by the config: adapters, single modules or all weights."""

import pytest

from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.settings import settings_of
from helpers.configs import set_field
from helpers.models import make_model_config


def lora_of(config, *, tied=False, weight_dtype='float32', **fields):
  """Makes the LoraConfig of a config with fields changed, for a small model."""
  for name, value in fields.items():
    set_field(config, 'tuning.method' if name == 'method' else f'lora.{name}', value)
  model = make_model_config(tie_word_embeddings=tied, weight_dtype=weight_dtype)
  settings = settings_of(config)
  return make_lora_config(settings.lora, model, method=settings.tuning.method)


def test_all_weights_learn_without_adapters(config):
  assert lora_of(config, method='full') is None


def test_dora_is_a_method(config):
  assert lora_of(config, method='dora').dora and not lora_of(config, method='lora').dora


@pytest.mark.parametrize(
  ('entry', 'modules'),
  [
    ('lm_head', {'lm_head'}),
    ('embed_tokens', {'embed_tokens'}),
    ('model.norm', {'final_norm'}),
    ('input_layernorm', {'blocks.attention_norm'}),
    # PEFT takes any end of a name: that of the last norm is one of all norms' too.
    ('norm', {'final_norm', 'blocks.attention_norm', 'blocks.mlp_norm'}),
    ('mlp.down_proj', {'blocks.mlp.down_proj'}),
  ],
)
def test_saved_modules_are_found_by_the_ends_of_their_names(config, entry, modules):
  found = lora_of(config, modules_to_save=(entry,))
  assert found.saved == modules
  assert 'down_proj' not in found.targets or entry != 'mlp.down_proj'


def test_a_tied_table_learns_for_its_head_as_well(config):
  for entry in ('lm_head', 'embed_tokens'):
    found = lora_of(config, tied=True, ensure_weight_tying=True, modules_to_save=(entry,))
    assert found.saved == {'embed_tokens'} and found.tied
  for targets in (['q_proj', 'lm_head'], r'(.*q_proj|lm_head)'):
    found = lora_of(
      config, tied=True, ensure_weight_tying=True, modules_to_save=(), target_modules=targets
    )
    assert found.targets == {'q_proj', 'embed_tokens'}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'modules_to_save': ('x_norm',)}, "modules_to_save: 'x_norm' matches none"),
    ({'modules_to_save': ('0.mlp.up_proj',)}, 'only some layers of blocks.mlp.up_proj'),
    ({'modules_to_save': ('mlp',)}, "'mlp' matches none"),
    ({'modules_to_save': ('lm_head',), 'tied': True}, 'set lora.ensure_weight_tying=True'),
    ({'modules_to_save': ('lm_head',), 'weight_dtype': 'int8'}, 'lm_head cannot learn in int8'),
    ({'ensure_weight_tying': True}, 'is not tied'),
    ({'ensure_weight_tying': True, 'tied': True}, 'neither'),
    (
      {
        'ensure_weight_tying': True,
        'tied': True,
        'method': 'dora',
        'target_modules': ['embed_tokens'],
      },
      'lengths of different channels',
    ),
    ({'rank_pattern': 'q_proj'}, 'lora.rank_pattern=.*expected a mapping of modules'),
    ({'rank_pattern': ('q_proj', 2)}, 'lora.rank_pattern=.*expected a mapping of modules'),
    ({'rank_pattern': (('q_proj', 1.5),)}, 'rank_pattern gives q_proj 1.5: .*whole number'),
    ({'alpha_pattern': (('q_proj', 'x'),)}, "alpha_pattern gives q_proj 'x': expected a number"),
    ({'alpha_pattern': (('q_proj', float('nan')),)}, 'alpha_pattern gives q_proj nan'),
    ({'dropout': 0.1, 'target_modules': ['lm_head']}, 'would not reach the adapter of lm_head'),
  ],
)
def test_what_cannot_be_trained_so_is_refused(config, fields, message):
  with pytest.raises(ValueError, match=message):
    lora_of(config, **fields)
