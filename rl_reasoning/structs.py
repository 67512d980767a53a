"""The containers that every module passes around, and the shape letters, declared once.

Letters: B prompts, G group, N rows (= B G), T time, C completion time, L layers, D model, F mlp, V vocabulary,
K key/value heads, Q query heads per K, H head dim, R reward functions. A name ends in its letters where its rank is not obvious.

Every [N, T] field is aligned to the token it speaks of: `logp_old_NT[n, t]` is the log-probability of `tokens[n, t]` given the
tokens before it, so column 0 of a row is never trained.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
PyTree = Any
Maybe = Any  # an Array, or None where the field is absent

ROLLOUT, DATA = 0, 1  # values of Batch.source_N


@struct.dataclass
class Batch:
  """Rows to score and learn from. Absent fields are None; rows of one prompt are adjacent.

  `mask_NT` marks, by position, the tokens the policy itself sampled or is to imitate, the end token included. `segment_NT` is 0 on
  padding and counts packed sequences from 1. A missing reward is `has_reward_NR == 0`, never NaN.
  """

  tokens: Array  # [N, T] int32
  segment_NT: Array  # int32, 0 is padding
  position_NT: Array  # int32, counts within a segment
  mask_NT: Array  # float32, 0 or 1
  source_N: Array  # int32, ROLLOUT or DATA
  group_N: Array  # int32, prompt id within the step
  logp_sample_NT: Maybe = None  # as the sampler computed it
  logp_old_NT: Maybe = None  # as the trainer computes it before the step's first update
  logp_ref_NT: Maybe = None
  rewards_NR: Maybe = None  # one column a reward function
  has_reward_NR: Maybe = None
  failed_NR: Maybe = None  # 1 where the function crashed: no verdict, even if it did on a whole group
  reward_N: Maybe = None  # made by prepare
  has_reward_N: Maybe = None
  truncated_N: Maybe = None  # 1 where the completion was cut at the limit
  advantage_NT: Maybe = None
  weight_NT: Maybe = None  # written by train_step.weigh alone
  extras: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Rollout:
  """Completions of B prompts, G each; row n belongs to prompt n // G."""

  tokens_NC: Array  # int32; after the end token: 0
  logp_NC: Array  # float32, log-probability under the distribution sampled from; 0 after the end
  length_N: Array  # int32, the end token counted
  truncated_N: Array  # bool, no end token within the limit
  # object [N]: int32 [tokens of prompt and completion but the last, layers, k], the experts of each; None where they are not recorded
  chosen_N: Maybe = None


@struct.dataclass
class TrainState:
  """All that a run is. Everything but `frozen` goes into the checkpoint; `frozen` is reloaded from its source."""

  step: int = struct.field(pytree_node=False)
  cursor: dict[str, int] = struct.field(pytree_node=False)  # items consumed per data set
  updates: Array  # int32, optimizer updates so far
  params: dict[str, PyTree]  # role -> weights with gradients
  opt: dict[str, PyTree]  # role -> optax state
  aux: PyTree  # the objective's own state
  moving: dict[str, PyTree]  # role -> weights that follow `params` without gradients
  frozen: dict[str, PyTree]  # role -> weights that never change


@struct.dataclass
class Mean:
  """A metric that merges by adding: value = total / count. Count 0 means that there was nothing to measure."""

  total: Array | float
  count: Array | float


@struct.dataclass
class Max:
  value: Array


@struct.dataclass
class Min:
  value: Array


@struct.dataclass
class Sum:
  """What the update's weights already average: adds over micro-batches, and is averaged over updates."""

  value: Array
