r"""Verdicts on answers: hostile, sloppy and odd texts, and how long they may take. Expected values are written by hand."""

import time
from fractions import Fraction

import pytest

from rl_reasoning.verify.answers import verdicts
from rl_reasoning.verify.math import LIMIT, arithmetic_value, boxed, check_countdown, extract_answer, parse_number


def verdict(gold, answer, kind=None):
  return verdicts([gold], [answer], [kind])[0]


HALF = Fraction(1, 2)
NUMBERS = {
  # plain
  '5': 5, ' 5\n': 5, '+5': 5, '-5': -5, '--5': None, '0': 0, '-0': 0, '007': 7, '5.': 5, '5,': 5, '12.0': 12,
  '12.50': Fraction(25, 2),
  '.5': HALF, '-.5': -HALF, '0.1': Fraction(1, 10), '1234567890123456789012345678901': 1234567890123456789012345678901,
  # other minus signs
  '−5': -5, '–5': -5, '- 5': None, '-(5)': None, '5-': 5,
  # thousands
  '1,234': 1234, '1,234,567.5': Fraction(2469135, 2), '-1,234': -1234, '1,23': None, '1,2345': None, '12,34,567': None,
  '0,123': None,
  '1{,}234': 1234, r'1,\!234': 1234, r'1\,234': 1234, '1 234': None, '1_000': None,
  # fractions
  '1/2': HALF, '2/4': HALF, '-3/6': -HALF, '10/5': 2, '0.5/2': Fraction(1, 4), '1/0': None, '1/2/3': None, '3/-4': None,
  '3/4.5': None,
  '1 1/2': Fraction(3, 2), '1 3/2': None, '5½': None, '½': None,
  # money, percent, units
  '$5': 5, '-$5': -5, '$-5': -5, r'\$5.50': Fraction(11, 2), r'-\$5': -5, '€5': 5, '-€5': -5, 'US$5.50': Fraction(11, 2),
  '$.50': HALF,
  '50%': 50, r'50\%': 50, '50 %': 50, '5 apples': 5, '5km': 5, r'5 \text{ cm}': 5, r'\text{5 cm}': 5, r'90^\circ': 90,
  r'\(5\)': 5,
  'The answer is 5.': 5, '**5**': 5, '(5)': 5, '{5}': 5,
  # more than one number, or none
  '5 or 6': None, '5 and 5': None, '5-6': None, '3x4': None, '10_8': None, '1e5': None, '1.5e3': None, '1.2.3': None,
  '12:30': None,
  '': None, 'five': None, 'x': None, '-': None, '.': None, ',': None, '５': None, '٣': None,
  # what is no longer the number that stands there
  '5=5': None, '41=42': None, 'x=5': None, r'\sqrt{4}': None, '√4': None, 'x^2': None, '10^3': 1000, '5²': None, r'2\pi': None,
  '2π': None,
  '±5': None, r'\frac{1}{2}': HALF, r'\frac{x}{2}': None,
}  # fmt: skip


@pytest.mark.parametrize('text', NUMBERS, ids=repr)
def test_parse_number(text):
  """Failure: a text is read as another number than a person reads, or an ambiguous one as a number."""
  assert parse_number(text) == NUMBERS[text]


VERDICTS = [
  ('1/2', '0.5', True), ('0.50', '1/2', True), ('3', '3.0', True), ('1,000', '1000', True), ('0.1', '1/10', True), ('0.333',
      '1/3', False),
  ('5', '-5', False), ('5', '.5', False), ('0.5', '50%', True), ('5', None, False), ('5', 'five', False), ('5', '5 5', False), (5,
      '5', True),
  (0.5, '1/2', True), (2.0, '2', True), ('9' * 60, '9' * 60, True), ('9' * 60, '9' * 59 + '8', False), ('proof', '5', None), ('',
      '5', None),
  ('5 or 6', '5', None), (True, '1', None), ('5 or 6', None, None), ([1, 2], '1', None), (None, '1', None),
]  # fmt: skip


@pytest.mark.parametrize('gold,answer,expected', VERDICTS)
def test_verdict(gold, answer, expected):
  """Failure: rounding decides a verdict, or an unreadable gold answer is paid or punished (open-r1#293)."""
  assert verdict(gold, answer) is expected


