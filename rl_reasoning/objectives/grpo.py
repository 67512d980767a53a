"""Group relative policy optimisation (GRPO, 2402.03300; DeepSeek-R1, 2501.12948)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import advantages, losses
from rl_reasoning.structs import Batch, Max, Mean, Min, Sum


@dataclasses.dataclass(frozen=True)
class Given:
  """What GRPO reads of the `rewards` section."""

  reward_names: tuple[str, ...]
  reward_weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Grpo:
  """Symbols and defaults: objectives.md. The loss is sum(weight * (clipped surrogate + beta * KL))."""

  given: Given
  name: str = 'grpo'
  num_generations: int = 8  # G
  num_iterations: int = 1  # passes over a rollout
  num_minibatches: int = 1  # updates a pass
  epsilon: float = 0.2
  epsilon_high: float | None = None  # None: epsilon
  beta: float = 0.0  # weight of the KL to the reference; 0: no reference is kept
  kl_estimator: str = 'k3'  # k2 | k3
  aggregation: str = 'sequence_mean'
  scale_rewards: str = 'group'  # group | batch | none
  mask_truncated_completions: bool = False
  ref_model_sync_updates: int | None = None  # the reference becomes the policy each time the update count reaches a multiple

  trainable: ClassVar = ('policy',)
  rows_together: ClassVar = 1

  def __post_init__(self):
    def check(condition: bool, key: str, message: str):
      if not condition:
        raise ValueError(f'config key {"objective." + key!r}: {message}')

    for key in ('num_generations', 'num_iterations', 'num_minibatches'):
      check(getattr(self, key) >= 1, key, f'{getattr(self, key)} must be at least 1')
    check(self.num_generations > 1, 'num_generations', 'a group of one has no baseline: use 2 or more')
    check(self.epsilon > 0, 'epsilon', f'{self.epsilon} must be positive')
    check(self.epsilon_high is None or self.epsilon_high > 0, 'epsilon_high', f'{self.epsilon_high} must be positive')
    check(self.beta >= 0, 'beta', f'{self.beta} must not be negative')
    check(self.kl_estimator in ('k2', 'k3'), 'kl_estimator', 'k2 or k3; k1 in a loss has zero expected gradient')
    check(self.aggregation in advantages.AGGREGATIONS, 'aggregation', f'one of {", ".join(advantages.AGGREGATIONS)}')
    check(self.scale_rewards in advantages.SCALES, 'scale_rewards', f'one of {", ".join(advantages.SCALES)}')
    sync = self.ref_model_sync_updates
    check(sync is None or sync >= 1, 'ref_model_sync_updates', f'{sync} must be at least 1')

  @property
  def frozen(self) -> tuple[str, ...]:
    return ('ref',) if self.beta and self.ref_model_sync_updates is None else ()

  @property
  def moving(self) -> tuple[str, ...]:
    return ('ref',) if self.beta and self.ref_model_sync_updates is not None else ()

  @property
  def sources(self) -> dict[str, int]:
    return {'rollout': self.num_generations}

  def init_aux(self):
    return {}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    """logp_old only where several updates make it differ from the policy; logp_ref only where it is weighed."""
    if self.num_iterations * self.num_minibatches > 1:
      rows = rows.replace(logp_old_NT=nets['policy'].logp(params['policy'], rows)[0])
    if self.beta:
      rows = rows.replace(logp_ref_NT=nets['ref'].logp(frozen['ref'], rows)[0])
    return rows

  def prepare(self, aux, batch: Batch):
    G = self.num_generations
    reward, has = advantages.combine_rewards(batch.rewards_NR, batch.has_reward_NR, batch.failed_NR, self.given.reward_weights, G)
    advantage = advantages.group_advantages(reward, has, G, self.scale_rewards)
    metrics = self.metrics(batch, reward, has)  # of completions as sampled, before any filter
    kept = has
    if self.mask_truncated_completions:
      kept = kept * (1 - batch.truncated_N.astype(jnp.float32))
    mask = batch.mask_NT * kept[:, None]
    batch = batch.replace(reward_N=reward, has_reward_N=has, mask_NT=mask, advantage_NT=advantage[:, None] * mask)
    return batch, aux, metrics

  def metrics(self, batch: Batch, reward, has) -> dict:
    """Rewards and lengths under TRL's names. Each mean is over what it names; none counts padding."""
    _, std, spread = advantages.group_statistics(reward, has, self.num_generations)
    judged = jnp.any(has.reshape(spread.shape[0], -1) > 0, axis=1, keepdims=True).astype(jnp.float32)
    length = batch.mask_NT.sum(axis=1)
    cut = batch.truncated_N.astype(jnp.float32)
    rows = float(length.shape[0])
    result = {
      'reward': Mean((reward * has).sum(), has.sum()),
      'reward_std': Mean((std * judged).sum(), judged.sum()),
      'frac_reward_zero_std': Mean((judged * ~spread).sum(), judged.sum()),
      'frac_no_verdict': Mean((1 - has).sum(), rows),
      'completions/mean_length': Mean(length.sum(), rows),
      'completions/min_length': Min(length.min()),
      'completions/max_length': Max(length.max()),
      'completions/mean_terminated_length': Mean((length * (1 - cut)).sum(), (1 - cut).sum()),
      'completions/clipped_ratio': Mean(cut.sum(), rows),
    }
    applies = jnp.broadcast_to(
      advantages.applicable(batch.has_reward_NR, batch.failed_NR, self.num_generations),
      (spread.shape[0], self.num_generations, len(self.given.reward_names)),
    ).reshape(batch.has_reward_NR.shape)
    for index, name in enumerate(self.given.reward_names):
      own, value = batch.has_reward_NR[:, index], batch.rewards_NR[:, index]
      count = own.sum()
      mean = (value * own).sum() / jnp.maximum(count, 1)
      square = (own * (value - mean) ** 2).sum() / jnp.maximum(count - 1, 1)
      result[f'rewards/{name}/mean'] = Mean(mean * count, count)
      result[f'rewards/{name}/std'] = Mean(jnp.sqrt(square) * count, count)
      result[f'rewards/{name}/not_applicable'] = Mean((~applies[:, index]).sum(), rows)
      result[f'rewards/{name}/no_verdict'] = Mean((applies[:, index] & (own == 0)).sum(), rows)
    return result

  def loss(self, nets, params, frozen, aux, batch: Batch):
    logp, entropy = nets['policy'].logp(params['policy'], batch, entropy=True)
    mask, tokens, own = batch.mask_NT, batch.mask_NT.sum(), jax.lax.stop_gradient(logp)

    def inside(x):  # a weight of 0 does not undo an exp that overflowed on a prompt token
      return jnp.where(mask > 0, x, own)

    old = own if batch.logp_old_NT is None else inside(batch.logp_old_NT)
    high = self.epsilon if self.epsilon_high is None else self.epsilon_high
    policy_loss, clipped = losses.clipped_surrogate(logp, old, batch.advantage_NT, self.epsilon, high)
    loss = policy_loss

    def masked(x):
      return Mean(jnp.sum(mask * x), tokens)

    difference = jnp.abs(old - inside(batch.logp_sample_NT))
    metrics = {
      'policy_loss': Sum(jnp.sum(batch.weight_NT * policy_loss)),
      'entropy': masked(entropy),
      'clip_ratio/low_mean': masked(clipped['low']),
      'clip_ratio/high_mean': masked(clipped['high']),
      'clip_ratio/region_mean': masked(clipped['low'] + clipped['high']),
      'sampling/logp_difference/mean': masked(difference),
      'sampling/logp_difference/max': Max(difference.max()),
    }
    if self.beta:
      ref = inside(batch.logp_ref_NT)
      loss = loss + self.beta * losses.kl_estimate(logp, ref, self.kl_estimator)
      metrics['kl'] = masked(losses.kl_estimate(logp, ref, 'k3'))
    return jnp.sum(batch.weight_NT * loss), metrics

  def adapt(self, aux, metrics):
    return aux
