"""Per-token mathematics of every objective: small, pure, float32, [N, T] in and out."""

from __future__ import annotations

import math

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


def clipped_value_loss(value: Array, value_old: Array, returns: Array, clip: float) -> tuple[Array, Array]:
  """0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2): PPO's value loss in its authors' code (openai/baselines ppo2).

  Returns:
    loss_NT, and 0/1 where the clip cuts the gradient: V is further than `clip` from V_old and nearer to R than the clip allows.
  """
  near = value_old + jnp.clip(value - value_old, -clip, clip)
  free, held = (value - returns) ** 2, (near - returns) ** 2
  # V_old + (V - V_old) is V only up to rounding: the distance decides, else every other token would count as clipped.
  clipped = (held > free) & (jnp.abs(value - value_old) > clip)
  return 0.5 * jnp.maximum(free, held), clipped.astype(jnp.float32)


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


def last_token(mask_NT: Array, segment_NT: Array) -> Array:
  """float32 [N, T]: 1 at the last masked token of each segment, where a reward model reads its score."""

  def row(mask, segment):
    place = jnp.arange(mask.shape[0])
    last = jax.ops.segment_max(jnp.where(mask > 0, place, -1), segment, num_segments=mask.shape[0] + 1)
    return (mask > 0) & (place == last[segment])

  return jax.vmap(row)(mask_NT, segment_NT).astype(jnp.float32)


def preferred_pairs(rank_UK: Array, present_UK: Array) -> Array:
  """float32 [U, K, K]: 1 where response i of a ranking stands before j (a smaller rank). A tie is no pair."""
  before = rank_UK[:, :, None] < rank_UK[:, None, :]
  return before * present_UK[:, :, None] * present_UK[:, None, :]


def mean_over_pairs(x_UKK: Array, pairs_UKK: Array) -> Array:
  """[U]: 0 where a ranking has no pair."""
  return jnp.sum(pairs_UKK * x_UKK, axis=(1, 2)) / jnp.maximum(jnp.sum(pairs_UKK, axis=(1, 2)), 1)


def ranking_loss(score_UK: Array, pairs_UKK: Array, margin_U: Array, center: float) -> Array:
  """[U]: mean over a ranking's pairs of -log sigmoid(s_w - s_l - margin) (InstructGPT, 2203.02155, eq. 1; the margin: Llama 2, 2307.09288,
  eq. 2) + center * (s_w + s_l)^2 (2312.09244), which holds the free constant of the scores near 0."""
  winner, loser = score_UK[:, :, None], score_UK[:, None, :]
  loss = jax.nn.softplus(-(winner - loser - margin_U[:, None, None])) + center * (winner + loser) ** 2
  return mean_over_pairs(loss, pairs_UKK)


def binary_cross_entropy(score: Array, target: Array) -> Array:
  """-target log sigmoid(score) - (1 - target) log sigmoid(-score), for targets in [0, 1]."""
  return jax.nn.softplus(score) - target * score


# Preferences. Pairs: what whole completions score, [U]; the margin is that of their implicit rewards, D = r_w - r_l.


def dpo(margin: Array, label_smoothing: float = 0.0) -> Array:
  """DPO (2305.18290, eq. 7), and cDPO where a share of the labels is taken to be wrong."""
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def ipo(margin: Array, beta: float) -> Array:
  """IPO (2310.12036, eq. 17): h_w - h_l = D / beta is drawn to 1 / (2 beta), and not beyond."""
  return ((margin - 0.5) / beta) ** 2


def hinge(margin: Array) -> Array:
  """SLiC (2305.10425)."""
  return jnp.maximum(0.0, 1 - margin)


def cpl(chosen: Array, rejected: Array, bias: float) -> Array:
  """CPL (2310.13639): -log(e^chosen / (e^chosen + e^(bias rejected))). With a bias below 1, lowering both likelihoods costs something."""
  return jax.nn.softplus(bias * rejected - chosen)


def log_odds(logp: Array) -> Array:
  """log(p / (1 - p)) of ORPO (2403.07691), p being e to the mean log-probability of a completion. In float32 that may round to 1: the odds
  stop growing before, where they would be infinite and their gradient NaN."""
  logp = jnp.minimum(logp, -1e-6)
  return logp - jnp.log(-jnp.expm1(logp))


def kto(h: Array, z0: Array, label: Array, beta: float, desirable: float, undesirable: float) -> Array:
  """KTO (2402.01306): how far the log-ratio h of a completion is on the wrong side of z0. A label between 0 and 1 weighs both sides."""
  good = desirable * jax.nn.sigmoid(beta * (z0 - h))  # 1 - sigmoid(beta (h - z0))
  bad = undesirable * jax.nn.sigmoid(beta * (h - z0))
  return label * good + (1 - label) * bad


# Distributions, as log-probabilities over the last axis.
NO_MASS = -1e30  # the logarithm of nothing; finite, so that 0 times a difference of two of them is 0


def buckets(logp: Array, ids: Array) -> Array:
  """[..., K + 1]: the K given ids, and all others together."""
  kept = jnp.take_along_axis(logp, ids, axis=-1)
  # Summed, not 1 - sum of the kept: of that, float32 leaves nothing where the kept ids are likely, as they are to become.
  others = jax.nn.logsumexp(jnp.put_along_axis(logp, ids, NO_MASS, axis=-1, inplace=False), axis=-1, keepdims=True)
  return jnp.concatenate([kept, others], axis=-1)


def kl_divergence(p: Array, q: Array) -> Array:
  """KL(P || Q)."""
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def jensen_shannon(p: Array, q: Array, beta: float) -> Array:
  """The generalised Jensen-Shannon divergence of GKD (2306.13649, eq. 1): beta KL(P || M) + (1 - beta) KL(Q || M) with the mixture M =
  beta P + (1 - beta) Q. At 0 and 1, where that is 0, by definition what it comes to when divided by beta or 1 - beta: KL(P || Q) and
  KL(Q || P)."""
  if beta == 0:
    return kl_divergence(p, q)
  if beta == 1:
    return kl_divergence(q, p)
  m = jnp.logaddexp(p + math.log(beta), q + math.log1p(-beta))
  return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
