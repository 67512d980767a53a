"""Many runs: named stages, in order, finished ones skipped.

  python -m rl_reasoning.pipeline --config=configs/demo.py --workdir=runs/demo [--overwrite]

A pipeline config's get_config returns {'stages': {name: train config}}; '{workdir}' in a text is the pipeline's own workdir, so that a
stage starts from another's checkpoint by `roles.policy.init = '{workdir}/base'`.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.pipeline')

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from rl_reasoning import build, config as config_lib, environment, evaluators, metrics, train
from rl_reasoning.config import ConfigError, check


def fill(value: Any, workdir: str) -> Any:
  if isinstance(value, Mapping):
    return {k: fill(v, workdir) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [fill(v, workdir) for v in value]
  return value.replace('{workdir}', workdir) if isinstance(value, str) else value


def run_pipeline(stages: Mapping[str, Any], workdir: str, overwrite: bool = False) -> dict[str, Any]:
  """Runs what is not finished; returns and writes summary.json: the last evaluation of each stage, and of the last one as 'final'. Beside
  'evaluators' an entry has the numbers of the one called greedy, or else of the first."""
  good = isinstance(stages, Mapping) and bool(stages) and all(isinstance(s, Mapping) for s in stages.values())
  check(good, "pipeline: 'stages' is no mapping of names to train configs")
  check('final' not in stages, "pipeline: no stage may be called 'final': summary.json has the last one's numbers there")
  resolved = {name: (config_lib.resolve(fill(s, workdir)), set(config_lib.flatten(s))) for name, s in stages.items()}
  for name, (config, keys_set) in resolved.items():
    try:
      build.check_config(config, keys_set, earlier=[f'{workdir}/{n}' for n in resolved])
      evaluators.make_evaluators(config.eval.evaluators)
    except ConfigError as error:  # now, not when the stages before it have run
      raise ConfigError(f'stage {name}: {error}') from None
  result: dict[str, Any] = {}
  for name, (config, keys_set) in resolved.items():
    print(f'== stage {name}', flush=True)
    began = time.time()
    summary = train.train(config, f'{workdir}/{name}', keys_set=keys_set, overwrite=overwrite)
    numbers = summary['evaluations'][-1]['evaluators'] if summary['evaluations'] else {}
    first = next(iter(numbers.values()), {})
    result[name] = {**numbers.get('greedy', first), 'evaluators': numbers, 'wall_s': summary['wall_s']}
    print(f'== stage {name}: done in {time.time() - began:.0f} s', flush=True)
  result['final'] = result[next(reversed(resolved))]
  train.write_atomically(epath.Path(workdir) / 'summary.json', json.dumps(result, indent=1))
  return result


def command(argv: list[str]) -> None:
  flags = train.read_flags(argv, ('config', 'workdir', 'overwrite'))
  check(bool(flags.get('workdir')), '--workdir=DIR is missing')
  environment.cache_compilations()
  settings = config_lib.read_file(flags['config'])
  check(set(settings) == {'stages'}, f"{flags['config']}: a pipeline config has the one key 'stages'")
  result = run_pipeline(settings['stages'], flags['workdir'], 'overwrite' in flags)
  rows = []
  for stage, entry in result.items():
    if stage != 'final':
      rows += [[stage, *row[1:]] for row in train.evaluation_rows([{'step': 0, 'evaluators': entry['evaluators']}])]
  metrics.summary_table(flags['workdir'], ('stage', *train.EVALUATION_COLUMNS[1:]), rows)
  print(f'curves: {flags["workdir"]}/*/curves.png, samples: {flags["workdir"]}/*/completions/')


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
