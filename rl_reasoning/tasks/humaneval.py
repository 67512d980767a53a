"""HumanEval (2107.03374): 164 functions to complete, from a copy of HumanEval.jsonl or from the hub (openai/openai_humaneval).

For evaluation only: there is no training split. Rewards: code, code_binary.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset

COLUMNS = ('task_id', 'prompt', 'entry_point', 'canonical_solution', 'test')


def files(path: str, split: str) -> list[pathlib.Path]:
  """The one file, whatever the split: 'HumanEval.jsonl.gz' as published, the hub's 'test-00000-of-00001.parquet'."""
  where = dataset.fetch(path or 'openai/openai_humaneval')
  found = [where] if where.is_file() else [f for name in ('HumanEval', 'test') for f in dataset.files(str(where), name)]
  check(bool(found), f"config key 'data.path': no file HumanEval.jsonl, .jsonl.gz or test*.parquet in {where}")
  return found[:1]


def convert(row: dict, place: str) -> dict:
  for column in COLUMNS:
    check(isinstance(row.get(column), str), f'{place}: no text column {column!r}')
  return {
    'prompt': row['prompt'],
    'completion': row['canonical_solution'],
    'tests': row['test'],
    'entry_point': row['entry_point'],
    'setup': '',
    'stub': row['prompt'],
    'task_id': row['task_id'],
  }


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  """{prompt, completion, tests, entry_point, setup, stub, task_id}, in the file's order."""
  check(split == 'test', "config key 'data.task': 'humaneval' is for evaluation only, it has no training split")
  found = (convert(row, place) for file in files(path, split) for place, row in dataset.read(file))
  for index, row in enumerate(found):
    if index == size:
      return
    yield row
