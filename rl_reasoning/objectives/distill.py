"""Distillation (GKD, 2306.13649): the policy learns, token by token, the distribution of a teacher, on samples of its own and on data.

Sequence-level distillation, on what the teacher has written and a filter has kept, is `sft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import losses, model
from rl_reasoning.advantages import AGGREGATIONS
from rl_reasoning.objectives.keys import check_key
from rl_reasoning.objectives.rollout_metrics import length_metrics, rollout_rows
from rl_reasoning.structs import ROLLOUT, Array, Batch, Mean, Sum


@dataclasses.dataclass(frozen=True)
class Distill:
  """Symbols and defaults: objectives.md. P is the teacher's distribution of a token, Q the policy's, on the ids that both know: published
  checkpoints of one family pad their embeddings differently. The loss is the mean of the divergence over the policy's own samples and that
  over rows from data, weighed by `on_policy_fraction` and the rest. Samples have no gradient."""

  name: str = 'distill'
  jsd_beta: float = 0.5  # 0: KL(P || Q), the forward one; 1: KL(Q || P), the reverse one; between: JSD
  num_generations: int = 1  # rows a prompt
  on_policy_fraction: float = 1.0  # the share of them that the policy samples; the others are demonstrations, from the same data
  temperature: float = 1.0  # of teacher and policy in the loss; that of sampling is rollout.temperature
  teacher_top_k: int = 0  # the teacher's likeliest ids, and one bucket for all others; 0: the whole vocabulary
  aggregation: str = 'token_mean'

  trainable: ClassVar = ('policy',)
  frozen: ClassVar = ('teacher',)
  moving: ClassVar = ()
  heads: ClassVar = {'policy': ('lm',), 'teacher': ('lm',)}
  rows_together: ClassVar = 1
  num_iterations: ClassVar = 1
  num_minibatches: ClassVar = 1
  train_on_prompt: ClassVar = False
  dynamic_sampling: ClassVar = False
  max_refills: ClassVar = 0

  def __post_init__(self):
    G, share = self.num_generations, self.on_policy_fraction
    check_key(0 <= self.jsd_beta <= 1, 'jsd_beta', f'{self.jsd_beta} is not in [0, 1]')
    check_key(G >= 1, 'num_generations', f'{G} must be at least 1')
    check_key(0 <= share <= 1, 'on_policy_fraction', f'{share} is not in [0, 1]')
    check_key(abs(share * G - self.own) < 1e-6, 'on_policy_fraction',
              f'{share} of objective.num_generations = {G} rows a prompt are {share * G:g}, not a number of rows')  # fmt: skip
    check_key(self.temperature > 0, 'temperature', f'{self.temperature} must be positive')
    check_key(self.teacher_top_k >= 0, 'teacher_top_k', f'{self.teacher_top_k} must not be negative')
    check_key(self.aggregation in AGGREGATIONS, 'aggregation', f'{self.aggregation!r} is none of {", ".join(AGGREGATIONS)}')
    check_key(
      self.own == G or self.aggregation != 'fixed_length',
      'aggregation',
      "fixed_length divides by the rollout's limit, which rows from data do not have",
    )

  @property
  def own(self) -> int:
    """Rows a prompt that the policy samples."""
    return round(self.on_policy_fraction * self.num_generations)

  @property
  def sources(self) -> dict[str, int]:
    rows = {'rollout': self.own, 'data': self.num_generations - self.own}
    return {source: count for source, count in rows.items() if count}

  @property
  def update_rows(self) -> int:
    return self.num_generations

  @property
  def reads(self) -> str:
    return 'demonstrations' if 'data' in self.sources else ''

  def inert(self) -> dict[str, str]:
    return {}

  def formula(self) -> list[str]:
    """The loss as it will be computed, for --explain."""
    b, t = self.jsd_beta, self.temperature
    mixture = f'{b:g} KL(P || M) + {1 - b:g} KL(Q || M), M = {b:g} P + {1 - b:g} Q'
    loss = 'KL(P || Q)' if b == 0 else 'KL(Q || P)' if b == 1 else mixture
    over = 'the whole vocabulary'
    if self.teacher_top_k:
      over = f"the teacher's {self.teacher_top_k} likeliest tokens and one bucket for all others"
    rows = {'rollout': f"{self.own} of the policy's own samples", 'data': f'{self.num_generations - self.own} from data'}
    means = {'rollout': "the mean over the policy's own samples", 'data': 'that over rows from data'}
    weights = {'rollout': self.own / self.num_generations, 'data': 1 - self.own / self.num_generations}
    denominator = {
      'token_mean': 'M, the masked tokens',
      'sequence_mean': 'N times the tokens of the own completion',
      'sequence_sum': 'N, the completions',
      'fixed_length': 'N times rollout.max_completion_length',
    }[self.aggregation]
    lines = [
      f'loss: {loss} a token, P = the teacher, Q = the policy',
      f'distributions: softmax(logits{f" / {t:g}" * (t != 1)}) over {over}',
      f'rows a prompt: {" and ".join(rows[source] for source in self.sources)}',
      f'denominator: {denominator} of the update' + ', of each kind of rows by itself' * (len(self.sources) == 2),
    ]
    if len(self.sources) == 2:
      lines.append(f'total: {" + ".join(f"{weights[source]:g} {means[source]}" for source in self.sources)}')
    return lines

  def init_aux(self):
    return {}

  def distribution(self, logits: Array, size: int) -> Array:
    """Log-probabilities over the first `size` ids."""
    return jax.nn.log_softmax(logits[..., :size] / self.temperature, axis=-1)

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    """Of the teacher the buckets, where there are few: [N, T, K] stays in memory, and its logits need not be made again in the update.
    Over the whole vocabulary the loss runs the teacher, since [N, T, V] would not stay."""
    if not self.teacher_top_k:
      return rows
    teacher = nets['teacher'].output(frozen['teacher'], rows)
    size = min(teacher.head.shape[0], model.head(params['policy']).shape[0])

    def likeliest(logits):
      p = self.distribution(logits, size)
      ids = jax.lax.top_k(p, min(self.teacher_top_k, size))[1]
      return ids, losses.buckets(p, ids)

    ids, logp = model.over_vocabulary(likeliest, rows, [teacher])
    return rows.replace(extras={**rows.extras, 'teacher_ids': ids, 'teacher_logp': logp})

  def prepare(self, aux, batch: Batch):
    alive = jnp.any(batch.mask_NT > 0, axis=1)
    metrics = {'frac_on_policy': Mean((alive & (batch.source_N == ROLLOUT)).sum(), alive.sum())}
    if self.own:
      metrics |= length_metrics(rollout_rows(batch, self.own, self.num_generations))
    return batch, aux, metrics

  def compare(self, p: Array, q: Array, logits: Array, token: Array) -> dict[str, Array]:
    """What there is to say of each token: the divergence, and without gradients what the metrics are made of. Of the policy, at temperature
    1, how likely the token is and the entropy."""
    still = jax.lax.stop_gradient
    fixed, logp = still(q), jax.nn.log_softmax(still(logits), axis=-1)
    return {
      'divergence': losses.jensen_shannon(p, q, self.jsd_beta),
      'kl/forward': losses.kl_divergence(p, fixed),
      'kl/reverse': losses.kl_divergence(fixed, p),
      'teacher/entropy': -jnp.sum(jnp.exp(p) * p, axis=-1),
      'entropy': -jnp.sum(jnp.exp(logp) * logp, axis=-1),
      'nll': -jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0],
    }

  def loss(self, nets, params, frozen, aux, batch: Batch):
    policy = nets['policy'].output(params['policy'], batch)
    outputs, arrays = [policy], [batch.tokens]
    if self.teacher_top_k:
      arrays += [batch.extras['teacher_ids'], batch.extras['teacher_logp']]
      size = min(policy.head.shape[0], model.head(frozen['teacher']).shape[0])

      def of_buckets(logits, token, ids, p):
        return self.compare(p, losses.buckets(self.distribution(logits, size), ids), logits, token)

      function: Callable[..., dict[str, Array]] = of_buckets
    else:
      outputs.append(nets['teacher'].output(frozen['teacher'], batch))
      size = min(output.head.shape[0] for output in outputs)

      def of_all(logits, teacher, token):
        return self.compare(self.distribution(teacher, size), self.distribution(logits, size), logits, token)

      function = of_all
    found: dict[str, Any] = model.over_vocabulary(function, batch, outputs, *arrays)
    own_rows, mask, weight = (batch.source_N == ROLLOUT)[:, None], batch.mask_NT, batch.weight_NT
    tokens = mask.sum()
    metrics: dict[str, Any] = {name: Mean(jnp.sum(mask * x), tokens) for name, x in found.items()}
    if self.teacher_top_k:  # of P
      metrics['teacher/kept'] = Mean(jnp.sum(mask * -jnp.expm1(batch.extras['teacher_logp'][..., -1])), tokens)
    loss = weight * found['divergence']
    if len(self.sources) == 2:  # the weights of each source add up to 1
      share = self.own / self.num_generations
      metrics |= {'loss/on_policy': Sum(jnp.sum(loss * own_rows)), 'loss/data': Sum(jnp.sum(loss * ~own_rows))}
      loss = loss * jnp.where(own_rows, share, 1 - share)
    return jnp.sum(loss), metrics

  def adapt(self, aux, metrics):
    return aux
