"""Tasks: a row is a function of (seed, split, index), its worked chain is right, and nothing of the test split is trained on."""

import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from rl_reasoning.config import ConfigError
from rl_reasoning.rewards import REWARDS
from rl_reasoning.tasks import TASKS, dataset
from rl_reasoning.tasks.arithmetic import apply, careless
from rl_reasoning.tasks.math import last_box
from rl_reasoning.tasks.procedural import is_test
from rl_reasoning.tasks.svamp import chain_of
from rl_reasoning.tasks.word_problems import THINGS
from rl_reasoning.tokenizer import render_completion
from rl_reasoning.verify.math import check_countdown

GSM8K = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'gsm8k'
PROCEDURAL = ('arithmetic', 'countdown', 'linear', 'base_conversion', 'knights_knaves', 'word_problems')
OPERATIONS = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '/': int.__floordiv__}


def make(task, split='train', seed=0, size=300, path='', **options):
  return list(TASKS[task].rows(split, seed, size, str(path), **options))


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def accuracy(row):
  columns = {k: [v] for k, v in row.items() if k != 'prompt'}
  return REWARDS['accuracy'](prompts=[row['prompt']], completions=[render_completion(row)], **columns)[0]


def read_step(step):
  """'12+7=19' -> (12, '+', 7, 19); a first number may be negative."""
  left, result = step.split('=')
  at = next(i for i, c in enumerate(left) if i and c in OPERATIONS)
  return int(left[:at]), left[at], int(left[at + 1 :]), int(result)


@pytest.mark.parametrize('task', PROCEDURAL)
@pytest.mark.parametrize('split', ['train', 'test'])
def test_rows_are_a_function_of_seed_split_and_index(task, split):
  """Failure: a longer data set is another one, or the seed is not in it: no run can be repeated or extended."""
  rows = make(task, split, seed=3)
  assert make(task, split, seed=3) == rows
  assert make(task, split, seed=3, size=40) == rows[:40]
  other = make(task, split, seed=4)
  assert sum(a == b for a, b in zip(rows, other, strict=True)) < 30


@pytest.mark.parametrize(
  'task,options',
  [
    ('arithmetic', {'operands': 2}), ('arithmetic', {}), ('countdown', {'count': 2}), ('linear', {'high': 4}),
    ('base_conversion', {'high': 20}), ('knights_knaves', {'people': 3}), ('word_problems', {'steps': 1}),
  ],
)  # fmt: skip
def test_no_problem_in_both_splits(task, options):
  """Failure: a policy is tested on what it was trained on, under some pair of seeds, or a test problem is counted twice."""
  trained = {row['prompt'] for seed in range(3) for row in make(task, seed=seed, size=1000, **options)}
  for seed in range(2):
    tested = [row['prompt'] for row in make(task, 'test', seed=seed, size=20, **options)]
    assert len(set(tested)) == len(tested) == 20
    assert not trained & set(tested)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('options', [{}, {'operands': 5, 'operators': '+-*', 'low': 0, 'high': 30}], ids=['default', 'wide'])
def test_clean_chains_are_right(split, options):
  """Failure: demonstrations teach wrong arithmetic, or a chain is not that of its problem."""
  for row in make('arithmetic', split, **options):
    rest, value = row['prompt'], None
    for a, operator, b, result in map(read_step, row['chain_of_thought'].split(';')):
      assert value in (None, a) and OPERATIONS[operator](a, b) == result
      start = f'{a}{operator}{b}' if value is None else f'{operator}{b}'
      assert rest.startswith(start)
      rest, value = rest[len(start) :], result
    assert rest == '=' and row['completion'] == row['answer'] == str(value)
    assert accuracy(row) == 1


def test_styles():
  """Failure: the gold answer is the careless author's, errors come at another rate than the config says, or weights are not kept."""
  rows = make('arithmetic', size=6000, styles={'sloppy': 3, 'direct': 1}, sloppiness=0.3)
  direct = [row for row in rows if not row['chain_of_thought']]
  assert 0.22 < len(direct) / len(rows) < 0.28
  erred, could = 0, 0
  for row in rows:
    numbers = row['prompt'].rstrip('=').replace('-', '+-').split('+')
    assert row['answer'] == str(sum(map(int, numbers)))
    for a, operator, b, result in map(read_step, filter(None, row['chain_of_thought'].split(';'))):
      assert result in (apply(a, operator, b), careless(a, operator, b))
      if careless(a, operator, b) != apply(a, operator, b):
        could, erred = could + 1, erred + (result != apply(a, operator, b))
  assert could > 2000 and 0.27 < erred / could < 0.33
  wrong = {
    style: [r['completion'] != r['answer'] for r in rows if bool(r['chain_of_thought']) == style] for style in (True, False)
  }
  for values in wrong.values():
    assert 0.1 < sum(values) / len(values) < 0.4
  assert all(r['completion'] == r['answer'] for r in make('arithmetic', 'test', styles={'sloppy': 1}))
  assert make('arithmetic', styles={'direct': 1, 'sloppy': 3}) == make('arithmetic', styles={'sloppy': 3, 'direct': 1})


