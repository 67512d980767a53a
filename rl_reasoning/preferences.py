"""Judged completions -> rows to learn from: rankings and pairs, unpaired verdicts, verdicts on completions and on steps.

Columns (`prompt` is a text, or a list of chat messages):
  rankings   prompt, responses (texts), ranks (numbers, the SMALLER THE BETTER, equal is a tie); with two responses perhaps margin (>= 0)
  unpaired, verdicts   prompt, completion, label (in [0, 1], or a bool)
  steps      prompt, completions (texts of the steps, joined by nothing but what they hold), labels (each in [0, 1])

A row of data is a unit: some adjacent rows of the batch, each prompt + response + end token, the mask on the response and its end token.
`extras` (float32) hold what was judged, and `present` [N], 0 on a row that only fills up its unit: all padding.

`overlong` says what is done about a unit with a row beyond `max_length` tokens: 'raise'; 'drop', the unit is absent; 'truncate_prompt', its
prompt loses its beginning, the same for all its responses (else they would be judged in different contexts), and the unit is absent
where not even one token of the prompt would be left. ConfigErrors show the row's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_reasoning.config import check
from rl_reasoning.data import excerpt, pad_rows
from rl_reasoning.structs import Batch
from rl_reasoning.tasks.preference import is_finite, is_label
from rl_reasoning.tokenizer import Tokenizer, render_prompt

OVERLONG = ('raise', 'drop', 'truncate_prompt')
COLUMNS = {
  'rankings': ('prompt', 'responses', 'ranks'),
  'unpaired': ('prompt', 'completion', 'label'),
  'verdicts': ('prompt', 'completion', 'label'),
  'steps': ('prompt', 'completions', 'labels'),
}


class Limits(NamedTuple):
  tokenizer: Tokenizer
  template: str
  max_length: int
  overlong: str


class Unit(NamedTuple):
  """A row of data as token ids."""

  prompt: list[int] | None  # as it fits; None: the unit is dropped
  completions: list[list[int]]  # of the responses, or of the steps; the end token is not in them


def is_text(x: Any) -> bool:
  return isinstance(x, str) and bool(x.strip())


def is_prompt(x: Any) -> bool:
  """A text, or messages of which none is empty."""
  if isinstance(x, str):
    return is_text(x)
  turns = isinstance(x, Sequence) and bool(x)
  return turns and all(isinstance(m, Mapping) and is_text(m.get('role')) and is_text(m.get('content')) for m in x)


def check_columns(row: Mapping[str, Any], reads: str) -> None:
  missing = [name for name in COLUMNS[reads] if name not in row]
  check(not missing, f'a row of {reads} has no column {", ".join(missing)}; columns: {", ".join(row)}')


def check_row(row: Mapping[str, Any], reads: str, size: int) -> None:
  """Raises ConfigError for a row that says nothing, or contradicts itself."""
  check_columns(row, reads)

  def good(condition: bool, message: str):
    check(condition, f'{message}: {excerpt(row["prompt"])}')

  good(
    is_prompt(row['prompt']), 'the prompt is no text and no list of messages with role and content, or something in it is empty'
  )
  if reads in ('unpaired', 'verdicts'):
    good(is_text(row['completion']), f'completion {excerpt(row["completion"])} is no text, or empty')
    good(is_label(row['label']), f'label {row["label"]!r} is no number in [0, 1]')
    return
  texts, marks = ('responses', 'ranks') if reads == 'rankings' else ('completions', 'labels')
  for name in (texts, marks):
    good(isinstance(row[name], (list, tuple)), f'{name} {excerpt(row[name])} is no list')
  good(len(row[texts]) == len(row[marks]), f'{len(row[texts])} {texts} but {len(row[marks])} {marks}')
  for text in row[texts]:
    good(is_text(text), f'one of the {texts}, {excerpt(text)}, is no text, or empty')
  if reads == 'steps':
    good(bool(row[texts]), 'completions is empty: no step to judge')
    for label in row[marks]:
      good(is_label(label), f'label {label!r} is no number in [0, 1]')
    return
  good(len(row[texts]) >= 2, 'a ranking needs two responses or more, and this one has fewer')
  hint = 'objective.ranking_size of reward_model; data.options.pairs of the task preference makes pairs of a ranking'
  good(len(row[texts]) <= size, f'the objective reads {size} responses, but a row has {len(row[texts])} ({hint})')
  for rank in row[marks]:
    good(is_finite(rank), f'rank {rank!r} is no number')
  different = {*zip(row[texts], row[marks], strict=True)}
  good(len({text for text, _ in different}) == len(different), 'two responses are equal, but not their ranks')
  if row.get('margin') is not None:
    good(is_finite(row['margin']) and row['margin'] >= 0, f'margin {row["margin"]!r} is no number of at least 0')
    good(len(row[texts]) == 2, f'a margin is between two responses, and there are {len(row[texts])}')
    good(not row['margin'] or len({*row[marks]}) == 2, f'a margin of {row["margin"]} between two responses that tie')


def fit(prompt: list[int], longest: int, row: Mapping[str, Any], limits: Limits) -> list[int] | None:
  """The prompt beside which a completion of `longest` tokens stays within the limit; None: it does not."""
  room = limits.max_length - longest
  if len(prompt) <= room:
    return prompt
  check(limits.overlong != 'raise', f"config key 'data.max_length': {limits.max_length}, but a row has {len(prompt) + longest} tokens "
        f"('data.overlong' may drop such rows): {excerpt(row['prompt'])}")  # fmt: skip
  return prompt[len(prompt) - room :] if limits.overlong == 'truncate_prompt' and room > 0 else None


def encode_prompt(row: Mapping[str, Any], limits: Limits) -> list[int]:
  return limits.tokenizer.encode(render_prompt(row['prompt'], limits.template, limits.tokenizer))


def preferred_first(row: Mapping[str, Any]) -> dict[str, Any]:
  """A ranking with its responses from the best to the worst; those that tie stay in their order."""
  order = sorted(range(len(row['ranks'])), key=lambda i: row['ranks'][i])
  return {**row, 'responses': [row['responses'][i] for i in order], 'ranks': [row['ranks'][i] for i in order]}


def encode_unit(row: Mapping[str, Any], reads: str, limits: Limits, size: int) -> Unit:
  """Checks a row and encodes it. The steps are encoded one by one, so that every step ends with a token of its own."""
  check_row(row, reads, size)
  if reads == 'rankings' and size == 2:
    row = preferred_first(row)
  texts = row['responses'] if reads == 'rankings' else row['completions'] if reads == 'steps' else [row['completion']]
  completions = [limits.tokenizer.encode(text) for text in texts]
  lengths = [len(ids) for ids in completions]
  longest = 1 + (sum(lengths) if reads == 'steps' else max(lengths))
  return Unit(fit(encode_prompt(row, limits), longest, row, limits), completions)


def encode_units(
  rows: Sequence[Mapping[str, Any]], reads: str, tokenizer: Tokenizer, template: str, max_length: int, overlong: str, size: int
) -> list[Unit]:
  limits = Limits(tokenizer, template, max_length, overlong)
  return [encode_unit(row, reads, limits, size) for row in rows]


def check_preferences(
  rows: Sequence[Mapping[str, Any]], reads: str, tokenizer: Tokenizer, template: str, max_length: int, overlong: str = 'raise',
  size: int = 2,
) -> int:  # fmt: skip
  """How many of the rows are dropped. Raises ConfigError for a row that cannot be learned from. `size` is that of rankings."""
  return sum(unit.prompt is None for unit in encode_units(rows, reads, tokenizer, template, max_length, overlong, size))


def joined(prompt: list[int], completion: list[int], end_id: int) -> tuple[list[int], list[int]]:
  """(token ids, mask)."""
  return [*prompt, *completion, end_id], [0] * len(prompt) + [1] * (len(completion) + 1)


ABSENT: tuple[list[int], list[int]] = ([], [])


def encode_rankings(
  rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str, max_length: int, size: int = 2, overlong: str = 'raise'
) -> Batch:
  """Units of `size` rows: the responses in their order in the data (of a pair, the preferred one first), then absent rows. Extras: rank,
  present, and margin, the unit's, on all its rows."""
  units = encode_units(rows, 'rankings', tokenizer, template, max_length, overlong, size)
  N = len(rows) * size
  encoded = [ABSENT] * N
  rank, present, margin = np.zeros(N, np.float32), np.zeros(N, np.float32), np.zeros(N, np.float32)
  for u, (row, unit) in enumerate(zip(rows, units, strict=True)):
    if unit.prompt is None:
      continue
    ranks = preferred_first(row)['ranks'] if size == 2 else row['ranks']
    places = sorted(set(ranks))
    for n, (completion, r) in enumerate(zip(unit.completions, ranks, strict=True), u * size):
      encoded[n] = joined(unit.prompt, completion, tokenizer.end_id)
      rank[n] = places.index(r)  # float32 makes a tie of the ranks 100,000,001 and 100,000,002, but not of their places
      present[n] = 1
    margin[u * size : (u + 1) * size] = row.get('margin') or 0
  batch = pad_rows(encoded, np.repeat(np.arange(len(rows)), size))
  return batch.replace(extras={'rank': rank, 'present': present, 'margin': margin})


