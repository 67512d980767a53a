"""What a run needs of a TPU slice, before anyone pays for one: every program of a step is compiled for it, here, by the real compiler.

  python -m launch.plan --config=FILE.py:NAME=VALUE --topology=v5e:4x4 [--slices=N] [--config.KEY=VALUE ...] [--json=FILE] [--search]

Prints, for each phase of a step, the memory on each device, FLOPs, bytes, collectives and the roofline's time (rl_reasoning/roofline.py),
and whether it fits. `--search` tries mesh shapes and micro-batches, and compiles the best three. Results are kept by what was compiled.
Needs libtpu (`make .venv/.tpu`). Exit codes: 0 it fits, 1 it does not, 2 the user's error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
LIBRARY = (
  pathlib.Path(sys.prefix) / 'tpu' / 'libtpu' / 'libtpu.so'
)  # beside the packages: else every program here would look for a TPU
if LIBRARY.exists():
  os.environ.setdefault('TPU_LIBRARY_PATH', str(LIBRARY))

import jax
from jax.experimental import topologies

from rl_reasoning import build, config as config_lib, hlo, model, phases, resolution, roofline, sharding, stored, train
from rl_reasoning.config import Config, ConfigError, check
from rl_reasoning.roofline import CHIPS, GIB

FLAGS = ('config', 'topology', 'slices', 'json', 'search', 'config.KEY')
CACHE = pathlib.Path('~/.cache/rl_reasoning/plans').expanduser()


def devices_of(topology: str, slices: int) -> Sequence[Any]:
  """Raises ConfigError for a topology that is none, or whose chip has no row in roofline.CHIPS."""
  chip = topology.partition(':')[0]
  check(chip in CHIPS, f'--topology={topology}: a chip of {", ".join(CHIPS)} and a shape, such as v5e:4x4')
  try:
    more = {'num_slices': slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **more).devices
  except Exception as error:  # the TPU library raises what it likes
    hint = '' if 'TPU_LIBRARY_PATH' in os.environ else ' (the TPU compiler is installed by: make .venv/.tpu)'
    raise ConfigError(f'--topology={topology}: {config_lib.one_line(error)}{hint}') from error


def identity(config: Config, topology: str, slices: int) -> str:
  """Of all that decides what is compiled."""
  package = pathlib.Path(phases.__file__).parent
  code = {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob('*.py'))}
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')}
  library = pathlib.Path(os.environ.get('TPU_LIBRARY_PATH', ''))
  versions['libtpu'] = str(library.stat().st_size) if library.is_file() else ''
  versions |= {name: os.environ.get(name, '') for name in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS')}
  return config_lib.digest([config_lib.to_dict(config), topology, slices, code, versions, pathlib.Path(__file__).read_text()])


def measured(run: build.Run, topology: str, slices: int) -> Iterator[dict[str, Any]]:
  """What there is to say of each phase of a step."""
  chip, state = CHIPS[topology.partition(':')[0]], run.init()
  kinds = {'params': state.params, 'optimizer': state.opt, 'frozen': {**state.frozen, **state.moving}}
  resident = {id(x) for x in jax.tree.leaves(kinds)}
  held = {kind: roofline.device_bytes(tree) for kind, tree in kinds.items()}
  with jax.set_mesh(run.mesh):
    for phase in phases.phases(run, state):
      lowered, given = phase.program.lower(), jax.tree.leaves(phase.arguments)
      kept = lowered._lowering.compile_args['kept_var_idx']  # what a program does not read is no argument of it
      given = [x for n, x in enumerate(given) if n in kept]
      others = [x for x in given if id(x) not in resident]
      absent = sum(held.values()) - roofline.device_bytes([x for x in {id(x): x for x in given}.values() if id(x) in resident])
      cache = roofline.device_bytes([x for x in others if len(x.shape) in (4, 5)])
      memory = {**held, 'cache': cache, 'rows and weights for decode': roofline.device_bytes(others) - cache}
      try:
        compiled = lowered.compile()
      except Exception as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        yield {'phase': phase.name, 'fits': False, 'memory': memory, 'error': overflow(error), 'limit': chip.hbm}
        continue
      peak = compiled.memory_analysis().peak_memory_in_bytes + absent
      memory['temporaries'] = max(0.0, peak - sum(memory.values()))
      told = hlo.collectives(compiled.as_text(), run.mesh)
      flops = roofline.flops(phase.program.jaxpr.jaxpr)
      cost = roofline.cost(chip, run.mesh, slices, flops, traffic(run, phase, flops, given), told)
      tokens = phase.tokens / run.mesh.size
      yield {
        'phase': phase.name, 'fits': peak <= chip.hbm, 'memory': memory, 'peak': peak, 'limit': chip.hbm, 'runs': phase.runs,
        'flops': cost.flops, 'hbm_bytes': cost.hbm, 'ici_bytes': dict(cost.ici), 'seconds': dict(cost.seconds), 'bound': cost.bound,
        'tokens_per_second_per_device': tokens / cost.time if cost.time and tokens else None,
        'mfu': mfu(run, phase, chip, cost.time),
        'collectives': [one._asdict() | {'axes': list(one.axes)} for one in sorted(told, key=lambda one: -one.wire)[:12]],
      }  # fmt: skip


def overflow(error: Exception) -> str:
  """The compiler's own numbers."""
  said = re.search(r'Used [^.]*\.\d+\w? of [^.]*\.\d+\w? hbm\. Exceeded[^.]*\.\d+\w?', str(error))
  return said.group(0) if said else config_lib.one_line(error)


