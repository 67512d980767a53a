"""Knights and knaves (Smullyan): knights always tell the truth, knaves always lie; who is what? A problem is a function of (seed, split,
index), and exactly one assignment fits it: all of them are tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems

NAMES = ('Ann', 'Ben', 'Cara', 'Dan', 'Eva', 'Finn', 'Gina', 'Hal')
PREAMBLE = 'Knights always tell the truth, knaves always lie.'
QUESTION = 'Who are the knights? Name them, separated by commas, or say none.'

Assignment = tuple[bool, ...]  # per person, whether a knight


class Statement(NamedTuple):
  text: str
  holds: Callable[[Assignment], bool]


def kind(knight: bool) -> str:
  return 'a knight' if knight else 'a knave'


def propose_statement(rng: random.Random, speaker: int, people: int) -> Statement:
  """Something that one of the people may say; about the others, or how many knights there are in all."""
  i, *rest = rng.sample([p for p in range(people) if p != speaker], min(2, people - 1))
  j = rest[0] if rest else speaker  # of two people the speaker is the second of a pair
  a, b = (rng.random() < 0.5 for _ in range(2))
  x, y = NAMES[i], 'I' if j == speaker else NAMES[j]
  verb = 'am' if j == speaker else 'is'
  count = rng.randint(0, people)
  return rng.choice((
    Statement(f'{x} is {kind(a)}', lambda k: k[i] == a),
    Statement(f'{x} is {kind(a)} and {y} {verb} {kind(b)}', lambda k: k[i] == a and k[j] == b),
    Statement(f'{x} is {kind(a)} or {y} {verb} {kind(b)}', lambda k: k[i] == a or k[j] == b),
    Statement(f'if {x} is {kind(a)}, then {y} {verb} {kind(b)}', lambda k: k[i] != a or k[j] == b),
    Statement(f'{x} and {y} are of the same kind' if a else f'{x} and {y} are of different kinds', lambda k: (k[i] == k[j]) == a),
    Statement(f'exactly {count} of us {"is a knight" if count == 1 else "are knights"}', lambda k: sum(k) == count),
  ))  # fmt: skip


def fits(statements: list[Statement], knights: Assignment) -> bool:
  return all(s.holds(knights) == knight for s, knight in zip(statements, knights, strict=True))


def worked(statements: list[Statement], known: Assignment = ()) -> tuple[list[str], bool]:
  """(chain of thought, whether the assignment was found): people are supposed to be knights, then knaves, one after the other, until
  someone of them would say what their kind cannot."""
  people = len(statements)
  supposed = ' and '.join(f'{NAMES[p]} is {kind(knight)}' for p, knight in enumerate(known))
  rests = [known + rest for rest in itertools.product((True, False), repeat=people - len(known))]
  for person, knight in enumerate(known):
    if not any(statements[person].holds(k) == knight for k in rests):
      return [f'If {supposed}, then {NAMES[person]} {"lies" if knight else "tells the truth"}, contradiction.'], False
  if len(known) == people:
    return [f'If {supposed}, then all fits.'], True
  lines: list[str] = []
  for knight in (True, False):
    more, found = worked(statements, (*known, knight))
    lines += more
    if found:
      return lines, True
  return lines, False


def rows(split: str, seed: int, size: int | None, path: str = '', *, people: int = 3) -> Iterator[dict]:
  """`size` rows {prompt, chain_of_thought, completion, answer, answer_kind, difficulty: people}.

  The answer names the knights in the order of the problem, 'Ann, Cara', or is 'none'; as a set, their order does not matter.
  """
  check(2 <= people <= len(NAMES), f"config key 'data.options.people': {people} is not within 2 and {len(NAMES)}")

  def propose(rng: random.Random) -> dict | None:
    truth = tuple(rng.random() < 0.5 for _ in range(people))
    statements = []
    for speaker, knight in enumerate(truth):
      said = propose_statement(rng, speaker, people)
      while said.holds(truth) != knight:
        said = propose_statement(rng, speaker, people)
      statements.append(said)
    if sum(fits(statements, k) for k in itertools.product((True, False), repeat=people)) != 1:
      return None
    lines = [f'{NAMES[p]} says: "{s.text[0].upper()}{s.text[1:]}."' for p, s in enumerate(statements)]
    return {'prompt': ' '.join([PREAMBLE, *lines, QUESTION]), 'statements': statements, 'truth': truth}

  for puzzle, _ in problems('knights_knaves', split, seed, size, 'people', propose):
    answer = ', '.join(itertools.compress(NAMES, puzzle['truth'])) or 'none'
    yield {
      'prompt': puzzle['prompt'],
      'chain_of_thought': '\n'.join(worked(puzzle['statements'])[0]),
      'completion': answer,
      'answer': answer,
      'answer_kind': 'set',
      'difficulty': people,
    }
