"""Every family against transformers: logits, packing, adapters, merged checkpoints."""

import chex
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from flax import nnx

from dpo_flax.data.batches import pack
from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.huggingface.peft_adapter import load_adapter, open_adapter, save_adapter
from dpo_flax.huggingface.peft_targets import module_names
from dpo_flax.huggingface.weights import open_checkpoint, save_merged
from dpo_flax.model.transformer import run_streams
from dpo_flax.sharding import make_mesh
from helpers import llama
from helpers.batches import fill_batch
from helpers.models import make_lora

# transformers' own save_pretrained calls a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')

RUN = {'dtype': jnp.float32, 'weight_dtype': jnp.float32, 'remat': 'none', 'attention': 'xla'}
MESH = {'data': 1, 'fsdp': 4, 'tensor': 2}
LINEAR = {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1_000_000.0}
LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0, 1.5, 2.0],
  'long_factor': [4.0, 5.0, 6.0],
}
# A family, and changes of a small config that make every switch of it matter.
CASES = {
  'llama_with_biases': ('Llama', {'attention_bias': True, 'mlp_bias': True}),
  'mistral': ('Mistral', {'sliding_window': 7, 'head_dim': 12}),
  'mistral_without_window': ('Mistral', {'sliding_window': None}),
  'qwen2': ('Qwen2', {'tie_word_embeddings': True}),
  'qwen2_with_windows': (
    'Qwen2',
    {'use_sliding_window': True, 'sliding_window': 7, 'max_window_layers': 2},
  ),
  'qwen3': ('Qwen3', {'head_dim': 12}),
  'gemma2': (
    'Gemma2',
    {
      'head_dim': 12,
      'sliding_window': 7,
      'query_pre_attn_scalar': 10,
      'attn_logit_softcapping': 3.0,
      'final_logit_softcapping': 8.0,
    },
  ),
  'gemma3': (
    'Gemma3Text',
    {
      'num_hidden_layers': 7,
      'head_dim': 12,
      'sliding_window': 7,
      'query_pre_attn_scalar': 10,
      'rope_parameters': {
        'full_attention': LINEAR,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
      },
    },
  ),
  'phi3': ('Phi3', {'sliding_window': 7, 'num_key_value_heads': 4, 'pad_token_id': 0}),
  'phi3_long': (
    'Phi3',
    {
      'tie_word_embeddings': True,
      'rope_parameters': LONG,
      'partial_rotary_factor': 0.75,
      'max_position_embeddings': 400,
      'original_max_position_embeddings': 40,
      'pad_token_id': 0,
    },
  ),
  'olmo2': ('Olmo2', {}),
  'smollm3': ('SmolLM3', {'num_hidden_layers': 4, 'pad_token_id': 0}),
}
VARIANTS = {'mistral_without_window', 'qwen2_with_windows', 'phi3_long'}
ONE_OF_EACH = [case for case in CASES if case not in VARIANTS]


def make_config(case):
  """Returns transformers' configuration of a case."""
  family, changes = CASES[case]
  return getattr(transformers, f'{family}Config')(**llama.SMALL | changes)


@pytest.mark.parametrize('case', CASES)
def test_pairs_packed_in_a_row_score_as_each_response_does_in_transformers(tmp_path, case):
  """In the shared layout, where a window reaches back over the other branch to the prompt."""
  theirs = llama.write_model(tmp_path, make_config(case))
  random = np.random.default_rng(0)
  lengths = [(12, 10, 14), (5, 9, 16)]
  pairs = [pack.PackedPair(0, *(random.integers(1, 96, n) for n in each)) for each in lengths]
  batch = fill_batch([pairs])
  logits = np.asarray(logits_of_batch(llama.read(tmp_path), batch))[0]
  answer_ids = np.asarray(batch['answer_ids'])[0]
  for slot, pair in enumerate(pairs):
    for branch, response in enumerate((pair.chosen, pair.rejected)):
      tokens = np.concatenate([pair.prompt, response])[None]
      expected = llama.their_logits(theirs, tokens)[0, len(pair.prompt) - 1 : -1]
      assert expected.std() > 1
      equal(logits[answer_ids == 2 * slot + branch], expected)


