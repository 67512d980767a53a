"""Expressions, compared by math-verify: runs in worker processes only (verify/pool.py), which stop what takes too long or too much.

Its parser and its comparison are used without its extraction, its time-outs (signal.alarm) and its tolerance (0.333333 for 1/3): see
verify/answers.py for what has been refused before.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from rl_reasoning.verify import answers

logging.disable(logging.WARNING)  # that its time-outs are off
CONFIG = LatexExtractionConfig(
  boxed_match_priority=-1,
  normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed='none', equations=False
  ),
)
FLIPPED = {sympy.StrictLessThan: sympy.StrictGreaterThan, sympy.LessThan: sympy.GreaterThan}
FLIPPED |= {value: key for key, value in FLIPPED.items()}


class Unreadable(Exception):
  pass


def variables(text: str) -> set[str]:
  return set(re.findall('[A-Za-z]', re.sub(r'\\[A-Za-z]+', ' ', text)))


@functools.lru_cache(256)
def read(text: str) -> Any:
  """A sympy object, or None. Decimals are exact: 0.333333 is not 1/3. The parser takes X for x: a text with both is None."""
  if len(variables(text)) > len(variables(text.lower())):
    return None
  found = parse(f'${text}$', [CONFIG], fallback_mode='no_fallback', extraction_mode='first_match', parsing_timeout=None)  # type: ignore
  if len(found) != 1 or isinstance(found[0], str):
    return None
  value: Any = found[0]
  floats = value.atoms(sympy.Float) if isinstance(value, sympy.Basic) else ()
  return value.xreplace({x: sympy.Rational(str(x)) for x in floats}) if floats else value


def relations(value: Any) -> list[Relational] | None:
  """The relations of x < 5, or 1 < x < 5, or None."""
  if isinstance(value, Relational):
    return [value]
  parts = getattr(value, '_unsorted_args', ())  # latex2sympy's And
  return list(parts) if parts and all(isinstance(part, Relational) for part in parts) else None


def same_relation(gold: Any, other: Any) -> bool:
  """Whether one is the other times a number: 2x + 4 = 2y and y - x = 2, 5 > x and x < 5."""
  mine, theirs = sympy.simplify(gold.lhs - gold.rhs), sympy.simplify(other.lhs - other.rhs)
  if not mine.free_symbols or mine.free_symbols != theirs.free_symbols:
    return False  # 0 = 0 says nothing
  ratio = sympy.simplify(mine / theirs)
  if ratio.free_symbols or not ratio.is_real or ratio == 0:
    return False
  return isinstance(other, gold.func if ratio > 0 else FLIPPED.get(gold.func, gold.func))


def equal(gold: str, answer: str) -> bool:
  """Raises Unreadable where the gold answer is."""
  expected, found = read(gold), read(answer)
  if expected is None:
    raise Unreadable
  names, others = variables(gold), variables(answer)
  infinite = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
  if hasattr(found, 'has') and found.has(*infinite) and not (hasattr(expected, 'has') and expected.has(*infinite)):
    return False  # a product with oo has been seen to equal a root: sympy's verdicts on these are not to be relied on
  if found is None or (names != others and {x.lower() for x in names} == {x.lower() for x in others}):
    return False
  mine, theirs = relations(expected), relations(found)
  if mine is not None and theirs is not None:
    left = list(theirs)
    for relation in mine:
      same = next((other for other in left if same_relation(relation, other)), None)
      if same is None:
        return False
      left.remove(same)
    return not left
  if mine is not None or theirs is not None:
    return False
  if {getattr(expected, 'is_rational', None), getattr(found, 'is_rational', None)} == {True, False}:
    return False  # 15 digits of a root are not the root
  return verify(expected, found, timeout_seconds=None)


def can_read(gold: str, kind: str) -> bool:
  return answers.readable(gold, kind, lambda text: read(text) is not None)


def judge(gold: str, answer: str, kind: str) -> bool:
  return answers.decide(gold, answer, kind, equal)


equal('x^2', '\\frac{1}{2}')  # builds the parser's tables: 0.2 s that are not the first answer's
