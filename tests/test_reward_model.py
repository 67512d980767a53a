"""Reward models against objectives.md, written once more as loops in float64; where scores are read, what counts in nothing, and that they
learn."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import losses, metrics, model, preferences
from rl_reasoning.advantages import weigh
from rl_reasoning.config import ConfigError, from_mapping
from rl_reasoning.objectives import reward_model
from rl_reasoning.objectives.reward_model import SETTINGS, OutcomeRewardModel, ProcessRewardModel, RewardModel, shift
from rl_reasoning.structs import Batch, Max, Mean, Min
from rl_reasoning.tokenizer import ByteTokenizer
from rl_reasoning.train_step import deal

K, T = 3, 9
CENTER = 0.3
ABSENT = 0  # length of a response that pads its ranking
# (ranks, lengths of the responses, margin): an ordinary ranking, one with a tie, a padded one with a margin, one of ties alone, a dropped
# one, and again an ordinary one.
UNITS = [
  ([2, 1, 3], [3, 5, 1], 0.0),
  ([1, 2, 1], [4, 2, 2], 0.0),
  ([2, 1, 1], [2, 6, ABSENT], 0.7),  # padding that would be the best response
  ([4, 4, 4], [1, 2, 3], 0.0),
  ([0, 0, 0], [ABSENT] * 3, 0.0),
  ([1, 2, 3], [5, 5, 5], 0.0),
]
MODEL = RewardModel(ranking_size=K, center_rewards_coefficient=CENTER)
NETS = {'policy': SimpleNamespace(scores=lambda params, rows: params)}  # the weights are the scores themselves


def make_batch(units, prompt: int = 2, width: int = T, size: int = K) -> Batch:
  """Rows of `prompt` prompt tokens and the response; rankings padded to `size`."""
  units = [
    (ranks + [0] * (size - len(ranks)), lengths + [ABSENT] * (size - len(lengths)), margin) for ranks, lengths, margin in units
  ]
  lengths = np.asarray([n for _, own, _ in units for n in own])
  end, place = np.where(lengths > 0, prompt + lengths, 0)[:, None], np.arange(width)
  segment = (place < end).astype(np.int32)
  N = len(lengths)
  return Batch(
    tokens=segment, segment_NT=segment, position_NT=place * segment, mask_NT=segment * (place >= prompt) * 1.0,
    source_N=np.ones(N, np.int32), group_N=np.repeat(np.arange(len(units)), size),
    extras={'rank': np.asarray([r for ranks, _, _ in units for r in ranks], np.float64), 'present': (lengths > 0) * 1.0,
            'margin': np.repeat([m for *_, m in units], size)},
  )  # fmt: skip


def place_scores(scores, batch: Batch, rest: float) -> np.ndarray:
  """[N, T]: each row's score after its last token, and `rest` after every other."""
  full = np.full(batch.tokens.shape, rest)
  for n, end in enumerate(np.asarray(batch.segment_NT).sum(axis=1)):
    if end:
      full[n, end - 1] = scores[n]
  return full


@functools.partial(jax.jit, static_argnums=(0, 1))
def compute(objective, parts, batch: Batch, scores, aux):
  batch, _, gathered = objective.prepare(aux, batch)
  weight = weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, 0, objective.rows_together)
  dealt = deal(batch.replace(weight_NT=weight), parts, objective.rows_together)

  def total(scores):
    split, value, merged = deal(scores, parts, objective.rows_together), 0.0, gathered
    for i in range(parts):
      more, found = objective.loss(NETS, {'policy': split[i]}, {}, aux, jax.tree.map(lambda x, i=i: x[i], dealt))
      value, merged = value + more, metrics.merge(merged, found)
    return value, merged

  return jax.value_and_grad(total, has_aux=True)(scores)


def evaluate(objective, batch: Batch, scores_NT, aux=None, parts: int = 1):
  """(loss, metrics, gradient in the scores, unsummarised metrics), in float64, of the whole update or summed over micro-batches."""
  aux = jax.tree.map(np.float32, objective.init_aux() if aux is None else aux)
  (value, found), slope = compute(objective, parts, batch, scores_NT, aux)
  return float(value), metrics.summarise(found), np.asarray(slope), found


