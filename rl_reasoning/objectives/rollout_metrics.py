"""What a step's completions and rewards look like, whatever the objective learns from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_reasoning import advantages
from rl_reasoning.structs import Array, Batch, Max, Mean, Min


def rollout_rows(batch: Batch, own: int, together: int) -> Batch:
  """Of the `together` rows of each prompt the first `own`: the others come from data."""

  def take(x: Array) -> Array:
    return x.reshape(-1, together, *x.shape[1:])[:, :own].reshape(-1, *x.shape[1:])

  return jax.tree.map(take, batch)


def length_metrics(batch: Batch) -> dict:
  """Lengths of completions in tokens under TRL's names."""
  length = batch.mask_NT.sum(axis=1)
  cut = batch.truncated_N.astype(jnp.float32)
  rows = float(length.shape[0])
  return {
    'completions/mean_length': Mean(length.sum(), rows),
    'completions/min_length': Min(length.min()),
    'completions/max_length': Max(length.max()),
    'completions/mean_terminated_length': Mean((length * (1 - cut)).sum(), (1 - cut).sum()),
    'completions/clipped_ratio': Mean(cut.sum(), rows),
  }


def rollout_metrics(batch: Batch, reward: Array, has: Array, reward_names: tuple[str, ...], group: int) -> dict:
  """Rewards and lengths under TRL's names, of `group` adjacent rows a prompt. Each mean is over what it names; none counts padding."""
  _, std, spread = advantages.group_statistics(reward, has, group)
  judged = jnp.any(has.reshape(spread.shape[0], -1) > 0, axis=1, keepdims=True).astype(jnp.float32)
  rows = float(reward.shape[0])
  result = {
    'reward': Mean((reward * has).sum(), has.sum()),
    'reward_std': Mean((std * judged).sum(), judged.sum()),
    'frac_reward_zero_std': Mean((judged * ~spread).sum(), judged.sum()),
    'frac_no_verdict': Mean((1 - has).sum(), rows),
    **length_metrics(batch),
  }
  applies = jnp.broadcast_to(
    advantages.applicable(batch.has_reward_NR, batch.failed_NR, group),
    (spread.shape[0], group, len(reward_names)),
  ).reshape(batch.has_reward_NR.shape)
  for index, name in enumerate(reward_names):
    own, value = batch.has_reward_NR[:, index], batch.rewards_NR[:, index]
    count = own.sum()
    mean = (value * own).sum() / jnp.maximum(count, 1)
    square = (own * (value - mean) ** 2).sum() / jnp.maximum(count - 1, 1)
    result[f'rewards/{name}/mean'] = Mean(mean * count, count)
    result[f'rewards/{name}/std'] = Mean(jnp.sqrt(square) * count, count)
    result[f'rewards/{name}/not_applicable'] = Mean((~applies[:, index]).sum(), rows)
    result[f'rewards/{name}/no_verdict'] = Mean((applies[:, index] & (own == 0)).sum(), rows)
  return result
