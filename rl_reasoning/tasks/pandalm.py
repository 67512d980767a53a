"""PandaLM's test set (2306.05087): 999 pairs of responses to instructions, each ranked by three people, from a copy of testset-v1.json.

For evaluation only: there is no training split. The ranks [0, 1], [1, 0] or [0, 0] (a tie) are what most of the three say.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset, preference

RANKS = {0: [0, 0], 1: [0, 1], 2: [1, 0]}  # an annotator says which is better, 0 a tie


def files(path: str, split: str) -> list[pathlib.Path]:
  """The one file, whatever the split."""
  check(bool(path), "config key 'data.path' is empty: it names a copy of testset-v1.json of github.com/WeOpenML/PandaLM")
  where = dataset.fetch(path)
  found = [where] if where.is_file() else dataset.files(str(where), 'testset')
  check(bool(found), f"config key 'data.path': no file testset-v1.json in {where}")
  return found[:1]


def read_text(row: dict, place: str, column: str) -> str:
  """A few fields hold what JSON made of the text: true, a number."""
  check(column in row, f'{place}: no column {column!r}; columns: {", ".join(row)}')
  value: Any = row[column]
  check(not isinstance(value, (dict, list)), f'{place}: column {column!r} is {type(value).__name__}, not text')
  return '' if value is None else str(value).strip()


def convert(row: dict, place: str) -> dict:
  instruction, given, *responses = (
    read_text(row, place, column) for column in ('instruction', 'input', 'response1', 'response2')
  )
  votes: Any = [row.get(f'annotator{n}') for n in (1, 2, 3)]
  good = all(isinstance(vote, int) and not isinstance(vote, bool) and vote in RANKS for vote in votes)
  check(good, f"{place}: columns 'annotator1' to 'annotator3' are {votes}, not each 0, 1 or 2")
  ((vote, count),) = collections.Counter(votes).most_common(1)
  if count == 1:
    raise preference.Unusable('without a majority')
  return {'prompt': '\n\n'.join(filter(None, (instruction, given))), 'responses': responses, 'ranks': RANKS[vote]}


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  """{prompt: the instruction and, after a blank line, its input; responses, ranks}, in the file's order. Pairs with an empty response (54
  of the 999) are left out and counted."""
  check(split == 'test', "config key 'data.task': 'pandalm' is for evaluation only, it has no training split")
  left_out = preference.LeftOut()
  converted = left_out.counted(lambda row, place: preference.sift(convert(row, place)))
  found = (converted(row, place) for file in files(path, split) for place, row in dataset.read(file))
  yield from itertools.islice((row for row in found if row is not None), size)
  left_out.report(files(path, split))
