"""Whether an extracted answer is the gold answer: numbers, mathematics, multiple choice, text, sets. By rule, and never by a guess.

What a rule decides is decided here at once; expressions go to a worker process (verify/symbolic.py) with a limit of time and memory.
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rl_reasoning.config import check
from rl_reasoning.verify.math import LIMIT, TWISTS, Number, boxed, read_number
from rl_reasoning.verify.pool import Outcome, shared

LOG = logging.getLogger(__name__)
KINDS = ('number', 'math', 'choice', 'text', 'set')
TIMEOUT = 2.0  # seconds a worker may take for one verdict
CACHED = 1 << 16  # verdicts kept
MOST_ITEMS = 16  # of a set, a list or a tuple
DEEPEST = 20  # nested braces
# What data sets write where there is no answer that could be checked (NuminaMath: 'proof').
NO_GOLD = frozenset(('unknown', 'n/a', 'na', 'nan', 'null', 'none given', 'see above', 'tbd', 'proof', 'not found', '?', '-'))

# One spelling. Order matters: markup first, then signs, then words.
SPELLINGS = [
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r'\\[dtc]frac', r'\\frac'), (r'\\(?:left|right|displaystyle|limits|big[lr]?|Big[lr]?)(?![A-Za-z])', ''),
    (r'(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|(?<=\w)~|\$|\s+', ' '), (r'(?<=[0-9])\{,\}(?=[0-9]{3})', ','), ('[\u2212\u2013]', '-'),
    (r'\\lbrace(?![A-Za-z])', r'\\{'), (r'\\rbrace(?![A-Za-z])', r'\\}'), (r'\\leq?(?![A-Za-z])|≤|<=', r'\\le '),
    (r'\\geq?(?![A-Za-z])|≥|>=', r'\\ge '), (r'\\lt(?![A-Za-z])', '<'), (r'\\gt(?![A-Za-z])', '>'), (r'\*\*', '^'),
    ('[×⋅·*]', r'\\cdot '), ('÷', r'\\div '), ('π', r'\\pi '), ('∞', r'\\infty '), ('∪', r'\\cup '), ('∈', r'\\in '), ('±', r'\\pm '),
    ('²', '^2'), ('³', '^3'), ('°', r'^\\circ'), (r'√\s*\(([^()]*)\)|√\s*\{([^{}]*)\}|√\s*([0-9]+|[a-z])', r'\\sqrt{\1\2\3}'),
    (r'(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+))', r'\\sqrt{\1\2\3}'),
    (r'(?<![\\A-Za-z])pi(?![A-Za-z])', r'\\pi '), (r'(?<![\\A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])', r'\\infty '),
    (r'∅|\\varnothing(?![A-Za-z])|\\\{\s*\\\}', r'\\emptyset '), (r'\^\s*\{?\s*\\circ\s*\}?', ''),
  )
]  # fmt: skip
WRAPPED = re.compile(r'\$\$?(.*?)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\]|\*\*(.*?)\*\*|`(.*?)`', re.DOTALL)
TEXT_COMMAND = re.compile(r'\\(?:text(?:bf|rm|it|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}')
UNIT = re.compile(
  r'(?<=\S)\s*(?:\\(?:text(?:rm|bf)?|mathrm|mbox)\s*\{([^{}]*)\}|'
  r'(?<=[0-9})\]\s])((?:square |cubic |sq )?(?:mm|cm|dm|km|ft|yd|mi|sec|units?|'
  r'inch(?:es)?|feet|foot|yards?|miles?|(?:centi|kilo|milli)?met(?:er|re)s?|seconds?|minutes?|hours?|days?|years?|dollars?|cents?|'
  r'degrees?|radians?)))\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?)?$'
)
FUNCTIONS = frozenset(
  re.findall(
    r'\w+',
    'sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim max min sup inf gcd lcm det mod '
    'matrix pmatrix bmatrix vmatrix infinity',
  )
)
LITTLE_WORDS = frozenset(re.findall(r'\w+', 'or of to is at no if on it be as by an so up we he'))
NAME = re.compile(
  r"(?:m\s*)?(?:\\angle\s*)?(?:[A-Za-z]|\\[A-Za-z]+|[A-Za-z]{3,}(?: [A-Za-z]+){0,3}|[A-Z]{2,3})(?:_(?:\w|\{\w{1,8}\}))?'?"
  r'(?:\^\s*(?:-1|\{-1\}))?(?:\([A-Za-z0-9, ]{1,12}\))?|\([A-Za-z](?:, ?[A-Za-z])+\)'
)
MEMBER = re.compile(r'^[A-Za-z]\s*\\in(?![A-Za-z])\s*')  # x \in [0, 1)
COORDINATES = re.compile(r'^\(([A-Za-z](?:, ?[A-Za-z])+)\)\s*=\s*(?=\()')  # (x, y) = (1, 2)
CLOCK = re.compile(r'[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}|[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?')  # no difference, no ratio
PROSE = re.compile(r"(?:[^\W_]|[\s'’,.&:/()%$-])+")
BASED = re.compile(r'([0-9A-Fa-f.]+)\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))')
EQUAL = re.compile(r'(?<![<>!:\\])=')
COSTLY = re.compile(
  r'\^\s*\{?\s*-?[0-9]{4,}|[0-9]\s*\}?\s*\^\s*\{?\s*[0-9]+\s*\^|[0-9]{3,}\s*\}?\s*!|!\s*!|[0-9]{3,}\s*\^\s*\{?\s*[0-9]{3}'
)  # exponents, towers and factorials that nobody writes as an answer
CHOICE = re.compile(r'[\[(]?\s*([A-Ja-j])\s*(?:[\])]\s*[.:,]?|[.:,])?')
CHOICE_TEXT = re.compile(r'(?:[\[(]\s*([A-J])\s*[\])][.:]?|([A-J])\s*[.:)])\s*(\S.*)', re.DOTALL)


class Undecided(Exception):
  """Needs a worker."""


class Malformed(Exception):
  """Not one answer, by rule."""


class Node(NamedTuple):
  """An answer's structure. shape: 'leaf', the brackets '()' '[)' ..., or 'set', 'list', 'union', whose items have no order."""

  shape: str
  text: str
  items: tuple[Node, ...] = ()


