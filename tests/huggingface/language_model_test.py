"""What belongs to the language model of a checkpoint with images, by names old and new."""

import pytest

from dpo_flax.huggingface.language_model import language_model

CONFIG = {'model_type': 'gemma3', 'text_config': {'hidden_size': 8}, 'vision_config': {'a': 1}}


@pytest.mark.parametrize('prefix', ['language_model.model.', 'model.language_model.'])
def test_names_lose_their_prefix_and_images_their_tensors(prefix):
  tensors = {f'{prefix}layers.0.mlp.up_proj.weight': 1, f'{prefix}norm.weight': 2}
  others = {'vision_tower.norm.weight': 3, 'model.multi_modal_projector.weight': 4}
  config, found = language_model(CONFIG, tensors | others, 'here')
  assert found == {'model.layers.0.mlp.up_proj.weight': 1, 'model.norm.weight': 2}
  assert (config['model_type'], config['hidden_size']) == ('gemma3_text', 8)


@pytest.mark.parametrize(
  'changes',
  [{'text_config': None}, {'text_config': {'model_type': 'llama'}}, {'tie_word_embeddings': False}],
)
def test_what_is_no_gemma3_is_refused(changes):
  with pytest.raises(ValueError, match=f'here: .*{next(iter(changes))}'):
    language_model(CONFIG | changes, {}, 'here')


def test_unknown_fields_are_refused_by_name():
  with pytest.raises(ValueError, match=r'here: .*experts=8'):
    language_model(CONFIG | {'experts': 8}, {}, 'here')


def test_two_tensors_of_one_place_are_refused():
  names = ['language_model.model.norm.weight', 'model.language_model.norm.weight']
  with pytest.raises(ValueError, match=r'here: .*twice'):
    language_model(CONFIG, dict.fromkeys(names, 0), 'here')
