"""Checkpoints: bit for bit, on any mesh, and what is told where one is missing, damaged, or does not fit on the disk."""

import asyncio
import errno
import itertools
import os
import re
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from rl_reasoning import checkpoint, sharding
from rl_reasoning.config import Checkpoint, ConfigError
from rl_reasoning.structs import TrainState

MESH = sharding.make_mesh(8, 1, 1)
AXES = {'embed': ('vocab', 'embed'), 'layers': {'q': (None, 'embed', 'heads'), 'norm': (None, None)}}
SHAPES = {'embed': (64, 16), 'layers': {'q': (2, 16, 8), 'norm': (2, 16)}}
KEEP = Checkpoint(keep=2)
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # coroutines that orbax leaves behind


def placed(mesh, leaf):
  """A tree of weights laid over a mesh; `leaf(shape, index)` makes the numbers."""
  count = itertools.count()

  def place(shape, axes):
    value = np.asarray(leaf(shape, next(count)), np.float32)
    return jax.device_put(value, sharding.named(mesh, shape, axes, 'weight'))

  return jax.tree.map(place, SHAPES, AXES, is_leaf=lambda x: isinstance(x, tuple))


def make_state(step: int, mesh=MESH, seed=None) -> TrainState:
  rng = np.random.default_rng(step if seed is None else seed)
  params, moments, moving = (placed(mesh, lambda shape, _: rng.normal(size=shape)) for _ in range(3))
  count, kl = (jax.device_put(x, sharding.replicated(mesh)) for x in (jnp.int32(3 * step), jnp.float32(0.1 * step)))
  return TrainState(
    step=step, cursor={'train': 16 * step, 'num_tokens': 12345 * step}, updates=count, params={'policy': params},
    opt={'policy': {'mu': moments, 'count': count}}, aux={'kl': kl}, moving={'ref': moving}, frozen={'base': params},
  )  # fmt: skip


def saved(workdir, *steps: int):
  manager = checkpoint.open_manager(str(workdir), KEEP)
  for step in steps:
    checkpoint.save(manager, make_state(step))
  checkpoint.wait(manager)
  return manager


def assert_same_state(got: TrainState, expected: TrainState) -> None:
  assert (got.step, got.cursor) == (expected.step, expected.cursor)
  jax.tree.map(np.testing.assert_array_equal, checkpoint.items(got), checkpoint.items(expected))


def test_round_trip(tmp_path):
  """Failure: a resumed run goes on from other bits than were saved, from an older step, or with weights that are frozen."""
  manager = saved(tmp_path, 1, 2)
  like = make_state(0)
  got = checkpoint.restore(manager, like)
  assert_same_state(got, make_state(2))
  assert got.frozen is like.frozen
  assert_same_state(checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), like), make_state(2))


def test_bits_that_are_no_numbers(tmp_path):
  """Failure: -0.0, subnormal numbers, infinities or the bits of a NaN change on the way to the disk."""
  bits = np.array([0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFFC00001, 0x7FC12345], np.uint32)
  state = make_state(1).replace(params={'policy': {'w': jnp.asarray(bits.view(np.float32))}})
  manager = checkpoint.open_manager(str(tmp_path), KEEP)
  checkpoint.save(manager, state)
  got = checkpoint.restore(manager, state)
  np.testing.assert_array_equal(np.asarray(got.params['policy']['w']).view(np.uint32), bits)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 8, 1), (2, 1, 1), (1, 1, 2), (1, 1, 1)], ids=str)
def test_another_mesh(sizes, tmp_path):
  """Failure: a run cannot go on on other hardware, or its weights do not lie as that mesh wants them."""
  saved(tmp_path, 4)
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  like = make_state(0, mesh)
  got = checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), like)
  assert_same_state(got, make_state(4))
  for part in ('params', 'opt', 'moving', 'updates', 'aux'):
    jax.tree.map(
      lambda a, b: np.testing.assert_(a.sharding.is_equivalent_to(b.sharding, a.ndim)), getattr(got, part), getattr(like, part)
    )
  role = checkpoint.restore_params(str(tmp_path), 'policy', jax.tree.map(lambda x: x.sharding, like.params['policy']))
  jax.tree.map(np.testing.assert_array_equal, role, make_state(4).params['policy'])
  assert role['embed'].sharding == like.params['policy']['embed'].sharding


