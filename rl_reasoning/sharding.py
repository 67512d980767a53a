"""Mesh from config, and logical axes -> NamedSharding. Rows go over expert, data and fsdp; weights over fsdp, tensor and expert."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rl_reasoning.config import check
from rl_reasoning.structs import Array, PyTree

AXES = ('data', 'fsdp', 'tensor', 'expert')
RULES = {
  'rows': ('expert', 'data', 'fsdp'),  # expert first: a shard_map over it alone then finds each of its parts in one piece
  'layer': None,
  'embed': 'fsdp',
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'expert': 'expert',
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None, *, expert: int = 1) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1 (what is left). Raises ValueError where the product does not fit."""
  devices = list(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor, 'expert': expert}
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh: {sizes}: sizes are positive, and at most one is -1')
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f'mesh: {sizes} does not cover the {len(devices)} devices here')
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(*axes: str | None) -> PartitionSpec:
  return PartitionSpec(*(RULES[a] if a else None for a in axes))


def axis_size(mesh: Mesh, axis: str) -> int:
  """Devices over which a logical axis is split."""
  rule = RULES[axis] or ()
  return math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule))


def check_rows(key: str, count: int, mesh: Mesh) -> None:
  """Raises ConfigError for a batch size, of the config key, that does not divide over the mesh."""
  devices = axis_size(mesh, 'rows')
  check(
    count % devices == 0, f'config key {key!r}: {count} does not divide over the {devices} row shards of mesh {dict(mesh.shape)}'
  )


def named(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...], name: str) -> NamedSharding:
  """NamedSharding of an array with these logical axes. Raises ValueError naming array, axis and size where it does not divide."""
  for size, axis in zip(shape, axes, strict=True):
    if axis and size % axis_size(mesh, axis):
      raise ValueError(
        f'{name}: axis {axis!r} of size {size} does not divide over {axis_size(mesh, axis)} devices (mesh {dict(mesh.shape)})'
      )
  return NamedSharding(mesh, spec(*axes))


def constrain(x: Array, *axes: str | None) -> Array:
  """Sharding hint inside jit; without a mesh (a plain script, a unit test) it does nothing."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*axes))


def put_rows(mesh: Mesh, tree: PyTree) -> PyTree:
  """Host arrays [N, ...] -> global arrays, rows over the mesh. Raises ValueError where N does not divide."""

  def put(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    sharding = named(mesh, x.shape, ('rows',) + (None,) * (x.ndim - 1), f'batch {name}')
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree_util.tree_map_with_path(put, jax.tree.map(np.asarray, tree))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def size_class(length: int) -> int:
  """The padded length for `length`: 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, ... Few shapes to compile, little padding: up to
  a third of a short row, a fifth of one over 128."""
  octave = 16
  while octave * 2 < length:
    octave *= 2
  parts = 2 if octave < 128 else 4
  return max(16, -(-length * parts // octave) * octave // parts)
