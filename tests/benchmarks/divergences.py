"""Reward against divergence, diversity and calibration for every f-divergence, on a known reward.

    python tests/benchmarks/divergences.py [--plot tests/benchmarks/divergences.svg]

The reference is a random Llama of two layers over 16 tokens. A response has 8 tokens, and its
reward is a sum over them of a random table that depends on the prompt's first token. 8,192 pairs
are sampled from the reference and labelled by Bradley-Terry, and LoRA adapters learn from them with
DPO under each divergence and beta. Then the policy is sampled, 64 responses to each of 64 unseen
prompts. Prints a markdown table:

  reward      mean known reward of the samples
  KL          from the reference, nats per response: mean log-ratio of the samples
  entropy     of the policy, nats per token, at the samples' tokens
  distinct-2  bigrams that differ among a prompt's samples, of all
  accuracy    on 1,024 held-out pairs, and
  ECE         of sig(margin) as the probability of their labels

--plot draws reward over KL and over entropy, and needs matplotlib.
"""

import argparse
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.sections import LoraSettings
from dpo_flax.data.batches import pack
from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.losses.metrics import summarize
from dpo_flax.losses.objective import Objective
from dpo_flax.model.transformer import Transformer, run_streams
from dpo_flax.sharding import make_mesh
from dpo_flax.training.state import Models, init_train_state, split_models
from dpo_flax.training.step import StepOptions, jit_eval_step, jit_train_step

VOCABULARY, PROMPT, RESPONSE = 16, 3, 8
TRAIN, HELD_OUT = 8192, 1024  # pairs
PROMPTS, SAMPLES = 64, 64  # of each
ROWS, PAIRS_PER_ROW, EPOCHS = 16, 8, 4
BETAS = (0.03, 0.1, 0.3, 1.0)
DIVERGENCES = {
  'reverse KL': {},
  'JS': {'divergence': 'js'},
  'alpha = 0.3': {'divergence': 'alpha', 'alpha_divergence': 0.3},
  'alpha = 0.5': {'divergence': 'alpha', 'alpha_divergence': 0.5},
  'alpha = 0.7': {'divergence': 'alpha', 'alpha_divergence': 0.7},
  'forward KL': {'divergence': 'forward_kl'},
}
CACHE = pathlib.Path(__file__).parent.parent.parent / '.cache' / 'jax'


def make_models() -> Models:
  """Returns the reference and a policy that starts as it."""
  architecture = {
    'model_type': 'llama',
    'vocab_size': VOCABULARY,
    'hidden_size': 64,
    'intermediate_size': 128,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-5,
    'initializer_range': 0.125,
  }
  run = {'dtype': jnp.float32, 'weight_dtype': jnp.float32, 'remat': 'none', 'attention': 'xla'}
  config = from_hf_config(architecture, where='architecture', **run)
  lora = make_lora_config(LoraSettings(r=16, alpha=32.0), config)
  policy = Transformer(config, lora, nnx.Rngs(params=0, lora=1))
  return Models(policy, nnx.view(policy, adapted=False))


def reward(
  table: np.ndarray,  # [V, V]: of a token, after a prompt that begins with another
  prompts: np.ndarray,  # [N, PROMPT]
  responses: np.ndarray,  # [N, RESPONSE]
) -> np.ndarray:  # [N]
  """Returns the known reward, of mean about 0 and standard deviation about 2."""
  return 2 * table[prompts[:, :1], responses].sum(axis=1) / np.sqrt(RESPONSE)


def make_sampler(models: Models):
  """Returns the jitted (state, prompts, key) -> responses, and per-token log-ratios and entropies.

  The state is that of `models`, [N, PROMPT] the prompts; all results are [N, RESPONSE].
  """
  graphdef, _ = nnx.split(models)

  def log_probs(models, tokens):
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    batch = {'tokens': tokens, 'positions': positions}
    batch['visible_until'] = jnp.full_like(tokens, length)
    hidden = run_streams(models.policy, models.reference, batch)
    logits = (model.logits(stream) for model, stream in zip(models, hidden, strict=True))
    return [jax.nn.log_softmax(x[:, PROMPT - 1 : -1]) for x in logits]  # of the response

  @jax.jit
  def sample(state, prompts, key):
    models = nnx.merge(graphdef, state)

    def add(tokens, place):
      step = log_probs(models, tokens)[0][:, place]
      token = jax.random.categorical(jax.random.fold_in(key, place), step)
      return tokens.at[:, PROMPT + place].set(token), None

    tokens = jnp.pad(prompts, ((0, 0), (0, RESPONSE)))
    tokens, _ = jax.lax.scan(add, tokens, jnp.arange(RESPONSE))
    responses = tokens[:, PROMPT:]
    policy, reference = log_probs(models, tokens)
    picked = jnp.take_along_axis(policy - reference, responses[..., None], -1)[..., 0]
    return responses, picked, -jnp.sum(jnp.exp(policy) * policy, axis=-1)

  return sample


