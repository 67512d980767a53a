"""PPO against objectives.md, written once more as plain loops in float64; its reward, its critic, its controller, its refusals."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reasoning import metrics, model
from rl_reasoning.advantages import AGGREGATIONS, weigh
from rl_reasoning.config import ConfigError, from_mapping
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.ppo import Ppo
from rl_reasoning.structs import DATA, ROLLOUT, Batch, Mean, TrainState
from rl_reasoning.train_step import make_steps

B, G, P, T, LIMIT = 4, 3, 1, 14, 8  # without rows from data a prompt has G + P completions: every array has one shape
N = B * (G + P)
WEIGHTS = (1.0, 0.5)
GIVEN = Given(('a', 'b'), WEIGHTS, LIMIT)
TWICE = {'num_iterations': 2}


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile():
  """A quarter less compilation, for programs that run a few times."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def make(**keys) -> Ppo:
  return Ppo(**{'given': GIVEN, 'num_generations': G if keys.get('ptx_coef') else G + P, 'ptx_rows': P, **keys})


@functools.cache
def make_rows(pretraining: bool = False) -> SimpleNamespace:
  """N ragged completions, of which every (G + P)th is a row from data with `pretraining`, in float64. What a padding, prompt or injected
  token holds would be seen in any mean. Row 5 has no verdict, row 9 crashed; the second function does not apply to the last prompt."""
  rng = np.random.default_rng(5)
  data = (np.arange(N) % (G + P) >= G) & pretraining
  prompt, length = rng.integers(1, 4, N), rng.integers(2, LIMIT + 1, N)
  length[[0, 5, 9]] = LIMIT
  place = np.arange(T)
  segment = place < (prompt + length)[:, None]
  mask = segment & (place >= np.where(data, 1, prompt)[:, None])
  for n in (1, 8):
    mask[n, prompt[n] + 1] = False  # injected
  mask[0, prompt[0] + LIMIT - 1] = False  # the last token too
  rewards, has, failed = np.round(rng.normal(0, 1, (N, 2)), 2), np.ones((N, 2)), np.zeros((N, 2))
  rewards[1], rewards[2] = (0.37, 0.0), (-3, 4)
  has[data], has[-(G + P) :, 1] = 0, 0
  has[5, 0], has[9, 1], failed[9, 1] = 0, 0, 1
  rewards[has == 0] = 99.0
  # Distances to the old policy on either side of 0.8, 1.2 and 3, and to the old value of 0.3, none near one.
  logp, value = rng.normal(-2, 0.7, (N, T)), rng.normal(0, 1, (N, T))
  old = logp - rng.choice([0.1, -0.1, 0.6, -0.6, 1.3], (N, T))
  old_value = value - rng.choice([0.1, -0.1, 0.9, -0.9], (N, T))

  def outside(x, filler):
    return np.where(mask, x, filler)

  def before(V):  # what the head must say for V to be the value: one token earlier
    return np.concatenate([V[:, 1:], np.full((N, 1), 77.0)], axis=1)

  return SimpleNamespace(
    data=data, segment=segment.astype(np.int32), mask=mask.astype(np.float64), rewards=rewards, has=has, failed=failed,
    truncated=(length == LIMIT) & ~data, logp=outside(logp, -4.0), old=outside(old, -30.0), value=value, old_value=old_value,
    ref=outside(logp + rng.normal(0, 0.5, (N, T)), -1.0), sample=outside(old + rng.normal(0, 0.4, (N, T)), 5.0),
    entropy=outside(rng.uniform(0.5, 2.5, (N, T)), 99.0), scores=before(value), old_scores=before(old_value),
  )  # fmt: skip


def to_batch(rows, **fields) -> Batch:
  return Batch(
    tokens=np.zeros((N, T), np.int32), segment_NT=rows.segment, position_NT=np.tile(np.arange(T, dtype=np.int32), (N, 1)),
    mask_NT=rows.mask, source_N=np.where(rows.data, DATA, ROLLOUT).astype(np.int32), group_N=np.zeros(N, np.int32),
    logp_sample_NT=rows.sample, rewards_NR=rows.rewards, has_reward_NR=rows.has, failed_NR=rows.failed,
    truncated_N=rows.truncated.astype(np.float64),
  ).replace(**fields)  # fmt: skip


def entropy_of(params, entropy, entropy_gradient):
  return (params['entropy'] if entropy_gradient else jax.lax.stop_gradient(params['entropy'])) if entropy else None


# A network whose log-probabilities, entropies and scores are its parameters.
TABLE_NET = SimpleNamespace(
  logp=lambda p, rows, entropy=False, entropy_gradient=False: (p['logp'], entropy_of(p, entropy, entropy_gradient)),
  scores=lambda p, rows: p['scores'],
  logp_and_scores=lambda p, rows, entropy=False, entropy_gradient=False: (
    p['logp'], entropy_of(p, entropy, entropy_gradient), p['scores'],
  ),
)  # fmt: skip
NETS = dict.fromkeys(('policy', 'ref', 'critic'), TABLE_NET)


def roles(tables: dict, shared: bool) -> dict:
  """Params by role."""
  if shared:
    return {'policy': tables}
  return {'policy': {k: v for k, v in tables.items() if k != 'scores'}, 'critic': {'scores': tables['scores']}}


