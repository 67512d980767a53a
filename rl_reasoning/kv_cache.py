"""The keys and values of tokens read already, as they lie in memory: in the compute dtype, or quantised to one byte a number.

A quantised token has one float32 scale a head. The scores of keys and the weights of values are multiplied by it, so that nothing of the
cache's length has to be dequantised in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_reasoning import sharding
from rl_reasoning.structs import Array

LARGEST = {'int8': 127.0, 'float8_e4m3fn': 448.0}
SMALLEST = 1e-30  # of a token's largest number: one that is all zeros must not be divided by 0


class Scaled(NamedTuple):
  """Numbers of one byte, and what to multiply them by."""

  data: Array  # as the array it stands for
  scale: Array  # float32 [..., S], one a token and head


Part = Array | Scaled
# Keys [..., K, H, S], values [..., K, S, H]. Keys are transposed: 7 to 8 % of a decode step on CPU. On TPUs, too, that is how the matrix
# unit takes them, and a head of 64 numbers wastes no lane, where the tokens lie along the lanes; the price is that a new token touches a
# tile of 128 tokens. Values None: the first part of the keys (latent attention).
Cache = tuple[Part, Part | None]


def quantised(x: Array, dtype: str) -> tuple[Array, Array]:
  """(the numbers [..., H], their scales [...]), symmetric around 0."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST) / LARGEST[dtype]
  x = jnp.clip(x / scale[..., None], -LARGEST[dtype], LARGEST[dtype])
  return (jnp.round(x) if dtype == 'int8' else x).astype(dtype), scale


def lay(x: Array, dtype: str, order: tuple[int, int, int]) -> Part:
  """[..., T, K, H] with its last three axes in this order."""

  def turned(x, order):
    front = x.ndim - len(order)
    return x.transpose(*range(front), *(front + axis for axis in order))

  if dtype not in LARGEST:
    return turned(x.astype(dtype), order)
  data, scale = quantised(x, dtype)
  return Scaled(turned(data, order), turned(scale, (1, 0)))


def of(k: Array, v: Array | None, dtype: str) -> Cache:
  """The cache of k and v [..., T, K, H]."""
  return lay(k, dtype, (1, 2, 0)), None if v is None else lay(v, dtype, (1, 0, 2))


def each(function: Callable[..., Array], *caches: Cache) -> Cache:
  """`function(*arrays, axis)` of the arrays that the caches have in the same places, with the axis of their tokens."""

  def one(parts: tuple[Any, ...], axis: int) -> Part:
    if not isinstance(parts[0], Scaled):
      return function(*parts, parts[0].ndim + axis)
    data, scale = zip(*parts)
    return Scaled(function(*data, data[0].ndim + axis), function(*scale, scale[0].ndim - 1))

  keys, values = zip(*caches)
  return one(keys, -1), None if values[0] is None else one(values, -2)


def grown(cache: Cache, size: int) -> Cache:
  """With `size` slots."""

  def pad(x, axis):
    return jnp.pad(x, [(0, size - x.shape[axis] if axis == i else 0) for i in range(x.ndim)])

  return each(pad, cache)


def with_axes(function: Callable[[Array, tuple], Any], cache: Cache) -> Any:
  """`function(x, its logical axes)` of every array of a cache of prompts [B, ...] or of completions [B, G, ...]."""

  def one(part: Part | None) -> Any:
    if part is None:
      return None
    data = numbers(part)
    axes = ('rollout_rows', *(None,) * (data.ndim - 4), sharding.kv_axis(data.shape[-3]), None, None)
    return (
      Scaled(function(part.data, axes), function(part.scale, axes[:-1])) if isinstance(part, Scaled) else function(part, axes)
    )

  return one(cache[0]), one(cache[1])


def written(cache: Cache, new: Cache, at: Array) -> Cache:
  """With the tokens of `new` from the slot `at` on."""
  return each(lambda x, new, axis: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis), cache, new)


def numbers(part: Part) -> Array:
  """Of the keys or values, without their scales."""
  return part.data if isinstance(part, Scaled) else part


def scales(part: Part) -> Array | None:
  return part.scale if isinstance(part, Scaled) else None


def slots(cache: Cache) -> int:
  return numbers(cache[0]).shape[-1]


def dtype_of(cache: Cache) -> str:
  return numbers(cache[0]).dtype.name


def values(cache: Cache, latent: int) -> Part:
  """[..., K, S, H of values]: where there are none, the first `latent` numbers of the keys."""
  k, v = cache
  if v is not None:
    return v
  data = jnp.swapaxes(numbers(k)[..., :latent, :], -1, -2)
  return Scaled(data, k.scale) if isinstance(k, Scaled) else data
