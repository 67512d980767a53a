"""Many runs: named stages, in order, each made again only when it or what it reads has changed.

  python -m rl_reasoning.pipeline --config=configs/demo.py --workdir=runs/demo [--plan] [--rerun=STAGE,STAGE] [--overwrite]

A pipeline config's get_config returns {'stages': {name: settings}}. A stage is a train run, a generation, a filter, an evaluation, a
curve of inference-time scaling or an export (stages.py). '{workdir}' in a text is the pipeline's own workdir, so that a stage starts from
another's checkpoint by `roles.policy.init = '{workdir}/base'`, and reads the rows that another has made by
`data.path = '{workdir}/sample/data.jsonl'`.

The same command goes on after an interruption, wherever that came. manifest.json tells what each stage was made from (manifest.py): one
that is done is skipped. A stage has changed when its config has, when what it reads is no longer the same by content, or when its output is
not what it left. Hours of work are never deleted by an edit: a stage that has changed is refused before anything runs, with what differs,
until `--rerun=STAGE` names it. It is then deleted and made again, and so is, without being named, what was made from it, but only once it
has come out different. --rerun does nothing to a stage that has not changed, so that the same command goes on after a kill; to make one
again all the same, delete its folder. --overwrite makes everything anew. --plan prints the stages and what would happen, and runs nothing.

Exit codes are those of rl_reasoning.train; after 42 (preempted, in a stage of whatever kind) and 130 the same command goes on.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.pipeline')

import json
import re
import signal
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from etils import epath

from rl_reasoning import config as config_lib, environment, metrics, preemption, train
from rl_reasoning.config import ConfigError, check
from rl_reasoning.data_from_api import ANSWERS
from rl_reasoning.manifest import Manifest, changes
from rl_reasoning.stages import KINDS, Settings, check_stage, deciding, fill, inputs, kind_of, output, split_reference


class Status(NamedTuple):
  word: str  # done | partly | changed | to do
  why: tuple[tuple[str, str], ...] = ()  # of what has changed: (the stage whose output it is, or '', what differs)
  waits: tuple[str, ...] = ()  # stages whose output is to come: whether it will be another cannot be told yet

  def told(self) -> str:
    lines = '; '.join(text for _, text in self.why)
    again = f' (again, where {", ".join(self.waits)} comes out different)' if self.waits and self.word != 'to do' else ''
    return self.word + f': {lines}' * bool(lines) + again


def check_stages(stages: Any, workdir: str) -> None:
  """Raises ConfigError for what can be told wrong before anything runs."""
  good = isinstance(stages, Mapping) and bool(stages) and all(isinstance(s, Mapping) for s in stages.values())
  check(good, "pipeline: 'stages' is no mapping of names to configs")
  earlier: dict[str, Settings] = {}
  for name, settings in stages.items():
    check(bool(re.fullmatch(r'[\w-]+', name)), f'stage {name!r}: a name is of letters, digits, _ and -')
    check(name != 'final', "pipeline: no stage may be called 'final': summary.json has the last one's numbers there")
    try:
      check_stage(settings, workdir, earlier, stages)
    except ConfigError as error:  # now, not when the stages before it have run
      raise ConfigError(f'stage {name}: {error}') from None
    earlier[name] = settings


def entry_of(settings: Settings, workdir: str, manifest: Manifest) -> dict[str, Any]:
  """What a stage would be made from now."""
  read = {key: {'path': path, 'identity': manifest.identity(fill(path, workdir))} for key, path in inputs(settings).items()}
  config = deciding(settings)
  return {
    'kind': kind_of(settings), 'config': config, 'config_hash': config_lib.digest(config), 'inputs': read, 'workdir': workdir
  }  # fmt: skip


def status(name: str, settings: Settings, workdir: str, manifest: Manifest, done: Collection[str]) -> Status:
  """Where a stage stands. The outputs of the stages that are not `done` are to come."""
  read = {key: split_reference(path)[0] for key, path in inputs(settings).items()}
  waits = tuple(dict.fromkeys(stage for stage in read.values() if stage and stage not in done))
  old, folder = manifest.stages.get(name), f'{workdir}/{name}'
  if not epath.Path(folder).exists():
    return Status('to do', waits=waits)
  if old is None:
    return Status('partly', waits=waits)  # of a workdir without a manifest: its own files tell whether it may go on
  new = entry_of(settings, workdir, manifest)
  why = [('', f'a stage of kind {old["kind"]} -> {new["kind"]}')] if old['kind'] != new['kind'] else []
  why += [('', text) for text in changes(old['config'], new['config'])]
  for key, stage in read.items():
    was = old['inputs'].get(key)
    if (
      stage not in waits
      and was
      and was['path'] == new['inputs'][key]['path']
      and was['identity'] != new['inputs'][key]['identity']
    ):
      why.append((stage, f'{key}: {was["path"]} is not what it was'))
  if 'output' not in old and old['workdir'] != workdir:  # in a config half done it stands in full
    why.append(('', f'--workdir: {old["workdir"]} -> {workdir}'))
  if 'output' in old and manifest.identity(output(settings, folder)) != old['output']:
    why.append(('', 'its output is not what it left'))
  whole = 'output' in old and not any(old['metrics'].get(key) for key in ('not_asked', 'failed'))  # else there is more to be had
  return Status('changed' if why else 'done' if whole else 'partly', tuple(why), waits)


def statuses(stages: Mapping[str, Settings], workdir: str, manifest: Manifest) -> dict[str, Status]:
  found: dict[str, Status] = {}
  for name, settings in stages.items():
    done = [n for n, s in found.items() if s.word == 'done' and not s.waits]
    found[name] = status(name, settings, workdir, manifest, done)
  return found


def check_consent(found: Mapping[str, Status], agreed: Collection[str]) -> set[str]:
  """The stages that may be made again: those named, and what has changed through nothing but them. Raises ConfigError for others."""
  named, agreed, refused = set(agreed), set(agreed), []
  for name, s in found.items():
    if s.word != 'changed' or name in agreed:
      continue
    if all(stage in agreed for stage, _ in s.why):
      agreed.add(name)
    else:
      refused.append(name)
  if refused:
    lines = [f'  {name}: {"; ".join(text for _, text in found[name].why)}' for name in refused]
    flag = ','.join(name for name in found if found[name].word == 'changed' and (name in refused or name in named))
    raise ConfigError('stages that are done, or begun, have changed:\n' + '\n'.join(lines) + f'\n--rerun={flag} deletes them and makes '
                      'them again, and after them whatever comes out different; another --workdir keeps them')  # fmt: skip
  return agreed


def deleted(name: str, workdir: str) -> epath.Path:
  return epath.Path(f'{workdir}/.{name}.deleted')


def finish_removal(name: str, workdir: str) -> None:
  """Deletes what `deleted` names, if it is there, but for answers that were bought: they stay for the stage that is made anew."""
  old, folder = deleted(name, workdir), epath.Path(f'{workdir}/{name}')
  if not old.exists():
    return
  if (old / ANSWERS).exists():
    folder.mkdir(exist_ok=True)
    (old / ANSWERS).rename(folder / ANSWERS)
  old.rmtree()


def remove(name: str, workdir: str) -> None:
  epath.Path(f'{workdir}/{name}').rename(deleted(name, workdir))  # whole or not at all: a kill leaves no half of a stage
  finish_removal(name, workdir)
  print(f'== stage {name}: its old output is deleted', flush=True)


def run_stage(name: str, settings: Settings, workdir: str, manifest: Manifest, overwrite: bool, resumes: bool) -> None:
  """Makes a stage, or goes on with it, and enters it into the manifest."""
  folder, kind = f'{workdir}/{name}', kind_of(settings)
  print(f'== stage {name}', flush=True)
  began = time.time()
  if not resumes:
    ours = kind != 'export' or not epath.Path(folder).exists()
    check(ours, f'{folder} exists, and is no output of this pipeline: move it away')
    manifest.begin(name, entry_of(settings, workdir, manifest))
  elif (
    'output' in manifest.stages[name]
  ):  # more is to be had of it: until that is there it has no output that a kill could leave wrong
    manifest.reopen(name)
  found = KINDS[kind].run(fill(settings, workdir), folder, overwrite)
  manifest.finish(name, manifest.identity(output(settings, folder)), found, time.time() - began)
  print(f'== stage {name}: done in {time.time() - began:.0f} s', flush=True)


def summarise(stages: Mapping[str, Settings], manifest: Manifest) -> dict[str, Any]:
  """Of each stage what its run gave, and of the last one as 'final'. Beside 'evaluators' an entry has the numbers of the one called greedy,
  or else of the first; a stage that makes data has its counts."""
  entries = {name: manifest.stages[name] for name in stages}
  result = {name: {**entry['metrics'], 'wall_s': entry['wall_s']} for name, entry in entries.items()}
  return {**result, 'final': result[list(stages)[-1]]}


def run_pipeline(
  stages: Mapping[str, Any], workdir: str, overwrite: bool = False, rerun: Collection[str] = ()
) -> dict[str, Any]:  # fmt: skip
  """Runs what is not done; returns and writes summary.json."""
  check_stages(stages, workdir)
  unknown = [name for name in rerun if name not in stages]
  check(not unknown, f'--rerun={",".join(rerun)}: no stage is called {", ".join(unknown)}; stages: {", ".join(stages)}')
  manifest = Manifest(workdir)
  for name in stages:
    finish_removal(name, workdir)
  if overwrite:
    for name in [name for name in stages if name in manifest.stages]:
      if epath.Path(f'{workdir}/{name}').exists():
        remove(name, workdir)
      manifest.forget(name)
  agreed = check_consent(statuses(stages, workdir, manifest), rerun)
  for name, settings in stages.items():
    found = status(name, settings, workdir, manifest, list(stages))
    if found.word == 'done':
      print(f'== stage {name}: done before', flush=True)
      continue
    try:
      if found.word == 'changed':
        agreed = check_consent({name: found}, agreed)
        remove(name, workdir)
      run_stage(name, settings, workdir, manifest, overwrite, found.word == 'partly' and name in manifest.stages)
    except ConfigError as error:
      raise ConfigError(f'stage {name}: {error}') from None
  result = summarise(stages, manifest)
  train.write_atomically(epath.Path(workdir) / 'summary.json', json.dumps(result, indent=1))
  return result


def plan(stages: Mapping[str, Any], workdir: str) -> tuple[list[str], list[list[str]]]:
  """(columns, rows): the stages in order, what each reads, and where it stands."""
  check_stages(stages, workdir)
  found = statuses(stages, workdir, Manifest(workdir))
  rows = []
  for name, settings in stages.items():
    read = (split_reference(path)[0] or path for path in inputs(settings).values())
    rows.append([name, kind_of(settings), ', '.join(dict.fromkeys(read)), found[name].told()])
  return ['stage', 'kind', 'reads', 'status'], rows


def command(argv: list[str]) -> None:
  flags = train.read_flags(argv, ('config', 'workdir', 'overwrite', 'rerun', 'plan'))
  workdir = flags.get('workdir', '').rstrip('/')
  check(bool(workdir), '--workdir=DIR is missing')
  check(not flags.get('plan'), f'--plan={flags.get("plan")}: the flag takes no value')
  check('rerun' not in flags or bool(flags['rerun']), '--rerun: say which stages, --rerun=STAGE,STAGE')
  acts = [name for name in ('overwrite', 'rerun') if name in flags]
  check('plan' not in flags or not acts, f'--{", --".join(acts)} cannot act beside --plan, which runs nothing')
  check(len(acts) < 2, '--rerun cannot act beside --overwrite, which makes everything anew')
  settings = config_lib.read_file(flags['config'])
  check(set(settings) == {'stages'}, f"{flags['config']}: a pipeline config has the one key 'stages'")
  if 'plan' in flags:
    metrics.summary_table(f'{flags["config"]} in {workdir}', *plan(settings['stages'], workdir))
    return
  environment.cache_compilations()
  result = run_pipeline(settings['stages'], workdir, 'overwrite' in flags, tuple(filter(None, flags.get('rerun', '').split(','))))
  told = [(stage, entry['evaluators']) for stage, entry in result.items() if stage != 'final']
  if any(numbers for _, numbers in told):
    metrics.summary_table(workdir, *train.evaluation_table(told, 'stage'))
  print(f'curves: {workdir}/*/curves.png, samples: {workdir}/*/completions/, what was made from what: {workdir}/manifest.json')


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, preemption.leave)  # a stage of training saves itself first
  sys.exit(main(sys.argv[1:]))
