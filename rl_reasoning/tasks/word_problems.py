"""Word problems in the style of SVAMP (2103.07191) that need no file: 'Ann has 4 boxes with 6 pens in each. ... How many pens ...?'

A story starts with a number of things, then some are given or taken; it may ask for what was there at first (to be worked out backwards),
or for bags; sentences about other things carry numbers that play no part. A problem is a function of (seed, split, index).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems

NAMES = ('Ann', 'Ben', 'Carla', 'David', 'Emma', 'Farid', 'Grace', 'Hugo', 'Ines', 'Jonas', 'Kim', 'Lena', 'Mara', 'Noah', 'Olga')
THINGS = ('apples', 'books', 'cards', 'coins', 'eggs', 'marbles', 'pencils', 'plums', 'shells', 'stamps', 'stickers', 'toys')
GAINS = ('buys {n} more {things}', 'finds {n} {things}', 'gets {n} {things} from {other}')
LOSSES = ('gives {n} {things} to {other}', 'loses {n} {things}', 'sells {n} {things}')


def story(rng: random.Random, steps: int, high: int, distractors: float) -> dict | None:
  """A problem of exactly `steps` operations; None where the numbers drawn do not work out (nothing left, bags that are not full)."""
  name, other, third = rng.sample(NAMES, 3)
  things, else_things = rng.sample(THINGS, 2)

  def number() -> int:
    return rng.randint(2, high)

  start, end = rng.choice(('count', 'boxes', 'more', 'fewer')), rng.choice(('now', 'first', 'bags'))
  n, m = number(), number()
  opening, value, chain = {
    'count': ([f'{name} has {n} {things}.'], n, []),
    'boxes': ([f'{name} has {m} boxes with {n} {things} in each.'], m * n, [f'{m}*{n}={m * n}']),
    'more': ([f'{other} has {n} {things}.', f'{name} has {m} more {things} than {other}.'], n + m, [f'{n}+{m}={n + m}']),
    'fewer': ([f'{other} has {n} {things}.', f'{name} has {m} fewer {things} than {other}.'], n - m, [f'{n}-{m}={n - m}']),
  }[start]
  events = steps - len(chain) - (end == 'bags')
  if value < 1 or events < 0 or (end == 'first' and (start != 'count' or not events)):
    return None
  first, sentences, backwards = value, list(opening), []
  for _ in range(events):
    n, gains = number(), rng.random() < 0.5
    before, value = value, value + n if gains else value - n
    if value < 1:
      return None
    text = rng.choice(GAINS if gains else LOSSES).format(n=n, things=things, other=third)
    sentences.append(f'{name} {text}.')
    chain.append(f'{before}{"+" if gains else "-"}{n}={value}')
    backwards.append(f'{value}{"-" if gains else "+"}{n}={before}')
  question, answer = f'How many {things} does {name} have now?', value
  if end == 'first':
    sentences[0] = f'{name} has some {things}.'
    sentences.append(f'Now {name} has {value} {things}.')
    question, answer, chain = f'How many {things} did {name} have at first?', first, backwards[::-1]
  if end == 'bags':
    sizes = [k for k in range(2, min(high, value - 1) + 1) if value % k == 0]
    if not sizes:
      return None
    size = rng.choice(sizes)
    sentences.append(f'{name} packs all of them into bags of {size}.')
    question, answer = f'How many bags does {name} fill?', value // size
    chain.append(f'{value}/{size}={answer}')
  if rng.random() < distractors:
    # Anywhere but before 'all of them', which must go on meaning the things.
    sentences.insert(rng.randint(1, len(sentences) - (end == 'bags')), f'{third} has {number()} {else_things}.')
  return {
    'prompt': ' '.join([*sentences, question]),
    'chain_of_thought': ';'.join(chain),
    'completion': str(answer),
    'answer': str(answer),
    'answer_kind': 'number',
    'difficulty': steps,
  }


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, steps: int = 2, high: int = 20, distractors: float = 0.5
) -> Iterator[dict]:
  """`size` rows of `steps` operations on numbers up to `high`; a share `distractors` has a sentence with a number that plays no part."""
  check(1 <= steps <= 20, f"config key 'data.options.steps': {steps} is not within 1 and 20")
  check(high >= 2, f"config key 'data.options.high': {high} must be at least 2")
  check(0 <= distractors <= 1, f"config key 'data.options.distractors': {distractors} is not in [0, 1]")
  for row, _ in problems('word_problems', split, seed, size, 'high', lambda rng: story(rng, steps, high, distractors)):
    yield row
