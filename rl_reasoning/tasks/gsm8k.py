"""GSM8K (2110.14168): grade-school word problems, from a folder with train.jsonl and test.jsonl or from the hub (openai/gsm8k)."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset

MARKS = re.compile(r'<<[^<>]*>>')  # the data set's calculator annotations


def files(path: str, split: str) -> list[pathlib.Path]:
  check(not dataset.is_single(path), f"config key 'data.path': {path!r} is a file; give the folder of both splits")
  found = dataset.files(path or 'openai/gsm8k', split)
  return [f for f in found if f.parent.name != 'socratic']  # the hub holds a second wording of the same answers


def convert(row: dict, place: str) -> dict:
  """{question, answer} -> {prompt, chain_of_thought, completion, answer}; the answer without thousands commas."""
  for column in ('question', 'answer'):
    check(isinstance(row.get(column), str), f'{place}: no text column {column!r}')
  chain, mark, answer = row['answer'].partition('####')
  check(bool(mark), f"{place}: the answer has no '#### ' line")
  answer = answer.strip().replace(',', '')
  return {
    'prompt': row['question'].strip(),
    'chain_of_thought': MARKS.sub('', chain).strip(),
    'completion': answer,
    'answer': answer,
  }


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  yield from dataset.split_rows(split, size, path, files, convert)
