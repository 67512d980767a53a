"""Attention of whole sequences by JAX's Pallas kernel for TPUs (splash attention: the blocked softmax of 2205.14135, which skips blocks
that the mask empties), so that no [T, T] of scores ever exists, forward or backward.

Its mask is static: causal by index, within a window of so many indices. That is causal by position, too, as the tokens of a segment lie
side by side with positions that rise by one; what else a token must not read is of another segment. Padding is segment 0, wherever it
lies, and reads padding, so that no row of scores is empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel, splash_attention_mask as masks

from rl_reasoning import sharding
from rl_reasoning.structs import Array

LANES = 128  # a block of keys is a multiple of it
# Tokens of a block: large ones feed the matrix unit, and 512 x 512 float32 scores fit into a core's memory many times.
BLOCKS = (512, 384, 256)


def block_of(T: int) -> int:
  """The size of the blocks of T tokens, whose multiple T is padded to: all of them where they are few, else the size that pads least."""
  if max(BLOCKS) >= T:
    return -(-T // LANES) * LANES
  return min(BLOCKS, key=lambda size: (-(-T // size) * size, -size))


def local(q: Array, k: Array, v: Array, segment_NT: Array, window: int, cap: float, interpret: bool) -> Array:
  """`splash` of the rows and heads of one device."""
  (_, T, heads, _), size = q.shape, block_of(q.shape[1])
  padding = -T % size
  q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
  segment = jnp.pad(segment_NT, ((0, 0), (0, padding)))
  shape = (T + padding, T + padding)
  mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  attend = kernel.make_splash_mha_single_device(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=kernel.BlockSizes(
      block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    ),
    attn_logits_soft_cap=cap or None,
    interpret=interpret,
  )
  out = jax.vmap(attend)(q, k, v, kernel.SegmentIds(segment, segment))
  return out.swapaxes(1, 2)[:, :T]


def splash(q: Array, k: Array, v: Array, segment_NT: Array, *, scale: float, window: int, cap: float, interpret: bool) -> Array:
  """q [N, T, heads, H], k [N, T, K, H], v [N, T, K, H of values] -> [N, T, heads, H of values]. `window`: tokens, one's own included, 0:
  all; `cap`: of the scores, 0: none. Every device takes its own rows and heads: a kernel is nothing that the compiler could divide."""

  def own(q: Array, k: Array, v: Array, segment_NT: Array) -> Array:
    return local(q, k, v, segment_NT, window, cap, interpret)

  q = q * jnp.asarray(scale, q.dtype)
  if jax.sharding.get_abstract_mesh().empty:
    return own(q, k, v, segment_NT)
  by_head, by_row = sharding.spec('rows', None, 'heads', None), sharding.spec('rows', None)
  sharded = jax.shard_map(own, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False)
  return sharded(q, k, v, segment_NT)
