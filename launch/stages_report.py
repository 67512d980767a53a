"""The stages of a pipeline side by side: metrics of each stage's last evaluation over the seeds, and differences paired by seed.

  python -m launch.stages_report DIR ... --out=docs/results/NAME.json --metrics=greedy/accuracy,samples/pass@8 [--compare=rl1:rl1_free,...]

reads workdirs of one pipeline, one a seed, writes OUT and prints the tables: mean ± half of the 95 % t-interval over the seeds. A metric is
EVALUATOR/NAME of summary.json; `--compare=A:B` adds the row A - B.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch.rlhf_report import read
from launch.sweep_entries import write_atomically
from launch.sweep_report import leaves, now, over_seeds, shown, this_commit, this_hardware
from rl_reasoning import config as config_lib
from rl_reasoning.config import Parser, check
from rl_reasoning.tables import rows_to_markdown


def values_of(summary: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
  """stage -> metric -> number, of one seed; stages that were not evaluated are left out."""
  found = {}
  for name, entry in summary.items():
    numbers = dict(leaves(entry.get('evaluators', {}), ''))
    told = {metric: numbers[f'/{metric}'] for metric in metrics if isinstance(numbers.get(f'/{metric}'), (int, float))}
    if told and name != 'final':
      found[name] = told
  return found


def report(workdirs: Sequence[str], metrics: Sequence[str], compared: Sequence[tuple[str, str]]) -> dict[str, Any]:
  check(len({pathlib.Path(workdir).resolve() for workdir in workdirs}) == len(workdirs), 'a workdir is named twice')
  summaries = [read(pathlib.Path(workdir) / 'summary.json') for workdir in workdirs]
  for workdir, summary in zip(workdirs, summaries, strict=True):
    check(list(summary) == list(summaries[0]), f'{workdir}: other stages than {workdirs[0]}')
  seeds = [values_of(summary, metrics) for summary in summaries]
  for metric in metrics:
    check(any(metric in told for told in seeds[0].values()), f'--metrics: no stage of {workdirs[0]} has {metric!r}')
  stages: dict[str, dict[str, Any]] = {}
  for name in seeds[0]:
    stages[name] = {
      m: over_seeds([seed[name][m] for seed in seeds]) for m in metrics if all(m in seed.get(name, {}) for seed in seeds)
    }
  differences: dict[str, dict[str, Any]] = {}
  for name, other in compared:
    for stage in (name, other):
      check(stage in stages, f'--compare: no stage {stage!r} was evaluated; there are {", ".join(stages)}')
    both = [m for m in metrics if m in stages[name] and m in stages[other]]
    differences[f'{name} - {other}'] = {m: over_seeds([seed[name][m] - seed[other][m] for seed in seeds]) for m in both}
  return {
    'commit': this_commit(), 'date': now(), 'hardware': this_hardware(), 'workdirs': list(workdirs), 'metrics': list(metrics),
    'stages': stages, 'differences': differences, 'seeds': seeds,
    'seconds': {name: [s[name].get('wall_s', s[name].get('seconds')) for s in summaries] for name in summaries[0] if name != 'final'},
  }  # fmt: skip


def tables(result: Mapping[str, Any]) -> str:
  metrics, runs = result['metrics'], len(result['workdirs'])
  text = ''
  for first, part in (('stage', result['stages']), ('difference, paired by seed', result['differences'])):
    rows = [[name, *(shown(of.get(metric), runs) for metric in metrics)] for name, of in part.items()]
    text += rows_to_markdown([first, *metrics], rows) + '\n' if rows else ''
  return text


def command(argv: list[str]) -> None:
  parser = Parser(prog='python -m launch.stages_report', description=__doc__)
  parser.add_argument('workdirs', nargs='+', metavar='DIR')
  parser.add_argument('--out', required=True)
  parser.add_argument('--metrics', required=True)
  parser.add_argument('--compare', default='')
  flags = parser.parse_args(argv)
  pairs = [tuple(pair.split(':')) for pair in filter(None, flags.compare.split(','))]
  check(all(len(pair) == 2 for pair in pairs), f'--compare={flags.compare}: write A:B,C:D')
  result = report(flags.workdirs, flags.metrics.split(','), [(a, b) for a, b in pairs])
  out = pathlib.Path(flags.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(out, json.dumps(result, indent=1) + '\n')
  print(tables(result))


def main(argv: list[str]) -> int:
  return config_lib.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
