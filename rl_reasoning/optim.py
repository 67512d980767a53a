"""Optimizer and learning-rate schedule from config: optax, nothing of our own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from rl_reasoning.config import Optim, check
from rl_reasoning.structs import PyTree


def decays(params: PyTree) -> PyTree:
  """True where weight decay acts: on matrices, not on norms or biases. By path, since layers are stacked and a norm is 2-D too."""

  def matrix(path, _):
    return not str(path[-1].key).endswith(('norm', 'bias'))

  return jax.tree_util.tree_map_with_path(matrix, params)


def make(optim: Optim, total_updates: int) -> tuple[optax.GradientTransformation, Callable]:
  """(transformation, schedule). Schedules count updates; the last update of `linear` and `cosine` is the one before zero.

  Raises ConfigError for an unknown optimizer, or an option that it does not take.
  """
  build: Any = getattr(optax, optim.name, None)
  check(callable(build) and 'learning_rate' in inspect.signature(build).parameters,
        f"config key 'optim.name': optax has no optimizer {optim.name!r}")  # fmt: skip
  known = inspect.signature(build).parameters
  for key in optim.options:
    check(key in known, f"config key 'optim.options.{key}' is unknown to optax.{optim.name}; known: {', '.join(known)}")
  warmup, rest = optim.warmup_updates, max(1, total_updates - optim.warmup_updates)
  after = {
    'constant': optax.constant_schedule(optim.learning_rate),
    'linear': optax.linear_schedule(optim.learning_rate, 0.0, rest),
    'cosine': optax.cosine_decay_schedule(optim.learning_rate, rest),
  }[optim.schedule]
  # The first update of a warm-up already moves: lr / (warmup + 1), 2 lr / (warmup + 1), ...
  ramp = optax.linear_schedule(optim.learning_rate / (warmup + 1), optim.learning_rate, warmup)
  schedule = optax.join_schedules([ramp, after], [warmup]) if warmup else after
  options = dict(optim.options)
  if 'mask' in known and 'weight_decay' in known:
    options = {'weight_decay': 0.0, 'mask': decays, **options}  # optax.adamw's own default decays silently
  steps: list[Any] = [build(schedule, **options)]
  if optim.grad_clip:
    steps.insert(0, optax.clip_by_global_norm(optim.grad_clip))
  return optax.chain(*steps), schedule
