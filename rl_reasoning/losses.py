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


def clipped_surrogate(logp: Array, logp_old: Array, advantage: Array, low: float, high: float) -> tuple[Array, dict[str, Array]]:
  """PPO's clipped objective as a loss (1707.06347, eq. 7): max(-A r, -A clip(r, 1 - low, 1 + high)).

  Returns:
    loss_NT, and 0/1 arrays of where the clip holds: `low` (A < 0 and r below), `high` (A > 0 and r above).
  """
  ratio = jnp.exp(logp - logp_old)
  loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high))
  clipped = {'low': (ratio < 1 - low) & (advantage < 0), 'high': (ratio > 1 + high) & (advantage > 0)}
  return loss, {name: x.astype(jnp.float32) for name, x in clipped.items()}


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