Leaf = Callable[[str, str], bool]


def undecided(gold: str, answer: str) -> bool:
  raise Undecided


def sane(text: str) -> bool:
  """Whether a text can be an answer at all, and may be handed to a parser."""
  if not text.strip() or len(text) > LIMIT:
    return False
  if any(
    (c.isnumeric() and not c.isascii() and c not in '²³') or (unicodedata.category(c)[0] == 'C' and c not in '\n\t') for c in text
  ):
    return False
  depth = 0
  for c in re.sub(r'\\[{}]', '', text):
    depth += (c == '{') - (c == '}')
    if not 0 <= depth <= DEEPEST:
      return False
  return depth == 0 and not COSTLY.search(text)


def unwrap(text: str) -> str:
  """Without the markup around the whole of an answer: $...$, \\(...\\), \\boxed{...}, **...**, a full stop."""
  for _ in range(8):
    before, text = text, re.sub(r'(?<![.\s])\s*\.$', '', text.strip())
    if (match := WRAPPED.fullmatch(text)) and '$' not in (inner := next(g for g in match.groups() if g is not None)):
      text = inner
    elif (
      text.startswith('\\boxed')
      and (inside := boxed(text))
      and re.fullmatch(r'\\boxed\s*\{' + re.escape(inside[0]) + r'\}', text)
    ):
      text = inside[0]
    if text == before:
      break
  return text


