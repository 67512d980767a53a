"""What RLHF gained and lost: gold reward, proxy reward and KL of every policy of configs/rlhf_nano.py, over the seeds.

  python -m launch.rlhf_report runs/rlhf_nano_0 runs/rlhf_nano_1 runs/rlhf_nano_2 --out=docs/results/rlhf_nano

reads the workdirs of the pipeline, one a seed, writes OUT.json and OUT.png (gold and proxy over the square root of the KL divergence, as
in Gao et al., 2210.10760), and prints the table.
"""

import json
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from launch.sweep_report import now, this_commit, this_hardware
from rl_reasoning.config import ConfigError, check
from rl_reasoning.tables import rows_to_markdown

GOLD, PROXY = 'rewards/gold_reviews', 'rewards/proxy'


def read(path: pathlib.Path) -> Any:
  check(path.is_file(), f'{path}: no such file: is the pipeline at its end?')
  try:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == '.jsonl' else json.loads(text)
  except ValueError as error:
    raise ConfigError(f'{path}: damaged: {error}') from None


def points(stage: pathlib.Path) -> list[dict[str, float]]:
  """Step, gold, proxy and KL of every evaluation of samples."""
  return [
    {'step': e['step'], 'gold': m[GOLD], 'proxy': m[PROXY], 'kl': m['kl']}
    for e in read(stage / 'eval.jsonl')
    if PROXY in (m := e['evaluators'].get('samples', {}))
  ]


def report(workdirs: Sequence[str]) -> dict[str, Any]:
  runs = [pathlib.Path(w) for w in workdirs]
  summaries = [read(run / 'summary.json') for run in runs]
  stages = [name for name in summaries[0] if name != 'final']
  for run, summary in zip(runs, summaries, strict=True):
    check([name for name in summary if name != 'final'] == stages, f'{run}: other stages than {runs[0]}')
  judged = {name: [s[name]['evaluators']['held_out']['accuracy'] for s in summaries] for name in stages
            if 'held_out' in summaries[0][name]['evaluators']}  # fmt: skip
  curves = {name: found for name in stages if all(found := [points(run / name) for run in runs])}
  return {
    'hardware': this_hardware(), 'commit': this_commit(), 'made': now(), 'workdirs': list(workdirs),
    'seconds': [round(sum(s[name]['wall_s'] for name in stages)) for s in summaries],
    'seeds': [read(run / stages[0] / 'summary.json')['seed'] for run in runs],
    'reward_model_accuracy': judged, 'curves': curves,
  }  # fmt: skip


def mean_and_range(values: Sequence[float]) -> str:
  low, high = min(values), max(values)
  return f'{statistics.fmean(values):.2f}' + (f' ({low:.2f} to {high:.2f})' if len(values) > 1 else '')


def table(result: dict[str, Any]) -> str:
  rows = []
  for name, seeds in result['curves'].items():
    last, best = [run[-1] for run in seeds], [max(run, key=lambda p: p['gold']) for run in seeds]
    rows.append([name, *(mean_and_range([p[key] for p in last]) for key in ('gold', 'proxy', 'kl')),
                 *(mean_and_range([p[key] for p in best]) for key in ('gold', 'kl'))])  # fmt: skip
  start = [run[0] for seeds in result['curves'].values() for run in seeds]
  first = [start[i] for i in range(len(result['seeds']))]
  rows.insert(0, ['sft (start)', *(mean_and_range([p[key] for p in first]) for key in ('gold', 'proxy', 'kl')), '', ''])
  return rows_to_markdown(('policy', 'gold', 'proxy', 'KL', 'best gold on the way', 'at KL'), rows)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
  """Gold whole, proxy dashed; a thin line a seed. RL against the one reward model on the left, beside it the ensemble, then preferences."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  groups = {
    'one reward model': [n for n in result['curves'] if n in ('ppo', 'grpo')],
    'ensemble: mean - std': [n for n in result['curves'] if n.endswith('_ensemble')],
    'from comparisons': [n for n in result['curves'] if n in ('dpo', 'cpl')],
  }
  groups = {title: names for title, names in groups.items() if names}
  figure, axes = plt.subplots(1, max(1, len(groups)), figsize=(5 * max(1, len(groups)), 4), sharey=True, squeeze=False)
  for axis, (title, names) in zip(axes.flat, groups.items(), strict=False):
    for index, name in enumerate(names):
      for seed, run in enumerate(result['curves'][name]):
        x = [math.sqrt(max(0.0, p['kl'])) for p in run]
        label = (f'{name}, gold', f'{name}, proxy') if not seed else (None, None)
        axis.plot(x, [p['gold'] for p in run], color=f'C{index}', alpha=0.8, label=label[0])
        axis.plot(x, [p['proxy'] for p in run], color=f'C{index}', alpha=0.4, linestyle='--', label=label[1])
    axis.set_title(title)
    axis.set_xlabel('square root of the KL divergence from sft (nats a completion)')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
  axes[0, 0].set_ylabel('reward')
  figure.tight_layout()
  figure.savefig(path, dpi=90)
  plt.close(figure)


def main(argv: list[str]) -> int:
  try:
    out = [a.removeprefix('--out=') for a in argv if a.startswith('--out=')]
    workdirs = [a for a in argv if not a.startswith('--')]
    check(len(out) == 1 and len(out) + len(workdirs) == len(argv), 'usage: python -m launch.rlhf_report DIR ... --out=PATH')
    check(bool(workdirs), 'no workdir is given')
    result = report(workdirs)
    target = pathlib.Path(out[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(target.name + '.json').write_text(json.dumps(result, indent=1) + '\n')
    plot(result, target.with_name(target.name + '.png'))
  except (ConfigError, KeyError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(table(result))
  print(f'seconds a seed: {result["seconds"]}; reward models: {result["reward_model_accuracy"]}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