def test_languages():
  """Failure: steps are in other languages than the config says, mixed at another rate, in one language as careless as in the other, or the
  words change what is asked, or the chains of a config that knows no languages."""
  options = {'styles': {'sloppy': 1}, 'languages': {'en': 3, 'ru': 1}, 'mixing': 0.4, 'sloppiness': {'en': 0.8, 'ru': 0.2}}
  rows, steps = make('arithmetic', size=4000, **options), []
  for row in rows:
    pieces = row['chain_of_thought'].split(';')
    assert all(piece.startswith(('then', 'то')) for piece in pieces)
    steps.append([(piece[0] == 't', *read_step(piece.removeprefix('then').removeprefix('то'))) for piece in pieces])
  assert len('then') == len('то'.encode())  # neither language is the shorter one
  assert abs(np.mean([english for chain in steps for english, *_ in chain]) - 0.75) < 0.02
  # The two steps of a chain differ where one or both are drawn anew, and the draw is of the other language.
  differs = np.mean([chain[0][0] != chain[1][0] for chain in steps])
  assert abs(differs - (1 - 0.6**2) * 2 * 0.75 * 0.25) < 0.03
  for language, rate in ((True, 0.8), (False, 0.2)):
    could = [(a, o, b, r) for chain in steps for english, a, o, b, r in chain if english == language]
    could = [(a, o, b, r) for a, o, b, r in could if careless(a, o, b) != apply(a, o, b)]
    assert abs(np.mean([r != apply(a, o, b) for a, o, b, r in could]) - rate) < 0.04
  by_operator = make('arithmetic', size=4000, **options | {'sloppiness': {'en': {'+': 0.9, '-': 0.1}, 'ru': 0.5}})
  for operator, rate in (('+', 0.9), ('-', 0.1)):
    english = [p for row in by_operator for p in row['chain_of_thought'].split(';') if p.startswith('then')]
    could = [(a, o, b, r) for a, o, b, r in map(read_step, (p.removeprefix('then') for p in english)) if o == operator]
    could = [(a, o, b, r) for a, o, b, r in could if careless(a, o, b) != apply(a, o, b)]
    assert abs(np.mean([r != apply(a, o, b) for a, o, b, r in could]) - rate) < 0.04
  plain = make('arithmetic', size=50)
  assert [r['prompt'] for r in rows[:50]] == [r['prompt'] for r in plain] and [r['answer'] for r in rows[:50]] == [
    r['answer'] for r in plain
  ]
  assert not any(set('then') & set(row['chain_of_thought']) for row in plain)
  assert {len(set(re.findall('then|то', r['chain_of_thought']))) for r in make('arithmetic', languages={'en': 1, 'ru': 1})} == {1}


def test_careless():
  """Failure: the careless author forgets something else than the carry or the borrow."""
  cases = {
    (17, '+', 5): 12,
    (17, '+', 2): 19,
    (21, '-', 4): 27,
    (24, '-', 1): 23,
    (4, '-', 21): -27,
    (-3, '+', 8): 5,
    (7, '*', 8): 56,
  }
  assert {case: careless(*case) for case in cases} == cases


@pytest.mark.parametrize('options', [{}, {'count': 2}, {'count': 6, 'high': 50, 'max_target': 1000}], ids=str)
def test_countdown_demonstrations_solve_their_problem(options):
  """Failure: the demonstrations are refused by the project's own checker, or their steps are wrong."""
  for row in make('countdown', size=200, **options) + make('countdown', 'test', size=10, **options):
    assert 0 < row['target'] <= options.get('max_target', 100) and len(row['numbers']) == options.get('count', 3)
    assert row['prompt'] == f'{",".join(map(str, sorted(row["numbers"])))}->{row["target"]}:'
    assert check_countdown(row['numbers'], row['target'], row['completion']) and accuracy(row) == 1
    have = sorted(row['numbers'])
    for a, operator, b, result in map(read_step, row['chain_of_thought'].split(';')):
      assert OPERATIONS[operator](a, b) == result and (operator != '/' or a % b == 0)
      have.remove(a)
      have.remove(b)
      have.append(result)
    assert have == [row['target']]


@pytest.mark.parametrize(
  'task,key,value',
  [
    ('arithmetic', 'operands', 1), ('arithmetic', 'low', -1), ('arithmetic', 'low', 16), ('arithmetic', 'high', 1),
    ('arithmetic', 'operators', ''), ('arithmetic', 'operators', '+/'), ('arithmetic', 'sloppiness', 1.5),
    ('arithmetic', 'sloppiness', -0.1), ('arithmetic', 'styles', {'messy': 1}), ('arithmetic', 'styles', {'clean': 0}),
    ('arithmetic', 'styles', {'clean': 2, 'sloppy': -1}), ('arithmetic', 'languages', {'fr': 1}), ('arithmetic', 'languages', {'en': 0}),
    ('arithmetic', 'mixing', 0.5), ('arithmetic', 'mixing', 1.5), ('arithmetic', 'sloppiness', {'en': 0.5}),
    ('arithmetic', 'sloppiness', {'': {'+': 0.5}}), ('arithmetic', 'sloppiness', {'': {'+': 0.5, '-': 2}}),
    ('countdown', 'count', 1), ('countdown', 'high', 0),
    ('countdown', 'max_target', 0), ('linear', 'high', 1), ('base_conversion', 'low_base', 1), ('base_conversion', 'low_base', 16),
    ('base_conversion', 'high_base', 2), ('base_conversion', 'high_base', 17), ('base_conversion', 'high', 0),
    ('knights_knaves', 'people', 1), ('knights_knaves', 'people', 9), ('word_problems', 'steps', 0), ('word_problems', 'steps', 21),
    ('word_problems', 'high', 1), ('word_problems', 'distractors', 1.5), ('word_problems', 'distractors', -0.1),
  ],
)  # fmt: skip
def test_options_out_of_range(task, key, value):
  """Failure: a wrong option is taken, or its error does not say which key to change."""
  with pytest.raises(ConfigError, match='low' if key == 'high' and task == 'arithmetic' else f'data.options.{key}'):
    make(task, **{key: value})


@pytest.mark.parametrize(
  'task,options',
  [
    ('arithmetic', {'operands': 2, 'high': 4}), ('countdown', {'count': 2, 'high': 3}), ('linear', {'high': 2}),
    ('base_conversion', {'high_base': 3}), ('knights_knaves', {'people': 2}),
  ],
)  # fmt: skip
def test_too_few_problems(task, options):
  """Failure: a test split is filled with repeated problems, or the search for new ones never ends."""
  with pytest.raises(ConfigError, match=r'the test split has fewer than 300 problems: [0-9]+ found'):
    make(task, 'test', **options)


