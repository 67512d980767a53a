"""What a sweep is made of: its entries and runs, read from a config file, and what their folders hold. See launch/sweep.py."""

from __future__ import annotations

import dataclasses
import graphlib
import inspect
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rl_reasoning import config as config_lib
from rl_reasoning.config import ConfigError, check

NAME = re.compile(r'[A-Za-z0-9][\w.=+-]{0,99}', re.ASCII)  # a folder, and an item of --only
REFERENCE = re.compile(r'\{workdir\}/([^/{}]+)/seed(\{seed\}|\d+)(?=/|$)')


@dataclasses.dataclass(frozen=True)
class Run:
  name: str
  seed: int
  spec: str  # FILE.py:arguments
  overrides: Mapping[str, Any]  # by dotted key; texts still hold {workdir} and {seed}
  settings: Mapping[str, Any]  # what the config sets in the end, texts as above
  needs: frozenset[tuple[str, int]]  # (name, seed) of the runs that texts refer to

  @property
  def key(self) -> tuple[str, int]:
    return self.name, self.seed

  def __str__(self) -> str:
    return f'{self.name} seed {self.seed}'

  def folder(self, workdir: str) -> pathlib.Path:
    return pathlib.Path(workdir, self.name, f'seed{self.seed}')

  def beside(self, workdir: str, suffix: str) -> pathlib.Path:
    """The log or the launch record: outside of the run's own folder, which --overwrite empties."""
    return pathlib.Path(workdir, self.name, f'seed{self.seed}{suffix}')

  def flags(self, workdir: str) -> list[str]:
    filled = {key: fill(value, workdir, self.seed) for key, value in self.overrides.items()}
    return [f'--config={self.spec}', *(f'--config.{key}={as_text(key, value)}' for key, value in filled.items())]

  def command(self, workdir: str) -> list[str]:
    return [sys.executable, '-m', 'rl_reasoning.train', *self.flags(workdir), f'--workdir={self.folder(workdir)}']


@dataclasses.dataclass(frozen=True)
class Sweep:
  runs: Mapping[tuple[str, int], Run]  # seed by seed, so that a sweep cut short can be compared
  order: tuple[str, ...]  # entries, each after those that it needs
  reported: tuple[str, ...]  # entries, in the file's order
  metrics: tuple[str, ...]
  compared: tuple[tuple[str, str], ...]  # (entry, the entry it is held against)

  def of(self, name: str) -> list[Run]:
    return [run for run in self.runs.values() if run.name == name]


def fill(value: Any, workdir: str, seed: int) -> Any:
  if isinstance(value, Mapping):
    return {key: fill(item, workdir, seed) for key, item in value.items()}
  if isinstance(value, tuple):
    return tuple(fill(item, workdir, seed) for item in value)
  return value.replace('{workdir}', workdir).replace('{seed}', str(seed)) if isinstance(value, str) else value


def texts(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, (Mapping, tuple)):
    for item in value.values() if isinstance(value, Mapping) else value:
      yield from texts(item)


def as_text(key: str, value: Any) -> str:
  """`value` as a command line writes it. Raises ConfigError for what would not arrive as itself (nan)."""
  text = value if isinstance(value, str) and config_lib.parse_value(value) == value else repr(value)
  check(config_lib.parse_value(text) == value, f'{key}: {value!r} cannot be written on a command line')
  return text


