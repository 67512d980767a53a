"""The GRPO family against objectives.md, written once more as plain loops in float64; its refusals, its words, and that it learns."""

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

from rl_reasoning import metrics
from rl_reasoning.advantages import AGGREGATIONS, SCALES, weigh
from rl_reasoning.config import ConfigError, from_mapping
from rl_reasoning.objectives import OBJECTIVES
from rl_reasoning.objectives.grpo import SETTINGS, Given, Grpo
from rl_reasoning.structs import Batch, Mean, TrainState
from rl_reasoning.train_step import make_steps

G, N, T, LIMIT = 4, 24, 12, 10
WEIGHTS = (1.0, 0.5)
GIVEN = Given(('a', 'b'), WEIGHTS, LIMIT)

# The tables of objectives.md.
DEFAULTS = {
  'num_iterations': 1, 'num_minibatches': 1, 'surrogate': 'clip', 'importance_sampling_level': 'token', 'epsilon': 0.2,
  'epsilon_high': None, 'delta': None, 'cispo_cap': 5.0, 'tis_cap': None, 'advantage_estimator': 'group',
  'reinforce_pp_baseline': False, 'scale_rewards': 'group', 'multi_objective_aggregation': 'sum_then_normalize',
  'aggregation': 'sequence_mean', 'beta': 0.0, 'kl_estimator': 'k3', 'kl_in': 'loss', 'kl_importance_weighted': False,
  'entropy_coef': 0.0, 'dynamic_sampling': False, 'mask_truncated_completions': False, 'overlong_buffer': None,
}  # fmt: skip
TABLE = {
  'grpo': {},
  'r1': {'epsilon': 10.0, 'beta': 0.001},
  'dr_grpo': {'aggregation': 'fixed_length', 'scale_rewards': 'none'},
  'dapo': {'epsilon_high': 0.28, 'aggregation': 'token_mean', 'dynamic_sampling': True, 'overlong_buffer': 2},  # a fifth of LIMIT
  'gspo': {'importance_sampling_level': 'sequence', 'epsilon': 3e-4, 'epsilon_high': 4e-4},
  'cispo': {'surrogate': 'cispo', 'aggregation': 'token_mean'},
  'rloo': {'surrogate': 'reinforce', 'advantage_estimator': 'leave_one_out', 'aggregation': 'sequence_sum', 'scale_rewards': 'none',
           'beta': 0.05, 'kl_estimator': 'k1', 'kl_in': 'reward'},
  'reinforce_pp': {'advantage_estimator': 'reinforce_pp', 'aggregation': 'token_mean', 'beta': 0.01, 'kl_estimator': 'k1',
                   'kl_in': 'reward'},
}  # fmt: skip
TWICE = {'num_iterations': 2}


def make(name: str = 'grpo', **keys) -> Grpo:
  return OBJECTIVES[name](given=GIVEN, **{'num_generations': G, **keys})


@functools.cache
def make_rows(level: str = 'token') -> SimpleNamespace:
  """Six ragged groups of four, in float64. What a padding or prompt token holds would be seen in any mean.

  Groups: ordinary; the second function does not apply; all equal; a row without a verdict and one that crashed; one survivor; ordinary.
  """
  rng = np.random.default_rng(11)
  prompt, length = rng.integers(1, 3, N), rng.integers(2, LIMIT + 1, N)
  length[[0, 5, 10, 21]] = LIMIT
  place = np.arange(T)
  segment = place < (prompt + length)[:, None]
  mask = segment & (place >= prompt[:, None])
  rewards, has, failed = np.round(rng.random((N, 2)), 2), np.ones((N, 2)), np.zeros((N, 2))
  has[4:8, 1] = 0
  rewards[8:12] = 0.7, 1 / 3
  has[13, 0], has[14, 1], failed[14, 1] = 0, 0, 1
  has[17:20, 0] = 0
  rewards[has == 0] = 99.0
  # Distances to the old policy beyond every bound in use (0.8, 1.2, 1.28, 3, 5, 11), none near one. A sequence's mean is far smaller.
  step = rng.choice([0.1, -0.1, 0.6, -0.6, 1.3, 2.6], (N, T)) if level == 'token' else rng.choice([1e-4, -1e-4], (N, 1)) * 7
  step = step if level == 'token' else step * rng.choice([0.3, 1.0], (N, 1)) + 1e-5 * rng.normal(size=(N, T))
  logp = rng.normal(-2, 0.7, (N, T))
  old = logp - step

  def outside(x, value):
    return np.where(mask, x, value)

  return SimpleNamespace(
    segment=segment.astype(np.int32), mask=mask.astype(np.float64), rewards=rewards, has=has, failed=failed,
    truncated=(length == LIMIT).astype(np.float64), logp=outside(logp, -4.0), old=outside(old, -30.0),
    ref=outside(logp + rng.normal(0, 0.5, (N, T)), -1.0), sample=outside(old + rng.normal(0, 0.4, (N, T)), 5.0),
    entropy=outside(rng.uniform(0.5, 2.5, (N, T)), 99.0),
  )  # fmt: skip


def estimate(k: str, logp: float, ref: float) -> float:
  d = logp - ref
  return {'k1': d, 'k2': d**2 / 2, 'k3': math.exp(-d) + d - 1}[k]


def places(mask):
  return [(n, t) for n in range(N) for t in range(T) if mask[n, t] > 0]