def encode_unpaired(
  rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str, max_length: int, overlong: str = 'raise'
) -> Batch:
  """KTO's rows (2402.01306): 2 n is prompt n with its completion, 2 n + 1 prompt n with the completion of the next row that asks something
  else, a mismatch from which the KL is estimated. Extras: label (of n, on both) and present.

  Without one in the batch the mismatch is absent. One that is too long is absent by itself, even where `overlong` is 'raise': it depends on
  who the neighbour is, so no check before the run could find it. Raises ConfigError for a batch of one row, which has no neighbour.
  """
  check(len(rows) > 1, f"config key 'data.batch_size': {len(rows)}, but KTO's mismatched completions are those of other rows")
  units = encode_units(rows, 'unpaired', tokenizer, template, max_length, overlong, 1)
  limits = Limits(tokenizer, template, max_length, 'drop' if overlong == 'raise' else overlong)
  encoded = [ABSENT] * (2 * len(rows))
  for n, (row, unit) in enumerate(zip(rows, units, strict=True)):
    if unit.prompt is None:
      continue
    encoded[2 * n] = joined(unit.prompt, unit.completions[0], tokenizer.end_id)
    next_ones = ((n + k) % len(rows) for k in range(1, len(rows)))
    mismatched = next((m for m in next_ones if rows[m]['prompt'] != row['prompt']), None)
    if mismatched is None:
      continue
    (other,) = units[mismatched].completions
    prompt = fit(encode_prompt(row, limits), len(other) + 1, row, limits)
    if prompt is not None:
      encoded[2 * n + 1] = joined(prompt, other, tokenizer.end_id)
  label = np.asarray([row['label'] for row in rows for _ in range(2)], np.float32)
  present = np.asarray([bool(ids) for ids, _ in encoded], np.float32)
  return pad_rows(encoded, np.repeat(np.arange(len(rows)), 2)).replace(extras={'label': label, 'present': present})