def scored(objective: Ppo, rows) -> Batch:
  """The rows after `score`, by the policy and the critic as they were."""
  zero, one = jnp.zeros((N, T)), objective.one_update
  tables = {
    'logp': jnp.asarray(rows.logp if one else rows.old), 'entropy': zero, 'scores': jnp.asarray(rows.scores if one else rows.old_scores),
  }  # fmt: skip
  return objective.score(NETS, roles(tables, objective.shared), {'ref': {'logp': jnp.asarray(rows.ref)}}, to_batch(rows))


def weighed(objective: Ppo, batch: Batch) -> Batch:
  return batch.replace(weight_NT=weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, LIMIT))


@jax.enable_x64(True)
def run(objective: Ppo, rows, aux=None):
  """(batch, aux, prepare's metrics, loss's value, its metrics, its gradient by table), in float64."""
  batch, aux, first = objective.prepare(objective.init_aux() if aux is None else aux, scored(objective, rows))
  batch = weighed(objective, batch)
  tables = {name: jnp.asarray(getattr(rows, name)) for name in ('logp', 'entropy', 'scores')}

  def loss(tables):
    return objective.loss(NETS, roles(tables, objective.shared), {}, aux, batch)

  (value, more), grad = jax.value_and_grad(loss, has_aux=True)(tables)
  return jax.device_get((batch, aux, first, value, more, grad))


def estimate(k: str, d: float) -> float:
  return {'k1': d, 'k2': d**2 / 2, 'k3': math.exp(-d) + d - 1}[k]


def expected_targets(k: Ppo, rows, coef: float, seen: list) -> SimpleNamespace:
  """Mask, advantage, returns and the step's numbers as objectives.md says, in loops. `seen`: scores of steps before."""
  one = k.one_update
  old, V = (rows.logp, rows.value) if one else (rows.old, rows.old_value)
  rollout = [n for n in range(N) if not rows.data[n]]
  reward, has = np.zeros(N), np.zeros(N, bool)
  for start in range(0, len(rollout), k.num_generations):
    group = rollout[start : start + k.num_generations]
    speaks = [f for f in range(2) if any(rows.has[n, f] or rows.failed[n, f] for n in group)]
    for n in group:
      has[n] = all(rows.has[n, f] for f in speaks)
      reward[n] = sum(WEIGHTS[f] * rows.rewards[n, f] for f in speaks) if has[n] else 0
  judged = [n for n in rollout if has[n]]
  mask = np.where(rows.data[:, None], rows.mask, rows.mask * has[:, None])
  score = reward.copy()
  if k.score_normalization == 'running':
    every = np.concatenate([*seen, reward[judged]])
    score = (score - every.mean()) / (every.std(ddof=1) + 1e-4)
  if k.score_clip is not None:
    score = np.clip(score, -k.score_clip, k.score_clip)
  score = score - (k.missing_eos_penalty or 0) * rows.truncated
  r, sums = np.zeros((N, T)), {'k1': 0.0, 'k3': 0.0, 'tokens': 0, 'shaping': 0.0}
  for n in rollout:
    for t in np.flatnonzero(rows.mask[n]):
      d = old[n, t] - rows.ref[n, t]
      r[n, t] = -coef * estimate(k.kl_estimator, d)
      sums['k1'], sums['k3'], sums['tokens'] = sums['k1'] + d, sums['k3'] + estimate('k3', d), sums['tokens'] + 1
    if has[n]:
      sums['shaping'] += r[n].sum()
      r[n, np.flatnonzero(rows.mask[n])[-1]] += score[n]
  inside = (mask > 0) & ~rows.data[:, None]
  if k.whiten_rewards:
    r /= r[inside].std() + 1e-4
  A = np.zeros((N, T))
  for n in judged:
    places = list(np.flatnonzero(mask[n]))
    for i, t in enumerate(places):  # the sum itself, not a recursion
      for j in range(i, len(places)):
        after = V[n, places[j + 1]] if j + 1 < len(places) else 0.0
        A[n, t] += (k.gamma * k.lam) ** (j - i) * (r[n, places[j]] + k.gamma * after - V[n, places[j]])
  returns = np.where(inside, A + V, 0)
  told = {
    'objective/scores': score[judged].mean(), 'objective/non_score_reward': sums['shaping'] / len(judged),
    'objective/rlhf_reward': score[judged].mean() + sums['shaping'] / len(judged),
    'val/explained_variance': 1 - A[inside].var() / returns[inside].var(), 'val/mean': V[inside].mean(),
    'val/returns_mean': returns[inside].mean(), 'reward': reward[judged].mean(), 'frac_no_verdict': 1 - len(judged) / len(rollout),
  }  # fmt: skip
  if coef:
    told |= {'objective/kl': sums['k1'] / len(rollout), 'kl': sums['k3'] / sums['tokens'], 'objective/kl_coef': coef}
  white = np.where(inside, (A - A[inside].mean()) / (A[inside].std() + 1e-4), 0)
  return SimpleNamespace(mask=mask, inside=inside, A=white, returns=returns, told=told, scores=reward[judged], old=old, V=V)


