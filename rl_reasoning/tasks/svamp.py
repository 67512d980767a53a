"""SVAMP (2103.07191): one-step word problems that vary a story so that pattern matching fails.

From a folder or file with columns Body, Question, Equation, Answer, or from the hub (ChilleD/SVAMP, 700 training and 300 test rows).
Stories of this kind without any file: the task `word_problems`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from fractions import Fraction

from rl_reasoning.config import ConfigError, check
from rl_reasoning.tasks import dataset
from rl_reasoning.verify.math import arithmetic_value, parse_number


def files(path: str, split: str) -> list[pathlib.Path]:
  return dataset.files(path or 'ChilleD/SVAMP', split)


def chain_of(equation: object, answer: Fraction, written: str) -> str:
  """'( 8.0 - 3.0 )' -> '8-3=5'; '' for an equation that does not come to the answer: it would teach what is wrong."""
  text = re.sub(r'(?<=[0-9])\.0+(?![0-9])|\s', '', str(equation))
  found = arithmetic_value(text)
  if found is None or found[0] != answer:
    return ''
  whole = re.fullmatch(r'\(([^()]*)\)', text)
  return f'{whole[1] if whole else text}={written}'


def convert(row: dict, place: str) -> dict:
  """{Body, Question, Equation, Answer} -> {prompt, chain_of_thought, completion, answer, answer_kind}."""
  body, question = row.get('Body'), row.get('Question')
  check(isinstance(body, str) and isinstance(question, str), f"{place}: no text columns 'Body' and 'Question'")
  answer = parse_number(str(row.get('Answer')))
  if answer is None:
    raise ConfigError(f"{place}: column 'Answer' is {row.get('Answer')!r}, no number")
  body = str(body).strip()
  text = str(answer) if answer.denominator == 1 else str(row['Answer']).strip()  # 5.0 is 5 people
  return {
    'prompt': f'{body}{"" if body.endswith((".", "!", "?", ",")) else "."} {str(question).strip()}',
    'chain_of_thought': chain_of(row.get('Equation'), answer, text),
    'completion': text,
    'answer': text,
    'answer_kind': 'number',
  }


def rows(split: str, seed: int, size: int | None, path: str = '') -> Iterator[dict]:
  yield from dataset.split_rows(split, size, path, files, convert)