ANSWERS = {
  # marks, one of a kind
  '<answer>5</answer>': '5', '<answer> 5\n</answer>': '5', r'so \boxed{5}.': '5', r'\boxed {5}': '5', '#### 5': '5',
  'so\n#### 5\n': '5', r'<answer>\boxed{5}</answer>': r'\boxed{5}', r'<answer>5</answer> \boxed{6}': '5',
  r'\boxed{6} #### 5': '6',
  r'\boxed{\frac{1}{2}}': r'\frac{1}{2}', r'\boxed{{5}}': '{5}', r'\boxed{\boxed{5}}': r'\boxed{5}', r'} \boxed{5}': '5',
  r'{ \boxed{5}': '5', '<answer></answer>': '', r'\boxed{}': '', '<answer>(1+2)*3</answer>': '(1+2)*3',
  # two marks of a kind
  '<answer>5</answer><answer>5</answer>': None, r'\boxed{5} or \boxed{6}': None, '#### 5\n#### 5': None,
  r'\boxed{5} \boxed{5': '5',
  # marks that were never closed
  '<answer>5': None, '5</answer>': None, r'\boxed{5': None, r'\boxed{{5}': None, r'\boxed 5': None, '</answer>5<answer>': None,
  # thinking
  '<think>5</think><answer>6</answer>': '6', r'<think>\boxed{5}</think>': None, r'<think>\boxed{5}': None, '<think>5': None,
  '<think><answer>5</answer>': None, '<think>a</think><think><answer>5</answer>': None, '<answer>5</answer></think>': None,
  r'<think>\boxed{5} \boxed{6}</think> \boxed{7}': '7', '<think>a</think>b</think><answer>5</answer>': '5', 'a</think>5': '5',
  # bare texts
  '5': '5', ' -1,234. ': '-1,234.', 'The answer is 5': 'The answer is 5', '12+7=19;19-5=14': None, '5 6': None, '': None,
  'He has five more than twelve, so that is 17': None,
}  # fmt: skip


@pytest.mark.parametrize('text', ANSWERS, ids=repr)
def test_extract_answer(text):
  """Failure: an answer is taken from the thinking, from a mark never closed, or one of several is picked."""
  assert extract_answer(text) == ANSWERS[text]


FLEXIBLE = {
  '12+7=19;19-5=14': '14', '5 and then the other is −5': '-5', 'After 3 days he pays -$1,234.50': '-1,234.50', 'no number': None,
  'All of it together then costs US$5.50': '5.50', '<answer>5</answer> of 6': '5', '5 <answer>': None, '<think>5': None,
  '<think>4</think>It is 5 of 6': '6', r'\boxed{5} \boxed{6}': None,
}  # fmt: skip


@pytest.mark.parametrize('text', FLEXIBLE, ids=repr)
def test_flexible_extraction(text):
  """Failure: an unmarked text is not judged by its last number, sign included, or a marked one is."""
  assert extract_answer(text, flexible=True) == FLEXIBLE[text]


def test_boxed():
  """Failure: braces are not counted, or an unclosed or inner box is an answer of its own."""
  assert boxed(r'a \boxed{1} b \boxed {x{y}z} \boxed{') == ['1', 'x{y}z']
  assert boxed(r'\boxed{a \boxed{1} \boxed{2}} \boxed{3}') == [r'a \boxed{1} \boxed{2}', '3']
  assert boxed(r'\boxed{ \boxed{1} \boxed{2}') == ['1', '2']
  assert boxed('}}{') == [] and boxed('') == []


