"""Group relative policy optimisation (GRPO, 2402.03300; DeepSeek-R1, 2501.12948) and its family: one loss, named settings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import advantages, losses
from rl_reasoning.objectives.keys import check_key
from rl_reasoning.objectives.reference import Reference
from rl_reasoning.objectives.rollout_metrics import rollout_metrics
from rl_reasoning.structs import Batch, Max, Mean, Sum

SETTINGS: dict[str, dict[str, Any]] = {
  'grpo': {},  # 2402.03300; the paper's KL weight is 0.04
  'r1': {'epsilon': 10.0, 'beta': 0.001},  # 2501.12948, first RL stage
  'dr_grpo': {'aggregation': 'fixed_length', 'scale_rewards': 'none'},  # 2503.20783
  'dapo': {'epsilon_high': 0.28, 'aggregation': 'token_mean', 'dynamic_sampling': True, 'overlong_buffer': 0},  # 2503.14476
  'gspo': {'importance_sampling_level': 'sequence', 'epsilon': 3e-4, 'epsilon_high': 4e-4},  # 2507.18071
  'cispo': {'surrogate': 'cispo', 'aggregation': 'token_mean'},  # 2506.13585
  'rloo': {
    'surrogate': 'reinforce', 'advantage_estimator': 'leave_one_out', 'aggregation': 'sequence_sum', 'scale_rewards': 'none',
    'beta': 0.05, 'kl_estimator': 'k1', 'kl_in': 'reward',
  },  # 2402.14740
  'reinforce_pp': {
    'advantage_estimator': 'reinforce_pp', 'aggregation': 'token_mean', 'beta': 0.01, 'kl_estimator': 'k1', 'kl_in': 'reward',
  },  # 2501.03262
}  # fmt: skip
CHOICES = {
  'surrogate': ('clip', 'cispo', 'reinforce'),
  'importance_sampling_level': ('token', 'sequence'),
  'advantage_estimator': ('group', 'leave_one_out', 'reinforce_pp'),
  'multi_objective_aggregation': ('sum_then_normalize', 'normalize_then_sum'),
  'aggregation': advantages.AGGREGATIONS,
  'scale_rewards': advantages.SCALES,
  'kl_estimator': ('k1', 'k2', 'k3'),
  'kl_in': ('loss', 'reward'),
}


@dataclasses.dataclass(frozen=True)
class Given:
  """What GRPO reads of the `rewards` and `rollout` sections."""

  reward_names: tuple[str, ...]
  reward_weights: tuple[float, ...]
  max_completion_length: int


@dataclasses.dataclass(frozen=True)
class Grpo(Reference):
  """Symbols and defaults: objectives.md. The loss is sum(weight * (surrogate + beta * KL - entropy_coef * entropy))."""

  given: Given
  name: str = 'grpo'
  num_generations: int = 8  # G
  num_iterations: int = 1  # passes over a rollout
  num_minibatches: int = 1  # updates a pass
  surrogate: str = 'clip'  # clip | cispo | reinforce
  importance_sampling_level: str = 'token'  # token | sequence
  epsilon: float = 0.2
  epsilon_high: float | None = None  # None: epsilon
  delta: float | None = None  # dual clip: bound of the ratio where A < 0
  cispo_cap: float = 5.0
  tis_cap: float | None = None  # truncated importance sampling between sampler and trainer
  advantage_estimator: str = 'group'  # group | leave_one_out | reinforce_pp
  reinforce_pp_baseline: bool = False  # subtract the group's mean before whitening
  scale_rewards: str = 'group'  # group | batch | none
  multi_objective_aggregation: str = 'sum_then_normalize'  # or normalize_then_sum, GDPO
  aggregation: str = 'sequence_mean'
  beta: float = 0.0  # weight of the KL to the reference; 0: no reference is kept
  kl_estimator: str = 'k3'  # k1 (in the reward only) | k2 | k3
  kl_in: str = 'loss'  # loss | reward
  kl_importance_weighted: bool = False  # DeepSeek-V3.2: the KL in the loss is unbiased off-policy
  ref_model_sync_updates: int | None = None  # the reference moves each time the update count reaches a multiple; DeepSeek-R1: 400
  ref_model_ema: float | None = None  # it moves to ema * reference + (1 - ema) * policy; None: to the policy
  entropy_coef: float = 0.0  # weight of the entropy bonus; with a target, where it starts
  entropy_target: float | None = None  # nats a token: the coefficient moves by a step a rollout towards it
  entropy_coef_step: float = 0.001
  entropy_coef_max: float = 0.05
  dynamic_sampling: bool = False  # groups without spread are replaced by new prompts
  max_refills: int = 4  # how often, a step
  mask_truncated_completions: bool = False
  overlong_buffer: int | None = (
    None  # tokens of soft penalty before the limit; 0: a fifth of the limit, as DAPO's 4,096 of 20,480
  )

  trainable: ClassVar = ('policy',)
  heads: ClassVar = {'policy': ('lm',), 'ref': ('lm',)}
  reads: ClassVar = ''
  rows_together: ClassVar = 1

  def __post_init__(self):
    for key, choices in CHOICES.items():
      check_key(getattr(self, key) in choices, key, f'{getattr(self, key)!r} is none of {", ".join(choices)}')
    for key in ('num_generations', 'num_iterations', 'num_minibatches', 'ref_model_sync_updates', 'max_refills'):
      value = getattr(self, key)
      check_key(value is None or value >= 1, key, f'{value} must be at least 1')
    for key in ('epsilon', 'epsilon_high', 'cispo_cap', 'tis_cap', 'entropy_coef_step', 'entropy_coef_max'):
      value = getattr(self, key)
      check_key(value is None or value > 0, key, f'{value} must be positive')
    for key in ('beta', 'entropy_coef', 'entropy_target'):
      value = getattr(self, key)
      check_key(value is None or value >= 0, key, f'{value} must not be negative')
    check_key(self.num_generations > 1, 'num_generations', 'a group of one has no baseline: use 2 or more')
    high = self.high
    check_key(self.delta is None or self.delta > 1 + high, 'delta', f'{self.delta} must be above 1 + epsilon_high = {1 + high}')
    ema = self.ref_model_ema
    check_key(ema is None or 0 < ema < 1, 'ref_model_ema', f'{ema} is not in (0, 1)')
    check_key(
      self.kl_estimator != 'k1' or self.kl_in == 'reward' or not self.beta,
      'kl_estimator',
      'k1 in a loss has zero expected gradient; use k2 or k3, or kl_in reward',
    )
    updates = self.num_iterations * self.num_minibatches
    key = 'num_minibatches' if self.num_minibatches > 1 else 'num_iterations'
    check_key(self.surrogate != 'reinforce' or updates == 1, key, 'REINFORCE makes one update a rollout: it has no ratio')
    check_key(
      not self.adaptive or self.entropy_coef <= self.entropy_coef_max,
      'entropy_coef',
      f'{self.entropy_coef} is above entropy_coef_max',
    )
    limit, buffer = self.given.max_completion_length, self.overlong_buffer
    if buffer == 0:
      buffer = max(1, limit // 5)
      object.__setattr__(self, 'overlong_buffer', buffer)
    check_key(
      buffer is None or 0 < buffer <= limit, 'overlong_buffer', f'{buffer} is not within rollout.max_completion_length {limit}'
    )
    check_key(
      buffer is None or 'overlong' not in self.given.reward_names,
      'overlong_buffer',
      "the reward function 'overlong' is set too: the penalty would count twice",
    )
    if self.multi_objective_aggregation == 'normalize_then_sum':
      key = 'multi_objective_aggregation'
      check_key(self.advantage_estimator == 'group', key, 'normalize_then_sum is for advantage_estimator group')
      check_key(buffer is None, key, 'normalize_then_sum has no place for overlong_buffer: use the reward function overlong')
      check_key(self.kl_in == 'loss' or not self.beta, key, 'normalize_then_sum has no place for a KL in the reward')

  @property
  def high(self) -> float:
    return self.epsilon if self.epsilon_high is None else self.epsilon_high

  @property
  def adaptive(self) -> bool:
    return self.entropy_target is not None

  @property
  def one_update(self) -> bool:
    return self.num_iterations * self.num_minibatches == 1

  @property
  def kl_in_reward(self) -> bool:
    return bool(self.beta) and self.kl_in == 'reward'

  @property
  def refers(self) -> bool:
    return bool(self.beta)

  @property
  def sources(self) -> dict[str, int]:
    return {'rollout': self.num_generations}

  @property
  def update_rows(self) -> int:
    return self.num_generations

  def inert(self) -> dict[str, str]:
    """key -> why it cannot act beside the others."""
    dead = {}

    def drop(condition: bool, why: str, *keys: str):
      dead.update({key: why for key in keys if condition})

    drop(self.one_update, 'one update a rollout: the ratio is 1',
         'epsilon', 'epsilon_high', 'delta', 'importance_sampling_level')  # fmt: skip
    drop(self.one_update and self.cispo_cap >= 1, 'one update a rollout: the ratio is 1', 'cispo_cap')
    drop(self.surrogate != 'clip', f'surrogate {self.surrogate} does not clip', 'epsilon', 'epsilon_high', 'delta')
    drop(self.surrogate != 'cispo', f'surrogate {self.surrogate} has no such cap', 'cispo_cap')
    drop(self.surrogate == 'reinforce', 'REINFORCE has no ratio', 'importance_sampling_level')
    whitened = self.advantage_estimator == 'reinforce_pp'
    drop(whitened, 'reinforce_pp whitens over the tokens of the step', 'scale_rewards', 'multi_objective_aggregation')
    drop(not whitened, f'advantage_estimator is {self.advantage_estimator}', 'reinforce_pp_baseline')
    drop(self.multi_objective_aggregation == 'normalize_then_sum', 'every reward is normalised by itself', 'scale_rewards')
    drop(not self.beta, 'beta is 0',
         'kl_estimator', 'kl_in', 'kl_importance_weighted', 'ref_model_sync_updates', 'ref_model_ema')  # fmt: skip
    drop(self.kl_in_reward, 'the KL is in the reward, where no ratio weighs it', 'kl_importance_weighted')
    drop(self.one_update and self.kl_estimator == 'k2', 'one update a rollout: k2 is weighed by the value of the ratio, which is 1',
         'kl_importance_weighted')  # fmt: skip
    drop(not self.adaptive, 'entropy_target is None', 'entropy_coef_step', 'entropy_coef_max')
    drop(not self.dynamic_sampling, 'dynamic_sampling is off', 'max_refills')
    return dead

  def formula(self) -> list[str]:
    """The loss as it will be computed, for --explain."""
    low = f'{1 - self.epsilon:g}' if self.epsilon < 1 else '0 (the lower bound never acts: a ratio is positive)'
    ratio = 'r = exp(logp - logp_old) a token'
    if self.importance_sampling_level == 'sequence':
      ratio = 'r = exp(mean over the completion of logp - logp_old), with the gradient of each token'
    if self.one_update:
      ratio = 'r = 1 in value, with the gradient of logp: one update a rollout, so nothing is ever clipped'
    dual = '' if self.delta is None else f', at most -{self.delta:g} A where A < 0'
    surrogate = {
      'clip': f'max(-A r, -A clip(r)){dual}; clip interval of r: [{low}, {1 + self.high:g}]',
      'cispo': f'-stop_grad(min(r, {self.cispo_cap:g})) A logp; no clip',
      'reinforce': '-A logp; no ratio, no clip',
    }[self.surrogate]
    denominator = {
      'token_mean': 'M, the masked tokens of the update',
      'sequence_mean': 'N times the tokens of the own completion',
      'sequence_sum': 'N, the completions of the update',
      'fixed_length': f'N times rollout.max_completion_length = {self.given.max_completion_length}',
    }[self.aggregation]
    scale = {'group': 'std of the group + 1e-4', 'batch': 'std of the step + 1e-4', 'none': '1'}[self.scale_rewards]
    rewards = ' + '.join(f'{w:g} {n}' for w, n in zip(self.given.reward_weights, self.given.reward_names))
    if self.overlong_buffer is not None:
      limit = self.given.max_completion_length
      rewards += f' + overlong (0 up to {limit - self.overlong_buffer} tokens, falling to -1 at {limit})'
    if self.kl_in_reward and self.advantage_estimator != 'reinforce_pp':
      rewards += f' - {self.beta:g} sum of {self.kl_estimator} over the completion'
    advantage = {
      'group': f'A = (R - mean of the group) / ({scale})',
      'leave_one_out': f'A = (R - mean of the others of the group) / ({scale})',
      'reinforce_pp': f'A_t = whiten over the tokens of the step (R{" - mean of the group" * self.reinforce_pp_baseline}'
      + f' - {self.beta:g} sum over s >= t of {self.kl_estimator}_s' * self.kl_in_reward
      + ')',
    }[self.advantage_estimator]
    if self.multi_objective_aggregation == 'normalize_then_sum':
      advantage = 'A = weighted sum of each reward normalised in its group, over its std in the step'
    kl = 'none: no reference is kept'
    if self.beta:
      weighted = ', importance-weighted' * self.kl_importance_weighted
      kl = f'{self.beta:g} {self.kl_estimator}(policy, reference) in the {self.kl_in}{weighted}'
      kl += f'; reference {self.told()}'
    entropy = f'bonus {self.entropy_coef:g}' if self.entropy_coef else 'no bonus'
    if self.adaptive:
      step, top = self.entropy_coef_step, self.entropy_coef_max
      entropy = f'bonus from {self.entropy_coef:g}, by {step:g} a step within [0, {top:g}] towards {self.entropy_target:g} nats'
    lines = [f'surrogate: {surrogate}', f'ratio: {ratio}', f'reward: R = {rewards}', f'advantage: {advantage}',
             f'denominator: {denominator}', f'KL: {kl}', f'entropy: {entropy}']  # fmt: skip
    if self.tis_cap is not None:
      lines.append(f'sampler against trainer: the surrogate times stop_grad(min(exp(logp_old - logp_sample), {self.tis_cap:g}))')
    if self.dynamic_sampling:
      lines.append(
        f'groups without spread: replaced by new prompts, at most {self.max_refills} refills a step, masked where none is left'
      )
    if self.mask_truncated_completions:
      lines.append('truncated completions: not trained')
    return lines

  def init_aux(self):
    return {'entropy_coef': jnp.float32(self.entropy_coef)} if self.adaptive else {}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    """logp_old only where several updates make it differ from the policy, or prepare reads it; logp_ref only where it is weighed."""
    if not self.one_update or self.kl_in_reward:
      rows = rows.replace(logp_old_NT=nets['policy'].logp(params['policy'], rows)[0])
    if self.beta:
      rows = rows.replace(logp_ref_NT=nets['ref'].logp(frozen['ref'], rows)[0])
    return rows

  def prepare(self, aux, batch: Batch):
    G, given = self.num_generations, self.given
    reward, has = advantages.combine_rewards(batch.rewards_NR, batch.has_reward_NR, batch.failed_NR, given.reward_weights, G)
    spread = advantages.group_statistics(reward, has, G)[2]  # of the rewards alone: a penalty makes no group worth learning from
    metrics = rollout_metrics(batch, reward, has, given.reward_names, G)  # of completions as sampled, before any filter
    kept = has
    if self.mask_truncated_completions:
      kept = kept * (1 - batch.truncated_N.astype(jnp.float32))
    if self.dynamic_sampling:  # what the last refill left over
      kept = kept * jnp.repeat(spread[:, 0], G)
    mask = batch.mask_NT * kept[:, None]
    shaped = reward
    if self.overlong_buffer is not None:
      penalty = losses.soft_overlong(batch.mask_NT.sum(axis=1), given.max_completion_length, self.overlong_buffer)
      shaped = shaped + penalty
      metrics['overlong_penalty'] = Mean(penalty.sum(), float(penalty.shape[0]))
    penalty_NT = jnp.zeros_like(mask)
    if self.kl_in_reward:
      ref = jnp.where(
        batch.mask_NT > 0, batch.logp_ref_NT, batch.logp_old_NT
      )  # beyond the completion the two may differ without bound
      penalty_NT = self.beta * batch.mask_NT * losses.kl_estimate(batch.logp_old_NT, ref, self.kl_estimator)
      metrics['kl'] = Mean(jnp.sum(batch.mask_NT * losses.kl_estimate(batch.logp_old_NT, ref, 'k3')), batch.mask_NT.sum())
      if self.advantage_estimator != 'reinforce_pp':
        shaped = shaped - penalty_NT.sum(axis=1)
    if self.multi_objective_aggregation == 'normalize_then_sum':
      advantage = advantages.normalised_sum(batch.rewards_NR, batch.has_reward_NR, has, given.reward_weights, G)[:, None] * mask
    elif self.advantage_estimator == 'reinforce_pp':
      if self.reinforce_pp_baseline:
        shaped = shaped - jnp.repeat(advantages.group_statistics(shaped, has, G)[0][:, 0], G)
      advantage = advantages.whiten(advantages.rewards_to_go(shaped, penalty_NT), mask)
    else:
      leave_one_out = self.advantage_estimator == 'leave_one_out'
      values = advantages.group_advantages(shaped, has, G, self.scale_rewards, leave_one_out=leave_one_out, spread_B1=spread)
      advantage = values[:, None] * mask
    batch = batch.replace(reward_N=reward, has_reward_N=has, mask_NT=mask, advantage_NT=advantage)
    return batch, aux, metrics

  def loss(self, nets, params, frozen, aux, batch: Batch):
    coef = aux['entropy_coef'] if self.adaptive else self.entropy_coef
    bonus = self.adaptive or self.entropy_coef > 0
    logp, entropy = nets['policy'].logp(params['policy'], batch, entropy=True, entropy_gradient=bonus)
    mask, tokens, own = batch.mask_NT, batch.mask_NT.sum(), jax.lax.stop_gradient(logp)

    def inside(x):  # a weight of 0 does not undo an exp that overflowed on a prompt token
      return jnp.where(mask > 0, x, own)

    # With one update the policy is still the one that sampled: no pass over the rows is spent on the old one.
    old = own if self.one_update else inside(batch.logp_old_NT)
    sampled = inside(batch.logp_sample_NT)
    ratio = losses.importance_ratio(logp, old, mask, batch.segment_NT, self.importance_sampling_level)
    match self.surrogate:
      case 'clip':
        policy_loss, clipped = losses.clipped_surrogate(ratio, batch.advantage_NT, self.epsilon, self.high, self.delta)
      case 'cispo':
        policy_loss, clipped = losses.capped_reinforce(logp, ratio, batch.advantage_NT, self.cispo_cap)
      case _:
        policy_loss, clipped = -batch.advantage_NT * logp, {}
    none = jnp.zeros_like(mask)
    low, high = clipped.get('low', none), clipped.get('high', none)

    def masked(x):
      return Mean(jnp.sum(mask * x), tokens)

    difference = jnp.abs(old - sampled)
    metrics = {
      'entropy': masked(jax.lax.stop_gradient(entropy)),
      'clip_ratio/low_mean': masked(low),
      'clip_ratio/high_mean': masked(high),
      'clip_ratio/region_mean': masked(low + high),
      'sampling/logp_difference/mean': masked(difference),
      'sampling/logp_difference/max': Max(difference.max()),
    }
    if 'dual' in clipped:
      metrics['clip_ratio/dual_mean'] = masked(clipped['dual'])
    if self.tis_cap is not None:
      weight = jax.lax.stop_gradient(jnp.exp(old - sampled))
      policy_loss = policy_loss * jnp.minimum(weight, self.tis_cap)
      metrics['sampling/tis_capped_ratio'] = masked((weight > self.tis_cap).astype(jnp.float32))
    metrics['policy_loss'] = Sum(jnp.sum(batch.weight_NT * policy_loss))
    loss = policy_loss
    if self.beta and not self.kl_in_reward:
      ref = inside(batch.logp_ref_NT)
      kl = losses.kl_estimate(logp, ref, self.kl_estimator)
      metrics['kl'] = masked(losses.kl_estimate(own, ref, 'k3'))
      if self.kl_importance_weighted:  # both then give r k1 grad logp, the gradient of KL(policy || reference)
        weight = jnp.exp(logp - old)
        kl = kl * (weight if self.kl_estimator == 'k3' else jax.lax.stop_gradient(weight))
      loss = loss + self.beta * kl
    if bonus:
      loss = loss - coef * entropy
      metrics['entropy_coef'] = Mean(jnp.float32(coef), jnp.float32(1))
    return jnp.sum(batch.weight_NT * loss), metrics

  def adapt(self, aux, metrics):
    """The entropy's coefficient takes one step up where the step's mean entropy was below the target, else down (2505.22312)."""
    if not self.adaptive:
      return aux
    entropy = metrics['entropy'].total / jnp.maximum(metrics['entropy'].count, 1)
    change = jnp.where(entropy < self.entropy_target, self.entropy_coef_step, -self.entropy_coef_step)
    return {'entropy_coef': jnp.clip(aux['entropy_coef'] + change, 0.0, self.entropy_coef_max).astype(jnp.float32)}
