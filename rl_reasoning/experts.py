"""The feed-forward sublayers: dense SwiGLU, and mixtures of experts (Mixtral 2401.04088, Qwen3-MoE 2505.09388, DeepSeek-V3 2412.19437)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rl_reasoning.arch import Arch
from rl_reasoning.lora import linear
from rl_reasoning.structs import Array

LOAD = 'router_load'  # zeros [E] beside a router's weights where its load is to be counted, see `tally`
ACT = {'silu': jax.nn.silu, 'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True)}


def dense(arch: Arch, w: dict[str, Array], x: Array, prefix: str = '') -> Array:
  if 'gate_up' in w and not prefix:
    gate, up = jnp.split(x @ w['gate_up'], 2, axis=-1)
  else:
    gate, up = linear(w, prefix + 'gate', x), linear(w, prefix + 'up', x)
  return linear(w, prefix + 'down', ACT[arch.hidden_act](gate) * up)


class Routing(NamedTuple):
  """What is told to the routers of a layer."""

  replay: Array | None = None  # int32 [..., k], the experts to take; -1 where the router is to choose
  counts: Array | None = None  # [...], 1 where a token counts to the load, else 0


UNTOLD = Routing()


class Routed(NamedTuple):
  """Which experts a token goes to."""

  chosen: Array  # int32 [..., k]
  weights: Array  # float32 [..., k]


@jax.custom_vjp
def tally(weights: Array, load: Array, chosen: Array, counts: Array) -> Array:
  """The weights [..., k]. The "gradient" of `load` [E], which is zeros, is how many tokens each expert gets: so loads add up over layers,
  micro-batches and devices as gradients do, and nothing else has to carry them out of the forward pass."""
  return weights


def tally_forward(weights, load, chosen, counts):
  return weights, (load, chosen, counts)


def tally_backward(kept, gradient):
  load, chosen, counts = kept
  sent = jnp.broadcast_to(counts[..., None], chosen.shape).reshape(-1)
  return gradient, jnp.zeros_like(load).at[chosen.reshape(-1)].add(sent.astype(load.dtype)), None, None


tally.defvjp(tally_forward, tally_backward)


def route(arch: Arch, w: dict[str, Array], x: Array, routing: Routing) -> Routed:
  """The experts of every token of x [..., D]. The weights are the router's of now, whoever chose, so that it has a gradient
  (2510.11370)."""
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
  if routing.replay is not None:
    chosen = jnp.where(routing.replay >= 0, routing.replay, chosen)
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if arch.norm_topk_prob:
    weights = weights / (weights.sum(-1, keepdims=True) + (1e-20 if arch.scoring_func == 'sigmoid' else 0.0))
  if LOAD in w and routing.counts is not None:
    weights = tally(weights, w[LOAD], chosen, routing.counts)
  return Routed(chosen, weights * arch.routed_scaling_factor)


PROJECTIONS = ('experts_gate', 'experts_up', 'experts_down')


def through(arch: Arch, w: Sequence[Array], x: Array, routed: Routed) -> Array:
  """Every token of x [..., D] through those of its experts that are among the E of `w` (gate, up and down, [E, ...]): rows sorted by
  expert, one grouped matmul for all of them. Other numbers than 0 to E - 1 stand for experts elsewhere, and add nothing."""
  (*front, D), k, E = x.shape, arch.num_experts_per_tok, w[0].shape[0]
  rows, expert = x.reshape(-1, D), routed.chosen.reshape(-1)
  here = (expert >= 0) & (expert < E)
  expert = jnp.where(here, expert, E)
  order = jnp.argsort(expert, stable=True)
  sizes, here = jnp.bincount(expert, length=E).astype(jnp.int32), here[order, None]
  gate, up, down = (jnp.asarray(one) for one in w)
  # What a grouped matmul gives of rows behind the last group is not defined, nor is the gradient.
  some = jnp.where(here, rows[order // k], 0)
  hidden = ACT[arch.hidden_act](jax.lax.ragged_dot(some, gate, sizes)) * jax.lax.ragged_dot(some, up, sizes)
  out = jnp.where(here, jax.lax.ragged_dot(jnp.where(here, hidden, 0), down, sizes), 0)
  out = out * routed.weights.reshape(-1)[order, None].astype(x.dtype)
  return jnp.zeros_like(rows).at[order // k].add(out).reshape(*front, D)


def grouped(arch: Arch, w: dict[str, Array], x: Array, routed: Routed) -> Array:
  """Every token through its experts. Where they lie over an axis of the mesh, every device takes the tokens of all its neighbours on that
  axis through the experts that it has, and the sums go back to where the tokens are."""
  mesh, own = jax.sharding.get_abstract_mesh(), [w[name] for name in PROJECTIONS]
  if mesh.empty or mesh.shape['expert'] == 1:
    return through(arch, own, x, routed)

  def local(x: Array, chosen: Array, weights: Array, *own: Array) -> Array:
    first = jax.lax.axis_index('expert') * own[0].shape[0]
    x, chosen, weights = (jax.lax.all_gather(part, 'expert', axis=0, tiled=True) for part in (x, chosen, weights))
    out = through(arch, own, x, Routed(chosen - first, weights))
    return jax.lax.psum_scatter(out, 'expert', scatter_dimension=0, tiled=True)

  split = PartitionSpec('expert')
  sharded = jax.shard_map(local, in_specs=(split,) * 6, out_specs=split, axis_names={'expert'})
  return sharded(x, routed.chosen, routed.weights, *own)


def mlp(arch: Arch, w: dict[str, Array], x: Array, routing: Routing = UNTOLD) -> tuple[Array, Array | None]:
  """(what the sublayer adds, the experts chosen [..., k] int32 or None)."""
  if 'router' not in w:
    return dense(arch, w, x), None
  routed = route(arch, w, x, routing)
  out = grouped(arch, w, x, routed)
  if arch.n_shared_experts:
    out = out + dense(arch, w, x, 'shared_')
  return out, routed.chosen


def balance(load: Array) -> dict[str, Array]:
  """Metrics of the tokens [layers, E] that the experts got in an update, means over the layers. `max_violation` (2408.15664): how far the
  fullest expert is above the mean, as a share of it; `unused`: the share of experts without a token."""
  known = load.sum(axis=1) > 0  # a frozen layer counts nothing
  mean, layers = jnp.maximum(load.mean(axis=1), 1e-9), jnp.maximum(known.sum(), 1)
  return {
    'router/max_violation': jnp.sum(known * (load.max(axis=1) / mean - 1)) / layers,
    'router/unused': jnp.sum(known * (load == 0).mean(axis=1)) / layers,
  }


def balanced(bias: Array, load: Array, rate: float) -> Array:
  """The routers' biases [layers, E] after an update: those of experts with less than the mean load go up by `rate`, those of the others
  down (2408.15664)."""
  return bias + rate * jnp.sign(load.mean(axis=1, keepdims=True) - load)