def expected_advantages(k: dict, rows, old) -> tuple[np.ndarray, np.ndarray]:
  """(mask, advantage) [N, T] as objectives.md says, in loops."""
  groups = [range(start, start + G) for start in range(0, N, G)]
  reward, has, spread, applies = np.zeros(N), np.zeros(N, bool), np.zeros(N, bool), np.zeros((N, 2), bool)
  for group in groups:
    speaks = [f for f in range(2) if any(rows.has[n, f] or rows.failed[n, f] for n in group)]
    for n in group:
      applies[n, speaks] = True
      has[n] = bool(speaks) and all(rows.has[n, f] for f in speaks)
      reward[n] = sum(WEIGHTS[f] * rows.rewards[n, f] for f in speaks) if has[n] else 0
    spread[group] = len({reward[n] for n in group if has[n]}) > 1
  kept = has & ~(k['mask_truncated_completions'] & (rows.truncated > 0)) & (spread | (not k['dynamic_sampling']))
  mask = rows.mask * kept[:, None]
  penalty = np.zeros((N, T))
  if k['beta'] and k['kl_in'] == 'reward':
    for n, t in places(rows.mask):
      penalty[n, t] = k['beta'] * estimate(k['kl_estimator'], old[n, t], rows.ref[n, t])
  c = k['overlong_buffer']
  for n in range(N):
    y = rows.mask[n].sum()
    if c is not None:
      reward[n] += 0 if y <= LIMIT - c else (LIMIT - c - y) / c if y <= LIMIT else -1
    if k['advantage_estimator'] != 'reinforce_pp':
      reward[n] -= penalty[n].sum()
  alive = [n for n in range(N) if has[n]]
  A = np.zeros((N, T))
  if k['advantage_estimator'] == 'reinforce_pp':
    for group in groups:
      mean = np.mean([reward[n] for n in group if has[n]]) if has[group].any() else 0
      for n in group:
        for t in range(T):
          A[n, t] = reward[n] - mean * k['reinforce_pp_baseline'] - penalty[n, t:].sum()
    inside = A[mask > 0]
    return mask, mask * (A - inside.mean()) / (inside.std() + 1e-4)
  if k['multi_objective_aggregation'] == 'normalize_then_sum':
    for f in range(2):
      for group in groups:
        own = [n for n in group if has[n] and applies[n, f]]
        values = rows.rewards[own, f]
        if len(set(values)) > 1:
          A[own, 0] += WEIGHTS[f] * (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    return mask, mask * A[:, :1] / (A[alive, 0].std(ddof=1) + 1e-4)
  for group in groups:
    own = [n for n in group if has[n]]
    for n in own:
      if spread[n] and len(own) > 1:
        others = [m for m in own if m != n] if k['advantage_estimator'] == 'leave_one_out' else own
        std = {'group': reward[own].std(ddof=1) + 1e-4, 'batch': reward[alive].std(ddof=1) + 1e-4, 'none': 1.0}[
          k['scale_rewards']
        ]
        A[n] = (reward[n] - reward[others].mean()) / std
  return mask, mask * A


def expected_loss(k: dict, rows, mask, A, coef: float, logp, own, old, entropy) -> tuple[float, dict]:
  """(loss, what happened at its tokens). `own` are the log-probabilities in factors that have no gradient, `logp` those that have one."""
  M, alive = mask.sum(), sum(mask[n].any() for n in range(N))
  high = 1 + (k['epsilon'] if k['epsilon_high'] is None else k['epsilon_high'])
  low = 1 - k['epsilon']
  total, seen = 0.0, {'low': 0, 'high': 0, 'dual': 0, 'tis': 0, 'policy': 0.0}
  for n, t in places(mask):
    here = mask[n] > 0
    if k['importance_sampling_level'] == 'sequence':
      r = math.exp((own[n, here] - old[n, here]).mean()) * math.exp(logp[n, t] - own[n, t])
    else:
      r = math.exp(logp[n, t] - old[n, t])
    a = A[n, t]
    if k['surrogate'] == 'reinforce':
      loss = -a * logp[n, t]
    elif k['surrogate'] == 'cispo':
      loss = -min(math.exp(own[n, t] - old[n, t]), k['cispo_cap']) * a * logp[n, t]
      seen['high'] += r > k['cispo_cap']
    else:
      loss = -min(a * r, a * min(max(r, low), high))
      seen['low'] += a < 0 and r < low
      seen['high'] += a > 0 and r > high
      if k['delta'] is not None and a < 0:
        loss = min(loss, -k['delta'] * a)
        seen['dual'] += r > k['delta']
    if k['tis_cap'] is not None:
      drift = math.exp(old[n, t] - rows.sample[n, t])
      loss *= min(drift, k['tis_cap'])
      seen['tis'] += drift > k['tis_cap']
    share = {'token_mean': 1 / M, 'sequence_mean': 1 / (alive * here.sum()), 'sequence_sum': 1 / alive,
             'fixed_length': 1 / (alive * LIMIT)}[k['aggregation']]  # fmt: skip
    seen['policy'] += share * loss
    if k['beta'] and k['kl_in'] == 'loss':
      kl = estimate(k['kl_estimator'], logp[n, t], rows.ref[n, t])
      if k['kl_importance_weighted']:
        kl *= math.exp((logp if k['kl_estimator'] == 'k3' else own)[n, t] - old[n, t])
      loss += k['beta'] * kl
    total += share * (loss - coef * entropy[n, t])
  return total, seen


CASES = {name: {'name': name} for name in TABLE}
CASES |= {f'{name}, two updates': {'name': name, **TWICE} for name in TABLE if name != 'rloo'}
CASES |= {f'grpo {a}': {'aggregation': a, **TWICE} for a in AGGREGATIONS} | {
  f'rloo {a}': {'name': 'rloo', 'aggregation': a} for a in AGGREGATIONS
}
CASES |= {f'grpo {s}': {'scale_rewards': s, 'num_minibatches': 2} for s in SCALES}
CASES |= {f'leave one out {s}': {'scale_rewards': s, 'advantage_estimator': 'leave_one_out', **TWICE} for s in SCALES}
CASES |= {
  f'{k}{weighted} {updates}': {'beta': 0.3, 'kl_estimator': k, 'num_iterations': updates, 'kl_importance_weighted': bool(weighted)}
  for k in ('k2', 'k3') for weighted in ('', ' weighted') for updates in (1, 2)
}  # fmt: skip
CASES |= {f'{k} in the reward': {'beta': 0.3, 'kl_estimator': k, 'kl_in': 'reward', **TWICE} for k in ('k1', 'k2', 'k3')}
CASES |= {f'reinforce_pp {k}': {'name': 'reinforce_pp', 'beta': 0.3, 'kl_estimator': k, **TWICE} for k in ('k1', 'k2', 'k3')}
CASES |= {
  'dual clip': {'delta': 3.0, **TWICE},
  'dapo dual clip': {'name': 'dapo', 'delta': 3.0, **TWICE},
  'tis': {'tis_cap': 1.1},
  'tis, two updates': {'tis_cap': 1.1, 'beta': 0.3, **TWICE},
  'cispo tis': {'name': 'cispo', 'tis_cap': 1.1, **TWICE},
  'rloo tis': {'name': 'rloo', 'tis_cap': 1.1},
  'cispo low cap': {'name': 'cispo', 'cispo_cap': 0.5},
  'gspo weighted kl': {'name': 'gspo', 'beta': 0.3, 'kl_importance_weighted': True, **TWICE},
  'reinforce_pp_baseline': {'name': 'reinforce_pp', 'reinforce_pp_baseline': True, **TWICE},
  'reinforce_pp, kl in the loss': {'name': 'reinforce_pp', 'kl_in': 'loss', 'kl_estimator': 'k2', 'beta': 0.3},
  'reinforce_pp, overlong': {'name': 'reinforce_pp', 'reinforce_pp_baseline': True, 'overlong_buffer': 4},
  'entropy': {'entropy_coef': 0.02, **TWICE},
  'entropy of tokens': {'entropy_coef': 0.02, 'name': 'dapo'},
  'overlong': {'overlong_buffer': 4, 'scale_rewards': 'batch'},
  'overlong from the first token': {'overlong_buffer': LIMIT, **TWICE},
  'overlong filter': {'mask_truncated_completions': True, **TWICE},
  'overlong filter of tokens': {'name': 'reinforce_pp', 'mask_truncated_completions': True},
  'dynamic sampling': {'dynamic_sampling': True},
  'dynamic sampling of reinforce_pp': {'name': 'reinforce_pp', 'dynamic_sampling': True},
  'gdpo': {'multi_objective_aggregation': 'normalize_then_sum', **TWICE},
  'gdpo with a filter': {'multi_objective_aggregation': 'normalize_then_sum', 'mask_truncated_completions': True, 'dynamic_sampling': True},
  'much at once': {
    'name': 'dapo', 'delta': 3.0, 'tis_cap': 1.1, 'beta': 0.3, 'kl_importance_weighted': True, 'entropy_coef': 0.02,
    'mask_truncated_completions': True, 'overlong_buffer': 4, 'scale_rewards': 'batch', 'num_iterations': 2, 'num_minibatches': 2,
  },
}  # fmt: skip


def to_batch(rows, old) -> Batch:
  return Batch(
    tokens=np.zeros((N, T), np.int32), segment_NT=rows.segment, position_NT=np.tile(np.arange(T, dtype=np.int32), (N, 1)),
    mask_NT=rows.mask, source_N=np.zeros(N, np.int32), group_N=np.arange(N, dtype=np.int32) // G, logp_sample_NT=rows.sample,
    logp_old_NT=old, logp_ref_NT=rows.ref, rewards_NR=rows.rewards, has_reward_NR=rows.has, failed_NR=rows.failed,
    truncated_N=rows.truncated,
  )  # fmt: skip


def table_net(params, rows, entropy=False, entropy_gradient=False):
  """A network whose log-probabilities and entropies are its parameters."""
  spread = params['entropy'] if entropy_gradient else jax.lax.stop_gradient(params['entropy'])
  return params['logp'], spread if entropy else None


NETS = {role: SimpleNamespace(logp=table_net) for role in ('policy', 'ref')}


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient(case):
  """Failure: advantages, loss, metrics or gradient are not those of objectives.md; the gradient is taken by finite differences of the
  loops, in which the factors that are to have none stand still."""
  keys = CASES[case]
  k = {**DEFAULTS, **TABLE[keys.get('name', 'grpo')], **keys}
  rows, one_update = make_rows(k['importance_sampling_level']), k['num_iterations'] * k['num_minibatches'] == 1
  old = rows.logp if one_update else rows.old
  coef = k['entropy_coef']
  with jax.enable_x64(True):
    objective = make(**keys)
    scored = None if one_update and not objective.kl_in_reward else old
    batch, aux, first = objective.prepare(objective.init_aux(), to_batch(rows, scored))
    weight = weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, LIMIT)
    batch = batch.replace(weight_NT=weight)
    params = {'logp': jnp.asarray(rows.logp), 'entropy': jnp.asarray(rows.entropy)}
    loss = functools.partial(objective.loss, NETS, frozen={}, aux=aux, batch=batch)
    (value, more), grad = jax.value_and_grad(lambda p: loss({'policy': p}), has_aux=True)(params)
    value, grad = jax.device_get((value, grad))
  mask, A = expected_advantages(k, rows, old)
  np.testing.assert_array_equal(batch.mask_NT, mask)
  np.testing.assert_allclose(batch.advantage_NT, A, rtol=1e-7, atol=1e-9)

  def reference(logp, entropy):
    return expected_loss(k, rows, mask, A, coef, logp, rows.logp, old, entropy)

  wanted, seen = reference(rows.logp, rows.entropy)
  assert value == pytest.approx(wanted, rel=1e-7, abs=1e-10)
  rng, eps = np.random.default_rng(0), 1e-5
  for _ in range(3):
    x, y = rng.normal(size=(2, N, T))
    slope = (
      reference(rows.logp + eps * x, rows.entropy + eps * y)[0] - reference(rows.logp - eps * x, rows.entropy - eps * y)[0]
    ) / (2 * eps)
    assert np.sum(grad['logp'] * x) + np.sum(grad['entropy'] * y) == pytest.approx(slope, rel=1e-5, abs=1e-9)
  assert np.all(grad['logp'][mask == 0] == 0) and np.any(grad['logp'] != 0) and np.any(grad['entropy'] != 0) == (coef > 0)
  inside, M = mask > 0, mask.sum()
  gap = np.abs(old - rows.sample)[inside]
  means = {
    'policy_loss': seen['policy'], 'entropy': rows.entropy[inside].mean(), 'clip_ratio/low_mean': seen['low'] / M,
    'clip_ratio/high_mean': seen['high'] / M, 'clip_ratio/region_mean': (seen['low'] + seen['high']) / M,
    'sampling/logp_difference/mean': gap.mean(), 'sampling/logp_difference/max': gap.max(),
  }  # fmt: skip
  if k['delta'] is not None:
    means['clip_ratio/dual_mean'] = seen['dual'] / M
  if k['tis_cap'] is not None:
    means['sampling/tis_capped_ratio'] = seen['tis'] / M
    assert 0 < seen['tis'] < M
  if k['beta'] and k['kl_in'] == 'loss':
    means['kl'] = np.mean([estimate('k3', rows.logp[p], rows.ref[p]) for p in places(mask)])
  if coef:
    means['entropy_coef'] = coef
  assert metrics.summarise(more) == pytest.approx(means, rel=1e-6, abs=1e-9)
  if k['beta'] and k['kl_in'] == 'reward':
    sampled = np.mean([estimate('k3', old[p], rows.ref[p]) for p in places(rows.mask)])
    assert metrics.summarise(first)['kl'] == pytest.approx(sampled, rel=1e-6)
  if one_update:
    assert k['surrogate'] == 'cispo' or seen['low'] == seen['high'] == 0
  elif k['surrogate'] == 'clip':  # else the case has seen no clip
    assert seen['high'] > 0 and (seen['low'] > 0) == (k['epsilon'] < 1) and (k['delta'] is None or seen['dual'] > 0)