def number(tree) -> int:
  return int(checkpoint.fingerprint(tree))


def test_fingerprint_sees_every_bit():
  """Failure: a damaged weight passes for the one that was saved."""
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  found = {number({'a': x, 'b': x[0]})}
  for place, bit in itertools.product(range(x.size), range(32)):
    flipped = x.copy()
    flipped.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
    found.add(number({'a': flipped, 'b': x[0]}))
  assert len(found) == 1 + x.size * 32


@pytest.mark.parametrize('values', [(1.5, -2.25), (1.5, -1.5), (0.0, -0.0), (1.0, 2.0), (3, 4)], ids=str)
def test_fingerprint_sees_order(values):
  """Failure: values that changed places (x and -x differ in one high bit) are not seen."""
  for i, j in itertools.combinations(range(40), 2):
    x = np.zeros(40, np.int32 if isinstance(values[0], int) else np.float32)
    y = x.copy()
    x[[i, j]], y[[j, i]] = values, values
    assert number([x]) != number([y]), (i, j)


def test_fingerprint_is_of_the_numbers_alone():
  """Failure: the same weights on another mesh pass for damaged; or two roles that changed places, or a half-precision bit, do not."""
  state = make_state(1)
  meshes = [(2, 2, 2), (1, 8, 1), (1, 2, 4)]
  assert {number(make_state(1, sharding.make_mesh(*sizes)).params) for sizes in meshes} == {number(state.params)}
  a, b = np.ones(3, np.float32), np.full(3, 2, np.float32)
  assert number({'a': a, 'b': b}) != number({'a': b, 'b': a})
  half = jnp.asarray([1.0, 2.0], jnp.bfloat16)
  assert number([half]) != number([half.at[1].set(2.015625)])  # the next bfloat16


def test_keep(tmp_path):
  """Failure: the disk fills with old checkpoints, or the newest are deleted."""
  manager = checkpoint.open_manager(str(tmp_path), Checkpoint(keep=3))
  for step in (2, 4, 6, 8, 9):
    checkpoint.save(manager, make_state(step))
  checkpoint.wait(manager)
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['6', '8', '9']


def test_identity(tmp_path):
  """Failure: two runs of other weights are one, or the same weights are two; or the newest checkpoint is not the one that is told of."""
  saved(tmp_path / 'one', 1, 2)
  prints = {name: int(checkpoint.fingerprint(part)) for name, part in checkpoint.items(make_state(2)).items()}
  assert checkpoint.identity(str(tmp_path / 'one')) == {'step': 2, **prints}
  with checkpoint.opened(str(tmp_path / 'two'), KEEP) as manager:
    checkpoint.save(manager, make_state(2, seed=1))
  assert checkpoint.identity(str(tmp_path / 'two'))['params'] != prints['params']
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    checkpoint.identity(str(tmp_path / 'none'))


def test_nothing_there(tmp_path):
  """Failure: a first start does not begin at step 0, or a missing checkpoint ends in a traceback or leaves folders behind."""
  assert checkpoint.restore(checkpoint.open_manager(str(tmp_path / 'new'), KEEP), make_state(0)) is None
  for workdir in (tmp_path / 'new', tmp_path / 'absent'):
    with pytest.raises(ConfigError, match=f'{workdir}/checkpoints holds no checkpoint'):
      checkpoint.restore_params(str(workdir), 'policy')
  assert not (tmp_path / 'absent').exists()


def test_role(tmp_path):
  """Failure: the weights of one role cannot be had alone, or an unknown one is not refused by name."""
  saved(tmp_path, 1)
  got = checkpoint.restore_params(str(tmp_path), 'policy')
  jax.tree.map(np.testing.assert_array_equal, got, make_state(1).params['policy'])
  assert {len(x.devices()) for x in jax.tree.leaves(got)} == {1}
  with pytest.raises(ConfigError, match=f"{tmp_path}/checkpoints/1 holds no role 'critic'"):
    checkpoint.restore_params(str(tmp_path), 'critic')


