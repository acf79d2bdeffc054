"""The whole path on real preference files: train, export, reload elsewhere, compare.

    python tests/benchmarks/real_data.py pairs.jsonl.gz [more.jsonl.gz ...] [--steps 40]

For each file, trains a SentencePiece model of 8,000 pieces on its texts, writes a random Llama (4
layers, 256 wide) in Hugging Face layout, runs the train command with configs/llama8b.py on them and
prints what the run reported, its peak memory, and how far apart the two exports' log-probs are
as peft and transformers load them. Needs the `test` extra.
"""

import argparse
import gzip
import io
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

import numpy as np
import peft
import sentencepiece
import torch
import transformers

TEMPLATE = (
  '{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}'
  '[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}{{ eos_token }}'
  '{% endif %}{% endfor %}'
)
COMPARED = 4  # pairs


def texts(path: pathlib.Path):
  """Yields every text of a preference file."""
  with gzip.open(path, 'rt') as file:
    for line in file:
      record = json.loads(line)
      for value in (record.get(name) for name in ('prompt', 'chosen', 'rejected')):
        if isinstance(value, str):
          yield value
        elif value:
          yield from (message['content'] for message in value)


def write_base(path: pathlib.Path, directory: pathlib.Path):
  """Writes a random Llama with a tokenizer for the texts of `path`."""
  directory.mkdir()
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(line for text in texts(path) for line in text.split('\n')),
    model_writer=model,
    vocab_size=8000,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  (directory / 'tokenizer.model').write_bytes(model.getvalue())
  settings = {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': TEMPLATE}
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings | {'add_bos_token': True}))
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(directory, max_shard_size='10MB')


def train(path: pathlib.Path, base: pathlib.Path, workdir: pathlib.Path, steps: int):
  """Runs the command, its lines on the screen."""
  settings = {
    'initialize_from_hf': base,
    'workdir': workdir,
    'merged_hf_save_path': workdir / 'merged',
    'data.train': path,
    'data.bad_record': 'skip',
    'data.too_long': 'drop',
    'model.dtype': 'float32',
    'model.weight_dtype': 'float32',
    'model.logits_chunk': 128,
    'batch.rows': 4,
    'batch.tokens': 2048,
    'train.num_epochs': 0,
    'train.num_train_steps': steps,
    'lora.r': 8,
    'optimizer.learning_rate': 3e-4,
  }
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  command = [sys.executable, '-m', 'dpo_flax.train', '--config=configs/llama8b.py', *flags]
  subprocess.run(command, check=True)


def compare(base: pathlib.Path, workdir: pathlib.Path) -> dict[str, float]:
  """Returns the largest differences in log-prob between the exports, and to the base."""
  generator = np.random.default_rng(0)
  rows = torch.tensor(generator.integers(3, 8000, (COMPARED, 256)))

  def log_probs(model):
    with torch.no_grad():
      return model(rows).logits.double().log_softmax(-1)

  load = transformers.LlamaForCausalLM.from_pretrained
  unadapted = log_probs(load(base))
  adapted = log_probs(peft.PeftModel.from_pretrained(load(base), workdir / 'peft'))
  merged = log_probs(load(workdir / 'merged'))
  return {
    'peft against merged': (adapted - merged).abs().max().item(),
    'peft against base': (adapted - unadapted).abs().max().item(),
  }


def main():
  """Runs every file and prints a table."""
  parser = argparse.ArgumentParser()
  parser.add_argument('files', nargs='+', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=40)
  arguments = parser.parse_args()
  for path in arguments.files:
    with tempfile.TemporaryDirectory() as scratch:
      base, workdir = pathlib.Path(scratch) / 'base', pathlib.Path(scratch) / 'run'
      write_base(path, base)
      train(path, base, workdir, arguments.steps)
      lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
      validation = [line for line in lines if line['split'] == 'validation'][-1]
      rates = [line['pairs_per_second'] for line in lines if 'pairs_per_second' in line]
      peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
      print(
        f'{path.name}: held-out dpo_accuracy {validation["dpo_accuracy"]:.3f}, dpo_loss '
        f'{validation["dpo_loss"]:.4f}, {np.median(rates):.2f} pairs/s, peak {peak:.2f} GiB; '
        f'largest difference in log-prob {compare(base, workdir)}'
      )


if __name__ == '__main__':
  main()
