"""What a program costs on a TPU: FLOPs from its jaxpr, bytes from its arrays, and the time that the slowest of arithmetic, memory and
network needs (Austin et al., "How to Scale Your Model", 2025, chapters 1 to 3).

A roofline, not a forecast: nothing of a program waits for anything else of it. Numbers of chips are Google's published peaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rl_reasoning.arch import Arch
from rl_reasoning.hlo import Collective
from rl_reasoning.structs import PyTree


class Chip(NamedTuple):
  flops: float  # a second, bfloat16
  hbm: float  # bytes that programs may have: the compiler's own limit
  hbm_bandwidth: float  # bytes a second
  ici: float  # bytes a second along one axis of the torus, both directions together
  dcn: float  # bytes a second between slices


GIB = 2**30
CHIPS = {  # cloud.google.com/tpu/docs/system-architecture; ICI and DCN: "How to Scale Your Model", chapter 2
  'v5e': Chip(1.97e14, 15.75 * GIB, 8.19e11, 9e10, 3.1e9),
  'v5p': Chip(4.59e14, 95.73 * GIB, 2.765e12, 1.8e11, 6.2e9),
  'v6e': Chip(9.18e14, 31.24 * GIB, 1.64e12, 1.8e11, 1.25e10),
}


def dot_flops(equation: Any) -> float:
  a, b = (v.aval.shape for v in equation.invars[:2])
  out = math.prod(equation.outvars[0].aval.shape)
  if equation.primitive.name.startswith('ragged_dot'):
    numbers = equation.params['ragged_dot_dimension_numbers']
    (contracted, _), _ = numbers.dot_dimension_numbers
    if not numbers.rhs_group_dimensions:  # gradients of the groups: every row of a [M, K] meets its own of b [M, N]
      return 2.0 * math.prod(a) * b[-1]
    return 2.0 * out * math.prod(a[i] for i in contracted)
  (contracted, _), _ = equation.params['dimension_numbers']
  return 2.0 * out * math.prod(a[i] for i in contracted)


def flops(jaxpr: Any, experts: int = 1) -> float:
  """Of the matmuls of a jaxpr, over all devices: what is recomputed counts again, a scan as often as it runs, a while loop once, a kernel
  in all steps of its grid (those that find nothing to do, too); what a shard_map runs, on every device. A device of `experts` meets so
  many times the rows that it computes with: those of its own experts."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general' or name.startswith('ragged_dot'):
      total += dot_flops(equation) / (1 if name == 'dot_general' else experts)
    elif name == 'pallas_call':
      steps = math.prod(size for size in params['grid_mapping'].grid if isinstance(size, int))
      total += steps * flops(params['jaxpr'], experts)
    else:
      times, own = params['length'] if name == 'scan' else 1, experts
      if name == 'shard_map':
        sizes = {axis: params['mesh'].shape[axis] for axis in params['newly_manual_axes']}
        times, own = math.prod(sizes.values()), experts * sizes.get('expert', 1)
      total += times * sum(flops(inner, own) for inner in inner_jaxprs(equation))
  return total


def inner_jaxprs(equation: Any) -> list[Any]:
  """Of a conditional the dearest branch alone."""
  if equation.primitive.name == 'cond':
    return [max((branch.jaxpr for branch in equation.params['branches']), key=flops)]
  found = []
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, 'jaxpr', item)
      if hasattr(inner, 'eqns'):
        found.append(inner)
  return found


def model_flops(arch: Arch, active: float, tokens: float, context: float, training: bool) -> float:
  """What MFU counts (2204.02311, appendix B): 2 a weight and token forward, twice that backward, and attention over `context` tokens on
  average; nothing that is recomputed."""
  attention = 4.0 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * context
  return (3 if training else 1) * tokens * (2.0 * active + attention)


def device_bytes(tree: PyTree) -> float:
  """Bytes on one device of arrays, or of shapes in their shards."""
  return float(
    sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree) if x is not None)
  )


class Cost(NamedTuple):
  """Of one run of a program, on each device."""

  flops: float
  hbm: float  # bytes
  ici: Mapping[str, float]  # axes -> bytes
  seconds: Mapping[str, float]  # compute, hbm, ici

  @property
  def bound(self) -> str:
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def time(self) -> float:
    return max(self.seconds.values())


def cost(chip: Chip, mesh: Mesh, slices: int, flops: float, hbm: float, told: Sequence[Collective]) -> Cost:
  """`flops` over all devices, `hbm` bytes on one. `data` goes between slices where there are several."""
  wire: dict[str, float] = {}
  for one in told:
    name = '+'.join(one.axes)
    wire[name] = wire.get(name, 0.0) + one.wire
  network = sum(size / (chip.dcn if slices > 1 and 'data' in name.split('+') else chip.ici) for name, size in wire.items())
  own = flops / mesh.size
  return Cost(own, hbm, wire, {'compute': own / chip.flops, 'hbm': hbm / chip.hbm_bandwidth, 'ici': network})
