"""Weights, rewards and advantages against plain loops in float64."""

import numpy as np
import pytest

from rl_reasoning import advantages
from rl_reasoning.structs import DATA, ROLLOUT


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
  for aggregation in (*advantages.AGGREGATIONS, advantages.UNIT_MEAN):
    weight = advantages.weigh(np.zeros((2, 3), np.float32), np.ones((2, 3), np.int32), np.zeros(2, np.int32), aggregation, 3, 2)
    assert np.all(np.asarray(weight) == 0)


def test_weigh_refuses_unknown():
  """Failure: a mistyped aggregation silently becomes the last one."""
  with pytest.raises(ValueError, match='tokenmean'):
    advantages.weigh(np.ones((2, 3), np.float32), np.ones((2, 3), np.int32), np.zeros(2, np.int32), 'tokenmean', 3)


@pytest.mark.parametrize('aggregation', (*advantages.AGGREGATIONS, advantages.UNIT_MEAN))
def test_weight_of_a_token_ignores_padding(aggregation):
  """Failure: more padding columns change the objective."""
  mask, segment, source = ragged()
  pad = ((0, 0), (0, 5))
  wide = advantages.weigh(np.pad(mask, pad), np.pad(segment, pad), source, aggregation, 7)
  np.testing.assert_allclose(np.asarray(wide)[:, :10], advantages.weigh(mask, segment, source, aggregation, 7), rtol=1e-6)


