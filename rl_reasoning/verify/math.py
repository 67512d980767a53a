"""Numbers in answers: find the one answer, parse it, compare it. Standard library only; never evaluates text of a model."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

LIMIT = 256  # characters of an answer that are looked at; a longer one is wrong
# A sign counts only where no number or letter stands before it: '12-5' is two numbers, '-5' is one.
NUMBER = re.compile(r'(?<![0-9A-Za-z_.)])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+(?:\.[0-9]+)?)?|[0-9]+')
PLAIN = re.compile(r'(-?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(\.[0-9]+)?(?:/([0-9]+))?')
MINUS = re.compile('[\u2212\u2013]')  # the minus sign and the en dash
THOUSANDS = re.compile(r'(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9]{3})')  # LaTeX's ways to write the comma of 1,234
SIGN_OF_MONEY = re.compile(r'-\\?[$€£¥] ?')
DECORATION = re.compile(r'\\(?:text|textbf|mathrm|mathbf|boxed|left|right)(?![A-Za-z])|\\[\[\]()$%,;:! ]|\^\{?\\circ\}?|[$€£¥]')
LOOSE_SIGN = re.compile(r'(?<![0-9A-Za-z)])-[\s({]+[.0-9]')  # '- 5', '-(5)'
HASHES = re.compile(r'####([^\n]*)')


def boxed(text: str) -> list[str]:
  """Contents of every outermost \\boxed{...}, braces counted; an unclosed box gives nothing. One pass, however hostile the text."""
  spans: list[tuple[int, int]] = []
  opened: list[int | None] = []  # for every open brace where its box begins, None for a brace that is no box
  for match in re.finditer(r'(\\boxed\s*)?\{|\}', text):
    if match[0] != '}':
      opened.append(match.end() if match[1] else None)
    elif opened and (start := opened.pop()) is not None:
      while spans and spans[-1][0] > start:  # boxes inside this one
        spans.pop()
      spans.append((start, match.start()))
  return [text[start:end] for start, end in spans]


def answer_elements(text: str) -> list[str]:
  """Contents of every <answer>...</answer>."""
  closed = text[: text.rfind('</answer>') + len('</answer>')]  # behind the last end tag every start tag would search in vain
  return re.findall(r'<answer>(.*?)</answer>', closed, re.DOTALL)


def plain_signs(text: str) -> str:
  """Without what only dresses a number: signs of currency and percent, LaTeX around it, other dashes for the minus."""
  text = THOUSANDS.sub(',', MINUS.sub('-', text))
  return DECORATION.sub(' ', SIGN_OF_MONEY.sub('-', text))


def extract_answer(text: str, *, flexible: bool = False) -> str | None:
  """The one marked answer after the thinking: an <answer> element, else a \\boxed{}, else a '#### ' line, else all of a bare text.

  Two marks of a kind are no answer. `flexible` falls back to the last number of an unmarked text (the `flexible-extract` of GSM8K in
  lm-evaluation-harness): for measuring models that were never taught a format, not for rewarding.
  """
  text = text.rpartition('</think>')[2]
  if '<think>' in text:
    return None  # still thinking
  for found in (answer_elements(text), boxed(text), HASHES.findall(text)):
    if found:
      return found[0].strip() if len(found) == 1 else None
  if '<answer>' in text or '</answer>' in text or '\\boxed' in text:
    return None  # a mark that was never closed
  if parse_number(text) is not None and len(text.strip()) <= 32:
    return text.strip()
  numbers = NUMBER.findall(plain_signs(text)) if flexible else []
  return numbers[-1] if numbers else None


def parse_number(text: str) -> Fraction | None:
  """The only number in a text, exactly: integers, decimals, fractions, thousands commas. Units and signs of currency around it are
  ignored; two numbers, an equation, a number under a root or a power, other LaTeX, or an over-long text are none."""
  if len(text) > LIMIT:
    return None
  text = plain_signs(text)
  if LOOSE_SIGN.search(text) or any(c in '=^\\√π±' or (c.isnumeric() and not c.isascii()) for c in text):
    return None
  found = NUMBER.findall(text)
  match = PLAIN.fullmatch(found[0].rstrip(',')) if len(found) == 1 else None
  if match is None or (match[4] and int(match[4]) == 0):
    return None
  value = Fraction(match[2].replace(',', '') + (match[3] or '')) / int(match[4] or 1)
  return -value if match[1] else value


def numbers_equal(gold: object, answer: str | None) -> bool | None:
  """Whether an extracted answer is the gold number. None where gold itself cannot be read: no verdict, never a reward."""
  expected = parse_number(str(gold))
  if expected is None:
    return None
  return answer is not None and parse_number(answer) == expected


def arithmetic_value(expression: str) -> tuple[Fraction, list[int]] | None:
  """(value, integers used) of an expression of + - * / and brackets over whole numbers; None for anything else."""
  expression = expression.strip()
  if len(expression) > LIMIT or not re.fullmatch(r'[0-9+\-*/() ]+', expression) or '**' in expression or '//' in expression:
    return None
  numbers: list[int] = []

  def value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
      numbers.append(node.value)  # type: ignore[arg-type]
      return Fraction(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp):
      a, b = value(node.left), value(node.right)
      match node.op:
        case ast.Add():
          return a + b
        case ast.Sub():
          return a - b
        case ast.Mult():
          return a * b
        case ast.Div():
          return a / b
    raise ValueError('not arithmetic')

  try:
    return value(ast.parse(expression, mode='eval').body), numbers
  except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
    return None


def check_countdown(numbers: Sequence[int], target: int, answer: str | None) -> bool:
  """Whether `answer` is an expression that uses each number exactly once and has the value `target`."""
  found = arithmetic_value(answer) if answer is not None else None
  return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)
