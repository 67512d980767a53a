"""Mesh from config, and logical axes -> NamedSharding.

In training rows go over expert, data and fsdp, their tokens over sequence, weights over fsdp, tensor and expert. A layer's weights are
whole along fsdp only while the layer runs; in decode they are so all the time (`whole_embed`), and rows go over sequence, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rl_reasoning import distributed
from rl_reasoning.config import check
from rl_reasoning.structs import Array, Batch, PyTree

AXES = ('data', 'fsdp', 'sequence', 'tensor', 'expert')
RULES = {
  'rows': ('expert', 'data', 'fsdp'),  # expert first: a shard_map over it alone then finds each of its parts in one piece
  'outer_rows': ('expert', 'data'),  # while fsdp has something else to cut
  'rollout_rows': ('expert', 'data', 'fsdp', 'sequence'),
  'time': 'sequence',
  'layer': None,
  'embed': 'fsdp',
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'expert': 'expert',
}


def make_mesh(
  data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None, *, sequence: int = 1, expert: int = 1
) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1 (what is left). Where devices are of several TPU slices, `data` alone goes over
  the network between them, and is a multiple of their number. Raises ValueError where the product does not fit."""
  devices = list(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'fsdp': fsdp, 'sequence': sequence, 'tensor': tensor, 'expert': expert}
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh: {sizes}: sizes are positive, and at most one is -1')
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f'mesh: {sizes} does not cover the {len(devices)} devices here')
  types = (AxisType.Auto,) * len(AXES)
  if devices[0].platform != 'tpu':
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if sizes['data'] % slices:
    raise ValueError(f'mesh: {sizes}: data does not divide over the {slices} slices')
  within, between = (sizes['data'] // slices, *list(sizes.values())[1:]), (slices, *(1,) * (len(AXES) - 1))
  try:  # an axis of the mesh may be a part of one of the torus
    if slices == 1:
      laid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
      laid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
  except NotImplementedError as error:
    raise ValueError(f'mesh: {sizes}: {error}') from None
  return Mesh(laid, AXES, axis_types=types)


def spec(*axes: str | None) -> PartitionSpec:
  return PartitionSpec(*(RULES[a] if a else None for a in axes))


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
  """Devices over which a logical axis is split."""
  rule = RULES[axis] or ()
  return math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule))


def check_rows(key: str, count: int, mesh: Mesh) -> None:
  """Raises ConfigError for a batch size of rollouts, of the config key, that does not divide over the mesh."""
  devices = axis_size(mesh, 'rollout_rows')
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
  """Sharding hint inside jit. Without a mesh (a plain script, a unit test) it does nothing, nor on an axis that a shard_map has cut."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*(free(mesh, RULES[a]) if a else None for a in axes)))


def kv_axis(heads: int) -> str | None:
  """The logical axis of so many key/value heads; one alone (of latents) is nobody's share."""
  return 'kv_heads' if heads > 1 else None


