"""Meshes, shardings by logical axis, and rows on their way to the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rl_reasoning import sharding
from rl_reasoning.structs import DATA, Batch


@pytest.mark.parametrize(
  ('sizes', 'shape'), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((2, 2, 2), (2, 2, 2))]
)
def test_mesh(sizes, shape):
  """Failure: -1 is not what is left of the devices, or the axes are called otherwise."""
  assert dict(sharding.make_mesh(*sizes).shape) == {**dict(zip(('data', 'fsdp', 'tensor'), shape)), 'sequence': 1, 'expert': 1}
  several = {'data': 1, 'fsdp': 2, 'sequence': 2, 'tensor': 1, 'expert': 2}
  assert dict(sharding.make_mesh(-1, 2, 1, expert=2, sequence=2).shape) == several


@pytest.mark.parametrize(
  ('sizes', 'says'),
  [((3, 1, 1), '8 devices'), ((-1, 3, 1), '8 devices'), ((4, 4, 1), '8 devices'), ((-1, -1, 1), 'at most one'), ((8, 0, 1), 'positive'),
   ((-2, 1, 1), 'positive')],
)  # fmt: skip
def test_impossible_mesh(sizes, says):
  """Failure: a mesh that leaves devices idle or cannot be is taken, or refused without its sizes."""
  with pytest.raises(ValueError, match=f"'data': {sizes[0]}, 'fsdp': {sizes[1]}, 'sequence': 1, 'tensor': {sizes[2]}.*{says}"):
    sharding.make_mesh(*sizes)


def test_named():
  """Failure: a weight lies on other devices than its axes say, or an indivisible one fails without name, axis and size."""
  mesh = sharding.make_mesh(2, 2, 2)
  assert sharding.named(mesh, (3, 8, 6), ('layer', 'embed', 'heads'), 'q').spec == PartitionSpec(None, 'fsdp', 'tensor')
  assert sharding.named(mesh, (4, 5), ('rows', None), 'x').spec == PartitionSpec(('expert', 'data', 'fsdp'), None)
  with pytest.raises(ValueError, match=r"weight q: axis 'heads' of size 5 does not divide over 2 devices"):
    sharding.named(mesh, (3, 8, 5), ('layer', 'embed', 'heads'), 'weight q')
  assert [sharding.axis_size(mesh, axis) for axis in ('rows', 'layer', 'vocab')] == [4, 1, 2]


def test_put_rows():
  """Failure: rows arrive in another order, on other devices, or a field is lost on the way."""
  mesh = sharding.make_mesh(2, 2, 2)
  x = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  batch = Batch(x, x, x, x.astype(np.float32), np.full(8, DATA, np.int32), np.arange(8, dtype=np.int32), extras={'rank': x[:, 0]})
  put = sharding.put_rows(mesh, batch)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(put), batch)
  assert put.logp_old_NT is None
  for field in (put.tokens, put.source_N, put.extras['rank']):
    assert {tuple(range(8)[s.index[0]]) for s in field.addressable_shards} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    for shard in field.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.asarray(field)[shard.index])
  column = [
    [shard.index[0].start // 2 for shard in put.tokens.addressable_shards if shard.device == d] for d in mesh.devices.flat
  ]
  assert column == [[0], [0], [1], [1], [2], [2], [3], [3]]  # the two devices of a tensor pair hold the same rows


def test_put_rows_indivisible():
  """Failure: rows are dropped or padded without a word where they do not divide."""
  with pytest.raises(ValueError, match=r"batch x: axis 'rows' of size 6 does not divide over 4 devices"):
    sharding.put_rows(sharding.make_mesh(2, 2, 2), {'x': np.zeros((6, 2))})


def test_constrain():
  """Failure: a hint changes values, is not followed on a mesh, or needs one."""
  x = np.arange(16.0).reshape(8, 2)
  hinted = jax.jit(lambda x: sharding.constrain(x + 1, 'rows', None))
  np.testing.assert_array_equal(hinted(x), x + 1)
  mesh = sharding.make_mesh(2, 4, 1)
  with jax.set_mesh(mesh):
    y = hinted(x)
  np.testing.assert_array_equal(y, x + 1)
  assert y.sharding.is_equivalent_to(sharding.named(mesh, x.shape, ('rows', None), 'y'), 2)


def test_size_class():
  """Failure: a length is cut, a longer one gets fewer slots, much is padded, or there are many shapes to compile."""
  lengths = range(1, 5000)
  sizes = [sharding.size_class(n) for n in lengths]
  assert sizes == sorted(sizes)
  assert all(n <= size for n, size in zip(lengths, sizes))
  for beyond, most in ((32, 1 / 3), (128, 1 / 5)):
    assert max((size - n) / size for n, size in zip(lengths, sizes) if n > beyond) <= most
  assert sizes[0] == 16 and len(set(sizes)) < 30
  assert all(sharding.size_class(size) == size for size in sizes)
