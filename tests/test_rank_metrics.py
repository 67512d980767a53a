"""Accuracy, calibration and the length baseline of scores against judgements; and the evaluator that measures them."""

import itertools
import math

import jax
import numpy as np
import pytest
from etils import epath

from rl_reasoning import rank_metrics, sharding, tables
from rl_reasoning.config import ConfigError
from rl_reasoning.rank_metrics import pointwise_metrics, ranking_metrics, reliability, sigmoid
from rl_reasoning.ranking_evaluator import RankingEvaluator, check_rankings, evaluate_rankings, make_ranking_evaluator, reads_of
from rl_reasoning.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
# A ranking of three; one with a tie of ranks and one of scores, all equally long; a second one of the first prompt; and one of ties alone.
SCORES = [[2, 0, 1], [0, 3, 0], [1, 4], [9, -9]]
RANKS = [[1, 2, 3], [1, 1, 2], [2, 1], [1, 1]]
LENGTHS = [[5, 3, 9], [4, 4, 4], [1, 2], [1, 9]]
PROMPTS = [0, 1, 0, 2]


def test_ranking_metrics():
  """Failure: a tie is not half right, pairs of tied ranks count, a prompt with more pairs counts more, or length is mistaken."""
  got = ranking_metrics(SCORES, RANKS, LENGTHS, PROMPTS)
  expected = {
    'problems': 2, 'pairs': 6, 'frac_ties': 2 / 8,
    'accuracy': ((1 + 1 + 0 + 1) / 4 + (0.5 + 1) / 2) / 2,
    'margin': ((2 + 1 - 1 + 3) / 4 + (0 + 3) / 2) / 2,
    'length_accuracy': ((1 + 0 + 0 + 1) / 4 + 0.5) / 2,
    'length_difference': ((2 - 4 - 6 + 1) / 4 + 0) / 2,
    'accuracy_longer_preferred': 1, 'accuracy_shorter_preferred': 0.5,
    'demonstration_mean': (2 + 0 + 3 + 4) / 4, 'score_mean': 1.1, 'score_min': -9, 'score_max': 9,
  }  # fmt: skip
  assert {key: got[key] for key in expected} == pytest.approx(expected)
  assert got['margin_stderr'] == pytest.approx(0.25 / 2)  # of the two prompts' 1.25 and 1.5
  assert 1.25 <= got['margin_ci95'][0] <= got['margin_ci95'][1] <= 1.5
  # The order of the responses and of the rankings says nothing.
  order = [3, 1, 0, 2]
  again = ranking_metrics(*([x[i][::-1] for i in order] for x in (SCORES, RANKS, LENGTHS)), [PROMPTS[i] for i in order])
  for key, value in got.items():
    if key not in ('reliability', 'margin_ci95', 'accuracy_ci95', 'length_accuracy_ci95'):
      assert again[key] == pytest.approx(value), key


def test_nothing_to_measure():
  """Failure: a mean over nothing is a number, or an error of one prompt."""
  assert ranking_metrics([], [], [], []) == {'problems': 0, 'pairs': 0}
  tied = ranking_metrics(SCORES[3:], RANKS[3:], LENGTHS[3:], [0])
  assert tied['frac_ties'] == 1 and 'accuracy' not in tied and 'ece' not in tied
  one = ranking_metrics(SCORES[:1], RANKS[:1], LENGTHS[:1], [0])
  assert one['accuracy'] == pytest.approx(2 / 3) and 'accuracy_stderr' not in one and 'accuracy_ci95' not in one
  assert 'accuracy_longer_preferred' not in ranking_metrics([[1, 2]], [[1, 2]], [[4, 4]], [0])
  assert pointwise_metrics([], [], []) == {'problems': 0, 'judged': 0}
  alike = pointwise_metrics([1.0, 2.0], [1, 1], [0, 1])
  assert 'auc' not in alike and alike['accuracy'] == 1 == alike['majority_accuracy']
  assert 'accuracy' not in pointwise_metrics([1.0], [0.5], [0])