def test_every_setting_is_tried():
  """Failure: a new setting or key of the family stands in no golden case."""
  assert set(TABLE) == set(SETTINGS) and set(SETTINGS) <= set(OBJECTIVES)
  elsewhere = {'given', 'num_generations', 'max_refills', 'ref_model_sync_updates', 'ref_model_ema', 'entropy_target', 'entropy_coef_step',
               'entropy_coef_max'}  # fmt: skip
  tried = {key for case in CASES.values() for key in case} | {key for settings in TABLE.values() for key in settings}
  assert tried == {f.name for f in dataclasses.fields(Grpo)} - elsewhere


def softmax_net(tokens):
  """A policy of one token a row: `params` are its logits."""

  def logp(params, rows, entropy=False, entropy_gradient=False):
    value = jnp.stack([jnp.zeros(len(tokens)), jax.nn.log_softmax(params)[tokens]], axis=1)
    return value, jnp.zeros_like(value) if entropy else None

  return {'policy': SimpleNamespace(logp=logp)}


@pytest.mark.parametrize('updates', [1, 2])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('estimator', ['k2', 'k3'])
def test_kl_gradient_of_a_whole_policy(estimator, weighted, updates):
  """Failure: over all tokens of a categorical policy, each with the probability that the sampler drew it, the KL in the loss has another
  gradient than objectives.md says: on-policy and unweighted k2 that of KL(policy||ref) and k3 that of KL(ref||policy); importance-weighted
  both that of KL(policy||ref), after an update too, where without the weight neither is right."""
  V, rng = 7, np.random.default_rng(0)
  with jax.enable_x64(True):
    theta, old, ref = (jnp.asarray(rng.normal(size=V)) for _ in range(3))
    old, ref = jax.nn.log_softmax(theta if updates == 1 else old), jax.nn.log_softmax(ref)
    zero, mask = np.zeros((V, 2)), np.tile([0.0, 1.0], (V, 1))

    def column(x):
      return jnp.stack([jnp.zeros(V), x], axis=1)

    batch = Batch(
      tokens=None, segment_NT=np.ones((V, 2), np.int32), position_NT=None, mask_NT=mask, source_N=None, group_N=None, logp_sample_NT=zero,
      logp_old_NT=None if updates == 1 else column(old), logp_ref_NT=column(ref), advantage_NT=zero, weight_NT=column(jnp.exp(old)),
    )  # fmt: skip
    objective = make(beta=1.0, kl_estimator=estimator, kl_importance_weighted=weighted, num_iterations=updates)
    nets = softmax_net(np.arange(V))
    got = jax.grad(lambda p: objective.loss(nets, {'policy': p}, {}, {}, batch)[0])(theta)

    def kl(p, q):
      return jnp.sum(jnp.exp(p) * (p - q))

    forward = jax.grad(lambda p: kl(jax.nn.log_softmax(p), ref))(theta)
    backward = jax.grad(lambda p: kl(ref, jax.nn.log_softmax(p)))(theta)
    if updates == 2 and not weighted:
      assert np.abs(got - forward).max() > 0.05 and np.abs(got - backward).max() > 0.05
    else:
      np.testing.assert_allclose(got, forward if weighted or estimator == 'k2' else backward, atol=1e-12)


