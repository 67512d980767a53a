"""The kinds of a pipeline's stages: what each reads, how it is checked before anything runs, how it runs, and what of it later stages read.

A stage is a train config, or has one of these sections, which says what it is:

  generate   datagen.py: data sampled from a checkpoint
  filter     filters.py: rows of earlier stages and of files, filtered and joined
  evaluate   {'checkpoint': RUN_OR_WEIGHTS}: evaluate.py, beside the keys of an evaluation
  scale      inference.py: methods of inference-time scaling on roles.policy.init
  export     {'checkpoint': RUN}: a Hugging Face folder, for transformers and for later stages

Train and export stages give weights, '{workdir}/STAGE'; generations and filters give data, '{workdir}/STAGE/data.jsonl'.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rl_reasoning import (
  config as config_lib,
  data,
  data_settings,
  datagen,
  evaluate,
  evaluators,
  filters,
  inference,
  resolution,
  stored,
  train,
)
from rl_reasoning.config import check, coerce, flatten, to_dict

Settings = Mapping[str, Any]
DATA_FILE = 'data.jsonl'
BUYING = tuple(f'generate.api.{key}' for key in data_settings.BUYING)  # where and when an answer is bought, and not which
WEIGHTS, DATA, TOKENIZER = ('train', 'export'), ('generate', 'filter'), ('export',)  # kinds of stages that give them


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The section of an evaluation, and of an export."""

  checkpoint: str


class Kind(NamedTuple):
  check: Callable[[Settings, Sequence[str]], None]  # (settings, runs that need not exist yet); raises ConfigError
  config: Callable[[Settings], dict[str, Any]]  # every key that decides
  elsewhere: tuple[str, ...]  # of these, what says where things lie, as prefixes
  run: Callable[[Settings, str, bool], dict[str, Any]]  # (settings, workdir, overwrite) -> metrics
  output: str  # what of its workdir others read; '' all of it