def test_rows_of_before():
  """Failure: a change of code makes other problems of the same seed, and no published result can be repeated."""
  digests = {}
  for task, options in (('arithmetic', {'operands': 4, 'styles': {'direct': 0.5, 'sloppy': 0.5}}), ('countdown', {'count': 4})):
    for split in ('train', 'test'):
      rows = [{k: v for k, v in row.items() if k != 'difficulty'} for row in make(task, split, seed=3, size=100, **options)]
      digests[task, split] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
  assert digests == {
    ('arithmetic', 'train'): '2899c3e86955', ('arithmetic', 'test'): 'f95672deeea7',
    ('countdown', 'train'): '545409ff139c', ('countdown', 'test'): '40cf84f8dc41',
  }  # fmt: skip


@pytest.mark.parametrize(
  'task,options,difficulties',
  [
    ('arithmetic', {'operands': 5}, {5}), ('countdown', {'count': 4}, {4}), ('linear', {}, {'integer'}),
    ('linear', {'fractions': True}, {'fraction'}),
    ('base_conversion', {'low_base': 9, 'high': 80}, {1, 2}), ('knights_knaves', {'people': 4}, {4}), ('word_problems', {'steps': 3}, {3}),
  ],
)  # fmt: skip
def test_difficulty(task, options, difficulties):
  """Failure: an evaluation groups problems by something else than how hard they are."""
  assert {row['difficulty'] for row in make(task, **options)} == difficulties


def equal_sides(equation, **values):
  """Whether an equation of ours ('5x-3=2x+9', '26=8*3+2') holds exactly."""
  text = re.sub(r'(?<=[0-9])x', '*x', equation)
  left, right = (eval(re.sub('[0-9]+', r'Fraction(\g<0>)', side), {'Fraction': Fraction, **values}) for side in text.split('='))
  return left == right


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('options', [{}, {'fractions': True}, {'high': 50}], ids=str)
def test_linear(split, options):
  """Failure: a solution does not solve its equation, others do too, a step changes what solves it, or a fraction is not reduced."""
  fractions = 0
  for row in make('linear', split, size=100, **options):
    x = Fraction(row['answer'])
    assert row['completion'] == row['answer'] == str(x)
    steps = row['chain_of_thought'].split(';')
    assert all(equal_sides(step, x=x) and not equal_sides(step, x=x + 1) for step in [row['prompt'], *steps])
    assert steps[-1] == f'x={x}' and len(set(steps)) == len(steps)
    fractions += x.denominator > 1
    assert not re.search(r'(?<![0-9])[01]x|[+]-|-[+]|--|[+-]0', row['prompt'])
    assert accuracy(row) == 1
  assert fractions == (100 if options.get('fractions') else 0)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('options', [{}, {'low_base': 10, 'high_base': 11, 'high': 5000}], ids=str)
def test_base_conversion(split, options):
  """Failure: digits are wrong, a step of the chain is, or the answer is not what its remainders spell."""
  bases, letters = set(), 0
  for row in make('base_conversion', split, **options):
    digits, source, target = re.fullmatch(r'Convert ([0-9a-f]+) from base ([0-9]+) to base ([0-9]+)\.', row['prompt']).groups()
    value, source, target = int(digits, int(source)), int(source), int(target)
    assert source != target and 0 < value <= options.get('high', 255)
    assert int(row['answer'], target) == value and row['completion'] == row['answer'] == row['answer'].lower().lstrip('0')
    bases |= {source, target}
    letters += not row['answer'].isdigit()
    steps = row['chain_of_thought'].split(';')
    into = steps[: len(digits)] if source != 10 else []
    assert all(equal_sides(step) for step in steps[bool(into) :])
    assert not into or into[-1].split('=')[-1] == str(value)
    if out := steps[len(into) :]:
      assert target != 10 and out[0].startswith(f'{value}=') and all(f'*{target}+' in step for step in out)
      assert ''.join('0123456789abcdef'[int(step.split('+')[1])] for step in reversed(out)) == row['answer']
    else:
      assert target == 10
  assert bases == set(range(options.get('low_base', 2), options.get('high_base', 16) + 1)) and letters > 20


def read_statement(text):
  """What a person of a puzzle says -> the names of knights -> whether it is so, by another way than the task's."""

  def claim(name, kind):
    return lambda knights: (name in knights) == (kind == 'knight')

  part = r'(\w+) (?:is|am) a (knight|knave)'
  if found := re.fullmatch(r'[Ee]xactly (\d+) of us (?:is a knight|are knights)', text):
    return lambda knights: len(knights) == int(found[1])
  if found := re.fullmatch(r'(\w+) and (\w+) are of (the same kind|different kinds)', text):
    return lambda knights: ((found[1] in knights) == (found[2] in knights)) == (found[3] == 'the same kind')
  if found := re.fullmatch(f'[Ii]f {part}, then {part}', text):
    a, b = claim(found[1], found[2]), claim(found[3], found[4])
    return lambda knights: b(knights) if a(knights) else True
  if found := re.fullmatch(f'{part}(?: (and|or) {part})?', text):
    a = claim(found[1], found[2])
    b = claim(found[4], found[5]) if found[3] else a
    return lambda knights: (a(knights) or b(knights)) if found[3] == 'or' else (a(knights) and b(knights))
  raise AssertionError(text)


@pytest.mark.parametrize('people', [2, 3, 5])
def test_knights_and_knaves(people):
  """Failure: a puzzle has no or several solutions, the answer is not its solution, or a contradiction of the chain is none."""
  found, sizes = make('knights_knaves', size=150, people=people), set()
  for row in found + make('knights_knaves', 'test', size=10, people=people):
    said = re.findall(r'(\w+) says: "(.*?)\."', row['prompt'])
    names = [name for name, _ in said]
    statements = [read_statement(re.sub(r'\bI\b', name, text)) for name, text in said]
    assert len(names) == people
    every = [set(itertools.compress(names, kinds)) for kinds in itertools.product((0, 1), repeat=people)]

    def fits(knights, who, statements=statements, names=names):
      return all(statements[names.index(name)](knights) == (name in knights) for name in who)

    (solution,) = [knights for knights in every if fits(knights, names)]
    assert row['answer'] == row['completion'] == (', '.join(name for name in names if name in solution) or 'none')
    *dead, last = row['chain_of_thought'].split('\n')
    for line in dead:
      supposed = re.findall(r'(\w+) is a (knight|knave)', line)
      liar = re.search(r', then (\w+) (lies|tells the truth), contradiction\.$', line)
      assert (liar[1], {'lies': 'knight', 'tells the truth': 'knave'}[liar[2]]) in supposed
      agree = [k for k in every if all((name in k) == (kind == 'knight') for name, kind in supposed)]
      assert agree and not any(fits(k, [liar[1]]) for k in agree)
    assert [name for name, kind in re.findall(r'(\w+) is a (knight|knave)', last) if kind == 'knight'] == [
      n for n in names if n in solution
    ]
    assert last.endswith(', then all fits.')
    sizes.add(len(solution))
  assert sizes >= set(range(people + 1)) - {0} if people < 5 else len(sizes) >= 4


