r"""Hard cases of mathematical answers, by hand: for each gold answer what is right and what is wrong, as the text inside <answer>.

Whole completions (marks, thinking) are in COMPLETIONS. What measured libraries got wrong (math-verify's defaults, reasoning-gym's scorers)
is here in several forms each. How single numbers are read and where answers are found is in tests/test_verify.py.
"""

import json
import pathlib
import re
import time

import psutil
import pytest

from rl_reasoning.rewards import REWARDS
from rl_reasoning.verify import pool
from rl_reasoning.verify.answers import TIMEOUT, kind_of, normalized, verdicts

GSM8K = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'gsm8k'
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f'no GSM8K files in {GSM8K}')

# (gold, answer_kind or None, right, wrong)
CASES = [
  # Integers: dress is taken off, anything that changes the number is not.
  ('42', None,
   ['42', ' 42 ', '42.', '$42$', r'\(42\)', r'\[42\]', '**42**', '42.0', '42.00', '+42', '042', r'\boxed{42}', r'\text{42}',
    '{42}', '(42)',
    '$42', r'\$42', '42 dollars', '42 cm', r'42\text{ cm}', r'42 \text{ cm}^2', r'42\,\mathrm{m/s}', '42 km/h', '42°',
    r'42^\circ', r'42^{\circ}',
    'x = 42', 'x=42', r'x_1 = 42', r'\theta = 42', 'f(x) = 42', 'The answer is 42.', 'the answer = 42', r'\text{area} = 42',
    '42 apples',
    r'42 \text{ square units}', '42%', r'42\%', '4.2 × 10^1', r'4.2 \times 10^{1}', '"42"', '42 times'],
   ['41=42', '42=42', '41 = 42', '40+2=42', '43=42', 'x=41=42', '2x=84', '42=x', '', ' ', '43', '-42', '0.42', '4.2', '420',
    '42 or 43', '42 and 43',
    '42, 43', '42; 43', '41 42', '42/43', '40+2', '84/2', r'\frac{84}{2}', r'6 \cdot 7', r'6\times7', '6*7', r'\sqrt{1764}',
    '42!', '42x', '42i', '42y',
    '4 2', '42_8', '42_{8}', '42^1', 'not 42', '42 or more', 'at least 42', '>42', r'\ge 42', '<43', '~42', '≈42', r'\approx 42',
    '42?', '42...', '|42|',
    'forty-two', '４２', '٤٢', '42\x00', '42 million', '42 thousand', '42k', 'minus 42', 'negative 42', '42 half', '- 42', '-(42)',
    r'\boxed{42',
    r'\boxed{41} \boxed{42}', r'\boxed{42} \boxed{42}', 'maybe 42', '42 unless 43', 'not the answer = 42', 'any number',
    'infinity of answers', '4.2e1',
    '0x2A', '042_8', '101010_2', 'twice 42', 'double 42', 'the square of 42', 'reciprocal of 42', 'a multiple of 42', 'above 42',
    'up to 42', '42 tenths',
    r'42 \text{ or } 43', r'42\text{ and }43', '42±1', r'42 \pm 1', '[42,43]', '{42,43}', '(42,42)', '1' * 300,
    '42' + ' ' * 300 + '43']),
  ('1234', None,
   ['1,234', '1234', '1{,}234', r'1,\!234', r'1\,234', '$1,234', r'\$1{,}234', '1,234.00', '1234,', '1,234 km',
    r'1.234 \times 10^3', r'1.234\cdot10^{3}'],
   ['1.234', '1,23,4', '12,34', '1 234', '1_234', '1,234,000', '1,2345', '1e3', '1.234 × 10^4', '1.234 × 10^-3']),
  ('-5', None, ['-5', '−5', '–5', '-5.0', '$-5$', '-$5', 'x=-5', '-5°', r'-5^\circ', r'\boxed{-5}'], ['5', '- 5 or 5', '(5)',
      '5-', '--5', '±5', r'\pm 5', '-(5)', '-5!']),
  (7, None, ['7', '7.0', '$7$'], ['8', '7.1', '7 of 8']),
  (2.5, None, ['2.5', '5/2', r'2\frac{1}{2}', '2 1/2', '2.50', r'\frac{5}{2}', '2.5%'], ['250%', '2,5', '25', '2 1/2 1/2',
      '2.5.0']),
  ('5000000', None, ['5 million', '5,000,000', r'5 \text{ million}', r'5 \times 10^6', '5000 thousand'], ['5', '5 billion', '5e6',
      '5 million million']),
  ('12', None, ['12', '1 dozen', '12 eggs'], ['12 dozen', '1', '144', 'a dozen', 'twelve']),
  # Fractions, decimals, percent: one value, many spellings, and never another value.
  ('1/2', None,
   ['0.5', '1/2', r'\frac{1}{2}', r'\frac12', r'\dfrac{1}{2}', r'\tfrac12', r'\frac 1 2', r'\frac1{2}', '.5', '2/4', '0.50',
    '50%', r'50\%', '50 percent', '1/2 cup',
    r'$\frac{1}{2}$', r'p = \frac{1}{2}', r'P(A)=0.5', r'\left(\frac{1}{2}\right)', r'5 \times 10^{-1}'],
   ['50', '5', '0.05', '-1/2', '2', '1/2/1', '0.5%', '5%', '1,2', '1 2', '1:2 or 1:3', r'\frac{1}{3}', r'\frac{2}{1}', '1/2x',
    r'\frac{1}{2}x', r'\sqrt{1/4}', '1-1/2', '½½', '0.49999',
    r'\frac{1}{2}+0', '1/2=0.5', '0.5=1/2']),
  ('0.5', None, ['1/2', '50%', r'50\%', '.5', '0.500'], ['50', '5', '0.5%', '0.51']),
  ('50', None, ['50', '50%', r'50\%', '50 percent', r'50 \%'], ['0.5', '1/2', '5000%', '0.50', '.5']),
  ('50%', None, ['50%', '50', '0.5', '1/2', r'50\%'], ['5', '0.05', '0.5%', '500']),
  ('1/3', None, ['1/3', r'0.\overline{3}', r'0.\bar{3}', r'\frac{1}{3}', '2/6', r'33\frac{1}{3}\%'], ['0.3', '0.33', '0.333',
      '0.333333', '0.3333333333', '33%', '0.333...', '33.3%']),
  ('1/6', None, [r'0.1\overline{6}', '1/6'], [r'0.\overline{16}', r'0.\overline{6}', '0.1667']),
  ('3/2', None, ['1 1/2', r'1\frac{1}{2}', r'1\frac12', '1.5', r'1 \frac{1}{2}', '3/2', '6/4'], ['1/2', '11/2', r'1\frac{3}{2}',
      '1 3/2', r'1 \cdot \frac{1}{2}', '1 and 1/2']),
  ('-3/2', None, ['-1 1/2', r'-1\frac{1}{2}', '-1.5', r'-\frac{3}{2}', r'\frac{-3}{2}'], ['1 1/2', r'1\frac{-1}{2}', '-1/2',
      '3/2']),
  ('0.001', None, ['10^{-3}', r'1 \times 10^{-3}', '1/1000', '.001', '0.1%'], ['10^3', '10^{-2}', '0.01', '-10^3']),
  ('0', None, ['0', '0.0', '-0', '0%', 'x=0', '$0'], ['', '1', 'x-x', '1-1', r'\emptyset', 'none', 'zero', '0/0', '0=0', '1=0']),
  ('9' * 60, None, ['9' * 60, '9' * 60 + '.0'], ['9' * 59 + '8', '9' * 59, '1' + '0' * 60]),
  # Bases: the base is a part of the answer, or of none.
  ('10_8', None, ['10_8', '10_{8}', '$10_8$', '10 _ {8}'], ['10', '8', '10_7', '10_{10}', '8_{10}', '1000_2', '11_8']),
  ('1A_{16}', None, ['1A_{16}', '1a_{16}'], ['1A', '26', '1A_{15}']),
  # Roots, powers, multiples of pi, logarithms: equal in value, exactly.
  (r'2\sqrt{3}', None,
   [r'2\sqrt{3}', r'2\sqrt3', r'\sqrt{12}', r'\sqrt{3}\cdot 2', '2√3', '2sqrt(3)', r'\frac{6}{\sqrt{3}}', r'$2\sqrt{3}$',
   r'2\sqrt{3}\text{ cm}', r'2\sqrt{3} cm', r'x = 2\sqrt{3}', r'2\,\sqrt{3}'],
   ['3.4641', '3.464102', '3.46410161513775', r'3\sqrt{2}', r'\sqrt{3}', r'-2\sqrt{3}', r'2\sqrt{3} or 3',
    r'2\sqrt{3}, 2\sqrt{3}', r'2\sqrt{3}=3', r'2\sqrt[3]{3}', r'2\sqrt{3} \approx 4', r'4 ≈ 2\sqrt{3}', r'2\sqrt{3}\text{5}',
    r'2\sqrt{3}\text{ or 5}', r'2\sqrt{3} \infty 5', '2', '3', r'\boxed{}']),
  (r'\sqrt{2}', None, [r'\sqrt{2}', r'\sqrt2', '2^{1/2}', '√2', 'sqrt(2)', r'\frac{2}{\sqrt{2}}'], ['1.414', '1.41421356',
      r'\sqrt{3}', r'2', r'\pm\sqrt{2}', r'\sqrt{2}, -\sqrt{2}']),
  (r'\frac{\pi}{4}', None, [r'\pi/4', r'\frac{1}{4}\pi', r'0.25\pi', 'π/4', r'\frac{2\pi}{8}', 'pi/4',
      r'\frac{\pi}{4}\text{ radians}'], ['0.785', '0.785398', '45', r'\pi', r'\frac{4}{\pi}', r'\frac{3.14159265}{4}']),
  (r'2\pi', None, [r'2\pi', '2π', r'\pi\cdot 2', r'2 \pi'], ['6.28', '6.283185', '2', r'\pi^2', r'2\pi + 2\pi k']),
  ('2^{10}', None, ['2^{10}', '1024', '4^5', '2**10'], ['1000', '10^2', '2^{11}', '20']),
  ('e^2', None, ['e^2', 'e^{2}', r'e \cdot e'], ['7.389', 'e', '2e', 'e^{-2}']),
  (r'\log_2 3', None, [r'\log_2 3', r'\log_{2}{3}', r'\frac{\ln 3}{\ln 2}'], ['1.585', r'\log_3 2', r'\ln 3']),
  (r'\sin 20', None, [r'\sin 20', r'\sin(20)'], ['0.34', r'\cos 20', '20']),
  (r'\infty', None, [r'\infty', '∞', 'infinity', r'+\infty'], ['infinity of answers', 'infinitely many', r'-\infty', '1/0',
      r'\frac{1}{0}', '0/0', r'\infty - \infty', r'\infty, 5', '0', '8',
      'infinite']),
  # Expressions.
  ('x^2+2x+1', None, ['(x+1)^2', 'x^2+2x+1', '1+2x+x^2', '(x+1)(x+1)', 'x(x+2)+1', 'x^{2}+2x+1', 'y=x^2+2x+1',
      r'x^2 + 2 \cdot x + 1'],
   ['(x-1)^2', 'x^2+1', 'x^2+2x', '(x+1)^2=0', '(y+1)^2', 'X^2+2X+1', 'x', '4', 'x^2+2x+1 or x', 'the square', r'x^2+2x+1, x']),
  ('(x-2)(x+3)', None, ['x^2+x-6', '(x+3)(x-2)', 'x(x+1)-6'], ['(x+2)(x-3)', 'x^2-6', '2, -3']),
  (r'\frac{x}{2}', None, ['x/2', '0.5x', r'\frac{1}{2}x', r'x \cdot 2^{-1}', r'\frac{2x}{4}'], ['2/x', 'x', 'y/2', 'X/2',
      '0.50001x']),
  (r'\frac{x+1}{x-1}', None, [r'1+\frac{2}{x-1}', r'(x+1)/(x-1)', r'\frac{1+x}{x-1}'], [r'\frac{x-1}{x+1}', 'x+1/x-1', '-1']),
  ('a^2-b^2', None, ['(a-b)(a+b)', '(a+b)(a-b)', '-b^2+a^2'], ['(a-b)^2', 'b^2-a^2', 'A^2-B^2']),
  ('n', None, ['n', '$n$'], ['N', 'm', '1']),
  ('2+3i', None, ['2+3i', '3i+2'], ['2-3i', '2', '3i', '5', '2+3j', '2+3']),
  (r'|x|', None, [r'|x|', r'\left|x\right|', r'\lvert x \rvert'], ['x', '-x']),
  (r'\binom{5}{2}', None, ['10', r'\binom{5}{2}', r'\binom{5}{3}'], ['5', r'\frac{5}{2}']),
  ('5!', None, ['120', '5!'], ['5', '24', '5!!']),
  # Equations and inequalities.
  ('x=5', None, ['5', 'x=5', '$x = 5$', 'x=5.0'], ['y=5', 'x=6', '5=5', 'x=5=5', '2x=10x', '0=0', '-5', '5=x=5']),
  ('y=2x+1', None, ['y=2x+1', '2x+1', 'y = 1+2x', '2x-y+1=0', 'y-2x=1', '2y=4x+2'], ['y=2x', '2x', 'y=2x-1', '0=0', 'y=y', '1=1',
      'z=2x+1', '2x-y=1']),
  ('x^2+y^2=1', None, ['x^2+y^2=1', '1=x^2+y^2', 'y^2=1-x^2', '2x^2+2y^2=2'], ['x^2+y^2', 'x^2-y^2=1', '0=0', 'x^2+y^2=2', '1',
      'x=1, y=0']),
  ('x>5', None, ['x>5', '5<x', '2x>10', 'x-5>0', r'x \gt 5'], ['x<5', 'x>=5', r'x \ge 5', '5', 'x>6', 'y>5', '-x>-5']),
  (r'-1\le x<2', None, [r'-1 \leq x < 2', '-1≤x<2', r'2>x\ge -1'], [r'-1<x<2', r'-1\le x\le 2', '-1', '2', r'x<2']),
  # Tuples keep their order, intervals their ends, sets neither order nor brackets.
  ('(1,2)', None, ['(1,2)', '(1, 2)', r'\left(1,2\right)', '(1.0,2)', '(x,y)=(1,2)', '(1,2.0)'], ['(2,1)', '[1,2]', '{1,2}',
      r'\{1,2\}', '1,2', '(1,2,3)', '(1)', '(1,2', '3', '[1,2)', '(y,x)=(1,2)']),
  ('(3, -4)', None, ['(3,-4)', '(3, −4)'], ['(-4,3)', '(3,4)', '3,-4', '(3-4)']),
  (r'(\sqrt{2}, \pi)', None, [r'(\sqrt2,\pi)', r'(2^{1/2}, π)'], [r'(\pi,\sqrt{2})', '(1.41421356, 3.14159265)',
      r'[\sqrt{2},\pi]']),
  ('[0,1)', None, ['[0,1)', '[0, 1)', r'x\in[0,1)', r'\left[0,1\right)', r'x \in [0, 1)', '[0.0,1)'], ['(0,1]', '(0,1)', '[0,1]',
      '{0,1}', '0,1', '[0,2)', '[1,0)', '0', r'x\notin[0,1)']),
  (r'(-\infty, 3]', None, [r'(-\infty,3]', '(-∞, 3]', '(-infinity, 3]'], [r'(-\infty,3)', r'[-\infty,3]', r'(\infty,3]',
      r'[3,-\infty)', r'(-\infty,4]']),
  (r'(-\infty,1)\cup(2,\infty)', None, [r'(-\infty,1)\cup(2,\infty)', r'(2,\infty)\cup(-\infty,1)', r'(-∞,1)∪(2,∞)'],
      [r'(-\infty,1)', r'(-\infty,1]\cup(2,\infty)', r'(-\infty,1),(2,\infty)', r'(-\infty,2)\cup(1,\infty)']),
  (r'\{1,2\}', None, [r'\{2,1\}', '{1,2}', '1,2', r'\{1, 2\}', '1 and 2', r'\left\{1,2\right\}', 'x=1 or x=2', '{2, 1.0}'],
      ['(1,2)', '[1,2]', '1', '{1,2,3}', '{1}', '{1,1}', '{1,2,2}', '3', '{1;2', '1 2', r'\{1,3\}']),
  ('2, -3', None, ['-3, 2', '2,-3', '{2,-3}', '2 and -3', '-3 or 2', 'x=2, x=-3', r'x = 2 \text{ or } x = -3', '2; -3'], ['2',
      '-3', '2,3', '(2,-3)', '2,-3,0', '2,2', '2-3', '', ',', '2,']),
  (r'\pm 2', None, [r'\pm 2', '±2', '2, -2', '-2,2', '2 and -2'], ['2', '-2', '4', '2,2']),
  (r'1\pm\sqrt{5}', None, [r'1\pm\sqrt5', r'1+\sqrt5, 1-\sqrt5', r'1-\sqrt{5}, 1+\sqrt{5}'], [r'1+\sqrt{5}', r'\pm\sqrt5',
      r'1\pm\sqrt{3}']),
  ('x=1, y=2', None, ['x=1, y=2', 'y=2, x=1', 'x=1 and y=2'], ['1,2', '2,1', 'x=2, y=1', 'x=1', '(1,2)', 'x=1,x=2']),
  ('x=1 or x=-1', None, ['1,-1', 'x=-1 or x=1', '-1 and 1', r'\pm 1'], ['1', '1 or 2', 'x=1']),
  (r'\frac{1}{x}', None, ['1/x', 'x^{-1}'], ['1/0', '0/0', r'\frac{0}{0}', r'\infty-\infty', 'nan', 'oo', 'zoo', r'\infty', 'x',
      '1']),
  (r'\emptyset', None, [r'\emptyset', '∅', r'\{\}', r'\varnothing'], ['0', '{0}', '']),
  (r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', None, [r'\begin{pmatrix}1&2\\3&4\end{pmatrix}',
      r'\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}'], [r'\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}', '(1,2,3,4)',
      r'\begin{pmatrix} 1 & 2 \end{pmatrix}']),
  # Ratios and times.
  ('3:4', None, ['3:4'], ['4:3', '3', '3,4']),
  ('10:30', None, ['10:30', '10:30.'], ['20:60', '1/3', '10:31']),
  ('2023-01-02', None, ['2023-01-02'], ['2020', '2023-02-01']),
  # Multiple choice.
  ('B', None, ['B', '(B)', 'B.', 'B)', '[B]', r'\text{B}', r'\textbf{(B)}', 'b', '(b)', '**B**', r'\boxed{B}', 'B. Paris',
      '(B) Paris', 'B) 42', r'\mathrm{(B)}'],
   ['A', '(A)', 'A or B', 'B or C', 'AB', 'B, C', 'not B', 'Paris', 'A. B', 'B. or C', 'B. and C', 'A and B', 'BB', '', 'D',
    'the letter', '(A) (B)', 'B C', 'Both', 'A B C D', 'B. not this but D', 'E', 'B. A', 'B. (a)', 'B. c']),
  ('B. Paris', None, ['B', '(B)', 'B. Paris', 'Paris', 'paris', '(B) Paris', 'B) paris.'], ['B. London', 'A. Paris', 'London',
      'C', 'Paris or London', 'A', 'B. Paris or C. London']),
  ('(C)', None, ['C', '(C)', 'c'], ['B', 'D', 'A, B, C', 'C D']),
  ('d', 'choice', ['D', '(d)', 'd.'], ['B', 'a', 'do']),
  # Texts.
  ('yes', None, ['yes', 'Yes', 'YES.', ' yes ', r'\text{yes}', r'\text{Yes}', '"yes"', '**Yes**'], ['no', 'yes or no', 'yes no',
      'not yes', 'yes, and no', 'y', '', '1', 'true']),
  ('no', None, ['No', 'no.', r'\text{No}'], ['yes', 'on', 'n', 'not', 'no yes', 'none']),
  (r'\text{Evelyn}', None, ['Evelyn', 'evelyn', r'\text{Evelyn}'], ['Eve', 'Evelyn or Carla', 'Carla', 'Evelyn Evelyn']),
  ('the Eiffel Tower', None, ['Eiffel Tower', 'The Eiffel tower.', 'an eiffel  tower'], ['Tower Eiffel', 'Eiffel',
      'Eiffel Tower or Louvre']),
  ('odd', None, ['odd', 'Odd'], ['even', 'odd or even', 'odds', 'not odd']),
  ('two-thirds', None, ['two thirds', 'Two-Thirds'], ['2/3', 'two', 'third']),
  ('1 hour 5 minutes', None, ['1 hour 5 minutes', '1 Hour, 5 minutes'], ['5 minutes', '1 hour', '65 minutes',
      '1 hour 6 minutes']),
  (r'x \text{ is even}', None, ['x is even'], ['x', 'even', 'x is odd']),
  ('don\'t', 'text', ['dont', "Don't", 'don’t'], ['do not', 'do']),
  ('-5', 'text', ['-5'], ['5', '- 5']),
  ('1.5', 'text', ['1.5'], ['15', '1,5']),
  ('01101', 'text', ['01101'], ['1101', '1,101']),
  # Sets of anything, in any order.
  ('Ann, Bo', 'set', ['Bo, Ann', 'ann and bo'], ['Ann', 'Ann, Ob', 'Ann, Bo, Cy', 'Ann or not Bo']),
  ('red, blue', 'set', ['blue, red', 'Red and blue', r'\{red, blue\}'], ['red', 'red, red', 'red, green', 'blue',
      'red, blue, green']),
  ('3, 1, 2', 'set', ['1,2,3', '{3,2,1}', '1, 2 and 3', r'\{1,2,3\}'], ['1,2', '1,2,3,4', '6', '1,2,2', '123']),
  ('100,200', 'set', ['200, 100', '100,200'], ['100200', '100', '200']),
  ('[1, 2]', 'set', ['[2, 1]', '2, 1', '{1,2}'], ['[1]', '(1,2)', '[1,3]']),
  ('(1,2), (3,4)', 'set', ['(3,4), (1,2)'], ['(2,1), (3,4)', '(1,2)', '1,2,3,4']),
  # What cannot be read gives no verdict, whatever the answer is.
  *[(gold, None, None, ['5', gold, '', 'x']) for gold in
    ('', ' ', '5 or 6', r'\frac{1}{', r'\boxed{', 'unknown', 'N/A', 'proof', 'see above', '9' * 300, r'9^{9^{9^9}}', 'x=y=z',
        '41=42', '1,,2', '5\x00', r'5 \text{ if } x>0')],
  (True, None, None, ['1', 'True']), ([1, 2], None, None, ['1,2']), (None, None, None, ['5', '']), ('five', 'number', None, ['5',
      'five']), ('Paris', 'choice', None, ['Paris', 'P']),
]  # fmt: skip