@pytest.mark.parametrize('extreme', [-1e4, 1e4])
@pytest.mark.parametrize('name', TABLE)
def test_extreme_values_outside_the_mask(name, extreme):
  """Failure: 0 * inf of a token that is not trained makes advantages, loss, gradient or a metric NaN (OpenRLHF#1240)."""
  objective = make(name, **{'tis_cap': 2.0, 'beta': 0.1, **({} if name == 'rloo' else TWICE)})
  rows = make_rows(objective.importance_sampling_level)

  def everything(fill):
    old, ref, sample = (
      np.where(rows.mask > 0, x, sign * fill).astype(np.float32)
      for x, sign in ((rows.logp if name == 'rloo' else rows.old, 1), (rows.ref, -1), (rows.sample, 1))
    )
    batch, _, first = objective.prepare({}, to_batch(rows, old).replace(logp_ref_NT=ref, logp_sample_NT=sample))
    batch = batch.replace(weight_NT=batch.mask_NT / 100)
    params = {'logp': np.float32(rows.logp), 'entropy': np.float32(rows.entropy)}
    got = jax.value_and_grad(lambda p: objective.loss(NETS, {'policy': p}, {}, {}, batch), has_aux=True)(params)
    return batch.advantage_NT, first, got

  results = everything(0.0), everything(extreme)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results[1]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), results[1], results[0])


