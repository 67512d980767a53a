"""(logits, uniform number) -> (token, log-probability under the distribution sampled from)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_reasoning import sharding
from rl_reasoning.structs import Array

NEG_INF = -1e30


def truncate(logits_NV: Array, top_k: int, top_p: float, min_p: float) -> Array:
  """Logits with everything outside top-k, top-p (1904.09751) and min-p (2407.01082) at NEG_INF. The best token always stays."""
  if top_k and top_k < logits_NV.shape[-1]:
    kth = jax.lax.top_k(logits_NV, top_k)[0][:, -1:]
    logits_NV = jnp.where(logits_NV < kth, NEG_INF, logits_NV)
  if top_p < 1:
    ordered = jnp.sort(logits_NV, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of the tokens ahead of this one
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    logits_NV = jnp.where(logits_NV < jnp.take_along_axis(ordered, last, axis=-1), NEG_INF, logits_NV)
  if min_p > 0:
    best = jnp.max(logits_NV, axis=-1, keepdims=True)
    logits_NV = jnp.where(logits_NV < best + jnp.log(min_p), NEG_INF, logits_NV)
  return logits_NV


def first_above(mass: Array, x_N: Array) -> tuple[Array, Array]:
  """Index of the first entry of `mass` [N, M] with mass at which the running sum passes x, and what of x is left inside that entry.
  XLA sums in a tree, so running sums need not rise: an entry without mass is passed over by its mass, not by its sum."""
  sums = jnp.cumsum(mass, axis=-1)
  here = (sums > x_N[:, None]) & (mass > 0)
  last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
  index = jnp.where(jnp.any(here, axis=-1), jnp.argmax(here, axis=-1), last)
  before = jnp.take_along_axis(sums - mass, index[:, None], axis=-1)[:, 0]
  return index, jnp.maximum(x_N - before, 0.0)


def sample(
  logits_NV: Array, u_N: Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Array, Array]:
  """Inverse-CDF sampling, one uniform number in [0, 1) a row.

  The sum runs over blocks first and then inside one block: a tenth of the time of Gumbel noise over a vocabulary of 49,152 on CPU.
  temperature 0 takes the best token; its log-probability is then reported at temperature 1.

  Returns:
    token_N int32, logp_N float32: renormalised over the tokens that top-k, top-p and min-p leave.
  """
  logits_NV = logits_NV.astype(jnp.float32)
  N, V = logits_NV.shape
  if temperature == 0:
    token = jnp.argmax(logits_NV, axis=-1)
    return token.astype(jnp.int32), jax.nn.log_softmax(logits_NV)[jnp.arange(N), token]
  logits_NV = truncate(logits_NV / temperature, top_k, top_p, min_p)
  best = jnp.max(logits_NV, axis=-1, keepdims=True)
  cuts, block = sharding.ways('vocab'), max(8, int(V**0.5))
  mass = jnp.exp(logits_NV - best).reshape(N, cuts, -1)  # no block is of two devices
  mass = jnp.pad(mass, ((0, 0), (0, 0), (0, -(V // cuts) % block)))
  blocks = mass.shape[-1] // block  # of a device
  mass = mass.reshape(N, -1, block)
  block_mass = jnp.sum(mass, axis=-1)
  total = jnp.sum(block_mass, axis=-1)
  which, rest = first_above(block_mass, u_N * total)
  inside, _ = first_above(jnp.take_along_axis(mass, which[:, None, None], axis=1)[:, 0], rest)
  token = which // blocks * (V // cuts) + which % blocks * block + inside
  logp = logits_NV[jnp.arange(N), token] - best[:, 0] - jnp.log(total)
  return token.astype(jnp.int32), logp