def spell(text: str) -> str:
  """One spelling of mathematics, without the unit behind it."""
  text = unwrap(text)
  for pattern, replacement in SPELLINGS:
    text = pattern.sub(replacement, text)
  text = MEMBER.sub('', text.strip())
  if (match := COORDINATES.match(text)) and (names := match[1].replace(' ', '').split(',')) == sorted(names):
    text = text[match.end() :]
  for _ in range(3):
    match = UNIT.search(text)
    if (
      not match
      or set(re.findall('[a-z]+', (match[1] or '').lower())) & TWISTS
      or re.search(r'(?<![A-Za-z^-])[0-9]', match[1] or '')
    ):
      break
    text = text[: match.start()]
  return text.strip()


def has_words(text: str) -> bool:
  """Whether prose is left in what should be mathematics ('infinity of answers', 'x or y')."""
  words = re.findall('[A-Za-z]+', re.sub(r'\\[A-Za-z]+', ' ', text))
  return '\\boxed' in text or any((len(w) > 2 and w not in FUNCTIONS) or w.lower() in LITTLE_WORDS for w in words)


def is_prose(text: str) -> bool:
  """Whether a gold answer is words: 'yes', 'New York', '1 hour 5 minutes'; not 'sin x', 'ab', 'x or y'."""
  text = TEXT_COMMAND.sub(r'\1', unwrap(text))
  words = re.findall(r'[^\W\d_]+', text)
  some = any(
    (len(w) > 2 and w.lower() not in FUNCTIONS) or (len(w) == 2 and (w.istitle() or w.lower() == 'no')) or not w.isascii()
    for w in words
  )
  return some and bool(PROSE.fullmatch(text)) and 'π' not in text


def split(text: str, separator: str) -> list[str]:
  """Parts between separators that stand outside all brackets. Raises Malformed for an empty one."""
  parts, depth, start, i = [], 0, 0, 0
  while i < len(text):
    depth += (text[i] in '([{') - (text[i] in ')]}')
    if depth == 0 and text.startswith(separator, i):
      parts.append(text[start:i].strip())
      i += len(separator)
      start = i
    else:
      i += 1
  parts.append(text[start:].strip())
  if len(parts) > 1 and not all(parts):
    raise Malformed
  return parts


