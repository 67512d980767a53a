"""AIME: contest problems whose answers are integers from 0 to 999, for evaluation only.

From a folder or file with columns problem (or question) and answer, in any case, or from the hub: without a path the 30 problems of
HuggingFaceH4/aime_2024.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset


def files(path: str, split: str) -> list[pathlib.Path]:
  """The same whatever the split: published sets call their only split test, train (aime_2024) or by the contest (aime2025-I.jsonl)."""
  path = path or 'HuggingFaceH4/aime_2024'
  found = (dataset.files(path, name) for name in ('test', 'train', 'aime', 'AIME'))
  return next(filter(None, found), [])


def convert(row: dict, place: str) -> dict:
  row = {column.lower(): value for column, value in row.items()}
  problem, answer = row.get('problem', row.get('question')), str(row.get('answer', '')).strip()
  check(isinstance(problem, str) and bool(problem.strip()), f"{place}: no text column 'problem' or 'question'")
  good = answer.isascii() and answer.isdigit() and len(answer) <= 3
  check(good, f"{place}: column 'answer' is {row.get('answer')!r}, no integer from 0 to 999")
  answer = str(int(answer))  # '033' is written as published
  return {
    'prompt': str(problem).strip(),
    'chain_of_thought': '',
    'completion': answer,
    'answer': answer,
    'answer_kind': 'number',
  }


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  """The first `size` problems, in their order. Raises ConfigError for the training split: who trains on them measures nothing."""
  check(split == 'test', "config key 'data.task': 'aime' is for evaluation, it has no training split")
  found = [convert(row, place) for file in files(path, split) for place, row in dataset.read(file)]
  yield from found[:size]