def batch_of(rewards, has=None, failed=None, truncated=None, lengths=(4, 2, 3, 1)) -> Batch:
  rows, time = len(rewards), 6
  mask = (np.arange(time) >= 1) & (np.arange(time) < 1 + np.asarray(lengths)[:, None])
  rewards = np.asarray(rewards, np.float32)
  return Batch(
    tokens=np.zeros((rows, time), np.int32), segment_NT=np.ones((rows, time), np.int32),
    position_NT=np.tile(np.arange(time), (rows, 1)), mask_NT=mask.astype(np.float32), source_N=np.zeros(rows, np.int32),
    group_N=np.arange(rows) // 2, rewards_NR=rewards, has_reward_NR=np.ones_like(rewards) if has is None else np.asarray(has, np.float32),
    failed_NR=np.zeros_like(rewards) if failed is None else np.asarray(failed, np.float32),
    truncated_N=np.asarray(truncated or [0] * rows, np.float32),
  )  # fmt: skip


def pairs(**keys) -> Grpo:
  return Grpo(Given(('a',), (2.0,), 5), num_generations=2, **keys)


def test_rows_without_verdict():
  """Failure: a row without a verdict still counts in N and M, or still has an advantage."""
  batch, _, got = pairs().prepare({}, batch_of([[1], [0], [1], [7]], [[1], [1], [1], [0]]))
  np.testing.assert_array_equal(batch.mask_NT.sum(axis=1), [4, 2, 3, 0])
  one = 1 / (np.sqrt(2) + 1e-4)
  np.testing.assert_allclose(batch.advantage_NT[:, 1], [one, -one, 0, 0], rtol=1e-6)
  assert np.all(np.asarray(batch.advantage_NT)[np.asarray(batch.mask_NT) == 0] == 0)
  m = metrics.summarise(got)
  assert m['rewards/a/no_verdict'] == 0.25 and m['rewards/a/not_applicable'] == 0
  assert m['reward'] == pytest.approx(4 / 3) and m['frac_no_verdict'] == 0.25 and m['frac_reward_zero_std'] == 0.5
  assert m['rewards/a/mean'] == pytest.approx(2 / 3) and m['rewards/a/std'] == pytest.approx(np.std([1, 0, 1], ddof=1))


def test_not_applicable_is_no_missing_verdict():
  """Failure: None for a whole group by design takes its rows out, a crash on a whole group does not, or both are counted as one."""
  objective = Grpo(Given(('a', 'b'), (1.0, 1.0), 5), num_generations=2)
  rewards, has = [[1, 5], [0, 5], [1, 5], [0, 5]], [[1, 0], [1, 0], [1, 0], [1, 0]]
  batch, _, got = objective.prepare({}, batch_of(rewards, has, failed=[[0, 0], [0, 0], [0, 1], [0, 1]]))
  one = 0.5 / (np.sqrt(0.5) + 1e-4)
  np.testing.assert_allclose(batch.advantage_NT[:, 1], [one, -one, 0, 0], rtol=1e-6)
  np.testing.assert_array_equal(batch.has_reward_N, [1, 1, 0, 0])
  m = metrics.summarise(got)
  assert (m['rewards/b/not_applicable'], m['rewards/b/no_verdict'], m['frac_no_verdict']) == (0.5, 0.5, 0.5)
  assert 'rewards/b/mean' not in m and m['rewards/a/mean'] == 0.5


def test_truncated_completions_are_masked():
  """Failure: the overlong filter changes rewards or metrics, or leaves cut completions in the loss."""
  rows = batch_of([[1], [0], [1], [0]], truncated=[1, 0, 0, 0])
  kept, _, all_metrics = pairs().prepare({}, rows)
  batch, _, got = pairs(mask_truncated_completions=True).prepare({}, rows)
  np.testing.assert_array_equal(batch.mask_NT.sum(axis=1), [0, 2, 3, 1])
  np.testing.assert_array_equal(kept.mask_NT.sum(axis=1), [4, 2, 3, 1])
  np.testing.assert_array_equal(np.asarray(batch.advantage_NT)[1:], np.asarray(kept.advantage_NT)[1:])  # same baseline
  m = metrics.summarise(got)
  assert m == metrics.summarise(all_metrics)
  assert (m['completions/min_length'], m['completions/max_length'], m['completions/mean_length']) == (1, 4, 2.5)
  assert m['completions/mean_terminated_length'] == 2 and m['completions/clipped_ratio'] == 0.25
  assert m['reward'] == 1 and m['reward_std'] == pytest.approx(np.sqrt(2))


def test_groups_without_spread_are_masked():
  """Failure: groups that the last refill left without spread count in M and N, or a penalty (overlong) makes one worth keeping."""
  rows = batch_of([[1], [1], [1], [0]], lengths=(5, 2, 5, 2))
  for keys in ({}, {'overlong_buffer': 3}):
    batch, _, got = pairs(dynamic_sampling=True, **keys).prepare({}, rows)
    np.testing.assert_array_equal(batch.mask_NT.sum(axis=1), [0, 0, 5, 2])
    assert np.all(np.asarray(batch.advantage_NT)[:2] == 0) and np.all(np.asarray(batch.advantage_NT)[2:, 1] != 0)
    m = metrics.summarise(got)
    assert m['frac_reward_zero_std'] == 0.5 and m['reward'] == 1.5 and m['completions/mean_length'] == 3.5
    assert m.get('overlong_penalty') == (-0.5 if keys else None)


CONSTANT = [name for name in TABLE if name != 'reinforce_pp']


@pytest.mark.parametrize('value', [0.7, 1 / 3, -2.0, 1e6])
@pytest.mark.parametrize('name', [*CONSTANT, 'gdpo', 'batch'])
def test_equal_rewards_move_nothing(name, value):
  """Failure: a group whose completions earned the same has an advantage: from rounding, or from its lengths or its KL alone."""
  keys = {
    'gdpo': {'multi_objective_aggregation': 'normalize_then_sum'},
    'batch': {'scale_rewards': 'batch', 'overlong_buffer': 3},
  }
  setting = SETTINGS.get(name, keys.get(name)) | {'dynamic_sampling': False}
  objective = Grpo(Given(('a', 'b'), (0.3, 1.0), 5), num_generations=7, **setting)
  rewards = np.full((14, 2), value)
  rewards[7:, 0] = np.arange(7)  # the other group is an ordinary one
  batch = batch_of(rewards, lengths=[5, 4, 3, 2, 1, 5, 4] * 2)
  noise = np.random.default_rng(0).normal(size=(2, *batch.mask_NT.shape)).astype(np.float32)
  batch, _, _ = objective.prepare({}, batch.replace(logp_old_NT=noise[0], logp_ref_NT=noise[1]))
  assert np.all(np.asarray(batch.advantage_NT)[:7] == 0) and np.any(np.asarray(batch.advantage_NT)[7:] != 0)
  assert np.all(np.asarray(batch.mask_NT).sum(axis=1) > 0)  # they still count in the denominators


