"""MBPP (2108.07732): entry-level Python problems with three tests each, from copies of mbpp.jsonl and sanitized-mbpp.json or from the hub
(google-research-datasets/mbpp). Rewards: code, code_binary.

Splits by task_id, as published: test 11 to 510, train 601 to 974; 1 to 10 (few-shot prompts) and 511 to 600 (validation) are held out.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset

SPLITS = {'test': range(11, 511), 'train': range(601, 975)}
NAMES = {True: 'sanitized-mbpp', False: 'mbpp'}
HUB = {True: 'sanitized', False: 'full'}


def files(path: str, split: str) -> list[pathlib.Path]:
  """Whatever of both versions is there (the split is in the rows)."""
  where = dataset.fetch(path or 'google-research-datasets/mbpp')
  if where.is_file():
    return [where]
  published = [f for name in NAMES.values() for f in dataset.files(str(where), f'{name}.')]
  on_hub = [f for name in SPLITS for f in dataset.files(str(where), name) if f.parent.name in HUB.values()]
  check(bool(published or on_hub), f"config key 'data.path': no file mbpp.jsonl or sanitized-mbpp.json in {where}")
  return published or on_hub


def entry_point(code: str, tests: Sequence[str]) -> str | None:
  """The function that the tests call: the first name they call that the reference defines."""
  defined = {node.name for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
  called = [n.func.id for t in tests for n in ast.walk(ast.parse(t)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
  return next((name for name in called if name in defined), None)


def convert(row: dict, place: str) -> dict:
  """A row of either version; the prompt shows the first test, without which nobody knows the function's name."""
  text: Any = row.get('text', row.get('prompt'))
  check(isinstance(text, str), f"{place}: neither a text column 'text' (full) nor 'prompt' (sanitized)")
  check(isinstance(row.get('code'), str), f"{place}: no text column 'code'")
  check(isinstance(row.get('task_id'), int), f"{place}: no whole number 'task_id'")
  tests: Any = row.get('test_list')
  check(
    isinstance(tests, list) and all(isinstance(t, str) for t in tests) and bool(tests),
    f"{place}: 'test_list' is no list of texts",
  )
  setup = '\n'.join([*(row.get('test_imports') or []), row.get('test_setup_code') or '']).strip()
  try:
    name = entry_point(row['code'], tests)
  except SyntaxError as error:
    check(False, f'{place}: {error.msg} in its code or tests')
  check(name is not None, f'{place}: the tests call nothing that the code defines')
  return {
    'prompt': f'{text.strip()}\nYour code should pass this test:\n{tests[0].strip()}\n',
    'completion': row['code'].replace('\r\n', '\n').strip() + '\n',
    'tests': tests,
    'entry_point': name,
    'setup': setup,
    'task_id': row['task_id'],
  }


def rows(split: str, seed: int, size: int | None, path: str = '', *, sanitized: bool = False) -> Iterator[dict]:
  """{prompt, completion, tests, entry_point, setup, task_id}; `sanitized` takes the 427 problems that were verified by hand.

  Training problems worded as a test problem (602, 704 and 872 of the full version) are left out.
  """
  found = files(path, split)
  chosen = (
    found
    if len(found) == 1
    else [f for f in found if f.name.startswith(f'{NAMES[sanitized]}.') or f.parent.name == HUB[sanitized]]
  )
  check(bool(chosen), f"config key 'data.options.sanitized': no file of that version in {path or 'the hub'}")
  held_out, kept = set(), []
  for file in chosen:
    for place, raw in dataset.read(file):
      other = ('text' in raw) == sanitized
      check(not other, f"config key 'data.options.sanitized': {sanitized}, but {place} is of the other version")
      row = convert(raw, place)
      wording = dataset.identity({'prompt': raw['prompt' if sanitized else 'text']})
      if row['task_id'] in SPLITS['test']:
        held_out.add(wording)
      if row['task_id'] in SPLITS[split]:
        kept.append((wording, row))
  yield from [row for wording, row in kept if split == 'test' or wording not in held_out][:size]
