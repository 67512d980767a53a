"""Numbers in answers: find the one answer, read it, never evaluating text of a model. Standard library only."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

LIMIT = 256  # characters of an answer that are looked at; a longer one is wrong
# A sign counts only where no number or letter stands before it: '12-5' is two numbers, '-5' is one.
NUMBER = re.compile(r'(?<![0-9A-Za-z_.)])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+(?:\.[0-9]+)?)?|[0-9]+')
PLAIN = re.compile(r'(-?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(\.[0-9]+)?(?:/([0-9]+))?')
MINUS = re.compile('[\u2212\u2013]')  # the minus sign and the en dash
THOUSANDS = re.compile(r'(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9]{3})')  # LaTeX's ways to write the comma of 1,234
SIGN_OF_MONEY = re.compile(r'-\\?[$€£¥] ?')
DECORATION = re.compile(
  r'\\(?:text(?:bf|rm|it)?|math(?:rm|bf)|mbox|boxed|left|right|displaystyle)(?![A-Za-z])|\\[\[\]()$%,;:! ]|\^\{?\\circ\}?|[$€£¥]'
)
LOOSE_SIGN = re.compile(r'(?<![0-9A-Za-z)])-[\s({]+[.0-9]')  # '- 5', '-(5)'
HASHES = re.compile(r'####([^\n]*)')

PART = r'\s*(?:\{\s*(-?[0-9,.]+)\s*\}|([0-9]))'
FRACTION = re.compile(rf'\\[dtc]?frac{PART}{PART}')
MIXED = re.compile(r'(?<![0-9A-Za-z_.,/)])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9/.,])')  # 1 1/2
POWER_OF_TEN = re.compile(
  r'(?:(-?[0-9]+(?:\.[0-9]+)?)\s*(?:\\times|\\cdot|[×*⋅x])\s*|(-?))10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|\(?(-?[0-9]{1,3})\)?)'
)
REPEATING = re.compile(r'(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))')
SQUARED_UNIT = re.compile(
  r'(?<![A-Za-z])(mm|cm|dm|m|km|s|in|ft|yd|mi|sec|units?|inch(?:es)?|feet|foot|yards?|miles?|(?:centi|kilo|milli)?met(?:er|re)s?)\}?'
  r'\s*(?:\^\s*(?:\{\s*-?[23]\s*\}|-?[23])|[²³])'
)
PERCENT = re.compile(r'%|\bper ?cents?\b')
SCALES = {'dozen': 12, 'hundred': 100, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12}
SCALED = re.compile(rf'\0[\s{{]*({"|".join(SCALES)})\b')
ARTICLE = re.compile(r'\b(?:a|A|I) (?=[A-Za-z]{2})')
SIGNS = frozenset('.,:;\'"()[]{}*%/°-\0')  # what may stand around a number beside letters and spaces
UNITS = frozenset('mgshlLWVANJKCF')  # letters that are units by themselves; any other is a variable
# A number beside one of these words is not the answer, or not all of it.
TWISTS = frozenset(
  re.findall(
    r'\w+',
    'not no never none without or nor either and plus minus negative half halves quarter quarters third thirds squared cubed factorial '
    'root log ln lg sin cos tan exp pi infinity infinite infinitely least most than greater under over between about around roughly almost '
    'approximately nearly maybe perhaps possibly unless if except but instead wrong incorrect power mod modulo base divided multiplied '
    'cannot unknown any zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred hundreds '
    'thousand thousands million millions billion billions trillion dozen dozens',
  )
)

# Another number than the one that is written: 'the square of 42', 'twice 42', 'above 42', '42 tenths'.
CHANGED = re.compile(
  r'\b(?:(?:square|cube|reciprocal|inverse|opposite|sum|product|multiple|factor|divisor|double)s? of(?: the)?|'
  r'above|below|beyond|exceed(?:s|ing)|up to|double|twice|thrice|triple)[\s({]+\0|\0[\s)}]*(?:tenth|hundredth|thousandth)s?\b',
  re.IGNORECASE,
)


class Number(NamedTuple):
  value: Fraction
  percent: bool = False
  divided: bool = False  # written as a fraction


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


def as_fraction(match: re.Match) -> str:
  """LaTeX's fraction as a/b, apart from a whole number before it: 1\\frac12 is 1 1/2."""
  return ' ' * match.string[: match.start()].rstrip()[-1:].isdigit() + f'{match[1] or match[2]}/{match[3] or match[4]}'