def verdict(gold, answer, kind=None):
  return verdicts([gold], [answer], [kind])[0]


def answered(text):
  return f'<think>41, or 42?</think><answer>{text}</answer>'


TABLE = [
  (gold, kind, text, expected)
  for gold, kind, right, wrong in CASES
  for texts, expected in ((right or [], 1.0), (wrong, None if right is None else 0.0))
  for text in texts
]


@pytest.fixture(scope='module')
def judged():
  """The verdicts on TABLE, as the reward gives them, in one call."""
  return REWARDS['accuracy'](
    prompts=['q'] * len(TABLE), completions=[answered(text) for _, _, text, _ in TABLE], answer=[gold for gold, _, _, _ in TABLE],
    answer_kind=[kind for _, kind, _, _ in TABLE],
  )  # fmt: skip


@pytest.mark.parametrize('n', range(len(TABLE)), ids=lambda n: f'{str(TABLE[n][0])[:30]!r}-{TABLE[n][2][:40]!r}')
def test_case(n, judged):
  """Failure: a wrong or evasive answer is paid, a right one is not, or an unreadable gold answer is punished or paid."""
  assert judged[n] == TABLE[n][3], TABLE[n]


def test_size():
  """Failure: the table has lost its cases."""
  assert len(TABLE) > 600 and len({case for case in TABLE if not isinstance(case[0], list)}) > 600