def expected_loss(scores, units, center: float) -> float:
  """objectives.md in loops: the mean over the kept pairs of a ranking, then over the rankings that have one. scores: [U][K]."""
  per_ranking = []
  for s, (ranks, lengths, margin) in zip(scores, units, strict=True):
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if lengths[i] and lengths[j] and ranks[i] < ranks[j]]
    terms = [math.log1p(math.exp(-(s[i] - s[j] - margin))) + center * (s[i] + s[j]) ** 2 for i, j in pairs]
    per_ranking += [sum(terms) / len(terms)] if terms else []
  return sum(per_ranking) / len(per_ranking)


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def scores():
  return np.random.default_rng(5).normal(0, 1.5, (len(UNITS), K))


def test_ranking_loss(scores):
  """Failure: ties or padding count, a margin has the wrong sign, pairs rather than prompts are averaged, or a score is read off by one."""
  batch = make_batch(UNITS)
  full = place_scores(scores.reshape(-1), batch, rest=77.0)  # what the head says elsewhere would be seen
  value, found, slope, _ = evaluate(MODEL, batch, full)
  assert value == pytest.approx(expected_loss(scores, UNITS, CENTER), rel=1e-12)
  assert found['ranking_loss'] == pytest.approx(expected_loss(scores, UNITS, 0.0), rel=1e-12)
  numeric = np.zeros(full.shape)
  for n in range(len(full)):
    if end := int(batch.segment_NT[n].sum()):
      for sign in (1, -1):
        moved = scores.copy()
        moved[n // K, n % K] += sign * 1e-5
        numeric[n, end - 1] += sign * expected_loss(moved, UNITS, CENTER) / 2e-5
  np.testing.assert_allclose(slope, numeric, atol=1e-9)
  assert not slope[9:15].any() and np.count_nonzero(slope) == 3 + 3 + 2 + 3  # of the tied and of the dropped ranking: nothing


def test_where_the_score_is_read():
  """Failure: off by one: the score is read before the last token, after it on padding, or of another packed sequence."""
  segment = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8, [0] * 8])
  mask = np.array([[0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 1, 1], [0] * 8]) * 1.0
  expected = np.zeros((3, 8))
  expected[0, 2] = expected[0, 5] = expected[1, 7] = 1
  np.testing.assert_array_equal(jax.jit(losses.last_token)(mask, segment), expected)


def test_pair(scores):
  """Failure: a pair is not -log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2, TRL's loss."""
  pairs = [([1, 2], [2, 4], 0.0), ([2, 1], [3, 3], 0.0), ([1, 2], [1, 1], 1.5)] * 2
  batch = make_batch(pairs)
  value, found, _, _ = evaluate(MODEL, batch, place_scores(scores.reshape(-1), batch, 0.0))
  chosen, rejected = scores[range(6), [0, 1, 0] * 2], scores[range(6), [1, 0, 1] * 2]
  d = chosen - rejected
  assert found['ranking_loss'] == pytest.approx(-np.mean(np.log(1 / (1 + np.exp(-(d - [0, 0, 1.5] * 2))))))
  assert value == pytest.approx(found['ranking_loss'] + CENTER * np.mean((chosen + rejected) ** 2))
  assert found['accuracy'] == pytest.approx(np.mean(d > 0)) and found['margin'] == pytest.approx(d.mean())


def test_invariance(scores):
  """Failure: the loss or a metric depends on the order of responses, on padding, on how rankings are padded or dealt to micro-batches."""
  batch = make_batch(UNITS)
  value, found, _, _ = evaluate(MODEL, batch, place_scores(scores.reshape(-1), batch, 9.0))

  def check(value_found):
    assert value_found[0] == pytest.approx(value, rel=1e-12)
    assert value_found[1] == pytest.approx(found, rel=1e-12)

  order = [2, 0, 1]
  turned = [([r[i] for i in order], [n[i] for i in order], margin) for r, n, margin in UNITS]
  other = make_batch(turned)
  check(evaluate(MODEL, other, place_scores(scores[:, order].reshape(-1), other, 9.0)))
  wide = make_batch(UNITS, prompt=4, width=16, size=5)
  padded = np.pad(scores, ((0, 0), (0, 2)), constant_values=50.0)
  objective = dataclasses.replace(MODEL, ranking_size=5)
  check(evaluate(objective, wide, place_scores(padded.reshape(-1), wide, -3.0), parts=2))


