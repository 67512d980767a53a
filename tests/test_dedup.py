"""Decontamination and near duplicates: what is copied is found however it is dressed, and what only sounds alike stays."""

import random

import pytest

from rl_reasoning import dedup
from rl_reasoning.config import ConfigError

WORDS = [f'w{i}' for i in range(2000)]


def prose(rng, n):
  return ' '.join(rng.choice(WORDS) for _ in range(n))


def row(prompt, chain='a chain', completion='7'):
  return {'prompt': prompt, 'chain_of_thought': chain, 'completion': completion}


def test_words():
  """Failure: case, punctuation or line breaks hide a copy, or a text without spaces is one word."""
  assert dedup.words('The CAT, sat\n(on 3.5) mats!') == ['the', 'cat', 'sat', 'on', '3', '5', 'mats']
  assert dedup.words('小明有3个苹果 ok') == ['小', '明', '有', '3', '个', '苹', '果', 'ok']
  assert dedup.ngrams(['a', 'b', 'c'], 2) == {'a b', 'b c'} and dedup.ngrams(['a'], 2) == set()


@pytest.mark.parametrize('n', [8, 13])
def test_shared_ngrams(n):
  """Failure: n shared words are not found wherever they stand in a row, or n - 1 are enough."""
  rng = random.Random(n)
  question = prose(rng, 40)
  some = question.split()
  shared, short = ' '.join(some[9 : 9 + n]), ' '.join(some[9 : 8 + n])
  rows = [
    row(f'{prose(rng, 20)} {shared.upper()}, {prose(rng, 20)}'),
    row(prose(rng, 20), chain=f'{prose(rng, 9)}\n{shared}?'),
    row(prose(rng, 20), completion=shared),
    row(f'{prose(rng, 20)} {short} {prose(rng, 20)}'),
    row(prose(rng, 60)),
    {'prompt': [{'role': 'user', 'content': question}], 'completion': 'x'},
    {'prompt': [{'role': 'user', 'content': prose(rng, 20)}], 'completion': 'x'},
  ]
  kept, dropped = dedup.decontaminate(rows, [{'prompt': question}], n)
  assert kept == [rows[3], rows[4], rows[6]] and dropped == {'contaminated': 4}
  assert dedup.decontaminate(rows, [], n) == (rows, {})


def test_short_questions():
  """Failure: a question of fewer words than n is never found, or another one that holds it is taken for it."""
  rows = [row('What is  2+2?'), row('what is 2+2?'), row('What is 2-2?'), row('So what is 2+2? And 3+3?')]
  kept, dropped = dedup.decontaminate(rows, [{'prompt': 'What is 2+2?'}, {'prompt': [{'role': 'user', 'content': 'Hm?'}]}])
  assert kept == rows[2:] and dropped == {'contaminated': 2}


def test_phrases_that_everybody_uses():
  """Failure: an instruction that stands in every prompt makes all of them copies; or many answers to one copied prompt make it common."""
  rng = random.Random(0)
  phrase = prose(rng, 13)
  rows = [row(f'{prose(rng, 20)} {phrase}') for _ in range(dedup.MOST_PROMPTS + 1)]
  problem = {'prompt': f'{phrase} {prose(rng, 30)}'}
  assert dedup.decontaminate(rows, [problem])[0] == rows
  assert dedup.decontaminate(rows[1:], [problem])[0] == []
  assert dedup.decontaminate([*rows, row(problem['prompt'])], [problem])[0] == rows
  several = [row(f'see {phrase}', chain=prose(rng, 20)) for _ in range(2 * dedup.MOST_PROMPTS)]
  assert dedup.decontaminate(several, [problem])[0] == []


def similar(rng, words, share):
  """The words with `share` of them, next to one another, replaced."""
  n = round(share * len(words))
  return [*words[:-n], *prose(rng, n).split()] if n else words


def jaccard(a, b):
  a, b = (dedup.ngrams(dedup.words_of(one), dedup.SHINGLE) for one in (a, b))
  return len(a & b) / len(a | b)


def test_bands():
  """Failure: the index misses pairs that are as alike as is asked."""
  for threshold in (0.01, 0.3, 0.5, 0.8, 0.95, 1.0):
    b, r = dedup.bands(threshold)
    assert b * r <= dedup.HASHES and b >= 2 and (r == 1 or 1 - (1 - threshold**r) ** b >= 0.99)
  assert dedup.bands(0.5) == (85, 3) and dedup.bands(1.0) == (2, 128)


def test_near_duplicates():
  """Failure: a row is left out that is less alike than the threshold, one that is more alike stays, or not the first one stays."""
  rng = random.Random(1)
  base = [prose(rng, 200).split() for _ in range(30)]
  rows = [row('Q', chain=' '.join(words)) for words in base]
  close = [row('Q', chain=' '.join(similar(rng, words, 0.03))) for words in base]  # similarity about .94
  far = [row('Q', chain=' '.join(similar(rng, words, 0.3))) for words in base]  # about .54
  assert all(jaccard(a, b) > 0.9 for a, b in zip(rows, close)) and all(jaccard(a, b) < 0.7 for a, b in zip(rows, far))
  kept, dropped = dedup.near_duplicates([*rows, *close, *far, *rows], 0.8)
  assert kept == [*rows, *far] and dropped == {'near duplicate': 60}
  assert dedup.near_duplicates([*close, *rows], 0.8)[0] == close
  assert len(dedup.near_duplicates([*rows, *far], 0.4)[0]) == 30


def test_rows_that_are_not_alike():
  """Failure: two questions with the same answer, or two answers to one question, count as one row; or texts shorter than a shingle do."""
  rows = [row('3+4='), row('4+3='), row('3+4=', completion='8'), row('3+4=', chain='b'), row('你好'), row('')]
  assert dedup.near_duplicates(rows, 1.0) == (rows, {}) and dedup.near_duplicates(rows, 0.8)[0] == rows
  assert dedup.near_duplicates([*rows, *rows], 0.8) == (rows, {'near duplicate': 6})


def test_settings_are_checked():
  for threshold in (0.0, 1.1):
    with pytest.raises(ConfigError, match='similarity'):
      dedup.near_duplicates([], threshold)
  with pytest.raises(ConfigError, match='no n-gram'):
    dedup.decontaminate([], [], 0)