def make_run(path: str, name: str, seed: int, arguments: Mapping[str, Any], entry: Mapping[str, Any]) -> Run:
  """Raises ConfigError naming the entry for what its config refuses, dead keys aside: those are asked of `train --explain`."""
  try:
    items = [f'{key}={as_text(f"argument {key}", value)}' for key, value in arguments.items()]
    for item in items:
      check(',' not in item, f'argument {item}: a comma cannot be written in --config=FILE.py:NAME=VALUE,...')
    spec = f'{path}:{",".join(items)}' if items else path
    settings = config_lib.read_file(spec)
    check('stages' not in settings, f'{path} is a pipeline config: a sweep is of train configs, which may start from one another')
    placed = {k: v for k, v in config_lib.flatten(settings).items() if any('{workdir}' in t or '{seed}' in t for t in texts(v))}
    overrides = {**placed, **{k: config_lib.plain(v) for k, v in entry.items() if k not in config_lib.ENTRY_KEYS}}
    if 'seed' not in arguments:
      overrides['seed'] = seed
    for key, value in overrides.items():
      settings = config_lib.override(settings, key, config_lib.parse_value(as_text(f'config key {key!r}', value)))
    config_lib.resolve(settings)
    needs = set()
    for text in texts(settings):
      found = REFERENCE.findall(text)
      check(len(found) == text.count('{workdir}'), f'{text!r}: write {{workdir}}/NAME/seed{{seed}} for the run of the entry NAME')
      needs |= {(other, seed if number == '{seed}' else int(number)) for other, number in found}
  except ConfigError as error:
    raise ConfigError(f'entry {name!r}, seed {seed}: {error}') from None
  return Run(name, seed, spec, overrides, settings, frozenset(needs))


def read_sweep(spec: str, seeds: Sequence[int]) -> Sweep:
  """Entries x seeds of a config file. Raises ConfigError for whatever can be told wrong without jax."""
  module, given = config_lib.read_module(spec)
  path = str(module.__file__)
  check(callable(getattr(module, 'sweep', None)), f'{path}: defines no sweep(base)')
  check('seed' not in given, f'--config={spec}: seeds are given by --seeds')
  takes_seed = 'seed' in inspect.signature(module.get_config).parameters
  first = {**given, **({'seed': seeds[0]} if takes_seed else {})}
  with config_lib.blaming(path):
    entries = module.sweep(module.get_config(**first))
  check(isinstance(entries, (list, tuple)) and len(entries) > 0, f'{path}: sweep returns {entries!r}, not a list of dicts')
  found: dict[str, list[Run]] = {}
  for entry in entries:
    good = isinstance(entry, Mapping) and all(isinstance(key, str) for key in entry)
    check(good, f'{path}: sweep: {entry!r} is no dict of overrides by dotted keys')
    check(isinstance(entry.get('arguments', {}), Mapping), f'{path}: sweep: arguments {entry.get("arguments")!r} are no dict')
    name = config_lib.entry_name(entry)
    check(isinstance(name, str) and bool(NAME.fullmatch(name)),
          f'{path}: sweep: {name!r} cannot name an entry: up to 100 letters, digits and _ . = + -')  # fmt: skip
    check(name not in found, f'{path}: sweep: two entries are called {name!r}: give each a `name`')
    arguments = {**given, **entry.get('arguments', {})}
    check('seed' not in arguments and 'seed' not in entry, f'entry {name!r}: seeds are given by --seeds')
    check(isinstance(entry.get('report', True), bool), f'entry {name!r}: report is {entry.get("report")!r}, not True or False')
    found[name] = [make_run(path, name, s, {**arguments, **({'seed': s} if takes_seed else {})}, entry) for s in seeds]
  check_different(found)
  for run in (run for runs in found.values() for run in runs):
    for name, seed in run.needs:
      check(name in found, f'entry {run.name!r} needs {name!r}, which is no entry; there are {", ".join(found)}')
      check(seed in seeds, f'entry {run.name!r} needs seed {seed} of {name!r}, which is not among --seeds')
  try:
    needs = {name: dict.fromkeys(n for run in runs for n, _ in sorted(run.needs)) for name, runs in found.items()}
    order = tuple(graphlib.TopologicalSorter(needs).static_order())
  except graphlib.CycleError as error:
    raise ConfigError(f'entries need one another in a circle: {" needs ".join(reversed(error.args[1]))}') from None
  reported = tuple(config_lib.entry_name(entry) for entry in entries if entry.get('report', True))
  runs = {run.key: run for same_seed in zip(*found.values(), strict=True) for run in same_seed}
  compared = read_pairs(path, getattr(module, 'COMPARE', ()), reported)
  return Sweep(runs, order, reported, read_metrics(path, getattr(module, 'REPORT', None), runs.values()), compared)