def solve_story(prompt):
  """The answer to a word problem, read from its sentences: by keeping books of who has what."""
  *sentences, question = re.split(r'(?<=\.) ', prompt)
  have, unknown, bags = {}, {}, None
  for text in sentences:
    if found := re.fullmatch(r'Now (\w+) has (\d+) (\w+)\.', text):
      unknown[found[1], found[3]] = int(found[2]) - have[found[1], found[3]]
    elif found := re.fullmatch(r'(\w+) has some (\w+)\.', text):
      have[found[1], found[2]] = 0  # changes are counted from what is unknown
    elif found := re.fullmatch(r'(\w+) has (\d+) boxes with (\d+) (\w+) in each\.', text):
      have[found[1], found[4]] = int(found[2]) * int(found[3])
    elif found := re.fullmatch(r'(\w+) has (\d+) (more|fewer) (\w+) than (\w+)\.', text):
      have[found[1], found[4]] = have[found[5], found[4]] + int(found[2]) * (1 if found[3] == 'more' else -1)
    elif found := re.fullmatch(r'(\w+) has (\d+) (\w+)\.', text):
      have[found[1], found[3]] = int(found[2])
    elif found := re.fullmatch(r'(\w+) (buys|finds|gets|gives|loses|sells) (\d+) (?:more )?(\w+)(?: (?:from|to) \w+)?\.', text):
      have[found[1], found[4]] += int(found[3]) * (1 if found[2] in ('buys', 'finds', 'gets') else -1)
    elif found := re.fullmatch(r'(\w+) packs all of them into bags of (\d+)\.', text):
      bags = found[1], int(found[2])
    else:
      raise AssertionError(text)
  if found := re.fullmatch(r'How many (\w+) does (\w+) have now\?', question):
    return have[found[2], found[1]]
  if found := re.fullmatch(r'How many (\w+) did (\w+) have at first\?', question):
    return unknown[found[2], found[1]]
  assert question == f'How many bags does {bags[0]} fill?'
  (owned,) = {n for (name, _), n in have.items() if name == bags[0]}
  assert owned % bags[1] == 0
  return owned // bags[1]


@pytest.mark.parametrize('options', [{'steps': 1}, {}, {'steps': 5, 'high': 50, 'distractors': 1.0}], ids=str)
def test_word_problems(options):
  """Failure: an answer is not what the story says, a step of the chain is wrong, or a number that plays no part is reckoned with."""
  kinds = set()
  for row in make('word_problems', **options) + make('word_problems', 'test', size=50, **options):
    assert row['completion'] == row['answer'] == str(solve_story(row['prompt'])) and int(row['answer']) >= 1
    steps, value = row['chain_of_thought'].split(';'), None
    for a, operator, b, result in map(read_step, steps):
      assert OPERATIONS[operator](a, b) == result and (operator != '/' or a % b == 0) and value in (None, a)
      value = result
    assert str(value) == row['answer'] and len(steps) == options.get('steps', 2)
    kinds.add(row['prompt'].split()[-1])
    assert accuracy(row) == 1
  assert kinds == {'now?', 'first?', 'fill?'}
  for share in (0.0, 1.0):
    for row in make('word_problems', size=50, distractors=share):
      assert len({word for word in re.findall('[a-z]+', row['prompt']) if word in THINGS}) == 1 + share


def answered(row, answer):
  columns = {k: [v] for k, v in row.items() if k != 'prompt'}
  return REWARDS['accuracy'](prompts=[row['prompt']], completions=[f'<think>a</think><answer>{answer}</answer>'], **columns)[0]


def near_misses(row):
  """Wrong answers that look much like the right one."""
  answer = row['answer']
  match row['answer_kind']:
    case 'number':
      return [f'{answer}1', str(Fraction(answer) + 1), str(-Fraction(answer)) if Fraction(answer) else '1']
    case 'text':
      return [f'{answer}0', f'0{answer}', answer[:-1], f'{answer} or {answer}1']
    case 'set':
      names = set(re.findall('[A-Z][a-z]+(?= says)', row['prompt']))
      right = set() if answer == 'none' else set(answer.split(', '))
      return [', '.join(sorted(right ^ {name})) or 'none' for name in names]
    case 'choice':
      return [chr(ord(answer) + 1), f'{answer} or {chr(ord(answer) + 1)}', '']
    case 'math':
      return [f'{answer}+1', f'2({answer})']


@pytest.mark.parametrize(
  'task,options',
  [('linear', {'fractions': True}), ('linear', {}), ('base_conversion', {}), ('knights_knaves', {}), ('word_problems', {})],
)
def test_near_misses_are_not_paid(task, options):
  """Failure: the reward refuses the right answer of a task, or pays a wrong one."""
  for row in make(task, size=60, **options):
    assert accuracy(row) == 1, row
    for wrong in near_misses(row):
      assert answered(row, wrong) == 0, (row, wrong)


def test_answers_in_other_words():
  """Failure: the right set in another order or the right digits in capitals are not paid."""
  several = next(row for row in make('knights_knaves', people=4) if row['answer'].count(',') >= 2)
  assert answered(several, ','.join(reversed(several['answer'].split(', ')))) == 1
  letters = next(row for row in make('base_conversion', low_base=12) if not row['answer'].isdigit())
  assert answered(letters, letters['answer'].upper()) == 1


