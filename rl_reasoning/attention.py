"""The attention sublayers: grouped-query attention (2305.13245) and DeepSeek's multi-head latent attention (2405.04434).

A sublayer projects, turns, and hands queries, keys and values to `attend(q, k, v) -> (out, kept)`: over all of a sequence in training and
prefill (`sequence_attention`), over a cache in decode (rollout.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rl_reasoning import rope, splash
from rl_reasoning.arch import Arch
from rl_reasoning.lora import linear
from rl_reasoning.structs import Array

LATENT_EPS = 1e-6  # of the norms of latents, in the published code, whatever rms_norm_eps is
ABSORBED = 'kv_up'  # the weight that is multiplied into others in decode
NEG_INF = -1e30  # finite: a row that attends to nothing must not become NaN


def rms_norm(x: Array, scale: Array, eps: float, offset: bool = False) -> Array:
  """Statistics in float32 whatever the compute dtype, as every published checkpoint of these families was trained. With `offset` it
  multiplies by 1 + scale, before it rounds."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  if offset:
    return (x32 * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
  return x32.astype(x.dtype) * scale.astype(x.dtype)


def norm(arch: Arch, x: Array, scale: Array) -> Array:
  return rms_norm(x, scale, arch.rms_norm_eps, arch.norm_offset)


def project_qkv(arch: Arch, w: dict[str, Array], x: Array) -> tuple[Array, Array, Array]:
  """[N, T, D] -> q [N, T, heads, H], k and v [N, T, K, H]; one matmul where `fuse` joined the weights."""
  heads, K, H = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
  if 'qkv' in w:
    qkv = (x @ w['qkv']).reshape(*x.shape[:-1], heads + 2 * K, H)
    q, k, v = qkv[..., :heads, :], qkv[..., heads : heads + K, :], qkv[..., heads + K :, :]
  else:
    q, k, v = (linear(w, name, x) for name in ('q', 'k', 'v'))
  if arch.qkv_bias:
    q, k, v = q + w['q_bias'], k + w['k_bias'], v + w['v_bias']
  if arch.qk_norm:
    q, k = norm(arch, q, w['q_norm']), norm(arch, k, w['k_norm'])
  return q, k, v


def attention(
  arch: Arch, w: dict[str, Array], x: Array, turn: rope.Angles, attend: Callable, absorbed: bool
) -> tuple[Array, Any]:
  """[N, T, D] -> what the sublayer adds, and what `attend` keeps (a cache, or None)."""
  if arch.kv_lora_rank:
    return latent_attention(arch, w, x, turn, attend, absorbed)
  q, k, v = project_qkv(arch, w, x)
  out, kept = attend(rope.rotate(q, turn), rope.rotate(k, turn), v)
  return linear(w, 'o', out, 2), kept


def latent_attention(
  arch: Arch, w: dict[str, Array], x: Array, turn: rope.Angles, attend: Callable, absorbed: bool
) -> tuple[Array, Any]:
  """Keys and values are up-projections of one latent of R = kv_lora_rank numbers a token, beside which one turned key is shared by all
  heads. The cache holds these as its keys, [N, T, 1, R + rope], and no values.

  `absorbed` multiplies the up-projections into queries and output, so that attention reads the cache as it is, as one head of keys whose
  first R numbers are the values: cheap where there is one query a row, dear where there are many.
  """
  R, turned = arch.kv_lora_rank, arch.qk_rope_head_dim
  if arch.q_lora_rank:
    q = linear(w, 'q_up', rms_norm(linear(w, 'q_down', x), w['q_down_norm'], LATENT_EPS))
  else:
    q = linear(w, 'q', x)
  plain = arch.head_dim - turned
  q_plain, q_turned = q[..., :plain], rope.rotate(q[..., plain:], turn, arch.rope_interleave)
  latent = linear(w, 'kv_down', x)
  shared = rope.rotate(latent[..., None, R:], turn, arch.rope_interleave)  # [N, T, 1, rope]
  latent = rms_norm(latent[..., :R], w['kv_down_norm'], LATENT_EPS)
  cached = jnp.concatenate([latent[..., None, :], shared], axis=-1)
  if absorbed:  # in decode, where its adapter is merged
    k_up, v_up = w[ABSORBED][..., :plain], w[ABSORBED][..., plain:]  # [R, heads, plain], [R, heads, v]
    q = jnp.concatenate([jnp.einsum('ntkh,rkh->ntkr', q_plain, k_up), q_turned], axis=-1)
    out, kept = attend(q, cached, None)
    out = jnp.einsum('ntkr,rkh->ntkh', out, v_up)
  else:
    k, v = jnp.split(linear(w, ABSORBED, latent), [plain], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:-1], turned))], axis=-1)
    out, _ = attend(jnp.concatenate([q_plain, q_turned], axis=-1), k, v)
    kept = cached, None
  return linear(w, 'o', out, 2), kept


