"""Reward models: a scalar head that learns from rankings (InstructGPT, 2203.02155; Llama 2, 2307.09288), from a verdict on each completion
(outcome models, 2110.14168) or from one on each step (process models, 2305.20050, 2312.08935)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rl_reasoning import losses
from rl_reasoning.structs import Array, Batch, Max, Mean, Min, Sum

DECAY = 0.9  # of the moving mean of the demonstrations' scores, a step: scores drift, and the last ten steps say where they are


def shift(aux: Mapping[str, Any]) -> float:
  """What to subtract from the scores of a trained model so that demonstrations have mean 0 (InstructGPT); `aux` is that of its checkpoint.
  0 for pointwise models, whose score is a log-odds with a zero of its own, and before the first step."""
  weight = float(aux['weight']) if 'weight' in aux else 0.0
  return float(aux['mean']) / weight if weight else 0.0


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """The mean over prompts of `losses.ranking_loss`: all pairs of a prompt are one element, or the model overfits to prompts with many.

  The score of a response is read at its last token, the end token. Ties are no pairs, and rankings without a pair count in nothing.
  `aux` follows the mean score of demonstrations, the best-ranked responses: mean / weight is its moving average, free of bias.
  """

  name: str = 'reward_model'
  ranking_size: int = 2  # K, responses of a prompt; shorter rankings are padded
  center_rewards_coefficient: float = 0.0  # weight of (s_w + s_l)^2; 0.01 is in use

  trainable: ClassVar = ('policy',)
  frozen: ClassVar = ()
  moving: ClassVar = ()
  heads: ClassVar = {'policy': ('scalar',)}
  reads: ClassVar = 'rankings'
  aggregation: ClassVar = 'unit_mean'
  num_iterations: ClassVar = 1
  num_minibatches: ClassVar = 1

  def __post_init__(self):
    if self.ranking_size < 2:
      raise ValueError(f"config key 'objective.ranking_size': {self.ranking_size} must be at least 2: fewer make no pair")
    center = self.center_rewards_coefficient
    if center < 0:
      raise ValueError(f"config key 'objective.center_rewards_coefficient': {center} must not be negative")

  @property
  def rows_together(self) -> int:
    return self.ranking_size

  @property
  def update_rows(self) -> int:
    return self.ranking_size

  @property
  def sources(self) -> dict[str, int]:
    return {'data': self.ranking_size}

  def inert(self) -> dict[str, str]:
    return {}

  def formula(self) -> list[str]:
    center = self.center_rewards_coefficient
    lines = ['loss: softplus(-(s_w - s_l - margin))' + f' + {center:g} (s_w + s_l)^2' * bool(center),
             'denominator: the pairs of a ranking that are no tie, then the rankings that have one',
             'score: after the last token of the response']  # fmt: skip
    return lines

  def units(self, x: Array) -> Array:
    """[N, ...] -> [U, K, ...]."""
    return x.reshape(-1, self.ranking_size, *x.shape[1:])

  def pairs(self, batch: Batch) -> Array:
    return losses.preferred_pairs(self.units(batch.extras['rank']), self.units(batch.extras['present']))

  def init_aux(self):
    return {'mean': jnp.float32(0), 'weight': jnp.float32(0)}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    return rows

  def prepare(self, aux, batch: Batch):
    present = self.units(batch.extras['present'])
    count = present.sum(axis=1)
    kept, possible = self.pairs(batch).sum(axis=(1, 2)), count * (count - 1) / 2
    metrics = {
      'frac_ties': Mean((possible - kept).sum(), possible.sum()),  # of pairs
      'frac_absent': Mean((count == 0).sum(), float(count.shape[0])),  # of rankings: they were too long
    }
    alive = jnp.repeat(kept > 0, self.ranking_size).astype(jnp.float32)
    return batch.replace(mask_NT=batch.mask_NT * alive[:, None]), aux, metrics

  def loss(self, nets, params, frozen, aux, batch: Batch):
    scores = nets['policy'].scores(params['policy'], batch)
    score = self.units(jnp.sum(losses.last_token(batch.mask_NT, batch.segment_NT) * scores, axis=1))
    alive = self.units(jnp.any(batch.mask_NT > 0, axis=1).astype(jnp.float32))  # of rankings that count: their responses
    pairs = self.pairs(batch)
    margin = self.units(batch.extras['margin'])[:, 0]
    weight = self.units(batch.weight_NT).sum(axis=(1, 2))
    ranking = losses.ranking_loss(score, pairs, margin, self.center_rewards_coefficient)
    loss = jnp.sum(weight * ranking)

    score = jax.lax.stop_gradient(score)
    difference = score[:, :, None] - score[:, None, :]
    right = 0.5 * (jnp.sign(difference) + 1)  # a tie of scores is half right
    counts = alive.max(axis=1)
    rank = self.units(batch.extras['rank'])
    best = alive * (rank == jnp.min(jnp.where(alive > 0, rank, jnp.inf), axis=1, keepdims=True))
    known = jnp.where(aux['weight'] > 0, best.sum(), 0)
    demonstrations = jnp.sum(best * score)
    metrics = {
      'accuracy': Mean(jnp.sum(counts * losses.mean_over_pairs(right, pairs)), counts.sum()),
      'margin': Mean(jnp.sum(counts * losses.mean_over_pairs(difference, pairs)), counts.sum()),
      'min_reward': Min(jnp.min(jnp.where(alive > 0, score, jnp.inf))),
      'mean_reward': Mean(jnp.sum(alive * score), alive.sum()),
      'max_reward': Max(jnp.max(jnp.where(alive > 0, score, -jnp.inf))),
      'demonstration_reward': Mean(demonstrations, best.sum()),
      'score_drift': Mean(demonstrations - known * aux['mean'] / jnp.maximum(aux['weight'], 1 - DECAY), known),
    }
    if self.center_rewards_coefficient:
      ranking_only = losses.ranking_loss(score, pairs, margin, 0.0)
      metrics['ranking_loss'] = Sum(jnp.sum(weight * ranking_only))
    return loss, metrics

  def adapt(self, aux, metrics):
    total, count = metrics['demonstration_reward'].total, metrics['demonstration_reward'].count
    decay = jnp.where(count > 0, DECAY, 1.0)  # a step without a ranking says nothing
    mean = total / jnp.maximum(count, 1)
    return {'mean': decay * aux['mean'] + (1 - decay) * mean, 'weight': decay * aux['weight'] + (1 - decay)}


@dataclasses.dataclass(frozen=True)
class PointwiseModel:
  """Binary cross-entropy of labels in [0, 1] on sigmoid(score). `prepare` leaves in the mask only the tokens that are judged."""

  name: str

  trainable: ClassVar = ('policy',)
  frozen: ClassVar = ()
  moving: ClassVar = ()
  heads: ClassVar = {'policy': ('scalar',)}
  aggregation: ClassVar = 'token_mean'  # tokens that are judged: every completion, or every step, counts once
  rows_together: ClassVar = 1
  update_rows: ClassVar = 1
  sources: ClassVar = {'data': 1}
  num_iterations: ClassVar = 1
  num_minibatches: ClassVar = 1

  def judged(self, batch: Batch) -> tuple[Array, Array]:
    """(1 at the tokens that are judged, their labels), [N, T]."""
    raise NotImplementedError

  def inert(self) -> dict[str, str]:
    return {}

  def init_aux(self):
    return {}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    return rows

  def prepare(self, aux, batch: Batch):
    mask, label = self.judged(batch)
    absent = jnp.sum(1 - batch.extras['present'])
    batch = batch.replace(mask_NT=mask, extras={**batch.extras, 'target': label})
    return batch, aux, {'frac_absent': Mean(absent, float(mask.shape[0]))}  # of completions: they were too long

  def loss(self, nets, params, frozen, aux, batch: Batch):
    scores, mask, label = nets['policy'].scores(params['policy'], batch), batch.mask_NT, batch.extras['target']
    loss = jnp.sum(batch.weight_NT * losses.binary_cross_entropy(scores, label))
    scores = jax.lax.stop_gradient(scores)
    sided = mask * (label != 0.5)  # what is half right has no right side
    right = 0.5 * (jnp.sign(scores) * jnp.sign(label - 0.5) + 1)  # a probability of 1/2 is half right
    count = mask.sum()
    return loss, {
      'accuracy': Mean(jnp.sum(sided * right), sided.sum()),
      'mean_probability': Mean(jnp.sum(mask * jax.nn.sigmoid(scores)), count),
      'mean_label': Mean(jnp.sum(mask * label), count),
    }

  def adapt(self, aux, metrics):
    return aux


@dataclasses.dataclass(frozen=True)
class OutcomeRewardModel(PointwiseModel):
  name: str = 'outcome_reward_model'

  reads: ClassVar = 'verdicts'

  def judged(self, batch: Batch) -> tuple[Array, Array]:
    last = losses.last_token(batch.mask_NT, batch.segment_NT)
    return last, last * batch.extras['label'][:, None]

  def formula(self) -> list[str]:
    return ['loss: binary cross-entropy of the label on sigmoid(score), the score after the last token of the completion',
            'denominator: N, the completions of the update']  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProcessRewardModel(PointwiseModel):
  name: str = 'process_reward_model'

  reads: ClassVar = 'steps'

  def judged(self, batch: Batch) -> tuple[Array, Array]:
    mask = batch.mask_NT * batch.extras['step']
    return mask, mask * batch.extras['step_label']

  def formula(self) -> list[str]:
    return ['loss: binary cross-entropy of each step on sigmoid(score), the score after the last token of the step',
            'denominator: the steps of the update']  # fmt: skip


SETTINGS = {'reward_model': RewardModel, 'outcome_reward_model': OutcomeRewardModel, 'process_reward_model': ProcessRewardModel}