def test_entropy_controller():
  """Failure: the coefficient moves away from the target, by another step, beyond its bounds, or the loss reads the config's number."""
  objective = make(entropy_target=1.5, entropy_coef=0.01, entropy_coef_step=0.004, entropy_coef_max=0.015)
  aux = objective.init_aux()
  np.testing.assert_allclose(aux['entropy_coef'], 0.01)
  seen = []
  for entropy in (1.0, 1.0, 1.4, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0):
    aux = objective.adapt(aux, {'entropy': Mean(8 * entropy, 8.0)})
    assert aux['entropy_coef'].dtype == jnp.float32
    seen.append(float(aux['entropy_coef']))
  np.testing.assert_allclose(seen, [0.014, 0.015, 0.015, 0.011, 0.007, 0.003, 0, 0, 0.004], atol=1e-8)
  rows = make_rows()
  batch, _, _ = objective.prepare(aux, to_batch(rows, None))
  params = {'logp': jnp.float32(rows.logp), 'entropy': jnp.float32(rows.entropy)}
  batch = batch.replace(weight_NT=batch.mask_NT)
  slope = jax.grad(lambda p: objective.loss(NETS, {'policy': p}, {}, aux, batch)[0])(params)['entropy']
  np.testing.assert_allclose(slope, -0.004 * batch.mask_NT, atol=1e-8)
  fixed = make(entropy_coef=0.01)
  assert fixed.init_aux() == {} and fixed.adapt({}, {'entropy': Mean(1.0, 1.0)}) == {}


def test_score_reads_what_is_needed():
  """Failure: a pass over the rows is spent on what nobody reads, or the old policy or the reference is missing where it is read."""
  rows = make_rows()
  params, ref = ({'logp': jnp.float32(x), 'entropy': jnp.zeros((N, T))} for x in (rows.logp, rows.ref))
  bare = to_batch(rows, None).replace(logp_ref_NT=None)
  for keys, old, reference in (
    ({}, False, False), (TWICE, True, False), ({'num_minibatches': 2}, True, False), ({'beta': 0.1}, False, True),
    ({'name': 'rloo'}, True, True), ({'name': 'rloo', 'beta': 0.0}, False, False), ({'name': 'reinforce_pp'}, True, True),
    ({'beta': 0.1, 'ref_model_ema': 0.9, **TWICE}, True, True), ({'tis_cap': 2.0}, False, False),
  ):  # fmt: skip
    objective = make(**keys)
    got = objective.score(NETS, {'policy': params}, {'ref': ref}, bare)
    assert (got.logp_old_NT is not None, got.logp_ref_NT is not None) == (old, reference), keys
    assert not old or np.array_equal(got.logp_old_NT, params['logp'])
    assert not reference or np.array_equal(got.logp_ref_NT, ref['logp'])
    assert (('ref' in objective.frozen) ^ ('ref' in objective.moving)) == reference
    assert ('ref' in objective.moving) == ('ref_model_ema' in keys)


# Config.

REFUSALS = [
  ({'beta': 0.1, 'kl_estimator': 'k1'}, 'kl_estimator', 'zero expected gradient'),
  ({'name': 'rloo', 'kl_in': 'loss'}, 'kl_estimator', 'zero expected gradient'),
  ({'name': 'rloo', **TWICE}, 'num_iterations', 'one update'),
  ({'name': 'rloo', 'num_minibatches': 2}, 'num_minibatches', 'one update'),
  ({'num_generations': 1}, 'num_generations', 'a group of one has no baseline'),
  ({'delta': 1.1}, 'delta', 'above 1 + epsilon_high = 1.2'),
  ({'delta': 1.28, 'name': 'dapo'}, 'delta', 'above 1 + epsilon_high = 1.28'),
  ({'ref_model_ema': 1.0}, 'ref_model_ema', 'not in (0, 1)'),
  ({'ref_model_ema': 0.0}, 'ref_model_ema', 'not in (0, 1)'),
  ({'entropy_target': 1.0, 'entropy_coef': 0.06}, 'entropy_coef', 'above entropy_coef_max'),
  ({'overlong_buffer': 11}, 'overlong_buffer', 'rollout.max_completion_length 10'),
  ({'multi_objective_aggregation': 'normalize_then_sum', 'overlong_buffer': 3}, 'multi_objective_aggregation', 'overlong'),
  ({'multi_objective_aggregation': 'normalize_then_sum', 'beta': 0.1, 'kl_in': 'reward'}, 'multi_objective_aggregation', 'KL'),
  ({'multi_objective_aggregation': 'normalize_then_sum', 'name': 'rloo', 'beta': 0.0}, 'multi_objective_aggregation', 'group'),
  ({'multi_objective_aggregation': 'normalize_then_sum', 'name': 'reinforce_pp'}, 'multi_objective_aggregation', 'group'),
]  # fmt: skip
REFUSALS += [({key: 'no such'}, key, "'no such' is none of ") for key, value in DEFAULTS.items() if isinstance(value, str)]
REFUSALS += [
  ({f.name: -1}, f.name, '')
  for f in dataclasses.fields(Grpo)
  if re.match('(int|float)', str(f.type)) and 'bool' not in str(f.type)
]


@pytest.mark.parametrize('keys, key, why', REFUSALS, ids=str)
def test_refusals(keys, key, why):
  """Failure: a setting that has no meaning trains something else without a word, or the key is not named."""
  with pytest.raises(ValueError, match=re.escape(f"config key 'objective.{key}'")) as caught:
    make(**keys)
  assert why in str(caught.value)