def passes_of(run: build.Run, phase: phases.Phase, flops: float) -> float:
  """How often the policy's layers run: what is recomputed, and other networks of its size, count."""
  return flops / max(1.0, 2.0 * active(run) * max(phase.tokens, 1))


def active(run: build.Run) -> float:
  """Parameters that a token is multiplied with: of experts its own, and no embedding that is only looked up."""
  heads = run.objective.heads['policy']
  table = model.weight_table(run.arch, heads)
  if 'lm_head' in table or 'lm' not in heads:
    table = {name: w for name, w in table.items() if name != 'embed'}
  return float(model.count(table, run.arch if run.arch.num_experts else None))


def traffic(run: build.Run, phase: phases.Phase, flops: float, given: Sequence[Any]) -> float:
  """Bytes of memory that a device moves: arguments and results once; in every pass over the layers all of the weights as they are gathered,
  and what goes into each matmul and comes out of it. Of a cache, what is filled on average."""
  arguments = roofline.device_bytes(given)
  mesh, width = run.mesh.shape, 2 if run.config.model.dtype == 'bfloat16' else 4
  if phase.name == 'decode':
    caches = roofline.device_bytes([x for x in jax.tree.leaves(phase.arguments[2:]) if len(x.shape) == 5])
    unread = roofline.device_bytes(phase.arguments[0]['embed']) if 'lm_head' in phase.arguments[0] else 0.0
    return arguments - caches / 2 - unread  # of completions; prompts are read whole
  if phase.name == 'relayout':
    return arguments + width * gathered_parameters(run)
  if not phase.tokens or not flops:
    return 2 * arguments
  table = model.weight_table(run.arch, run.objective.heads['policy'])
  gathered, moved = width * gathered_parameters(run), 0.0
  for w in jax.tree.leaves(table, is_leaf=model.is_weight):
    layers, share = (w.shape[0], 1.0) if w.axes[0] == 'layer' else (1, 1.0)
    inner = w.shape[1:] if w.axes[0] == 'layer' else w.shape
    if '{expert}' in w.hf:
      inner, share = inner[1:], float(run.arch.num_experts_per_tok)
    moved += layers * share * width * (math.prod(inner[: w.fan_in or 1]) + math.prod(inner[w.fan_in or 1 :])) / mesh['tensor']
  rows = phase.tokens * mesh['tensor'] / run.mesh.size  # tokens of a device's rows
  pieces = 1
  if phase.name in ('update', 'score') and run.config.optim.micro_batch:
    pieces = max(1, phase.tokens // phases.row_length(run) // run.config.optim.micro_batch)
  return 2 * arguments + passes_of(run, phase, flops) * (2 * pieces * gathered + rows * moved)


def gathered_parameters(run: build.Run) -> float:
  """Of the policy, on a device, where they are whole along fsdp."""
  mesh, total = run.mesh.shape, 0.0
  for w in jax.tree.leaves(model.weight_table(run.arch, run.objective.heads['policy']), is_leaf=model.is_weight):
    cut = {rule for axis in w.axes if axis and axis != 'embed' and isinstance(rule := sharding.RULES[axis], str)}
    total += math.prod(w.shape) / math.prod(mesh[axis] for axis in cut)
  return total


def mfu(run: build.Run, phase: phases.Phase, chip: roofline.Chip, time: float) -> float | None:
  if not phase.tokens or not time or phase.name not in ('prefill', 'decode', 'update'):  # others run several networks, or another
    return None
  prompt, completion, _ = phases.lengths(run)
  context = {'decode': prompt + completion / 2, 'prefill': prompt / 2}.get(phase.name, phases.row_length(run) / 2)
  wanted = roofline.model_flops(run.arch, active(run), phase.tokens, context, phase.name == 'update')
  if phase.name == 'update':  # a critic is taken to be of the policy's size
    wanted *= len(run.objective.trainable) * (2 / 3 if run.config.lora.rank else 1)
  return wanted / (time * chip.flops * run.mesh.size)


def plan(config: Config, keys_set: set[str], topology: str, slices: int = 1) -> dict[str, Any]:
  """The plan of a run, from the cache where the same was planned before. Raises ConfigError."""
  devices = devices_of(topology, slices)
  run = build.build(config, keys_set, devices, stored.SHAPES)
  path = CACHE / f'{identity(run.config, topology, slices)}.json'
  with contextlib.suppress(OSError, ValueError):  # not there, or damaged
    return json.loads(path.read_text())
  told = list(measured(run, topology, slices))
  times = {p['phase']: p['runs'] * max(p['seconds'].values()) for p in told if p.get('seconds')}
  whole = len(times) == len(told) and sum(times.values()) > 0
  found = {
    'topology': topology, 'slices': slices, 'devices': run.mesh.size, 'mesh': dict(run.mesh.shape),
    'batch': resolution.batch_sizes(run.config, run.objective), 'remat': config.model.remat, 'parameters': active(run),
    'phases': told, 'fits': all(p['fits'] for p in told),
    'steps_per_hour': 3600 / sum(times.values()) if whole else None,
    'advice': [] if all(p['fits'] for p in told) else advice(run, told),
  }  # fmt: skip
  CACHE.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix('.part')
  part.write_text(json.dumps(found))
  part.replace(path)
  return found


def advice(run: build.Run, told: Sequence[Mapping[str, Any]]) -> list[str]:
  """Knobs that would make it fit, the cheapest first."""
  config, failed = run.config, {p['phase'] for p in told if not p['fits']}
  rows = config.data.batch_size * run.objective.update_rows // run.objective.num_minibatches
  unit = resolution.row_unit(run.mesh, run.objective)
  micro, found = config.optim.micro_batch or rows, []
  state = sum(told[0]['memory'][kind] for kind in ('params', 'optimizer', 'frozen'))
  if failed & {'update', 'score'}:
    if config.model.remat != 'full':
      found.append('model.remat=full: only what goes into a layer is kept for the backward pass')
    if micro > unit:
      found.append(f'optim.micro_batch={max(unit, micro // 4 // unit * unit)}: fewer rows at once')
    if run.mesh.shape['sequence'] == 1 and micro <= unit:
      found.append('mesh.sequence=2 or more: the tokens of a row over several devices')
  if failed & {'decode', 'prefill', 'relayout'}:
    found.append('mesh.tensor (of experts: mesh.expert) twice as large: weights for decode are cut along no other axis')
    if config.rollout.cache_dtype == 'auto':
      found.append('rollout.cache_dtype=int8: half of the cache')
    if config.data.batch_size > unit:
      found.append(f'data.batch_size={config.data.batch_size // 2}: half of the cache')
  if state > 0.6 * told[0]['limit']:
    found.append(f'mesh.fsdp={2 * run.mesh.shape["fsdp"]} with more devices, or in the place of data: {state / GIB:.1f} GiB of weights and '
                 'optimizer lie on each')  # fmt: skip
  return found


def text_of(found: Mapping[str, Any]) -> str:
  slices = f' x {found["slices"]} slices' if found['slices'] > 1 else ''
  mesh = ', '.join(f'{axis} {size}' for axis, size in found['mesh'].items() if size > 1) or 'one device'
  lines = [f'{found["topology"]}{slices}: {found["devices"]} devices, {mesh}; {found["batch"]}', '']
  head = (
    'phase',
    'GiB',
    'of',
    'params',
    'optim',
    'frozen',
    'cache',
    'rows',
    'temp',
    'TFLOP',
    'ICI GB',
    'ms',
    'bound',
    'tok/s/dev',
    'MFU',
  )
  rows: list[tuple[str, ...]] = [head]
  for p in found['phases']:
    m = {k: f'{v / GIB:.2f}' for k, v in p['memory'].items()}
    kinds = [m['params'], m['optimizer'], m['frozen'], m['cache'], m['rows and weights for decode'], m.get('temporaries', '')]
    if 'seconds' not in p:
      rows.append((p['phase'], 'over', f'{p["limit"] / GIB:.2f}', *kinds, *[''] * 6))
      continue
    rate = p['tokens_per_second_per_device']
    rows.append((
      p['phase'], f'{p["peak"] / GIB:.2f}', f'{p["limit"] / GIB:.2f}', *kinds, f'{p["flops"] / 1e12:.3g}',
      f'{sum(p["ici_bytes"].values()) / 1e9:.3g}', f'{1e3 * max(p["seconds"].values()):.3g}', p['bound'],
      f'{rate:.4g}' if rate else '', f'{p["mfu"]:.1%}' if p['mfu'] is not None else '',
    ))  # fmt: skip
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines += [
    '  '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows
  ]
  lines.append('')
  for p in found['phases']:
    lines += [f'{p["phase"]}: {p["error"]}'] if 'error' in p else []
  lines += [f'collectives of {p["phase"]}: {told}' for p in found['phases'] if (told := largest(p))]
  rate = f'at most {found["steps_per_hour"]:.4g} steps an hour; ' if found['steps_per_hour'] else ''
  lines += ['', f'predicted, not measured: {rate}{"fits" if found["fits"] else "does not fit"}']
  return '\n'.join([*lines, *(f'  try {line}' for line in found['advice'])])


def largest(phase: Mapping[str, Any], count: int = 3) -> str:
  return '; '.join(
    f'{c["count"]} x {c["kind"]} over {"+".join(c["axes"])}, {c["size"] / 1e6:.3g} MB'
    for c in phase.get('collectives', [])[:count]
  )


def shapes_to_try(config: Config, count: int) -> Iterator[Config]:
  """Mesh shapes and micro-batches that every size divides over."""
  sequence, sizes = config.mesh.sequence, [n for n in range(1, count + 1) if count % n == 0]
  for tensor, expert in itertools.product([n for n in sizes if n <= 16], sizes):
    for fsdp in [n for n in sizes if count % (n * tensor * expert * sequence) == 0]:
      data = count // (fsdp * tensor * expert * sequence)
      mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor, expert=expert)
      for rows in (1, 2, 4, 8):
        micro = rows * data * fsdp * expert
        yield dataclasses.replace(config, mesh=mesh, optim=dataclasses.replace(config.optim, micro_batch=micro))