QUESTIONS = [{'prompt': f'What is {n} plus {n}?', 'answer': str(2 * n)} for n in range(400)]


def test_no_test_split_of_a_single_file(tmp_path):
  """Failure: of problems that are only asked, or only trained on, one in ten is silently left out."""
  path = tmp_path / 'one.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'{n}+1=', 'answer': str(n + 1)}) + '\n' for n in range(60)))
  rows = TASKS['dataset'].rows
  assert len(list(rows('train', 0, None, str(path)))) < 60 and len(list(rows('train', 0, None, str(path), test_share=0.0))) == 60
  with pytest.raises(ConfigError, match=r"'data\.options\.test_share': 1\.0 is not in"):
    list(rows('train', 0, None, str(path), test_share=1.0))


def test_single_file_is_split_by_hash(tmp_path):
  """Failure: rows are lost between the splits, stand in both, or move when the file grows."""
  path = write(tmp_path / 'all.jsonl', QUESTIONS)
  train, test = make('dataset', 'train', path=path, size=None), make('dataset', 'test', path=path, size=None)
  assert [row for row in QUESTIONS if row in train] == train and [row for row in QUESTIONS if row not in train] == test
  assert 20 < len(test) < 70
  assert make('dataset', 'test', path=path, size=7) == test[:7]
  grown = write(tmp_path / 'grown.jsonl', [{'prompt': 'new'}, *QUESTIONS])
  assert [row for row in make('dataset', 'test', path=grown, size=None) if row['prompt'] != 'new'] == test


def test_leaked_prompt_is_left_out_of_training(tmp_path):
  """Failure: a prompt of test.jsonl is trained on because it is spaced, cased or wrapped in chat messages differently."""
  question = {'role': 'user', 'content': 'What is 3 plus 3?'}
  write(tmp_path / 'test.jsonl', [QUESTIONS[1], QUESTIONS[2], QUESTIONS[3]])
  leaks = [
    QUESTIONS[1],
    {'prompt': ' what IS  2 plus\n2? ', 'answer': '4'},
    {'prompt': [question], 'answer': '6'},
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, question, {'role': 'assistant', 'content': '6'}]},
  ]
  kept = [
    QUESTIONS[4],
    {'messages': [{'role': 'user', 'content': 'Hello?'}, {'role': 'assistant', 'content': 'What is 3 plus 3?'}]},
  ]
  write(tmp_path / 'train.jsonl', [leaks[0], kept[0], *leaks[1:], kept[1]])
  assert make('dataset', 'train', path=tmp_path, size=None) == kept
  assert make('dataset', 'test', path=tmp_path, size=None) == QUESTIONS[1:4]


def test_files_of_a_folder(tmp_path):
  """Failure: shards of a split are left out, read in another order, or read with the other split's."""
  (tmp_path / 'data').mkdir()
  for name in ('train-00001.jsonl', 'train-00000.jsonl', 'test-00000.json', 'train-notes.md'):
    write(tmp_path / 'data' / name, [{'prompt': name}])
  assert [row['prompt'] for row in make('dataset', path=tmp_path)] == ['train-00000.jsonl', 'train-00001.jsonl']
  assert [row['prompt'] for row in make('dataset', 'test', path=tmp_path)] == ['test-00000.json']


@pytest.mark.parametrize(
  'line,reason',
  [
    ('{"prompt": "a"', 'not JSON'), ('["a"]', 'not a JSON object'), ('{"body": "a"}', 'no column prompt, messages or text; columns: body'),
    ('{"text": ""}', 'the text is empty'), ('{"text": 3}', "'text' is int, not text"),
    ('{"prompt": ""}', 'the prompt is empty'), ('{"prompt": 3}', "'prompt' is int, not text"),
    ('{"prompt": "a", "completion": 3}', "'completion' is int, not text"),
    ('{"prompt": "a", "chain_of_thought": null}', "'chain_of_thought' is NoneType"), ('{"messages": []}', "'messages' is not a list"),
    ('{"messages": [{"role": "user"}]}', "'messages' is not a list"), ('{"prompt": ["a"]}', "'prompt' is not a list"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 'messages of text'),
    ('{"prompt": "\\ud800"}', 'surrogates not allowed'), (b'{"prompt": "\xff"}', 'not JSON in UTF-8'),
  ],
)  # fmt: skip
def test_malformed_line(tmp_path, line, reason):
  """Failure: a bad line is skipped, crashes later, or is not named."""
  path = tmp_path / 'train.jsonl'
  path.write_bytes(b'{"prompt": "fine"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n')
  with pytest.raises(ConfigError, match=r'train\.jsonl:3: ') as error:
    make('dataset', path=path)
  assert reason in str(error.value)


def test_text_files_from_elsewhere(tmp_path):
  """Failure: a file written on Windows (byte order mark, CRLF), without a last newline, or not in English is refused or changed."""
  path = tmp_path / 'train.jsonl'
  rows = [{'prompt': 'Größe? 数 🙂', 'completion': 'a\r\nb\u2028c'}, {'prompt': 'é'}, {'prompt': 'last'}]
  path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
  assert list(dataset.read(path)) == [(f'{path}:{n}', row) for n, row in enumerate(rows, 1)]


def test_columns(tmp_path):
  """Failure: renamed columns are lost or swapped wrongly, or one silently overwrites another."""
  write(tmp_path / 'test.jsonl', [{'question': 'other', 'prompt': 'p', 'level': 2}])
  write(tmp_path / 'train.jsonl', [{'question': 'q', 'prompt': 'style', 'level': 1}])
  swapped = make('dataset', path=tmp_path, columns={'question': 'prompt', 'prompt': 'question'})
  assert swapped == [{'prompt': 'q', 'question': 'style', 'level': 1}]
  for columns, reason in (({'missing': 'prompt'}, "no column 'missing'"), ({'question': 'prompt'}, 'two columns')):
    with pytest.raises(ConfigError, match=f'data.options.columns.*{reason}'):
      make('dataset', path=tmp_path, columns=columns)