def test_metrics(scores):
  """Failure: a metric counts padding, ties or dropped rankings, or is not what its name says."""
  batch = make_batch(UNITS)
  scores[1, 1] = scores[1, 0]  # a tie of scores in a pair is half right
  _, found, _, merged = evaluate(MODEL, batch, place_scores(scores.reshape(-1), batch, 77.0))
  pairs = {0: [(1, 0), (0, 2), (1, 2)], 1: [(0, 1), (2, 1)], 2: [(1, 0)], 5: [(0, 1), (1, 2), (0, 2)]}
  d = {u: np.array([scores[u, i] - scores[u, j] for i, j in own]) for u, own in pairs.items()}
  best = [scores[0, 1], scores[1, 0], scores[1, 2], scores[2, 1], scores[5, 0]]
  alive = [*scores[0], *scores[1], *scores[2, :2], *scores[5]]
  assert found == pytest.approx({
    'accuracy': np.mean([np.mean((x > 0) + 0.5 * (x == 0)) for x in d.values()]),
    'margin': np.mean([x.mean() for x in d.values()]),
    'min_reward': min(alive), 'mean_reward': np.mean(alive), 'max_reward': max(alive),
    'demonstration_reward': np.mean(best), 'ranking_loss': expected_loss(scores, UNITS, 0.0),
    'frac_ties': (1 + 3) / (3 + 3 + 1 + 3 + 3), 'frac_absent': 1 / 6,
  })  # fmt: skip
  assert isinstance(merged['min_reward'], Min) and isinstance(merged['max_reward'], Max)


def test_nothing_to_learn(scores):
  """Failure: an update of ties alone moves the weights, or is NaN."""
  batch = make_batch(UNITS[3:5] * 3)
  value, found, slope, merged = evaluate(MODEL, batch, place_scores(scores.reshape(-1), batch, 1.0))
  assert value == 0 and not slope.any() and 'accuracy' not in found and 'score_drift' not in found
  before = {'mean': jnp.float64(0.3), 'weight': jnp.float64(0.5)}
  assert jax.jit(MODEL.adapt)(before, merged) == before


def test_shift(scores):
  """Failure: scores are not shifted to mean 0 on demonstrations, the mean begins biased to 0, lags far behind
  scores that grow, or the drift is from another mean."""
  objective, batch = MODEL, make_batch(UNITS)
  aux = objective.init_aux()
  assert shift(aux) == 0 and shift({}) == 0
  assert 'score_drift' not in evaluate(objective, batch, place_scores(scores.reshape(-1), batch, 0.0), aux)[1]
  means, adapt = [3.0, 5.0, -1.0], jax.jit(objective.adapt)
  for mean in means:
    aux = adapt(aux, {'demonstration_reward': Mean(4 * mean, 4.0)})
  weights = reward_model.DECAY ** np.array([2, 1, 0])
  assert shift(aux) == pytest.approx(np.average(means, weights=weights))
  found = evaluate(objective, batch, place_scores(scores.reshape(-1), batch, 0.0), aux)[1]
  assert found['score_drift'] == pytest.approx(found['demonstration_reward'] - shift(aux), abs=1e-6)
  first = adapt(objective.init_aux(), {'demonstration_reward': Mean(8.0, 4.0)})
  assert shift(first) == pytest.approx(2.0, rel=1e-6)
  for n in range(60):  # scores that grow by a tenth of a point a step
    first = adapt(first, {'demonstration_reward': Mean(4 * (2 + 0.1 * n), 4.0)})
  assert abs(shift(first) - 7.9) < 1


def make_judged(name: str) -> tuple[Batch, np.ndarray, np.ndarray]:
  """(batch, where a row is judged, labels), [N, T]: one row is absent, one label is 1/2."""
  batch = make_batch([([1], [3], 0.0), ([1], [6], 0.0), ([1], [ABSENT], 0.0), ([1], [1], 0.0)], size=1)
  judged, label = np.zeros((4, T)), np.zeros((4, T))
  if name == 'outcome_reward_model':
    for n, t, y in ((0, 4, 1.0), (1, 7, 0.2), (3, 2, 0.5)):
      judged[n, t], label[n, t] = 1, y
    return batch.replace(extras={'present': batch.extras['present'], 'label': np.array([1, 0.2, 1, 0.5])}), judged, label
  for n, t, y in ((0, 3, 1.0), (1, 2, 1.0), (1, 4, 0.5), (1, 6, 0.0), (3, 1, 1.0)):  # the last is no token of the completion
    judged[n, t], label[n, t] = t >= 2, y * (t >= 2)
  step = judged.copy()
  step[3, 1] = 1
  return batch.replace(extras={'present': batch.extras['present'], 'step': step, 'step_label': label}), judged, label


