"""Weights, rewards and advantages against plain loops in float64."""

import jax
import numpy as np
import pytest

from rl_reasoning import advantages
from rl_reasoning.objectives.grpo import Given, Grpo
from rl_reasoning.structs import DATA, ROLLOUT, Batch


def ragged(seed=0, N=8, T=10):
  rng = np.random.default_rng(seed)
  length = rng.integers(3, T + 1, N)
  segment = (np.arange(T) < length[:, None]).astype(np.int32)
  mask = (segment * (rng.random((N, T)) < 0.6)).astype(np.float32)
  mask[:, 1], mask[3] = 1, 0  # row 3 has nothing to train
  source = np.array([ROLLOUT] * 5 + [DATA] * 3, np.int32)
  return mask, segment, source


def aggregate(loss, mask, aggregation, limit):
  """objectives.md, literally, on the rows of one source."""
  rows = [n for n in range(len(mask)) if mask[n].any()]
  N, M = len(rows), mask.sum()
  if aggregation == 'token_mean':
    return (mask * loss).sum() / M
  if aggregation == 'sequence_mean':
    return sum((mask[n] * loss[n]).sum() / mask[n].sum() for n in rows) / N
  return (mask * loss).sum() / (N if aggregation == 'sequence_sum' else N * limit)


@pytest.mark.parametrize('aggregation', advantages.AGGREGATIONS)
@pytest.mark.parametrize('sources', ['both', 'rollout', 'data'])
def test_weigh(aggregation, sources):
  """Failure: sum(weight * loss) is not the aggregation of objectives.md, per source, over rows that have a token."""
  mask, segment, source = ragged()
  if sources != 'both':
    source = np.full_like(source, ROLLOUT if sources == 'rollout' else DATA)
  loss = np.random.default_rng(1).normal(size=mask.shape)
  weight = np.asarray(advantages.weigh(mask, segment, source, aggregation, 7), np.float64)
  expected = sum(aggregate(loss[source == s], mask[source == s].astype(np.float64), aggregation, 7) for s in set(source.tolist()))
  assert (weight * loss).sum() == pytest.approx(expected, rel=1e-5)
  assert np.all(weight[mask == 0] == 0) and np.all(weight[mask > 0] > 0)


def test_weigh_of_nothing():
  """Failure: an update without a trained token divides by zero."""
  for aggregation in advantages.AGGREGATIONS:
    weight = advantages.weigh(np.zeros((2, 3), np.float32), np.ones((2, 3), np.int32), np.zeros(2, np.int32), aggregation, 3)
    assert np.all(np.asarray(weight) == 0)


def test_weigh_refuses_unknown():
  """Failure: a mistyped aggregation silently becomes the last one."""
  with pytest.raises(ValueError, match='tokenmean'):
    advantages.weigh(np.ones((2, 3), np.float32), np.ones((2, 3), np.int32), np.zeros(2, np.int32), 'tokenmean', 3)


@pytest.mark.parametrize('aggregation', advantages.AGGREGATIONS)
def test_weight_of_a_token_ignores_padding(aggregation):
  """Failure: more padding columns change the objective."""
  mask, segment, source = ragged()
  pad = ((0, 0), (0, 5))
  wide = advantages.weigh(np.pad(mask, pad), np.pad(segment, pad), source, aggregation, 7)
  np.testing.assert_allclose(np.asarray(wide)[:, :10], advantages.weigh(mask, segment, source, aggregation, 7), rtol=1e-6)