def search(config: Config, keys_set: set[str], topology: str, slices: int, best: int = 3) -> list[dict[str, Any]]:
  """Plans of the best few: those are compiled whose weights, optimizer and saved activations fit, in the order of the bytes that they would
  send (weights along fsdp, activations along tensor) and gather."""
  devices, ranked = devices_of(topology, slices), []
  chip = CHIPS[topology.partition(':')[0]]
  for one in shapes_to_try(config, len(devices)):
    try:
      run = build.build(one, keys_set, devices, stored.SHAPES)
    except ConfigError:  # does not divide
      continue
    state = run.init()
    held = roofline.device_bytes([state.params, state.opt, {**state.frozen, **state.moving}])
    grads, mesh, a = roofline.device_bytes(state.params), run.mesh.shape, run.arch
    rows = one.optim.micro_batch // (mesh['data'] * mesh['fsdp'] * mesh['expert'])
    length = phases.row_length(run) / mesh['sequence']
    kept = rows * length * a.hidden_size * 2 * a.num_hidden_layers
    weights = 2 * model.count(model.weight_table(a)) / (mesh['tensor'] * mesh['expert'])
    rolls = 'rollout' in run.objective.sources
    if held + grads + kept + 0.1 * weights > 0.9 * chip.hbm or rolls * weights + held > chip.hbm:
      continue
    pieces = one.data.batch_size * run.objective.update_rows / one.optim.micro_batch
    sent = pieces * (
      3 * weights * (mesh['fsdp'] > 1) + (mesh['tensor'] > 1) * 8 * a.num_hidden_layers * rows * length * a.hidden_size * 2
    )
    sent += (mesh['data'] > 1) * 2 * weights
    ranked.append((sent, one))
  check(bool(ranked), f'--search: no mesh over {topology} holds weights, optimizer and activations')
  chosen: dict[Any, Config] = {}  # of a mesh the best micro-batch
  for _, one in sorted(ranked, key=lambda item: item[0]):
    chosen.setdefault(one.mesh, one)
  return [plan(one, keys_set, topology, slices) for one in itertools.islice(chosen.values(), best)]


