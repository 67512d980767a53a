"""The task of preferences with a known gold reward: gold pays what it says, rankings are gold's, and more of the good is not better."""

import math

import numpy as np
import pytest

from rl_reasoning.config import ConfigError, Rewards
from rl_reasoning.rewards import REWARDS, check_rewards, resolve
from rl_reasoning.tasks import TASKS
from rl_reasoning.tasks.procedural import is_test
from rl_reasoning.tasks.reviews import CLAIMS, ENOUGH_PRAISE, PRAISE, PROPERTIES, TOPICS, WORDS, gold

TEA = ('Tea', ('hot', 'new'))


def make(split='train', seed=0, size=300, **options):
  return list(TASKS['reviews'].rows(split, seed, size, **options))


@pytest.mark.parametrize(
  'completion,value',
  [
    ('hot new Tea ace fab', 5), ('new hot Tea fab ace', 5), ('', 0), ('Tea', 1), ('hot', 1), ('hot new', 2),
    ('hot new Tea', 3), ('hot new Tea ace', 4), ('hot new Tea ace fab fun', 4), ('hot new Tea ace fab fun joy top', 2),
    ('hot new Tea ace fab fun joy top wow yum zen', -1), ('hot raw Tea', 1.5), ('hot new Van', 1.5), ('hot new Tea Van', 2.5),
    ('hot hot Tea', 1.5), ('hot new Tea ace ace', 4.5), ('hot new Tea ace ace ace', 3), ('Tea hot new', 2.5), ('ace hot new Tea', 3.5),
    ('ace Tea hot', 2.5), ('ace hot', 2), ('hot new Tea very', 2.5), ('hot new TeaTea', 1.5), ('hot new Te', 1.5), ('HOT Tea', 0.5),
  ],
)  # fmt: skip
def test_gold(completion, value):
  """Failure: a term of the gold reward is missing, counted twice or of another size, so that no published number can be repeated."""
  assert gold(*TEA, completion) == value


def test_gold_is_a_reward():
  """Failure: a config cannot name the gold reward, it reads other columns, or judges rows of other tasks as bad."""
  check_rewards(Rewards(functions=('gold_reviews',)), 16)
  fn = resolve('gold_reviews')
  columns = {'topic': ['Tea', None, 'Van'], 'wishes': [['hot', 'new'], None, ['raw', 'wet']]}
  assert fn(['?'] * 3, ['hot Tea', 'hot Tea', 'hot Tea'], None, **columns) == [2.0, None, -1.0]
  assert fn(['?'], ['hot Tea'], None, answer=['x']) == [None]
  rows = make('test', size=50, rows='prompts')
  best = [f'{" ".join(row["wishes"])} {row["topic"]} ace fab' for row in rows]
  assert fn([row['prompt'] for row in rows], best, **{key: [row[key] for row in rows] for key in rows[0]}) == [5.0] * 50
  assert REWARDS['gold_reviews'] is fn


@pytest.mark.parametrize('kind', ['demonstrations', 'rankings', 'labels', 'prompts'])
def test_rows(kind):
  """Failure: rows are no function of (seed, split, index), both splits share a prompt, test prompts repeat, or columns are missing."""
  train, test = make(rows=kind), make('test', rows=kind)
  assert make(rows=kind, size=40) == train[:40] and make(rows=kind, seed=1) != train
  assert [row['prompt'] for row in train] == [row['prompt'] for row in make(rows='prompts')]
  assert not any(is_test(row['prompt']) for row in train) and all(is_test(row['prompt']) for row in test)
  assert len({row['prompt'] for row in test}) == len(test) == 300
  for row in train + test:
    assert row['prompt'] == f'{row["topic"]} {" ".join(row["wishes"])}:' and len({*row['wishes']}) == 2
    more = {
      'demonstrations': {'completion'},
      'labels': {'completion', 'label'},
      'rankings': {'responses', 'ranks'},
      'prompts': set(),
    }[kind]
    assert row.keys() == {'prompt', 'topic', 'wishes'} | more


def test_labels():
  """Failure: a label says that a review is honest which claims what was not asked for, or the other way round."""
  rows = make(rows='labels')
  assert [row['completion'] for row in rows] == [row['completion'] for row in make()]
  for row in rows:
    claimed = [word for word in row['completion'].split() if word in CLAIMS]
    assert row['label'] == all(word in (row['topic'], *row['wishes']) for word in claimed)
  assert 0.6 < np.mean([row['label'] for row in rows]) < 0.9


