"""Laws of the adapters, and PEFT's rules of which modules get one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from flax import nnx
from peft.tuners.tuners_utils import check_target_module_exists

from dpo_flax.model.lora import BLOCK_PROJECTIONS, Projection, resolve_targets

# peft asks transformers by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is:FutureWarning')


def make_projection(config, lora, *, name='q_proj', features=(32, 24), b=0.3, seed=0):
  """Returns a projection whose B is random."""
  rngs = nnx.Rngs(seed, lora=seed + 1)
  projection = Projection(name, features, ('embed', 'heads'), config=config, lora=lora, rngs=rngs)
  if projection.adapted:
    shape = projection.lora_b[...].shape
    projection.lora_b[...] = jnp.asarray(
      b * np.random.default_rng(0).standard_normal(shape)
    ).astype(jnp.float32)
  return projection


@pytest.fixture(scope='module')
def inputs():
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 32)), jnp.float32)


@pytest.mark.parametrize(
  ('rslora', 'scale'), [(False, 10 / 4), (True, 10 / 2)], ids=['alpha_over_r', 'over_sqrt_r']
)
def test_output_is_base_plus_scaled_low_rank_product(
  make_model_config, make_lora, inputs, rslora, scale
):
  projection = make_projection(make_model_config(), make_lora(rslora=rslora))
  x, w, a, b = (
    np.asarray(array, np.float64)
    for array in (inputs, projection.kernel[...], projection.lora_a[...], projection.lora_b[...])
  )
  np.testing.assert_allclose(projection(inputs), x @ w + scale * (x @ a) @ b, atol=1e-5)


@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize(('r', 'alpha'), [(8, 16.0), (64, 64.0), (2, 1.0)])
def test_scale_equals_peft(make_lora, r, alpha, rslora):
  config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=['q_proj'])
  layer = peft.get_peft_model(small_llama(), config).base_model.model.model.layers[0]
  theirs = layer.self_attn.q_proj.scaling['default']
  assert make_lora(r=r, alpha=alpha, rslora=rslora).scale == pytest.approx(theirs)


def test_adapter_taken_off_equals_the_base_bit_for_bit(make_model_config, make_lora, inputs):
  adapted = make_projection(make_model_config(), make_lora(dropout=0.5))
  plain = make_projection(make_model_config(), None)
  taken_off = nnx.view(adapted, adapted=False)
  assert not np.array_equal(adapted(inputs), plain(inputs))
  np.testing.assert_array_equal(taken_off(inputs, jax.random.key(0)), plain(inputs))
  assert adapted.adapted and nnx.view(taken_off, adapted=True).adapted
  assert taken_off.kernel is adapted.kernel, 'a copy of the base would double its memory'


def test_a_projection_without_adapter_stays_plain_in_either_view(make_model_config):
  projection = make_projection(make_model_config(), None)
  assert not nnx.view(projection, adapted=True).adapted
  assert not hasattr(projection, 'lora_a')


def test_fresh_adapter_changes_no_bit(make_model_config, make_lora, inputs):
  projection = make_projection(make_model_config(), make_lora(), b=0.0)
  off = nnx.view(projection, adapted=False)
  np.testing.assert_array_equal(projection(inputs), off(inputs))


def test_a_starts_uniform_within_pefts_bound(make_model_config, make_lora):
  lora = make_lora(r=64)
  projection = make_projection(make_model_config(), lora, features=(400, 16))
  a = np.asarray(projection.lora_a[...])
  bound = 1 / np.sqrt(400)
  assert np.abs(a).max() <= bound
  assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_adapters_are_float32_and_products_of_the_models_dtype(
  make_model_config, make_lora, inputs
):
  config = make_model_config(dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16)
  projection = make_projection(config, make_lora())
  assert projection.kernel.dtype == jnp.bfloat16
  assert projection.lora_a.dtype == projection.lora_b.dtype == jnp.float32
  assert projection(inputs.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_keeps_the_mean_and_touches_the_adapter_alone(make_model_config, make_lora, inputs):
  config = make_model_config()
  lora = make_lora(dropout=0.25)
  projection = make_projection(config, lora)
  keys = jax.random.split(jax.random.key(0), 4000)
  outputs = jax.jit(jax.vmap(lambda key: projection(inputs, key)))(keys)
  spread = np.asarray(outputs.std(axis=0))
  assert spread.min() > 0.01
  error = np.abs(outputs.mean(axis=0) - projection(inputs))
  assert (error < 5 * spread / np.sqrt(len(keys))).all()

  projection.lora_b[...] = jnp.zeros_like(projection.lora_b[...])
  off = nnx.view(projection, adapted=False)
  np.testing.assert_array_equal(projection(inputs, keys[0]), off(inputs))


def test_dropout_zeroes_its_share_of_inputs(make_model_config, make_lora):
  """With W = 0, A = I and B = I the output is the dropped input itself."""
  config = make_model_config()
  lora = make_lora(r=32, alpha=32.0, dropout=0.25)
  projection = make_projection(config, lora, features=(32, 32))
  projection.kernel[...] = jnp.zeros((32, 32))
  projection.lora_a[...] = projection.lora_b[...] = jnp.eye(32)
  outputs = np.asarray(projection(jnp.ones((50, 20, 32)), jax.random.key(0)))
  assert set(np.unique(outputs)) == {0.0, np.float32(1 / 0.75)}
  assert (outputs == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_follows_its_key_and_differs_by_projection(make_model_config, make_lora, inputs):
  lora = make_lora(dropout=0.5)
  q, k = (make_projection(make_model_config(), lora, name=name) for name in ('q_proj', 'k_proj'))
  first, second = jax.random.split(jax.random.key(0))
  np.testing.assert_array_equal(q(inputs), k(inputs))
  np.testing.assert_array_equal(q(inputs, first), q(inputs, first))
  assert not np.array_equal(q(inputs, first), q(inputs, second))
  assert not np.array_equal(q(inputs, first), k(inputs, first))
  assert not np.array_equal(q(inputs, first), q(inputs))


def small_llama(**changes):
  values = {
    'vocab_size': 16,
    'hidden_size': 8,
    'intermediate_size': 8,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
  }
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes))


def peft_targets(model, target_modules, exclude_modules):
  """Returns the last names of the modules that PEFT adapts, from a model it has adapted."""
  config = peft.LoraConfig(
    target_modules=target_modules, exclude_modules=list(exclude_modules) or None
  )
  adapted = peft.get_peft_model(model, config)
  names = [name for name, module in adapted.named_modules() if hasattr(module, 'lora_A')]
  return {name.rsplit('.', 1)[-1] for name in names}


PATTERNS = {
  'all_linear': ('all-linear', ()),
  'all_linear_but_some': ('all-linear', ('down_proj', 'mlp.up_proj')),
  'names': (['q_proj', 'v_proj'], ()),
  'places': (['self_attn.q_proj', 'mlp.down_proj'], ()),
  'head': (['lm_head', 'k_proj'], ()),
  'names_less_place': (['q_proj', 'k_proj', 'up_proj'], ('self_attn.k_proj',)),
  'regex': (r'.*\.(q|o)_proj', ()),
  'regex_from_the_start': (r'model\.layers\.\d+\.mlp\.\w+_proj', ()),
  'regex_with_the_head': (r'(.*\.gate_proj|lm_head)', ()),
  'regex_less_name': (r'.*\.(q|k|v)_proj', ('v_proj',)),
}


@pytest.mark.parametrize(('targets', 'excluded'), PATTERNS.values(), ids=PATTERNS)
def test_targets_are_those_that_peft_adapts(make_model_config, targets, excluded):
  ours = resolve_targets(targets, excluded, config=make_model_config())
  assert ours == peft_targets(small_llama(), targets, excluded)


def test_exclude_pattern_equals_pefts(make_model_config):
  """An excluded string is a regex, in PEFT as here."""
  names = ['q_proj', 'k_proj', 'gate_proj']
  config = peft.LoraConfig(target_modules=names, exclude_modules=r'.*self_attn\.q.*')
  expected = {
    name
    for name, place in BLOCK_PROJECTIONS.items()
    if check_target_module_exists(config, f'model.layers.0.{place}') is True
  }
  ours = resolve_targets(names, r'.*self_attn\.q.*', config=make_model_config())
  assert ours == expected == {'k_proj', 'gate_proj'}


def test_unset_targets_are_all_linear_layers_but_the_head(make_model_config):
  assert resolve_targets(None, (), config=make_model_config()) == set(BLOCK_PROJECTIONS)


@pytest.mark.parametrize(
  ('targets', 'excluded', 'message'),
  [
    (['q_prj'], (), "target_modules: 'q_prj' matches none"),
    (['q_proj', 'proj'], (), "'proj' matches none"),
    (r'q_proj', (), "'q_proj' matches none"),  # a string is a regex over whole names
    (r'.*\.0\..*q_proj', (), 'only some layers of q_proj'),
    (['layers.1.self_attn.q_proj'], (), 'only some layers of q_proj'),
    (None, ('q_prj',), "exclude_modules: 'q_prj' matches none"),
    (['q_proj'], ('q_proj',), 'leaves no module'),
    ([], (), 'leaves no module'),
  ],
)
def test_targets_that_miss_are_refused(make_model_config, targets, excluded, message):
  with pytest.raises(ValueError, match=message):
    resolve_targets(targets, excluded, config=make_model_config())


def test_a_tied_head_is_no_target(make_model_config):
  config = dataclasses.replace(make_model_config(), tie_word_embeddings=True)
  with pytest.raises(ValueError, match="'lm_head' matches none"):
    resolve_targets(['lm_head'], (), config=config)