# Whole completions for the gold answers 42, \frac{\pi}{2} and B.
COMPLETIONS = [
  # math-verify pays these for 42
  ('42', r'\boxed{41=42}', 0), ('42', r'\boxed{} might be 42', 0), ('42', r'\boxed{} #### 42', 0), ('42', r'<think>\boxed{42}',
      0),
  ('42', r'<think>\boxed{42}</think>', 0), ('42', r'<think>\boxed{42}</think> it is 43', 0), ('42', r'\boxed{41}, \boxed{42}', 0),
  ('42', r'\boxed{42}, \boxed{41}', 0), ('42', r'\boxed{42', 0), ('42', r'\boxed 42', 0), ('42', r'\boxed{42 \boxed{41}}', 0),
  ('42', r'\boxed{\boxed{42}}', 1), ('42', r'\boxed{\boxed{41} 42}', 0), ('42', 'So $41$ or $42$', 0), ('42',
      'I think that it is 42, or so', 0),
  ('42', '<answer></answer> 42', 0), ('42', '<answer> </answer>', 0), ('42', '<answer>42</answer><answer>41</answer>', 0),
  ('42', '<answer>41</answer><answer>42</answer>', 0), ('42', '<answer>42', 0), ('42', '42</answer>', 0), ('42',
      '<answer>41=42</answer>', 0),
  ('42', r'<answer>\boxed{42}</answer>', 1), ('42', r'<answer>\boxed{41} \boxed{42}</answer>', 0), ('42',
      r'<think>a</think>\boxed{42}', 1),
  ('42', r'<think>\boxed{41}</think>\boxed{42}', 1), ('42', '<think>a</think><answer>42</answer>', 1), ('42',
      '</think></think><answer>42</answer>', 1),
  ('42', '<answer>42</answer></think>', 0), ('42', r'The answer is $\boxed{42}$.', 1), ('42', r'\boxed{ 42 }', 1), ('42',
      r'\boxed{42\text{ cm}}', 1),
  ('42', '#### 42', 1), ('42', '#### 41\n#### 42', 0), ('42', r'\fbox{42}', 0), ('42', r'\framebox{42}', 0), ('42',
      '<answer>42 or 43</answer>', 0),
  ('42', r'\boxed{4}\boxed{2}', 0), ('42', r'\boxed{{42}}', 1), ('42', r'\boxed{42}\boxed{', 1), ('42', '<ANSWER>42</ANSWER>', 0),
      ('42', 'answer: 42', 1), ('42', 'answer: 41, or 42', 0),
  (r'\frac{\pi}{2}', r'\boxed{\frac{\pi}{2}}', 1), (r'\frac{\pi}{2}', r'\boxed{\dfrac{\pi}{2}}', 1), (r'\frac{\pi}{2}',
      r'\frac{\pi}{2}', 0),
  (r'\frac{\pi}{2}', r'$\frac{\pi}{2}$', 0), (r'\frac{\pi}{2}', r'\boxed{\frac{\pi}{3}=\frac{\pi}{2}}', 0), (r'\frac{\pi}{2}',
      r'\boxed{\frac{\pi}{2}', 0),
  (r'\frac{\pi}{2}', r'\boxed{x=\frac{\pi}{2}}', 1), (r'\frac{\pi}{2}', r'\boxed{\pi}{2}', 0), (r'\frac{\pi}{2}',
      r'\boxed{} \frac{\pi}{2}', 0),
  ('B', r'\boxed{B}', 1), ('B', r'\boxed{A} \boxed{B}', 0), ('B', 'B', 0), ('B', '<answer>A B C D</answer>', 0), ('B',
      '<answer>(B)</answer>', 1),
]  # fmt: skip