def test_another_shape(tmp_path):
  """Failure: a checkpoint of another model is cut or padded to fit, or refused by a traceback."""
  manager = saved(tmp_path, 1)
  like = make_state(0)
  larger = {**like.params['policy'], 'embed': jnp.zeros((128, 16))}
  other = {**like.params['policy'], 'lm_head': jnp.zeros((64, 16))}
  for params in (larger, other):
    with pytest.raises(ConfigError, match=f'{tmp_path}/checkpoints/1'):
      checkpoint.restore(manager, like.replace(params={'policy': params}))


def delete(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 0x10
  path.write_bytes(raw)


@pytest.mark.parametrize('harm', [delete, truncate, flip])
def test_damage(harm, tmp_path):
  """Failure: weights that are not those that were saved are trained on, or damage ends in a traceback instead of the folder's name."""
  saved(tmp_path, 1, 2)
  folder, like, refused = tmp_path / 'checkpoints' / '2', make_state(0), set()
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    raw = path.read_bytes()
    harm(path)
    try:
      got = checkpoint.restore(checkpoint.open_manager(str(tmp_path)), like)
      if got.step == 2:
        assert_same_state(got, make_state(2))  # the file was none that matters
    except ConfigError as error:
      assert str(folder) in str(error) and '\n' not in str(error)
      refused.add(path.relative_to(folder).parts[0])
    path.write_bytes(raw)
  assert {'params', 'opt', 'rest', 'position'} <= refused
  assert_same_state(checkpoint.restore(checkpoint.open_manager(str(tmp_path)), like), make_state(2))


@pytest.mark.parametrize('item', ['params', 'opt', 'rest', 'position'])
def test_missing_folder(item, tmp_path):
  """Failure: a checkpoint without one of its parts is resumed from, or the advice to go back to an older one does not work."""
  saved(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints' / '2'
  (folder / item).rename(tmp_path / 'elsewhere')
  with pytest.raises(ConfigError, match=f'{folder} cannot be read .delete the folder to go back to an older one'):
    checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), make_state(0))
  folder.rename(tmp_path / 'deleted')
  assert_same_state(checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), make_state(0)), make_state(1))


@pytest.mark.parametrize(('old', 'new'), [('"step": 2', '"step": 3'), ('"train": 32', '"train": 48'), ('"step"', '"stop"')])
def test_damaged_position(old, new, tmp_path):
  """Failure: a run resumes at other data than it left, since only arrays are checked."""
  saved(tmp_path, 2)
  path = tmp_path / 'checkpoints' / '2' / 'position' / 'metadata'
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new))
  with pytest.raises(ConfigError, match=f'{tmp_path}/checkpoints/2'):
    checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), make_state(0))


def test_left_by_a_kill(tmp_path):
  """Failure: half a checkpoint is taken for a whole one, stands in the way of the next, or stays for ever."""
  saved(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints'
  (folder / '2').rename(folder / '2.orbax-checkpoint-tmp')
  reader = checkpoint.open_manager(str(tmp_path))
  assert reader.latest_step() == 1
  jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_params(str(tmp_path), 'policy'), make_state(1).params['policy'])
  assert (folder / '2.orbax-checkpoint-tmp').exists()  # who only reads deletes nothing
  manager = checkpoint.open_manager(str(tmp_path), KEEP)
  checkpoint.save(manager, make_state(2))
  checkpoint.wait(manager)
  assert sorted(path.name for path in folder.iterdir()) == ['1', '2']
  assert_same_state(checkpoint.restore(manager, make_state(0)), make_state(2))


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MiB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
  if os.getuid() or subprocess.run(command, capture_output=True).returncode:
    pytest.skip('mounting is not permitted here, so no disk can be filled')
  yield folder
  subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.parametrize('left', [0, 20_000, 60_000])
