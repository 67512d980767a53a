"""Reward functions that are rules: `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, listed in rewards.REWARDS.

Prompts and completions are texts, or chat messages whose last one counts; columns are the data set's other columns. A function's own
options are its keyword-only arguments, set by `rewards.options.NAME`. None is "no verdict", never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_reasoning.tokenizer import TAGS, from_thinking, split_completion
from rl_reasoning.verify.math import check_countdown, extract_answer, numbers_equal


def last_text(message: Any) -> str:
  return message if isinstance(message, str) else message[-1]['content']


def whole_text(prompt: Any, completion: Any) -> str:
  return from_thinking(prompt, last_text(completion))


def grade(prompts: Sequence, completions: Sequence, columns: Mapping[str, Any], flexible: bool) -> list[float | None]:
  absent = [None] * len(completions)
  gold, numbers, target = (columns.get(k, absent) for k in ('answer', 'numbers', 'target'))
  values: list[float | None] = []
  for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    text = whole_text(prompt, completion)
    if numbers[n] is not None and target[n] is not None:
      right = check_countdown(numbers[n], target[n], extract_answer(text))
    elif gold[n] is not None:
      right = numbers_equal(gold[n], extract_answer(text, flexible=flexible))
    else:
      right = None
    values.append(None if right is None else float(right))
  return values


def accuracy(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
  """1 where the one marked answer after the thinking is the `answer` column's number (or solves `numbers` -> `target`), else 0."""
  return grade(prompts, completions, columns, flexible=False)


def accuracy_flexible(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
  """As `accuracy`, but an unmarked text answers with its last number. What evaluators call accuracy."""
  return grade(prompts, completions, columns, flexible=True)


def format(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """1 for exactly '<think>...</think><answer>...</answer>' with each tag once, space around them allowed; else 0."""
  return [float(split_completion(whole_text(p, c)).well_formed) for p, c in zip(prompts, completions, strict=True)]


def format_tags(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """A quarter for each of the four tags that stands exactly once, and after the tags before it in the format."""
  values = []
  for prompt, completion in zip(prompts, completions, strict=True):
    text = whole_text(prompt, completion)
    place, score = -1, 0.0
    for tag in TAGS:
      if text.count(tag) == 1 and text.index(tag) > place:
        place, score = text.index(tag), score + 0.25
    values.append(score)
  return values
