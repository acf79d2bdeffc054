"""Scores of any model on any pairs, against transformers and peft."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers

from dpo_flax import config as config_lib
from dpo_flax.data.records.preference import Preference
from dpo_flax.data.tokens.tokenizer import load_tokenizer
from dpo_flax.evaluate import Candidate, evaluate, per_pair, summarize
from dpo_flax.examples import make_tiny
from helpers.bases import write_example_base

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLE = pathlib.Path(make_tiny.__file__).parent / 'tiny'
PAIRS = 21  # rows of 8 devices are then not full

# transformers announces the end of an attribute that its own code still reads.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing.*:FutureWarning')


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Two bases, two adapters on the first, and some pairs."""
  root = tmp_path_factory.mktemp('models')
  base = write_example_base(root / 'base', initializer_range=0.1)
  write_example_base(root / 'other', seed=1, initializer_range=0.1)
  for seed, name in enumerate(('adapter', 'another')):
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
      **{'r': 4, 'lora_alpha': 10, 'target_modules': ['q_proj', 'down_proj']},
      **{'init_lora_weights': False, 'task_type': 'CAUSAL_LM'},
    )
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, settings).save_pretrained(root / name)
  lines = (EXAMPLE / 'pairs.jsonl').read_text().splitlines(keepends=True)
  (root / 'pairs.jsonl').write_text(''.join(lines[:PAIRS]))
  return root


def their_logps(places, base, adapter=None):
  """Returns [pairs, 2] of a torch model, one sequence at a time."""
  model = transformers.LlamaForCausalLM.from_pretrained(places / base)
  if adapter:
    model = peft.PeftModel.from_pretrained(model, places / adapter)
  tokenizer = load_tokenizer(str(places / base), None)

  def logp(prompt, response):
    with torch.no_grad():
      log_probs = model(torch.tensor([prompt + response])).logits[0, :-1].double().log_softmax(-1)
    return log_probs[len(prompt) - 1 :].gather(1, torch.tensor(response)[:, None]).sum().item()

  lines = (places / 'pairs.jsonl').read_text().splitlines()
  pairs = [tokenizer.encode(Preference(**json.loads(line))) for line in lines]
  return np.array([[logp(p.prompt, p.chosen), logp(p.prompt, p.rejected)] for p in pairs])


def candidate(places, base, adapter=None):
  return Candidate(str(places / base), adapter and str(places / adapter))


def score(places, workdir, policy, reference=None):
  config = config_lib.default()
  config.workdir, config.data.train = str(workdir), str(places / 'pairs.jsonl')
  config.initialize_from_hf = str(places / policy[0])
  config.model.dtype = config.model.weight_dtype = 'float32'
  config.data.validation_split_fraction, config.train.num_train_steps = 0.0, 1
  config.batch.rows, config.batch.tokens = 0, 256
  models = [each and candidate(places, *each) for each in (policy, reference)]
  return evaluate(config, *models)


CASES = {
  'base': (('base',), None),
  'adapter_on_its_base': (('base', 'adapter'), ('base',)),
  'two_adapters': (('base', 'adapter'), ('base', 'another')),
  'two_bases': (('base', 'adapter'), ('other',)),
}


@pytest.mark.parametrize(('policy', 'reference'), CASES.values(), ids=CASES)
def test_scores_equal_transformers_and_peft_pair_by_pair(places, tmp_path, policy, reference):
  found = score(places, tmp_path, policy, reference)
  for ours, model in ((found.policy, policy), (found.reference, reference)):
    if model is None:
      assert ours is None
    else:
      np.testing.assert_allclose(ours, their_logps(places, *model), atol=1e-4, rtol=1e-6)
  lines = list(per_pair(found))
  assert [line['where'].rpartition(':')[2] for line in lines] == [str(i + 1) for i in range(PAIRS)]
  assert [line['index'] for line in lines] == list(range(PAIRS))
  np.testing.assert_array_equal([line['policy_chosen_logps'] for line in lines], found.policy[:, 0])
  if reference:
    assert np.abs(found.policy - found.reference).min() > 1e-2


def test_metrics_follow_from_the_scores(places, tmp_path):
  found = score(places, tmp_path, ('base', 'adapter'), ('base',))
  summary = summarize(found, beta=0.3)
  ours, theirs = found.policy.astype(float), found.reference.astype(float)
  margins = (ours - theirs) @ [1, -1]
  assert summary['pairs'] == PAIRS
  against = summary['policy_against_reference']
  assert against['dpo_accuracy'] == pytest.approx(np.mean(margins > 0))
  assert against['dpo_loss'] == pytest.approx(np.log1p(np.exp(-0.3 * margins)).mean(), rel=1e-5)
  assert against['dpo_chosen_reward'] == pytest.approx(0.3 * (ours - theirs)[:, 0].mean(), rel=1e-4)
  alone, means = summary['policy'], ours / found.lengths
  assert alone['accuracy'] == pytest.approx(np.mean(ours[:, 0] > ours[:, 1]))
  assert alone['accuracy_per_token'] == pytest.approx(np.mean(means[:, 0] > means[:, 1]))
  assert alone['accuracy'] != alone['accuracy_per_token']
  total, tokens = ours[:, 1].sum(), found.lengths[:, 1].sum()
  assert alone['rejected_logps_per_token'] == pytest.approx(total / tokens)
  assert 'policy_against_reference' not in summarize(score(places, tmp_path, ('base',)), 0.1)


def test_models_of_other_tokenizers_are_refused(places, tmp_path):
  shutil.copytree(places / 'other', tmp_path / 'strange')
  with (tmp_path / 'strange' / 'tokenizer.model').open('ab') as file:
    file.write(b'\0')
  (tmp_path / 'pairs.jsonl').symlink_to(places / 'pairs.jsonl')
  for name in ('base', 'adapter'):
    (tmp_path / name).symlink_to(places / name)
  with pytest.raises(ValueError, match='is another tokenizer than'):
    score(tmp_path, tmp_path / 'run', ('base',), ('strange',))


def test_command_prints_metrics_and_writes_scores(places, tmp_path):
  pairs, bad = tmp_path / 'pairs.jsonl', '{"prompt": "p", "chosen": " ", "rejected": "r"}\n'
  pairs.write_text(bad + (places / 'pairs.jsonl').read_text())
  flags = {'base': places / 'base', 'adapter': places / 'adapter', 'tokens': 256}
  flags |= {'data': pairs, 'scores': tmp_path / 'scores.jsonl'}

  def evaluate(**more):
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'dpo_flax.evaluate',
        *(f'--{k}={v}' for k, v in (flags | more).items()),
      ],
      capture_output=True,
      text=True,
      check=False,
      cwd=tmp_path,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )

  refused = evaluate()
  assert refused.returncode == 2 and f'{pairs}:1: empty response' in refused.stderr
  process = evaluate(bad_record='skip')
  assert process.returncode == 0, process.stderr
  summary = json.loads(process.stdout)
  lines = [json.loads(line) for line in (tmp_path / 'scores.jsonl').read_text().splitlines()]
  assert summary['pairs'] == len(lines) == PAIRS and sum(summary['left_out'].values()) == 1
  right = np.mean([line['margin'] > 0 for line in lines])
  assert summary['policy_against_reference']['dpo_accuracy'] == pytest.approx(right)
  assert summary['models']['reference'] == {'base': str(places / 'base'), 'adapter': None}
