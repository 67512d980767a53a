"""Judged completions from files or the hub, in the shapes of TRL and in ours. A row becomes one of three kinds (as preferences.py reads):

  prompt, responses, ranks (margin)   rankings: ranks are finite numbers, the SMALLER THE BETTER, equal is a tie; with two responses a row
                                      may say by how much one is better, a number >= 0
  prompt, chosen, rejected            a ranking of two, ranks [0, 1]
  prompt, completion, label           a verdict: a bool or a number in [0, 1]
  prompt, completions, labels         steps, and a verdict on each

Further columns stay as they are. A prompt is a text or a list of chat messages, a completion a text or a list of one message of the
assistant. chosen and rejected may hold the prompt themselves: of message lists it is what stands before the last message, of texts what
ends at the last marker of the assistant's turn ('Assistant:' as in HH-RLHF, '### Response:', 'ASSISTANT:', '<|assistant|>', ChatML,
'[/INST]'); prompt and response then join to the text as it was.

What is no such row is refused with file and line: a missing or empty prompt, a ranking of one response, ranks of another number than the
responses, not finite (NaN) or no numbers (a bool is none), a label beyond [0, 1], anything that should be text and is not. What real sets
have a few of is left out, and counted on stderr: equal texts (two responses, or two of a ranking that are ranked differently), a turn or
step that is empty, two texts that differ before the last turn.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset

MARKER = re.compile(
  r'(?:^|\n)(?:Assistant|### (?:Response|Assistant)):|(?<!\S)ASSISTANT:|<\|assistant\|>|<\|im_start\|>assistant\n|\[/INST\]'
)
DIFFER = 'that differ before the last turn'
EMPTY = 'with an empty turn'
EQUAL = 'with equal texts'
RESERVED = ('prompts', 'completions', 'completion_ids')


class Unusable(Exception):
  """A row of the right shape that says nothing. The message ends the sentence '3 rows ...'."""


class LeftOut:
  """What became of the rows that were read, by their place: a file may be read twice and counts once."""

  def __init__(self):
    self.reasons: dict[str, str] = {}  # '' of a row that is kept

  def counted(self, convert: Callable[[dict, str], dict]) -> Callable[[dict, str], dict | None]:
    """`convert`, giving None for a row that is Unusable."""

    def converted(row: dict, place: str) -> dict | None:
      self.reasons[place] = ''
      try:
        return convert(row, place)
      except Unusable as reason:
        self.reasons[place] = str(reason)
        return None

    return converted

  def report(self, paths: Iterable[pathlib.Path]) -> None:
    """A line on stderr for each of the files of which something was left out."""
    for path in paths:
      reasons = [reason for place, reason in self.reasons.items() if place.rpartition(':')[0] == str(path)]
      found = collections.Counter(filter(None, reasons))
      if found:
        told = ', '.join(f'{count:,} {reason}' for reason, count in sorted(found.items()))
        print(f'{path}: {found.total():,} of {len(reasons):,} rows are left out: {told}', file=sys.stderr)


def files(path: str, split: str) -> list[pathlib.Path]:
  return dataset.files(path, split)


def turns_of(prompt: str | list[dict]) -> list[str]:
  return [prompt] if isinstance(prompt, str) else [message['content'] for message in prompt]


def read_prompt(row: Mapping, place: str) -> str | list[dict]:
  prompt: Any = row.get('prompt')
  check(prompt is not None, f'{place}: no prompt; columns: {", ".join(row)}')
  if isinstance(prompt, list):
    dataset.check_messages(place, 'prompt', prompt)
    return prompt
  check(isinstance(prompt, str), f"{place}: column 'prompt' is {type(prompt).__name__}, neither text nor messages")
  check(bool(prompt.strip()), f'{place}: the prompt is empty')
  return prompt


def read_texts(row: Mapping, place: str, column: str) -> list[str]:
  texts = row[column]
  good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
  check(good, f'{place}: column {column!r} is no list of texts')
  return texts


def read_numbers(row: Mapping, place: str, column: str, texts: list[str], good: Callable[[Any], bool], what: str) -> list:
  """A number for each of the texts."""
  numbers = row[column]
  check(isinstance(numbers, list), f'{place}: column {column!r} is {type(numbers).__name__}, no list of numbers')
  check(len(numbers) == len(texts), f'{place}: {len(texts)} texts, but {len(numbers)} {column}')
  for number in numbers:
    check(good(number), f'{place}: column {column!r} holds {number!r}, {what}')
  return numbers


def is_finite(x: Any) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def is_label(x: Any) -> bool:
  return isinstance(x, (bool, int, float)) and 0 <= x <= 1


def read_ranking(row: Mapping, place: str) -> dict:
  responses = read_texts(row, place, 'responses')
  check(len(responses) >= 2, f'{place}: a ranking of {len(responses)}, and it takes two responses or more')
  ranks = read_numbers(row, place, 'ranks', responses, is_finite, 'no finite number')
  wrong = next((r for r in ranks if not 0 <= r <= len(ranks)), None)  # scores, of which more is better, would teach the opposite
  check(wrong is None, f"{place}: column 'ranks' holds {wrong!r}: places are from 0, or from 1, the best, to {len(ranks)}")
  found = {'prompt': read_prompt(row, place), 'responses': responses, 'ranks': ranks}
  margin = row.get('margin')
  if margin is None:
    return found
  check(is_finite(margin) and margin >= 0, f"{place}: column 'margin' is {margin!r}, no number of at least 0")
  check(len(responses) == 2, f'{place}: a margin is between two responses, and there are {len(responses)}')
  check(not margin or ranks[0] != ranks[1], f'{place}: a margin of {margin} between two responses that tie')
  return {**found, 'margin': margin}


def check_answer(place: str, column: str, messages: Any) -> None:
  dataset.check_messages(place, column, messages)
  check(
    messages[-1]['role'] == 'assistant',
    f'{place}: column {column!r} ends with a message of {messages[-1]["role"]!r}, not of the assistant',
  )


def split_messages(row: Mapping, place: str) -> tuple[str | list[dict], list[str]]:
  """(prompt, [chosen, rejected]) where both are message lists. A text in the column prompt repeats one of the messages."""
  chosen, rejected = row['chosen'], row['rejected']
  check_answer(place, 'chosen', chosen)
  check_answer(place, 'rejected', rejected)
  if chosen[:-1] != rejected[:-1]:
    raise Unusable(DIFFER)
  before, responses = chosen[:-1], [chosen[-1]['content'], rejected[-1]['content']]
  if not before:
    return read_prompt(row, place), responses
  if row.get('prompt') is None:
    return before, responses
  prompt = read_prompt(row, place)
  if isinstance(prompt, list):
    return before if before[: len(prompt)] == prompt else prompt + before, responses
  said = {turn.strip() for turn in turns_of(before)}
  check(prompt.strip() in said, f"{place}: the prompt is none of the messages before the last in 'chosen'")
  return before, responses


def split_texts(row: Mapping, place: str) -> tuple[str, list[str]]:
  """(prompt, [chosen, rejected]) of two texts that hold their prompt."""
  ends = [[found.end() for found in MARKER.finditer(row[column])] for column in ('chosen', 'rejected')]
  check(all(ends), f"{place}: no column prompt, and in 'chosen' or 'rejected' no marker (as 'Assistant:') where one would end")
  (*_, a), (*_, b) = ends
  if row['chosen'][:a] != row['rejected'][:b]:
    raise Unusable(DIFFER)
  return row['chosen'][:a], [row['chosen'][a:], row['rejected'][b:]]


def read_pair(row: Mapping, place: str) -> dict:
  kinds = [type(row[column]) for column in ('chosen', 'rejected')]
  good = kinds in ([str, str], [list, list])
  names = ' and '.join(kind.__name__ for kind in kinds)
  check(good, f"{place}: columns 'chosen' and 'rejected' are {names}, not both texts or messages")
  if kinds[0] is list:
    prompt, responses = split_messages(row, place)
  elif row.get('prompt') is None:
    prompt, responses = split_texts(row, place)
  else:
    prompt, responses = read_prompt(row, place), [row['chosen'], row['rejected']]
  return read_ranking({**row, 'prompt': prompt, 'responses': responses, 'ranks': [0, 1]}, place)


def read_verdict(row: Mapping, place: str) -> dict:
  completion, label = row['completion'], row['label']
  if isinstance(completion, list):
    check_answer(place, 'completion', completion)
    check(len(completion) == 1, f"{place}: column 'completion' has {len(completion)} messages, and one can be judged")
    completion = completion[0]['content']
  check(isinstance(completion, str), f"{place}: column 'completion' is {type(completion).__name__}, not text")
  check(is_label(label), f"{place}: column 'label' is {label!r}, neither a bool nor a number in [0, 1]")
  return {'prompt': read_prompt(row, place), 'completion': completion, 'label': label}


def read_steps(row: Mapping, place: str) -> dict:
  steps = read_texts(row, place, 'completions')
  check(bool(steps), f"{place}: column 'completions' is empty: no step to judge")
  labels = read_numbers(row, place, 'labels', steps, is_label, 'neither a bool nor a number in [0, 1]')
  return {'prompt': read_prompt(row, place), 'completions': steps, 'labels': labels}


SHAPES: dict[tuple[str, str], Callable[[Mapping, str], dict]] = {
  ('responses', 'ranks'): read_ranking,
  ('chosen', 'rejected'): read_pair,
  ('completion', 'label'): read_verdict,
  ('completions', 'labels'): read_steps,
}


def convert(row: Mapping, place: str) -> dict:
  """A row of any of the shapes, with its further columns. Raises ConfigError, or Unusable."""
  shapes = [shape for shape in SHAPES if all(row.get(column) is not None for column in shape)]
  told = ', '.join(' + '.join(shape) for shape in shapes or SHAPES)
  check(bool(shapes), f'{place}: no preference: beside the prompt a row has one of {told}; columns: {", ".join(row)}')
  check(len(shapes) == 1, f'{place}: which of {told} is meant? Rename the others by data.options.columns')
  (shape,) = shapes
  found = SHAPES[shape](row, place)
  unfilled = {column for other in SHAPES for column in other if row.get(column) is None}  # as a table of several shapes has
  others = {column: value for column, value in row.items() if column not in {'prompt', *shape, *unfilled}}
  dataset.check_names(place, others, RESERVED)
  return {**found, **others}


def sift(row: dict, max_chars: int = 0) -> dict:
  """The row, where it can be learned from. Raises Unusable: a text is empty, two are equal but not so their ranks, or prompt and longest
  response have more than `max_chars` characters (0: no limit)."""
  asked = turns_of(row['prompt'])
  texts = row.get('responses') or row.get('completions') or [row['completion']]
  if not all(text.strip() for text in [*asked, *texts]):
    raise Unusable(EMPTY)
  if 'responses' in row:
    distinct = {text.strip() for text in texts}
    judged = {(text.strip(), rank) for text, rank in zip(texts, row['ranks'], strict=True)}
    if len(distinct) == 1 or len(judged) > len(distinct):
      raise Unusable(EQUAL)
  length = sum(map(len, asked)) + (sum if 'completions' in row else max)(map(len, texts))
  if max_chars and length > max_chars:
    raise Unusable(f'longer than {max_chars:,} characters')
  return row


def pairs_of(row: dict) -> Iterator[dict]:
  """The pairs of a ranking that do not tie, the better response first."""
  for both in itertools.combinations(zip(row['ranks'], row['responses'], strict=True), 2):
    (best, better), (worst, worse) = sorted(both, key=lambda one: one[0])
    if best < worst:
      yield {**row, 'responses': [better, worse], 'ranks': [0, 1]}


def check_max_chars(max_chars: int) -> None:
  check(max_chars >= 0, f"config key 'data.options.max_chars': {max_chars} is negative; 0 is no limit")


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, columns: Mapping[str, str] | None = None, pairs: bool = False,
  max_chars: int = 0, step_separator: str = '',
) -> Iterator[dict]:  # fmt: skip
  """Rows of a split, as those of `dataset`: of a single file one prompt in ten is the test split, and no test prompt is trained on.

  `pairs` makes rows of two of every ranking, all K (K - 1) / 2 but the ties (InstructGPT, 2203.02155, found that a reward model overfits on
  pairs dealt out one by one, and learns from the whole ranking at once instead). `max_chars` leaves out rows whose prompt and longest
  response are longer in all. `step_separator` is put behind every step but the last: TRL's sets hold steps without what separates them
  ('\\n' for Math-Shepherd), and here steps are joined by nothing.
  """
  check_max_chars(max_chars)

  def converted(found: dict, place: str) -> dict:
    row = convert(dataset.rename(found, place, columns or {}), place)
    for key, given, column in (('pairs', pairs, 'responses'), ('step_separator', step_separator, 'completions')):
      check(not given or column in row, f"config key 'data.options.{key}' cannot act: {place} has no {column}")
    if step_separator:
      *steps, last = row['completions']
      row['completions'] = [*(step + step_separator for step in steps), last]
    row = sift(row, max_chars)
    if pairs and len(set(row['ranks'])) == 1:
      raise Unusable('with nothing but ties')
    return row

  left_out = LeftOut()
  kept = dataset.split_rows(split, None, path, files, left_out.counted(converted))
  yield from itertools.islice((one for row in kept for one in (pairs_of(row) if pairs else [row])), size)
  left_out.report(files(path, split))