def encode_verdicts(
  rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str, max_length: int, overlong: str = 'raise'
) -> Batch:
  """One row a unit. Extras: label, present."""
  units = encode_units(rows, 'verdicts', tokenizer, template, max_length, overlong, 1)
  encoded = [ABSENT if u.prompt is None else joined(u.prompt, u.completions[0], tokenizer.end_id) for u in units]
  extras = {
    'label': np.asarray([row['label'] for row in rows], np.float32),
    'present': np.asarray([bool(ids) for ids, _ in encoded], np.float32),
  }
  return pad_rows(encoded, np.arange(len(rows))).replace(extras=extras)


def encode_steps(
  rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str, max_length: int, overlong: str = 'raise'
) -> Batch:
  """One row a unit. Extras: present; step [N, T], 1 at the last token of each step (of the last step: the one before the end token, as
  in every other step and in a completion that is not finished yet), and there step_label [N, T]."""
  units = encode_units(rows, 'steps', tokenizer, template, max_length, overlong, 1)
  encoded = [
    ABSENT if u.prompt is None else joined(u.prompt, [i for step in u.completions for i in step], tokenizer.end_id) for u in units
  ]
  batch = pad_rows(encoded, np.arange(len(rows)))
  step, label = np.zeros(batch.tokens.shape, np.float32), np.zeros(batch.tokens.shape, np.float32)
  for n, (row, unit) in enumerate(zip(rows, units, strict=True)):
    if unit.prompt is not None:
      ends = len(unit.prompt) + np.cumsum([len(ids) for ids in unit.completions]) - 1
      step[n, ends], label[n, ends] = 1, row['labels']
  present = np.asarray([bool(ids) for ids, _ in encoded], np.float32)
  return batch.replace(extras={'present': present, 'step': step, 'step_label': label})


def encode_preferences(
  rows: Sequence[Mapping[str, Any]], reads: str, tokenizer: Tokenizer, template: str, max_length: int, overlong: str = 'raise',
  size: int = 2,
) -> Batch:  # fmt: skip
  """The encoder of `reads`. `size` is that of rankings."""
  if reads == 'rankings':
    return encode_rankings(rows, tokenizer, template, max_length, size, overlong)
  encoder = {'unpaired': encode_unpaired, 'verdicts': encode_verdicts, 'steps': encode_steps}[reads]
  return encoder(rows, tokenizer, template, max_length, overlong)
