"""Countdown: combine given numbers, each once, by + - * / to a target. A problem is a function of (seed, split, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks.arithmetic import apply
from rl_reasoning.tasks.procedural import problems


def build(rng: random.Random, count: int, high: int) -> tuple[list[int], str, str, int]:
  """(numbers, chain of thought, expression, target): joins numbers two by two, every value between a positive whole number."""
  numbers = [rng.randint(1, high) for _ in range(count)]
  parts, steps = [(n, str(n)) for n in numbers], []
  while len(parts) > 1:
    rng.shuffle(parts)
    (a, left), (b, right), *parts = parts
    if a < b:
      a, left, b, right = b, right, a, left
    allowed = ['+', '*'] + ['-'] * (a > b) + ['/'] * (a % b == 0)
    operator = rng.choice(allowed)
    value = a // b if operator == '/' else apply(a, operator, b)
    steps.append(f'{a}{operator}{b}={value}')
    parts.append((value, f'({left}{operator}{right})'))
  value, expression = parts[0]
  return numbers, ';'.join(steps), expression[1:-1], value


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, count: int = 3, high: int = 20, max_target: int = 100
) -> Iterator[dict]:
  """`size` rows {prompt, chain_of_thought, completion, numbers, target, difficulty: count}; `completion` is one right expression."""
  check(count >= 2, f"config key 'data.options.count': {count} must be at least 2")
  check(max_target >= 1, f"config key 'data.options.max_target': {max_target} must be at least 1")
  check(high >= 1, f"config key 'data.options.high': {high} must be at least 1")

  def propose(rng: random.Random) -> dict | None:
    numbers, chain, expression, target = build(rng, count, high)
    prompt = f'{",".join(map(str, sorted(numbers)))}->{target}:'
    row = {'prompt': prompt, 'chain_of_thought': chain, 'completion': expression, 'numbers': numbers, 'target': target}
    return {**row, 'difficulty': count} if target <= max_target else None

  for row, _ in problems('countdown', split, seed, size, 'count, high or max_target', propose):
    yield row