@pytest.mark.parametrize('gold,completion,expected', COMPLETIONS)
def test_completion(gold, completion, expected):
  """Failure: credit for an answer that stands in the thinking, beside its mark, in one mark of several, or in none."""
  assert REWARDS['accuracy'](prompts=['q'], completions=[completion], answer=[gold]) == [expected]


HOSTILE = {
  'tower': '9^{9^{9^9}}', 'bare tower': '9^9^9^9', 'python tower': '9**9**9**9', 'factorial': '1000000!',
  'factorials': '9!!!!!!!!', 'nested factorial': '((9!)!)!',
  'braces power': '(9^{999})^{999}', 'power': '(x+1)^100000', 'power in limits': '(x+1)^{999}',
  'power of a sum': '(a+b+c+d+f+g+h)^{99}', 'two powers': '(x+y)^{300}(x-y)^{300}',
  'braces': '{' * 5000 + '}' * 5000, 'few braces': '{' * 100 + 'x' + '}' * 100, 'digits': '7' * 200_000,
  'digits in limits': '7' * 255, 'decimals': '0.' + '3' * 250,
  'fractions': r'\frac{1}{' * 40 + 'x' + '}' * 40, 'fractions in limits': r'\frac{1}{1+' * 18 + 'x' + '}' * 18,
  'deep fractions': r'\frac{1}{' * 5000 + '2' + '}' * 5000,
  'roots': r'\sqrt{' * 19 + 'x' + '}' * 19, 'integral': r'\int_0^{999} \sin(x^{x^x}) dx',
  'integrals': r'\int\int\int\int e^{x^2 y^2} dx dy dz dt',
  'sum': r'\sum_{n=1}^{999} n^{n}', 'big sum': r'\sum_{n=1}^{10^{99}} \frac{1}{n}', 'product': r'\prod_{n=1}^{999999999} n',
  'limit': r'\lim_{x\to\infty} (1+\frac{1}{x})^{x^x}',
  'derivative': r'\frac{d}{dx} x^{x^{x^{x^{x}}}}', 'matrix': r'\begin{pmatrix}' + '1&' * 100 + r'1\end{pmatrix}',
  'matrix power': r'\begin{pmatrix}1&1\\1&0\end{pmatrix}^{999}',
  'huge matrix': r'\begin{pmatrix}' + '1&' * 50_000 + r'1\end{pmatrix}', 'binomial': r'\binom{999999999}{499999999}',
  'logs': r'\log(\log(\log(\log(\log(9^{999})))))',
  'trigonometry': r'\sin(' * 30 + 'x' + ')' * 30, 'tangents': r'\tan(x)' * 40, 'sets': '{' + '1,' * 120 + '1}',
  'list': ','.join('x' * 120), 'brackets': '(' * 5000 + ')' * 5000,
  'brackets in limits': '(' * 120 + 'x' + ')' * 120, 'unicode digits': '４２' * 40, 'superscripts': 'x' + '²' * 200,
  'null bytes': '\x00' * 200, 'surrogate': '\ud800' * 10,
  'backslashes': '\\' * 255, 'spaces': ' ' * 100_000 + 'x', 'quantifiers': 'a' * 120 + '!' * 120, 'numbers': '1 ' * 127,
  'words': 'or ' * 80, 'ands': 'x and ' * 40,
  'absolute': '|' * 120 + 'x' + '|' * 120, 'equals': '=' * 200, 'equations': 'x=' * 120 + 'x', 'relations': '1<' * 120 + '2',
  'mod': r'9^{999}^{999} \mod 7', 'import': '__import__("os").system("true")',
  'lambda': '(lambda: 0)()', 'attribute': 'x.__class__.__bases__', 'format': '{0.__class__}', 'units': '5' + r'\text{ cm}' * 25,
  'text': r'\text{' * 19 + 'x' + '}' * 19, 'dollars': '$' * 255,
  'subscripts': 'x_{1' * 19 + '}' * 19, 'gamma': r'\Gamma(99999999)', 'zeta': r'\zeta(9^{999})',
  'floor': r'\lfloor 9^{999.5} \rfloor', 'gcd': r'\gcd(9^{999}, 7^{999})',
}  # fmt: skip