def causal_bias(position_NT: Array, segment_NT: Array, window: int) -> Array:
  """[N, 1, 1, T, S]: 0 within a segment, to positions not after one's own and less than `window` before it; padding is segment 0 and
  reads only padding."""
  before = position_NT[:, :, None] - position_NT[:, None, :]
  mask = (segment_NT[:, :, None] == segment_NT[:, None, :]) & (before >= 0)
  if window:
    mask &= before < window
  return jnp.where(mask, 0.0, NEG_INF)[:, None, None]


def capped(arch: Arch, scores: Array) -> Array:
  cap = arch.attn_logit_softcapping
  return cap * jnp.tanh(scores / cap) if cap else scores


def causal_attention(arch: Arch, bias: Array) -> Callable:
  """Attention of all tokens under `causal_bias`; float32 softmax."""
  scale = rope.score_scale(arch)

  def attend(q, k, v):
    N, T, heads, H = q.shape
    q = q.reshape(N, T, k.shape[2], -1, H)
    scores = capped(arch, jnp.einsum('ntkqh,nskh->nkqts', q, k).astype(jnp.float32) * scale) + bias
    out = jnp.einsum('nkqts,nskh->ntkqh', jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return out.reshape(N, T, heads, v.shape[-1]), (k, v)

  return attend


def cudnn_attention(arch: Arch, bias: Array) -> Callable:
  """The same by cuDNN's fused kernel, which has no segments: its bias is that of all heads together, so that there is [N, T, T], but no
  scores of every head. It wants an even number of tokens."""
  scale = rope.score_scale(arch)

  def attend(q, k, v):
    T, odd = q.shape[1], q.shape[1] % 2
    padded = [jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v)]
    mask = jnp.pad(bias[:, 0], ((0, 0), (0, 0), (0, odd), (0, odd)), constant_values=NEG_INF)
    out = jax.nn.dot_product_attention(*padded, bias=mask.astype(q.dtype), scale=scale, implementation='cudnn')
    return out[:, :T], (k, v)

  return attend


def splash_attention(arch: Arch, segment_NT: Array, windows: Sequence[int], index: Array) -> Callable:
  """The same by a kernel whose mask is static: that of the layer is chosen while the program runs, by the index of its window."""
  kernels = [
    functools.partial(
      splash.splash, scale=rope.score_scale(arch), window=window, cap=arch.attn_logit_softcapping,
      interpret=arch.attn_implementation == 'splash_interpret',
    )
    for window in windows
  ]  # fmt: skip

  def attend(q, k, v):
    out = kernels[0](q, k, v, segment_NT) if len(kernels) == 1 else jax.lax.switch(index, kernels, q, k, v, segment_NT)
    return out, (k, v)

  return attend


def masks(arch: Arch, position_NT: Array, segment_NT: Array, windows: Sequence[int]) -> list[Array]:
  """What `sequence_attention` is told of a layer with each of the windows: a bias, or for static masks the index of the window."""
  if arch.attn_implementation.startswith('splash'):
    return [jnp.int32(index) for index in range(len(windows))]
  return [causal_bias(position_NT, segment_NT, window) for window in windows]


def sequence_attention(arch: Arch, segment_NT: Array, windows: Sequence[int], mask: Array) -> Callable:
  """Attention of all tokens to those of their segment that are not behind them, in a layer whose window is that of its `mask` (see
  `masks`), by the code that the run has chosen."""
  if arch.attn_implementation == 'xla':
    return causal_attention(arch, mask)
  if arch.attn_implementation == 'cudnn':
    return cudnn_attention(arch, mask)
  return splash_attention(arch, segment_NT, windows, mask)
