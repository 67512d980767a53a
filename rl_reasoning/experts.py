"""The feed-forward sublayers: dense SwiGLU, and mixtures of experts (Mixtral 2401.04088, Qwen3-MoE 2505.09388, DeepSeek-V3 2412.19437)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl_reasoning.arch import Arch
from rl_reasoning.lora import linear
from rl_reasoning.structs import Array

ACT = {'silu': jax.nn.silu, 'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True)}


def dense(arch: Arch, w: dict[str, Array], x: Array, prefix: str = '') -> Array:
  if 'gate_up' in w and not prefix:
    gate, up = jnp.split(x @ w['gate_up'], 2, axis=-1)
  else:
    gate, up = linear(w, prefix + 'gate', x), linear(w, prefix + 'up', x)
  return linear(w, prefix + 'down', ACT[arch.hidden_act](gate) * up)


class Routed(NamedTuple):
  """Which experts a token goes to."""

  chosen: Array  # int32 [..., k]
  weights: Array  # float32 [..., k]


def route(arch: Arch, w: dict[str, Array], x: Array, replay: Array | None = None) -> Routed:
  """The experts of every token of x [..., D]. `replay` [..., k]: those that the sampler chose; -1 where it is not known. Their weights are
  the router's of now in any case, so that it has a gradient (2510.11370)."""
  k = arch.num_experts_per_tok
  scores = jnp.einsum('...d,de->...e', x.astype(jnp.float32), w['router'].astype(jnp.float32))
  scores = jax.nn.sigmoid(scores) if arch.scoring_func == 'sigmoid' else jax.nn.softmax(scores, axis=-1)
  wanted = jax.lax.stop_gradient(scores)
  if 'router_bias' in w:  # it balances the load without a loss: it decides who is chosen, not by how much
    wanted = wanted + jax.lax.stop_gradient(w['router_bias'].astype(jnp.float32))
  if arch.n_group > 1:
    groups = wanted.reshape(*wanted.shape[:-1], arch.n_group, -1)
    best = jax.lax.top_k(groups, 2)[0].sum(-1)
    allowed = jax.nn.one_hot(jax.lax.top_k(best, arch.topk_group)[1], arch.n_group, dtype=bool).any(-2)
    wanted = jnp.where(allowed[..., None], groups, -jnp.inf).reshape(wanted.shape)
  chosen = jax.lax.top_k(wanted, k)[1]
  if replay is not None:
    chosen = jnp.where(replay >= 0, replay, chosen)
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if arch.norm_topk_prob:
    weights = weights / (weights.sum(-1, keepdims=True) + (1e-20 if arch.scoring_func == 'sigmoid' else 0.0))
  return Routed(chosen, weights * arch.routed_scaling_factor)


def grouped(arch: Arch, w: dict[str, Array], x: Array, routed: Routed) -> Array:
  """Every token through its experts: rows sorted by expert, one grouped matmul for all of them."""
  (*front, D), k, E = x.shape, arch.num_experts_per_tok, w['experts_gate'].shape[0]
  rows, expert = x.reshape(-1, D), routed.chosen.reshape(-1)
  order = jnp.argsort(expert, stable=True)
  sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
  sorted_rows = rows[order // k]

  def matmul(rows: Array, name: str) -> Array:
    return jax.lax.ragged_dot(jnp.asarray(rows), jnp.asarray(w[name]), sizes)

  out = matmul(ACT[arch.hidden_act](matmul(sorted_rows, 'experts_gate')) * matmul(sorted_rows, 'experts_up'), 'experts_down')
  out = out * routed.weights.reshape(-1)[order, None].astype(out.dtype)
  return jnp.zeros_like(rows).at[order // k].add(out).reshape(*front, D)


def mlp(arch: Arch, w: dict[str, Array], x: Array, replay: Array | None = None) -> tuple[Array, Array | None]:
  """(what the sublayer adds, the experts chosen [..., k] int32 or None)."""
  if 'router' not in w:
    return dense(arch, w, x), None
  routed = route(arch, w, x, replay)
  out = grouped(arch, w, x, routed)
  if arch.n_shared_experts:
    out = out + dense(arch, w, x, 'shared_')
  return out, routed.chosen