def closes_at_end(text: str) -> bool:
  """Whether the bracket that opens a text is closed by its last sign: '(1,2)', not '(x+1)(x-1)'."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c in '([{') - (c in ')]}')
    if depth == 0:
      return i == len(text) - 1
  return False


def read(text: str, commas_group: bool = True) -> Node:
  """The structure of a spelled answer. `commas_group`: 100,200 is one number. Raises Malformed."""
  text = text.strip()
  if read_number(text) is not None and (commas_group or ',' not in text):
    return Node('leaf', text)

  def node(shape: str, parts: Sequence[str]) -> Node:
    if len(parts) > MOST_ITEMS:
      raise Malformed
    return Node(shape, text, tuple(read(part) for part in parts))

  if len(parts := split(text, '\\cup')) > 1:
    return node('union', parts)
  if text.count('\\pm') == 1 and '\\mp' not in text:
    return node('list', [re.sub(r'\\pm\s*', sign, text).removeprefix('+') for sign in '+-'])
  if text.startswith('\\{') and text.endswith('\\}') and closes_at_end(text[1:-2] + '}'):
    return node('set', split(text[2:-2], ','))
  if text[:1] in ('(', '[', '{') and text[-1] in ')]}' and closes_at_end(text):
    parts = split(text[1:-1], ',')
    if len(parts) > 1 and (text[0] == '{') == (text[-1] == '}'):
      return node('set' if text[0] == '{' else text[0] + text[-1], parts)
  for separator in ';,':
    if len(parts := split(text, separator)) > 1:
      return node('list', parts)
  return Node('leaf', text)


def equation(text: str) -> tuple[str | None, str]:
  """(name, value) of 'x=5'; (None, text) without '='; ('', text) for another equation. Raises Malformed for a chain and for '=' between
  two numbers ('41=42': the claim of one, the hope for the other)."""
  if re.search(r'\\approx(?![A-Za-z])|≈', text):
    raise Malformed  # of two sides, the parser takes one: '3 \\approx x' is 3
  sides = [side.strip() for side in EQUAL.split(text)]
  if len(sides) == 1:
    return None, text
  if len(sides) > 2 or not all(sides) or not re.search('[A-Za-z]', TEXT_COMMAND.sub(r'\1', text)):
    raise Malformed
  name = TEXT_COMMAND.sub(r'\1', sides[0]).strip()
  if TWISTS & set(re.findall('[a-z]+', name.lower())):
    raise Malformed  # 'not x = 5'
  if NAME.fullmatch(name):
    return re.sub(r'[\s{}]', '', name), sides[1]
  return '', text


def same_number(gold: Number, answer: Number) -> bool:
  """Equal in value. Where one has a percent sign, a number up to 1 is a share (50 % is 0.5) and one above it was asked for in percent (50 %
  is 50); so 50 is never 0.5. 84/2 for 42 is a division that was not done."""
  if answer.divided and answer.value.denominator == 1 and not gold.divided:
    return False
  if answer.percent == gold.percent:
    return answer.value == gold.value
  marked, bare = (answer.value, gold.value) if answer.percent else (gold.value, answer.value)
  return bare == (marked / 100 if abs(bare) <= 1 else marked)


def compare_leaves(gold: str, answer: str, leaf: Leaf) -> bool:
  (gold_name, gold_value), (name, value) = equation(gold), equation(answer)
  if gold_name == '' or (gold_name is not None and name is not None and name != gold_name):
    return name is not None and not has_words(answer) and leaf(gold, answer)
  if name == '':
    return gold_name is not None and not has_words(answer) and leaf(gold, answer)
  return compare_values(gold_value, value, leaf)


def compare_values(gold: str, answer: str, leaf: Leaf) -> bool:
  if is_prose(gold):
    return normalized(gold) == normalized(answer)
  if based := BASED.fullmatch(gold):
    found = BASED.fullmatch(answer)
    return found is not None and (based[1].upper(), based[2] or based[3]) == (found[1].upper(), found[2] or found[3])
  if BASED.search(answer) and not BASED.search(gold):
    return False
  number, found = read_number(gold), read_number(answer)
  if number is not None and found is not None:
    return same_number(number, found)
  if number is not None:
    return False  # a number is to be worked out: 16*2-3 for 29 repeats the question
  return not has_words(answer) and leaf(gold, answer)


def compare(gold: Node, answer: Node, leaf: Leaf) -> bool:
  if gold.shape == 'leaf':
    return answer.shape == 'leaf' and compare_leaves(gold.text, answer.text, leaf)
  if gold.shape not in ('set', 'list', 'union'):
    pairs = zip(gold.items, answer.items, strict=False)
    same = gold.shape == answer.shape and len(gold.items) == len(answer.items)
    return same and all(compare(g, a, leaf) for g, a in pairs)
  items = answer.items
  if gold.shape == 'set' and answer.shape == 'leaf':
    items = (answer,)
  elif (gold.shape == 'union') != (answer.shape == 'union') or answer.shape not in ('set', 'list', 'union'):
    return False
  names = {equation(item.text)[0] for item in gold.items if item.shape == 'leaf'}
  if len(names) > 1 and any(item.shape == 'leaf' and equation(item.text)[0] is None for item in items):
    return False  # x=1, y=2 says which is which
  left = list(items)
  for item in gold.items if len(items) == len(gold.items) else ():
    for other in left:
      if compare(item, other, leaf):
        left.remove(other)
        break
    else:
      return False
  return len(items) == len(gold.items)


def separated(text: str) -> str:
  """'1 and 2', '1 or 2', '1; 2' as '1, 2'."""
  text = re.sub(r'\\(?:text|mbox)\s*\{\s*(and|or)\s*\}', r' \1 ', text)
  return re.sub(r',?\s+(?:and|or)\s+', ', ', text)


def normalized(text: str) -> str:
  """A text without case, punctuation, articles and spacing. Signs and points of numbers stay."""
  text = unicodedata.normalize('NFKC', TEXT_COMMAND.sub(r'\1', unwrap(text))).casefold()
  text = re.sub(r"['’`]", '', text)
  text = re.sub(r'[_\-/](?=\s|$)|(?<=[^\W\d_])[_\-/](?=[^\W\d_])', ' ', text)
  text = re.sub(r'[!?"“”*(){}\[\]$\\:;]|[.,](?![0-9])', ' ', text)
  words = text.split()
  return ' '.join([w for w in words if w not in ('a', 'an', 'the')] or words)


def option(text: str) -> tuple[str, str] | None:
  """(letter, text behind it) of 'B', '(B)', 'B. Paris'; None for anything else."""
  text = TEXT_COMMAND.sub(r'\1', unwrap(text)).strip()
  if match := CHOICE.fullmatch(text):
    return match[1].upper(), ''
  if match := CHOICE_TEXT.fullmatch(text):
    return match[1] or match[2], match[3]
  return None


def compare_choice(gold: str, answer: str) -> bool:
  expected, found = option(gold), option(answer)
  if expected is None:
    raise Malformed
  if found is None:
    return bool(expected[1]) and normalized(answer) == normalized(expected[1])
  if found[0] != expected[0]:
    return False
  if option(found[1]) is not None:
    return False  # 'B. A'
  if expected[1]:
    return not found[1] or normalized(found[1]) == normalized(expected[1])
  # The gold's own text is unknown: any will do that takes nothing back.
  words = re.findall(r'[^\W\d_]+', found[1])
  return not any(re.fullmatch('[B-J]', w) or w.lower() in ('or', 'and', 'not', 'nor', 'either', 'both', 'but') for w in words)


def kind_of(gold: str) -> str | None:
  """What kind of answer a gold answer is; None where it is none that could be checked."""
  if not sane(gold) or gold.strip().lower() in NO_GOLD:
    return None
  if read_number(gold) is not None:
    return 'number'
  found = option(gold)
  if found and found[0] in unwrap(gold):  # the letter as it stands: in lower case it is a variable
    return 'choice'
  if is_prose(gold) or CLOCK.fullmatch(unwrap(gold)):
    return 'text'
  try:
    node = read(spell(separated(gold)))
    if node.shape == 'list' and all(equation(item.text)[0] for item in node.items):
      return 'set'  # 'x=1 or x=-1', where '5 or 6' cannot make up its mind
    return 'set' if read(spell(gold)).shape in ('set', 'list') else 'math'
  except Malformed:
    return None


def structure(text: str, kind: str) -> Node:
  return read(spell(separated(text)), commas_group=False) if kind == 'set' else read(spell(text))


def expected(gold: str, kind: str) -> Node:
  """The gold answer's structure; that of a 'set' is one whatever its brackets are."""
  node = structure(gold, kind)
  return Node('set', gold, node.items or (node,)) if kind == 'set' and node.shape != 'union' else node


