"""Proximal policy optimisation (PPO, 1707.06347) of a language model: Ziegler 2019 (1909.08593), InstructGPT (2203.02155)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import advantages, losses
from rl_reasoning.config import check
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.keys import check_key
from rl_reasoning.objectives.reference import Reference
from rl_reasoning.objectives.rollout_metrics import rollout_metrics, rollout_rows
from rl_reasoning.structs import ROLLOUT, Array, Batch, Max, Mean, Sum

CHOICES = {
  'aggregation': advantages.AGGREGATIONS,
  'critic': ('own', 'shared'),
  'kl_controller': ('fixed', 'adaptive'),
  'kl_estimator': ('k1', 'k2', 'k3'),
  'score_normalization': ('none', 'running'),
}
KL_ERROR_BOUND = 0.2  # of the controller's proportional error (Ziegler 2019)


def read_before(scores_NT: Array, batch: Batch) -> Array:
  """V_t [N, T]: the value of the state in which token t was chosen, which is what the scalar head says after token t - 1; 0 where a
  sequence begins and on padding. Read at t itself, the critic would have seen the action that it is to judge."""
  known = (batch.segment_NT > 0) & (batch.position_NT > 0)
  return jnp.where(known, jnp.pad(scores_NT[:, :-1], ((0, 0), (1, 0))), 0.0)


@dataclasses.dataclass(frozen=True)
class Ppo(Reference):
  """Symbols and defaults: objectives.md. Reward of a token: -kl_coef * KL, and on the completion's last one the score too. The loss is
  sum(weight * (surrogate + vf_coef * value loss - entropy_coef * entropy)) over rows of the rollout, + ptx_coef * sum(weight * -logp)
  over rows from data."""

  given: Given
  name: str = 'ppo'
  num_generations: int = 8  # completions a prompt
  num_iterations: int = 1  # passes over a rollout
  num_minibatches: int = 1  # updates a pass
  cliprange: float = 0.2
  delta: float | None = None  # dual clip: bound of the ratio where A < 0
  tis_cap: float | None = None  # truncated importance sampling between sampler and trainer
  critic: str = 'own'  # own parameters | shared: a scalar head on the policy's trunk
  cliprange_value: float = 0.2  # in units of the value
  vf_coef: float = 0.1  # a critic of its own has an optimizer of its own, and Adam does not see it: only optim.grad_clip does
  gamma: float = 1.0
  lam: float = 0.95
  kl_coef: float = 0.05  # weight of the KL in the reward; 0: no reference is kept. Where the adaptive controller starts
  kl_estimator: str = 'k1'  # k1 | k2 | k3
  kl_controller: str = 'fixed'  # fixed | adaptive
  kl_target: float = 6.0  # nats a completion; with the horizon, Ziegler's
  kl_horizon: int = 10_000  # completions
  ref_model_sync_updates: int | None = None  # the reference moves each time the update count reaches a multiple
  ref_model_ema: float | None = None  # it moves to ema * reference + (1 - ema) * policy; None: to the policy
  score_normalization: str = 'none'  # running: minus the mean, over the std, of every score so far
  score_clip: float | None = None  # bounds the (normalised) score to [-score_clip, score_clip]
  missing_eos_penalty: float | None = None  # subtracted from the score of a completion that was cut at the limit
  whiten_rewards: bool = False  # rewards of tokens over their std in the step
  entropy_coef: float = 0.0
  aggregation: str = 'token_mean'
  ptx_coef: float = 0.0  # weight of the next-token loss on rows from data; InstructGPT: 27.8
  ptx_rows: int = 1  # of them a prompt

  dynamic_sampling: ClassVar = False
  max_refills: ClassVar = 0

  def __post_init__(self):
    for key, choices in CHOICES.items():
      check_key(getattr(self, key) in choices, key, f'{getattr(self, key)!r} is none of {", ".join(choices)}')
    for key in ('num_generations', 'num_iterations', 'num_minibatches', 'ref_model_sync_updates', 'kl_horizon', 'ptx_rows'):
      value = getattr(self, key)
      check_key(value is None or value >= 1, key, f'{value} must be at least 1')
    for key in ('cliprange', 'cliprange_value', 'vf_coef', 'tis_cap', 'kl_target', 'score_clip'):
      value = getattr(self, key)
      check_key(value is None or value > 0, key, f'{value} must be positive')
    for key in ('kl_coef', 'missing_eos_penalty', 'entropy_coef', 'ptx_coef'):
      value = getattr(self, key)
      check_key(value is None or value >= 0, key, f'{value} must not be negative')
    check_key(0 < self.gamma <= 1, 'gamma', f'{self.gamma} is not in (0, 1]')
    check_key(0 <= self.lam <= 1, 'lam', f'{self.lam} is not in [0, 1]')
    top = 1 + self.cliprange
    check_key(self.delta is None or self.delta > top, 'delta', f'{self.delta} must be above 1 + cliprange = {top}')
    ema = self.ref_model_ema
    check_key(ema is None or 0 < ema < 1, 'ref_model_ema', f'{ema} is not in (0, 1)')
    check_key(
      not self.ptx_coef or self.aggregation != 'fixed_length',
      'aggregation',
      "fixed_length divides by the rollout's limit, which the rows of ptx_coef do not have",
    )

  @property
  def shared(self) -> bool:
    return self.critic == 'shared'

  @property
  def one_update(self) -> bool:
    return self.num_iterations * self.num_minibatches == 1

  @property
  def adaptive(self) -> bool:
    return self.kl_coef > 0 and self.kl_controller == 'adaptive'

  @property
  def running(self) -> bool:
    return self.score_normalization == 'running'

  @property
  def refers(self) -> bool:
    return bool(self.kl_coef)

  @property
  def trainable(self) -> tuple[str, ...]:
    return ('policy',) if self.shared else ('policy', 'critic')

  @property
  def heads(self) -> dict[str, tuple[str, ...]]:
    """A reference that becomes the policy has all of its weights."""
    policy = ('lm', 'scalar') if self.shared else ('lm',)
    return {'policy': policy, 'ref': policy if self.moves else ('lm',)} | ({} if self.shared else {'critic': ('scalar',)})

  @property
  def sources(self) -> dict[str, int]:
    return {'rollout': self.num_generations} | ({'data': self.ptx_rows} if self.ptx_coef else {})

  @property
  def update_rows(self) -> int:
    return sum(self.sources.values())

  @property
  def rows_together(self) -> int:
    """A prompt's rollout rows stay with its rows from data: so every minibatch has its share of both."""
    return self.update_rows if self.ptx_coef else 1

  @property
  def reads(self) -> str:
    return 'text' if self.ptx_coef else ''

  def check_step(self, prompts: int) -> None:
    """Raises ConfigError where one step of the controller could take the coefficient to 0 or below."""
    most = KL_ERROR_BOUND * prompts * self.num_generations
    check(
      not self.adaptive or most < self.kl_horizon,
      f"config key 'objective.kl_horizon': {self.kl_horizon} is too short for {prompts * self.num_generations} completions a step: one "
      f'step could take the coefficient to 0 or below; it must be above {most:g}',
    )

  def inert(self) -> dict[str, str]:
    """key -> why it cannot act beside the others."""
    dead = {}

    def drop(condition: bool, why: str, *keys: str):
      dead.update({key: why for key in keys if condition})

    drop(self.one_update, 'one update a rollout: the ratio is 1', 'cliprange', 'delta')
    drop(self.one_update, 'one update a rollout: the value is the old one', 'cliprange_value')
    drop(self.kl_controller == 'fixed', 'kl_controller is fixed', 'kl_target', 'kl_horizon')
    drop(not self.kl_coef, 'kl_coef is 0',
         'kl_estimator', 'kl_controller', 'kl_target', 'kl_horizon', 'ref_model_sync_updates', 'ref_model_ema')  # fmt: skip
    drop(not self.ptx_coef, 'ptx_coef is 0', 'ptx_rows')
    return dead

  def formula(self) -> list[str]:
    """The loss as it will be computed, for --explain."""
    low = f'{1 - self.cliprange:g}' if self.cliprange < 1 else '0 (the lower bound never acts: a ratio is positive)'
    dual = '' if self.delta is None else f', at most -{self.delta:g} A where A < 0'
    surrogate = f'max(-A r, -A clip(r)){dual}; clip interval of r: [{low}, {1 + self.cliprange:g}]'
    ratio = 'r = exp(logp - logp_old) a token'
    value = f'0.5 max((V - returns)^2, (V_old + clip(V - V_old, +-{self.cliprange_value:g}) - returns)^2)'
    if self.one_update:
      ratio = 'r = 1 in value, with the gradient of logp: one update a rollout, so nothing is ever clipped'
      value = '0.5 (V - returns)^2; one update a rollout, so V is V_old and nothing is ever clipped'
    score = ' + '.join(f'{w:g} {n}' for w, n in zip(self.given.reward_weights, self.given.reward_names))
    if self.running:
      score = f'(({score}) - mean) / (std + 1e-4) of every score so far'
    if self.score_clip is not None:
      score = f'clip({score}, +-{self.score_clip:g})'
    if self.missing_eos_penalty:
      score += f' - {self.missing_eos_penalty:g} where the completion was cut at the limit'
    kl, kl_weight = 'none: no reference is kept', 'kl_coef' if self.adaptive else f'{self.kl_coef:g}'
    if self.kl_coef:
      kl = f'{kl_weight} {self.kl_estimator}(logp_old, reference) of each token, in the reward'
      kl += f'; reference {self.told()}'
      if self.adaptive:
        kl += f'; kl_coef from {self.kl_coef:g}, times 1 + clip(KL a completion / {self.kl_target:g} - 1, +-{KL_ERROR_BOUND:g})'
        kl += f' * completions / {self.kl_horizon} a step'
    penalty = f'-{kl_weight} {self.kl_estimator} a token, + ' if self.kl_coef else ''
    reward = f'{penalty}the score on the last token'
    reward += ', all over their std in the step + 1e-4' * self.whiten_rewards
    denominator = {
      'token_mean': 'M, the masked tokens of the update',
      'sequence_mean': 'N times the tokens of the own completion',
      'sequence_sum': 'N, the completions of the update',
      'fixed_length': f'N times rollout.max_completion_length = {self.given.max_completion_length}',
    }[self.aggregation]
    where = "a scalar head on the policy's trunk" if self.shared else 'its own parameters'
    lines = [
      f'surrogate: {surrogate}',
      f'ratio: {ratio}',
      f'score: {score}',
      f'reward: {reward}',
      f'advantage: GAE with gamma {self.gamma:g} and lambda {self.lam:g}, whitened over the tokens of the step; V after the end is 0',
      f'value: {self.vf_coef:g} times {value}; returns = A before whitening + V_old',
      f'critic: {where}',
      f'denominator: {denominator}',
      f'KL: {kl}',
      f'entropy: {f"bonus {self.entropy_coef:g}" if self.entropy_coef else "no bonus"}',
    ]
    if self.tis_cap is not None:
      lines.append(f'sampler against trainer: the surrogate times stop_grad(min(exp(logp_old - logp_sample), {self.tis_cap:g}))')
    if self.ptx_coef:
      rows = f'{self.ptx_rows} row{"s" * (self.ptx_rows > 1)} from data a prompt'
      lines.append(f'pretraining: + {self.ptx_coef:g} times -logp of every token but the first, {rows}, with its own denominator')
    return lines

  def init_aux(self):
    aux = {'kl_coef': jnp.float32(self.kl_coef)} if self.adaptive else {}
    return aux | (dict.fromkeys(('score_count', 'score_mean', 'score_square'), jnp.float32(0)) if self.running else {})

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    """V_old; logp_old only where several updates make it differ from the policy, or the KL reads it; logp_ref only where it is weighed."""
    policy = nets['policy']
    reads_old = not self.one_update or self.kl_coef > 0
    if self.shared and reads_old:
      old, _, scores = policy.logp_and_scores(params['policy'], rows)
    else:
      old = policy.logp(params['policy'], rows)[0] if reads_old else None
      scores = policy.scores(params['policy'], rows) if self.shared else nets['critic'].scores(params['critic'], rows)
    reference = nets['ref'].logp(frozen['ref'], rows)[0] if self.kl_coef else None
    extras = {**rows.extras, 'value': read_before(scores, rows)}
    return rows.replace(logp_old_NT=old, logp_ref_NT=reference, extras=extras)

  def all_rows(self, x: Array) -> Array:
    """The inverse of `rollout_rows`, with 0 in the rows from data."""
    x = x.reshape(-1, self.num_generations, *x.shape[1:])
    return jnp.pad(x, ((0, 0), (0, self.update_rows - self.num_generations)) + ((0, 0),) * (x.ndim - 2)).reshape(-1, *x.shape[2:])

  def final_score(self, aux, reward: Array, has: Array, truncated: Array):
    """(score_N as it enters the reward, aux). The penalty comes last: neither normalised nor clipped away."""
    score = reward
    if self.running:
      count, mean, square = advantages.running_moments(aux['score_count'], aux['score_mean'], aux['score_square'], reward, has)
      score = (score - mean) / (jnp.sqrt(square / jnp.maximum(count - 1, 1)) + advantages.EPSILON)
      aux = {**aux, 'score_count': count, 'score_mean': mean, 'score_square': square}
    if self.score_clip is not None:
      score = jnp.clip(score, -self.score_clip, self.score_clip)
    if self.missing_eos_penalty:
      score = score - self.missing_eos_penalty * truncated.astype(jnp.float32)
    return score * has, aux

  def prepare(self, aux, batch: Batch):
    G, given = self.num_generations, self.given
    rows = rollout_rows(batch, self.num_generations, self.update_rows)
    completions = float(rows.mask_NT.shape[0])
    reward, has = advantages.combine_rewards(rows.rewards_NR, rows.has_reward_NR, rows.failed_NR, given.reward_weights, G)
    metrics = rollout_metrics(rows, reward, has, given.reward_names, G)
    score, new_aux = self.final_score(aux, reward, has, rows.truncated_N)
    sampled, value = rows.mask_NT, rows.extras['value']
    mask = sampled * has[:, None]
    judged = has.sum()
    penalty_NT = jnp.zeros_like(mask)
    if self.kl_coef:
      coef = aux['kl_coef'] if self.adaptive else jnp.float32(self.kl_coef)
      # Beyond the completion the two may differ without bound, and 0 * inf is no 0.
      old, ref = rows.logp_old_NT, jnp.where(sampled > 0, rows.logp_ref_NT, rows.logp_old_NT)
      penalty_NT = coef * sampled * losses.kl_estimate(old, ref, self.kl_estimator)
      metrics['objective/kl'] = Mean(jnp.sum(sampled * (old - ref)), completions)
      metrics['objective/kl_coef'] = Mean(coef, 1.0)
      metrics['kl'] = Mean(jnp.sum(sampled * losses.kl_estimate(old, ref, 'k3')), sampled.sum())  # of a token, as GRPO tells it
    shaping = jnp.sum(penalty_NT, axis=1) * has
    metrics['objective/scores'] = Mean(score.sum(), judged)
    metrics['objective/non_score_reward'] = Mean(-shaping.sum(), judged)
    metrics['objective/rlhf_reward'] = Mean(jnp.sum(score - shaping), judged)
    last = mask * (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)  # the end token, where there is one
    reward_NT = last * score[:, None] - mask * penalty_NT
    if self.whiten_rewards:
      reward_NT = advantages.whiten(reward_NT, mask, centre=False)
    advantage = advantages.gae(reward_NT, value, mask, self.gamma, self.lam)
    returns = advantage + mask * value
    tokens = jnp.maximum(mask.sum(), 1)

    def variance(x):
      return jnp.sum(mask * (x - jnp.sum(mask * x) / tokens) ** 2) / tokens

    spread = variance(returns)  # without it there is nothing to explain
    explained = jnp.where(spread > 0, 1 - variance(advantage) / jnp.where(spread > 0, spread, 1), 0.0)
    metrics['val/explained_variance'] = Mean(explained, (spread > 0).astype(jnp.float32))
    metrics['val/mean'] = Mean(jnp.sum(mask * value), mask.sum())
    metrics['val/returns_mean'] = Mean(jnp.sum(returns), mask.sum())
    batch = batch.replace(
      reward_N=self.all_rows(reward),
      has_reward_N=self.all_rows(has),
      mask_NT=jnp.where((batch.source_N == ROLLOUT)[:, None], self.all_rows(mask), batch.mask_NT),
      advantage_NT=self.all_rows(advantages.whiten(advantage, mask)),
      extras={**batch.extras, 'returns': self.all_rows(returns)},
    )
    return batch, new_aux, metrics

  def loss(self, nets, params, frozen, aux, batch: Batch):
    wanted = {'entropy': True, 'entropy_gradient': self.entropy_coef > 0}
    if self.shared:
      logp, entropy, scores = nets['policy'].logp_and_scores(params['policy'], batch, **wanted)
    else:
      logp, entropy = nets['policy'].logp(params['policy'], batch, **wanted)
      scores = nets['critic'].scores(params['critic'], batch)
    value = read_before(scores, batch)
    mask, weight = batch.mask_NT, batch.weight_NT
    if self.ptx_coef:
      own_rows = (batch.source_N == ROLLOUT)[:, None]
      mask, weight = mask * own_rows, weight * own_rows
    tokens, own = mask.sum(), jax.lax.stop_gradient(logp)

    def inside(x):  # a weight of 0 does not undo an exp that overflowed on a prompt token
      return jnp.where(mask > 0, x, own)

    # With one update policy and critic are still those that scored.
    old = own if self.one_update else inside(batch.logp_old_NT)
    old_value = jax.lax.stop_gradient(value) if self.one_update else batch.extras['value']
    sampled = inside(batch.logp_sample_NT)
    ratio = losses.importance_ratio(logp, old, mask, batch.segment_NT, 'token')
    policy_loss, clipped = losses.clipped_surrogate(ratio, batch.advantage_NT, self.cliprange, self.cliprange, self.delta)
    value_loss, value_clipped = losses.clipped_value_loss(value, old_value, batch.extras['returns'], self.cliprange_value)

    def masked(x):
      return Mean(jnp.sum(mask * x), tokens)

    difference = jnp.abs(old - sampled)
    metrics = {
      'entropy': masked(jax.lax.stop_gradient(entropy)),
      'policy/approxkl': masked(0.5 * (own - old) ** 2),
      'policy/clipfrac': masked(clipped['low'] + clipped['high']),
      'val/clipfrac': masked(value_clipped),
      'sampling/logp_difference/mean': masked(difference),
      'sampling/logp_difference/max': Max(difference.max()),
    }
    if 'dual' in clipped:
      metrics['policy/dual_clipfrac'] = masked(clipped['dual'])
    if self.tis_cap is not None:
      drift = jax.lax.stop_gradient(jnp.exp(old - sampled))
      policy_loss = policy_loss * jnp.minimum(drift, self.tis_cap)
      metrics['sampling/tis_capped_ratio'] = masked((drift > self.tis_cap).astype(jnp.float32))
    policy_loss, value_loss = jnp.sum(weight * policy_loss), jnp.sum(weight * value_loss)
    metrics |= {'loss/policy': Sum(policy_loss), 'loss/value': Sum(value_loss)}
    loss = policy_loss + self.vf_coef * value_loss
    if self.entropy_coef:
      loss = loss - self.entropy_coef * jnp.sum(weight * entropy)
    if self.ptx_coef:
      pretraining = -jnp.sum((batch.weight_NT - weight) * logp)
      metrics['loss/ptx'] = Sum(pretraining)
      loss = loss + self.ptx_coef * pretraining
    return loss, metrics

  def adapt(self, aux, metrics):
    """Ziegler's proportional controller (1909.08593, section 2.2), once a step."""
    if not self.adaptive:
      return aux
    kl = metrics['objective/kl']
    error = jnp.clip(kl.total / kl.count / self.kl_target - 1, -KL_ERROR_BOUND, KL_ERROR_BOUND)
    return {**aux, 'kl_coef': (aux['kl_coef'] * (1 + error * kl.count / self.kl_horizon)).astype(jnp.float32)}
