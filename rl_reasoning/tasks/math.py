"""MATH (2103.03874): competition problems with solutions whose last box is the answer.

From a folder or file with columns problem, solution, answer, level, subject or type (what a row lacks beside the problem is left out, the
answer aside), or from the hub. Without a path the usual pair: training on EleutherAI/hendrycks_math (7,500 rows), testing on
HuggingFaceH4/MATH-500, the 500 test problems of 2305.20050.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset
from rl_reasoning.verify.math import boxed

HUB = {'train': 'EleutherAI/hendrycks_math', 'test': 'HuggingFaceH4/MATH-500'}
FRAMED = re.compile(r'\\fbox(?=\s*\{)')  # a few solutions frame their answer
BARE = re.compile(r'\\boxed\s+([^\s${}.,]+)')  # a few write '\boxed 5'


def files(path: str, split: str) -> list[pathlib.Path]:
  return dataset.files(path or HUB[split], split)


def last_box(solution: str) -> str | None:
  """The content of a solution's last box, braces counted."""
  found = boxed(FRAMED.sub(r'\\boxed', solution)) or BARE.findall(solution)
  return found[-1].strip() if found else None


def convert(row: dict, place: str) -> dict:
  """{problem, solution, answer, level, subject or type} -> {prompt, chain_of_thought, completion, answer, answer_kind, ...}.

  The solution is the chain; `difficulty` is the level, where it is a number ('Level 5', 5; two published rows have 'Level ?').
  """
  problem, solution, level = row.get('problem'), row.get('solution'), row.get('level')
  subject = row.get('subject', row.get('type'))
  check(isinstance(problem, str) and bool(problem.strip()), f"{place}: no text column 'problem'")
  check(solution is None or isinstance(solution, str), f"{place}: column 'solution' is {type(solution).__name__}, not text")
  answer = row.get('answer')
  answer = str(answer).strip() if answer is not None else last_box(solution or '')
  check(bool(answer), f"{place}: no answer: neither a column 'answer' nor a \\boxed{{}} in the solution")
  digits = re.search('[0-9]+', str(level))
  return {
    'prompt': str(problem).strip(),
    'chain_of_thought': (solution or '').strip(),
    'completion': answer,
    'answer': answer,
    'answer_kind': 'math',
    **({'subject': str(subject)} if subject else {}),
    **({'difficulty': int(digits[0])} if digits else {}),
  }


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  yield from dataset.split_rows(split, size, path, files, convert)