def decide(gold: str, answer: str, kind: str, leaf: Leaf = undecided) -> bool:
  """The verdict by rule; `leaf` compares expressions (here, it raises Undecided). The gold answer is readable."""
  if not sane(answer):
    return False
  try:
    if kind == 'text':
      return normalized(gold) == normalized(answer)
    if kind == 'choice':
      return compare_choice(gold, answer)
    if kind == 'number' and (found := read_number(answer)) is not None:  # before the spelling, which takes signs of money away
      number = read_number(gold)
      return number is not None and same_number(number, found)
    given = structure(answer, kind)
    if kind == 'set' and given.shape == structure(gold, kind).shape:
      given = given._replace(shape='set') if given.items else given
    return compare(expected(gold, kind), given, leaf)
  except Malformed:
    return False


def readable(gold: str, kind: str, leaf: Callable[[str], bool] | None = None) -> bool:
  """Whether a gold answer can be compared with anything; `leaf` says it of expressions (without it they raise Undecided)."""
  if not sane(gold):
    return False
  if kind == 'number':
    return read_number(gold) is not None
  if kind == 'text':
    return bool(normalized(gold))
  if kind == 'choice':
    return option(gold) is not None
  try:
    todo, values = [expected(gold, kind)], []
    while todo:
      node = todo.pop()
      todo += node.items
      if not node.items:
        name, value = equation(node.text)
        values.append(node.text if name == '' else value)
  except Malformed:
    return False
  expressions = [v for v in values if read_number(v) is None and not BASED.fullmatch(v) and not is_prose(v)]
  if any(has_words(v) for v in expressions):
    return False
  if leaf is None and expressions:
    raise Undecided
  return all(leaf(v) for v in expressions if leaf)


