"""The report of a sweep: every metric over the seeds, as JSON, as a table and as curves. See launch/sweep.py."""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.sweep_entries import Sweep, finished, read_json, write_atomically
from rl_reasoning import config as config_lib
from rl_reasoning.config import ConfigError, check
from rl_reasoning.tables import rows_to_markdown


def this_commit() -> str:
  source = pathlib.Path(config_lib.__file__).parent
  try:
    found = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
                           cwd=source, capture_output=True, text=True)  # fmt: skip
  except FileNotFoundError:
    return 'unknown'
  return found.stdout.strip() or 'unknown'


def cores_here() -> list[int]:
  return sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(os.cpu_count() or 1))


def this_hardware() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  models = re.findall(r'^model name\s*: (.*)$', info.read_text(), re.MULTILINE) if info.exists() else []
  parts = [f'{len(cores_here())} x {models[0] if models else platform.machine()}']
  if shutil.which('nvidia-smi'):
    listed = subprocess.run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], capture_output=True, text=True)
    parts += listed.stdout.split('\n')[:-1] if listed.returncode == 0 else []
  return ', '.join(parts)


def now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def t_quantile(df: int) -> float:
  """The t with 95 % of Student's distribution within +-t, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""

  def inside(angle: float) -> float:  # A(t | df) at t = sqrt(df) tan(angle)
    cos, sin = math.cos(angle), math.sin(angle)
    total, term = 0.0, cos if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df + 1, 2):
      total += term
      term *= cos * cos * (k - 1) / k
    return 2 / math.pi * (angle + sin * total) if df % 2 else sin * total

  low, high = 0.0, math.pi / 2
  for _ in range(80):
    middle = (low + high) / 2
    low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
  return math.sqrt(df) * math.tan(low)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
  """n, mean, half the width of its 95 % t-interval (None for one seed), min and max."""
  n = len(values)
  half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
  return {'n': n, 'mean': statistics.fmean(values), 'interval': half, 'min': min(values), 'max': max(values)}


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  entries = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      entries.append(json.loads(line))
    except ValueError as error:
      raise ConfigError(f'{path}:{number}: damaged: {error}') from None
  return entries


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
  """('greedy/accuracy', 0.5), ... of nested dicts."""
  if isinstance(value, dict):
    for key, item in value.items():
      yield from leaves(item, f'{path}/{key}')
  else:
    yield path, value


def curve(folder: pathlib.Path, metric: str) -> list[tuple[int, float]]:
  """(step, number) where the run has one: a mean over nothing is None there, or absent."""
  if metric.startswith('eval/'):
    found = [(e['step'], dict(leaves(e['evaluators'], 'eval')).get(metric)) for e in read_jsonl(folder / 'eval.jsonl')]
  else:
    found = [(e['step'], e.get(metric)) for e in read_jsonl(folder / 'metrics.jsonl')]
  return [(step, value) for step, value in found if isinstance(value, (int, float))]


def final_value(metric: str, points: Sequence[tuple[int, float]]) -> float:
  """The last evaluation, or the mean over the last tenth of the logged steps (at least one)."""
  last = 1 if metric.startswith('eval/') else math.ceil(len(points) / 10)
  return statistics.fmean(value for _, value in points[-last:])


def shown(number: Mapping[str, Any] | None, runs: int) -> str:
  """Mean ± half-width, to two digits of the half-width."""
  if number is None:
    return ''
  half, few = number['interval'], f' (n={number["n"]})' if number['n'] < runs else ''
  if not half:
    return f'{number["mean"]:.4g}{"" if half is None else " ± 0"}{few}'
  digits = min(8, max(0, 1 - math.floor(math.log10(half))))
  return f'{number["mean"]:.{digits}f} ± {half:.{digits}f}{few}'


def report(sweep: Sweep, workdir: str, command: str, failed: Mapping[tuple[str, int], str]) -> str:
  """Writes sweep.json, sweep.md and sweep.png of the runs that are finished; returns the table. Raises ConfigError if none is."""
  done = [run for run in sweep.runs.values() if finished(run, workdir)]
  check(any(run.name in sweep.reported for run in done), f'--workdir={workdir}: nothing to report, no run is finished')
  seeds = list(dict.fromkeys(seed for _, seed in sweep.runs))
  curves = {(run.key, metric): curve(run.folder(workdir), metric) for run in done for metric in sweep.metrics}
  values = {key: final_value(key[1], points) for key, points in curves.items() if points}
  told = []
  for run in done:
    summary, record = read_json(run.folder(workdir) / 'summary.json'), run.beside(workdir, '.json')
    told.append({
      'name': run.name, 'seed': run.seed, 'overrides': run.overrides, 'command': shlex.join(run.command(workdir)),
      **{key: summary[key] for key in ('config_hash', 'steps', 'wall_s')},  # the seconds of its last start
      'starts': read_json(record)['starts'] if record.exists() else [],
      'values': {metric: values[run.key, metric] for metric in sweep.metrics if (run.key, metric) in values},
      'evaluations': {metric: curves[run.key, metric] for metric in sweep.metrics if metric.startswith('eval/')},
    })  # fmt: skip
  entries: dict[str, dict[str, Any]] = {}
  for name in sweep.reported:
    of_metric = {metric: [values[r.key, metric] for r in sweep.of(name) if (r.key, metric) in values] for metric in sweep.metrics}
    entries[name] = {metric: over_seeds(found) for metric, found in of_metric.items() if found}
  differences: dict[str, dict[str, Any]] = {}
  for name, against in sweep.compared:
    paired = {
      metric: [values[r.key, metric] - values[(against, r.seed), metric] for r in sweep.of(name)
               if (r.key, metric) in values and ((against, r.seed), metric) in values]
      for metric in sweep.metrics
    }  # fmt: skip
    differences[f'{name} - {against}'] = {metric: over_seeds(found) for metric, found in paired.items() if found}
  missing = [metric for metric in sweep.metrics if not any(metric in numbers for numbers in entries.values())]
  unfinished = {str(run): failed.get(run.key, 'not finished') for run in sweep.runs.values() if run not in done}
  head = {'command': command, 'commit': this_commit(), 'date': now(), 'hardware': this_hardware(), 'seeds': seeds}
  whole = {
    **head,
    'entries': entries,
    'differences': differences,
    'runs': told,
    'unfinished': unfinished,
    'metrics_missing': missing,
  }
  write_atomically(pathlib.Path(workdir, 'sweep.json'), json.dumps(whole, indent=1))

  columns = [metric for metric in sweep.metrics if metric not in missing]
  rows = []
  for name in sweep.reported:
    count = sum(run.name == name for run in done)
    numbers = [shown(entries[name].get(metric), count) for metric in columns]
    rows.append([name, f'{count}/{len(seeds)}', *numbers])
  table = rows_to_markdown(['entry', 'runs', *columns], rows)
  if differences:
    held = [[pair, *(shown(of.get(metric), len(seeds)) for metric in columns)] for pair, of in differences.items()]
    table += '\n' + rows_to_markdown(['difference, paired by seed', *columns], held)
  notes = [f'{run} is not in the table: {why}' for run, why in unfinished.items()]
  notes += [f'no run has the metric {metric}' for metric in missing]
  commits = {begun['commit'] for run in told for begun in run['starts']}
  notes += [f'the runs are of {len(commits)} commits: {", ".join(sorted(commits))}'] if len(commits) > 1 else []
  text = table + ''.join(f'\n- {note}' for note in notes) + ('\n' if notes else '')
  about = (f'Seeds {", ".join(map(str, seeds))}. Mean over seeds ± half of its 95 % t-interval. eval/* is the last evaluation, another '
           f'metric its mean over the last tenth of the logged steps.\n\n`{command}`\n\n'
           f'Commit {head["commit"]}, {head["date"]}, {head["hardware"]}.')  # fmt: skip
  write_atomically(pathlib.Path(workdir, 'sweep.md'), f'{text}\n{about}\n')
  figure(sweep, columns, curves, pathlib.Path(workdir, 'sweep.png'))
  return text


def figure(sweep: Sweep, metrics: Sequence[str], curves: Mapping[Any, list[tuple[int, float]]], path: pathlib.Path) -> None:
  """One panel a metric, one line an entry: the mean over the seeds at the steps that all of them have, in a band from least to greatest."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  columns = min(3, max(1, len(metrics)))
  rows = -(-len(metrics) // columns) or 1
  figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 3.6 * rows), squeeze=False, layout='constrained')
  handles: dict[str, Any] = {}
  for axis, metric in zip(axes.flat, metrics, strict=False):
    for index, name in enumerate(sweep.reported):
      found = [dict(curves[run.key, metric]) for run in sweep.of(name) if curves.get((run.key, metric))]
      steps = sorted(set.intersection(*map(set, found))) if found else []
      if steps:
        at = [[points[step] for points in found] for step in steps]
        style = {'color': plt.get_cmap('tab10')(index % 10), 'linestyle': ('-', '--', ':', '-.')[index // 10 % 4]}
        [handles[name]] = axis.plot(steps, [statistics.fmean(v) for v in at], marker='.' if len(steps) < 40 else None, **style)
        axis.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=style['color'], alpha=0.15, linewidth=0)
    axis.set_title(metric, fontsize=10)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
  for axis in list(axes.flat)[len(metrics) :]:
    axis.set_visible(False)
  if handles:
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=min(4, len(handles)), fontsize=8,
                  title='mean over seeds; band: least to greatest', title_fontsize=8)  # fmt: skip
  figure.savefig(path, format='png', dpi=100)
  plt.close(figure)