def test_weights_of_units():
  """Failure: `unit_mean` is not the mean over the units of a source that have a masked token, a unit's weights depend on its length or on
  the micro-batch it is in, or a unit without one counts."""
  rng, N, T, K = np.random.default_rng(3), 8, 10, 2
  mask = (rng.random((N, T)) < 0.5).astype(np.float32)
  mask[:, 1] = 1
  mask[2:4] = 0  # a unit that is dropped
  mask[4], mask[5, 2:] = 0, 0  # a row that only fills its unit up; a short one
  source, segment = np.repeat(np.array([ROLLOUT, ROLLOUT, ROLLOUT, DATA], np.int32), K), np.ones((N, T), np.int32)
  weight = np.asarray(advantages.weigh(mask, segment, source, 'unit_mean', 7, K), np.float64)
  units = weight.reshape(N // K, -1).sum(axis=1)
  np.testing.assert_allclose(units, [1 / 2, 0, 1 / 2, 1], rtol=1e-6)
  assert np.all((weight > 0) == (mask > 0))
  for u in (0, 2, 3):  # within a unit every masked token weighs the same
    inside = weight[u * K : (u + 1) * K][mask[u * K : (u + 1) * K] > 0]
    np.testing.assert_allclose(inside, inside[0])
  # Units are dealt to two micro-batches after they are weighed: their losses add up to the mean of each source.
  loss = rng.normal(size=N // K)
  split = [sum(units[u] * loss[u] for u in part) for part in ((0, 2), (1, 3))]
  assert sum(split) == pytest.approx(loss[[0, 2]].mean() + loss[3], rel=1e-6)
  # A unit of one row is a sequence.
  alone = advantages.weigh(mask, segment, source, 'unit_mean', 7)
  np.testing.assert_allclose(alone, advantages.weigh(mask, segment, source, 'sequence_mean', 7), rtol=1e-6)


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


def reference_advantages(reward, has, group, scale, leave_one_out=False):
  reward, result = np.asarray(reward, np.float64), np.zeros(len(reward))
  alive = [n for n in range(len(reward)) if has[n]]
  for start in range(0, len(reward), group):
    rows = [n for n in range(start, start + group) if has[n]]
    if len(rows) < 2 or len({float(reward[n]) for n in rows}) == 1:
      continue
    std = {'group': np.std(reward[rows], ddof=1), 'batch': np.std(reward[alive], ddof=1)}.get(scale)
    for n in rows:
      others = [m for m in rows if m != n] if leave_one_out else rows
      result[n] = (reward[n] - reward[others].mean()) / (1 if scale == 'none' else std + 1e-4)
  return result


@pytest.mark.parametrize('leave_one_out', [False, True])
@pytest.mark.parametrize('scale', advantages.SCALES)
def test_group_advantages(scale, leave_one_out):
  """Failure: baseline, ddof, epsilon or scale is not that of objectives.md, or another prompt's rows enter a group (prime-rl#600)."""
  rng = np.random.default_rng(2)
  reward = np.round(rng.random(24), 2).astype(np.float32)
  reward[6:12] = 0.3
  has = np.ones(24, np.float32)
  has[[1, 13]] = 0
  has[19:] = 0  # the last group has one survivor
  result = np.asarray(advantages.group_advantages(reward, has, 6, scale, leave_one_out=leave_one_out))
  np.testing.assert_allclose(result, reference_advantages(reward, has, 6, scale, leave_one_out), rtol=2e-5, atol=1e-6)
  assert np.all(result[6:12] == 0) and np.all(result[18:] == 0) and np.all(result[has == 0] == 0)


def test_golden_group():
  """Failure: the published formulas, by hand: rewards 1, 0, 0, 1 have std 0.57735 with ddof 1; the others of a 1 have the mean 1/3."""
  one, rewards = 0.5 / (np.sqrt(1 / 3) + 1e-4), np.float32([1, 0, 0, 1])
  np.testing.assert_allclose(advantages.group_advantages(rewards, np.ones(4), 4, 'group'), [one, -one, -one, one], rtol=1e-6)
  alone = advantages.group_advantages(rewards, np.ones(4), 4, 'none', leave_one_out=True)
  np.testing.assert_allclose(alone, [2 / 3, -2 / 3, -2 / 3, 2 / 3], rtol=1e-6)


EQUAL = [0.7, 1 / 3, -2.0, 1e6, 0.1, 1e6 / 3, -0.7]


@pytest.mark.parametrize('leave_one_out', [False, True])
@pytest.mark.parametrize('scale', advantages.SCALES)
@pytest.mark.parametrize('value', EQUAL)
def test_no_spread_is_exactly_zero(scale, value, leave_one_out):
  """Failure: the rounding residue of a mean of equal rewards is blown up into a gradient."""
  reward = np.full(14, value, np.float32)
  reward[7] = 5.0  # so that the batch has a spread
  has = np.ones(14, np.float32)
  has[7] = 0
  assert np.all(np.asarray(advantages.group_advantages(reward, has, 7, scale, leave_one_out=leave_one_out)) == 0)


def test_spread_that_is_given():
  """Failure: a penalty alone makes a group worth learning from, one survivor is its own baseline, or a real spread is not scaled."""
  shaped, has = np.float32([0, -1, 1, 0.5, 3, 9]), np.float32([1, 1, 1, 1, 1, 0])
  spread = np.array([[False], [True], [True]])
  result = advantages.group_advantages(shaped, has, 2, 'none', spread_B1=spread)
  np.testing.assert_allclose(result, [0, 0, 0.25, -0.25, 0, 0])


@pytest.mark.parametrize('value', EQUAL)
def test_normalised_sum(value):
  """Failure: GDPO is not the weighted sum of every function's own group advantage over its std in the batch, missing rewards
  enter, or a group without spread in any function gets a residue."""
  rng = np.random.default_rng(4)
  rewards, has = np.round(rng.random((20, 2)), 2).astype(np.float32), np.ones((20, 2), np.float32)
  rewards[:5] = value
  rewards[5:10, 0] = value  # the other function still differs there
  has[10:15, 1] = 0  # it does not apply to this group
  alive = np.ones(20, np.float32)
  has[17, 0] = alive[17] = 0  # a row without a verdict
  columns = [reference_advantages(rewards[:, i], has[:, i] * alive, 5, 'group') for i in range(2)]
  total = 2.0 * columns[0] - 0.5 * columns[1]
  expected = np.where(alive > 0, total / (np.std(total[alive > 0], ddof=1) + 1e-4), 0)
  rewards[has == 0] = 99.0
  result = np.asarray(advantages.normalised_sum(rewards, has, alive, (2.0, -0.5), 5))
  np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-6)
  assert np.all(result[:5] == 0) and np.all(result[5:10] != 0) and result[17] == 0


def test_rewards_to_go():
  """Failure: a token is charged for penalties before it, or not for its own."""
  penalty = np.float32([[0, 1, 2, 4], [0.5, 0, 0, 0]])
  np.testing.assert_array_equal(advantages.rewards_to_go(np.float32([10, -1]), penalty), [[3, 3, 4, 6], [-1.5, -1, -1, -1]])


def test_whiten():
  """Failure: padding enters mean or std, or the result has another mean or std than 0 and 1."""
  rng = np.random.default_rng(5)
  x, mask = rng.normal(3, 2, (4, 6)).astype(np.float32), (rng.random((4, 6)) < 0.5).astype(np.float32)
  x[mask == 0] = 1e9
  inside = x[mask > 0].astype(np.float64)
  result = np.asarray(advantages.whiten(x, mask))
  np.testing.assert_allclose(result[mask > 0], (inside - inside.mean()) / (inside.std() + 1e-4), rtol=1e-5, atol=1e-6)
  assert np.all(result[mask == 0] == 0)


@pytest.mark.parametrize('value', EQUAL)
def test_whitening_equal_values_is_exactly_zero(value):
  """Failure: seven equal rewards are whitened into their own rounding error."""
  mask = np.ones((7, 3), np.float32)
  mask[:, 2] = 0
  assert np.all(np.asarray(advantages.whiten(np.full((7, 3), value, np.float32), mask)) == 0)
  assert np.all(np.asarray(advantages.whiten(np.full((7, 3), value, np.float32), 0 * mask)) == 0)


def test_whiten_without_centring():
  """Failure: rewards of tokens are shifted, so that length pays; equal ones are blown up; what is outside the mask counts."""
  rng = np.random.default_rng(0)
  x, mask = rng.normal(3, 2, (4, 6)).astype(np.float32), (rng.random((4, 6)) < 0.6).astype(np.float32)
  x[mask == 0] = 1e6
  got = np.asarray(advantages.whiten(x, mask, centre=False))
  np.testing.assert_allclose(got[mask > 0], x[mask > 0] / (x[mask > 0].std() + 1e-4), rtol=1e-5)
  assert np.all(got[mask == 0] == 0)
  np.testing.assert_array_equal(advantages.whiten(np.full((4, 6), 0.7, np.float32), mask, centre=False), np.float32(0.7) * mask)


def slow_gae(reward, value, mask, gamma, lam):
  """1506.02438 eq. 16 as the sum that it is: A_t = sum over l of (gamma lam)^l delta_{t+l}, over the masked tokens alone."""
  out = np.zeros(mask.shape)
  for n in range(len(mask)):
    places = np.flatnonzero(mask[n])
    values = [*value[n, places], 0.0]
    delta = [reward[n, t] + gamma * values[i + 1] - values[i] for i, t in enumerate(places)]
    for i, t in enumerate(places):
      out[n, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(places)))
  return out


