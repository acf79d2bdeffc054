"""The step's oracle: DPO in plain jax, one sequence per row, causal mask, whole logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LENGTH = 20  # of a row: above the longest prompt and response of draw_pairs


def log_softmax(weights, tokens, config, scale):
  """Llama written out, [S, T] tokens -> [S, T, V] log-probs; `weights` as nested dicts."""

  def linear(layer, x):
    y = x @ layer['kernel'][None]
    if adapter := layer.get('adapters', {}).get('learned'):
      y += scale * ((x @ adapter['lora_a'][None]) @ adapter['lora_b'][None])
    return y

  def norm(layer, x):
    size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps)
    return x / size * layer['scale'][None, None]

  def rotate(x):
    first, second = jnp.split(x, 2, axis=-1)
    half = config.head_dim // 2
    theta = config.layer_types[0].rope.theta
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    turned = (first + 1j * second) * np.exp(1j * angles)[None, :, None].astype(np.complex64)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)

  def attend(layer, x):
    rows, length, _ = x.shape
    q, k, v = (
      linear(layer[name], x).reshape(rows, length, -1, config.head_dim)
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    group = config.num_heads // config.num_kv_heads
    k, v = jnp.repeat(rotate(k), group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum('sqhd,skhd->shqk', rotate(q), k) / math.sqrt(config.head_dim)
    causal = np.tri(length, dtype=bool)[None, None]
    mixed = jnp.einsum('shqk,skhd->sqhd', jax.nn.softmax(jnp.where(causal, scores, -1e30)), v)
    return linear(layer['o_proj'], mixed.reshape(rows, length, -1))

  hidden = weights['embed_tokens']['embedding'][tokens]
  for index in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, index=index: leaf[index], weights['blocks'])
    hidden += attend(layer['attention'], norm(layer['attention_norm'], hidden))
    x, mlp = norm(layer['mlp_norm'], hidden), layer['mlp']
    gate = linear(mlp['gate_proj'], x)
    hidden += linear(mlp['down_proj'], gate * jax.nn.sigmoid(gate) * linear(mlp['up_proj'], x))
  hidden = norm(weights['final_norm'], hidden)
  if config.tie_word_embeddings:
    return jax.nn.log_softmax(hidden @ weights['embed_tokens']['embedding'].T[None])
  return jax.nn.log_softmax(linear(weights['lm_head'], hidden))


def unpacked(pairs):
  """Returns tokens [2N, LENGTH] and loss mask of every chosen, then every rejected sequence."""
  tokens = np.zeros((2 * len(pairs), LENGTH), np.int32)
  mask = np.zeros((2 * len(pairs), LENGTH - 1), np.float32)
  responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
  for row, (pair, response) in enumerate(zip(pairs * 2, responses, strict=True)):
    prompt, end = len(pair.prompt), len(pair.prompt) + len(response)
    tokens[row, :end] = np.concatenate([pair.prompt, response])
    mask[row, prompt - 1 : end - 1] = 1
  return tokens, mask


def split_adapters(weights):
  """Splits nested dicts into (adapters, base); `join` puts them together."""
  adapters, base = {}, {}
  for name, value in weights.items():
    if isinstance(value, dict):
      adapters[name], base[name] = split_adapters(value)
    else:
      (adapters if name.startswith('lora_') else base)[name] = value
  return adapters, base


def join(adapters, base):
  """Undoes `split_adapters`."""
  return base | {
    name: join(value, base[name]) if isinstance(value, dict) else value
    for name, value in adapters.items()
  }


def weights_of(models):
  return nnx.to_pure_dict(nnx.state(models.policy))


def token_log_softmax(models, pairs, scale):
  """Returns ([2N, T - 1, V] of the policy, of the reference, targets, mask)."""
  weights, config = weights_of(models), models.policy.config
  tokens, mask = unpacked(pairs)
  function = jax.jit(lambda weights: log_softmax(weights, tokens, config, scale)[:, :-1])
  return function(weights), function(split_adapters(weights)[1]), tokens[:, 1:], mask


def loss_and_gradient(models, pairs, weights, *, scale, beta):
  """Returns DPO's loss, a weighted mean over pairs, and its gradient by the adapters."""
  adapters, base = split_adapters(weights_of(models))
  tokens, mask = unpacked(pairs)
  config, count = models.policy.config, len(pairs)

  def log_probs(weights):
    logps = log_softmax(weights, tokens, config, scale)[:, :-1]
    return jnp.sum(jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0] * mask, axis=-1)

  def loss(adapters):
    ratios = log_probs(join(adapters, base)) - jax.lax.stop_gradient(log_probs(base))
    margins = beta * (ratios[:count] - ratios[count:])
    return jnp.sum(jnp.logaddexp(0, -margins) * weights) / np.sum(weights)

  return jax.jit(jax.value_and_grad(loss))(adapters)
