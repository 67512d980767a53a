"""Learning from preferences without a reward model: DPO (2305.18290) and its family, one loss with named settings; pairs from data, or from
the policy's own samples (online DPO, 2402.04792)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import advantages, losses
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.keys import check_key
from rl_reasoning.objectives.reference import Reference
from rl_reasoning.objectives.rollout_metrics import rollout_metrics
from rl_reasoning.structs import Array, Batch, Mean

SETTINGS: dict[str, dict[str, Any]] = {
  'dpo': {},  # 2305.18290
  'ipo': {'loss_type': 'ipo'},  # 2310.12036
  'hinge': {'loss_type': 'hinge'},  # SLiC, 2305.10425
  'simpo': {'loss_type': 'simpo', 'beta': 2.0},  # 2405.14734; it weighs a mean over tokens, so beta is larger
  'orpo': {'loss_type': 'orpo'},  # 2403.07691
  'kto': {'loss_type': 'kto'},  # 2402.01306
  'cpl': {'loss_type': 'cpl'},  # 2310.13639
  'online_dpo': {'num_generations': 2},  # 2402.04792
}
NOTHING = Given((), (), 0)  # pairs of data read no other section
LOSS_TYPES = ('sigmoid', 'ipo', 'hinge', 'simpo', 'orpo', 'kto', 'cpl')
LOG_RATIO = ('sigmoid', 'ipo', 'hinge')  # the implicit reward is beta times the log-ratio to the reference


@dataclasses.dataclass(frozen=True)
class Preference(Reference):
  """Symbols and defaults: objectives.md. The loss is the mean over the pairs that count; of KTO, over its completions.

  In the batch of an update the row of the preferred completion stands first in each pair. Pairs are never packed, so a sum over a row is a
  sum over its completion. Ties, pairs that miss a row, and prompts whose samples earned the same are masked, and count in nothing.
  """

  given: Given = NOTHING
  name: str = 'dpo'
  loss_type: str = 'sigmoid'  # sigmoid | ipo | hinge | simpo | orpo | kto | cpl
  beta: float = 0.1
  num_generations: int | None = None  # K: the best and the worst of K samples of a prompt make the pair; None: pairs are data
  average_log_prob: bool = False  # the log-ratio is the mean over the completion's tokens, not their sum (2411.15124; TRL's ipo)
  label_smoothing: float = 0.0  # the share of labels that is wrong
  rpo_alpha: float = 0.0  # weight of the preferred completion's mean -logp (2404.19733), which DPO alone may raise
  simpo_gamma: float = 1.0  # the margin that is asked for; half of beta is in use
  orpo_lambda: float = 0.1
  kto_desirable: float = 1.0  # the paper: times the number of desirable rows, 1 to 4/3 of the same of the undesirable ones
  kto_undesirable: float = 1.0
  cpl_alpha: float = 0.1
  cpl_gamma: float = 1.0  # discount a token of the completion
  cpl_lambda: float = 0.5  # weight of the rejected completion in the denominator
  ref_model_sync_updates: int | None = None  # the reference moves each time the update count reaches a multiple
  ref_model_ema: float | None = None  # it moves to ema * reference + (1 - ema) * policy; None: to the policy

  trainable: ClassVar = ('policy',)
  heads: ClassVar = {'policy': ('lm',), 'ref': ('lm',)}
  num_iterations: ClassVar = 1
  num_minibatches: ClassVar = 1
  dynamic_sampling: ClassVar = False
  max_refills: ClassVar = 0

  def __post_init__(self):
    check_key(self.loss_type in LOSS_TYPES, 'loss_type', f'{self.loss_type!r} is none of {", ".join(LOSS_TYPES)}')
    for key in ('beta', 'orpo_lambda', 'kto_desirable', 'kto_undesirable', 'cpl_alpha'):
      check_key(getattr(self, key) > 0, key, f'{getattr(self, key)} must be positive')
    for key in ('rpo_alpha', 'simpo_gamma'):
      check_key(getattr(self, key) >= 0, key, f'{getattr(self, key)} must not be negative')
    for key in ('cpl_gamma', 'cpl_lambda'):
      check_key(0 < getattr(self, key) <= 1, key, f'{getattr(self, key)} is not in (0, 1]')
    e, K, every, ema = self.label_smoothing, self.num_generations, self.ref_model_sync_updates, self.ref_model_ema
    check_key(0 <= e < 0.5, 'label_smoothing', f'{e} is not in [0, 0.5): from 0.5 on, labels say nothing or the opposite')
    check_key(K is None or K >= 2, 'num_generations', f'{K} must be at least 2: fewer make no pair')
    check_key(K is None or self.paired, 'num_generations', 'kto learns from unpaired data')
    check_key(every is None or every >= 1, 'ref_model_sync_updates', f'{every} must be at least 1')
    check_key(ema is None or 0 < ema < 1, 'ref_model_ema', f'{ema} is not in (0, 1)')

  @property
  def paired(self) -> bool:
    return self.loss_type != 'kto'

  @property
  def refers(self) -> bool:
    return self.loss_type in LOG_RATIO or not self.paired

  @property
  def nll_weight(self) -> float:
    return {'orpo': 1.0, 'kto': 0.0}.get(self.loss_type, self.rpo_alpha)

  @property
  def reads(self) -> str:
    if self.num_generations is not None:
      return ''
    return 'rankings' if self.paired else 'unpaired'

  @property
  def sources(self) -> dict[str, int]:
    """Of KTO, too, two rows a prompt: its completion, and a mismatched one for z0, which `prepare` takes out."""
    return {'data': 2} if self.num_generations is None else {'rollout': self.num_generations}

  @property
  def rows_together(self) -> int:
    return 2 if self.paired else 1

  @property
  def update_rows(self) -> int:
    return self.rows_together

  @property
  def aggregation(self) -> str:
    return advantages.UNIT_MEAN if self.paired else 'sequence_mean'

  def inert(self) -> dict[str, str]:
    """key -> why it cannot act beside the others."""
    dead, kind = {}, self.loss_type

    def drop(condition: bool, *keys: str, why: str = f'loss_type {kind} has no such term'):
      dead.update({key: why for key in keys if condition})

    drop(kind in ('orpo', 'cpl'), 'beta')
    drop(kind != 'sigmoid', 'label_smoothing')
    drop(kind not in LOG_RATIO, 'average_log_prob')
    drop(kind == 'kto', 'num_generations', why='kto learns from unpaired data')
    drop(kind == 'kto', 'rpo_alpha', why='kto has no preferred completions')
    drop(kind == 'orpo', 'rpo_alpha', why='orpo has this term already, with weight 1')
    drop(kind != 'simpo', 'simpo_gamma')
    drop(kind != 'orpo', 'orpo_lambda')
    drop(kind != 'kto', 'kto_desirable', 'kto_undesirable')
    drop(kind != 'cpl', 'cpl_alpha', 'cpl_gamma', 'cpl_lambda')
    drop(not self.refers, 'ref_model_sync_updates', 'ref_model_ema', why=f'loss_type {kind} keeps no reference')
    return dead

  def formula(self) -> list[str]:
    """The loss as it will be computed, for --explain."""
    b, e = f'{self.beta:g}', self.label_smoothing
    over = 'the mean' if self.average_log_prob else 'the sum'
    log_ratio = f'{b} h, h = {over} over the completion of logp - logp_ref'
    reward, loss = {
      'sigmoid': (log_ratio, f'-{1 - e:g} log sigmoid(r_w - r_l) - {e:g} log sigmoid(r_l - r_w)' if e else '-log sigmoid(r_w - r_l)'),
      'ipo': (log_ratio, f'(h_w - h_l - {1 / (2 * self.beta):g})^2'),
      'hinge': (log_ratio, 'max(0, 1 - (r_w - r_l))'),
      'simpo': (f'{b} mean over the completion of logp', f'-log sigmoid(r_w - r_l - {self.simpo_gamma:g})'),
      'orpo': (
        f'{self.orpo_lambda:g} lp, lp = the mean over the completion of logp',
        f'-lp_w - {self.orpo_lambda:g} log sigmoid(o_w - o_l), o = log(e^lp / (1 - e^lp))',
      ),
      'kto': (
        f'{b} h, h = the sum over the completion of logp - logp_ref',
        f'{self.kto_desirable:g} (1 - sigmoid({b} (h - z0))) where the label is 1, {self.kto_undesirable:g} (1 - sigmoid({b} (z0 - h)))'
        ' where it is 0; z0 = max(0, mean of h over the mismatched completions of the step), without gradient',
      ),
      'cpl': (
        f'{self.cpl_alpha:g} sum over the completion of {self.cpl_gamma:g}^t logp_t',
        f'-log(e^r_w / (e^r_w + e^({self.cpl_lambda:g} r_l)))',
      ),
    }[self.loss_type]  # fmt: skip
    if self.nll_weight and self.loss_type != 'orpo':
      loss += f' - {self.rpo_alpha:g} mean over the preferred completion of logp'
    pairs = 'of data'
    if self.num_generations is not None:
      rewards = ' + '.join(f'{w:g} {n}' for w, n in zip(self.given.reward_weights, self.given.reward_names))
      pairs = f'the best and the worst of {self.num_generations} samples of a prompt by R = {rewards}; none where R is equal'
    lines = [f'implicit reward: r = {reward}', f'loss: {loss}']
    if self.paired:
      lines = [f'pairs: {pairs}', *lines, 'denominator: the pairs of the update that are no tie']
    else:
      lines.append('denominator: N, the completions of the update')
    return [*lines, f'reference: {self.told() if self.refers else "none is kept"}']

  def init_aux(self):
    return {}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    if not self.paired:  # for z0 alone
      rows = rows.replace(logp_old_NT=nets['policy'].logp(params['policy'], rows)[0])
    if self.refers:
      rows = rows.replace(logp_ref_NT=nets['ref'].logp(frozen['ref'], rows)[0])
    return rows

  def prepare(self, aux, batch: Batch):
    if not self.paired:
      batch, metrics = matched(batch)
      return batch, aux, metrics
    alive = jnp.any(batch.mask_NT > 0, axis=1).astype(jnp.float32)
    if self.num_generations is None:
      batch, metrics = best_and_worst(batch, -batch.extras['rank'], batch.extras['present'] * alive, 2)
      return batch, aux, metrics
    K, given = self.num_generations, self.given
    reward, has = advantages.combine_rewards(batch.rewards_NR, batch.has_reward_NR, batch.failed_NR, given.reward_weights, K)
    metrics = rollout_metrics(batch, reward, has, given.reward_names, K)
    if self.refers:  # of all samples, as they were drawn: those of the pairs are no fair sample
      k3 = losses.kl_estimate(batch.logp_sample_NT, batch.logp_ref_NT, 'k3')
      metrics['kl'] = Mean(jnp.sum(jnp.where(batch.mask_NT > 0, k3, 0.0)), batch.mask_NT.sum())
    batch, more = best_and_worst(batch.replace(reward_N=reward, has_reward_N=has), reward, has * alive, K)
    return batch, aux, metrics | more

  def loss(self, nets, params, frozen, aux, batch: Batch):
    logp, _ = nets['policy'].logp(params['policy'], batch)
    return self.of_pairs(logp, batch) if self.paired else self.of_completions(logp, batch)

  def implicit_reward(self, logp: Array, logp_ref: Any, mask: Array) -> Array:
    """[N], of completions that are not packed: how much better each is held to be. A reference is read where there is one."""
    logps, length = total(logp, mask), jnp.maximum(jnp.sum(mask, axis=1), 1)
    if self.refers:
      h = total(logp - logp_ref, mask)
      return self.beta * (h / length if self.average_log_prob else h)
    if self.loss_type == 'simpo':
      return self.beta * logps / length
    if self.loss_type == 'orpo':
      return self.orpo_lambda * logps / length
    place = jnp.cumsum(mask, axis=1) - mask  # of a token in its completion, from 0
    return self.cpl_alpha * total(self.cpl_gamma**place * logp, mask)

  def of_pairs(self, logp: Array, batch: Batch):
    mask = batch.mask_NT
    logps, length = (x.reshape(-1, 2) for x in (total(logp, mask), jnp.maximum(jnp.sum(mask, axis=1), 1)))
    mean = logps / length  # [U, 2]: the preferred completion, the other
    reward = self.implicit_reward(logp, batch.logp_ref_NT, mask).reshape(-1, 2)
    margin, nll = reward[:, 0] - reward[:, 1], -mean[:, 0]
    weight = batch.weight_NT.reshape(margin.shape[0], -1).sum(axis=1)
    alive = jnp.any(mask.reshape(margin.shape[0], -1) > 0, axis=1).astype(jnp.float32)

    def averaged(x: Array) -> Mean:
      return Mean(jnp.sum(alive * x), alive.sum())

    metrics = {
      'rewards/chosen': averaged(reward[:, 0]),
      'rewards/rejected': averaged(reward[:, 1]),
      'rewards/margins': averaged(margin),
      'rewards/accuracies': averaged(0.5 * (jnp.sign(margin) + 1)),  # equal is half right: a policy that is its reference has 0.5
      'logps/chosen': averaged(logps[:, 0]),
      'logps/rejected': averaged(logps[:, 1]),
    }
    match self.loss_type:
      case 'sigmoid':
        loss = losses.dpo(margin, self.label_smoothing)
      case 'ipo':
        loss = losses.ipo(margin, self.beta)
      case 'hinge':
        loss = losses.hinge(margin)
      case 'simpo':
        loss = losses.dpo(margin - self.simpo_gamma)
      case 'cpl':
        loss = losses.cpl(reward[:, 0], reward[:, 1], self.cpl_lambda)
      case _:
        odds = losses.log_odds(mean)
        ratio = odds[:, 0] - odds[:, 1]
        loss = self.orpo_lambda * losses.dpo(ratio)
        metrics['log_odds_chosen'] = averaged(ratio)
    if self.nll_weight:
      loss = loss + self.nll_weight * nll
      metrics['nll_loss'] = averaged(nll)
    return jnp.sum(weight * loss), metrics

  def of_completions(self, logp: Array, batch: Batch):
    mask, segment = batch.mask_NT, batch.segment_NT
    logps, h = (losses.per_sequence(jnp.where(mask > 0, x, 0.0), segment) for x in (logp, logp - batch.logp_ref_NT))
    z0, label = batch.extras['z0'], batch.extras['label']
    loss = losses.kto(h, z0, label, self.beta, self.kto_desirable, self.kto_undesirable)
    share = mask / jnp.maximum(losses.per_sequence(mask, segment), 1)  # adds up to 1 in each completion

    def averaged(x: Array, side: Array) -> Mean:
      return Mean(jnp.sum(share * side * x), jnp.sum(share * side))

    metrics = {}
    for key, side in (('chosen', label), ('rejected', 1 - label)):
      metrics[f'rewards/{key}'] = averaged(self.beta * h, side)
      metrics[f'logps/{key}'] = averaged(logps, side)
    return jnp.sum(batch.weight_NT * loss), metrics

  def adapt(self, aux, metrics):
    return aux


def total(x_NT: Array, mask_NT: Array) -> Array:
  """[N]: the sum over the masked tokens of each row. What is not finite elsewhere does not count."""
  return jnp.sum(jnp.where(mask_NT > 0, x_NT, 0.0), axis=1)


def best_and_worst(batch: Batch, value_N: Array, has_N: Array, group: int) -> tuple[Batch, dict]:
  """[B group, ...] -> [2 B, ...]: of each prompt the row of the highest value, then that of the lowest, the first one among equals. Pairs
  without a difference are masked. Only rows with `has_N` count."""
  value, has = value_N.reshape(-1, group), has_N.reshape(-1, group) > 0
  best, worst = (jnp.argmax(jnp.where(has, sign * value, -jnp.inf), axis=1) for sign in (1, -1))
  rows = jnp.stack([best, worst], axis=1)

  def take(x: Array) -> Array:
    units = x.reshape(-1, group, *x.shape[1:])
    return jnp.take_along_axis(units, rows.reshape(-1, 2, *(1,) * (x.ndim - 1)), axis=1).reshape(-1, *x.shape[1:])

  batch = jax.tree.map(take, batch)
  differ = advantages.group_statistics(value_N, has_N, group)[2][:, 0]
  two = has.sum(axis=1) >= 2
  metrics = {
    'frac_ties': Mean((two & ~differ).sum(), two.sum()),  # of prompts with two or more rows
    'frac_absent': Mean((~two).sum(), float(two.shape[0])),  # they were too long, or have no verdict
  }
  return batch.replace(mask_NT=batch.mask_NT * jnp.repeat(differ, 2)[:, None].astype(jnp.float32)), metrics


def matched(batch: Batch) -> tuple[Batch, dict]:
  """KTO's rows come in twos, a completion and a mismatched one: [2 B, ...] -> [B, ...] without the latter, from which z0, the reference
  point, is estimated: the KL of the policy to the reference, never below 0. z0 and label go to [N, T], so that rows may be packed."""
  mask = batch.mask_NT
  ratio = jnp.sum(jnp.where(mask > 0, batch.logp_old_NT - batch.logp_ref_NT, 0.0), axis=1).reshape(-1, 2)
  alive = jnp.any(mask > 0, axis=1).reshape(-1, 2)
  z0 = jnp.maximum(0.0, jnp.sum(alive[:, 1] * ratio[:, 1]) / jnp.maximum(alive[:, 1].sum(), 1))
  B = float(alive.shape[0])
  metrics = {
    'kl': Mean(z0, jnp.float32(1)),
    'frac_absent': Mean((~alive[:, 0]).sum(), B),  # they were too long
    'frac_absent_mismatched': Mean((~alive[:, 1]).sum(), B),
  }
  batch = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:])[:, 0], batch.replace(logp_old_NT=None))
  label = batch.extras['label'][:, None] * jnp.ones_like(batch.mask_NT)
  return batch.replace(extras={**batch.extras, 'label': label, 'z0': z0 * jnp.ones_like(batch.mask_NT)}), metrics
