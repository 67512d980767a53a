"""Jitted score, prepare and update; the only place where gradients exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_reasoning import experts
from rl_reasoning.advantages import weigh
from rl_reasoning.metrics import merge
from rl_reasoning.model import Net
from rl_reasoning.sharding import constrain
from rl_reasoning.structs import Batch, Max, Mean, Min, PyTree, Sum, TrainState


class Steps(NamedTuple):
  score: Callable[[TrainState, Batch], Batch]
  prepare: Callable[[TrainState, Batch], tuple[Batch, Any, dict]]
  update: Callable[[TrainState, Batch], tuple[TrainState, dict]]
  minibatches: Callable[[Batch, jax.Array], Iterator[Batch]]
  programs: dict[str, Any]  # the jitted functions behind the first three


def deal(batch: PyTree, micro_batches: int, rows_together: int) -> PyTree:
  """[N, ...] -> [micro_batches, N / micro_batches, ...]: units of rows are dealt like cards. A contiguous split would take each
  micro-batch from few devices and reshard all of it."""

  def split(x):
    x = x.reshape(-1, micro_batches, rows_together, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1).reshape(micro_batches, -1, *x.shape[3:])

  return jax.tree.map(split, batch)


def undeal(batch: PyTree, rows_together: int) -> PyTree:
  """The inverse of `deal`."""

  def join(x):
    x = x.reshape(x.shape[0], -1, rows_together, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

  return jax.tree.map(join, batch)


def plain_weights(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
  return params, frozen


def make_steps(objective, nets: dict[str, Net], optimizers: dict[str, optax.GradientTransformation], schedule: Callable, micro_batch: int,
               max_completion_length: int, shardings: PyTree | None = None, whole: Callable = plain_weights,
               routers: Mapping[str, tuple[int, int]] = {}, router_bias_rate: float = 0.0) -> Steps:  # fmt: skip
  """The jitted functions of one run. `shardings` (of params and opt) keeps the state where it was born. Each trainable role has its
  optimizer, with a clip of its own; `schedule` is the policy's. `whole(params, frozen)` are the weights that the networks run on, where
  those that are trained are only a part of them (adapters). `routers`: of trainable roles with experts (layers, experts), whose loads are
  measured.

  `micro_batch` counts rows over all devices, 0 the whole batch. Batches reach it checked (resolution.py): every split divides.
  """
  together = objective.rows_together

  def pieces(rows: int) -> int:
    return rows // micro_batch if micro_batch and micro_batch < rows else 1

  @jax.jit
  def score(params, frozen, batch):
    params, frozen = whole(params, frozen)
    count = pieces(batch.tokens.shape[0])
    if count == 1:
      return objective.score(nets, params, frozen, batch)
    scored = jax.lax.map(lambda rows: objective.score(nets, params, frozen, rows), deal(batch, count, 1))  # each row by itself
    return undeal(scored, 1)

  def update(params, opt, updates, aux, frozen, batch):
    weight = weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, max_completion_length, together)
    batch = batch.replace(weight_NT=weight)

    def one(rows):
      def loss(params, loads):
        joined, others = whole(params, frozen)
        for role, load in loads.items():
          joined = {**joined, role: {**joined[role], 'layers': {**joined[role]['layers'], experts.LOAD: load}}}
        value, metrics = objective.loss(nets, joined, others, aux, rows)
        return value, {'loss': Sum(value), **metrics}

      loads = {role: jnp.zeros(shape, jnp.float32) for role, shape in routers.items()}
      return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, loads)

    count = pieces(batch.tokens.shape[0])
    if count == 1:
      (grads, loads), metrics = one(batch)
    else:
      dealt = deal(batch, count, together)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], dealt)))
      zeros = (zeros[0], jax.tree.map(start, zeros[1], is_leaf=is_metric))

      def add(total, rows):
        grads, metrics = one(rows)
        return (jax.tree.map(jnp.add, total[0], grads), merge(total[1], metrics)), None

      ((grads, loads), metrics), _ = jax.lax.scan(add, zeros, dealt)
    # Sums over micro-batches are whole now; over updates they average.
    metrics = {k: Mean(v.value, jnp.float32(1)) if isinstance(v, Sum) else v for k, v in metrics.items()}
    for role, grad in grads.items():
      name = 'grad_norm' if role == 'policy' else f'grad_norm/{role}'
      metrics[name] = Mean(optax.global_norm(grad), jnp.float32(1))
    metrics['learning_rate'] = Mean(jnp.asarray(schedule(updates), jnp.float32), jnp.float32(1))
    for name, value in experts.balance(loads['policy']).items() if 'policy' in loads else ():
      metrics[name] = Mean(value, jnp.float32(1))
    new_params, new_opt = {}, {}
    for role, grad in grads.items():
      change, new_opt[role] = optimizers[role].update(grad, opt[role], params[role])
      new_params[role] = optax.apply_updates(params[role], change)
      if router_bias_rate and 'router_bias' in new_params[role]['layers']:  # its gradient is 0, so that the optimizer has left it
        layers = new_params[role]['layers']
        bias = experts.balanced(layers['router_bias'], loads[role], router_bias_rate)
        new_params[role] = {**new_params[role], 'layers': {**layers, 'router_bias': bias}}
    return new_params, new_opt, updates + 1, metrics

  keep = None if shardings is None else (shardings['params'], shardings['opt'], None, None)
  jit_update = jax.jit(update, donate_argnums=(0, 1), out_shardings=keep)
  jit_prepare = jax.jit(objective.prepare)

  def run_update(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    frozen = {**state.frozen, **state.moving}
    params, opt, updates, metrics = jit_update(state.params, state.opt, state.updates, state.aux, frozen, batch)
    return state.replace(params=params, opt=opt, updates=updates), metrics

  @jax.jit
  def take(batch, rows):
    return jax.tree.map(lambda x: constrain(x[rows], 'rows', *(None,) * (x.ndim - 1)), batch)

  def minibatches(batch: Batch, key: jax.Array) -> Iterator[Batch]:
    """num_iterations passes of num_minibatches each; a fresh order of units every pass."""
    for iteration in range(objective.num_iterations):
      if objective.num_minibatches == 1:
        yield batch
        continue
      units = batch.tokens.shape[0] // together
      # The rollout of the step folds prompt numbers into the same key: these count down from the other end.
      order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 2**32 - 1 - iteration), units))
      rows = (order[:, None] * together + np.arange(together)).reshape(objective.num_minibatches, -1)
      for index in range(objective.num_minibatches):
        yield take(batch, rows[index])

  return Steps(
    score=lambda state, batch: score(state.params, {**state.frozen, **state.moving}, batch),
    prepare=lambda state, batch: jit_prepare(state.aux, batch),
    update=run_update,
    minibatches=minibatches,
    programs={'score': score, 'prepare': jit_prepare, 'update': jit_update},
  )


def is_metric(x) -> bool:
  return isinstance(x, (Mean, Max, Min, Sum))


def start(metric):
  """The neutral element that merging begins with."""
  if isinstance(metric, Max):
    return Max(jnp.full_like(metric.value, -jnp.inf))
  if isinstance(metric, Min):
    return Min(jnp.full_like(metric.value, jnp.inf))
  return metric