def test_parquet(tmp_path):
  """Failure: rows of a Parquet file are others than those of the same JSON lines."""
  if importlib.util.find_spec('pyarrow') is None:
    pytest.skip('no pyarrow: Parquet files cannot be read')
  rows = [{'messages': [{'role': 'user', 'content': f'q{n}'}, {'role': 'assistant', 'content': 'a'}], 'n': n} for n in range(50)]
  write(tmp_path / 'rows.json', rows)
  write(tmp_path / 'test.jsonl', [{'prompt': 'q3'}])
  code = """
import json, pathlib, sys, pyarrow.parquet
from rl_reasoning.tasks import dataset
folder = pathlib.Path(sys.argv[1])
table = pyarrow.Table.from_pylist([json.loads(line) for line in (folder / 'rows.json').open()])
pyarrow.parquet.write_table(table, folder / 'train.parquet')
print(json.dumps(list(dataset.rows('train', 0, None, str(folder)))), flush=True)"""
  # Its own process, whose exit code does not count: some releases of pyarrow abort at exit.
  done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True)
  assert done.stdout and json.loads(done.stdout) == [row for row in rows if row['n'] != 3], done.stderr


@pytest.mark.parametrize('task', ['dataset', 'gsm8k'])
def test_path_that_does_not_exist(task, tmp_path):
  """Failure: a mistyped path is looked up on the hub, or its error does not name the key."""
  with pytest.raises(ConfigError, match=r"'data\.path': .* does not exist"):
    make(task, path=tmp_path / 'nothing' / 'here')


def test_hub(tmp_path, monkeypatch):
  """Failure: a data set's name is not fetched from the hub, its second wording is read too, or no network is a traceback."""
  import huggingface_hub

  asked = []
  for folder, question in (('main', 'q'), ('socratic', 'other wording')):
    (tmp_path / folder).mkdir()
    for split in ('train', 'test'):
      write(tmp_path / folder / f'{split}.jsonl', [{'question': f'{question} {split}', 'answer': '#### 5'}])
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: asked.append(name) or str(tmp_path))
  assert [row['prompt'] for row in make('gsm8k')] == ['q train'] and set(asked) == {'openai/gsm8k'}

  def no_network(name, **_):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', no_network)
  with pytest.raises(ConfigError, match=r"'some/set' is no path here, and the hub gave ConnectionError: no route$"):
    make('dataset', path='some/set')


def test_gsm8k_rows(tmp_path):
  """Failure: the calculator's marks or the '####' line are taught, the answer keeps its commas, or a leaked question is trained on."""
  leaked = {'question': 'How many  apples?', 'answer': 'One.\n#### 1'}
  long = {'question': ' How much? ', 'answer': 'He pays 2*600=<<2*600=1200>>1200.\nThat is $<<1200=1200>>1,200.\n#### 1,200'}
  write(tmp_path / 'train.jsonl', [leaked, long])
  write(tmp_path / 'test.jsonl', [{**leaked, 'question': 'how many apples?'}])
  assert make('gsm8k', path=tmp_path, size=None) == [
    {'prompt': 'How much?', 'chain_of_thought': 'He pays 2*600=1200.\nThat is $1,200.', 'completion': '1200', 'answer': '1200'}
  ]
  with pytest.raises(ConfigError, match='give the folder of both splits'):
    make('gsm8k', path=tmp_path / 'train.jsonl')
  for row, reason in (({'question': 'q', 'answer': '5'}, "no '#### '"), ({'question': 'q'}, "no text column 'answer'")):
    write(tmp_path / 'test.jsonl', [leaked, row])
    with pytest.raises(ConfigError, match=f'test.jsonl:2: .*{reason}'):
      make('gsm8k', 'test', path=tmp_path)


@pytest.mark.parametrize(
  'solution,box',
  [
    (r'So $x=\boxed{5}$.', '5'), (r'\boxed{1} or rather $\boxed{\frac{1}{2}}$', r'\frac{1}{2}'), (r'\fbox{7}', '7'),
    (r'is $\boxed 9$.', '9'), (r'\boxed{\text{a \boxed{b}}}', r'\text{a \boxed{b}}'),
    (r'\boxed{ (0, \{1\}) }', r'(0, \{1\})'), ('five', None),
    (r'\boxed{5', None),
  ],
)  # fmt: skip
def test_last_box(solution, box):
  """Failure: the gold answer of MATH is the first box, stops at the first brace, or is lost."""
  assert last_box(solution) == box


def test_math(tmp_path):
  """Failure: columns of MATH land in the wrong places, a level that is no number ends the run, or a leaked problem is trained on."""
  solution = r'We find $\boxed{\frac{3}{4}}$.'
  write(tmp_path / 'train.jsonl', [
    {'problem': ' Find  x.', 'level': 'Level 5', 'type': 'Algebra', 'solution': solution},
    {'problem': 'Find y.', 'level': 'Level ?', 'solution': solution}, {'problem': 'Leaked?', 'solution': solution},
  ])  # fmt: skip
  write(
    tmp_path / 'test.jsonl', [{'problem': 'leaked?', 'solution': 'So five.', 'answer': '5', 'level': 2, 'subject': 'Geometry'}]
  )
  first = {
    'prompt': 'Find  x.', 'chain_of_thought': solution, 'completion': r'\frac{3}{4}', 'answer': r'\frac{3}{4}', 'answer_kind': 'math',
    'subject': 'Algebra', 'difficulty': 5,
  }  # fmt: skip
  second = {k: v for k, v in first.items() if k not in ('subject', 'difficulty')} | {'prompt': 'Find y.'}
  assert make('math', path=tmp_path) == [first, second] and make('math', path=tmp_path, size=1) == [first]
  (test,) = make('math', 'test', path=tmp_path)
  assert (test['answer'], test['subject'], test['difficulty'], test['chain_of_thought']) == ('5', 'Geometry', 2, 'So five.')
  for row in [first, test]:
    assert accuracy(row) == 1 and all(answered(row, wrong) == 0 for wrong in near_misses(row))
  bad = [({'solution': '1'}, "'problem'"), ({'problem': 'a', 'solution': 'none'}, 'no answer'), ({'problem': 'a'}, 'no answer'),
         ({'problem': 'a', 'solution': 3}, "'solution' is int")]  # fmt: skip
  for row, reason in bad:
    write(tmp_path / 'test.jsonl', [{'problem': 'a', 'answer': '1'}, row])
    with pytest.raises(ConfigError, match=rf'test\.jsonl:2: .*{reason}'):
      make('math', 'test', path=tmp_path)