def check_different(found: Mapping[str, Sequence[Run]]) -> None:
  """No two runs may be the same one: an override without effect, or a seed that get_config takes and drops, would look like a result."""
  for index, (name, runs) in enumerate(found.items()):
    for other in list(found)[:index]:
      check(runs[0].settings != found[other][0].settings, f'entries {other!r} and {name!r} set the same: they would be one run')
    for one, two in itertools.pairwise(runs):
      check(one.settings != two.settings,
            f'entry {name!r}: get_config takes a seed and returns the same for {one.seed} and {two.seed}')  # fmt: skip


def read_metrics(path: str, chosen: Any, runs: Iterable[Run]) -> tuple[str, ...]:
  """REPORT, checked as far as it can be before a run, or the default."""
  evaluators = dict.fromkeys(name for run in runs for name in run.settings.get('eval', {}).get('evaluators', {}))
  if chosen is None:
    return tuple(f'eval/{name}/accuracy' for name in evaluators) or ('reward', 'loss')
  good = isinstance(chosen, (list, tuple)) and bool(chosen) and all(isinstance(metric, str) for metric in chosen)
  check(good, f'{path}: REPORT is {chosen!r}, not a list of names of metrics')
  for metric in chosen:
    if metric.startswith('eval/'):
      check(any(metric.startswith(f'eval/{evaluator}/') for evaluator in evaluators),
            f'{path}: REPORT: {metric!r} is not eval/EVALUATOR/METRIC of an evaluator here: {", ".join(evaluators) or "none"}')  # fmt: skip
  return tuple(dict.fromkeys(chosen))


def read_pairs(path: str, chosen: Any, reported: Sequence[str]) -> tuple[tuple[str, str], ...]:
  good = isinstance(chosen, (list, tuple)) and all(
    isinstance(pair, (list, tuple)) and len(pair) == 2 and pair[0] != pair[1] and all(name in reported for name in pair)
    for pair in chosen
  )
  check(good, f'{path}: COMPARE is {chosen!r}, not a list of pairs of reported entries: {", ".join(reported)}')
  return tuple((entry, against) for entry, against in chosen)


def select(sweep: Sweep, names: Sequence[str]) -> list[Run]:
  """The runs of these entries (none named: all) and of what they need."""
  for name in names:
    check(name in sweep.order, f'--only={name}: no such entry; there are {", ".join(sweep.order)}')
  wanted = {run.key for run in sweep.runs.values() if not names or run.name in names}
  while more := {key for chosen in wanted for key in sweep.runs[chosen].needs} - wanted:
    wanted |= more
  return [run for key, run in sweep.runs.items() if key in wanted]


def read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f'{path}: damaged: {error}') from None


def write_atomically(path: pathlib.Path, text: str) -> None:
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  part.replace(path)


def finished(run: Run, workdir: str) -> bool:
  return (run.folder(workdir) / 'summary.json').exists()


def changed(run: Run, workdir: str) -> list[str]:
  """'key: old -> new' of what the run in the folder was told otherwise, by its launch record, or by its config if it has none."""
  record, config = run.beside(workdir, '.json'), run.folder(workdir) / 'config.json'
  if not config.exists():
    return []
  if record.exists():
    return config_lib.differences({**read_json(record)['settings'], 'mesh': {}}, {**run.settings, 'mesh': {}})
  old, new = read_json(config), fill(run.settings, workdir, run.seed)
  told = config_lib.flatten({k: v for k, v in new.items() if k != 'mesh'})
  told = {key: value for key, value in told.items() if value not in ('', (), {})}  # those a run fills in itself
  return config_lib.differences({k: v for k, v in config_lib.flatten(old).items() if k in told}, told)


def check_unchanged(runs: Sequence[Run], workdir: str) -> None:
  for run in runs:
    found = changed(run, workdir)
    check(not found, f'{run.folder(workdir)} is a run of other settings (move it away, or give the entry another name):\n  '
          + '\n  '.join(found))  # fmt: skip