def test_combine_rewards():
  """Failure: a weighted sum is wrong, 0.0 is treated as missing (OpenRLHF#1219), or a None is not handled as objectives.md says."""
  rewards = np.array(
    [[1.0, 0.5], [0.0, 0.0], [0.25, 9.0], [1.0, 9.0], [1.0, 0.5], [0.0, 9.0], [9.0, 9.0], [9.0, 9.0]], np.float32
  )
  has = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1], [1, 0], [0, 0], [0, 0]], np.float32)
  failed = np.zeros((8, 2), np.float32)
  reward, has_reward = advantages.combine_rewards(rewards, has, failed, (1.0, 2.0), 2)
  # Groups of two: complete; the second function does not apply; one row without a verdict; no function applies.
  np.testing.assert_allclose(reward, [2.0, 0.0, 0.25, 1.0, 2.0, 0.0, 0.0, 0.0])
  np.testing.assert_array_equal(has_reward, [1, 1, 1, 1, 1, 0, 0, 0])
  failed[2, 1] = 1  # a crash is no "does not apply": the group loses both rows, not that function alone
  np.testing.assert_array_equal(advantages.combine_rewards(rewards, has, failed, (1.0, 2.0), 2)[1], [1, 1, 0, 0, 1, 0, 0, 0])


def test_missing_rewards_may_hold_anything():
  """Failure: the value under a missing reward reaches the sum (NaN * 0)."""
  rewards = np.array([[1.0, np.nan], [0.0, np.inf]], np.float32)
  reward, has = advantages.combine_rewards(rewards, np.array([[1, 0], [1, 0]], np.float32), np.zeros((2, 2)), (1.0, 1.0), 2)
  np.testing.assert_array_equal(reward, [1, 0])
  np.testing.assert_array_equal(has, [1, 1])


def reference_advantages(reward, has, group, scale):
  reward, result = np.asarray(reward, np.float64), np.zeros(len(reward))
  alive = [n for n in range(len(reward)) if has[n]]
  for start in range(0, len(reward), group):
    rows = [n for n in range(start, start + group) if has[n]]
    if len(rows) < 2 or len({float(reward[n]) for n in rows}) == 1:
      continue
    std = {'group': np.std(reward[rows], ddof=1), 'batch': np.std(reward[alive], ddof=1)}.get(scale)
    for n in rows:
      result[n] = (reward[n] - reward[rows].mean()) / (1 if scale == 'none' else std + 1e-4)
  return result


@pytest.mark.parametrize('scale', advantages.SCALES)
def test_group_advantages(scale):
  """Failure: baseline, ddof, epsilon or scale is not that of objectives.md, or another prompt's rows enter a group (prime-rl#600)."""
  rng = np.random.default_rng(2)
  reward = np.round(rng.random(24), 2).astype(np.float32)
  reward[6:12] = 0.3
  has = np.ones(24, np.float32)
  has[[1, 13]] = 0
  has[19:] = 0  # the last group has one survivor
  result = np.asarray(jax.jit(advantages.group_advantages, static_argnums=(2, 3))(reward, has, 6, scale))
  np.testing.assert_allclose(result, reference_advantages(reward, has, 6, scale), rtol=2e-5, atol=1e-6)
  assert np.all(result[6:12] == 0) and np.all(result[18:] == 0) and np.all(result[has == 0] == 0)


def test_golden_group():
  """Failure: the published formula, by hand: rewards 1, 0, 0, 1 have std 0.57735 with ddof 1."""
  one = 0.5 / (np.sqrt(1 / 3) + 1e-4)
  result = advantages.group_advantages(np.float32([1, 0, 0, 1]), np.ones(4, np.float32), 4, 'group')
  np.testing.assert_allclose(result, [one, -one, -one, one], rtol=1e-6)


@pytest.mark.parametrize('scale', advantages.SCALES)
@pytest.mark.parametrize('value', [0.7, 0.1, 1e6 / 3, -0.7])
def test_no_spread_is_exactly_zero(scale, value):
  """Failure: the rounding residue of a mean of equal rewards is blown up into a gradient."""
  reward = np.full(14, value, np.float32)
  reward[7] = 5.0  # so that the batch has a spread
  has = np.ones(14, np.float32)
  has[7] = 0
  assert np.all(np.asarray(advantages.group_advantages(reward, has, 7, scale)) == 0)


