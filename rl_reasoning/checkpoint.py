"""Checkpoints of a whole TrainState through orbax: atomic, bit for bit, restored onto any mesh.

A save goes on behind the next steps (`wait` is for its end). A step's folder appears by a rename once it is whole, so a kill during a save
leaves the one before. The `position` item holds step, cursor and a fingerprint of every array: a file that was damaged later is found when
it is read, not when a run has gone on from it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from rl_reasoning import distributed, sharding
from rl_reasoning.config import Checkpoint, ConfigError, check, digest, one_line
from rl_reasoning.structs import PyTree, TrainState

for logger in ('absl', 'asyncio'):  # orbax tells of every save, and both log the traceback of what is raised
  logging.getLogger(logger).setLevel(logging.CRITICAL)


@jax.jit
def fingerprint(tree: PyTree) -> jax.Array:
  """An integer of all bits of a pytree of arrays, exact on every mesh."""
  total = jnp.uint32(0)
  for index, leaf in enumerate(jax.tree.leaves(tree)):
    bits = leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    # Bits and place are mixed (MurmurHash3's finaliser), so that two values that changed places are seen, be they x and -x.
    mixed = bits.astype(jnp.uint32) ^ (jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape) * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    total = total * jnp.uint32(31) + jnp.uint32(index) + jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
  return total


def fingerprints(roles: dict[str, PyTree]) -> dict[str, int]:
  """Of each role's weights."""
  return {role: int(fingerprint(weights)) for role, weights in roles.items()}


def items(state: TrainState) -> dict[str, PyTree]:
  """What is saved, in parts that can be read by themselves."""
  return {'params': state.params, 'opt': state.opt, 'rest': {'aux': state.aux, 'moving': state.moving, 'updates': state.updates}}


# By default orbax cuts every replicated array, however small, into a slice a device: a program to compile and a file each.
ocp.type_handlers.register_type_handler(
  jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True
)


def open_manager(workdir: str, settings: Checkpoint | None = None) -> ocp.CheckpointManager:
  """The manager of `workdir`/checkpoints. Without settings: to read only."""
  # orbax takes absolute paths only, and says so when the first checkpoint is due.
  directory = epath.Path(workdir if '://' in workdir else os.path.abspath(workdir)) / 'checkpoints'
  if settings is None:
    options = ocp.CheckpointManagerOptions(read_only=True)
  else:
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=settings.keep, cleanup_tmp_directories=True, save_root_metadata=False,
      # Made behind the steps, a folder that cannot be made lets the writers wait for it until they time out.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=300),
    )  # fmt: skip
  handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ('params', 'opt', 'rest')}
  return ocp.CheckpointManager(directory, options=options, item_handlers={**handlers, 'position': ocp.JsonCheckpointHandler()})