def test_a_prompt_counts_once():
  """Failure: rows of one prompt pass for independent ones, which makes the interval of a few prompts look sure."""
  rng = np.random.default_rng(0)
  scores, ranks, lengths = rng.normal(size=(40, 2)).tolist(), [[1, 2]] * 40, [[1, 1]] * 40
  once = ranking_metrics(scores, ranks, lengths, range(40))
  many = ranking_metrics(scores * 9, ranks * 9, lengths * 9, [*range(40)] * 9)
  for key in ('accuracy', 'accuracy_stderr', 'accuracy_ci95', 'ece', 'problems'):
    assert many[key] == pytest.approx(once[key]), key
  assert many['pairs'] == 9 * once['pairs']
  low, high = once['accuracy_ci95']
  assert low < once['accuracy'] < high and high - low == pytest.approx(2 * 1.96 * once['accuracy_stderr'], rel=0.2)


def test_model_of_length():
  """Failure: a model that only counts tokens does not show as one."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, 50, (60, 3))
  offset = rng.normal(0, 1000, (60, 1))  # between prompts: nothing to do with length
  ranks = rng.permuted(np.tile([1, 2, 3], (60, 1)), axis=1)
  got = ranking_metrics((0.1 * lengths + offset).tolist(), ranks.tolist(), lengths.tolist(), range(60))
  assert got['accuracy_longer_preferred'] == 1 and got['accuracy_shorter_preferred'] == 0
  assert got['accuracy'] == pytest.approx(got['length_accuracy']) and got['score_length_correlation'] == pytest.approx(1)
  constant = ranking_metrics(np.ones((60, 3)).tolist(), ranks.tolist(), lengths.tolist(), range(60))
  assert 'score_length_correlation' not in constant and constant['accuracy'] == 0.5


def test_calibration():
  """Failure: a calibrated model has an error, an overconfident one has none, or a bin's numbers are not those of what is in it."""
  third = math.log(3)  # sigmoid: 3/4

  def pairs(right):
    scores = [[third, 0] if i < right else [0, third] for i in range(4)]
    return ranking_metrics(scores, [[1, 2]] * 4, [[1, 1]] * 4, range(4))

  assert pairs(3)['ece'] == pytest.approx(0, abs=1e-12) and pairs(1)['ece'] == pytest.approx(0.5)
  (b,) = pairs(2)['reliability']
  assert b == pytest.approx({'low': 0.75, 'high': 0.8, 'predicted': 0.75, 'observed': 0.5, 'share': 1, 'count': 4}, abs=1e-9)
  rng = np.random.default_rng(2)
  d, ones = rng.normal(0, 2, 40_000), np.ones(40_000)
  better = rng.random(d.size) < sigmoid(d)  # whether the first response is the preferred one
  right = (d > 0) == better
  errors = {scale: reliability(sigmoid(np.abs(scale * d)), right, ones, 0.5) for scale in (1, 4)}
  assert errors[1][1] < 0.01
  surplus = np.mean(sigmoid(np.abs(4 * d)) - sigmoid(np.abs(d)))  # everywhere more sure than right
  assert errors[4][1] == pytest.approx(surplus, abs=0.01) and surplus > 0.1
  assert all(b['predicted'] > b['observed'] for b in errors[4][0][1:]) and len(errors[1][0]) == rank_metrics.BINS
  assert sum(b['share'] for b in errors[1][0]) == pytest.approx(1) and sum(b['count'] for b in errors[1][0]) == d.size
  edges = [b['low'] for b in errors[1][0]] + [errors[1][0][-1]['high']]
  assert edges == pytest.approx(np.linspace(0.5, 1, 11))
  assert all(b['low'] <= b['predicted'] <= b['high'] for b in errors[1][0])


def test_pointwise_metrics():
  """Failure: AUC is wrong where scores tie, a label of 1/2 has a right side, or calibration is against something else than the labels."""
  rng = np.random.default_rng(3)
  scores, labels = np.round(rng.normal(0, 1.5, 80), 1), rng.choice([0, 0.25, 0.5, 0.75, 1], 80)
  scores[:5] = 0
  prompts = np.repeat(np.arange(20), 4)
  got = pointwise_metrics(scores, labels, prompts)
  high, low = scores[labels > 0.5], scores[labels < 0.5]
  assert got['auc'] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(high, low)]))
  p = 1 / (1 + np.exp(-scores))
  assert got['brier'] == pytest.approx(np.mean((p - labels) ** 2))
  per_prompt, positive = [], []
  for n in range(20):
    sided = [i for i in range(4 * n, 4 * n + 4) if labels[i] != 0.5]
    if sided:
      per_prompt.append(np.mean([0.5 if scores[i] == 0 else (scores[i] > 0) == (labels[i] > 0.5) for i in sided]))
      positive.append(np.mean([labels[i] > 0.5 for i in sided]))
  assert got['accuracy'] == pytest.approx(np.mean(per_prompt))
  assert got['majority_accuracy'] == pytest.approx(max(np.mean(positive), 1 - np.mean(positive)))
  assert got['mean_label'] == pytest.approx(labels.mean()) and got['mean_probability'] == pytest.approx(p.mean())
  inside = [(p[(p >= a) & (p < a + 0.1)], labels[(p >= a) & (p < a + 0.1)]) for a in np.arange(10) / 10]
  assert got['ece'] == pytest.approx(sum(abs(x.sum() - y.sum()) for x, y in inside) / 80)
  assert pointwise_metrics([0.0] * 4, [1, 1, 0, 1], range(4))['ece'] == pytest.approx(0.25)


