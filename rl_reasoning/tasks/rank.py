"""Rankings made by hand, at a terminal: `python -m rl_reasoning.tasks rank FILE`.

FILE has rows of prompt and responses, as `datagen` with keep 'all' writes them. Each row is shown with its different responses in an order
of its own, so that no place is favoured, and a ranking of them becomes at once one line of the output: prompt, responses, ranks (0 is the
best, equal is a tie), and whose ranking it is (ranked_by), in what order they were shown, and of which row (a hash of prompt and
responses, by which a later session knows what is done).
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pathlib
import random
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from rl_reasoning.config import ConfigError, check, digest
from rl_reasoning.tasks import dataset
from rl_reasoning.tasks.preference import read_prompt, read_texts, turns_of

HELP = "rank them as in '2 1=3' (best first, = for a tie) | s skip | u undo | q quit"
BEGINNING = b'{"prompt": '
JOINERS = '\u200c\u200d'  # of letters and of emoji


class Item(NamedTuple):
  key: str
  prompt: str | list[dict]
  responses: list[str]  # those that say something, each once


def read_items(path: pathlib.Path) -> tuple[list[Item], int]:
  """(rows to rank, how many have nothing to compare or an empty turn). A row that stands twice counts once. Raises ConfigError naming file
  and line."""
  check(path.is_file(), f'{path}: no such file')
  items: dict[str, Item] = {}
  unusable = 0
  for place, row in dataset.read(path):
    check(row.get('responses') is not None, f'{place}: no responses; columns: {", ".join(row)}')
    prompt, texts = read_prompt(row, place), read_texts(row, place, 'responses')
    distinct: dict[str, str] = {}
    for text in filter(str.strip, texts):
      distinct.setdefault(text.strip(), text)
    if len(distinct) < 2 or not all(turn.strip() for turn in turns_of(prompt)):
      unusable += 1
      continue
    key = digest([prompt, texts])
    items[key] = Item(key, prompt, list(distinct.values()))
  check(bool(items), f'{path}: no row has two different responses')
  return list(items.values()), unusable


def shuffled(item: Item, seed: int) -> list[int]:
  """The responses in the order in which they are shown: a function of seed and row."""
  order = list(range(len(item.responses)))
  random.Random(f'rank/{seed}/{item.key}').shuffle(order)
  return order


def read_answer(text: str, count: int) -> list[list[int]] | None:
  """'2 1=3' -> [[1], [0, 2]], places from the best to the worst; None unless it names each of 1 to `count` once."""
  numbers = {str(n + 1): n for n in range(count)}
  groups = [group.split('=') for group in re.sub(r'\s*=\s*', '=', text.replace('>', ' ')).split()]
  named = list(itertools.chain(*groups))
  if sorted(named) != sorted(numbers):
    return None
  return [[numbers[name] for name in group] for group in groups]


def visible(text: str) -> str:
  """The text without what would steer a terminal or reorder what it shows: such characters are written as escapes."""

  def shown(c: str) -> str:
    harmless = c in '\n\t' or c in JOINERS or unicodedata.category(c) not in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
    return c if harmless else c.encode('unicode_escape').decode()

  return ''.join(map(shown, text))


def framed(text: str) -> str:
  """With a bar before every line, which no text can leave to look like another response."""
  return '\n'.join(f'  | {line}' for line in visible(text).split('\n'))


def show(item: Item, order: Sequence[int]) -> str:
  turns = [('prompt', item.prompt)] if isinstance(item.prompt, str) else [(m['role'], m['content']) for m in item.prompt]
  parts = [f'{visible(name)}:\n{framed(text)}' for name, text in turns]
  parts += [f'[{n}]\n{framed(item.responses[index])}' for n, index in enumerate(order, 1)]
  return '\n\n'.join(parts)


class Ranked:
  """The output: a line a ranking, written through before the next is asked for. Use as a context.

  Raises ConfigError for a file that is not of this tool, and for one into which another session is writing. A line that was cut (a full
  disk, a lost machine) is taken off again.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.history: list[tuple[str, int]] = []  # (row, where its line begins), in the order of the file

  def __enter__(self) -> Ranked:
    try:
      self.file = self.path.open('a+b', buffering=0)
    except OSError as error:
      raise ConfigError(f'--out={self.path}: {error}') from None
    try:
      fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self.load()
    except BaseException as error:
      self.file.close()
      check(not isinstance(error, BlockingIOError), f'--out={self.path}: another session is ranking into it')
      raise
    return self

  def __exit__(self, *_) -> None:
    self.file.close()

  def load(self) -> None:
    self.file.seek(0)
    *lines, tail = self.file.read().split(b'\n')
    start = 0
    for number, line in enumerate(lines, 1):
      self.history.append((self.read_row(line, number), start))
      start += len(line) + 1
    if not tail:
      return
    try:
      row = self.read_row(tail, len(lines) + 1)
    except ConfigError:
      if not (tail.startswith(BEGINNING) or BEGINNING.startswith(tail)):
        raise
      print(f'{self.path}:{len(lines) + 1}: the line was cut and is taken off; its row is asked again', file=sys.stderr)
      self.file.truncate(start)
      return
    self.history.append((row, start))
    self.write(b'\n')

  def read_row(self, line: bytes, number: int) -> str:
    try:
      row: Any = json.loads(line)['row']
      check(isinstance(row, str), 'no hash')
    except (ValueError, KeyError, TypeError):
      raise ConfigError(f'{self.path}:{number}: no ranking of this tool; name another file by --out') from None
    return row

  def write(self, data: bytes) -> None:
    try:
      while data:
        data = data[self.file.write(data) :]
      os.fsync(self.file.fileno())
    except OSError as error:
      raise ConfigError(f'--out={self.path}: {error}') from None

  def append(self, row: dict) -> None:
    start = self.file.seek(0, os.SEEK_END)
    self.write(json.dumps(row).encode() + b'\n')
    self.history.append((row['row'], start))

  def undo(self) -> None:
    """Takes the last line off."""
    _, start = self.history.pop()
    self.file.truncate(start)


