"""From rewards to advantages, and from masks to weights. All rows of a step or an update are here at once, so every mean is global."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_reasoning.losses import per_sequence
from rl_reasoning.structs import DATA, ROLLOUT, Array

AGGREGATIONS = ('token_mean', 'sequence_mean', 'sequence_sum', 'fixed_length')
UNIT_MEAN = 'unit_mean'  # of losses that a unit of rows has as a whole, not its tokens: pairs, rankings
SCALES = ('group', 'batch', 'none')
EPSILON = 1e-4  # beside a standard deviation


def weigh(
  mask_NT: Array, segment_NT: Array, source_N: Array, aggregation: str, max_completion_length: int, rows_together: int = 1
) -> Array:
  """weight_NT with which sum(weight * loss) is the aggregation of objectives.md, per source.

  M (masked tokens) and N (rows that have one) are those of the whole update: micro-batch gradients then simply add up. Rows without a
  masked token count in neither.

  `unit_mean` counts U, the units of `rows_together` adjacent rows that have a masked token: the weights of one add up to 1/U.
  """
  if aggregation not in (*AGGREGATIONS, UNIT_MEAN):
    raise ValueError(f'aggregation {aggregation!r} is none of {", ".join((*AGGREGATIONS, UNIT_MEAN))}')
  tokens_NT = per_sequence(mask_NT, segment_NT)
  alive_N = jnp.any(mask_NT > 0, axis=1)
  weight = jnp.zeros_like(mask_NT)
  for source in (ROLLOUT, DATA):
    own_N = source_N == source
    mask = mask_NT * own_N[:, None]
    M, N = jnp.maximum(mask.sum(), 1), jnp.maximum((alive_N & own_N).sum(), 1)
    if aggregation == 'token_mean':
      weight += mask / M
    elif aggregation == 'sequence_mean':
      weight += mask / (N * jnp.maximum(tokens_NT, 1))
    elif aggregation == 'sequence_sum':
      weight += mask / N
    elif aggregation == 'fixed_length':
      weight += mask / (N * max_completion_length)
    else:
      tokens_U = mask.reshape(-1, rows_together * mask.shape[1]).sum(axis=1)
      U = jnp.maximum((tokens_U > 0).sum(), 1)
      weight += mask / (U * jnp.repeat(jnp.maximum(tokens_U, 1), rows_together)[:, None])
  return weight


def applicable(has_NR: Array, failed_NR: Array, group: int) -> Array:
  """bool [B, 1, R]: whether a function speaks of a group, if only by failing."""
  spoke = (has_NR > 0) | (failed_NR > 0)
  return jnp.any(spoke.reshape(-1, group, spoke.shape[-1]), axis=1, keepdims=True)


def combine_rewards(
  rewards_NR: Array, has_NR: Array, failed_NR: Array, weights: tuple[float, ...], group: int
) -> tuple[Array, Array]:
  """(reward_N, has_reward_N): the weighted sum of the reward functions.

  A function without a verdict on a whole group does not apply there and drops out of that group's sum; one without a verdict on some
  rows of a group, or that failed, takes those rows out, and so does a group to which no function applies.
  """
  has = has_NR.reshape(-1, group, has_NR.shape[-1]) > 0
  applies = applicable(has_NR, failed_NR, group)
  ok = jnp.all(has | ~applies, axis=-1) & jnp.any(applies, axis=-1)
  total = jnp.sum(jnp.where(has_NR > 0, rewards_NR, 0.0) * jnp.asarray(weights, jnp.float32), axis=-1)
  ok = ok.reshape(-1)
  return jnp.where(ok, total, 0.0), ok.astype(jnp.float32)


def group_statistics(reward_N: Array, has_N: Array, group: int) -> tuple[Array, Array, Array]:
  """(mean_B1, std_B1 with ddof 1, spread_B1): over the rows of a group that have a reward; spread is max > min.

  Spread is read from max and min, never from std: seven equal float32 rewards of 0.7 leave a residue in std.
  """
  reward, has = reward_N.reshape(-1, group), has_N.reshape(-1, group) > 0
  count = has.sum(axis=1, keepdims=True)
  mean = jnp.sum(jnp.where(has, reward, 0.0), axis=1, keepdims=True) / jnp.maximum(count, 1)
  square = jnp.sum(jnp.where(has, (reward - mean) ** 2, 0.0), axis=1, keepdims=True)
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1))
  high = jnp.max(jnp.where(has, reward, -jnp.inf), axis=1, keepdims=True)
  low = jnp.min(jnp.where(has, reward, jnp.inf), axis=1, keepdims=True)
  return mean, std, high > low


def group_advantages(
  reward_N: Array, has_N: Array, group: int, scale: str, *, leave_one_out: bool = False, spread_B1: Array | None = None
) -> Array:
  """advantage_N = (reward - mean of its group) / (std + 1e-4), GRPO (2402.03300) eq. 3; std of the group, of the batch, or 1
  (Dr. GRPO, 2503.20783). `leave_one_out`: the mean is that of the OTHER rows of the group (RLOO, 2402.14740).

  Exactly 0 in a group without spread, in a group of one survivor, and in rows without a reward. `spread_B1` is given where the rewards
  hold penalties that do not count as spread.
  """
  mean, std, own = group_statistics(reward_N, has_N, group)
  reward, has = reward_N.reshape(-1, group), has_N.reshape(-1, group) > 0
  count = has.sum(axis=1, keepdims=True)
  if scale == 'batch':
    std = group_statistics(reward_N, has_N, reward_N.shape[0])[1]
  centred = reward - mean
  if leave_one_out:  # reward - (sum - reward) / (count - 1)
    centred = centred * count / jnp.maximum(count - 1, 1)
  scaled = centred / (std + EPSILON) if scale != 'none' else centred
  spread = own if spread_B1 is None else spread_B1 & (count > 1)
  return jnp.where(spread & has, scaled, 0.0).reshape(-1)


def normalised_sum(rewards_NR: Array, has_NR: Array, has_N: Array, weights: tuple[float, ...], group: int) -> Array:
  """GDPO (2601.05242): every function's own group advantage, then their weighted sum, over its std in the batch. Its mean is 0 by
  construction and is not subtracted, so that a group in which no function has spread stays at exactly 0."""
  total = jnp.zeros(rewards_NR.shape[0])
  for index, weight in enumerate(weights):
    total += weight * group_advantages(rewards_NR[:, index], has_NR[:, index] * has_N, group, 'group')
  std = group_statistics(total, has_N, total.shape[0])[1].reshape(())
  return has_N * total / (std + EPSILON)


def rewards_to_go(reward_N: Array, penalty_NT: Array) -> Array:
  """[N, T]: the row's reward minus the penalties from this token on (gamma 1)."""
  return reward_N[:, None] - jnp.cumsum(penalty_NT[:, ::-1], axis=1)[:, ::-1]


