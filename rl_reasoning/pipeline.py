"""Many runs: named stages, in order, finished ones skipped.

  python -m rl_reasoning.pipeline --config=configs/demo.py --workdir=runs/demo [--overwrite]

A pipeline config's get_config returns {'stages': {name: train config}}; '{workdir}' in a text is the pipeline's own workdir, so that a
stage starts from another's checkpoint by `roles.policy.init = '{workdir}/base'`. A stage with a section `generate` samples data from a
checkpoint (datagen.py), and a later one trains on it by `data.path = '{workdir}/STAGE/data.jsonl'`.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.pipeline')

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from rl_reasoning import build, config as config_lib, datagen, environment, evaluators, metrics, train
from rl_reasoning.config import ConfigError, check


def fill(value: Any, workdir: str) -> Any:
  if isinstance(value, Mapping):
    return {k: fill(v, workdir) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [fill(v, workdir) for v in value]
  return value.replace('{workdir}', workdir) if isinstance(value, str) else value


def check_stage(settings: Mapping[str, Any], workdir: str, earlier: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises ConfigError for what can be told wrong of a stage before those of `earlier` have run."""
  for key, value in config_lib.flatten(settings).items():
    if isinstance(value, str) and value.startswith('{workdir}/'):
      name = value.split('/')[1]
      there = pathlib.Path(fill(value, workdir)).exists()
      check(name in earlier or there, f'config key {key!r}: {value!r} does not exist, and no earlier stage is called {name!r}')
  filled, runs = fill(settings, workdir), [f'{workdir}/{name}' for name, s in earlier.items() if 'generate' not in s]
  if 'generate' in settings:
    datagen.check_job(datagen.resolve(filled), runs)
    return
  config = config_lib.resolve(filled)
  build.check_config(config, set(config_lib.flatten(settings)), earlier=runs)
  evaluators.make_evaluators(config.eval.evaluators)


def run_stage(settings: Mapping[str, Any], workdir: str, overwrite: bool) -> dict[str, Any]:
  """Trains or samples; returns the stage's entry of summary.json."""
  if 'generate' in settings:
    summary = datagen.generate(datagen.resolve(settings), workdir, overwrite)
    print(datagen.describe(summary), flush=True)
    return {**summary, 'evaluators': {}}
  keys_set = set(config_lib.flatten(settings))
  summary = train.train(config_lib.resolve(settings), workdir, keys_set=keys_set, overwrite=overwrite)
  numbers = summary['evaluations'][-1]['evaluators'] if summary['evaluations'] else {}
  first = next(iter(numbers.values()), {})
  return {**numbers.get('greedy', first), 'evaluators': numbers, 'wall_s': summary['wall_s']}


def run_pipeline(stages: Mapping[str, Any], workdir: str, overwrite: bool = False) -> dict[str, Any]:
  """Runs what is not finished; returns and writes summary.json: the last evaluation of each stage, and of the last one as 'final'. Beside
  'evaluators' an entry has the numbers of the one called greedy, or else of the first; a stage that samples data has its own summary."""
  good = isinstance(stages, Mapping) and bool(stages) and all(isinstance(s, Mapping) for s in stages.values())
  check(good, "pipeline: 'stages' is no mapping of names to train configs")
  check('final' not in stages, "pipeline: no stage may be called 'final': summary.json has the last one's numbers there")
  earlier: dict[str, Mapping[str, Any]] = {}
  for name, settings in stages.items():
    try:
      check_stage(settings, workdir, earlier)
    except ConfigError as error:  # now, not when the stages before it have run
      raise ConfigError(f'stage {name}: {error}') from None
    earlier[name] = settings
  result: dict[str, Any] = {}
  for name, settings in stages.items():
    print(f'== stage {name}', flush=True)
    began = time.time()
    result[name] = run_stage(fill(settings, workdir), f'{workdir}/{name}', overwrite)
    print(f'== stage {name}: done in {time.time() - began:.0f} s', flush=True)
  result['final'] = result[list(stages)[-1]]
  train.write_atomically(epath.Path(workdir) / 'summary.json', json.dumps(result, indent=1))
  return result


def command(argv: list[str]) -> None:
  flags = train.read_flags(argv, ('config', 'workdir', 'overwrite'))
  check(bool(flags.get('workdir')), '--workdir=DIR is missing')
  environment.cache_compilations()
  settings = config_lib.read_file(flags['config'])
  check(set(settings) == {'stages'}, f"{flags['config']}: a pipeline config has the one key 'stages'")
  result = run_pipeline(settings['stages'], flags['workdir'], 'overwrite' in flags)
  told = [(stage, entry['evaluators']) for stage, entry in result.items() if stage != 'final' and 'evaluators' in entry]
  metrics.summary_table(flags['workdir'], *train.evaluation_table(told, 'stage'))
  print(f'curves: {flags["workdir"]}/*/curves.png, samples: {flags["workdir"]}/*/completions/')


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