def test_refusals_leave_good_settings_alone():
  """Failure: a bound is refused that is within the range."""
  for keys in ({'epsilon': 1e-6}, {'delta': 1.2001}, {'overlong_buffer': LIMIT}, {'entropy_target': 0.0}, {'ref_model_ema': 0.999},
               {'kl_estimator': 'k1'}, {'entropy_coef': 0.06}, {'entropy_coef': 0.05, 'entropy_target': 1.0}, {'max_refills': 1},
               {'num_generations': 2}, {'name': 'rloo', 'num_iterations': 1}):  # fmt: skip
    make(**keys)


def test_overlong_twice():
  """Failure: the penalty counts twice where the reward function of that name is in use, or dapo cannot do without its own."""
  given = Given(('a', 'overlong'), WEIGHTS, LIMIT)
  with pytest.raises(ConfigError, match=r"'objective\.overlong_buffer': the reward function 'overlong' is set too"):
    from_mapping(Grpo, SETTINGS['dapo'], 'objective.', given=given)
  assert from_mapping(Grpo, {**SETTINGS['dapo'], 'overlong_buffer': None}, 'objective.', given=given).overlong_buffer is None
  assert make('dapo').overlong_buffer == 2 and OBJECTIVES['dapo'](given=Given(('a',), (1.0,), 3)).overlong_buffer == 1


WORDS = {
  'grpo': ['clip interval of r: [0.8, 1.2]', 'N times the tokens of the own completion', 'KL: none', 'std of the group + 1e-4'],
  'r1': ['[0 (the lower bound never acts', '11]', 'N times the tokens of the own completion',
         'KL: 0.001 k3(policy, reference) in the loss'],
  'dr_grpo': ['[0.8, 1.2]', 'N times rollout.max_completion_length = 10', 'KL: none', '(R - mean of the group) / (1)'],
  'dapo': ['[0.8, 1.28]', 'M, the masked tokens of the update', 'KL: none', 'overlong (0 up to 8 tokens, falling to -1 at 10)',
           'at most 4 refills a step'],
  'gspo': ['[0.9997, 1.0004]', 'N times the tokens of the own completion', 'KL: none', 'exp(mean over the completion of logp - logp_old)'],
  'cispo': ['-stop_grad(min(r, 5)) A logp; no clip', 'M, the masked tokens of the update', 'KL: none'],
  'rloo': ['-A logp; no ratio, no clip', 'N, the completions of the update', 'mean of the others of the group',
           'R = 1 a + 0.5 b - 0.05 sum of k1 over the completion', 'KL: 0.05 k1(policy, reference) in the reward'],
  'reinforce_pp': ['[0.8, 1.2]', 'M, the masked tokens of the update', 'KL: 0.01 k1(policy, reference) in the reward',
                   'whiten over the tokens of the step (R - 0.01 sum over s >= t of k1_s)'],
}  # fmt: skip


@pytest.mark.parametrize('name', TABLE)
def test_formula(name):
  """Failure: --explain names another clip interval, denominator, place or estimator of the KL than the loss has."""
  one = '\n'.join(make(name).formula())
  several = one if name == 'rloo' else '\n'.join(make(name, **TWICE).formula())
  for word in WORDS[name]:
    assert word in several
  assert 'nothing is ever clipped' in one and (several is one or 'nothing is ever clipped' not in several)
  assert one.count('(') == one.count(')') and several.count('(') == several.count(')')


def test_formula_of_options():
  """Failure: an option that changes the loss is not told."""
  for keys, words in (
    ({'delta': 3.0, **TWICE}, ['at most -3 A where A < 0']),
    ({'tis_cap': 2.0}, ['stop_grad(min(exp(logp_old - logp_sample), 2))']),
    ({'beta': 0.1, 'kl_importance_weighted': True, 'ref_model_sync_updates': 400},
     ['importance-weighted', 'moves after a step in which the updates reach or cross a multiple of 400']),
    ({'beta': 0.1, 'ref_model_ema': 0.75}, ['moves every step to 0.75 reference + 0.25 policy']),
    ({'beta': 0.1}, ['reference frozen']),
    ({'entropy_coef': 0.01}, ['entropy: bonus 0.01']),
    ({'entropy_target': 1.5}, ['bonus from 0, by 0.001 a step within [0, 0.05] towards 1.5 nats']),
    ({'mask_truncated_completions': True}, ['truncated completions: not trained']),
    ({'scale_rewards': 'batch'}, ['std of the step + 1e-4']),
    ({'multi_objective_aggregation': 'normalize_then_sum'}, ['each reward normalised in its group']),
    ({'name': 'reinforce_pp', 'beta': 0.0, 'reinforce_pp_baseline': True}, ['(R - mean of the group)']),
  ):  # fmt: skip
    text = '\n'.join(make(**keys).formula())
    assert all(word in text for word in words), text
    assert text.count('(') == text.count(')') and text.count('[') == text.count(']')


@pytest.mark.parametrize('name', TABLE)
def test_inert(name):
  """Failure: a key that cannot act is not told, or one that acts is called inert."""
  one = make(name).inert()
  several = one if name == 'rloo' else make(name, **TWICE).inert()
  ratio = {'epsilon', 'epsilon_high', 'delta', 'importance_sampling_level', 'cispo_cap'}
  assert ratio <= one.keys()
  acts = {'cispo': {'importance_sampling_level', 'cispo_cap'}, 'rloo': set()}.get(name, ratio - {'cispo_cap'})
  assert ratio - several.keys() == acts
  assert 'cispo_cap' not in make('cispo', cispo_cap=0.5).inert()
  kl = {'kl_estimator', 'kl_in', 'ref_model_sync_updates', 'ref_model_ema'}
  assert kl & one.keys() == (set() if TABLE[name].get('beta') else kl)
  assert ('kl_importance_weighted' in one) == (name != 'r1')
  if name == 'r1':  # k3 is weighed with the ratio's gradient, k2 by its value alone
    assert 'kl_importance_weighted' in make(name, kl_estimator='k2').inert()
    assert 'kl_importance_weighted' not in make(name, kl_estimator='k2', **TWICE).inert()
  assert ('max_refills' in one) == (name != 'dapo') and ('reinforce_pp_baseline' in one) == (name != 'reinforce_pp')
  assert ('scale_rewards' in one) == (name == 'reinforce_pp')
  assert {'entropy_coef_step', 'entropy_coef_max'} <= one.keys() - make(name, entropy_target=1.0).inert().keys()