def test_aime(tmp_path):
  """Failure: '033' is not 33, a set whose only split is called train or by its contest is not read, or AIME can be trained on."""
  for name in ('train-0.jsonl', 'aime2025-I.jsonl'):
    folder = tmp_path / name[:4]
    folder.mkdir()
    write(folder / name, [{'ID': 1, 'Problem': ' Find it. ', 'Answer': '033'}, {'question': 'And?', 'answer': 0}])
    rows = make('aime', 'test', path=folder)
    assert [(row['prompt'], row['answer'], row['completion']) for row in rows] == [('Find it.', '33', '33'), ('And?', '0', '0')]
    assert all(accuracy(row) == 1 and {answered(row, wrong) for wrong in near_misses(row)} == {0} for row in rows)
    assert make('aime', 'test', path=folder, size=1) == rows[:1]
    with pytest.raises(ConfigError, match=r"'data\.task': 'aime' is for evaluation"):
      make('aime', path=folder)
    for answer in ('1000', '-1', '1.5', None, 'x'):
      write(folder / name, [{'problem': 'a', 'answer': answer}])
      with pytest.raises(ConfigError, match=f'{name}:1: .*answer'):
        make('aime', 'test', path=folder)


def test_svamp(tmp_path):
  """Failure: 5.0 people, a body glued to its question, or an equation taught that does not come to the answer."""
  write(tmp_path / 'test.jsonl', [{'Body': 'b', 'Question': 'q?', 'Equation': '( 8.0 / 3.0 )', 'Answer': 3.0, 'ID': 'chal-1'}])
  write(tmp_path / 'train.jsonl', [
    {'Body': 'Ann has 8 plums', 'Question': 'How many are left after 3?', 'Equation': '( 8.0 - 3.0 )', 'Answer': 5.0},
    {'Body': 'Ann has 7 plums.', 'Question': 'Half of them?', 'Equation': '( 7.0 / 2.0 )', 'Answer': '3.5'},
  ])  # fmt: skip
  first, second = make('svamp', path=tmp_path)
  assert first == {
    'prompt': 'Ann has 8 plums. How many are left after 3?', 'chain_of_thought': '8-3=5', 'completion': '5', 'answer': '5',
    'answer_kind': 'number',
  }  # fmt: skip
  assert (second['prompt'], second['chain_of_thought'], second['answer']) == ('Ann has 7 plums. Half of them?', '7/2=3.5', '3.5')
  assert make('svamp', 'test', path=tmp_path)[0]['chain_of_thought'] == ''
  assert all(accuracy(row) == 1 and {answered(row, wrong) for wrong in near_misses(row)} == {0} for row in (first, second))
  assert chain_of('( ( 8.0 + 4.0 ) / 10.0 )', Fraction(6, 5), '1.2') == '((8+4)/10)=1.2'
  published = [
    {'ID': f'chal-{n}', 'Body': f'Ann has {n} plums.', 'Question': 'How many?', 'Equation': f'{n}.0', 'Answer': n}
    for n in range(60)
  ]
  (tmp_path / 'SVAMP.json').write_text(json.dumps(published, indent=1))  # one array, of which a part is the test split
  train, test = (make('svamp', split, path=tmp_path / 'SVAMP.json') for split in ('train', 'test'))
  assert sorted(int(row['answer']) for row in train + test) == list(range(60)) and 0 < len(test) < 20
  for row, reason in (
    ({'Body': 'a', 'Answer': 1}, "'Question'"),
    ({'Body': 'a', 'Question': 'b', 'Answer': 'many'}, "'many', no number"),
  ):
    write(tmp_path / 'test.jsonl', [row])
    with pytest.raises(ConfigError, match=rf'test\.jsonl:1: .*{reason}'):
      make('svamp', 'test', path=tmp_path)


MMLU = {'question': 'Which is a fruit? ', 'choices': ['stone', 'plum', ' nail', 'rope'], 'answer': 1, 'subject': 'botany'}
ARC = {'question': 'Which is hot?', 'choices': {'text': ['ice', 'fire'], 'label': ['1', '2']}, 'answerKey': '2'}


def test_multiple_choice(tmp_path):
  """Failure: the letter is not that of the right choice in one of the published shapes, or the verifier takes another."""
  shapes = [
    MMLU,
    ARC,
    {**MMLU, 'answer': 'B'},
    {**MMLU, 'answer': 'plum'},
    {'question': 'q', 'options': ['B', 'A'], 'answer': 'B'},
  ]
  write(tmp_path / 'test.jsonl', shapes)
  mmlu, arc, *others = make('multiple_choice', 'test', path=tmp_path)
  assert mmlu == {
    'prompt': 'Which is a fruit?\nA. stone\nB. plum\nC. nail\nD. rope', 'chain_of_thought': '', 'completion': 'B', 'answer': 'B',
    'answer_kind': 'choice', 'subject': 'botany',
  }  # fmt: skip
  assert arc['prompt'] == 'Which is hot?\nA. ice\nB. fire' and arc['answer'] == 'B'
  assert [row['answer'] for row in others] == ['B', 'B', 'B']  # a letter before a text that looks like one
  assert all(accuracy(row) == 1 and {answered(row, wrong) for wrong in near_misses(row)} == {0} for row in (mmlu, arc))


