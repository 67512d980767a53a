"""Optimizer and learning-rate schedule from config: optax, nothing of our own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rl_reasoning.config import ConfigError, Optim, check, one_line
from rl_reasoning.structs import PyTree


def decays(params: PyTree) -> PyTree:
  """True where weight decay acts: on matrices, not on norms or biases. By path, since layers are stacked and a norm is 2-D too."""

  def matrix(path, _):
    return not str(path[-1].key).endswith(('norm', 'bias'))

  return jax.tree_util.tree_map_with_path(matrix, params)


def freeze(layers: int, stacks: Mapping[str, range]) -> optax.GradientTransformation:
  """Leaves the embedding and the first layers as they are, whatever stack they are of. Their gradients are 0 already (model.make_net);
  decay is not."""

  def update(updates, params):
    def keep(path, x):
      names = [str(key.key) for key in path]
      if names[0] == 'embed':
        return jnp.zeros_like(x)
      return x.at[: max(0, layers - stacks[names[0]].start)].set(0.0) if names[0] in stacks else x

    return jax.tree_util.tree_map_with_path(keep, updates)

  return optax.stateless(update)


def make(optim: Optim, total_updates: int, stacks: Mapping[str, range]) -> tuple[optax.GradientTransformation, Callable]:
  """(transformation, schedule). Schedules count updates; the last update of `linear` and `cosine` is the one before zero.
  `stacks`: those of the architecture (Arch.stacks).

  Raises ConfigError for an unknown optimizer, one that needs more than gradients, and an option that it does not take.
  """
  build: Any = getattr(optax, optim.name, None)
  check(callable(build) and 'learning_rate' in inspect.signature(build).parameters,
        f"config key 'optim.name': optax has no optimizer {optim.name!r}")  # fmt: skip
  known = [name for name in inspect.signature(build).parameters if name not in ('learning_rate', 'mask')]
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
  if {'mask', 'weight_decay'} <= inspect.signature(build).parameters.keys():
    options = {'weight_decay': 0.0, 'mask': decays, **options}  # optax.adamw's own default decays silently
  steps: list[Any] = [optax.clip_by_global_norm(optim.grad_clip)] if optim.grad_clip else []
  weights = {'w': jax.ShapeDtypeStruct((2, 2), jnp.float32)}
  try:
    steps.append(build(schedule, **options))
    optimizer = optax.chain(*steps, *([freeze(optim.frozen_layers, stacks)] if optim.frozen_layers else []))
    jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w), weights)
  except Exception as error:  # an option of a wrong type shows only when it is used
    text = f"config section 'optim': optax.{optim.name} with {dict(optim.options)} makes no update: {error}"
    raise ConfigError(one_line(text)) from error
  return optimizer, schedule
