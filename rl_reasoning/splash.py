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


def kernel_of(T: int, S: int, heads: int, window: int, cap: float, interpret: bool, head_shards: int, shards: int):
  """The kernel of T queries and S = T keys; of the queries each of `shards` devices has its part."""
  size, across = block_of(T // shards), block_of(S)
  mask = masks.LocalMask((T, S), (window - 1, 0), 0, shards) if window else masks.CausalMask((T, S), shard_count=shards)
  return kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=kernel.BlockSizes(
      block_q=size, block_kv=across, block_q_dkv=size, block_kv_dkv=across, block_q_dq=size, block_kv_dq=across
    ),
    attn_logits_soft_cap=cap or None,
    interpret=interpret,
    head_shards=head_shards,
    q_seq_shards=shards,
  )


def splash(q: Array, k: Array, v: Array, segment_NT: Array, *, scale: float, window: int, cap: float, interpret: bool) -> Array:
  """q [N, T, heads, H], k [N, T, K, H], v [N, T, K, H of values] -> [N, T, heads, H of values]. `window`: tokens, one's own included, 0:
  all; `cap`: of the scores, 0: none. Every device takes its own rows, heads and queries, and all keys of its rows: a kernel is nothing that
  the compiler could divide."""
  T, shards, head_shards = q.shape[1], sharding.ways('time'), sharding.ways('heads')
  padding = -T % (shards * block_of(-(-T // shards)))
  q = q * jnp.asarray(scale, q.dtype)
  q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
  segment = jnp.pad(segment_NT, ((0, 0), (0, padding)))
  attend = kernel_of(T + padding, T + padding, q.shape[1], window, cap, interpret, head_shards, shards)

  def own(attend, q: jax.Array, k: jax.Array, v: jax.Array, of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    return jax.vmap(attend)(q, k, v, kernel.SegmentIds(of_queries, of_keys))

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    queries, keys = sharding.spec('rows', 'heads', 'time', None), sharding.spec('rows', 'heads', None, None)
    of_kernel = attend.manual_sharding_spec(jax.sharding.NamedSharding(mesh, sharding.spec('heads', 'time')))
    specs = (of_kernel, queries, keys, keys, sharding.spec('rows', 'time'), sharding.spec('rows', None))
    own = jax.shard_map(own, in_specs=specs, out_specs=queries, check_vma=False)
  return own(attend, q, k, v, segment, segment).swapaxes(1, 2)[:, :T]
