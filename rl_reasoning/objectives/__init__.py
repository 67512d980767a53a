"""OBJECTIVES: every setting that `objective.name` may pick. An objective is a frozen dataclass whose fields are its config keys.

What the other modules ask of it:
  trainable, frozen, moving   roles with gradients / only read / read and synchronised
  heads                       role -> its heads, see model.HEADS
  reads                       how rows of data become a Batch, see collect.encode; '' where there are none
  sources                     rows per prompt from 'rollout' and from 'data'
  update_rows                 rows per prompt that prepare leaves
  rows_together               of these, rows that no split may separate
  num_iterations, num_minibatches   passes over a step's rows, and updates a pass
  aggregation                 how token losses are weighed, see advantages.weigh
  init_aux() -> aux
  score(nets, params, frozen, rows) -> rows
  prepare(aux, batch) -> batch, aux, metrics
  loss(nets, params, frozen, aux, batch) -> scalar, metrics
  adapt(aux, metrics) -> aux
  inert() -> {key: why it cannot act beside the others}     formula() -> lines for --explain
`given` is no key: resolution.py puts there what an objective reads of other sections. One without it reads no rewards.
"""

import functools

from rl_reasoning.objectives import grpo, preference, reward_model
from rl_reasoning.objectives.distill import Distill
from rl_reasoning.objectives.grpo import Grpo
from rl_reasoning.objectives.ppo import Ppo
from rl_reasoning.objectives.preference import Preference
from rl_reasoning.objectives.sft import Sft

OBJECTIVES = {
  'sft': Sft,
  **reward_model.SETTINGS,
  'ppo': Ppo,
  **{name: functools.partial(Grpo, **settings) for name, settings in grpo.SETTINGS.items()},
  **{name: functools.partial(Preference, **settings) for name, settings in preference.SETTINGS.items()},
  'distill': Distill,
}


def reads_rewards(objective) -> bool:
  """Whether rollouts are judged for it."""
  return 'rollout' in objective.sources and hasattr(objective, 'given')