def test_choices_are_shuffled(tmp_path):
  """Failure: shuffling loses the right choice, leaves it in its place, or gives another order in another run or file."""
  rows = [{**MMLU, 'question': f'Which is fruit {n}?'} for n in range(400)]
  write(tmp_path / 'test.jsonl', rows)
  plain, shuffled = (make('multiple_choice', 'test', path=tmp_path, size=None, shuffle=shuffle) for shuffle in (False, True))
  letters = [row['answer'] for row in shuffled]
  assert all(60 < letters.count(letter) < 140 for letter in 'ABCD')
  for row, other in zip(shuffled, plain, strict=True):
    assert f'\n{row["answer"]}. plum' in row['prompt'] and sorted(c[3:] for c in row['prompt'].splitlines()) == sorted(
      c[3:] for c in other['prompt'].splitlines()
    )
  write(tmp_path / 'test.jsonl', rows[::-1])
  assert make('multiple_choice', 'test', path=tmp_path, size=None, shuffle=True) == shuffled[::-1]


def test_subset_of_multiple_choice(tmp_path):
  """Failure: questions that a data set repeats in several folders are counted twice, or a subset that does not exist is an empty test."""
  for name in ('all', 'botany'):
    (tmp_path / name).mkdir()
    write(tmp_path / name / 'test-0.jsonl', [{**MMLU, 'subject': name}])
  assert [row['subject'] for row in make('multiple_choice', 'test', path=tmp_path)] == ['all', 'botany']
  assert [row['subject'] for row in make('multiple_choice', 'test', path=tmp_path, subset='botany')] == ['botany']
  with pytest.raises(ConfigError, match=r"'data\.options\.subset': no test file in a folder 'botanny'"):
    make('multiple_choice', 'test', path=tmp_path, subset='botanny')


@pytest.mark.parametrize(
  'keys,reason',
  [
    ({'question': ' '}, "no text column 'question'"), ({'choices': None}, "'choices' is no list of 2 to 26 texts"),
    ({'choices': ['a']}, 'no list of 2'), ({'choices': ['a', 2]}, 'no list of 2'),
    ({'choices': {'text': ['a', 'b'], 'label': ['A']}}, r"2 choices, but labels \['A'\]"),
    ({'choices': {'text': ['a', 'b'], 'label': ['A', 'A']}}, '2 choices, but labels'), ({'answer': 4}, 'answer 4 is neither'),
    ({'answer': -1}, 'answer -1 is neither'), ({'answer': True}, 'answer True is neither'), ({'answer': 'E'}, "answer 'E' is neither"),
    ({'choices': ['x', 'x'], 'answer': 'x'}, "answer 'x' is neither"),
  ],
)  # fmt: skip
def test_multiple_choice_refuses(tmp_path, keys, reason):
  """Failure: a question without a right choice is asked, or is not named."""
  write(tmp_path / 'test.jsonl', [MMLU, {**MMLU, **keys}])
  with pytest.raises(ConfigError, match=rf'test\.jsonl:2: .*{reason}'):
    make('multiple_choice', 'test', path=tmp_path)


def test_hub_names(tmp_path, monkeypatch):
  """Failure: without a path a task asks the hub for another data set than its documentation says."""
  import huggingface_hub

  asked = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: asked.append(name) or str(tmp_path))
  for task in ('math', 'aime', 'svamp'):
    for split in ('train', 'test'):
      assert TASKS[task].files('', split) == []
  assert set(asked) == {'EleutherAI/hendrycks_math', 'HuggingFaceH4/MATH-500', 'HuggingFaceH4/aime_2024', 'ChilleD/SVAMP'}
  assert asked[:2] == ['EleutherAI/hendrycks_math', 'HuggingFaceH4/MATH-500']


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f'no GSM8K files in {GSM8K}')
def test_gsm8k_files():
  """Failure: problems are lost, shared between the splits, or a gold completion is not paid in full by the project's own reward."""
  train, test = make('gsm8k', path=GSM8K, size=None), make('gsm8k', 'test', path=GSM8K, size=None)
  assert (len(train), len(test)) == (7473, 1319)
  assert not {dataset.identity(row) for row in train} & {dataset.identity(row) for row in test}
  for name, rows in (('train', train), ('test', test)):
    lines = (GSM8K / f'{name}.jsonl').read_text(encoding='utf-8').splitlines()
    for line, row in zip(lines, rows, strict=True):
      raw = json.loads(line)
      assert raw['question'].strip() == row['prompt'] and '<<' not in row['chain_of_thought']
      assert raw['answer'].split('#### ')[1].replace(',', '') == row['answer'] == row['completion']
      assert accuracy(row) == 1


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f'no GSM8K files in {GSM8K}')
def test_verdicts_on_model_solutions():
  """Failure: the grader disagrees with the labels that come with 5,276 solutions written by models."""
  agreed, total, golds = 0, 0, {row['prompt']: row['answer'] for row in make('gsm8k', 'test', path=GSM8K, size=None)}
  for line in (GSM8K / 'example_model_solutions.jsonl').read_text(encoding='utf-8').splitlines():
    row = json.loads(line)
    for solution in (v for v in row.values() if isinstance(v, dict)):
      verdict = REWARDS['accuracy_flexible'](
        prompts=[''], completions=[solution['solution']], answer=[golds[row['question'].strip()]]
      )
      agreed, total = agreed + (verdict == [float(solution['is_correct'])]), total + 1
  assert total == 5276 and agreed == total


def test_one_in_ten_is_a_test_problem():
  """Failure: the share of held-out problems is not what the documentation says."""
  assert 0.09 < sum(map(is_test, itertools.islice(map(str, itertools.count()), 20_000))) / 20_000 < 0.115


@pytest.mark.parametrize('column', ['prompts', 'completions', 'completion_ids'])
def test_columns_cannot_pose_as_completions(tmp_path, column):
  """Failure: a data set's column takes the place of what the policy sampled, and every answer is right."""
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'x', 'answer': '1', column: '<answer>1</answer>'}) + '\n')
  with pytest.raises(ConfigError, match=f'rows.jsonl:1: column {column!r}'):
    list(dataset.rows('train', 0, None, str(path)))
