"""The formats of single data sets, as they are published.

  shp            stanfordnlp/SHP: two comments to a post, A and B
  webgpt         openai/webgpt_comparisons: two answers to a question, with scores
  binarized      HuggingFaceH4/ultrafeedback_binarized: {prompt, chosen, rejected}, the prompt a
                 string and the answers complete chats
  ultrafeedback  openbmb/UltraFeedback: several scored completions of an instruction
  orca           Intel/orca_dpo_pairs: {system, question, chosen, rejected} as strings

Their texts are not written to follow one another, as a transcript's are, so they become chats.
"""

import hashlib
import json
from typing import Any

from dpo_flax.data.records.fields import RecordError, get, get_chat, get_list, get_number, get_text
from dpo_flax.data.records.preference import Message, Preference, Text


def shp(record: dict[str, Any]) -> Preference:
  """{history, human_ref_A, human_ref_B, labels}: labels is 1 where A has the higher score."""
  label = get_number(record, 'labels')
  if label not in (0, 1):
    raise RecordError('number out of range', f'labels is {label!r:.40}: 1 prefers A, 0 prefers B')
  a, b = get_text(record, 'human_ref_A'), get_text(record, 'human_ref_B')
  return answers([_user(get_text(record, 'history'))], *((a, b) if label else (b, a)))


def webgpt(record: dict[str, Any]) -> Preference:
  """{question: {full_text}, answer_0, score_0, answer_1, score_1}."""
  question = get(record, 'question')
  if not isinstance(question, dict):
    raise RecordError('wrong type', f'question is a {type(question).__name__}, not an object')
  texts = [get_text(record, f'answer_{i}') for i in (0, 1)]
  scores = [get_number(record, f'score_{i}') for i in (0, 1)]
  if scores[0] == scores[1]:
    raise RecordError('tie', f'both answers score {scores[0]}')
  best = int(scores[1] > scores[0])
  return answers([_user(get_text(question, 'full_text'))], texts[best], texts[1 - best])


def binarized(record: dict[str, Any]) -> Preference:
  """{prompt, chosen, rejected}: both chats begin with the prompt as the user's turn."""
  prompt = get_text(record, 'prompt')
  chosen, rejected = get_chat(record, 'chosen'), get_chat(record, 'rejected')
  for name, chat in (('chosen', chosen), ('rejected', rejected)):
    turns = [turn.get('content') if isinstance(turn, dict) else None for turn in chat]
    if prompt not in turns[:-1] or chat[:-1] != chosen[:-1]:
      raise RecordError('no shared prompt', f'{name} does not consist of the prompt and one answer')
  return Preference(chosen[:-1], chosen[-1:], rejected[-1:])


def orca(record: dict[str, Any]) -> Preference:
  """{system, question, chosen, rejected}: system may be empty or missing."""
  system = get_text(record, 'system') if record.get('system') else ''
  prompt = [{'role': 'system', 'content': system}] if system.strip() else []
  prompt.append(_user(get_text(record, 'question')))
  return answers(prompt, get_text(record, 'chosen'), get_text(record, 'rejected'))


def ultrafeedback(record: dict[str, Any], completions: str) -> list[Preference]:
  """{instruction, completions: [{response, overall_score}, ...]} -> one or many comparisons.

  Args:
    record: its keys and values.
    completions: best_vs_worst | best_vs_random (one of those that score less, drawn by a hash of
      the record; Tunstall et al. 2023, arXiv:2310.16944) | all (every two of different scores).

  Raises:
    RecordError: no two completions have different scores, or a key is missing.
  """
  prompt = [_user(get_text(record, 'instruction'))]
  scored = [_completion(item) for item in get_list(record, 'completions')]
  pairs = [(a, b) for a, score in scored for b, other in scored if score > other]
  if not pairs:
    raise RecordError('tie', f'none of {len(scored)} completions scores more than another')
  if completions != 'all':
    scored.sort(key=lambda item: -item[1])  # stable: of equals, the first
    best, most = scored[0]
    worse = [text for text, score in scored if score < most]
    drawn = -1
    if completions != 'best_vs_worst':
      content = json.dumps(record, sort_keys=True, default=str).encode()
      drawn = int.from_bytes(hashlib.sha256(content).digest()[:8], 'little') % len(worse)
    pairs = [(best, worse[drawn])]
  return [answers(prompt, chosen, rejected) for chosen, rejected in pairs]


def _completion(item: Any) -> tuple[str, float]:
  if not isinstance(item, dict):
    raise RecordError('wrong type', f'completions holds a {type(item).__name__}, not an object')
  return get_text(item, 'response'), get_number(item, 'overall_score')


def _user(text: str) -> Message:
  return {'role': 'user', 'content': text}


def answers(prompt: list[Message], chosen: Text, rejected: Text) -> Preference:
  """Returns the preference of two texts that answer a chat."""
  turns = [[{'role': 'assistant', 'content': text}] for text in (chosen, rejected)]
  return Preference(prompt, turns[0], turns[1])
