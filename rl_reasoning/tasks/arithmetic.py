"""Chained arithmetic: '12+7-5=' -> '12+7=19;19-5=14' -> 14. A problem is a function of (seed, split, index).

Beside clean chains, rows can be written in the styles of a careless author, which make a base model with something left to learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems

STYLES = ('clean', 'sloppy', 'direct')


def apply(a: int, operator: str, b: int) -> int:
  return a + b if operator == '+' else a - b if operator == '-' else a * b


def careless(a: int, operator: str, b: int) -> int:
  """The result of one who forgets to carry or to borrow: 17+5 = 12, 21-4 = 27 (digits right, tens not adjusted)."""
  if operator == '-' and 0 <= a < b:
    return -careless(b, '-', a)
  if operator == '+' and a >= 0:
    return apply(a, '+', b) - (10 if a % 10 + b % 10 >= 10 else 0)
  if operator == '-' and a >= b:
    return apply(a, '-', b) + (10 if a % 10 < b % 10 else 0)
  return apply(a, operator, b)


def worked(numbers: list[int], operators: list[str], rng: random.Random, sloppiness: float) -> tuple[str, int]:
  """(chain of thought, its result): each step is careless with probability `sloppiness`, and the next goes on from what it gave."""
  steps, value = [], numbers[0]
  for operator, number in zip(operators, numbers[1:], strict=True):
    result = (careless if rng.random() < sloppiness else apply)(value, operator, number)
    steps.append(f'{value}{operator}{number}={result}')
    value = result
  return ';'.join(steps), value


def rows(split: str, seed: int, size: int | None, path: str = '', *, operands: int = 3, low: int = 2, high: int = 15, operators: str = '+-',
         styles: Mapping[str, float] | None = None, sloppiness: float = 0.6) -> Iterator[dict]:  # fmt: skip
  """`size` rows {prompt, chain_of_thought, completion, answer, difficulty: operands}; test problems are distinct, others may repeat.

  `styles` weighs how training rows are written (default: all clean): 'sloppy' errs by `sloppiness`, 'direct' does too and shows no chain.
  `answer` is right in every style.
  """
  given = dict(styles or {'clean': 1.0})
  for name in given:
    check(name in STYLES, f"config key 'data.options.styles.{name}' is none of {', '.join(STYLES)}")
  weights = [given.get(name, 0.0) for name in STYLES]  # in one order: that of the config's keys must not matter
  check(min(weights) >= 0 < sum(weights), "config key 'data.options.styles': weights are >= 0, and one is positive")
  check(operands >= 2, f"config key 'data.options.operands': {operands} must be at least 2")
  check(0 <= low <= high, f"config key 'data.options.low': {low} is not within 0 and high = {high}")
  check(
    bool(operators) and set(operators) <= set('+-*'), f"config key 'data.options.operators': {operators!r} has others than + - *"
  )
  check(0 <= sloppiness <= 1, f"config key 'data.options.sloppiness': {sloppiness} is not in [0, 1]")

  def propose(rng: random.Random) -> dict:
    numbers = [rng.randint(low, high) for _ in range(operands)]
    chosen = [rng.choice(operators) for _ in range(operands - 1)]
    prompt = str(numbers[0]) + ''.join(o + str(n) for o, n in zip(chosen, numbers[1:], strict=True)) + '='
    return {'prompt': prompt, 'numbers': numbers, 'operators': chosen}

  for problem, rng in problems('arithmetic', split, seed, size, 'operands, low or high', propose):
    numbers, chosen = problem['numbers'], problem['operators']
    style = rng.choices(STYLES, weights)[0] if split == 'train' else 'clean'
    chain, result = worked(numbers, chosen, rng, 0 if style == 'clean' else sloppiness)
    right = worked(numbers, chosen, rng, 0)[1]
    yield {
      'prompt': problem['prompt'],
      'chain_of_thought': '' if style == 'direct' else chain,
      'completion': str(result),
      'answer': str(right),
      'difficulty': operands,
    }
