"""Chained arithmetic: '12+7-5=' -> '12+7=19;19-5=14' -> 14. A problem is a function of (seed, split, index).

Beside clean chains, rows can be written in the styles of a careless author, which make a base model with something left to learn; and in
two written languages, told apart by the word that opens a step ('then7+9=16;то16-3=13'), which he may mix within a chain.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence

from rl_reasoning.config import check
from rl_reasoning.tasks.procedural import problems

STYLES = ('clean', 'sloppy', 'direct')
OPENINGS = {'en': 'then', 'ru': 'то'}  # of as many bytes, so that no language is the shorter one


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


def worked(
  numbers: list[int], operators: list[str], rng: random.Random, errs: Sequence[float], languages: Sequence[str]
) -> tuple[str, int]:
  """(chain of thought, its result): step n is in languages[n] ('': none) and careless with probability errs[n]; the next goes on from what
  it gave."""
  steps, value = [], numbers[0]
  for operator, number, err, language in zip(operators, numbers[1:], errs, languages, strict=True):
    result = (careless if rng.random() < err else apply)(value, operator, number)
    steps.append(f'{OPENINGS.get(language, "")}{value}{operator}{number}={result}')
    value = result
  return ';'.join(steps), value


def choose_languages(weights: Mapping[str, float], mixing: float, steps: int, rng: random.Random) -> list[str]:
  """The language of each step: that of the chain, or with probability `mixing` one drawn anew."""
  if not weights:
    return [''] * steps
  names, shares = sorted(weights), [weights[name] for name in sorted(weights)]
  own = rng.choices(names, shares)[0]
  return [rng.choices(names, shares)[0] if rng.random() < mixing else own for _ in range(steps)]


def check_weights(key: str, weights: Mapping[str, float], known: Collection[str]) -> None:
  for name in weights:
    check(name in known, f"config key 'data.options.{key}.{name}' is none of {', '.join(known)}")
  check(
    min(weights.values()) >= 0 < sum(weights.values()), f"config key 'data.options.{key}': weights are >= 0, and one is positive"
  )


def rows(split: str, seed: int, size: int | None, path: str = '', *, operands: int = 3, low: int = 2, high: int = 15, operators: str = '+-',
         styles: Mapping[str, float] | None = None, sloppiness: float | Mapping[str, float | Mapping[str, float]] = 0.6,
         languages: Mapping[str, float] | None = None, mixing: float = 0.0) -> Iterator[dict]:  # fmt: skip
  """`size` rows {prompt, chain_of_thought, completion, answer, difficulty: operands}; test problems are distinct, others may repeat.

  `styles` weighs how training rows are written (default: all clean): 'sloppy' errs by `sloppiness`, 'direct' does too and shows no chain.
  `languages` weighs in what a chain is written (en, ru; default: signs alone), and a step of it is in one drawn anew with probability
  `mixing`; `sloppiness` may then be a number a language, or one for each operator in each, so that it pays to mix. `answer` is right in
  every style.
  """
  given, spoken = dict(styles or {'clean': 1.0}), dict(languages or {})
  check_weights('styles', given, STYLES)
  if spoken:
    check_weights('languages', spoken, OPENINGS)
  weights = [given.get(name, 0.0) for name in STYLES]  # in one order: that of the config's keys must not matter
  check(operands >= 2, f"config key 'data.options.operands': {operands} must be at least 2")
  check(0 <= low <= high, f"config key 'data.options.low': {low} is not within 0 and high = {high}")
  check(
    bool(operators) and set(operators) <= set('+-*'), f"config key 'data.options.operators': {operators!r} has others than + - *"
  )
  check(0 <= mixing <= 1, f"config key 'data.options.mixing': {mixing} is not in [0, 1]")
  check(mixing == 0 or len(spoken) > 1, "config key 'data.options.mixing' cannot act: data.options.languages has not two to mix")
  rates = dict(sloppiness) if isinstance(sloppiness, Mapping) else dict.fromkeys(spoken or ('',), sloppiness)
  check(
    set(rates) == set(spoken or ('',)),
    f"config key 'data.options.sloppiness': {sloppiness!r} has not one number for each of data.options.languages",
  )
  by_operator = {name: dict(r) if isinstance(r, Mapping) else dict.fromkeys(operators, r) for name, r in rates.items()}
  for name, of in by_operator.items():
    check(
      set(of) == set(operators),
      f"config key 'data.options.sloppiness.{name}': {rates[name]!r} has not one number for each of data.options.operators",
    )
    for value in of.values():
      check(0 <= value <= 1, f"config key 'data.options.sloppiness': {value} is not in [0, 1]")

  def propose(rng: random.Random) -> dict:
    numbers = [rng.randint(low, high) for _ in range(operands)]
    chosen = [rng.choice(operators) for _ in range(operands - 1)]
    prompt = str(numbers[0]) + ''.join(o + str(n) for o, n in zip(chosen, numbers[1:], strict=True)) + '='
    return {'prompt': prompt, 'numbers': numbers, 'operators': chosen}

  for problem, rng in problems('arithmetic', split, seed, size, 'operands, low or high', propose):
    numbers, chosen = problem['numbers'], problem['operators']
    style = rng.choices(STYLES, weights)[0] if split == 'train' else 'clean'
    in_words = choose_languages(spoken, mixing, len(chosen), rng)
    errs = [0.0 if style == 'clean' else by_operator[name][o] for name, o in zip(in_words, chosen, strict=True)]
    chain, result = worked(numbers, chosen, rng, errs, in_words)
    right = numbers[0]
    for operator, number in zip(chosen, numbers[1:], strict=True):
      right = apply(right, operator, number)
    yield {
      'prompt': problem['prompt'],
      'chain_of_thought': '' if style == 'direct' else chain,
      'completion': str(result),
      'answer': str(right),
      'difficulty': operands,
    }
