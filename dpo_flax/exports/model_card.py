"""The README.md of an export: what it is, what it was made of, how to load it, how it was checked.

The only paths in it are those of the models and adapters it was made of, as the user gave them.
"""

import dataclasses
import json
from collections.abc import Mapping

from dpo_flax.assembly.run_record import RunRecord
from dpo_flax.config.identity import identity_of
from dpo_flax.exports.verification import ReloadCheck

_METRICS = (
  *('pairs', 'dpo_loss', 'dpo_accuracy', 'dpo_margin_policy', 'dpo_margin_ref'),
  *('dpo_chosen_reward', 'dpo_rejected_reward', 'chosen_logps', 'rejected_logps'),
  *('chosen_logps_change', 'rejected_logps_change'),
)

_OTHER_SOURCES = {
  'merge_adapter_path': 'merged into the base first',
  'initialize_from_adapter': 'starts from the adapter',
  'reference_model_path': 'reference',
  'reference_adapter_path': 'adapter of the reference',
}

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, 'PATH')"""

_LOAD_MERGED = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained('PATH')"""


@dataclasses.dataclass(frozen=True)
class CardFacts:
  """What a card states of the training."""

  record: RunRecord
  step: int  # whose weights these are
  metrics: Mapping[str, float | None]  # of the validation pairs at that step; {}: not evaluated


def render(facts: CardFacts, check: ReloadCheck, *, merged: bool) -> str:
  """Returns the card of a merged model, or of an adapter."""
  record = facts.record
  base = record.settings.initialize_from_hf
  front = {
    **({'base_model': base} if base else {}),
    'library_name': 'transformers' if merged else 'peft',
    'pipeline_tag': 'text-generation',
    'tags': ['dpo', 'dpo_flax'] if merged else ['dpo', 'dpo_flax', 'lora'],
  }
  # JSON is YAML; and so nothing in a name can end the front matter.
  lines = ['---', *(f'{name}: {json.dumps(value)}' for name, value in front.items()), '---', '']
  subject = 'A model' if merged else 'An adapter'
  load = _LOAD_MERGED if merged else _LOAD_ADAPTER.format(base=repr(base or 'BASE'))
  if record.settings.merge_adapter_path and not merged:
    load = f'# base is to have {record.settings.merge_adapter_path!r} merged into it\n{load}'
  config = json.dumps(identity_of(record.settings.flat_json()), indent=1, sort_keys=True)
  lines += [
    f'# {subject} aligned to preferences with dpo_flax',
    '',
    *_table('', '', _origins(facts)),
    *_table('held-out pairs', f'after step {facts.step}', _shown_metrics(facts.metrics)),
    '## Use',
    '',
    *_block('python', load),
    '## Check',
    '',
    _describe(check, facts.record.held_out),
    '',
    '## Config',
    '',
    'Without the fields that say where files are, how often the run reported and how it was spread '
    'over devices.',
    '',
    *_block('json', config),
  ]
  return '\n'.join(lines)


def _origins(facts: CardFacts) -> dict[str, str]:
  record = facts.record
  settings, prints = record.settings, record.fingerprints
  base = settings.initialize_from_hf or f'random weights ({settings.model.preset})'
  loss = settings.objective.options()['loss']
  weights = prints.get('initialize_from_hf')
  found = {
    'base model': f'`{base}`',
    **({'its fingerprint': f'`{weights}`'} if weights else {}),
    'what learned': f'{settings.tuning.method}',
    'pairs': ', '.join(f'{count} for {side}' for side, count in record.pairs.items()),
    'fingerprint of data and order': f'`{prints["data"]}`',
    'loss': f'`{loss}`, beta {settings.objective.beta:g}',
    'steps': f'{facts.step} of {record.num_steps}',
  }
  others = {name: getattr(settings, field) for field, name in _OTHER_SOURCES.items()}
  return found | {name: f'`{path}`' for name, path in others.items() if path}


def _shown_metrics(metrics: Mapping[str, float | None]) -> dict[str, str]:
  known = {name: metrics[name] for name in _METRICS if metrics.get(name) is not None}
  return {name: f'{value:.6g}' for name, value in known.items()} or {'not evaluated': ''}


def _describe(check: ReloadCheck, held_out: bool) -> str:
  if check.difference is None:
    return 'Its log-probs were not compared: the devices had no room for a second model.'
  side = 'held-out' if held_out else 'training'
  return (
    f'Reloaded, its log-probs of {check.pairs} {side} pairs differ from those of the trained '
    f'model by at most {check.difference:.3g} nats per token; rounding explains '
    f'{check.bound:g} for one token, and less for the mean of many.'
  )


def _table(left: str, right: str, rows: Mapping[str, str]) -> list[str]:
  return [f'| {left} | {right} |', '|---|---|', *(f'| {a} | {b} |' for a, b in rows.items()), '']


def _block(language: str, text: str) -> list[str]:
  return [f'```{language}', text, '```', '']