def whiten(x_NT: Array, mask_NT: Array, *, centre: bool = True) -> Array:
  """(x - mean) / (std + 1e-4) over the masked tokens of the step; exactly 0 where they are all equal.

  Without `centre` x / (std + 1e-4), and x itself where all are equal: a mean taken from the reward of every token would pay by length.
  """
  count = jnp.maximum(mask_NT.sum(), 1)
  mean = jnp.sum(mask_NT * x_NT) / count
  std = jnp.sqrt(jnp.sum(mask_NT * (x_NT - mean) ** 2) / count)
  spread = jnp.max(jnp.where(mask_NT > 0, x_NT, -jnp.inf)) > jnp.min(jnp.where(mask_NT > 0, x_NT, jnp.inf))
  if not centre:
    return jnp.where(mask_NT > 0, jnp.where(spread, x_NT / (std + EPSILON), x_NT), 0.0)
  return jnp.where((mask_NT > 0) & spread, (x_NT - mean) / (std + EPSILON), 0.0)


@jax.jit  # a scan outside of any program would be compiled anew at each call
def gae(reward_NT: Array, value_NT: Array, mask_NT: Array, gamma: float, lam: float) -> Array:
  """Generalised advantage estimates (1506.02438, eq. 16) over the masked tokens of one completion a row, 0 elsewhere:
  delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V and A after the last masked token 0.

  t + 1 is the next MASKED token: what was injected in between was no action, and takes no discount.
  """

  def step(later, now):
    advantage, value = later
    r, v, m = now
    here = r + gamma * value - v + gamma * lam * advantage
    return (jnp.where(m > 0, here, advantage), jnp.where(m > 0, v, value)), jnp.where(m > 0, here, 0.0)

  nothing = jnp.zeros_like(value_NT[:, 0])
  return jax.lax.scan(step, (nothing, nothing), (reward_NT.T, value_NT.T, mask_NT.T), reverse=True)[1].T


def running_moments(count: Array, mean: Array, square: Array, x_N: Array, has_N: Array) -> tuple[Array, Array, Array]:
  """(count, mean, sum of squared deviations) with the x that there are added to what was seen before (Chan, Golub and LeVeque 1983).

  The mean of equal x is exactly their value, since it is counted from the largest: a residue over a std of 0 would look like a score.
  """
  n = has_N.sum()
  high = jnp.where(n > 0, jnp.max(jnp.where(has_N > 0, x_N, -jnp.inf)), 0.0)
  own = high + jnp.sum(jnp.where(has_N > 0, x_N - high, 0.0)) / jnp.maximum(n, 1)
  total, change = count + n, own - mean
  share = n / jnp.maximum(total, 1)
  deviations = jnp.sum(jnp.where(has_N > 0, (x_N - own) ** 2, 0.0))
  return total, mean + change * share, square + deviations + change**2 * count * share
