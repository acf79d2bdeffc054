"""Pairs and real tokens per second of the training step on the CPU.

    python tests/benchmarks/throughput.py [--steps 10] [--rows 2] [--tokens 832]

A Llama of 4 layers, 256 wide, 32,000 vocabulary, float32, LoRA of rank 8 on every linear layer;
about 8 pairs a step. Prompts are log-normal with median 40 (sigma 0.5, 4 to 64 tokens), responses
with median 60 (sigma 0.75, 4 to 192), independent. "Real" tokens are those a trainer without prefix
sharing must process: (prompt + chosen) + (prompt + rejected); padding never counts.
"""

import argparse
import os
import time

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpo_flax import config as config_lib
from dpo_flax.assembly.tuning import make_lora_config
from dpo_flax.config.sections import LoraSettings
from dpo_flax.data.batches import pack
from dpo_flax.data.batches.plan import plan_rows
from dpo_flax.huggingface.config_json import from_hf_config
from dpo_flax.losses.objective import Objective
from dpo_flax.model.transformer import Transformer
from dpo_flax.sharding import make_mesh
from dpo_flax.training.state import Models, init_train_state, split_models
from dpo_flax.training.step import StepOptions, jit_train_step

VOCABULARY, MAX_PROMPT, MAX_RESPONSE = 32_000, 64, 192
WARMUP = 3  # steps


def make_pairs(count: int) -> list[pack.PackedPair]:
  """Returns random pairs whose responses end in token 2."""
  rng = np.random.RandomState(0)

  def length(median, sigma, most):
    return int(np.clip(round(np.exp(np.log(median) + sigma * rng.randn())), 4, most))

  pairs = []
  for index in range(count):
    prompt, chosen, rejected = (
      length(40, 0.5, MAX_PROMPT),
      length(60, 0.75, MAX_RESPONSE),
      length(60, 0.75, MAX_RESPONSE),
    )
    ids = [rng.randint(3, VOCABULARY, n) for n in (prompt, chosen - 1, rejected - 1)]
    responses = [np.append(part, 2) for part in ids[1:]]
    pairs.append(pack.PackedPair(index, *(x.astype(np.int32) for x in (ids[0], *responses))))
  return pairs


def make_batches(pairs: list[pack.PackedPair], rows: int, tokens: int) -> list[pack.Batch]:
  """Packs all pairs once, shared layout; the last incomplete batch is filled with empty rows."""
  lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
  plan = plan_rows(pack.row_lengths(lengths, 'shared'), tokens=tokens)
  contents = [[pairs[i] for i in plan[row]] for row in range(len(plan))]
  contents += [[]] * (-len(contents) % rows)
  return [
    pack.fill_batch(
      contents[start : start + rows],
      tokens=tokens,
      pairs_per_row=plan.pairs_per_row,
      layout='shared',
    )
    for start in range(0, len(contents), rows)
  ]


def make_step():
  """Returns (train_step, state, frozen)."""
  architecture = {
    'model_type': 'llama',
    'vocab_size': VOCABULARY,
    'hidden_size': 256,
    'intermediate_size': 768,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500_000.0,
  }
  run = {'dtype': jnp.float32, 'weight_dtype': jnp.float32, 'remat': 'none', 'attention': 'xla'}
  config = from_hf_config(architecture, where='architecture', **run)
  lora = make_lora_config(LoraSettings(r=8, alpha=16.0), config)
  policy = Transformer(config, lora, nnx.Rngs(params=0, lora=1))
  graphdef, trainable, frozen = split_models(Models(policy, nnx.view(policy, adapted=False)))
  optimizer = optax.adamw(1e-4)
  options = StepOptions(
    objective=Objective.from_config(config_lib.default().objective),
    logits_chunk=256,
  )
  mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  state = init_train_state(trainable, optimizer, mesh)
  return jit_train_step(graphdef, optimizer, options), state, frozen


def main():
  """Times the step and prints the rates."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--rows', type=int, default=2)
  parser.add_argument('--tokens', type=int, default=832)
  args = parser.parse_args()
  pairs = make_pairs(8 * (args.steps + WARMUP))
  batches = make_batches(pairs, args.rows, args.tokens)
  step, state, frozen = make_step()
  seconds, done = [], []
  for batch in batches:
    start = time.perf_counter()
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
    done += [pairs[i] for i in batch['pair_index'][batch['pair_index'] >= 0]][
      : None if len(seconds) > WARMUP else 0
    ]
  total = sum(seconds[WARMUP:])
  real = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in done)
  print(
    f'{len(done) / total:.2f} pairs/s, {real / total:.0f} real tokens/s: {len(done)} pairs in '
    f'{len(seconds) - WARMUP} steps of {args.rows} x {args.tokens}, {total:.2f} s; step median '
    f'{np.median(seconds[WARMUP:]) * 1e3:.0f} ms, min {min(seconds[WARMUP:]) * 1e3:.0f} ms; '
    f'compile {seconds[0]:.1f} s'
  )


if __name__ == '__main__':
  main()