def expected_loss(k: Ppo, rows, targets, logp, value, entropy) -> tuple[float, dict]:
  """(loss, what happened at its tokens)."""
  mask, A, old = targets.mask, targets.A, targets.old
  share = np.zeros(mask.shape)
  for data in (False, True):
    own = [n for n in range(len(mask)) if rows.data[n] == data and mask[n].any()]
    M = mask[own].sum()
    for n in own:
      tokens = mask[n].sum()
      share[n] = {'token_mean': 1 / M, 'sequence_mean': 1 / (len(own) * tokens), 'sequence_sum': 1 / len(own),
                  'fixed_length': 1 / (len(own) * LIMIT)}[k.aggregation]  # fmt: skip
  seen = dict.fromkeys(('loss/policy', 'loss/value', 'loss/ptx', 'approxkl', 'clip', 'dual', 'tis', 'value clip'), 0.0)
  total = 0.0
  for n, t in zip(*np.nonzero(mask)):
    w = share[n, t]
    if rows.data[n]:
      seen['loss/ptx'] -= w * logp[n, t]
      continue
    r, a, R = math.exp(logp[n, t] - old[n, t]), A[n, t], targets.returns[n, t]
    low, high = 1 - k.cliprange, 1 + k.cliprange
    policy = -min(a * r, a * min(max(r, low), high))
    seen['clip'] += (a < 0 and r < low) or (a > 0 and r > high)
    if k.delta is not None and a < 0:
      policy = min(policy, -k.delta * a)
      seen['dual'] += r > k.delta
    if k.tis_cap is not None:
      drift = math.exp(old[n, t] - rows.sample[n, t])
      policy *= min(drift, k.tis_cap)
      seen['tis'] += drift > k.tis_cap
    near = targets.V[n, t] + min(max(value[n, t] - targets.V[n, t], -k.cliprange_value), k.cliprange_value)
    free, held = (value[n, t] - R) ** 2, (near - R) ** 2
    seen['value clip'] += held > free + 1e-9
    seen['loss/policy'] += w * policy
    seen['loss/value'] += w * 0.5 * max(free, held)
    seen['approxkl'] += 0.5 * (logp[n, t] - old[n, t]) ** 2
    total -= k.entropy_coef * w * entropy[n, t]
  total += seen['loss/policy'] + k.vf_coef * seen['loss/value'] + k.ptx_coef * seen['loss/ptx']
  return total, seen


MUCH = {
  'kl_estimator': 'k3', 'gamma': 0.9, 'lam': 0.6, 'whiten_rewards': True, 'missing_eos_penalty': 1.5, 'score_normalization': 'running',
  'score_clip': 0.8, 'delta': 3.0, 'tis_cap': 1.1, 'entropy_coef': 0.02, 'cliprange_value': 0.3, 'vf_coef': 0.7, 'ptx_coef': 2.0,
}  # fmt: skip
CASES = {
  'one update': {},
  'two updates': TWICE,
  'two minibatches': {'num_minibatches': 2, 'cliprange_value': 0.3},
  'another clip': {'cliprange': 0.5, **TWICE},
  'no KL': {'kl_coef': 0.0},
  'no KL, two updates': {'kl_coef': 0.0, **TWICE},
  'k2': {'kl_coef': 0.3, 'kl_estimator': 'k2'},
  'k3': {'kl_coef': 0.3, 'kl_estimator': 'k3', **TWICE},
  'adaptive': {'kl_controller': 'adaptive', 'kl_target': 3.0, 'kl_horizon': 50},
  'discount': {'gamma': 0.9, 'lam': 0.6},
  'lambda 0': {'lam': 0.0},
  'whitened rewards': {'whiten_rewards': True},
  'no end': {'missing_eos_penalty': 1.5},
  'normalised scores': {'score_normalization': 'running', 'missing_eos_penalty': 1.0},
  'clipped scores': {'score_clip': 0.5, 'missing_eos_penalty': 1.0},
  'value weight': {'vf_coef': 0.5},
  'entropy': {'entropy_coef': 0.02, **TWICE},
  'dual clip': {'delta': 3.0, **TWICE},
  'tis': {'tis_cap': 1.1},
  'tis, two updates': {'tis_cap': 1.1, **TWICE},
  'shared': {'critic': 'shared', **TWICE},
  'shared, one update, no KL': {'critic': 'shared', 'kl_coef': 0.0},
  'pretraining': {'ptx_coef': 2.0},
  'pretraining of sequences': {'ptx_coef': 2.0, 'aggregation': 'sequence_mean', 'critic': 'shared', **TWICE},
  'much at once': {**MUCH, **TWICE},
  'much at once, shared': {**MUCH, 'critic': 'shared', 'num_minibatches': 2, 'kl_controller': 'adaptive'},
} | {f'{a}': {'aggregation': a, **TWICE} for a in AGGREGATIONS}  # fmt: skip