PAIRS = [{'prompt': 'q' * (n % 3 + 1), 'responses': ['b' * (n + 1), 'a'], 'ranks': [n % 2, 1]} for n in range(5)]
RANKINGS = [*PAIRS, {'prompt': 'p', 'responses': ['aaa', 'bb', 'c', 'd'], 'ranks': [1, 1, 2, 3]}]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(2, 1, 1, jax.devices()[:2])


def run(scores_fn, rows, mesh, **keys):
  seen = []

  def noted(batch):
    seen.append(batch.tokens.shape)
    return scores_fn(batch)

  found = evaluate_rankings(noted, rows, TOK, 'plain', mesh, **{'max_length': 99, 'overlong': 'raise', 'batch_size': 4, **keys})
  return *found, seen


def count_of_b(batch):
  """After every token: how often 'b' has stood so far, plus a hundredth a token."""
  tokens = np.asarray(batch.tokens)
  return np.cumsum(tokens == ord('b'), axis=1) + 0.01 * np.arange(1, tokens.shape[1] + 1)


@pytest.mark.parametrize('rows', [PAIRS, RANKINGS])
def test_evaluate_rankings(mesh, rows):
  """Failure: a score is read at another token than the response's last, given to another response, or padding is measured."""
  got, samples, shapes = run(count_of_b, rows, mesh)
  table = {(i, text): rank for i, row in enumerate(rows) for text, rank in zip(row['responses'], row['ranks'], strict=True)}
  assert {(s['problem'], s['completion']): s['rank'] for s in samples} == table and len(samples) == len(table)
  for s in samples:
    assert s['length'] == len(s['completion']) + 1 and s['prompt'] == rows[s['problem']]['prompt']
    assert s['score'] == pytest.approx(s['completion'].count('b') + 0.01 * (len(s['prompt']) + len(s['completion']) + 1))
  size = 2 if rows is PAIRS else 4
  assert {shape[0] for shape in shapes} == {4 * size} and len(shapes) == 2
  grouped = [[s for s in samples if s['problem'] == i] for i in range(len(rows))]
  expected = ranking_metrics(
    *([[s[key] for s in group] for group in grouped] for key in ('score', 'rank', 'length')), rank_metrics.name_prompts(rows)
  )
  assert got == {**expected, 'frac_absent': 0} and got['problems'] == len({row['prompt'] for row in rows})

  def at_the_end(batch):  # as a policy's implicit reward: one number a row
    last = np.maximum(np.asarray(batch.segment_NT).sum(axis=1) - 1, 0)
    return count_of_b(batch)[np.arange(len(last)), last]

  assert run(at_the_end, rows, mesh)[:2] == (got, samples)


def test_what_is_too_long(mesh):
  """Failure: a row that does not fit is measured cut, or not counted."""
  got, samples, _ = run(count_of_b, PAIRS, mesh, max_length=6, overlong='drop')
  kept = [i for i, row in enumerate(PAIRS) if len(row['prompt']) + max(map(len, row['responses'])) + 1 <= 6]
  assert 0 < len(kept) < len(PAIRS) and {s['problem'] for s in samples} == {*kept}
  assert got['frac_absent'] == pytest.approx(1 - len(kept) / len(PAIRS)) and got['pairs'] == sum(
    PAIRS[i]['ranks'] != [1, 1] for i in kept
  )
  check_rankings(PAIRS, 'x', TOK, 'plain', 6, 'drop')
  with pytest.raises(ConfigError, match=r"'data\.max_length': 2, and all 5 rows of eval\.evaluators\.x are longer"):
    check_rankings(PAIRS, 'x', TOK, 'plain', 2, 'drop')
  with pytest.raises(ConfigError, match=r"'data\.max_length': 6, but a row has"):
    check_rankings(PAIRS, 'x', TOK, 'plain', 6, 'raise')
  with pytest.raises(ConfigError, match=r'eval\.evaluators\.x: responses .* is no list'):
    check_rankings([{**PAIRS[0], 'responses': 3}], 'x', TOK, 'plain', 6, 'raise')