def command(argv: list[str]) -> int:
  flags = train.read_flags(argv, FLAGS)
  check(bool(flags.get('topology')), '--topology=NAME is missing, such as v5e:4x4')
  slices = flags.get('slices', '1')
  folder = pathlib.Path(flags.get('json') or '.').parent
  check(folder.is_dir(), f'--json={flags.get("json")}: there is no folder {folder}')
  check(slices.isdigit() and int(slices) > 0, f'--slices={slices}: a positive number')
  settings = train.overridden(config_lib.read_file(flags['config']), flags)
  config, keys_set = config_lib.resolve(settings), set(config_lib.flatten(settings))
  if 'search' in flags:
    plans = search(config, keys_set, flags['topology'], int(slices))
    plans.sort(key=lambda p: (not p['fits'], -(p['steps_per_hour'] or 0)))
  else:
    plans = [plan(config, keys_set, flags['topology'], int(slices))]
  for found in plans:
    print(text_of(found), end='\n\n', flush=True)
  if flags.get('json'):
    pathlib.Path(flags['json']).write_text(json.dumps(plans if 'search' in flags else plans[0], indent=1))
  return 0 if plans[0]['fits'] else 1


if __name__ == '__main__':
  sys.exit(config_lib.exit_code(command, sys.argv[1:]))
