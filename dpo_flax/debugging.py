"""Single pairs under a magnifying glass: is packing right, and what does the policy make of them?

run, state = assemble.build(config, mesh)
models = nnx.merge(run.graphdef, state.trainable, run.frozen)
pairs = run.data.validation.packed_pairs(np.arange(8))
print(as_text(separate_and_packed_losses(models, pairs, run.options, tokens=2048)))

batch = next(train_batches(run, 0))
print(as_text(pair_table(models, batch, run.options, run.data.tokenizer)))
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_flax.data.batches import pack
from dpo_flax.data.batches.plan import plan_rows
from dpo_flax.data.tokens.tokenizer import Tokenizer
from dpo_flax.losses.objective import implicit_rewards, total_loss
from dpo_flax.losses.pair_logps import PairLogps
from dpo_flax.training.logps import pair_logps
from dpo_flax.training.state import Models
from dpo_flax.training.step import StepOptions

Row = dict[str, Any]  # of a table: column -> value

_TEXT_WIDTH = 32  # characters of a cell


def separate_and_packed_losses(
  models: Models,
  pairs: Sequence[pack.PackedPair],
  options: StepOptions,
  *,
  tokens: int,  # per packed row
  layout: str = 'shared',  # of the packed rows: shared | separate
) -> list[Row]:
  """Computes the loss of every pair twice: each sequence by itself, and packed with others.

  By itself: one pair per forward pass, the prompt written out before each response, neither
  sequence visible to the other. The two losses agree up to the rounding of the model's dtype, or
  packing is broken. Nothing is dropped out; a loss that compares the pairs of a batch sees `pairs`.

  Returns:
    For each pair, in order: pair_index; separate and packed, its losses without a KL penalty; and
    separate_with_kl and packed_with_kl, with the objective's weight of the penalty, 1.0 where it
    has none. With `reference_free`, or no reference, there is no KL, and they are left out.

  Raises:
    ValueError: a pair is longer than `tokens`.
  """
  lengths = pack.pair_lengths(pairs)
  alone, shared = (pack.row_lengths(lengths, name) for name in ('separate', layout))
  if shared.max() > tokens:
    raise ValueError(f'tokens={tokens}: the longest of the pairs takes {shared.max()}')
  plan = plan_rows(shared, tokens=tokens)
  columns = pack.given_columns(pairs)
  separate = pack.fill_batch(
    [[pair] for pair in pairs],
    tokens=int(alone.max()),
    pairs_per_row=1,
    layout='separate',
    columns=columns,
  )
  packed = pack.fill_batch(
    [[pairs[i] for i in plan[row]] for row in range(len(plan))],
    tokens=tokens,
    pairs_per_row=plan.pairs_per_row,
    layout=layout,
    columns=columns,
  )
  order = np.argsort(plan.pairs)  # of each pair among the slots of the packed rows
  table: dict[str, Any] = {'pair_index': [pair.index for pair in pairs]}
  for suffix, penalised in _with_and_without_kl(options, models.reference is not None):
    table['separate' + suffix] = _losses(models, separate, penalised)
    table['packed' + suffix] = _losses(models, packed, penalised)[order]
  return _rows(table)


def pair_table(
  models: Models, batch: pack.Batch, options: StepOptions, tokenizer: Tokenizer
) -> list[Row]:
  """Returns the texts, rewards and loss of every real pair of a batch, in either layout.

  Returns:
    For each pair, row by row: pair_index; the decoded prompt, chosen and rejected; chosen_tokens
    and rejected_tokens, the targets counted; chosen_reward, rejected_reward, their difference
    margin, and loss. Rewards are means over tokens where the (first) loss compares such means.
  """
  logps = _row_by_row(models, batch, options)
  rewards = implicit_rewards(logps, options.objective)
  texts = [tuple(map(tokenizer.decode, ids)) for ids in _pair_tokens(batch)]
  prompts, chosen, rejected = zip(*texts, strict=True) if texts else ((), (), ())
  numbers = {
    'chosen_tokens': np.asarray(logps.chosen_lengths, int),
    'rejected_tokens': np.asarray(logps.rejected_lengths, int),
    'chosen_reward': rewards.chosen,
    'rejected_reward': rewards.rejected,
    'margin': rewards.chosen - rewards.rejected,
    'loss': total_loss(logps, options.objective),
  }
  real = batch['pair_mask'] > 0
  return _rows(
    {
      'pair_index': batch['pair_index'][real],
      'prompt': prompts,
      'chosen': chosen,
      'rejected': rejected,
      **{name: np.asarray(values)[real] for name, values in numbers.items()},
    }
  )


def as_text(rows: Sequence[Row]) -> str:
  """Lays out a table for printing; long texts lose their middle."""
  cells = [list(rows[0])] if rows else []
  cells += [[_cell(value) for value in row.values()] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in cells
  )


def _with_and_without_kl(
  options: StepOptions, has_reference: bool
) -> Iterator[tuple[str, StepOptions]]:
  objective = options.objective
  weights = {'': None, '_with_kl': objective.kl_penalty_weight or 1.0}
  if objective.reference_free or not has_reference:
    del weights['_with_kl']
  for suffix, weight in weights.items():
    changed = objective.replace(kl_penalty_weight=weight)
    yield suffix, dataclasses.replace(options, objective=changed)


def _losses(models: Models, batch: pack.Batch, options: StepOptions) -> np.ndarray:
  """The losses of the real pairs, row by row: [n]."""
  losses = total_loss(_row_by_row(models, batch, options), options.objective)
  return np.asarray(losses)[batch['pair_mask'] > 0]


def _row_by_row(models: Models, batch: pack.Batch, options: StepOptions) -> PairLogps:
  """What the objective sees of the batch, [B, P], from one forward pass per row."""
  graphdef, state = nnx.split(models)

  @jax.jit
  def run(state, row):
    models, chunk = nnx.merge(graphdef, state), options.logits_chunk
    return pair_logps(models, row, options.objective, logits_chunk=chunk)

  rows = range(len(batch['tokens']))
  parts = [run(state, {name: array[i : i + 1] for name, array in batch.items()}) for i in rows]
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _pair_tokens(batch: pack.Batch) -> Iterator[tuple[list[int], list[int], list[int]]]:
  """Reads prompt, chosen and rejected of each real pair back from the rows."""
  for row, slot in np.argwhere(batch['pair_mask'] > 0):
    (prompt, chosen), (_, rejected) = (_split(batch, row, i) for i in batch['pairs'][row, slot])
    yield prompt, chosen, rejected


def _split(batch: pack.Batch, row: int, answer: int) -> tuple[list[int], list[int]]:
  """Prompt and response of one answer."""
  first, last = np.flatnonzero(batch['answer_ids'][row] == answer)[[0, -1]]
  # A target is predicted one position before its own; the first one by the prompt's last token.
  prompt, whole = _seen_from(batch, row, first), _seen_from(batch, row, last + 1)
  return prompt, whole[len(prompt) :]


def _seen_from(batch: pack.Batch, row: int, query: int) -> list[int]:
  """The tokens visible at one position of a row, its own included: a sequence so far."""
  visible = batch['visible_until'][row][: query + 1] > query
  return batch['tokens'][row][: query + 1][visible].tolist()


def _rows(table: Mapping[str, Any]) -> list[Row]:
  columns = [np.asarray(values).tolist() for values in table.values()]
  return [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.6g}'
  if not isinstance(value, str):
    return str(value)
  text = ascii(value)[1:-1] if not value.isprintable() else value
  half = _TEXT_WIDTH // 2
  return text if len(text) <= _TEXT_WIDTH else f'{text[: half - 1]} … {text[2 - half :]}'