def test_the_author():
  """Failure: he is as good as the best review, or so bad that there is nothing to learn; he writes past what is enough, where a reward
  model would see that it is; or his reviews do not fit the lengths that configs set."""
  rows = make(size=3000)
  values = [gold(row['topic'], row['wishes'], row['completion']) for row in rows]
  assert 1.5 < np.mean(values) < 3 and 1 < np.std(values) < 2 and np.mean(np.equal(values, 5)) < 0.1
  for row in rows:
    words = row['completion'].split()
    assert {*words} <= WORDS and words and len(row['completion']) <= 26
    assert sum(word in PRAISE for word in words) <= ENOUGH_PRAISE and len({*words}) == len(words)
  assert len(WORDS) == len(TOPICS) + len(PROPERTIES) + len(PRAISE)
  assert len({word[0] for word in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize('options', [{}, {'responses': 4}, {'gap': 0.5}, {'gap': 1.5, 'responses': 3}], ids=str)
def test_rankings_are_golds(options):
  """Failure: a worse response stands before a better one, or two are nearer in gold than `gap`, where nobody could tell."""
  firsts = set()
  for row in make(size=150, rows='rankings', **options):
    values = [gold(row['topic'], row['wishes'], text) for text in row['responses']]
    assert len(values) == options.get('responses', 2) and len({*row['responses']}) == len(values)
    assert [row['responses'][i] for i in np.argsort(row['ranks'])] == [row['responses'][i] for i in np.argsort(values)[::-1]]
    assert np.diff(np.sort(values)).min() >= options.get('gap', 1.0) and sorted(row['ranks']) == list(range(1, len(values) + 1))
    firsts.add(row['ranks'].index(1))
  assert firsts == {*range(options.get('responses', 2))}  # the place of the best tells nothing


def test_noise():
  """Failure: comparisons err at another rate than Bradley-Terry's at this scale, or the test split, which measures, errs too."""
  expected, wrong = [], []
  for row in make(size=1500, rows='rankings', noise=1.5):
    a, b = (gold(row['topic'], row['wishes'], text) for text in row['responses'])
    expected.append(1 / (1 + math.exp(abs(a - b) / 1.5)))
    wrong.append((a > b) != (row['ranks'] == [1, 2]))
  assert np.mean(wrong) == pytest.approx(np.mean(expected), abs=0.03) and np.mean(wrong) > 0.1
  assert make('test', size=50, rows='rankings', noise=1.5) == make('test', size=50, rows='rankings')


def count(row, text):
  """What a model of limited sight learns by: how often each kind of word stands there."""
  words = text.split()
  asked = [row['topic'], *row['wishes']]
  return [
    sum(word in asked for word in words), sum(word in CLAIMS and word not in asked for word in words),
    sum(word in PRAISE for word in words),
  ]  # fmt: skip


def test_over_optimisation_can_show():
  """Failure: a proxy learnt from comparisons of the author's reviews is worse than 90 % on held-out ones, or what it goes on paying for
  does not cost gold: then the curve of gold against proxy could not turn."""
  difference = []
  for row in make(size=1200, rows='rankings'):
    best, worst = (row['responses'][row['ranks'].index(rank)] for rank in (1, 2))
    difference.append(np.subtract(count(row, best), count(row, worst)))
  train, test = np.split(np.array(difference, float), [800])
  w = np.zeros(3)
  for _ in range(20):  # Newton on the Bradley-Terry loss with a small ridge
    p = 1 / (1 + np.exp(-train @ w))
    w += np.linalg.solve(train.T @ (train * (p * (1 - p))[:, None]) + 0.1 * np.eye(3), train.T @ (1 - p) - 0.1 * w)
  assert np.mean(test @ w > 0) > 0.9
  row = {'topic': TEA[0], 'wishes': TEA[1]}
  texts = [' '.join(['hot', 'new', 'Tea', *PRAISE[:n]]) for n in range(len(PRAISE) + 1)]
  proxies, golds = [count(row, text) @ w for text in texts], [gold(*TEA, text) for text in texts]
  assert np.all(np.diff(proxies) > 0.5)  # it pays for ever more praise
  assert int(np.argmax(golds)) == ENOUGH_PRAISE and golds[-1] < 2 < golds[ENOUGH_PRAISE] - 2  # gold ends below the author's mean


@pytest.mark.parametrize(
  'key,options',
  [
    ('rows', {'rows': 'pairs'}), ('responses', {'rows': 'rankings', 'responses': 1}), ('gap', {'rows': 'rankings', 'gap': 0.0}),
    ('gap', {'rows': 'rankings', 'gap': 20.0}), ('noise', {'rows': 'rankings', 'noise': -1.0}), ('responses', {'responses': 3}),
    ('gap', {'gap': 0.5}), ('noise', {'rows': 'prompts', 'noise': 1.0}),
  ],
)  # fmt: skip
def test_options_out_of_range(key, options):
  """Failure: a wrong option is taken or one has no effect, or the error does not say which key to change."""
  with pytest.raises(ConfigError, match=f'data.options.{key}'):
    make(**options)