def rows_of(objective: Ppo) -> SimpleNamespace:
  return make_rows(objective.ptx_coef > 0)


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient(case):
  """Failure: reward, advantages, returns, loss, metrics or gradient are not those of objectives.md; the gradient is taken by finite
  differences of the loops, by log-probability, value and entropy, away from kinks."""
  objective = make(**CASES[case])
  rows, seen = rows_of(objective), np.array([0.5, -2.0, 4.0])
  aux = {'score_count': jnp.float32(3), 'score_mean': jnp.float32(seen.mean()), 'score_square': jnp.float32(seen.var() * 3)}
  aux = {k: v for k, v in aux.items() if objective.running} | ({'kl_coef': jnp.float32(0.125)} if objective.adaptive else {})
  assert aux.keys() == objective.init_aux().keys()
  batch, new_aux, first, value, more, grad = run(objective, rows, aux)
  want = expected_targets(objective, rows, 0.125 if objective.adaptive else objective.kl_coef, [seen])
  np.testing.assert_array_equal(batch.mask_NT, want.mask)
  np.testing.assert_allclose(batch.advantage_NT, want.A, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(batch.extras['returns'], want.returns, rtol=1e-6, atol=2e-6)
  told = metrics.summarise(first)
  assert {name: told[name] for name in want.told} == pytest.approx(want.told, rel=2e-6, abs=1e-6)
  assert ('objective/kl' in told) == ('kl' in told) == (objective.kl_coef > 0)
  # The loss is checked to more digits, on the targets that were found.
  want.A, want.returns = np.asarray(batch.advantage_NT), np.asarray(batch.extras['returns'])

  def reference(logp, value, entropy):
    return expected_loss(objective, rows, want, logp, value, entropy)

  loss, seen = reference(rows.logp, rows.value, rows.entropy)
  assert value == pytest.approx(loss, rel=1e-6)
  rng, eps = np.random.default_rng(0), 1e-5
  x, z = rng.normal(size=(2, *rows.mask.shape))
  y = np.where(want.inside, rng.normal(size=rows.mask.shape), 0)
  there, here = (reference(rows.logp + e * x, rows.value + e * y, rows.entropy + e * z)[0] for e in (eps, -eps))
  slope = sum(np.sum(grad[name] * d) for name, d in (('logp', x), ('entropy', z))) + np.sum(grad['scores'][:, :-1] * y[:, 1:])
  assert slope == pytest.approx((there - here) / (2 * eps), rel=1e-5, abs=1e-8)
  assert np.all(grad['logp'][want.mask == 0] == 0) and np.all(grad['scores'][:, :-1][~want.inside[:, 1:]] == 0)
  assert np.all(grad['scores'][:, -1] == 0) and np.any(grad['entropy'] != 0) == (objective.entropy_coef > 0)
  inside, M = want.inside, want.inside.sum()
  gap = np.abs(want.old - rows.sample)[inside]
  means = {
    'entropy': rows.entropy[inside].mean(), 'loss/policy': seen['loss/policy'], 'loss/value': seen['loss/value'],
    'policy/approxkl': seen['approxkl'] / M, 'policy/clipfrac': seen['clip'] / M, 'val/clipfrac': seen['value clip'] / M,
    'sampling/logp_difference/mean': gap.mean(), 'sampling/logp_difference/max': gap.max(),
  }  # fmt: skip
  means |= {'loss/ptx': seen['loss/ptx']} if objective.ptx_coef else {}
  means |= {'policy/dual_clipfrac': seen['dual'] / M} if objective.delta is not None else {}
  if objective.tis_cap is not None:
    means['sampling/tis_capped_ratio'] = seen['tis'] / M
    assert 0 < seen['tis'] < M
  assert metrics.summarise(more) == pytest.approx(means, rel=1e-6, abs=1e-9)
  # The ratio is 1 on the first pass and the value the old one: nothing is clipped then, and something afterwards.
  assert (seen['clip'] > 0) == (seen['value clip'] > 0) == (seen['approxkl'] > 0) == (not objective.one_update)
  assert objective.delta is None or seen['dual'] > 0
  assert new_aux.keys() == aux.keys()
  if objective.running:
    every = np.concatenate([[0.5, -2.0, 4.0], want.scores])
    got = [float(new_aux[f'score_{name}']) for name in ('count', 'mean', 'square')]
    assert got == pytest.approx([len(every), every.mean(), every.var() * len(every)], rel=1e-6)


def test_every_key_is_tried():
  """Failure: a new key stands in no golden case."""
  elsewhere = {'given', 'name', 'num_generations', 'ptx_rows', 'ref_model_sync_updates', 'ref_model_ema'}
  tried = {key for case in CASES.values() for key in case}
  assert tried == {f.name for f in dataclasses.fields(Ppo)} - elsewhere


@jax.enable_x64(True)
def prepared(objective: Ppo, rewards, lengths, **fields):
  """What prepare makes of N rows without a prompt worth the name, whose first reward is given, under a critic that says 0: with lambda 0
  the returns ARE the rewards of the tokens."""
  place = np.arange(T)
  mask = ((place >= 1) & (place < 1 + np.asarray(lengths)[:, None])).astype(np.float64)
  rewards = np.stack([rewards, np.zeros(N, np.asarray(rewards).dtype)], axis=1)
  batch = to_batch(make_rows(), mask_NT=mask, rewards_NR=rewards, has_reward_NR=np.ones((N, 2)), failed_NR=np.zeros((N, 2)),
                   truncated_N=np.zeros(N), extras={'value': np.zeros((N, T))})  # fmt: skip
  return jax.device_get(objective.prepare(objective.init_aux(), batch.replace(**fields)))


LENGTHS = np.arange(N) % 7 + 2


@pytest.mark.parametrize('scores', [[0.37, -1.25, 0.0, 2.5], [3, -2, 0, 7]], ids=['real', 'integer'])
def test_score_lands_on_the_end_token(scores):
  """Failure: the score stands on the token after the end (trl#3750) or on an injected one, a real reward becomes 0 or 1, an integer or a
  negative one is cut, or a completion cut at the limit escapes its penalty."""
  scores = np.tile(scores, B)
  mask = ((np.arange(T) >= 1) & (np.arange(T) < 1 + LENGTHS[:, None])).astype(np.float64)
  mask[3, LENGTHS[3]] = 0  # row 3 ends in injected text: its last own token is the one before
  cut = np.arange(N) % 4 == 2
  want = np.zeros((N, T))
  want[np.arange(N), LENGTHS - (np.arange(N) == 3)] = scores
  for penalty in (None, 0.5):
    objective = make(kl_coef=0.0, lam=0.0, missing_eos_penalty=penalty)
    got, _, told = prepared(objective, scores, LENGTHS, mask_NT=mask, truncated_N=cut)
    charged = want - np.where(cut, penalty or 0, 0)[:, None] * (np.arange(T) == LENGTHS[:, None])
    np.testing.assert_allclose(got.extras['returns'], charged, rtol=1e-6)
    told = metrics.summarise(told)
    assert told['objective/scores'] == pytest.approx(charged.mean() * T) and told['reward'] == pytest.approx(scores.mean())


def test_equal_scores_move_nothing():
  """Failure: completions that differ in nothing are pushed, by rounding blown up through a whitening or a running std."""
  objective = make(kl_coef=0.0, score_normalization='running', whiten_rewards=True, lam=1.0)
  got, aux, _ = prepared(objective, np.full(N, 0.7), np.full(N, 4))
  assert np.all(np.asarray(got.advantage_NT) == 0) and aux['score_mean'] == 0.7
  assert np.all(np.asarray(got.extras['returns']) == 0)


def test_rows_without_verdict_teach_nothing():
  """Failure: a row without a verdict moves the running scores, the whitening or the loss."""
  objective = make(kl_coef=0.0, score_normalization='running')
  has = np.ones((N, 2))
  has[1] = 0
  results = []
  for junk in (0.0, 1e6):
    rewards = np.linspace(-1, 1, N)
    rewards[1] = junk
    got, aux, told = prepared(objective, rewards, LENGTHS, has_reward_NR=has)
    results.append((got.advantage_NT, got.extras['returns'], aux, told['objective/scores'], told['objective/rlhf_reward']))
    assert np.all(got.mask_NT[1] == 0) and np.all(got.advantage_NT[1] == 0) and aux['score_count'] == N - 1
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
  'keys', [{}, {**MUCH, **TWICE}, {**MUCH, **TWICE, 'critic': 'shared'}], ids=['defaults', 'much', 'shared']
)
def test_padding(keys):
  """Failure: the side or the amount of a row's padding, or what stands outside the mask, changes loss, gradient or a metric, or makes
  them NaN."""
  objective = make(**keys)
  rows = rows_of(objective)
  moved = SimpleNamespace(**vars(rows))
  for name, filler in (('logp', 1e4), ('old', -1e4), ('ref', 1e4), ('sample', -3e4), ('entropy', -1e4)):
    setattr(moved, name, np.where(rows.mask > 0, getattr(rows, name), filler))
  for name, x in vars(moved).items():  # the rows are at most T - 3 long
    if x.ndim == 2 and x.shape[1] == T:
      setattr(moved, name, np.roll(x, 3, axis=1))
  a, b = run(objective, rows), run(objective, moved)
  np.testing.assert_allclose(np.roll(b[0].advantage_NT, -3, axis=1), a[0].advantage_NT, rtol=1e-6, atol=1e-8)
  assert b[3] == pytest.approx(a[3], rel=1e-6)
  assert metrics.summarise(b[2] | b[4]) == pytest.approx(metrics.summarise(a[2] | a[4]), rel=1e-6, abs=1e-9)
  for name in a[5]:
    np.testing.assert_allclose(np.roll(b[5][name], -3, axis=1), a[5][name], rtol=1e-6, atol=1e-9)


