"""Supervised fine-tuning: next-token loss on (prompt, chain of thought, completion)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from rl_reasoning.advantages import AGGREGATIONS
from rl_reasoning.structs import Batch, Mean


@dataclasses.dataclass(frozen=True)
class Sft:
  name: str = 'sft'
  train_on_prompt: bool = False  # True is base training: every token but the first
  aggregation: str = 'token_mean'

  trainable: ClassVar = ('policy',)
  frozen: ClassVar = ()
  moving: ClassVar = ()
  heads: ClassVar = {'policy': ('lm',)}
  reads: ClassVar = 'demonstrations'
  sources: ClassVar = {'data': 1}
  update_rows: ClassVar = 1
  rows_together: ClassVar = 1
  num_iterations: ClassVar = 1
  num_minibatches: ClassVar = 1

  def __post_init__(self):
    # fixed_length divides by the rollout's limit, which SFT does not have.
    choices = tuple(a for a in AGGREGATIONS if a != 'fixed_length')
    if self.aggregation not in choices:
      raise ValueError(f"config key 'objective.aggregation': {self.aggregation!r} is none of {', '.join(choices)}")

  def inert(self) -> dict[str, str]:
    return {}

  def formula(self) -> list[str]:
    where = 'every token but the first' if self.train_on_prompt else 'the completion, its end token included'
    denominator = {
      'token_mean': 'M, the masked tokens of the update',
      'sequence_mean': 'N times the tokens of the own row',
      'sequence_sum': 'N, the rows of the update',
    }[self.aggregation]
    return [f'loss: -logp of {where}', f'denominator: {denominator}']

  def init_aux(self):
    return {}

  def score(self, nets, params, frozen, rows: Batch) -> Batch:
    return rows

  def prepare(self, aux, batch: Batch):
    return batch, aux, {}

  def loss(self, nets, params, frozen, aux, batch: Batch):
    logp, _ = nets['policy'].logp(params['policy'], batch)
    loss = -jnp.sum(batch.weight_NT * logp)
    tokens = batch.mask_NT.sum()
    return loss, {'nll': Mean(-jnp.sum(batch.mask_NT * logp), tokens)}

  def adapt(self, aux, metrics):
    return aux
