"""Low-rank adapters (LoRA, 2106.09685): a second pytree beside weights that stay as they are.

An adapter of a weight W [L, in..., out...] is two factors, A [L, in..., r] and B [L, r, out...]: the projection is W + alpha / r * A B.
Joined with the weights they lie beside theirs, in the same stack, and `linear` finds them; merged, they are gone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rl_reasoning.config import Lora, check
from rl_reasoning.structs import Array, PyTree

A, B = '_lora_a', '_lora_b'


def linear(w: dict[str, Array], name: str, x: Array, inputs: int = 1) -> Array:
  """x [..., in...] times the weight of this name, of whose axes the first `inputs` are x's last, and through its adapter, where it has one.

  The adapter's factors meet x one after the other: the backward pass makes no gradient of the size of the weight.
  """
  out = jnp.tensordot(x, w[name], inputs)
  if name + A in w:
    out = out + jnp.tensordot(jnp.tensordot(x, w[name + A], inputs), w[name + B], 1)
  return out


def adapts(stack: str, name: str, weight: Any, lora: Lora) -> bool:
  """Projections alone have adapters: neither a router, whose choice is no sum, nor experts, of which there are too many."""
  eligible = weight.fan_in and name != 'router' and '{expert}' not in weight.hf
  return bool(eligible and re.fullmatch(lora.targets, f'{stack}/{name}'))


def table(weights: dict[str, Any], lora: Lora) -> dict[str, Any]:
  """The adapters' rows of a weight table (model.weight_table). A scalar head is trained whole: it is new, or a row. Raises ConfigError
  where no weight has a name that `targets` matches."""
  found: dict[str, Any] = {}
  for stack, own in weights.items():
    for name, w in own.items() if isinstance(own, dict) else ():
      if adapts(stack, name, w, lora):
        inputs, scale = 1 + w.fan_in, (3 * math.prod(w.shape[1 : 1 + w.fan_in])) ** -0.5  # peft's
        hf = w.hf.removesuffix('.weight')
        found.setdefault(stack, {})[name + A] = w._replace(
          shape=(*w.shape[:inputs], lora.rank), axes=(*w.axes[:inputs], None), scale=scale, hf=hf + '.lora_A.weight'
        )
        found[stack][name + B] = w._replace(
          shape=(w.shape[0], lora.rank, *w.shape[inputs:]), axes=('layer', None, *w.axes[inputs:]), scale=0, fan_in=1,
          hf=hf + '.lora_B.weight',
        )  # fmt: skip
  every = Lora(rank=1)
  names = [f'{stack}/{name}' for stack, own in weights.items() if isinstance(own, dict) for name, w in own.items()
           if adapts(stack, name, w, every)]  # fmt: skip
  check(bool(found), f"config key 'lora.targets': {lora.targets!r} matches none of {', '.join(names)}")
  return {**found, **({'score': weights['score']} if 'score' in weights else {})}


def join(base: PyTree, adapter: PyTree, lora: Lora) -> PyTree:
  """The weights with the adapters beside them; alpha / r is multiplied into B."""
  scale, joined = lora.alpha / lora.rank, dict(base)
  for stack, own in adapter.items():
    if isinstance(own, dict):
      own = {**base[stack], **{name: x * scale if name.endswith(B) else x for name, x in own.items()}}
    joined[stack] = own
  return joined


def adapted(w: dict[str, Array], *names: str) -> bool:
  """Whether any of these weights has an adapter beside it."""
  return any(name + A in w for name in names)


def merged_layer(w: dict[str, Array], names: Sequence[str]) -> dict[str, Array]:
  """One layer's weights, float32 [in..., out...]; those of `names` with their adapters added and gone."""
  merged = {name: w[name] + jnp.tensordot(w[name + A], w[name + B], 1) for name in names if name + A in w}
  gone = {name + factor for name in merged for factor in (A, B)}
  return {name: x for name, x in {**w, **merged}.items() if name not in gone}


def merge(joined: PyTree) -> PyTree:
  """What `join` gives, as plain weights: the same bits on every mesh, since others may be trained beside them and know them by their
  fingerprint. So the products are added one after the other; how a matmul adds them up depends on its shape."""

  def add(x: Array, a: Array, b: Array) -> Array:
    inputs, outputs = a.ndim - 2, b.ndim - 2  # a [L, in..., r], b [L, r, out...]

    def one(i, x):
      left, right = jnp.take(a, i, axis=-1), jnp.take(b, i, axis=1)
      left = left.reshape(*left.shape, *(1,) * outputs)
      return x + left * right.reshape(right.shape[0], *(1,) * inputs, *right.shape[1:])

    return jax.lax.fori_loop(0, b.shape[1], one, x)

  def merged(own: dict[str, Array]) -> dict[str, Array]:
    kept = {name: x for name, x in own.items() if not name.endswith((A, B))}
    return {name: add(x, own[name + A], own[name + B]) if name + A in own else x for name, x in kept.items()}

  return {name: merged(own) if isinstance(own, dict) else own for name, own in joined.items()}