def test_pretraining_rows_stand_apart():
  """Failure: what rows from data hold changes advantages, returns, a loss of the rollout or its gradient."""
  objective, rows = make(**MUCH, **TWICE), make_rows(True)
  others, rng = SimpleNamespace(**vars(rows)), np.random.default_rng(1)
  for name, x in vars(rows).items():
    if name not in ('data', 'segment', 'has', 'failed'):
      junk = rng.integers(0, 2, x.shape) if name in ('mask', 'truncated') else rng.normal(-3, 2, x.shape)
      setattr(others, name, np.where(rows.data.reshape(-1, *(1,) * (x.ndim - 1)), junk, x).astype(x.dtype))
  a, b = run(objective, rows), run(objective, others)
  for x, y in zip(*((z.advantage_NT, z.extras['returns'], z.reward_N) for z in (a[0], b[0])), strict=True):
    np.testing.assert_array_equal(x, y)
    assert np.all(x[rows.data] == 0) and np.any(x != 0)
  told = [metrics.summarise(x[2] | x[4]) for x in (a, b)]
  pretraining = [x.pop('loss/ptx') for x in told]
  assert told[0] == pytest.approx(told[1], rel=1e-9)
  assert pretraining[1] == pytest.approx(-others.logp[rows.data][others.mask[rows.data] > 0].mean(), rel=1e-6)
  assert a[3] - b[3] == pytest.approx(2.0 * (pretraining[0] - pretraining[1]), rel=1e-6) and abs(a[3] - b[3]) > 0.01
  for name in a[5]:
    np.testing.assert_allclose(a[5][name][~rows.data], b[5][name][~rows.data], rtol=1e-9, atol=1e-15)
  alone = make(**TWICE)
  assert objective.sources == {'rollout': G, 'data': P} and objective.rows_together == objective.update_rows == G + P
  assert alone.sources == {'rollout': G + P} and alone.rows_together == 1 and alone.update_rows == G + P
  assert (objective.reads, alone.reads) == ('text', '')