# Learning: a policy that is a table of logits [C, V], token 0 ends, and a completion earns its share of the token 3.

C, V, ROWS = 5, 8, 32


def bandit_logp(params, rows, entropy=False, entropy_gradient=False):
  every = jnp.broadcast_to(jax.nn.log_softmax(params), (*rows.tokens.shape[:1], C, V))
  logp = jnp.take_along_axis(every, rows.tokens[:, 1:, None], axis=-1)[..., 0]
  spread = -jnp.sum(jnp.exp(every) * every, axis=-1)
  logp, spread = (jnp.pad(x, ((0, 0), (1, 0))) for x in (logp, spread))
  return logp, (spread if entropy_gradient else jax.lax.stop_gradient(spread)) if entropy else None


@jax.jit
def bandit_rows(params, key) -> Batch:
  every = jnp.broadcast_to(jax.nn.log_softmax(params), (ROWS, C, V))
  drawn = jax.random.categorical(key, every)
  inside = jnp.cumsum(drawn == 0, axis=1) - (drawn == 0) == 0  # up to the first end, it included
  tokens = jnp.pad(jnp.where(inside, drawn, 0), ((0, 0), (1, 0)))
  mask, segment = (jnp.pad(inside, ((0, 0), (1, 0)), constant_values=value) for value in (False, True))
  reward = jnp.sum((drawn == 3) & inside, axis=1) / inside.sum(axis=1)
  ones = jnp.ones((ROWS, 1))
  return Batch(
    tokens=tokens, segment_NT=segment.astype(jnp.int32), position_NT=jnp.tile(jnp.arange(1 + C), (ROWS, 1)),
    mask_NT=mask.astype(jnp.float32), source_N=jnp.zeros(ROWS, jnp.int32), group_N=jnp.arange(ROWS) // 8,
    logp_sample_NT=jnp.pad(jnp.take_along_axis(every, drawn[..., None], axis=-1)[..., 0], ((0, 0), (1, 0))),
    rewards_NR=reward[:, None], has_reward_NR=ones, failed_NR=0 * ones, truncated_N=1.0 - jnp.any((drawn == 0) & inside, axis=1),
  )  # fmt: skip


def learn(objective, total_steps: int) -> tuple[list[float], dict]:
  """(mean reward of every step, the last step's metrics), by the jitted steps that a run takes."""
  optimizer, nets = optax.adam(0.1), {role: SimpleNamespace(logp=bandit_logp) for role in ('policy', 'ref')}
  steps, start = make_steps(objective, nets, {'policy': optimizer}, lambda _: 0.1, 0, C), jnp.zeros((C, V))
  state = TrainState(
    step=0, cursor={}, updates=jnp.int32(0), params={'policy': jnp.zeros((C, V))}, opt={'policy': optimizer.init(start)},
    aux=objective.init_aux(), moving={}, frozen={'ref': start},
  )  # fmt: skip
  rewards, gathered = [], {}
  for step in range(total_steps):
    key = jax.random.key(step)
    batch = bandit_rows(state.params['policy'], key)
    batch, aux, gathered = steps.prepare(state, steps.score(state, batch))
    for rows in steps.minibatches(batch, key):
      state, more = steps.update(state.replace(aux=aux), rows)
      gathered = metrics.merge(gathered, more)
    state = state.replace(aux=objective.adapt(state.aux, gathered))
    gathered = metrics.summarise(gathered)
    rewards.append(gathered['reward'])
  return rewards, gathered


BANDIT = Given(('share',), (1.0,), C)
LEARNING = {name: {'name': name} for name in TABLE}
LEARNING |= {
  f'{name}, four updates': {'name': name, 'num_iterations': 2, 'num_minibatches': 2} for name in TABLE if name != 'rloo'
}
LEARNING |= {
  'gdpo': {'multi_objective_aggregation': 'normalize_then_sum'},
  'reinforce_pp_baseline': {'name': 'reinforce_pp', 'reinforce_pp_baseline': True},
}


@pytest.mark.parametrize('case', LEARNING)
def test_learns(case):
  """Failure: a setting does not climb a reward that any policy gradient climbs; with a wrong sign it falls to 0."""
  keys = dict(LEARNING[case])
  rewards, _ = learn(OBJECTIVES[keys.pop('name', 'grpo')](given=BANDIT, num_generations=8, **keys), 30)
  assert np.mean(rewards[:2]) < 0.2 and np.mean(rewards[-5:]) > 0.38, rewards  # dapo's overlong penalty makes it end early


def test_entropy_bonus_holds_entropy_up():
  """Failure: the bonus lowers the entropy, or the controller does not reach its target."""
  _, free = learn(OBJECTIVES['grpo'](given=BANDIT, num_generations=8), 30)
  _, fixed = learn(OBJECTIVES['grpo'](given=BANDIT, num_generations=8, entropy_coef=0.5), 30)
  keys = {'entropy_target': 1.8, 'entropy_coef_step': 0.05, 'entropy_coef_max': 1.0}
  _, held = learn(OBJECTIVES['grpo'](given=BANDIT, num_generations=8, **keys), 60)
  assert free['entropy'] < 1.0 < fixed['entropy'] and 0 < held['entropy_coef'] < 1
  assert held['entropy'] == pytest.approx(1.8, abs=0.3)


def test_kl_holds_the_policy_back():
  """Failure: a KL pushes away from the reference, in the loss or in the reward."""
  free = learn(OBJECTIVES['grpo'](given=BANDIT, num_generations=8, beta=1e-6), 30)[1]['kl']
  for keys in (
    {'beta': 1.0},
    {'beta': 1.0, 'kl_estimator': 'k2'},
    {'name': 'rloo', 'beta': 0.5},
    {'name': 'reinforce_pp', 'beta': 0.5},
  ):
    assert learn(OBJECTIVES[keys.pop('name', 'grpo')](given=BANDIT, num_generations=8, **keys), 30)[1]['kl'] < 0.5 * free, keys
