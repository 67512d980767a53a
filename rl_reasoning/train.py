"""One run: build, then the one loop.

  python -m rl_reasoning.train --config=FILE.py:NAME=VALUE --workdir=DIR [--config.KEY=VALUE ...] [--overwrite] [--explain[=json]]
    [--distributed | --coordinator=HOST:PORT --processes=N --process=I]

The same command on every host is one run (the second line; with --distributed TPU, Slurm, GKE or MPI say which host is which). The workdir
is one that all of them see; the first process writes the files, and of the completions its own.

Exit codes: 0 done, 2 the user's error, 3 diverged, 42 preempted, 130 interrupted.

Preempted: SIGTERM came, what is done is saved, and the same command goes on, on this mesh or another. A rollout or an evaluation is cut,
and made again by the next start; an update is finished, and with it the step. A compilation or the reward functions of a batch are waited
for: where that outlasts the grace period, the last checkpoint stands.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.train')

import contextlib
import errno
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath

from rl_reasoning import (
  build,
  checkpoint,
  config as config_lib,
  data,
  distributed,
  environment,
  evaluators,
  metrics,
  preemption,
  resolution,
  sharding,
  tables,
)
from rl_reasoning.collect import check_rows, collect
from rl_reasoning.config import Config, ConfigError, check
from rl_reasoning.preemption import Preempted
from rl_reasoning.structs import ROLLOUT, TrainState

RUN_FILES = ('config.json', 'metrics.jsonl', 'eval.jsonl', 'summary.json', 'curves.png', 'frozen.json')
RUN_FOLDERS = ('checkpoints', 'completions', 'samples', 'tensorboard')


class Diverged(RuntimeError):
  """Loss or gradient is not finite. Exit code 3."""


def read_json(path: epath.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
    check(isinstance(value, dict), 'no JSON object')
  except ValueError as error:
    raise ConfigError(f'{path}: damaged: {error}; --overwrite starts anew') from None
  return value


def open_workdir(workdir: epath.Path, config: Config, overwrite: bool) -> None:
  """Writes config.json, or checks that the one there is ours. Another config is refused, unless told to overwrite."""
  path = workdir / 'config.json'
  if overwrite:
    for name in RUN_FILES:
      (workdir / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
      if (workdir / name).exists():
        (workdir / name).rmtree()
  new = json.loads(config_lib.to_json(config))
  if path.exists():
    old = read_json(path)
    # A run may go on on another mesh.
    changed = config_lib.differences({**old, 'mesh': {}}, {**new, 'mesh': {}})
    check(not changed, f'{workdir} holds a run of another config (--overwrite deletes it):\n  ' + '\n  '.join(changed))
    return
  left = [name for name in (*RUN_FILES, *RUN_FOLDERS) if (workdir / name).exists()]
  check(not left, f'{workdir} has {", ".join(left)} but no config.json: no run of ours; --overwrite deletes them')
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config_lib.to_json(config))
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: {error}') from None


def write_atomically(path: epath.Path, text: str) -> None:
  part = path.parent / (path.name + '.part')
  part.write_text(text)
  part.replace(path)


def check_frozen(workdir: epath.Path, state: TrainState) -> None:
  """Frozen weights are not in the checkpoint: their fingerprint is, so that a changed source cannot slip into a resumed run."""
  path, found = workdir / 'frozen.json', checkpoint.fingerprints(state.frozen)

  def compare() -> None:
    if not path.exists():
      write_atomically(path, json.dumps(found))
      return
    began = read_json(path)
    for role in found.keys() | began.keys():
      named = 'policy' if role == 'base' else role.removeprefix('base.')  # what adapters adapt: see build.build
      check(found.get(role) == began.get(role), f'roles.{named}.init: its weights are not those that {workdir} began with')

  distributed.from_main(compare)


def check_processes(config: Config, keys_set: set[str] | None, workdir: str, overwrite: bool) -> None:
  """Raises ConfigError where the processes of a run do not run the same."""
  if distributed.count() > 1:
    resolved = config_lib.to_dict(resolution.resolve(config, keys_set or set())[0])
    flags, package = f'--workdir={workdir}' + ' --overwrite' * overwrite, pathlib.Path(__file__).parent
    code = data.content_hash(sorted(package.rglob('*.py')))
    distributed.check_same({'config': resolved, 'code': code, 'command': flags, 'jax': jax.__version__})


def sync_moving(run: build.Run, before: int, state: TrainState) -> TrainState:
  """A moving reference becomes the policy, or moves towards it, once the count of updates has reached or crossed a multiple."""
  if not run.objective.moving:
    return state
  every, ema = run.objective.ref_model_sync_updates or 1, run.objective.ref_model_ema
  if before // every == int(state.updates) // every:
    return state
  policy = state.params['policy']
  if ema is None:
    return state.replace(moving={'ref': jax.tree.map(lambda x: x.copy(), policy)})
  return state.replace(moving={'ref': jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.moving['ref'], policy)})


def check_finite(values: Mapping[str, float], step: int, manager) -> None:
  """Raises Diverged, naming the last checkpoint, which is whole."""
  for name, value in values.items():
    if not math.isfinite(value):
      checkpoint.wait(manager)
      last = manager.latest_step()
      raise Diverged(f'{name} is {value} at step {step}; the last good checkpoint is that of step {last}')


def weights_norm(state: TrainState) -> dict[str, float]:
  """A finite gradient can still take the weights beyond all numbers: looked at before they are saved."""
  return {'the norm of the weights': float(jax.jit(optax.global_norm)(state.params))}


def loop(
  run: build.Run, rows: data.Train, problems: Mapping[str, Sequence[dict]], state: TrainState, manager, writer: metrics.Writer
) -> Iterator[TrainState]:
  """From `state` to the last step: collect, score, prepare, update, and what is told of it. Yields the state after every step, when it is
  whole and logged, and neither evaluated nor saved yet; Preempted is raised only where the latest of these can still be read."""
  config, root = run.config, jax.random.key(run.config.seed)
  flops = run.flops(state)

  def last_or_every(step: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == config.total_steps)

  def run_evaluators():
    if problems:
      folder = writer.workdir / 'samples' / f'step_{state.step:06d}'
      params, frozen = run.weights(state)
      writer.evaluation(state.step, evaluators.evaluate_all(run, params, problems, folder, frozen))

  def evaluated() -> bool:
    return state.step in {entry['step'] for entry in metrics.read_jsonl(writer.workdir / 'eval.jsonl')}

  if config.eval.at_start if state.step == 0 else last_or_every(state.step, config.eval.every):
    if state.step == 0 or not distributed.from_main(evaluated):  # a step whose evaluation was preempted is saved without it
      run_evaluators()
  while state.step < config.total_steps:
    preemption.check()
    timer, start = metrics.PhaseTimer(), time.perf_counter()
    step, updates = state.step + 1, int(state.updates)
    key = jax.random.fold_in(root, step)  # nothing random outlives a step
    got = collect(run, rows, state, key, timer)
    with timer('score'):
      batch, aux, gathered = jax.block_until_ready(run.steps.prepare(state, run.steps.score(state, got.batch)))
    preemption.check()
    state = state.replace(aux=aux)
    with timer('update') as phase:  # takes over the memory of the state before: from here on the step is finished
      for some in run.steps.minibatches(batch, key):
        state, more = run.steps.update(state, some)
        gathered = metrics.merge(gathered, more)
      jax.block_until_ready(state.params)
      phase.tokens = int((batch.segment_NT > 0).sum()) * run.objective.num_iterations
    values = metrics.summarise({**gathered, **got.metrics})
    saves = last_or_every(step, config.checkpoint.every)
    checked = {name: value for name, value in values.items() if name == 'loss' or name.startswith('grad_norm')}
    check_finite(checked | weights_norm(state) if saves else checked, step, manager)
    state = state.replace(step=step, cursor=got.cursor, aux=run.objective.adapt(state.aux, gathered))
    state = sync_moving(run, updates, state)
    if last_or_every(step, config.log_every):
      values |= metrics.mfu(flops, phase.tokens, timer.seconds['update'])
      values |= {k: v for k, v in got.cursor.items() if k.startswith('pass_rate/')}
      values |= {'num_tokens': got.cursor['num_tokens'], **timer.metrics(), 'step_time': time.perf_counter() - start}
      writer.write(step, values)
      if got.samples:
        samples = got.samples
        if batch.advantage_NT is not None:
          mean = batch.advantage_NT.sum(axis=1) / batch.mask_NT.sum(axis=1).clip(1)
          mean, source = sharding.own_rows(run.mesh, (mean, batch.source_N))
          samples = [{**s, 'advantage': float(a)} for s, a in zip(samples, mean[source == ROLLOUT], strict=True)]
        writer.completions(step, samples)
    yield state
    if last_or_every(step, config.eval.every):
      run_evaluators()
    if saves:
      checkpoint.save(manager, state)


def run_loop(
  run: build.Run, rows: data.Train, problems: Mapping[str, Sequence[dict]], state: TrainState, manager, writer: metrics.Writer
) -> TrainState:
  """The state at the end of `loop`, saved. Raises Preempted when SIGTERM has come and the last whole step is saved."""
  with preemption.watched():
    try:
      for whole in loop(run, rows, problems, state, manager, writer):
        state = whole
      checkpoint.wait(manager)
      preemption.check()
    except Preempted:
      if state.step and manager.latest_step() != state.step:
        check_finite(weights_norm(state), state.step, manager)
        checkpoint.save(manager, state)
      checkpoint.wait(manager)
      where = f'step {state.step} of {run.config.total_steps} is saved' if state.step else 'before the first step was done'
      raise Preempted(f'preempted: {where}') from None
  return state


def train(config: Config, workdir: str, *, keys_set: set[str] | None = None, overwrite: bool = False) -> dict[str, Any]:
  """Trains or resumes to config.total_steps; returns the summary that it also writes. Raises ConfigError, Diverged, Preempted."""
  began, root_dir = time.time(), epath.Path(workdir)
  check_processes(config, keys_set, workdir, overwrite)
  run = build.build(config, keys_set)
  config = run.config
  chosen = evaluators.make_evaluators(config.eval.evaluators) if config.eval.every else {}
  with jax.set_mesh(run.mesh):
    rows = data.open_train(config.data, config.seed)
    problems = evaluators.test_problems(run) if chosen else {}
    if distributed.count() > 1:  # files of one name may hold other rows on another host
      sources = {**rows.sources, 'pretrain': rows.pretrain}
      names = {name: source.name for name, source in sources.items() if source is not None}
      distributed.check_same({'training data': names, 'test data': {n: config_lib.digest(p) for n, p in problems.items()}})
    if distributed.from_main(lambda: overwrite or not (root_dir / 'config.json').exists()):
      check_rows(run, rows)
      if chosen:
        evaluators.check_problems(run, problems, chosen)
    state = run.init()
    state = state.replace(cursor={**rows.first(), **state.cursor})
    distributed.from_main(lambda: open_workdir(root_dir, config, overwrite))
    for process, sees in enumerate(distributed.exchange('sees', str((root_dir / 'config.json').exists()))):
      check(sees == 'True', f'--workdir={workdir}: what the first process has written there, process {process} does not see')
    finished = root_dir / 'summary.json'
    if (summary := distributed.from_main(lambda: read_json(finished) if finished.exists() else None)) is not None:
      return summary
    check_frozen(root_dir, state)
    writes = distributed.is_main()
    with checkpoint.opened(workdir, config.checkpoint) as manager:
      state = checkpoint.restore(manager, state) or state
      opened = metrics.Writer(workdir, config.total_steps, state.step) if writes else metrics.Silent(workdir)
      with contextlib.closing(opened) as writer:
        state = run_loop(run, rows, problems, state, manager, writer)
  summary = {
    'steps': state.step, 'updates': int(state.updates), 'config_hash': config_lib.digest(config_lib.to_dict(config)),
    'seed': config.seed, 'wall_s': round(time.time() - began, 1), 'evaluations': metrics.read_jsonl(root_dir / 'eval.jsonl'),
  }  # fmt: skip
  if writes:
    metrics.curves(workdir)
    write_atomically(finished, json.dumps(summary, indent=1))
  return summary


def evaluation_table(
  evaluations: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], first: str
) -> tuple[list[str], list[list[str]]]:
  """(columns, rows) of (name or step, evaluators), a row an evaluator; `first` heads the first column. Columns that say nothing are left
  out, and the functions of `reward` have their own where there are several."""

  def number(m: Mapping[str, Any], key: str, digits: int = 3) -> str:  # the error of one problem, or the reward of none, is None
    return f'{m[key]:.{digits}f}' if m.get(key) is not None else ''

  every = [m for _, found in evaluations for m in found.values()]
  functions = list(
    dict.fromkeys(k for m in every for k in m if k.startswith('rewards/') and not k.endswith(('_stderr', '_ci95')))
  )
  functions = functions if len(functions) > 1 else []
  names = ['accuracy', 'strict', 'format', 'reward', *(f.removeprefix('rewards/') for f in functions), 'kl', 'pass@k', 'maj@k', 'length',
           'truncated', 'longer is better', 'ECE']  # fmt: skip
  rows = []
  for place, found in evaluations:
    for name, m in found.items():
      k = max(tables.ks_of(m), default=0)
      accuracy = f'{number(m, "accuracy")} ± {number(m, "accuracy_stderr")}' if m.get('accuracy') is not None else ''
      rows.append([
        place, name, accuracy, number(m, 'strict_accuracy'), number(m, 'format'), number(m, 'reward'), *(number(m, f) for f in functions),
        number(m, 'kl', 2), f'{k}: {number(m, f"pass@{k}")}' if k else '', number(m, f'maj@{k}'), number(m, 'length', 1),
        number(m, 'truncated'), number(m, 'length_accuracy'), number(m, 'ece'),
      ])  # fmt: skip
  columns = [first, 'evaluator', *names]
  said = [c for c in range(len(columns)) if c < 2 or any(row[c] for row in rows)]
  return [columns[c] for c in said], [[row[c] for c in said] for row in rows]


def read_flags(argv: list[str], known: tuple[str, ...]) -> dict[str, str]:
  """Flags by name; 'config.KEY' among the known ones stands for every 'config.' something."""
  flags: dict[str, str] = {}
  for argument in argv:
    check(argument.startswith('--'), f'argument {argument!r} is not understood; flags are --name=value')
    name, equals, value = argument.removeprefix('--').partition('=')
    override = name.startswith('config.')
    check(
      ('config.KEY' if override else name) in known, f'flag --{name} is unknown; flags are {", ".join("--" + k for k in known)}'
    )
    check(bool(equals) or not override, f'--{name}: no value, write --{name}=VALUE')
    check(name not in flags, f'flag --{name} is given twice')
    flags[name] = value
  check('config' in flags, '--config=FILE.py is missing')
  check(not flags.get('overwrite'), f'--overwrite={flags.get("overwrite")}: the flag takes no value')
  return flags


def overridden(settings: dict[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
  """The settings with what the flags --config.KEY=VALUE set."""
  for name, value in flags.items():
    if name.startswith('config.'):
      settings = config_lib.override(settings, name.removeprefix('config.'), config_lib.parse_value(value))
  return settings


def parse(argv: list[str]) -> tuple[Config, set[str], dict[str, str]]:
  """Command line -> (config, keys that were set, the other flags)."""
  flags = read_flags(argv, ('config', 'workdir', 'overwrite', 'explain', *distributed.FLAGS, 'config.KEY'))
  check(flags.get('explain', '') in ('', 'json'), f'--explain={flags.get("explain")}: write --explain or --explain=json')
  settings = overridden(config_lib.read_file(flags['config']), flags)
  return config_lib.resolve(settings), set(config_lib.flatten(settings)), flags


def exit_code(command: Callable[[list[str]], None], argv: list[str]) -> int:
  """As config.exit_code, with what only jobs on the accelerator end by."""
  try:
    return config_lib.exit_code(command, argv, 'the same command goes on from the last checkpoint')
  except Diverged as error:
    print(f'diverged: {error}', file=sys.stderr)
    return 3
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    print(f'error: {error}; make room, and the same command goes on', file=sys.stderr)
    return 2


def command(argv: list[str]) -> None:
  config, keys_set, flags = parse(argv)
  if 'explain' in flags:
    explained = resolution.explain(config, keys_set, jax.device_count())
    evaluators.make_evaluators(config.eval.evaluators)
    print(json.dumps(explained) if flags['explain'] == 'json' else metrics.explanation(explained))
    return
  check(bool(flags.get('workdir')), '--workdir=DIR is missing')
  distributed.initialize(flags)
  environment.cache_compilations()
  summary = train(config, flags['workdir'], keys_set=keys_set, overwrite='overwrite' in flags)
  if not distributed.is_main():
    return
  columns, rows = evaluation_table([(str(e['step']), e['evaluators']) for e in summary['evaluations']], 'step')
  if rows:
    metrics.summary_table(flags['workdir'], columns, rows)
  print(f'{summary["steps"]} steps done; curves: {flags["workdir"]}/curves.png, samples: {flags["workdir"]}/completions/')


def main(argv: list[str]) -> int:
  return distributed.ended(lambda: exit_code(command, argv))


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, preemption.leave)
  sys.exit(main(sys.argv[1:]))