class Kept:
  """The newest verdicts, by what was asked. For any thread."""

  def __init__(self, size: int):
    self.size, self.lock = size, threading.Lock()
    self.values: OrderedDict[tuple, bool] = OrderedDict()

  def get(self, key: tuple) -> bool | None:
    with self.lock:
      if key in self.values:
        self.values.move_to_end(key)
      return self.values.get(key)

  def put(self, key: tuple, value: bool) -> None:
    with self.lock:
      self.values[key] = value
      while len(self.values) > self.size:
        self.values.popitem(last=False)


VERDICTS, GOLDS = Kept(CACHED), Kept(CACHED)


def ask(kept: Kept, keys: Sequence[tuple], decide_here: Callable[..., bool], function: str, names: Sequence[str]) -> dict:
  """key -> verdict, from what is kept, by rule, or from the workers; None where they ran over the limit or died."""
  answers, open_keys = {}, []
  for key in dict.fromkeys(keys):
    answers[key] = kept.get(key)
    if answers[key] is None:
      try:
        answers[key] = decide_here(*key)
        kept.put(key, answers[key])
      except Undecided:
        open_keys.append(key)
  outcomes: list[Outcome] = []
  if open_keys:
    outcomes = shared('math').map(function, [dict(zip(names, key, strict=True)) for key in open_keys], TIMEOUT)
  for key, outcome in zip(open_keys, outcomes, strict=True):
    if outcome.status == 'value':
      answers[key] = outcome.value
      kept.put(key, outcome.value)
    elif outcome.message.startswith(('ImportError', 'ModuleNotFoundError')):  # not this answer's fault: no answer could be judged
      raise RuntimeError(f'{function}: {outcome.message}')
    else:
      LOG.warning('no verdict on %r: %s', key, outcome.message)
  return answers


def verdicts(golds: Sequence[object], answers: Sequence[str | None], kinds: Sequence[str | None]) -> list[bool | None]:
  """Whether each answer is its gold answer. None, no verdict, where the gold answer cannot be read, or where a worker had to be stopped
  (counted in `pool.shared('math').counts`). A kind of None or 'math' is read off the gold answer. Raises ConfigError for an unknown
  kind."""
  rows: list[tuple[str, str, str | None] | None] = []
  for gold, answer, kind in zip(golds, answers, kinds, strict=True):
    check(kind is None or kind in KINDS, f"column 'answer_kind': {kind!r} is none of {', '.join(KINDS)}")
    text = str(gold) if isinstance(gold, (str, int, float)) and not isinstance(gold, bool) else ''
    kind = kind_of(text) if kind in (None, 'math') else kind
    rows.append(None if kind is None else (text, kind, answer))
  read_keys = [row[:2] for row in rows if row]
  good = ask(GOLDS, read_keys, readable, 'rl_reasoning.verify.symbolic:can_read', ('gold', 'kind'))
  keys = [(g, a, k) for g, k, a in filter(None, rows) if good[g, k] and a is not None]
  found = ask(VERDICTS, keys, decide, 'rl_reasoning.verify.symbolic:judge', ('gold', 'answer', 'kind'))
  results: list[bool | None] = []
  for row in rows:
    if row is None or not good[row[:2]]:
      results.append(None)
    else:
      results.append(False if row[2] is None else found[row[0], row[2], row[1]])
  return results