def test_hostile_answers():
  """Failure: an answer stalls the run for more than its 2 s, takes a gibibyte, is paid, or takes the workers with it."""
  workers = pool.shared('math')
  assert verdict(r'\frac{\pi}{2}', r'\pi/2') is True
  seen = 0
  for name, text in HOSTILE.items():
    for gold in (r'\frac{x}{\pi}', '7'):
      warm = workers.map('rl_reasoning.verify.symbolic:can_read', [{'gold': 'x', 'kind': 'math'}] * 4, 30.0)
      assert [outcome.value for outcome in warm] == [True] * 4, name
      start = time.perf_counter()
      found = verdict(gold, text)
      assert time.perf_counter() - start < TIMEOUT + 0.5, name
      assert not found, name
      for worker in list(workers.workers):
        with_memory = psutil.Process(worker.process.pid) if worker.alive() else None
        seen = max(seen, with_memory.memory_info().rss if with_memory else 0)
  assert 0 < seen < pool.GIB
  assert verdict(r'\frac{\pi}{2}', r'\frac{2\pi}{4}') is True and verdict(r'\frac{\pi}{2}', r'\frac{2\pi}{3}') is False


def test_time_out_is_no_verdict(monkeypatch, caplog):
  """Failure: an answer that could not be judged counts as wrong (or right), in silence, or is never judged again."""
  counts = pool.shared('math').counts
  before = counts['timeout']
  asked = [(f'(x+{a})(x-{a})', f'x^2-{a * a}') for a in range(2, 8)]
  monkeypatch.setattr('rl_reasoning.verify.answers.TIMEOUT', 1e-4)
  # Several: where this process is late to look, a verdict may be there by then.
  assert None in [verdict(gold, answer) for gold, answer in asked]
  assert counts['timeout'] > before and 'no verdict' in caplog.text
  monkeypatch.undo()
  assert all(verdict(gold, answer) is True for gold, answer in asked)