def batch_of(rewards, has, truncated=None, lengths=(4, 2, 3, 1)):
  N, T = len(rewards), 6
  mask = (np.arange(T) >= 1) & (np.arange(T) < 1 + np.asarray(lengths)[:, None])
  return Batch(
    tokens=np.zeros((N, T), np.int32), segment_NT=np.ones((N, T), np.int32), position_NT=np.tile(np.arange(T), (N, 1)),
    mask_NT=mask.astype(np.float32), source_N=np.zeros(N, np.int32), group_N=np.arange(N) // 2,
    rewards_NR=np.asarray(rewards, np.float32), has_reward_NR=np.asarray(has, np.float32), failed_NR=np.zeros((N, len(rewards[0]))),
    truncated_N=np.asarray(truncated or [0] * N, np.float32),
  )  # fmt: skip


def numbers(metrics):
  return {k: float(m.total) / float(m.count) if hasattr(m, 'total') else float(m.value) for k, m in metrics.items()}


def test_prepare_removes_rows_without_reward():
  """Failure: a row without a verdict still counts in N and M, or still has an advantage."""
  grpo = Grpo(Given(('a',), (2.0,)), num_generations=2)
  batch, _, metrics = grpo.prepare({}, batch_of([[1], [0], [1], [7]], [[1], [1], [1], [0]]))
  np.testing.assert_array_equal(batch.mask_NT.sum(axis=1), [4, 2, 3, 0])
  one = 1 / (np.sqrt(2) + 1e-4)
  np.testing.assert_allclose(batch.advantage_NT[:, 1], [one, -one, 0, 0], rtol=1e-6)
  assert np.all(np.asarray(batch.advantage_NT)[np.asarray(batch.mask_NT) == 0] == 0)
  m = numbers(metrics)
  assert m['rewards/a/no_verdict'] == 0.25 and m['rewards/a/not_applicable'] == 0
  assert m['reward'] == pytest.approx(4 / 3) and m['frac_no_verdict'] == 0.25 and m['frac_reward_zero_std'] == 0.5
  assert m['rewards/a/mean'] == pytest.approx(2 / 3) and m['rewards/a/std'] == pytest.approx(np.std([1, 0, 1], ddof=1))


def test_prepare_masks_truncated_completions():
  """Failure: the overlong filter changes rewards or metrics, or leaves cut completions in the loss."""
  plain = Grpo(Given(('a',), (1.0,)), num_generations=2)
  filtered = Grpo(Given(('a',), (1.0,)), num_generations=2, mask_truncated_completions=True)
  rows = batch_of([[1], [0], [1], [0]], [[1]] * 4, truncated=[1, 0, 0, 0])
  kept, _, all_metrics = plain.prepare({}, rows)
  batch, _, metrics = filtered.prepare({}, rows)
  np.testing.assert_array_equal(batch.mask_NT.sum(axis=1), [0, 2, 3, 1])
  np.testing.assert_array_equal(kept.mask_NT.sum(axis=1), [4, 2, 3, 1])
  np.testing.assert_array_equal(np.asarray(batch.advantage_NT)[1:], np.asarray(kept.advantage_NT)[1:])  # same baseline
  assert numbers(metrics) == numbers(all_metrics)
  m = numbers(metrics)
  assert (m['completions/min_length'], m['completions/max_length'], m['completions/mean_length']) == (1, 4, 2.5)
  assert m['completions/mean_terminated_length'] == 2 and m['completions/clipped_ratio'] == 0.25
  assert m['reward'] == 0.5 and m['reward_std'] == pytest.approx(np.sqrt(0.5))


def test_refused_settings():
  """Failure: a setting that has no meaning trains something else without a word."""
  for keys in ({'kl_estimator': 'k1'}, {'num_generations': 1}, {'aggregation': 'mean'}, {'scale_rewards': 'std'}, {'beta': -1.0}):
    with pytest.raises(ValueError, match=next(iter(keys))):
      Grpo(Given(('a',), (1.0,)), **keys)