def make_pairs(sample, models: Models, table: np.ndarray, count: int, seed: int):
  """Returns pairs of the reference's samples, chosen by Bradley-Terry on the known reward."""
  random = np.random.default_rng(seed)
  prompts = random.integers(0, VOCABULARY, (count, PROMPT), dtype=np.int32)
  state = nnx.state(models)
  both = [
    np.asarray(sample(state, prompts, jax.random.key(2 * seed + i))[0], np.int32) for i in (0, 1)
  ]
  gap = reward(table, prompts, both[0]) - reward(table, prompts, both[1])
  first_wins = random.random(count) < 1 / (1 + np.exp(-gap))
  return [
    pack.PackedPair(i, prompts[i], *(y[i] for y in (both if first_wins[i] else both[::-1])))
    for i in range(count)
  ]


def make_batches(pairs: list[pack.PackedPair]) -> list[pack.Batch]:
  """Packs equally long pairs, in order."""
  size = PAIRS_PER_ROW * (PROMPT + 1 + 2 * RESPONSE)
  batch = ROWS * PAIRS_PER_ROW
  return [
    pack.fill_batch(
      [pairs[row : row + PAIRS_PER_ROW] for row in range(at, at + batch, PAIRS_PER_ROW)],
      tokens=size,
      pairs_per_row=PAIRS_PER_ROW,
      layout='shared',
    )
    for at in range(0, len(pairs), batch)
  ]


def learn(models: Models, train, held_out, options: dict[str, object]) -> tuple[Models, dict]:
  """Returns the trained models, and the metrics over the held-out batches."""
  settings = config_lib.default().objective
  settings.update(options)
  options = StepOptions(Objective.from_config(settings), logits_chunk=256)
  graphdef, trainable, frozen = split_models(models)
  schedule = optax.cosine_decay_schedule(3e-3, EPOCHS * len(train))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  state = init_train_state(jax.tree.map(jnp.copy, trainable), optimizer, mesh)
  step = jit_train_step(graphdef, optimizer, options)
  for batch in train * EPOCHS:
    state, metrics = step(state, frozen, batch)
    assert metrics['finite']
  evaluate = jit_eval_step(graphdef, options)
  sums = [jax.device_get(evaluate(state, frozen, batch)) for batch in held_out]
  sums = jax.tree.map(lambda *parts: sum(parts), *sums)
  del sums['counts']
  return nnx.merge(graphdef, state.trainable, frozen), summarize(sums)


def measure(sample, models: Models, table: np.ndarray) -> dict[str, float]:
  """Samples the policy on unseen prompts."""
  random = np.random.default_rng(99)
  prompts = random.integers(0, VOCABULARY, (PROMPTS, PROMPT), dtype=np.int32)
  prompts = np.repeat(prompts, SAMPLES, axis=0)
  responses, ratios, entropies = sample(nnx.state(models), prompts, jax.random.key(99))
  responses = np.asarray(responses)
  bigrams = (responses[:, :-1] * VOCABULARY + responses[:, 1:]).reshape(PROMPTS, -1)
  return {
    'reward': float(reward(table, prompts, responses).mean()),
    'KL': float(ratios.sum(axis=1).mean()),
    'entropy': float(entropies.mean()),
    'distinct-2': float(np.mean([len(np.unique(row)) / len(row) for row in bigrams])),
  }


def plot(results: dict[str, list[dict[str, float]]], path: str):
  """Draws reward over KL and over entropy, a line for each divergence."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout='constrained')
  for axis, name in zip(axes, ('KL', 'entropy'), strict=True):
    for label, rows in results.items():
      axis.plot([row[name] for row in rows], [row['reward'] for row in rows], 'o-', label=label)
    axis.set_xlabel({'KL': 'KL from the reference', 'entropy': 'entropy per token'}[name])
  axes[0].set_ylabel('reward')
  axes[1].legend()
  figure.savefig(path)


def main():
  """Runs every divergence and beta, and prints a row for each."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--plot', metavar='FILE')
  args = parser.parse_args()
  jax.config.update('jax_compilation_cache_dir', str(CACHE))
  models = make_models()
  sample = make_sampler(models)
  table = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))
  batches = [
    make_batches(make_pairs(sample, models, table, count, seed))
    for seed, count in enumerate((TRAIN, HELD_OUT), start=1)
  ]
  columns = 'reward', 'KL', 'entropy', 'distinct-2', 'accuracy', 'ECE'
  print('| divergence | beta |', ' | '.join(columns), '|')
  print('|---' * (2 + len(columns)) + '|')
  start = measure(sample, models, table)
  print('| reference | |', ' | '.join(f'{start[name]:.3f}' for name in columns[:4]), '| | |')
  results = {}
  for name, options in DIVERGENCES.items():
    for beta in BETAS:
      trained, metrics = learn(models, *batches, {**options, 'beta': beta})
      row = measure(sample, trained, table)
      row |= {'accuracy': metrics['dpo_accuracy'], 'ECE': metrics['calibration_error']}
      results.setdefault(name, []).append(row)
      cells = ' | '.join(f'{row[column]:.3f}' for column in columns)
      print(f'| {name} | {beta} | {cells} |', flush=True)
  if args.plot:
    plot(results, args.plot)


if __name__ == '__main__':
  main()
