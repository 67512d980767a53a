"""HH-RLHF (2204.05862): which of two answers of an assistant people found more helpful, or less harmful.

From the hub (Anthropic/hh-rlhf), a copy of its folders ('helpful-base/train.jsonl.gz', 'harmless-base/test.jsonl.gz', ...), or files
named alike ('helpful_train_gt.jsonl.gz', 'harmless_base_test.jsonl.gz'): SUBSET, then train or test, then perhaps a PART, between them '-',
'_' or '/'.

Rows {prompt: chat messages, responses [chosen, rejected], ranks [0, 1]}: the dialogues '\\n\\nHuman: ... \\n\\nAssistant: ...' up to their
last turn, and their last turns. Left out and counted: equal answers, empty turns, and dialogues that differ before the last turn (the
model went on with turns that it invented). Texts of the harmless subsets are offensive.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset, preference

TURN = re.compile(r'\n\n(Human|Assistant):')
ROLES = {'Human': 'user', 'Assistant': 'assistant'}
NO_DIALOGUE = 'that are no dialogue from Human to Assistant'
NAME = re.compile(r'(.+?)-(train|test)(?:-(.+))?')


class File(NamedTuple):
  path: pathlib.Path
  subset: str
  split: str  # train, test or, where the name does not say, ''
  part: str


def read_name(path: pathlib.Path) -> File:
  stem = path.name.removesuffix('.gz').rpartition('.')[0]
  name = f'{path.parent.name}-{stem}' if stem.startswith(('train', 'test')) else stem
  found = NAME.fullmatch(name.replace('_', '-'))
  return File(path, *(part or '' for part in found.groups())) if found else File(path, name, '', '')


def files(path: str, split: str) -> list[pathlib.Path]:
  """All of both splits: a subset of which there is but one file is split by its rows. The red team's attempts hold no pairs."""
  where = dataset.fetch(path or 'Anthropic/hh-rlhf')
  if where.is_file():
    return [where]
  found = sorted(f for f in where.rglob('*') if f.name.endswith(dataset.ENDINGS) and read_name(f).split)
  check(bool(found), f"config key 'data.path': no file named like helpful-base/train.jsonl.gz or helpful_train.jsonl in {where}")
  return found


def read_dialogue(row: dict, place: str, column: str) -> list[dict[str, str]]:
  """The turns as chat messages."""
  text: Any = row.get(column)
  check(isinstance(text, str), f'{place}: no text column {column!r}; columns: {", ".join(row)}')
  head, *parts = TURN.split('\n\n' + text.lstrip())
  check(bool(parts), f'{place}: column {column!r} has no turn of Human or Assistant')
  if head.strip() or parts[-2] != 'Assistant':
    raise preference.Unusable(NO_DIALOGUE)
  return [{'role': ROLES[speaker], 'content': said.strip()} for speaker, said in zip(parts[::2], parts[1::2], strict=True)]


def joined(messages: list[dict[str, str]]) -> list[dict[str, str]]:
  """Adjacent messages of one speaker as one (a few prompts have two answers in a row): chat templates want speakers who take turns."""
  found = []
  for role, some in itertools.groupby(messages, key=lambda message: message['role']):
    found.append({'role': role, 'content': '\n\n'.join(message['content'] for message in some).strip()})
  return found


def convert(row: dict, place: str) -> dict:
  chosen, rejected = (read_dialogue(row, place, column) for column in ('chosen', 'rejected'))
  if chosen[:-1] != rejected[:-1]:  # before turns are joined: the turns that a model invented are no part of an answer
    raise preference.Unusable(preference.DIFFER)
  prompt = joined(chosen[:-1])
  if not prompt or prompt[0]['role'] != 'user' or prompt[-1]['role'] != 'user':
    raise preference.Unusable(NO_DIALOGUE)
  return {'prompt': prompt, 'responses': [chosen[-1]['content'], rejected[-1]['content']], 'ranks': [0, 1]}


def is_safety(file: File) -> bool:
  kinds = [kind for kind in ('harmless', 'helpful') if kind in file.subset]
  check(len(kinds) == 1, f"config key 'data.options.safety': whether {file.path} is helpful or harmless its name does not say")
  return kinds == ['harmless']


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, subset: str = '', part: str = '', test_share: float = 0.1,
  max_chars: int = 0, safety: bool = False,
) -> Iterator[dict]:  # fmt: skip
  """Rows of a split, in the order of the files; prompts of the test split are left out of training.

  `subset` reads the files of one subset ('helpful-base'), or of those that begin alike ('helpful'); of several training files
  (helpful_train_gt, helpful_train_w2s) `part` reads one ('gt'). A subset of which only one split is there is split by a hash of the prompt:
  `test_share` of its prompts are the test split. `safety` adds the column of that name, True in the harmless subsets (for the combination
  of a helpful and a safe reward model in Llama 2, 2307.09288). `max_chars`: as in tasks.preference.
  """
  preference.check_max_chars(max_chars)
  check(0 < test_share < 1, f"config key 'data.options.test_share': {test_share} is not between 0 and 1")
  every = [read_name(f) for f in files(path, split)]
  wanted = subset.replace('_', '-')
  found = [f for f in every if wanted in ('', f.subset) or f.subset.startswith(wanted + '-')]
  names = ', '.join(sorted({f.subset for f in every}))
  check(bool(found), f"config key 'data.options.subset': {subset!r} begins none of {names}")
  splits = {name: {f.split for f in found if f.subset == name} for name in {f.subset for f in found}}
  mixed = {f.path for f in found if len(splits[f.subset]) == 1}
  check(
    test_share == 0.1 or bool(mixed),
    "config key 'data.options.test_share' cannot act: there is a training file and a test file of each subset",
  )
  if part:
    parts = {f.part for f in found if f.split == 'train'} - {''}
    check(part in parts, f"config key 'data.options.part': {part!r} is none of {', '.join(sorted(parts)) or 'no parts at all'}")
    found = [f for f in found if f.split != 'train' or f.part == part]
  harmful = {str(f.path): is_safety(f) for f in found} if safety else {}

  def find(_: str, name: str) -> list[pathlib.Path]:
    return [f.path for f in found if f.split == name or f.path in mixed]

  def converted(row: dict, place: str) -> dict:
    marked = {'safety': harmful[place.rpartition(':')[0]]} if safety else {}
    return {**preference.sift(convert(row, place), max_chars), **marked}

  left_out = preference.LeftOut()
  yield from dataset.split_rows(split, size, path, find, left_out.counted(converted), mixed.__contains__, test_share)
  left_out.report(find(path, split))
