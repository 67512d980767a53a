"""What the text of a compiled program says of its collectives: kind, mesh axes, bytes, how often."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64}  # of other types the number in their name: s32, u8, f8e4m3fn


class Collective(NamedTuple):
  kind: str
  axes: tuple[str, ...]  # of the mesh, along which devices talk
  devices: int  # in a group
  size: int  # bytes of the result on a device (of a reduce-scatter: of what goes in)
  count: int  # times a run of the program; loops without a known length count once
  shapes: str  # as the program has them

  @property
  def wire(self) -> float:
    """Bytes that a device sends, all runs of it: of rings, which are optimal (Chan et al. 2007)."""
    share = (self.devices - 1) / self.devices
    passes = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
    return self.count * self.size * passes


def type_bytes(text: str) -> int:
  """Bytes of all arrays in an HLO type, '(bf16[2,3]{1,0}, f32[])'."""
  total = 0
  for kind, shape in re.findall(r'\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]', text):
    named = re.match(r'[a-z]+(\d+)', kind)
    bits = BITS.get(kind) or (int(named.group(1)) if named else 0)
    total += math.prod(int(n) for n in shape.split(',') if n) * bits // 8
  return total


def computations(text: str) -> dict[str, list[str]]:
  """name -> its lines."""
  found: dict[str, list[str]] = {}
  name = ''
  for line in text.splitlines():
    opens = re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if opens:
      name = opens.group(1)
      found[name] = []
    elif name:
      found[name].append(line)
  return found


def repetitions(blocks: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs: the lengths of the loops around it, multiplied."""
  callers: dict[str, list[tuple[str, int]]] = {}
  for name, lines in blocks.items():
    for line in lines:
      loop = re.search(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)', line)
      if loop:
        callers.setdefault(loop.group(2), []).append((name, trip_count(line, blocks.get(loop.group(1), []))))
      for called in re.findall(r'(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)', line):
        callers.setdefault(called, []).append((name, 1))
      for group in re.findall(r'branch_computations=\{([^}]*)\}', line):
        for called in group.split(','):
          callers.setdefault(called.strip().lstrip('%'), []).append((name, 1))
  known: dict[str, int] = {}

  def times(name: str) -> int:
    if name not in known:
      known[name] = 1  # of a program that calls nobody
      known[name] = max((times(caller) * count for caller, count in callers.get(name, [])), default=1)
    return known[name]

  return {name: times(name) for name in blocks}


def trip_count(line: str, condition: list[str]) -> int:
  """Of a loop: what the compiler says, else the one constant that its condition compares with; 1 where that is not known."""
  told = re.search(r'known_trip_count[^0-9]*(\d+)', line)
  if told:
    return int(told.group(1))
  constants = {int(n) for text in condition for n in re.findall(r's32\[\][^=]* constant\((\d+)\)', text)}
  compares = [text for text in condition if ' compare(' in text]
  return constants.pop() if len(constants) == 1 and len(compares) == 1 else 1


def groups(line: str, kind: str) -> np.ndarray | None:
  """[groups, devices] of partition numbers; of a permute, the pairs that differ."""
  if kind == 'collective-permute':
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', line)
    return np.asarray([[int(n) for n in pair] for pair in re.findall(r'(\d+),(\d+)', pairs.group(1))]) if pairs else None
  listed = re.search(r'replica_groups=\{(\{.*?\})\}', line)
  if listed:
    return np.asarray([[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', listed.group(1))])
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
  if iota:
    return arranged(iota.group(2), iota.group(3)).reshape(numbers(iota.group(1)))
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}', line)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
    ids = arranged(mesh.group(2), mesh.group(3)) if mesh.group(2) else np.arange(math.prod(map(int, sizes.values())))
    ids, names = ids.reshape([int(n) for n in sizes.values()]), list(sizes)
    own = [names.index(name) for name in re.findall(r"'(\w+)'", mesh.group(4))]
    return np.moveaxis(ids, own, range(-len(own), 0)).reshape(-1, math.prod(ids.shape[axis] for axis in own))
  return None


def numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def arranged(shape: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
  return ids.transpose(numbers(order)) if order else ids


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """Those of a compiled program. The compiler may write one down several times, for the operations that run beside it: each channel is
  counted once."""
  blocks, shape = computations(text), tuple(mesh.shape.values())
  often, found = repetitions(blocks), {}
  for name, lines in blocks.items():
    for line in lines:
      said = re.match(rf'\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({"|".join(KINDS)})(-start)?\(', line)
      if not said:
        continue
      kind, result = said.group(3), said.group(2)
      kind = (
        'reduce-scatter' if name.startswith('all-reduce-scatter') else kind
      )  # the TPU compiler's: a fusion that keeps one part
      members = groups(line, said.group(3))
      if members is None or members.shape[-1] < 2:
        continue
      size = type_bytes(result)
      if said.group(4):  # a start gives (operands, results, and flags)
        size = (
          type_bytes(result) // 2 if kind != 'all-gather' else type_bytes(result) * members.shape[1] // (members.shape[1] + 1)
        )
      if said.group(3) == 'reduce-scatter':
        size *= members.shape[1]
      places = np.stack(np.unravel_index(members, shape))  # [axes, groups, members]
      varies = np.any(places != places[:, :, :1], axis=(1, 2))
      axes = tuple(axis for axis, differs in zip(mesh.shape, varies, strict=True) if differs)
      channel = re.search(r'channel_id=(\d+)', line)
      key = (kind, channel.group(1) if channel else said.group(1), re.sub(r'\{[^}]*\}', '', result))
      ways = 2 if kind == 'collective-permute' else members.shape[1]
      shapes = ' '.join(re.findall(r'[a-z]+\d*\w*\[[\d,]*\]', result))
      one = Collective(kind, axes, ways, size, often[name], shapes)
      found[key] = max(found.get(key, one), one, key=lambda c: c.count)
  return list(found.values())
