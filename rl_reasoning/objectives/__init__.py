"""OBJECTIVES: every setting that `objective.name` may pick. An objective is a frozen dataclass whose fields are its config keys.

What the other modules ask of it:
  trainable, frozen, moving   roles with gradients / only read / read and synchronised
  rows_together               rows that no split may separate
  sources                     rows per prompt from 'rollout' and from 'data'
  num_iterations, num_minibatches   passes over a step's rows, and updates a pass
  aggregation                 how token losses are weighed, see advantages.weigh
  init_aux() -> aux
  score(nets, params, frozen, rows) -> rows
  prepare(aux, batch) -> batch, aux, metrics
  loss(nets, params, frozen, aux, batch) -> scalar, metrics
  adapt(aux, metrics) -> aux
  inert() -> {key: why it cannot act beside the others}     formula() -> lines for --explain
`given` is no key: build.py puts there what an objective reads of other sections.
"""

import functools

from rl_reasoning.objectives.grpo import SETTINGS, Grpo
from rl_reasoning.objectives.sft import Sft

OBJECTIVES = {'sft': Sft, **{name: functools.partial(Grpo, **settings) for name, settings in SETTINGS.items()}}