def fill(value: Any, workdir: str) -> Any:
  if isinstance(value, Mapping):
    return {k: fill(v, workdir) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [fill(v, workdir) for v in value]
  return value.replace('{workdir}', workdir) if isinstance(value, str) else value


def texts(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
  """(dotted key, text) of every text in a config."""
  if isinstance(value, str):
    yield key, value
  elif isinstance(value, Mapping):
    for name, item in value.items():
      yield from texts(item, f'{key}.{name}' if key else str(name))
  elif isinstance(value, (list, tuple)):
    for index, item in enumerate(value):
      yield from texts(item, f'{key}[{index}]')


def reads(key: str) -> tuple[str, ...]:
  """The kinds of stages that a key can name; () for a key that names no file by its meaning."""
  last = key.rpartition('.')[2]
  if key == 'export.checkpoint':
    return ('train',)  # a folder of Hugging Face is one already
  if last in ('init', 'kl_to', 'checkpoint'):
    return WEIGHTS
  if last == 'tokenizer':
    return TOKENIZER
  return DATA if last == 'path' or key.startswith('filter.inputs.') else ()


def split_reference(text: str) -> tuple[str, str]:
  """(stage, what of its workdir) that a text names, or two empty texts."""
  found = re.fullmatch(r'\{workdir\}/([^/]+)/?(.*)', text, re.DOTALL)
  return (found[1], found[2]) if found else ('', '')


def inputs(settings: Settings) -> dict[str, str]:
  """config key -> path ('{workdir}' as it stands), of all that a stage reads and that lies in files. What is not there by its name (a data
  set of the hub, 'bytes') is no file."""
  found = {}
  for key, text in texts(settings):
    outside = bool(text) and (bool(reads(key)) or key.startswith('filter.steps'))
    if split_reference(text)[0] or (outside and pathlib.Path(text).expanduser().exists()):
      found[key] = text
  return found


def check_references(settings: Settings, workdir: str, earlier: Mapping[str, Settings], stages: Collection[str]) -> None:
  """Raises ConfigError for the name of a stage that is none, comes later, or does not give what the key asks for."""
  for key, text in texts(settings):
    name, rest = split_reference(text)
    if not name:
      continue
    what = f'config key {key!r}: {text!r}'
    check(name in earlier or name not in stages, f'{what}: no earlier stage is called {name!r}: it comes later')
    there = pathlib.Path(fill(text, workdir)).exists()
    check(name in earlier or there, f'{what} does not exist, and no earlier stage is called {name!r}')
    if name in earlier and reads(key):
      kind = kind_of(earlier[name])
      right = kind in reads(key) and rest == KINDS[kind].output
      wanted = '{workdir}/STAGE' + f'/{DATA_FILE}' * (reads(key) == DATA)
      check(right, f'{what}: it takes {wanted!r} of a stage that is {" or ".join(reads(key))}; {name!r} is {kind}')


def kind_of(settings: Settings) -> str:
  found = [name for name in KINDS if name in settings]
  check(len(found) < 2, f'sections {" and ".join(found)}: a stage is one of them')
  return found[0] if found else 'train'


def without(settings: Settings, section: str) -> dict[str, Any]:
  return {key: value for key, value in settings.items() if key != section}


def greedy_first(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The numbers of the evaluator called greedy, or else of the first, and those of all."""
  return {**numbers.get('greedy', next(iter(numbers.values()), {})), 'evaluators': dict(numbers)}


def check_train(settings: Settings, absent: Sequence[str]) -> None:
  config = config_lib.resolve(settings)
  resolution.check_config(config, set(flatten(settings)), earlier=absent)
  evaluators.make_evaluators(config.eval.evaluators)


def run_train(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  summary = train.train(config_lib.resolve(settings), workdir, keys_set=set(flatten(settings)), overwrite=overwrite)
  return greedy_first(summary['evaluations'][-1]['evaluators'] if summary['evaluations'] else {})


def check_generate(settings: Settings, absent: Sequence[str]) -> None:
  datagen.check_job(datagen.resolve(settings), absent)


def generate_config(settings: Settings) -> dict[str, Any]:
  job = datagen.resolve(settings)
  return {**to_dict(job.config), 'generate': to_dict(job.generate)}


def run_generate(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  summary = datagen.generate(datagen.resolve(settings), workdir, overwrite)
  print(datagen.describe(summary), flush=True)
  return {**summary, 'evaluators': {}}


def check_filter(settings: Settings, absent: Sequence[str]) -> None:
  f = filters.resolve(settings)
  for name, path in f.inputs.items():
    if path not in absent:
      filters.files(path, name)


def run_filter(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  summary = filters.run(filters.resolve(settings), workdir)
  print(filters.describe(summary), flush=True)
  return {**summary, 'evaluators': {}}


def source_of(settings: Settings, section: str, absent: Sequence[str]) -> str:
  source = coerce(settings[section], Checkpoint, section).checkpoint
  there = source in absent or (bool(source) and pathlib.Path(source).exists())
  check(there, f"config key '{section}.checkpoint': {source!r} does not exist")
  return source


def check_evaluate(settings: Settings, absent: Sequence[str]) -> None:
  source_of(settings, 'evaluate', absent)
  rest = without(settings, 'evaluate')
  config, keys = config_lib.resolve(rest), set(flatten(rest))
  evaluate.check_keys(config, keys, keys)
  check(bool(evaluators.make_evaluators(config.eval.evaluators)), "config key 'eval.evaluators' is empty: nothing to evaluate")


def evaluate_config(settings: Settings) -> dict[str, Any]:
  return {**to_dict(config_lib.resolve(without(settings, 'evaluate'))), 'evaluate': settings['evaluate']}


def run_evaluate(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  config = config_lib.resolve(without(settings, 'evaluate'))
  return greedy_first(
    evaluate.run_evaluation(config, settings['evaluate']['checkpoint'], workdir, overwrite=overwrite)['evaluators']
  )


def scaled(settings: Settings) -> tuple[inference.Job, str]:
  """(job, checkpoint); on the command line --checkpoint stands for roles.policy.init. Raises ConfigError."""
  roles = settings.get('roles', {})
  good = isinstance(roles, Mapping) and isinstance(roles.get('policy', {}), Mapping)
  check(good, "config key 'roles.policy' is no section")
  policy = roles.get('policy', {})
  source = policy.get('init', '')
  check(bool(source), "config key 'roles.policy.init' is empty: it names what the methods of scale sample from")
  others = {name: role for name, role in {**roles, 'policy': without(policy, 'init')}.items() if role}
  return inference.resolve({**without(settings, 'roles'), **({'roles': others} if others else {})}), source


def check_scale(settings: Settings, absent: Sequence[str]) -> None:
  job, source = scaled(settings)
  inits = {'policy': source, **{f'reward.{name}': role.init for name, role in config_lib.reward_roles(job.config).items()}}
  for role, init in inits.items():
    check(init in absent or pathlib.Path(init).exists(), f"config key 'roles.{role}.init': {init!r} does not exist")


def scale_config(settings: Settings) -> dict[str, Any]:
  job, source = scaled(settings)
  methods = {name: dataclasses.asdict(method) for name, method in job.methods.items()}
  return {**to_dict(job.config), 'scale': methods, 'checkpoint': source}


def run_scale(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  return {**inference.scale(*scaled(settings), workdir, overwrite), 'evaluators': {}}


def check_export(settings: Settings, absent: Sequence[str]) -> None:
  other = sorted(settings.keys() - {'export'})
  check(not other, f'config keys that cannot act beside a section export: {", ".join(other)}')
  source = source_of(settings, 'export', absent)
  ours = source in absent or stored.is_run(source)
  check(ours, f"config key 'export.checkpoint': {source} is no run of ours, with a checkpoint to export")


def run_export(settings: Settings, workdir: str, overwrite: bool) -> dict[str, Any]:
  """A folder appears whole or not at all, so one that is there is done."""
  source, target = settings['export']['checkpoint'], epath.Path(workdir)
  for left in target.parent.glob(f'.{target.name}.*.part'):  # of a save that was killed
    left.rmtree()
  if not target.exists():
    stored.export(source, workdir)
  return {'checkpoint': source, 'evaluators': {}}


KINDS: dict[str, Kind] = {
  'train': Kind(check_train, lambda s: to_dict(config_lib.resolve(s)), ('mesh',), run_train, ''),
  'generate': Kind(check_generate, generate_config, ('mesh', 'data.cache_dir', *BUYING), run_generate, DATA_FILE),
  'filter': Kind(check_filter, lambda s: {'filter': to_dict(filters.resolve(s))}, (), run_filter, DATA_FILE),
  'evaluate': Kind(check_evaluate, evaluate_config, ('mesh', 'data.cache_dir'), run_evaluate, 'evaluation.json'),
  'scale': Kind(check_scale, scale_config, ('mesh', 'data.cache_dir'), run_scale, 'scale.json'),
  'export': Kind(check_export, dict, (), run_export, ''),
}


def deciding(settings: Settings) -> dict[str, Any]:
  """The keys of a stage that decide what comes out, flat and as JSON gives them back."""
  kind = KINDS[kind_of(settings)]
  flat = {key: value for key, value in flatten(kind.config(settings)).items() if not evaluate.begins(key, kind.elsewhere)}
  return json.loads(json.dumps(flat))


def output(settings: Settings, folder: str) -> str:
  """The path of what later stages read of a stage, or, of an evaluation, what it has found."""
  return f'{folder}/{KINDS[kind_of(settings)].output}'.rstrip('/')


def check_data(settings: Settings, made: Collection[str]) -> None:
  """The tasks that a stage of any kind names, itself and by its evaluators. The paths `made` are outputs of earlier stages."""
  section = coerce(settings.get('data', {}), config_lib.Data, 'data')
  data.check_tasks(section, made)
  for name, evaluator in evaluators.make_evaluators(settings.get('eval', {}).get('evaluators', {})).items():
    data.check_tasks(evaluators.data_of(section, name, evaluator), made)


def check_stage(settings: Settings, workdir: str, earlier: Mapping[str, Settings], stages: Collection[str] = ()) -> None:
  """Raises ConfigError for what can be told wrong of a stage before those of `earlier` have run. `stages` are the names of all."""
  check_references(settings, workdir, earlier, stages)
  made = {output(s, f'{workdir}/{name}'): kind_of(s) for name, s in earlier.items()}
  # Of a run that has begun there may be a config, and no weights.
  absent = [path for path, kind in made.items() if kind == 'train' or not pathlib.Path(path).exists()]
  settings = fill(settings, workdir)
  KINDS[kind_of(settings)].check(settings, absent)
  check_data(settings, made)