def ranking(item: Item, order: Sequence[int], groups: Sequence[Sequence[int]], ranked_by: str) -> dict:
  """The line of the output. `groups` count the responses as shown."""
  ranks = [0] * len(order)
  for rank, group in enumerate(groups):
    for place in group:
      ranks[order[place]] = rank
  return {
    'prompt': item.prompt, 'responses': item.responses, 'ranks': ranks, 'ranked_by': ranked_by, 'shown': list(order), 'row': item.key,
  }  # fmt: skip


def ask(count: int, letters: str) -> str | list[list[int]]:
  """A ranking of `count` responses or one of the letters; the end of the input is a 'q'. What is none of them is asked again."""
  while True:
    try:
      answer = input('> ').strip().lower()
    except EOFError:
      return 'q'
    if answer in [*letters]:
      return answer
    if groups := read_answer(answer, count):
      return groups
    wanted = f'name each of 1 to {count} once, or ' if count else ''
    print('there is nothing to undo' if answer == 'u' else f'that is no ranking: {wanted}one of {", ".join(letters)}')


def rank(path: pathlib.Path, out: pathlib.Path, seed: int, ranked_by: str) -> None:
  """A session: asks about every row that has no ranking yet, until 'q' or the end of the input.

  'u' takes back the last answer, of an earlier session too; rows skipped by 's' are asked again in the next one.
  """
  items, unusable = read_items(path)
  known = {item.key: item for item in items}
  if unusable:
    print(f'{path}: {unusable:,} rows are left out: fewer than two different responses, or an empty turn')
  with Ranked(out) as ranked:
    answered = [(known.get(key), True) for key, _ in ranked.history]  # (None for a row of another file, is it in the output?)
    done = {key for key, _ in ranked.history}
    todo = [item for item in reversed(items) if item.key not in done]  # the next one at the end
    while True:
      order = shuffled(todo[-1], seed) if todo else []
      if todo:
        print(f'\n--- {len(items) - len(todo) + 1} of {len(items)} ---\n\n{show(todo[-1], order)}\n\n{HELP}')
      else:
        print('\nthat was the last | u undo | q quit')
      last = answered[-1][0] if answered else None
      answer = ask(len(order), 's' * bool(todo) + 'u' * bool(last) + 'q')
      if answer == 'q':
        break
      if answer == 'u' and last:
        todo.append(last)
        if answered.pop()[1]:
          ranked.undo()
        continue
      if isinstance(answer, list):
        ranked.append(ranking(todo[-1], order, answer, ranked_by))
      answered.append((todo.pop(), isinstance(answer, list)))
    left = known.keys() - {key for key, _ in ranked.history}
    print(f'\n{out}: {len(ranked.history):,} rankings; {len(left):,} rows of {path} have none yet')
