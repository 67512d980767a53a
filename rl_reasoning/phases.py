"""Every program of a step, lowered for the devices of a mesh, which need not be there: what launch/plan.py compiles and measures.

Shapes are the largest that the config allows: prompts of `data.max_prompt_length`, completions of `rollout.max_completion_length`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_reasoning import kv_cache, model, reward_models, rollout, sharding
from rl_reasoning.build import Run
from rl_reasoning.collect import beside, encode, imitated, judging, to_batch
from rl_reasoning.structs import Batch, PyTree, Rollout, TrainState


class Phase(NamedTuple):
  name: str
  program: Any  # jax.stages.Traced
  arguments: PyTree  # what it reads, as shapes in their shards
  tokens: int  # that a run of it sees, over all devices
  runs: int = 1  # in a step


ROWS: dict[str, list[dict[str, Any]]] = {  # of data, one prompt each; KTO's mismatches want a second one
  'demonstrations': [{'prompt': 'a', 'completion': 'b'}],
  'text': [{'text': 'a'}],
  'rankings': [{'prompt': 'a', 'responses': ['b', 'c'], 'ranks': [0, 1]}],
  'unpaired': [{'prompt': 'a', 'completion': 'b', 'label': 1.0}, {'prompt': 'c', 'completion': 'd', 'label': 0.0}],
  'verdicts': [{'prompt': 'a', 'completion': 'b', 'label': 1.0}],
  'steps': [{'prompt': 'a', 'completions': ['b', 'c'], 'labels': [1.0, 0.0]}],
}


def lengths(run: Run) -> tuple[int, int, int]:
  """Tokens of the longest (prompt, completion, row of data), as they are padded; what the objective does not read is 0."""
  config, sources = run.config, run.objective.sources
  rolls, reads = 'rollout' in sources, 'data' in sources
  prompt, completion = (config.data.max_prompt_length, config.rollout.max_completion_length) if rolls else (0, 0)
  return sharding.size_class(prompt) * rolls, completion, sharding.size_class(config.data.max_length) * reads


def row_length(run: Run) -> int:
  """Tokens of a row of the batch."""
  _, completion, row = lengths(run)
  rolled = sharding.size_class(run.config.data.max_prompt_length + completion) if completion else 0
  return max(rolled, row)


def example(run: Run) -> tuple[Batch, int]:
  """(numpy rows as `collect` makes them, of how many prompts)."""
  objective = run.objective
  rows = ROWS.get(objective.reads, [])
  if 'rollout' not in objective.sources:
    return encode(run, rows), len(rows)
  group, completion = objective.sources['rollout'], 1
  tokens = np.zeros((group, completion), np.int32)
  chosen = None
  if run.replays:
    shape = (1 + completion - 1, len(run.arch.stacks['layers']), run.arch.num_experts_per_tok)
    chosen = np.empty(group, object)
    chosen[:] = [np.zeros(shape, np.int32) for _ in range(group)]
  rolled = Rollout(tokens, np.zeros((group, completion), np.float32), np.ones(group, np.int32), np.zeros(group, bool), chosen)
  batch = to_batch([[0]], rolled, group)
  if names := judging(run):
    values = np.zeros((group, len(names)), np.float32)
    batch = batch.replace(rewards_NR=values, has_reward_NR=values, failed_NR=values)
  if 'data' in objective.sources:
    batch = beside(batch, encode(run, rows * objective.sources['data']), 1)
  return batch, 1


def batch_shapes(run: Run) -> Batch:
  """The rows of a step."""
  batch, prompts = example(run)
  N, T = batch.tokens.shape
  rows, length = N * run.config.data.batch_size // prompts, row_length(run)
  if imitated(run.objective) and 'rollout' not in run.objective.sources:
    rows *= imitated(run.objective)

  def grow(path, x):
    name = path[-1].key if hasattr(path[-1], 'key') else path[-1].name
    long = name == 'tokens' or name.endswith('_NT') or (x.ndim > 1 and x.shape[1] == T and not name.endswith('_NR'))
    shape = (rows, length, *x.shape[2:]) if long else (rows, *x.shape[1:])
    return row_shapes(run, jax.ShapeDtypeStruct(shape, x.dtype))

  batch = jax.tree_util.tree_map_with_path(grow, batch)
  if run.features is not None:
    features = jax.ShapeDtypeStruct((rows, length, run.arch.hidden_size), jnp.float32)
    batch = batch.replace(extras={**batch.extras, 'features': row_shapes(run, features)})
  return batch


def row_shapes(run: Run, tree: PyTree, count: int | None = None) -> PyTree:
  """Shapes, `count` rows (None: as many as there are) over the mesh."""

  def place(x):
    shape = (x.shape[0] if count is None else count, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place_on(run, shape, ('rows',) + (None,) * (len(shape) - 1)))

  return jax.tree.map(place, tree)


def place_on(run: Run, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.sharding.NamedSharding:
  return sharding.named(run.mesh, shape, axes, 'plan')


def phases(run: Run, state: TrainState) -> Iterator[Phase]:
  """The programs in the order of a step, with `run.mesh` set. `state`: shapes, as a run made with stored.SHAPES gives them."""
  objective = run.objective
  others = {**state.frozen, **state.moving}
  if 'rollout' in objective.sources:
    yield from rollout_phases(run, state)
  batch, length = batch_shapes(run), row_length(run)
  rows = batch.tokens.shape[0]
  for name, made in run.reward_models.items():
    size = reward_models.rows_at_once(length, run.mesh)
    fields = {f.name: getattr(batch, f.name) if f.name in READS else None for f in dataclasses.fields(Batch)}
    arguments = state.frozen[f'reward.{name}'], row_shapes(run, Batch(**{**fields, 'extras': {}}), size)
    program = reward_models.last_scores.trace(*arguments, arch=made.arch, dtype=made.dtype)
    yield Phase(f'reward.{name}', program, arguments, size * length, -(-rows // size))
  programs = run.steps.programs
  arguments = state.params, others, batch
  program = programs['score'].trace(*arguments)
  scored = row_shapes(run, program.out_info)
  if program.jaxpr.eqns:  # else there is nothing to score
    yield Phase('score', program, arguments, rows * length)
  program = programs['prepare'].trace(state.aux, scored)
  yield Phase('prepare', program, (state.aux, scored), rows * length)
  updates = objective.num_iterations * objective.num_minibatches
  own = run.config.data.batch_size * objective.update_rows // objective.num_minibatches
  arguments = state.params, state.opt, state.updates, state.aux, others, row_shapes(run, program.out_info[0], own)
  yield Phase('update', programs['update'].trace(*arguments), arguments, own * length, updates)


READS = ('tokens', 'segment_NT', 'position_NT', 'mask_NT', 'source_N', 'group_N')  # what reward_models.score_texts fills


def rollout_phases(run: Run, state: TrainState) -> Iterator[Phase]:
  """Prefill, relayout (the weights as decode reads them), decode: a token of every completion, with a full cache."""
  config, arch, group = run.config, run.arch, run.objective.sources['rollout']
  B, (P, C, _) = config.data.batch_size, lengths(run)
  fuse = run.mesh.shape['tensor'] == 1
  decoder = rollout.Decoder(arch, config.model.dtype, fuse, run.tokenizer.end_ids, config.rollout, group, run.replays)
  params = weights_of(run, state)

  def placed(x, axes):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_on(run, x.shape, axes[: len(x.shape)]))

  def rows(x):
    return placed(x, ('rollout_rows', *(None,) * 8)) if x.shape else placed(x, ())

  given = tuple(rows(jax.ShapeDtypeStruct(*x)) for x in (((B, P), jnp.int32), ((B, P), jnp.int32), ((B, group, C), jnp.float32)))
  program = rollout.prefill.trace(params, decoder, *given)
  yield Phase('prefill', program, (params, *given), B * P)
  cache, first = program.out_info
  own = jax.eval_shape(lambda cache: rollout.grow(cache, C), first.cache)
  cache, own = (tuple(kv_cache.with_axes(placed, layer) for layer in layers) for layers in (cache, own))
  program = model.decode_weights.trace(params, arch, config.model.dtype, fuse)
  yield Phase('relayout', program, (params,), 0)
  outer, layers = jax.tree.map(lambda x, axes: placed(x, axes), program.out_info, decode_axes(arch, program.out_info))
  decoding = jax.tree.map(rows, first._replace(cache=()))._replace(cache=own)
  arguments = outer, layers, cache, given[1], given[2], decoding
  yield Phase('decode', rollout.decode.trace(*arguments, C, decoder), arguments, B * group, C - 1)


def weights_of(run: Run, state: TrainState) -> PyTree:
  """What the policy runs on, as shapes: its weights and, beside them, its adapters."""
  own = state.params['policy']
  if not run.config.lora.rank:
    return own
  base = state.frozen['base']
  return {**base, **{name: {**base[name], **x} if isinstance(x, dict) else x for name, x in own.items()}}


def decode_axes(arch: model.Arch, weights: PyTree) -> PyTree:
  """Logical axes of what model.decode_weights gives."""

  outer, layers = weights
  stacks = [stack for stack, numbers in arch.stacks.items() for _ in numbers]
  known = {stack: model.layer_axes(arch, stack) for stack in arch.stacks}
  inner = tuple(
    {
      name: sharding.whole_axes(known[stack][name]) if name in known[stack] else (None,) * x.ndim for name, x in w.items()
    }  # fused ones: there is no tensor axis
    for stack, w in zip(stacks, layers, strict=True)
  )
  return {name: (None,) if name == 'final_norm' else ('vocab', None) for name in outer}, inner