def test_shared_and_own_critic_say_the_same():
  """Failure: the same values give another loss under a shared trunk; the policy learns from the value loss, or the critic from the
  surrogate, where each has its own parameters."""
  rows = make_rows()
  own, shared = (run(make(critic=critic, **TWICE), rows) for critic in ('own', 'shared'))
  assert own[3] == shared[3] and metrics.summarise(own[2] | own[4]) == metrics.summarise(shared[2] | shared[4])
  jax.tree.map(np.testing.assert_array_equal, own[5], shared[5])
  a, b = make(**TWICE), make(critic='shared', **TWICE)
  assert a.trainable == ('policy', 'critic') and b.trainable == ('policy',)
  assert a.heads == {'policy': ('lm',), 'ref': ('lm',), 'critic': ('scalar',)}
  assert b.heads == {'policy': ('lm', 'scalar'), 'ref': ('lm',)}
  # A reference that the policy replaces whole has its head too, or the state would change its shape.
  assert make(critic='shared', ref_model_ema=0.9).heads['ref'] == ('lm', 'scalar')


def test_score_reads_what_is_needed():
  """Failure: a pass over the rows is spent on what nobody reads, or a network is missing where it is read."""
  rows = make_rows()
  for keys, called in (
    ({}, {'policy.logp', 'ref.logp', 'critic.scores'}),
    ({'kl_coef': 0.0}, {'critic.scores'}),
    ({'kl_coef': 0.0, **TWICE}, {'policy.logp', 'critic.scores'}),
    ({'critic': 'shared'}, {'policy.logp_and_scores', 'ref.logp'}),
    ({'critic': 'shared', 'kl_coef': 0.0}, {'policy.scores'}),
    ({'ref_model_sync_updates': 5}, {'policy.logp', 'ref.logp', 'critic.scores'}),
  ):
    objective, seen = make(**keys), set()

    def note(name, value, seen=seen):
      return lambda *args: seen.add(name) or value

    nets = {
      role: SimpleNamespace(
        logp=note(f'{role}.logp', (rows.logp, None)), scores=note(f'{role}.scores', rows.scores),
        logp_and_scores=note(f'{role}.logp_and_scores', (rows.logp, None, rows.scores)),
      )
      for role in objective.heads
    }  # fmt: skip
    got = objective.score(nets, dict.fromkeys(objective.trainable), {'ref': None}, to_batch(rows))
    assert seen == called, keys
    assert (got.logp_old_NT is None) == (not objective.kl_coef and objective.one_update)
    assert (got.logp_ref_NT is None) == (not objective.kl_coef)
    wants_ref = 'ref.logp' in called
    assert (objective.frozen + objective.moving == ('ref',)) == wants_ref and bool(objective.moving) == objective.moves
    value = np.where(rows.segment > 0, rows.value, 0)[:, 1:]
    np.testing.assert_allclose(got.extras['value'], np.pad(value, ((0, 0), (1, 0))), rtol=1e-6)


ARCH = model.Arch(20, 8, 12, 1, 2, 1, 4)


def test_real_network():
  """Failure: V_t has seen the token that it judges (or not the one before), the KL between equal weights is not 0 at every temperature, or
  the ratio of the first pass is not 1."""
  rng, N, width = np.random.default_rng(0), 4, 7
  objective = Ppo(Given(('a',), (1.0,), 5), num_generations=2, critic='shared', **TWICE)
  heads = objective.heads['policy']
  params = jax.tree.map(lambda w: jnp.asarray(rng.normal(w.scale < 0, 0.5, w.shape), jnp.float32), model.weight_table(ARCH, heads),
                        is_leaf=model.is_weight)  # fmt: skip
  net = model.make_net(ARCH, lambda rows: rows.extras['temperature'], dtype='float32', remat='none')
  ones = np.ones((N, 1), np.float32)
  batch = Batch(
    tokens=rng.integers(0, 20, (N, width)).astype(np.int32), segment_NT=np.ones((N, width), np.int32),
    position_NT=np.tile(np.arange(width, dtype=np.int32), (N, 1)), mask_NT=np.tile((np.arange(width) > 1).astype(np.float32), (N, 1)),
    source_N=np.zeros(N, np.int32), group_N=np.arange(N) // 2, rewards_NR=rng.normal(size=(N, 1)).astype(np.float32),
    logp_sample_NT=np.zeros((N, width), np.float32), has_reward_NR=ones, failed_NR=0 * ones, truncated_N=np.zeros(N, np.float32),
    extras={'temperature': np.array([1.0, 0.6, 1.7, 0.05], np.float32)},
  )  # fmt: skip

  @jax.jit
  def everything(batch):
    rows = objective.score({'policy': net, 'ref': net}, {'policy': params}, {'ref': params}, batch)
    rows, _, first = objective.prepare({}, rows)
    more = objective.loss({'policy': net}, {'policy': params}, {}, {}, weighed(objective, rows))[1]
    return rows, first | more

  rows, told = everything(batch)
  told = metrics.summarise(told)
  assert np.std(np.asarray(rows.logp_old_NT)[:, 2:]) > 0.1  # the network says something
  nothing = ('objective/kl', 'kl', 'objective/non_score_reward', 'policy/clipfrac', 'val/clipfrac')
  assert {told[name] for name in nothing} == {0}
  assert told['policy/approxkl'] < 1e-10
  other = batch.tokens.copy()
  other[:, 4] = (other[:, 4] + 1) % 20
  before, after = np.asarray(rows.extras['value']), np.asarray(everything(batch.replace(tokens=other))[0].extras['value'])
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(before[:, 5:] != after[:, 5:]) and np.all(before[:, 0] == 0) and np.all(before[:, 1:] != 0)