def test_gae():
  """Failure: an advantage is not the discounted sum of the errors that follow it; a token that was injected is a step, the end of a
  completion is bootstrapped, or padding, its side or what it holds matters."""
  mask, segment, _ = ragged(seed=2)
  rng = np.random.default_rng(3)
  reward, value = rng.normal(0, 1, (2, 8, 10)).astype(np.float32)
  holes = (segment > 0) & (mask == 0)
  assert np.any(holes[:, :-1] & (mask[:, 1:] > 0))  # a hole inside a completion
  for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (0.9, 1.0), (1.0, 0.0)):
    got = np.asarray(advantages.gae(reward, value, mask, gamma, lam))
    np.testing.assert_allclose(got, slow_gae(reward, value, mask, gamma, lam), rtol=1e-4, atol=1e-5)
    junk_r, junk_v = np.where(mask > 0, reward, np.inf), np.where(mask > 0, value, -1e30)
    np.testing.assert_array_equal(advantages.gae(junk_r, junk_v, mask, gamma, lam), got)
    shifted = advantages.gae(*(np.roll(x, 4, axis=1) * (np.arange(10) >= 4) for x in (reward, value, mask)), gamma, lam)
    kept = mask * (np.arange(10) < 6)  # as much of the row as is left after the shift
    np.testing.assert_allclose(shifted[:, 4:], advantages.gae(reward, value, kept, gamma, lam)[:, :6], rtol=1e-6)
  # gamma = lambda = 1: returns are the rewards to come, whatever the critic says.
  returns = np.asarray(advantages.gae(reward, value, mask, 1.0, 1.0)) + mask * value
  to_come = np.cumsum((mask * reward)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(returns, mask * to_come, rtol=1e-4, atol=1e-5)


def test_running_moments():
  """Failure: mean and deviation of the scores so far are not those of all of them at once, an absent one counts, or equal ones leave a
  residue."""
  rng, state, seen = np.random.default_rng(0), (np.float32(0),) * 3, []
  for _ in range(4):
    x, has = rng.normal(5, 2, 6).astype(np.float32), (rng.random(6) < 0.7).astype(np.float32)
    state = advantages.running_moments(*state, np.where(has > 0, x, 1e9), has)
    seen += x[has > 0].tolist()
    np.testing.assert_allclose(state, [len(seen), np.mean(seen), np.var(seen) * len(seen)], rtol=1e-5)
  unmoved = advantages.running_moments(*state, np.full(6, 3, np.float32), np.zeros(6, np.float32))
  np.testing.assert_array_equal(unmoved, state)
  state = (np.float32(0),) * 3
  for _ in range(3):
    state = advantages.running_moments(*state, np.full(6, 0.7, np.float32), np.ones(6, np.float32))
  np.testing.assert_array_equal(state, [18, np.float32(0.7), 0])