def test_verdicts_are_kept(monkeypatch):
  """Failure: a group of equal answers costs a worker each."""
  assert verdict(r'\frac{\pi}{7}', r'\frac{3\pi}{21}') is True
  monkeypatch.setattr(pool.Pool, 'map', None)
  assert verdict(r'\frac{\pi}{7}', r'\frac{3\pi}{21}') is True
  assert verdict('7', '7') is True


def test_kinds():
  """Failure: a gold answer is compared by the rules of another kind."""
  for gold, kind in {
    '5': 'number', '1/2': 'number', '5 apples': 'number', r'\frac12': 'number', 'B': 'choice', '(B)': 'choice',
    'B. Paris': 'choice', 'Z': 'math', 'b': 'math', 'x': 'math',
    'yes': 'text', 'no': 'text', 'New York': 'text', r'\text{odd}': 'text', '1, 2': 'set', r'\{1,2\}': 'set', '(1,2)': 'math',
    r'\sqrt{2}': 'math', 'x=5': 'math', 'sin x': 'math',
    'pi': 'math', '10:30': 'text', 'proof': None, '': None, '5 or 6': 'math',
  }.items():  # fmt: skip
    assert kind_of(gold) == kind, gold
  assert normalized('The  Big, "Red" dog!') == 'big red dog' and normalized('A') == 'a'


