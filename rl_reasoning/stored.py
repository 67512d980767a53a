"""Weights as they are stored, in a run of ours or a published checkpoint: what they are, in and out."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rl_reasoning import checkpoint, lora, model, sharding, weights
from rl_reasoning.config import ConfigError, Lora, check, from_mapping
from rl_reasoning.model import Arch
from rl_reasoning.objectives import OBJECTIVES, reward_model
from rl_reasoning.structs import PyTree


def is_run(path: str) -> bool:
  return (pathlib.Path(path) / 'checkpoints').is_dir()


def run_config(path: str, *keys: str) -> Any:
  """One value of the config that a run of ours was resolved to."""
  try:
    value = json.loads((pathlib.Path(path) / 'config.json').read_text())
    for key in keys:
      value = value[key]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ConfigError(f'{path}/config.json: {type(error).__name__}: {error}') from None
  return value


def adapters_of(run: str) -> Lora:
  """The section `lora` of a run of ours; one from before there were adapters has none."""
  return from_mapping(Lora, run_config(run).get('lora', {}), 'lora.')


def read_arch(source: str) -> Arch:
  return from_mapping(Arch, run_config(source, 'model', 'arch')) if is_run(source) else weights.read_arch(source)


def heads_of(objective) -> tuple[str, ...]:
  """The heads of the policy under an objective; a class that decides by its fields has 'lm'."""
  heads = getattr(getattr(objective, 'func', objective), 'heads', None)
  return heads['policy'] if isinstance(heads, Mapping) else ('lm',)


def heads_in(source: str) -> tuple[str, ...]:
  """The heads of stored weights."""
  if not is_run(source):
    return weights.source_heads(source)
  name = run_config(source, 'objective', 'name')
  return heads_of(OBJECTIVES[name]) if name in OBJECTIVES else ('lm',)


def score_shift(init: str) -> float:
  """What is subtracted from the scores of a reward model; 0 for what is none."""
  if 'scalar' not in heads_in(init):
    return 0.0
  return reward_model.shift(checkpoint.restore_aux(init)) if is_run(init) else weights.score_shift(init)


def load_params(init: str, arch: Arch, key: jax.Array, mesh: Mesh, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """Weights of a role, born in their shards: random, from a run of ours, or from a published checkpoint. A head that is not wanted is left
  out, and a scalar head that is not there is born at random."""
  shardings = param_shardings(mesh, arch, heads)
  if not init:
    return jax.jit(model.init, static_argnums=(1, 2), out_shardings=shardings)(key, arch, heads)
  check(pathlib.Path(init).exists(), f'config section roles: init {init!r} does not exist')
  rows = read_arch(init).vocab_size
  if rows < arch.vocab_size:
    smaller = load_params(init, dataclasses.replace(arch, vocab_size=rows), key, mesh, heads)
    return jax.jit(model.grown, static_argnums=1, out_shardings=shardings)(smaller, arch.vocab_size)
  if is_run(init):
    params = restore_policy(init, arch, mesh)
  else:
    kept = tuple(head for head in heads if head in weights.source_heads(init))
    params = weights.load(init, arch, param_shardings(mesh, arch, kept), kept)
  missing = [name for name in shardings if name not in params]
  check('lm_head' not in missing, f'config section roles: {init} has no language-model head')

  def head(key):
    fresh = model.init(key, arch, heads)
    return {name: fresh[name] for name in missing}

  born = jax.jit(head, out_shardings={name: shardings[name] for name in missing})(key) if missing else {}
  return {name: born[name] if name in missing else params[name] for name in shardings}


def make(function: Callable[..., PyTree], shardings: PyTree, *arguments: Any) -> PyTree:
  return jax.jit(function, out_shardings=shardings)(*arguments)


def shapes(function: Callable[..., PyTree], shardings: PyTree, *arguments: Any) -> PyTree:
  """What `make` gives, as shapes."""
  found = jax.eval_shape(function, *arguments)
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, found)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), found, shardings)


def load_shapes(init: str, arch: Arch, key: jax.Array, mesh: Mesh, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """What `load_params` gives, as shapes."""
  return jax.tree.map(
    lambda w, s: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=s),
    model.weight_table(arch, heads), param_shardings(mesh, arch, heads), is_leaf=model.is_weight,
  )  # fmt: skip


class Making(NamedTuple):
  """How the arrays of a state come to be."""

  load: Callable[..., PyTree]  # as load_params
  make: Callable[..., PyTree]


ARRAYS = Making(load_params, make)
SHAPES = Making(load_shapes, shapes)  # ShapeDtypeStructs in their shards: for a plan, on devices that are not there


def restore_policy(run: str, arch: Arch, mesh: Mesh) -> PyTree:
  """The policy's weights in a run of ours, with all the heads that it has; adapters are merged. Raises ConfigError where the weights that
  they adapt are not those of then."""
  names, config = checkpoint.weight_names(run, 'policy'), run_config(run)
  settings = adapters_of(run)
  if not settings.rank:
    stored = tuple(head for head, name in (('lm', 'lm_head'), ('scalar', 'score')) if name in names)
    return checkpoint.restore_params(run, 'policy', shardings=param_shardings(mesh, arch, stored))
  scalar = ('scalar',) if 'score' in names else ()
  start, heads = config['roles']['policy']['init'], tuple(head for head in heads_in(run) if head != 'scalar')
  base = {name: w for name, w in load_params(start, arch, jax.random.key(0), mesh, heads + scalar).items() if name != 'score'}
  try:
    trained_on = json.loads((pathlib.Path(run) / 'frozen.json').read_text())['base']
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ConfigError(f'{run}/frozen.json: {type(error).__name__}: {error}') from None
  check(int(checkpoint.fingerprint(base)) == trained_on, f'{run} holds adapters of {start}, whose weights are not those of then')
  shardings = table_shardings(mesh, lora.table(model.weight_table(arch, heads + scalar), settings))
  adapter = checkpoint.restore_params(run, 'policy', shardings=shardings)
  return jax.jit(lora.merge, out_shardings=param_shardings(mesh, arch, heads + scalar))(lora.join(base, adapter, settings))


def export(run: str, path: str, dtype: str = 'float32', adapter: bool = False) -> None:
  """Writes the policy of a run of ours as a Hugging Face folder, or its adapters alone as one of peft's. Raises ConfigError."""
  arch, tok, heads = read_arch(run), run_config(run, 'roles', 'policy', 'tokenizer'), heads_in(run)
  head = 'lm' if 'lm' in heads else 'scalar'
  if adapter:
    settings = adapters_of(run)
    check(settings.rank > 0, f'{run}: a run without adapters (lora.rank 0)')
    base, params = run_config(run, 'roles', 'policy', 'init'), checkpoint.restore_params(run, 'policy')
    weights.save_adapter(params, arch, settings, path, base, (head,), dtype)
    return
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  tokenizer_path = None if tok == 'bytes' else tok
  weights.save(restore_policy(run, arch, mesh), arch, path, tokenizer_path, (head,), score_shift(run), dtype)


def param_shardings(mesh: Mesh, arch: Arch, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  return table_shardings(mesh, model.weight_table(arch, heads))


def table_shardings(mesh: Mesh, table: PyTree) -> PyTree:
  """Raises ConfigError for a weight that does not divide over the mesh."""

  def place(path, w: model.Weight):
    try:
      return sharding.named(mesh, w.shape, w.axes, 'weight ' + jax.tree_util.keystr(path, simple=True, separator='/'))
    except ValueError as error:
      raise ConfigError(str(error)) from None

  return jax.tree_util.tree_map_with_path(place, table, is_leaf=model.is_weight)
