"""From rewards to advantages, and from masks to weights. All rows of a step or an update are here at once, so every mean is global."""

from __future__ import annotations

import jax.numpy as jnp

from rl_reasoning.losses import per_sequence
from rl_reasoning.structs import DATA, ROLLOUT, Array

AGGREGATIONS = ('token_mean', 'sequence_mean', 'sequence_sum', 'fixed_length')
SCALES = ('group', 'batch', 'none')


def weigh(mask_NT: Array, segment_NT: Array, source_N: Array, aggregation: str, max_completion_length: int) -> Array:
  """weight_NT with which sum(weight * loss) is the aggregation of objectives.md, per source.

  M (masked tokens) and N (rows that have one) are those of the whole update: micro-batch gradients then simply add up. Rows without a
  masked token count in neither.
  """
  if aggregation not in AGGREGATIONS:
    raise ValueError(f'aggregation {aggregation!r} is none of {", ".join(AGGREGATIONS)}')
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
    else:
      weight += mask / (N * max_completion_length)
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


def group_advantages(reward_N: Array, has_N: Array, group: int, scale: str, epsilon: float = 1e-4) -> Array:
  """advantage_N = (reward - mean of its group) / (std + epsilon), GRPO (2402.03300) eq. 3; std of the group, of the batch, or 1
  (Dr. GRPO, 2503.20783). Exactly 0 in a group without spread, in a group of one survivor, and in rows without a reward."""
  mean, std, spread = group_statistics(reward_N, has_N, group)
  reward, has = reward_N.reshape(-1, group), has_N.reshape(-1, group)
  if scale == 'batch':
    std = group_statistics(reward_N, has_N, reward_N.shape[0])[1]
  scaled = (reward - mean) / (std + epsilon) if scale != 'none' else reward - mean
  return jnp.where(spread & (has > 0), scaled, 0.0).reshape(-1)