def read_number(text: str) -> Number | None:
  """The only number in a text, exactly: integers, decimals (repeating ones by a bar), fractions, mixed numbers, percent, a x 10^b,
  thousands commas, 'million' and the like. Units and signs of currency around it are ignored. Two numbers, an equation, a number beside a
  variable, an operator or a word that changes it, other LaTeX, or an over-long text are none."""
  if len(text) > LIMIT or '\0' in text or '..' in text:
    return None
  bare = MINUS.sub('-', text).strip().strip('$').strip()
  if match := POWER_OF_TEN.fullmatch(bare):
    factor = Fraction(match[1]) if match[1] else Fraction(f'{match[2]}1')
    return Number(factor * Fraction(10) ** int(match[3] or match[4]))
  if match := REPEATING.fullmatch(bare):
    whole, fixed, again = match[2] or '0', match[3], match[4] or match[5]
    value = Fraction(f'{whole}.{fixed or "0"}') + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(fixed))
    return Number(-value if match[1] else value)
  text = SQUARED_UNIT.sub(r'\1', plain_signs(FRACTION.sub(as_fraction, text.replace('\\%', '%'))))
  text = re.sub(r'^\s*\+(?=[0-9.])', '', text)
  if LOOSE_SIGN.search(text) or any(c in '=^\\√π±' or (c.isnumeric() and not c.isascii()) for c in text):
    return None
  if (match := MIXED.search(text)) and 0 < int(match[2]) < int(match[3]):
    text = f'{text[: match.start()]}{int(match[1]) * int(match[3]) + int(match[2])}/{match[3]}{text[match.end() :]}'
  found = list(NUMBER.finditer(text))
  if len(found) != 1:
    return None
  token = found[0][0].rstrip(',')
  match = PLAIN.fullmatch(token)
  if match is None or (match[4] and int(match[4]) == 0):
    return None
  rest = f'{text[: found[0].start()]}\0{text[found[0].start() + len(token) :]}'
  scale = 1
  if scaled := SCALED.search(rest):
    scale, rest = SCALES[scaled[1]], SCALED.sub('\0', rest)
  percent = bool(PERCENT.search(rest))
  if not only_dresses(PERCENT.sub('', rest)):
    return None
  divided = match[4] is not None
  value = scale * Fraction(match[2].replace(',', '') + (match[3] or '')) / int(match[4] or 1)
  return Number(-value if match[1] else value, percent, divided)


def parse_number(text: str) -> Fraction | None:
  """The value of `read_number`."""
  found = read_number(text)
  return None if found is None else found.value


def only_dresses(rest: str) -> bool:
  """Whether what stands around a number (a null byte in its place) leaves it the number that it is."""
  if not all(c in SIGNS or c.isalpha() or c.isspace() for c in rest):
    return False
  if re.search(r'(?<![A-Za-z])/|/(?![A-Za-z])', rest):  # km/h, not 5/x
    return False
  if CHANGED.search(rest):
    return False
  if '-\0' in rest or (re.search(r'\0\s*-\s*[\w(]', rest) and not re.search(r'\0-[A-Za-z]{2}', rest)):  # 5-x, not 5-year
    return False
  words = re.findall(r'[^\W\d_]+', ARTICLE.sub('', rest))
  return not any(word.lower() in TWISTS or (len(word) == 1 and word.isascii() and word not in UNITS) for word in words)


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
