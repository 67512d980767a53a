"""Base conversion: 'Convert 1a from base 16 to base 3.' -> '1;1*16+10=26;26=8*3+2;8=2*3+2;2=0*3+2' -> 222.

A problem is a function of (seed, split, index). An answer is compared as digits: as numbers, 10 in base 2 and 10 in base 8 are equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems

DIGITS = '0123456789abcdef'


def write(value: int, base: int) -> str:
  digits = ''
  while value:
    value, digit = divmod(value, base)
    digits = DIGITS[digit] + digits
  return digits or '0'


def worked(value: int, source: int, target: int) -> str:
  """Into a decimal number digit by digit (Horner), then out of it by division: its remainders are the digits from the last to the first."""
  steps = []
  if source != 10:
    total = 0
    for n, digit in enumerate(write(value, source)):
      before, total = total, total * source + DIGITS.index(digit)
      steps.append(f'{before}*{source}+{DIGITS.index(digit)}={total}' if n else str(total))
  if target != 10:
    while value:
      steps.append(f'{value}={value // target}*{target}+{value % target}')
      value //= target
  return ';'.join(steps)


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, low_base: int = 2, high_base: int = 16, high: int = 255
) -> Iterator[dict]:
  """`size` rows {prompt, chain_of_thought, completion, answer, answer_kind, difficulty: digits of the answer}.

  The numbers are 1 to `high`, the two bases differ and are between `low_base` and `high_base`; letters are lower case.
  """
  check(2 <= low_base <= 15, f"config key 'data.options.low_base': {low_base} is not within 2 and 15")
  check(low_base < high_base <= 16, f"config key 'data.options.high_base': {high_base} is not within low_base + 1 and 16")
  check(high >= 1, f"config key 'data.options.high': {high} must be at least 1")

  def propose(rng: random.Random) -> dict:
    source, target = rng.sample(range(low_base, high_base + 1), 2)
    value = rng.randint(1, high)
    answer = write(value, target)
    return {
      'prompt': f'Convert {write(value, source)} from base {source} to base {target}.',
      'chain_of_thought': worked(value, source, target),
      'completion': answer,
      'answer': answer,
      'answer_kind': 'text',
      'difficulty': len(answer),
    }

  for row, _ in problems('base_conversion', split, seed, size, 'low_base, high_base or high', propose):
    yield row
