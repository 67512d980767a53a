"""Linear equations: '5x-3=2x+9' -> '5x-2x=9+3;3x=12;x=12/3;x=4' -> 4. A problem is a function of (seed, split, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems


def term(coefficient: int) -> str:
  """3 -> '3x', 1 -> 'x', -1 -> '-x'."""
  return {1: '', -1: '-'}.get(coefficient, str(coefficient)) + 'x'


def side(coefficient: int, constant: int) -> str:
  """(3, -5) -> '3x-5'; what is zero is not written."""
  if not coefficient:
    return str(constant)
  return term(coefficient) + (f'{constant:+d}' if constant else '')


def solve(a: int, b: int, c: int, d: int) -> tuple[str, Fraction]:
  """(chain of thought, x) of ax + b = cx + d, a step a line of algebra."""
  left = term(a) + (('-' if c > 0 else '+') + term(abs(c)) if c else '')
  right = str(d) + (f'{-b:+d}' if b else '')
  steps = [f'{left}={right}', f'{term(a - c)}={d - b}', f'x={d - b}/{a - c}', f'x={Fraction(d - b, a - c)}']
  steps = [step for n, step in enumerate(steps) if step not in steps[:n]]  # one that changed nothing
  if a - c == 1:
    steps.remove(f'x={d - b}/1')
  return ';'.join(steps), Fraction(d - b, a - c)


def rows(split: str, seed: int, size: int | None, path: str = '', *, high: int = 10, fractions: bool = False) -> Iterator[dict]:
  """`size` rows {prompt, chain_of_thought, completion, answer, answer_kind, difficulty: 'integer' or 'fraction'}.

  Coefficients are whole numbers from -high to high. Solutions are whole numbers in this range; with `fractions` every solution is a
  fraction in lowest terms ('-7/3').
  """
  check(high >= 2, f"config key 'data.options.high': {high} must be at least 2")

  def propose(rng: random.Random) -> dict | None:
    a, b, c, d = (rng.randint(-high, high) for _ in range(4))
    if a in (0, c):
      return None
    if not fractions:
      d = (a - c) * rng.randint(-high, high) + b
    chain, x = solve(a, b, c, d)
    if (x.denominator == 1) == fractions:
      return None
    return {
      'prompt': f'{side(a, b)}={side(c, d)}',
      'chain_of_thought': chain,
      'completion': str(x),
      'answer': str(x),
      'answer_kind': 'number',
      'difficulty': 'fraction' if fractions else 'integer',
    }

  for row, _ in problems('linear', split, seed, size, 'high', propose):
    yield row