HOSTILE = {
  'digits': '7' * 200_000, 'boxed digits': r'\boxed{' + '7' * 200_000 + '}', 'open boxes': r'\boxed{' * 20_000,
  'nested boxes': r'\boxed{' * 20_000 + '}' * 20_000, 'boxes with a brace more': r'\boxed{{' * 20_000 + '}' * 20_000,
  'many boxes': r'\boxed{1}' * 20_000, 'braces': r'\boxed{' + '{' * 5_000 + '}' * 5_000 + '}', 'open braces': '{' * 200_000,
  'blanks': (r'\boxed' + ' ' * 1000) * 200, 'open answers': '<answer>' * 20_000, 'answers': '<answer></answer>' * 20_000,
  'open answers behind': '<answer>5</answer>' + '<answer>' * 20_000, 'end tags': '</answer>' * 20_000,
  'thoughts': '<think>' * 20_000,
  'signs': '-' * 200_000, 'commas': '1' + ',' * 200_000, 'points': '1.' * 100_000, 'slashes': '1/' * 100_000,
  'money': '-$' * 100_000,
  'hashes': '#' * 200_000, 'lines': '####\n' * 40_000, 'backslashes': '\\' * 200_000, 'circles': r'^{\circ' * 30_000,
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_texts_are_judged_at_once(name):
  """Failure: the time of a verdict grows with the square of the completion: one row stalls a training step."""
  start = time.perf_counter()
  for flexible in (False, True):
    assert verdict('7', extract_answer(HOSTILE[name], flexible=flexible)) in (False, True)
  assert not verdict('8', extract_answer(HOSTILE[name]))
  assert time.perf_counter() - start < 1.0  # 0.05 s where linear, minutes where quadratic


EXPRESSIONS = {
  '1+2*3': 7, '(1+2)*3': 9, '8/4/2': 1, '7/2': Fraction(7, 2), '2-5': -3, ' 3 - 1 ': 2, '((5))': 5, '1/3*3': 1, '10-(2-3)': 11,
  '9**9**9': None, '2**2': None, '7//2': None, '7%2': None, '-3': None, '3--2': None, '+3': None, '1/0': None, '5/(3-3)': None,
  '': None,
  '()': None, '(1': None, '1 2': None, '(1)(2)': None, '1.5': None, '1e9': None, '0x10': None, '1_000': None, '007': None,
  '1,2': None,
  '1+2=3': None, '2×3': None, '__import__': None, '__import__("os").system("true")': None, 'a+1': None, '[1]*9': None,
  '1<<9': None,
  '~1': None, '1 if 1 else 2': None, '١+١': None, '1+\n2': None, '1;2': None, '*1': None, '5!': None,
}  # fmt: skip


@pytest.mark.parametrize('text', EXPRESSIONS, ids=repr)
def test_arithmetic_value(text):
  """Failure: an expression has another value than on paper, or something other than + - * / and brackets is evaluated."""
  found = arithmetic_value(text)
  assert (found and found[0]) == EXPRESSIONS[text]


def test_hostile_expressions():
  """Failure: an expression of the allowed signs crashes or stalls the verdict."""
  start = time.perf_counter()
  longest = '*'.join(['9' * 127] * 2)
  assert arithmetic_value(longest + ' ') == (int('9' * 127) ** 2, [int('9' * 127)] * 2)
  assert len(longest) == LIMIT - 1 and arithmetic_value(longest + '99') is None
  assert arithmetic_value('(' * 128 + '1' + ')' * 127) is None
  assert arithmetic_value('(' * 100 + '1' + ')' * 100) == (1, [1])
  assert arithmetic_value('1' + '+1' * 127) == (128, [1] * 128)
  for text in ('(' * 200_000, '9*' * 100_000 + '9', '-' * 255 + '1', '9' * 200_000):
    assert arithmetic_value(text) is None
  assert time.perf_counter() - start < 1.0


COUNTDOWN = [
  ('(7-3)*5', True), ('5*(7-3)', True), ('5*7-15', False), ('5*4', False), ('(7-3)*5*1', False), ('7*5-3*5', False),
      ('(7-3)*5+3-3', False),
  ('20', False), ('(7-3)*5=20', False), ('-(3-7)*5', False), ('(7-3)/(1/5)', False), ('(7-3)*(5/(3-3))', False), ('7-3*5', False),
  ('73*5', False), ('(7-3)*5;', False), ('', False), (None, False),
]  # fmt: skip


@pytest.mark.parametrize('answer,right', COUNTDOWN)
def test_countdown(answer, right):
  """Failure: a number is used twice, left out or invented, or the target is missed, and it is paid all the same."""
  assert check_countdown([3, 5, 7], 20, answer) is right


def test_countdown_with_repeated_numbers_and_fractions():
  """Failure: equal numbers count as one, or values between must be whole."""
  assert check_countdown([4, 4], 8, '4+4') and not check_countdown([4, 4], 4, '4') and not check_countdown([4], 8, '4+4')
  assert check_countdown([3, 3, 8, 8], 24, '8/(3-8/3)')
  assert check_countdown([5, 2], Fraction(5, 2), '5/2') and not check_countdown([5, 2], 2, '5/2')