@pytest.mark.parametrize('case', ONE_OF_EACH)
def test_adapters_give_our_logits_through_peft_and_merged(tokens, tmp_path, case):
  base = llama.write_model(tmp_path / 'base', make_config(case))
  plain = llama.their_logits(base, tokens)
  checkpoint = open_checkpoint(str(tmp_path / 'base'))
  config = from_hf_config(checkpoint.config, where='config.json', **RUN)
  projections = set(module_names(config)) - {'embed_tokens', 'lm_head'}
  lora = make_lora(targets=projections, dora=case in {'qwen2', 'gemma2', 'phi3'})
  model = llama.read(tmp_path / 'base', lora)
  ours = llama.our_logits(model, tokens)

  save_merged(model, checkpoint, tmp_path / 'merged')
  equal(ours, llama.their_logits(load(tmp_path / 'merged'), tokens))
  save_adapter(model, lora, None, tmp_path / 'adapter')
  adapted = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter')
  equal(ours, llama.their_logits(adapted, tokens))
  assert np.abs(ours - plain).max() > 0.1

  adapted.save_pretrained(tmp_path / 'again')
  adapter = open_adapter(tmp_path / 'again', config)
  assert adapter.lora == lora
  _, abstract, _ = llama.split_abstract(checkpoint, lora, np.float32)
  loaded = load_adapter(adapter, abstract, make_mesh(MESH))
  chex.assert_trees_all_equal(loaded, nnx.state(model, nnx.LoRAParam))


@pytest.mark.parametrize('case', CASES)
def test_config_made_for_a_model_that_had_none_means_the_same(tokens, tmp_path, case):
  theirs = llama.write_model(tmp_path / 'base', make_config(case))
  save_merged(llama.read(tmp_path / 'base'), None, tmp_path / 'model')
  written = llama.their_logits(load(tmp_path / 'model'), tokens)
  np.testing.assert_allclose(written, llama.their_logits(theirs, tokens), atol=1e-5)


def test_language_model_beside_one_of_images_is_read_and_written_alone(tokens, tmp_path):
  """As Gemma 3 is published from 4B on: `language_model.` before every name."""
  text = make_config('gemma3').to_dict()
  images = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 1}
  images |= {'num_attention_heads': 2, 'image_size': 28, 'patch_size': 14}
  config = transformers.Gemma3Config(text_config=text, vision_config=images, image_token_index=95)
  both = llama.write_model(tmp_path / 'both', config)
  tokens = np.minimum(tokens, 94)
  checkpoint = open_checkpoint(str(tmp_path / 'both'))
  model = llama.read(tmp_path / 'both')
  equal(llama.our_logits(model, tokens), llama.their_logits(both, tokens))
  save_merged(model, checkpoint, tmp_path / 'alone')
  alone = load(tmp_path / 'alone')
  assert type(alone) is transformers.Gemma3ForCausalLM
  equal(llama.their_logits(alone, tokens), llama.their_logits(both, tokens))


@pytest.mark.parametrize('case', ['qwen2', 'gemma3', 'phi3', 'olmo2'])
def test_int8_weights_change_the_logits_little(tokens, tmp_path, case):
  theirs = llama.write_model(tmp_path, make_config(case))
  model = llama.read(tmp_path, mesh=make_mesh(MESH), weight_dtype=jnp.int8)
  exact, rounded = llama.their_logits(theirs, tokens), llama.our_logits(model, tokens)
  assert 1e-3 < (rounded - exact).std() / exact.std() < 0.05


def equal(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def load(directory):
  """Returns transformers' model of a directory, by the attention that knows softcaps."""
  return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation='eager')


@nnx.jit
def logits_of_batch(model, batch):
  return model.logits(run_streams(model, None, batch)[0])