@needs_gsm8k
def test_gsm8k_gold_answers():
  """Failure: a worked solution that comes with the data is not right by its own gold answer."""
  lines = [json.loads(line) for line in (GSM8K / 'test.jsonl').read_text(encoding='utf-8').splitlines()]
  solutions = [line['answer'] for line in lines]
  golds = [solution.split('####')[1].strip() for solution in solutions]
  assert len(golds) == 1319
  assert REWARDS['accuracy'](prompts=['q'] * 1319, completions=solutions, answer=golds) == [1.0] * 1319
  wrong = golds[1:] + golds[:1]
  paid = REWARDS['accuracy'](prompts=['q'] * 1319, completions=solutions, answer=wrong)
  assert paid == [float(a.replace(',', '') == b.replace(',', '')) for a, b in zip(golds, wrong, strict=True)]


# (line from 0, model) -> why our verdict on `A: ...` is not the label's.
DISAGREEMENTS: dict[tuple[int, str], str] = {}


@needs_gsm8k
def test_gsm8k_model_solutions():
  """Failure: the grader disagrees with the labels of 5,276 final answers of models."""
  names = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
  rows, places = [], []
  for number, line in enumerate((GSM8K / 'example_model_solutions.jsonl').read_text(encoding='utf-8').splitlines()):
    row = json.loads(line)
    for name in names:
      final = re.findall(r'^A:(.*)$', row[name]['solution'], re.MULTILINE)
      gold = row['ground_truth'].rpartition('A:')[2].strip()
      rows.append((gold, final[-1] if final else '', row[name]['is_correct']))
      places.append((number, name))
  found = REWARDS['accuracy'](
    prompts=['q'] * len(rows),
    completions=[f'<answer>{answer}</answer>' for _, answer, _ in rows],
    answer=[gold for gold, _, _ in rows],
  )
  differ = {place: row for place, row, value in zip(places, rows, found, strict=True) if value != float(row[2])}
  assert len(rows) == 5276 and differ.keys() == DISAGREEMENTS.keys(), differ
