"""Presets are the published models: their sizes, and what their config.json files say."""

import math

import jax
import jax.numpy as jnp
import pytest
import transformers
from flax import nnx

from dpo_flax.huggingface.config_json import from_hf_config, to_hf_config
from dpo_flax.huggingface.families import FAMILIES
from dpo_flax.huggingface.presets import PRESETS, from_preset
from dpo_flax.model.transformer import Transformer

RUN = {'dtype': jnp.float32, 'weight_dtype': jnp.bfloat16, 'remat': 'full', 'attention': 'xla'}
# Of Gemma 3 from 4B on, the published number less 416,866,032 of the tower for images, and less
# 1,152 * (embed_dim + 1) of what joins the two.
PARAMETERS = {
  'llama2-7b': 6_738_415_616,
  'llama3-8b': 8_030_261_248,
  'llama3.1-8b': 8_030_261_248,
  'llama3.1-70b': 70_553_706_496,
  'llama3.2-1b': 1_235_814_400,
  'llama3.2-3b': 3_212_749_824,
  'mistral-7b-v0.1': 7_241_732_096,
  'mistral-7b-v0.3': 7_248_023_552,
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-1.5b': 1_543_714_304,
  'qwen2.5-3b': 3_085_938_688,
  'qwen2.5-7b': 7_615_616_512,
  'qwen2.5-14b': 14_770_033_664,
  'qwen2.5-32b': 32_763_876_352,
  'qwen2.5-72b': 72_706_203_648,
  'qwen3-0.6b': 596_049_920,
  'qwen3-1.7b': 1_720_574_976,
  'qwen3-4b': 4_022_468_096,
  'qwen3-8b': 8_190_735_360,
  'qwen3-14b': 14_768_307_200,
  'qwen3-32b': 32_762_123_264,
  'gemma2-2b': 2_614_341_888,
  'gemma2-9b': 9_241_705_984,
  'gemma2-27b': 27_227_128_320,
  'gemma3-270m': 268_098_176,
  'gemma3-1b': 999_885_952,
  'gemma3-4b': 4_300_079_472 - 416_866_032 - 1152 * 2561,
  'gemma3-12b': 12_187_325_040 - 416_866_032 - 1152 * 3841,
  'gemma3-27b': 27_432_406_640 - 416_866_032 - 1152 * 5377,
  'phi3-mini-4k': 3_821_079_552,
  'phi4-mini': 3_836_021_760,
  'phi4': 14_659_507_200,
  'olmo2-1b': 1_484_916_736,
  'olmo2-7b': 7_298_617_344,
  'olmo2-13b': 13_716_198_400,
  'olmo2-32b': 32_234_279_936,
  'smollm2-135m': 134_515_008,
  'smollm2-360m': 361_821_120,
  'smollm2-1.7b': 1_711_376_384,
  'smollm3-3b': 3_075_098_624,
}


def read(values):
  return from_hf_config(values, where='config.json', **RUN)


@pytest.mark.parametrize('name', PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
  model = nnx.eval_shape(lambda: Transformer(from_preset(name, **RUN), None, nnx.Rngs(0)))
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
  assert parameters == PARAMETERS[name]


def test_every_preset_but_tiny_is_a_published_model():
  assert set(PRESETS) - set(PARAMETERS) == {'tiny'}
  assert {values['model_type'] for values in PRESETS.values()} == set(FAMILIES)


@pytest.mark.parametrize('name', PRESETS)
def test_config_survives_the_round_trip_through_transformers(name):
  config = from_preset(name, **RUN)
  assert read(to_hf_config(config)) == config
  theirs = transformers.AutoConfig.for_model(**to_hf_config(config))
  assert read(theirs.to_dict()) == config
  # What transformers makes of the published file, which leaves much to its defaults.
  assert read(transformers.AutoConfig.for_model(**PRESETS[name]).to_dict()) == config


def test_misspelt_preset_gets_a_suggestion():
  with pytest.raises(ValueError, match=r"'lama3\.1-8b': did you mean 'llama3\.1-8b'"):
    from_preset('lama3.1-8b', **RUN)
  with pytest.raises(ValueError, match=r'there are gemma2-27b, '):
    from_preset('opt', **RUN)