def free(mesh: AbstractMesh, rule: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
  """What of a rule no shard_map around has cut."""
  if isinstance(rule, tuple):
    return tuple(axis for axis in rule if axis not in mesh.manual_axes)
  return None if rule in mesh.manual_axes else rule


def ways(*axes: str) -> int:
  """Parts into which logical axes are cut on the mesh that is set; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(axis_size(mesh, axis) for axis in axes)


def whole_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """Of a weight that is whole along fsdp."""
  return tuple(None if axis == 'embed' else axis for axis in axes)


def whole_embed(x: Array, axes: tuple[str | None, ...]) -> Array:
  """A weight gathered along fsdp, which lies over 'embed' alone: as a layer reads it. Its gradient is scattered there again: a plain hint
  would ask for it whole, too, and twice the bytes would travel."""
  return gathered(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x, axes):
  return constrain(x, *whole_axes(axes))


gathered.defvjp(lambda x, axes: (gathered(x, axes), None), lambda axes, _, gradient: (constrain(gradient, *axes),))


def shards_held(mesh: Mesh, process: int) -> list[int]:
  """The row shards on the devices of a process, ascending. Several processes hold the same ones where `tensor` goes over them."""
  axes = [mesh.axis_names.index(a) for a in RULES['rows']]
  devices = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(axis_size(mesh, 'rows'), -1)
  return [shard for shard, some in enumerate(devices) if any(d.process_index == process for d in some)]


def check_processes(mesh: Mesh) -> None:
  """Raises ConfigError where processes would have rows of different number: what they tell each other is of one shape."""
  counts = {len(shards_held(mesh, process)) for process in range(distributed.count())}
  cut = {axis: mesh.shape[axis] for axis in ('sequence', 'tensor')}
  check(
    len(counts) == 1,
    f"config section 'mesh': {cut} cut a process's devices, so that they hold parts of the rows of unequal number",
  )
  if distributed.count() > 1:
    check(
      distributed.index() == jax.process_index(),
      f'process {distributed.index()} has the devices of process {jax.process_index()}',
    )


def own(mesh: Mesh | None, count: int, process: int | None = None) -> np.ndarray:
  """Which of `count` rows (or prompts) a process reads, rolls out and judges: those of its shards, ascending. Default: this one."""
  if mesh is None or distributed.count() == 1:
    return np.arange(count)
  size = count // axis_size(mesh, 'rows')
  shards = shards_held(mesh, distributed.index() if process is None else process)
  return np.concatenate([np.arange(shard * size, (shard + 1) * size) for shard in shards])


def whole(mesh: Mesh, rows: int) -> int:
  """How many rows all processes have together where this one has `rows`."""
  return rows if distributed.count() == 1 else rows * axis_size(mesh, 'rows') // len(shards_held(mesh, distributed.index()))


def all_rows(mesh: Mesh | None, x: Array) -> np.ndarray:
  """[own rows, ...] numbers -> [N, ...] on every process. Where several hold a row, the first one counts for all: a time-out makes one
  verdict, not two."""
  if mesh is None or distributed.count() == 1:
    return np.asarray(x)
  N, parts = whole(mesh, len(x)), distributed.gather(x)
  result = np.empty((N, *parts.shape[2:]), parts.dtype)
  for process in reversed(range(len(parts))):
    result[own(mesh, N, process)] = parts[process]
  return result


def own_rows(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Global arrays [N, ...] -> numpy arrays of this process's rows: the inverse of `put_rows`."""
  if mesh is None or distributed.count() == 1:
    return jax.device_get(tree)

  def read(x):
    x = jax.device_put(x, NamedSharding(mesh, spec('rows')))
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  return jax.tree.map(read, tree)


def put_rows(mesh: Mesh, tree: PyTree) -> PyTree:
  """Host arrays of the own rows -> global arrays [N, ...], rows over the mesh. One process has all rows. Raises ValueError where N does
  not divide."""

  def put(path, x):
    name, N = jax.tree_util.keystr(path, simple=True, separator='.'), whole(mesh, x.shape[0])
    sharding = named(mesh, (N, *x.shape[1:]), ('rows',) + (None,) * (x.ndim - 1), f'batch {name}')
    here = own(mesh, N)

    def part(index):
      start, stop, _ = index[0].indices(N)
      at = int(np.searchsorted(here, start))
      return x[at : at + stop - start]

    return jax.make_array_from_callback((N, *x.shape[1:]), sharding, part)

  return jax.tree_util.tree_map_with_path(put, jax.tree.map(np.asarray, tree))


def widened(batch: Batch, T: int) -> Batch:
  """The batch (numpy) with T columns; experts of padding are -1, not known."""

  def wide(x, fill=0):
    return np.pad(x, ((0, 0), (0, T - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

  columns = [name for name, x in vars(batch).items() if x is not None and (name == 'tokens' or name.endswith('_NT'))]
  extras = {name: x if x.ndim == 1 else wide(x, -1 if name == 'chosen' else 0) for name, x in batch.extras.items()}
  return batch.replace(**{name: wide(getattr(batch, name)) for name in columns}, extras=extras)


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
  """`put_rows` of right-padded rows, as wide as the widest of all processes."""
  T = distributed.largest(batch.tokens.shape[1])
  return put_rows(mesh, batch if batch.tokens.shape[1] == T else widened(batch, T))


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