# A network by token: quick to compile, and a row says the same in any micro-batch.
TOKEN_NET = SimpleNamespace(
  logp=lambda p, rows, entropy=False, entropy_gradient=False: (
    p['logp'][rows.tokens], p['logp'][rows.tokens] ** 2 if entropy else None,
  ),
  scores=lambda p, rows: p['scores'][rows.tokens],
)  # fmt: skip


def test_update():
  """Failure: loss, gradient or a metric changes with the split into micro-batches; a minibatch lacks its share of rows from data; the first
  update clips, or those after it do not; a frozen role moves, or a trained one does not."""
  rng, rows = np.random.default_rng(3), make_rows(True)
  objective = make(**{**MUCH, 'num_minibatches': 2, 'cliprange_value': 0.05})
  batch = to_batch(rows, logp_sample_NT=0 * rows.sample)
  batch = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x, batch)
  batch = batch.replace(tokens=rng.integers(0, 9, rows.mask.shape).astype(np.int32))
  tables = [jnp.asarray(rng.normal(-1, 0.5, 9), jnp.float32) for _ in range(3)]
  params, optimizer = {'policy': {'logp': tables[0]}, 'critic': {'scores': tables[1]}}, optax.sgd(1.0)

  def begin():
    copied = jax.tree.map(jnp.copy, params)  # an update eats its state
    return TrainState(
      step=0, cursor={}, updates=jnp.int32(0), params=copied, opt={role: optimizer.init(p) for role, p in copied.items()}, aux={},
      moving={}, frozen={'ref': {'logp': tables[2]}},
    )  # fmt: skip

  def steps(micro_batch):
    nets, optimizers = dict.fromkeys(objective.heads, TOKEN_NET), dict.fromkeys(params, optimizer)
    return make_steps(objective, nets, optimizers, lambda _: 1.0, micro_batch, LIMIT)

  whole, state = steps(0), begin().replace(aux=objective.init_aux())
  scored, aux, _ = whole.prepare(state, whole.score(state, batch))
  for some in (shares := list(whole.minibatches(scored, jax.random.key(0)))):
    assert some.source_N.reshape(-1, G + P).tolist() == [[ROLLOUT] * G + [DATA] * P] * (B // 2)
  assert len(shares) == 2

  def train(steps):
    state, told = begin().replace(aux=aux), []
    for _ in range(2):
      state, more = steps.update(state, scored)
      told.append(metrics.summarise(more))
    return jax.device_get(state), told

  (state, told), (split, told_split) = train(whole), train(steps(G + P))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), split.params, state.params)
  for a, b in zip(told, told_split, strict=True):
    assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
  clips = [[x[name] for name in ('policy/clipfrac', 'val/clipfrac', 'policy/approxkl')] for x in told]
  assert max(clips[0]) < 1e-12 and min(clips[1]) > 0
  np.testing.assert_array_equal(state.frozen['ref']['logp'], tables[2])
  assert np.all(state.params['policy']['logp'] != tables[0]) and np.all(state.params['critic']['scores'] != tables[1])
  assert told[0].keys() >= {'grad_norm', 'grad_norm/critic', 'loss'} and state.aux['score_count'] == N - B * P - 2


def test_controller():
  """Failure: the KL coefficient moves away from the target, by another step than Ziegler's, or does not settle; the reward reads the
  config's number; the running scores are lost."""
  objective = make(kl_controller='adaptive', kl_coef=0.1, kl_target=6.0, kl_horizon=1000, score_normalization='running')
  aux = objective.init_aux() | {'score_mean': jnp.float32(5)}

  def after(kl, n=200.0):
    got = objective.adapt(aux, {'objective/kl': Mean(jnp.float32(kl * n), n)})
    assert got['score_mean'] == 5 and got['kl_coef'].dtype == jnp.float32
    return float(got['kl_coef'])

  for kl, n, want in ((6, 200, 0.1), (6.6, 200, 0.102), (60, 200, 0.104), (60, 100, 0.102), (5.4, 200, 0.098), (-3, 200, 0.096)):
    assert after(kl, float(n)) == pytest.approx(want, rel=1e-5)
  for first in (0.01, 2.0):  # a policy that strays further the less it is held
    aux, kl = {'kl_coef': jnp.float32(first)}, 0.0
    for _ in range(150):
      kl += 0.3 * (1.2 / (0.02 + float(aux['kl_coef'])) - kl)
      aux = objective.adapt(aux, {'objective/kl': Mean(jnp.float32(kl * 200), 200.0)})
    assert kl == pytest.approx(6.0, rel=0.02) and float(aux['kl_coef']) == pytest.approx(0.18, rel=0.03)
  fixed = make()
  assert fixed.init_aux() == {} and fixed.adapt({}, {}) == {}
  hasty = make(kl_controller='adaptive', kl_horizon=16, num_generations=4)
  with pytest.raises(ConfigError, match=r"'objective.kl_horizon': 16 is too short for 80 completions .* above 16$"):
    hasty.check_step(20)
  hasty.check_step(19)
  make(kl_horizon=16, num_generations=4).check_step(20)  # a fixed coefficient stays


