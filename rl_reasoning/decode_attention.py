"""Attention of one new token a row over a cache, in parts that are joined by their log-sum-exp: XLA's code, which reads every slot, and a
Pallas kernel for TPUs, which reads those that are filled.

Queries are [B, G, K, Q, H], already scaled; caches as kv_cache has them, [B, G, ...], or [B, ...] where a group shares them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from rl_reasoning import attention, kv_cache, sharding
from rl_reasoning.arch import Arch
from rl_reasoning.kv_cache import Cache, Part
from rl_reasoning.structs import Array

BLOCK_BYTES = (
  2**19
)  # of keys in a step of the kernel: it fits into a core's memory many times, and takes longer to read than a step to begin
LANES, LARGEST_BLOCK = 128, 1024


class Sums(NamedTuple):
  """Of a softmax over some of the tokens."""

  out: Array  # [B, G, K, Q, H of values]: the values, each times exp(its score - best), added up
  best: Array  # float32 [B, G, K, Q, 1]: the largest score
  total: Array  # float32 [B, G, K, Q, 1]: exp(score - best), added up


def joined(a: Sums, b: Sums) -> Array:
  """Attention over the tokens of both, in the dtype of the first."""
  best = jnp.maximum(a.best, b.best)
  of_a, of_b = jnp.exp(a.best - best), jnp.exp(b.best - best)
  total = a.total * of_a + b.total * of_b
  return a.out * (of_a / total).astype(a.out.dtype) + b.out.astype(a.out.dtype) * (of_b / total).astype(a.out.dtype)


def by_xla(arch: Arch, q: Array, cache: Cache, bias: Array) -> Sums:
  """Over all slots. `bias` is added to the scores [B, G, K, Q, S]."""
  keys, values = cache[0], kv_cache.values(cache, arch.kv_lora_rank)
  shared = kv_cache.numbers(keys).ndim < q.ndim
  front = 'bk' if shared else 'bgk'

  def times_scale(x: Array, part: Part) -> Array:
    scale = kv_cache.scales(part)
    return x if scale is None else x * jnp.expand_dims(scale, (1, 3) if shared else 3)

  scores = jnp.einsum(f'bgkqh,{front}hs->bgkqs', q, kv_cache.numbers(keys).astype(q.dtype)).astype(jnp.float32)
  scores = attention.capped(arch, times_scale(scores, keys)) + bias
  best = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - best)
  total = weights.sum(-1, keepdims=True)
  weights = times_scale(weights, values).astype(q.dtype)
  return Sums(jnp.einsum(f'bgkqs,{front}sh->bgkqh', weights, kv_cache.numbers(values).astype(q.dtype)), best, total)


def block_of(cache: Cache) -> int:
  """Slots in a step of the kernel."""
  *_, K, H, S = kv_cache.numbers(cache[0]).shape
  size = max(LANES, min(LARGEST_BLOCK, BLOCK_BYTES // (K * H * kv_cache.numbers(cache[0]).dtype.itemsize) // LANES * LANES))
  return min(S, size)


def nearest(block: Array, filled: Array, window: int, size: int) -> Array:
  """The block itself, or outside of what is to be read the nearest one within, which is there already: nothing is fetched for it."""
  first = jnp.maximum(filled - window, 0) // size if window else 0
  return jnp.clip(block, first, jnp.maximum(filled - 1, 0) // size)


def step(
  filled_R, q_ref, k_ref, v_ref, k_scale, v_scale, out_ref, best_ref, total_ref, *, arch: Arch, window: int, size: int, S: int
):
  """One block of slots of one row: the running softmax lies in the results, which stay in a core's memory from block to block."""
  filled, first = filled_R[pl.program_id(0)], pl.program_id(1) * size

  @pl.when(first == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)
    best_ref[...] = jnp.full_like(best_ref, attention.NEG_INF)
    total_ref[...] = jnp.zeros_like(total_ref)

  inside = first < filled
  if window:
    inside &= first + size > filled - window

  @pl.when(inside)
  def _():
    q, keys = q_ref[...], k_ref[...].astype(q_ref.dtype)

    def read(slot):
      return (slot < filled) & (slot >= filled - window) if window else slot < filled

    scores = jax.lax.dot_general(q, keys, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)  # [K, Q, slots]
    if k_scale is not None:
      scores = scores * k_scale[...][:, None]
    slot = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    scores = jnp.where(read(slot), attention.capped(arch, scores), attention.NEG_INF)
    best = jnp.maximum(best_ref[...], scores.max(-1, keepdims=True))
    weights, before = jnp.exp(scores - best), jnp.exp(best_ref[...] - best)
    best_ref[...], total_ref[...] = best, total_ref[...] * before + weights.sum(-1, keepdims=True)
    if v_scale is not None:
      weights = weights * v_scale[...][:, None]
    values = keys[:, : arch.kv_lora_rank] if v_ref is None else v_ref[...].astype(q.dtype)
    across = 2 if v_ref is None else 1  # the axis of slots
    if S % size:  # what lies beyond the array is no number, and 0 times it is none either
      values = jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, values.shape, across) < S, values, jnp.zeros_like(values))
      weights = jnp.where(read(slot), weights, 0.0)
    sums = jax.lax.dot_general(
      weights.astype(q.dtype), values, (((2,), (across,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    out_ref[...] = out_ref[...] * before + sums


def on_device(arch: Arch, window: int, q: Array, cache: Cache, filled_BG: Array) -> Sums:
  """`by_kernel` of the rows and heads of one device."""
  (B, G, K, Q, H), S, size = q.shape, kv_cache.slots(cache), block_of(cache)

  def rows(x: Array) -> Array:
    return x.reshape(B * G, *x.shape[2:])

  def place(row, block, filled_R):
    return nearest(block, filled_R[row], window, size)

  def whole(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda row, j, filled_R: (row, 0, 0, 0))

  keys, values = cache
  by_token = pl.BlockSpec((None, K, size), lambda *at: (at[0], 0, place(*at)))
  scales = [kv_cache.scales(keys), kv_cache.scales(keys if values is None else values)]
  V = arch.kv_lora_rank if values is None else kv_cache.numbers(values).shape[-1]
  sums = pl.pallas_call(
    functools.partial(step, arch=arch, window=window, size=size, S=S),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B * G, -(-S // size)),
      in_specs=[
        whole(K, Q, H),
        pl.BlockSpec((None, K, H, size), lambda *at: (at[0], 0, 0, place(*at))),
        None if values is None else pl.BlockSpec((None, K, size, V), lambda *at: (at[0], 0, place(*at), 0)),
        *(None if scale is None else by_token for scale in scales),
      ],
      out_specs=[whole(K, Q, V), whole(K, Q, 1), whole(K, Q, 1)],
    ),
    out_shape=[jax.ShapeDtypeStruct((B * G, K, Q, width), jnp.float32) for width in (V, 1, 1)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    interpret=arch.attn_implementation == 'splash_interpret',
    name='decode_attention',
  )(
    filled_BG.reshape(-1), rows(q), rows(kv_cache.numbers(keys)), None if values is None else rows(kv_cache.numbers(values)),
    *(None if scale is None else rows(scale) for scale in scales),
  )  # fmt: skip
  return Sums(*(x.reshape(B, G, *x.shape[1:]) for x in sums))


def by_kernel(arch: Arch, window: int, q: Array, cache: Cache, filled_BG: Array) -> Sums:
  """Over the first filled_BG slots of each row, or the last `window` of them; where there are none, the total is 0. Every device takes its
  own rows, and its own heads: of keys, or of queries where all share one head of keys (latent attention)."""
  own = functools.partial(on_device, arch, window)
  if jax.sharding.get_abstract_mesh().empty:
    return own(q, cache, filled_BG)
  heads: tuple = (None, 'heads') if cache[1] is None else ('kv_heads', None)
  by_row, by_head = sharding.spec('rollout_rows', None), sharding.spec('rollout_rows', None, *heads, None)
  of_cache = jax.tree.map(lambda x: PartitionSpec(*sharding.spec('rollout_rows', None, heads[0]), *(None,) * (x.ndim - 3)), cache)
  return jax.shard_map(own, in_specs=(by_head, of_cache, by_row), out_specs=by_head, check_vma=False)(q, cache, filled_BG)
