"""Per-token mathematics of every objective: small, pure, float32, [N, T] in and out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_reasoning.structs import Array


def per_sequence(x_NT: Array, segment_NT: Array) -> Array:
  """Each segment's sum, spread back over its tokens: what `.sum(-1)` would be if rows were never packed."""

  def row(x, segment):
    return jax.ops.segment_sum(x, segment, num_segments=x.shape[0] + 1)[segment]

  return jax.vmap(row)(x_NT, segment_NT)


def importance_ratio(logp: Array, logp_old: Array, mask_NT: Array, segment_NT: Array, level: str) -> Array:
  """exp(logp - logp_old) per token, or GSPO's (2507.18071) per sequence: s = exp(mean over the sequence's masked tokens), as
  stop_grad(s) * exp(logp - stop_grad(logp)), so that each token carries its own gradient."""
  change = logp - logp_old
  if level == 'token':
    return jnp.exp(change)
  mean = per_sequence(mask_NT * change, segment_NT) / jnp.maximum(per_sequence(mask_NT, segment_NT), 1)
  return jax.lax.stop_gradient(jnp.exp(mean)) * jnp.exp(logp - jax.lax.stop_gradient(logp))


def clipped_surrogate(
  ratio: Array, advantage: Array, low: float, high: float, delta: float | None = None
) -> tuple[Array, dict[str, Array]]:
  """PPO's clipped objective as a loss (1707.06347, eq. 7): max(-A r, -A clip(r, 1 - low, 1 + high)).

  `delta` is the bound c of dual-clip PPO (1912.09729): for A < 0 the loss is at most -c A, which PPO itself leaves unbounded in r.

  Returns:
    loss_NT, and 0/1 arrays of where the gradient is cut: `low` (A < 0 and r below), `high` (A > 0 and r above), `dual` (A < 0 and r > c).
  """
  loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high))
  clipped = {'low': (ratio < 1 - low) & (advantage < 0), 'high': (ratio > 1 + high) & (advantage > 0)}
  if delta is not None:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -delta * advantage), loss)
    clipped['dual'] = (ratio > delta) & (advantage < 0)
  return loss, {name: x.astype(jnp.float32) for name, x in clipped.items()}


def capped_reinforce(logp: Array, ratio: Array, advantage: Array, cap: float) -> tuple[Array, dict[str, Array]]:
  """CISPO (2506.13585, eq. 4): -stop_grad(min(r, cap)) A logp. The weight is bounded, and no token loses its gradient."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio, cap))
  return -weight * advantage * logp, {'high': (ratio > cap).astype(jnp.float32)}


def soft_overlong(length: Array, limit: int, buffer: int) -> Array:
  """DAPO's penalty (2503.14476, eq. 13), lengths in tokens: 0 up to limit - buffer, then falling to -1 at the limit."""
  return jnp.clip(((limit - buffer) - length) / buffer, -1.0, 0.0)


def kl_estimate(logp: Array, logp_ref: Array, estimator: str) -> Array:
  """Schulman's estimators of KL(policy || ref) from samples of the policy (joschu.net/blog/kl-approx.html)."""
  k1 = logp - logp_ref
  if estimator == 'k1':
    return k1
  if estimator == 'k2':
    return 0.5 * k1 * k1
  if estimator == 'k3':
    return jnp.exp(-k1) + k1 - 1.0
  raise ValueError(f'kl_estimator {estimator!r} is none of k1, k2, k3')