@pytest.mark.parametrize('name', ['outcome_reward_model', 'process_reward_model'])
def test_pointwise(name):
  """Failure: the loss is no binary cross-entropy, or a label meets the score of another token, row or step."""
  batch, judged, label = make_judged(name)
  x = np.random.default_rng(6).normal(0, 2, (4, T))
  value, found, slope, _ = evaluate(SETTINGS[name](), batch, x)
  p = 1 / (1 + np.exp(-x))
  entropy = -label * np.log(p) - (1 - label) * np.log(1 - p)
  assert value == pytest.approx(np.sum(judged * entropy) / judged.sum())
  np.testing.assert_allclose(slope, judged * (p - label) / judged.sum(), atol=1e-12)
  sided = (judged > 0) & (label != 0.5)
  assert found == pytest.approx({
    'accuracy': np.mean((p > 0.5)[sided] == (label > 0.5)[sided]), 'mean_probability': p[judged > 0].mean(),
    'mean_label': label[judged > 0].mean(), 'frac_absent': 1 / 4,
  })  # fmt: skip
  assert shift(SETTINGS[name]().init_aux()) == 0


def test_what_each_is():
  """Failure: a setting reads other rows than its loss is of, keeps a language head, or counts rows otherwise than they are encoded."""
  reads = {name: cls.reads for name, cls in SETTINGS.items()}
  assert reads == {'reward_model': 'rankings', 'outcome_reward_model': 'verdicts', 'process_reward_model': 'steps'}
  for name, cls in SETTINGS.items():
    objective = cls()
    assert objective.name == name and objective.heads == {'policy': ('scalar',)} and objective.trainable == ('policy',)
    assert objective.sources == {'data': objective.rows_together} and objective.update_rows == objective.rows_together
  assert RewardModel(ranking_size=9).sources == {'data': 9} and OutcomeRewardModel().rows_together == 1
  assert 'softplus(-(s_w - s_l - margin))' in ' '.join(RewardModel().formula()) and '0.01 (s_w + s_l)^2' not in str(
    RewardModel().formula()
  )
  assert '0.01 (s_w + s_l)^2' in ' '.join(RewardModel(center_rewards_coefficient=0.01).formula())
  assert 'steps' in ' '.join(ProcessRewardModel().formula()) and 'completion' in ' '.join(OutcomeRewardModel().formula())


@pytest.mark.parametrize('key, value', [('ranking_size', 1), ('center_rewards_coefficient', -0.1)])
def test_refused(key, value):
  """Failure: a value that makes no sense is computed with, or the error does not name its key."""
  with pytest.raises(ConfigError, match=f"'objective.{key}': {value} must"):
    from_mapping(RewardModel, {key: value}, 'objective.')


ROWS = [
  {'prompt': p, 'responses': [x, y], 'ranks': [1, 2]} for p, x, y in (('p', 'ab', 'ax'), ('q', 'ba', 'xxx'), ('r', 'b', 'a'))
]


def test_learns():
  """Failure: with the real network and the real rows the loss does not lead the scores to what people preferred."""
  with jax.enable_x64(False):
    tok, objective, rng = ByteTokenizer(), RewardModel(), np.random.default_rng(7)
    arch = model.Arch(tok.vocab_size, 16, 32, 1, 2, 1, 8)
    rows = preferences.encode_rankings(ROWS, tok, 'plain', 16)
    net = model.make_net(arch, lambda rows: 1.0, dtype='float32', remat='none')

    def start(path, w):  # model.init compiles for longer than all of this test
      scale = np.ones(w.shape) if w.scale == -1 else rng.normal(0, w.scale, w.shape)
      return scale.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(start, model.weight_table(arch, ('scalar',)), is_leaf=model.is_weight)

    @jax.jit
    def step(params, aux):
      batch, _, _ = objective.prepare(aux, rows)
      batch = batch.replace(weight_NT=weigh(batch.mask_NT, batch.segment_NT, batch.source_N, 'unit_mean', 0, 2))
      loss = functools.partial(objective.loss, {'policy': net})
      (value, found), grads = jax.value_and_grad(lambda p: loss({'policy': p}, {}, aux, batch), has_aux=True)(params)
      return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), objective.adapt(aux, found), value, found

    aux, values = {'mean': np.float32(0), 'weight': np.float32(0)}, []
    for _ in range(40):
      params, aux, value, found = step(params, aux)
      values.append(float(value))
    found = metrics.summarise(found)
    assert values[0] > 0.5 and values[-1] < 0.1 and found['accuracy'] == 1, values
    assert found['score_drift'] > 0  # the moving mean is that of earlier steps, with lower scores
    assert 0 < shift(aux) < found['demonstration_reward']