def test_full_disk(left, small_disk):
  """Failure: a full disk ends in a traceback, spoils the checkpoint before, leaves rubbish, or the next save fails too."""
  rng = np.random.default_rng(0)
  big = {'w': jnp.asarray(rng.normal(size=(100, 200)), jnp.float32)}  # 80 kB that do not compress

  def state(step):
    return make_state(step).replace(params={'policy': big})

  manager, filler = checkpoint.open_manager(str(small_disk), KEEP), small_disk / 'filler'
  checkpoint.save(manager, state(1))
  checkpoint.wait(manager)
  with filler.open('wb') as file:
    space = os.statvfs(small_disk)
    os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_bsize - left // space.f_bsize * space.f_bsize)
  with (
    pytest.raises(ConfigError, match=re.escape(f'no space left on {small_disk}/checkpoints while saving step 2')) as caught,
    checkpoint.opened(str(small_disk), KEEP) as manager,
  ):
    checkpoint.save(manager, state(2))
  assert 'the last good checkpoint is that of step 1' in str(caught.value) and '\n' not in str(caught.value)
  manager = checkpoint.open_manager(str(small_disk), KEEP)
  assert_same_state(checkpoint.restore(manager, state(0)), state(1))
  filler.unlink()
  for step in (2, 3):
    checkpoint.save(manager, state(step))
    assert_same_state(checkpoint.restore(manager, state(0)), state(step))
    manager = checkpoint.open_manager(str(small_disk), KEEP)
  checkpoint.wait(manager)
  assert sorted(path.name for path in (small_disk / 'checkpoints').iterdir()) == ['2', '3']


@pytest.fixture
def held_back(monkeypatch):
  """Saves whose writing waits for `go`; `began` is set when it is there."""
  write, began, go = jax_array_handlers._async_serialize_replica_slices, threading.Event(), threading.Event()

  async def late(*arguments, **others):
    began.set()
    await asyncio.to_thread(go.wait, 60)
    return await write(*arguments, **others)

  monkeypatch.setattr(jax_array_handlers, '_async_serialize_replica_slices', late)
  yield began, go
  go.set()


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (1, 1, 1)], ids=str)
def test_update_behind_a_save(sizes, held_back, tmp_path):
  """Failure: the next update writes into the memory that is still to be saved, or a save waits until everything is written."""
  began, go = held_back
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  state, expected = make_state(1, mesh), make_state(1)
  jax.block_until_ready(update(make_state(3, mesh).params))
  manager = checkpoint.open_manager(str(tmp_path), KEEP)
  checkpoint.save(manager, state)
  assert began.wait(60) and not (tmp_path / 'checkpoints' / '1').exists()
  later = [jax.block_until_ready(update(tree)) for tree in (state.params, state.opt['policy']['mu'], state.moving)]
  assert all((np.asarray(x) == -1).all() for x in jax.tree.leaves(later))
  go.set()
  checkpoint.wait(manager)
  assert_same_state(checkpoint.restore(checkpoint.open_manager(str(tmp_path), KEEP), make_state(0)), expected)


def test_last_good_checkpoint(tmp_path, monkeypatch):
  """Failure: a save that fails behind the steps is not told of, counts as a checkpoint, or makes the run forget the one that it has."""

  async def full(*arguments, **others):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with checkpoint.opened(str(tmp_path), Checkpoint(keep=1)) as manager:
    checkpoint.save(manager, make_state(1))
  for told in (checkpoint.wait, lambda manager: checkpoint.save(manager, make_state(3))):  # at the end, and at the next save
    with monkeypatch.context() as patch, checkpoint.opened(str(tmp_path), Checkpoint(keep=1)) as manager:
      patch.setattr(jax_array_handlers, '_async_serialize_replica_slices', full)
      checkpoint.save(manager, make_state(2))
      with pytest.raises(ConfigError, match='saving step 2; the last good checkpoint is that of step 1'):
        told(manager)
      assert manager.latest_step() == 1
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()] == ['1']
  with checkpoint.opened(str(tmp_path), Checkpoint(keep=1)) as manager:
    checkpoint.save(manager, make_state(2))
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['2']
  assert_same_state(checkpoint.restore(checkpoint.open_manager(str(tmp_path)), make_state(0)), make_state(2))