@contextlib.contextmanager
def saving(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
  """Raises ConfigError where the disk is full while `step` is saved; the checkpoints before it stay. The manager cannot save any more."""
  try:
    yield
  except Exception as error:
    told = f'{error} {error.__cause__} {error.__context__}'.lower()  # a barrier that timed out may stand before it
    if 'no space left' not in told:
      raise
    with contextlib.suppress(OSError):  # orbax's threads may still be writing: what they leave is deleted by the next start
      for left in manager.directory.glob(f'{step}.*tmp*'):
        left.rmtree()
    manager.reload()  # it has forgotten those that this one was to replace
    last = manager.latest_step()
    raise ConfigError(
      f'no space left on {manager.directory} while saving step {step}; the last good checkpoint is that of step {last}'
    ) from error


def wait(manager: ocp.CheckpointManager) -> None:
  """Until the last `save` is whole. Raises ConfigError where the disk was full."""
  with saving(manager, manager.latest_step()):  # a step counts from when its save begins
    manager.wait_until_finished()


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
  """Returns once the arrays are copied off the devices, when the state may be donated, and writes on behind the next steps. Raises
  ConfigError where the disk is full, be it for the save before.

  On CPU the copies are views of the device's memory: JAX does not donate a buffer to which there is one, but copies it then.
  """
  wait(manager)
  parts = items(state)
  prints = {name: int(fingerprint(x)) for name, x in parts.items()}
  position: dict[str, Any] = {'step': state.step, 'cursor': copy.deepcopy(state.cursor), 'fingerprint': prints}
  position['digest'] = digest(position)
  arguments: dict[str, Any] = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
  with saving(manager, state.step):
    manager.save(state.step, args=ocp.args.Composite(**arguments, position=ocp.args.JsonSave(position)), force=True)


@contextlib.contextmanager
def opened(workdir: str, settings: Checkpoint) -> Iterator[ocp.CheckpointManager]:
  """The manager that saves; at the end, whatever has happened, its last save is waited for. Raises ConfigError as `wait`."""
  manager = open_manager(workdir, settings)
  try:
    yield manager
  finally:
    try:
      wait(manager)
    finally:
      with contextlib.suppress(Exception):  # it raises once more what `wait` or `save` has told
        manager.close()


def read(manager: ocp.CheckpointManager, step: int, wanted: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
  """(parts like `wanted`, position). Raises ConfigError naming the folder for whatever is missing, damaged or of another shape."""
  folder = manager.directory / str(step)
  arguments: dict[str, Any] = {name: ocp.args.StandardRestore(like) for name, like in wanted.items()}
  try:
    found = manager.restore(step, args=ocp.args.Composite(**arguments, position=ocp.args.JsonRestore()))
    parts, position = {name: found[name] for name in wanted}, found['position']
    expected, seal = position['fingerprint'], position.pop('digest')
  except Exception as error:  # orbax and tensorstore raise many kinds
    reason = one_line(error)
    raise ConfigError(f'checkpoint {folder} cannot be read (delete the folder to go back to an older one): {reason}') from error
  check(digest(position) == seal, f'checkpoint {folder}: position is damaged: its contents are not what was saved')
  for name, part in parts.items():
    check(
      int(fingerprint(part)) == expected[name], f'checkpoint {folder}: {name} is damaged: its contents are not what was saved'
    )
  return parts, position


def abstract(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restore(manager: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
  """The newest checkpoint onto the shardings of `like`, whose frozen roles it keeps; None where there is none."""
  step = distributed.from_main(manager.latest_step)  # a shared folder may look older from another host
  if step is None:
    return None
  parts, position = read(manager, step, abstract(items(like)))
  return like.replace(step=position['step'], cursor=position['cursor'], params=parts['params'], opt=parts['opt'], **parts['rest'])


def open_item(workdir: str, item: str) -> tuple[ocp.CheckpointManager, int, dict[str, Any]]:
  """(manager, newest step, what the item holds as shapes). Raises ConfigError."""
  manager = open_manager(workdir)
  step = manager.latest_step()
  if step is None:
    raise ConfigError(f'{workdir}/checkpoints holds no checkpoint')
  try:
    return manager, step, dict(manager.item_metadata(step)[item] or {})
  except Exception as error:
    raise ConfigError(f'{workdir}/checkpoints/{step} cannot be read: {one_line(error)}') from error


def on_one_device(tree: PyTree) -> PyTree:
  single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=single), tree)


def identity(workdir: str) -> dict[str, int]:
  """Step and fingerprints of a run's newest checkpoint, without a look at its arrays. Raises ConfigError."""
  manager, step, _ = open_item(workdir, 'params')
  return {'step': step, **read(manager, step, {})[1]['fingerprint']}


def weight_names(workdir: str, role: str) -> set[str]:
  """The top-level names of a role's weights: by 'score' and 'lm_head' one tells its heads."""
  _, step, metadata = open_item(workdir, 'params')
  check(role in metadata, f'{workdir}/checkpoints/{step} holds no role {role!r}')
  return set(metadata[role])


def restore_params(workdir: str, role: str, shardings: PyTree = None) -> PyTree:
  """One role's weights of a run's newest checkpoint, straight into `shardings` (default: one device), a tree of all of them."""
  manager, step, metadata = open_item(workdir, 'params')
  check(role in metadata, f'{workdir}/checkpoints/{step} holds no role {role!r}')
  like = on_one_device(metadata)
  if shardings is not None:  # the others, of which the fingerprint is too, beside it
    everywhere = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=everywhere), metadata)
    like[role] = jax.tree.map(lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s), metadata[role], shardings)
  return read(manager, step, {'params': like})[0]['params'][role]


def restore_aux(workdir: str) -> PyTree:
  """The objective's own state in a run's newest checkpoint."""
  manager, step, metadata = open_item(workdir, 'rest')
  return read(manager, step, {'rest': on_one_device(metadata)})[0]['rest']['aux']