# key -> a value that is refused
REFUSED = {
  'num_generations': 0, 'num_iterations': 0, 'num_minibatches': 0, 'cliprange': 0.0, 'cliprange_value': 0.0,
  'vf_coef': 0.0, 'gamma': 0.0, 'lam': -0.1, 'kl_coef': -0.1, 'kl_estimator': 'k4',
  'kl_controller': 'pid', 'kl_target': 0.0, 'kl_horizon': 0, 'whiten_rewards': 2, 'missing_eos_penalty': -1.0,
  'delta': 1.2, 'tis_cap': 0.0, 'entropy_coef': -0.1, 'aggregation': 'mean', 'critic': 'none',
  'score_normalization': 'batch', 'score_clip': 0.0, 'ptx_coef': -1.0, 'ptx_rows': 0,
  'ref_model_sync_updates': 0, 'ref_model_ema': 1.0,
}  # fmt: skip


@pytest.mark.parametrize('key', REFUSED)
def test_refusals(key):
  """Failure: a value that makes no sense is trained with, or refused without its key."""
  with pytest.raises(ConfigError, match=re.escape(f"config key 'objective.{key}'")):
    from_mapping(Ppo, {key: REFUSED[key]}, 'objective.', given=GIVEN)


def test_refusals_are_complete():
  """Failure: a new key takes any value."""
  assert set(REFUSED) == {f.name for f in dataclasses.fields(Ppo)} - {'given', 'name'}
  for keys, key in (({'gamma': 1.1}, 'gamma'), ({'lam': 1.1}, 'lam'), ({'cliprange': float('nan')}, 'cliprange'),
                    ({'aggregation': 'fixed_length', 'ptx_coef': 1.0}, 'aggregation')):  # fmt: skip
    with pytest.raises(ValueError, match=f'objective.{key}'):
      make(**keys)


def test_what_cannot_act_is_named():
  """Failure: a key that cannot act is not listed, or one that acts is."""
  reference = {'ref_model_sync_updates', 'ref_model_ema'}
  controller, clips = {'kl_target', 'kl_horizon'}, {'cliprange', 'delta', 'cliprange_value'}
  assert set(make().inert()) == clips | controller | {'ptx_rows'}
  assert set(make(kl_controller='adaptive', ptx_coef=1.0, **TWICE).inert()) == set()
  assert set(make(kl_coef=0.0, kl_controller='adaptive', ptx_coef=1.0, num_minibatches=2).inert()) == (
    reference | controller | {'kl_estimator', 'kl_controller'}
  )
  rows = make_rows()
  want = run(make(), rows)
  for keys in ({'cliprange': 1e-6}, {'delta': 1.5}, {'cliprange_value': 1e-6}):
    got = run(make(**keys), rows)
    assert got[3] == want[3], keys
    jax.tree.map(np.testing.assert_array_equal, got[5], want[5])


def test_formula():
  """Failure: --explain keeps silent about a key that acts, or tells one that does not."""
  values = {
    'num_iterations': 2, 'cliprange': 0.3, 'cliprange_value': 0.7, 'vf_coef': 0.2, 'gamma': 0.9, 'lam': 0.5, 'kl_coef': 0.07,
    'kl_estimator': 'k2', 'kl_controller': 'adaptive', 'kl_target': 7.0, 'kl_horizon': 777, 'ref_model_sync_updates': 9,
    'ref_model_ema': 0.9, 'score_normalization': 'running', 'score_clip': 3.0, 'missing_eos_penalty': 1.5, 'whiten_rewards': True,
    'delta': 4.0, 'tis_cap': 2.5, 'entropy_coef': 0.03, 'aggregation': 'sequence_sum', 'critic': 'shared',
    'ptx_coef': 27.8, 'ptx_rows': 3, 'num_minibatches': 4,
  }  # fmt: skip
  base = {'kl_controller': 'adaptive', 'ptx_coef': 1.0, **TWICE}
  for key, value in values.items():
    start = {k: v for k, v in base.items() if k != key}
    if key == 'num_minibatches':
      start.pop('num_iterations')
    assert make(**start).formula() != make(**{**start, key: value}).formula(), key
  assert values.keys() == {f.name for f in dataclasses.fields(Ppo)} - {'given', 'name', 'num_generations'}
  text = '\n'.join(make(missing_eos_penalty=1.0, **TWICE).formula())
  for words in ('[0.8, 1.2]', 'score: 1 a + 0.5 b - 1 where', '-0.05 k1 a token', 'gamma 1 and lambda 0.95', 'reference frozen'):
    assert words in text, words