def test_evaluate_pointwise(mesh):
  """Failure: a verdict meets another completion's score, or a step's label the score at another token."""
  rows = [{'prompt': 'q', 'completion': 'ab' * n, 'label': n % 2} for n in range(1, 4)]
  got, samples, _ = run(count_of_b, rows, mesh)
  assert [s['score'] for s in samples] == pytest.approx([n + 0.01 * (2 * n + 2) for n in (1, 2, 3)])
  assert [s['label'] for s in samples] == [1, 0, 1] and got['judged'] == 3 and got['problems'] == 1
  rows = [
    {'prompt': 'q', 'completions': ['ab', 'bb', 'a'], 'labels': [1, 0, 0.5]},
    {'prompt': 'long', 'completions': ['b'], 'labels': [0]},
  ]
  got, samples, _ = run(count_of_b, rows, mesh)
  assert [s['score'] for s in samples] == pytest.approx([1.03, 3.05, 3.06, 1.05])
  assert [(s['completion'], s['label']) for s in samples] == [('ab', 1), ('bb', 0), ('a', 0.5), ('b', 0)] and got['auc'] == 0
  with pytest.raises(ValueError, match='a score after every token'):
    run(lambda batch: np.zeros(batch.tokens.shape[0]), rows, mesh)


def test_reads_of():
  """Failure: rows without judgements, or of several kinds, are found out by a KeyError at the end of a run."""
  assert reads_of([{**PAIRS[0], 'completion': 'x'}]) == 'rankings'
  with pytest.raises(
    ConfigError, match='holds no judgement to hold scores against; columns: prompt, answer; wanted: rankings: prompt, resp'
  ):
    reads_of([{'prompt': 'q', 'answer': 'a'}])
  with pytest.raises(ConfigError, match='of several kinds: rankings, verdicts'):
    reads_of([PAIRS[0], {'prompt': 'q', 'completion': 'a', 'label': 1}])


def test_make_ranking_evaluator():
  """Failure: a mistyped key is ignored, or a value out of its range is found at the end of a run."""
  assert make_ranking_evaluator({'task': 'hh_rlhf', 'size': 5}, 'eval.evaluators.x') == RankingEvaluator(task='hh_rlhf', size=5)
  for options, why in (({'size': -1}, r"x\.size': -1 is out"), ({'seed': -1}, r"x\.seed': -1 is out"), ({'top_k': 1}, 'x.top_k')):
    with pytest.raises(ConfigError, match=why):
      make_ranking_evaluator(options, 'eval.evaluators.x')


def test_tables(monkeypatch, tmp_path):
  """Failure: accuracy against judgements is missing from the tables, or the reliability curve is of something else."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  numbers = ranking_metrics(SCORES, RANKS, LENGTHS, PROMPTS)
  result = {
    'checkpoint': 'c',
    'fingerprint': 1,
    'config_hash': 'h',
    'hardware': {'device': 'd'},
    'tokens': 1,
    'evaluators': {'held_out': numbers},
  }
  lines = tables.markdown(result).splitlines()
  row = next(line for line in lines if line.startswith('| held_out'))
  assert lines[lines.index(row) - 2].startswith('| evaluator | problems | accuracy | longer is better |')
  assert row.startswith('| held_out | 2 | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] | 1.000 | 0.500 |')
  drawn = []
  monkeypatch.setattr(plt, 'close', drawn.append)
  tables.plot_reliability(result, epath.Path(tmp_path / 'x.png'))
  (axis,) = drawn[0].axes
  assert axis.lines[0].get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
  assert axis.lines[1].get_xydata().tolist() == [[b['predicted'], b['observed']] for b in numbers['reliability']]
  assert f'held_out: ECE {numbers["ece"]:.3f}' in axis.get_legend_handles_labels()[1]
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
