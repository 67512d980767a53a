"""What a run tells: merging of metrics, JSON lines, TensorBoard, progress, tables of completions, curves."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check

from rl_reasoning import distributed
from rl_reasoning.config import ConfigError, check
from rl_reasoning.structs import Max, Mean, Min, Sum

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Two dicts of metrics as one, metric by metric; a name may be in only one of them."""

  def both(x, y):
    match x:
      case Mean():
        return Mean(x.total + y.total, x.count + y.count)
      case Sum():
        return Sum(x.value + y.value)
      case Max():
        return Max(jnp.maximum(x.value, y.value))
    return Min(jnp.minimum(x.value, y.value))

  return {**a, **b, **{name: both(a[name], b[name]) for name in a if name in b}}


def summarise(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Numbers; a mean over nothing is left out rather than called zero."""
  result = {}
  for name, metric in jax.device_get(dict(metrics)).items():
    if isinstance(metric, Mean):
      if metric.count > 0:
        result[name] = float(metric.total) / float(metric.count)
    else:
      result[name] = float(metric.value)
  return result


def mfu(flops: float, tokens: int, seconds: float) -> dict[str, float]:
  """Model FLOPs utilisation of the update: `flops` of an (unpadded) token over the hardware's. Nothing on unknown hardware."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return {'mfu': flops * tokens / (seconds * peak * jax.device_count())} if peak else {}


class PhaseTimer:
  """with timer('rollout') as phase: ...; phase.tokens = n, of all processes. Phases of one name add up."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self.tokens: dict[str, int] = {}

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[SimpleNamespace]:
    distributed.mark(name)
    phase, start = SimpleNamespace(tokens=0), time.perf_counter()
    yield phase
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
    self.tokens[name] = self.tokens.get(name, 0) + phase.tokens

  def metrics(self) -> dict[str, float]:
    rates = {f'tokens_per_second/{n}': self.tokens[n] / self.seconds[n] for n in self.tokens if self.tokens[n]}
    return {f'time/{n}': s for n, s in self.seconds.items()} | rates


def read_jsonl(path: epath.Path | str) -> list[dict[str, Any]]:
  """Entries of a JSON-lines file of ours; a last line that was cut by a kill is left out. A missing file has none.

  Raises ConfigError naming the line that we cannot have written.
  """
  path = epath.Path(path)
  lines = path.read_text().split('\n') if path.exists() else []
  entries = []
  for number, line in enumerate(lines[:-1], 1):  # a whole line ends in '\n'
    try:
      entries.append(json.loads(line))
      check(isinstance(entries[-1], dict), 'no JSON object')
    except ValueError as error:
      raise ConfigError(f'{path}:{number}: damaged: {error}; --overwrite starts anew') from None
  return entries


def finite(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
  """An append-only file that is cut back to the checkpoint on resume. Stores without append (gs://) are rewritten."""

  def __init__(self, path: epath.Path, keep_until: int):
    self.path, self.lines = path, [json.dumps(e) for e in read_jsonl(path) if e.get('step', 0) <= keep_until]
    if path.exists():
      self.rewrite()

  def rewrite(self):
    part = self.path.parent / (self.path.name + '.part')
    part.write_text(''.join(line + '\n' for line in self.lines))
    part.replace(self.path)

  def append(self, entry: Mapping[str, Any]):
    self.lines.append(json.dumps(entry))
    if '://' in str(self.path):
      self.rewrite()
      return
    with self.path.open('a') as file:
      file.write(self.lines[-1] + '\n')


class Board:
  """TensorBoard scalars, written by the caller's own thread: that of tensorboardX.SummaryWriter dies on a full disk, and the run hangs."""

  def __init__(self, folder: str, resume_step: int):
    directory_check(folder)
    # The step is in the file's name beside the second, so that a quick restart does not write over the file before it.
    self.file, self.flushed = EventsWriter(f'{folder}/events', f'.{resume_step}'), time.time()
    # TensorBoard drops what it read before of this step and later ones.
    self.file.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      self.file.write_event(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))
    if time.time() > self.flushed + 30:
      self.file.flush()
      self.flushed = time.time()


def console() -> rich.console.Console:
  """Prints texts as they are: brackets in a completion are no markup, ':smile:' no emoji."""
  literal: dict[str, Any] = {'markup': False, 'emoji': False, 'highlight': False}
  found = rich.console.Console(**literal)
  return found if found.is_terminal else rich.console.Console(width=150, **literal)


def printable(text: str) -> str:
  """Without what would steer the terminal (an escape sequence sampled by a model of bytes)."""
  return ''.join(c if c.isprintable() or c == '\n' else '\ufffd' for c in text)


SHOWN = (  # metric, name on the progress line, format
  ('loss', 'loss', '.4f'),
  ('reward', 'reward', '.3f'),
  ('rewards/accuracy/mean', 'accuracy', '.3f'),
  ('completions/mean_length', 'length', '.1f'),
  ('tokens_per_second/rollout', 'rollout tok/s', ',.0f'),
  ('tokens_per_second/update', 'update tok/s', ',.0f'),
)


class Writer:
  """metrics.jsonl, eval.jsonl, completions/ and tensorboard/ of a workdir, and the progress that a user watches.

  What lies past `resume_step` is cut: a resumed run writes those steps again.
  """

  def __init__(self, workdir: str, total_steps: int, resume_step: int):
    self.workdir = epath.Path(workdir)
    self.total, self.resumed, self.began = total_steps, resume_step, time.time()
    self.metrics = JsonLines(self.workdir / 'metrics.jsonl', resume_step)
    # The evaluation of step 0 comes before any checkpoint and is repeated.
    self.evaluations = JsonLines(self.workdir / 'eval.jsonl', resume_step or -1)
    self.folder = self.workdir / 'completions'
    self.folder.mkdir(parents=True, exist_ok=True)
    for file in self.folder.glob('step_*.jsonl'):
      number = file.stem.removeprefix('step_')
      if number.isdigit() and int(number) > resume_step:
        file.unlink()
    self.board = Board(str(self.workdir / 'tensorboard'), resume_step)
    self.console = console()
    columns = (rich.progress.BarColumn(20), rich.progress.TextColumn('{task.completed}/{task.total} {task.description}'),
               rich.progress.TimeRemainingColumn())  # fmt: skip
    self.progress = rich.progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal)
    self.bar = self.progress.add_task('', total=total_steps, completed=resume_step)
    self.progress.start()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self.metrics.append({'step': step, **{k: finite(v) for k, v in metrics.items()}})
    self.board.write(step, metrics)
    text = ' '.join(f'{label} {metrics[name]:{form}}' for name, label, form in SHOWN if name in metrics)
    if self.console.is_terminal:
      self.progress.update(self.bar, completed=step, description=text)
    else:
      left = (time.time() - self.began) / (step - self.resumed) * (self.total - step)
      print(f'step {step}/{self.total} {text} left {int(left) // 60}:{int(left) % 60:02d}', flush=True)

  def evaluation(self, step: int, evaluators: Mapping[str, Mapping[str, Any]]) -> None:
    self.evaluations.append(
      {'step': step, 'evaluators': {n: {k: finite(v) for k, v in m.items()} for n, m in evaluators.items()}}
    )
    for name, metrics in evaluators.items():
      numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}  # beside intervals and groups
      self.board.write(step, {f'eval/{name}/{key}': value for key, value in numbers.items()})
      shown = ' '.join(f'{k} {v:.3f}' for k, v in numbers.items() if not k.endswith('stderr') and k != 'problems')
      self.console.print(f'eval {name} at step {step}: {shown}')

  def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every completion to a file, four of them (one a prompt) to the screen."""
    (self.folder / f'step_{step:06d}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    table = rich.table.Table(title=f'completions of step {step}', title_justify='left')
    told = ('advantage',) if 'advantage' in rows[0] else ()
    for name in ('prompt', 'completion', *rows[0]['rewards'], *told):
      table.add_column(name, overflow='fold')
    for row in rows[:: max(1, len(rows) // 4)][:4]:
      prompt, completion = (t if len(t) <= 300 else t[:150] + ' ... ' + t[-150:] for t in (row['prompt'], row['completion']))
      numbers = ['none' if v is None else f'{v:.2f}' for v in (*row['rewards'].values(), *(row[name] for name in told))]
      table.add_row(printable(prompt), printable(completion), *numbers)
    self.console.print(table)

  def close(self) -> None:
    self.progress.stop()
    self.board.file.close()


class Silent(Writer):
  """In the place of a Writer, where another process writes."""

  def __init__(self, workdir: str):
    self.workdir = epath.Path(workdir)

  def write(self, step, metrics):
    pass

  def evaluation(self, step, evaluators):
    pass

  def completions(self, step, rows):
    pass

  def close(self):
    pass


CURVES = (
  ('loss', ('loss',)),
  ('reward', ('reward', 'rewards/*/mean')),
  ('reward spread', ('reward_std', 'frac_reward_zero_std')),
  ('completion length (tokens)', ('completions/mean_length', 'completions/max_length')),
  ('entropy (nats)', ('entropy',)),
  ('gradient norm', ('grad_norm',)),
  ('sampler against trainer', ('sampling/logp_difference/mean', 'sampling/logp_difference/max')),
  ('KL to the reference (nats)', ('kl',)),
  ('KL to the reference (nats a completion)', ('objective/kl',)),
  ('policy against teacher (nats)', ('divergence', 'kl/forward', 'kl/reverse')),
  ('value of the critic', ('val/explained_variance',)),
  ('preferred less rejected', ('margin', 'rewards/margins')),
)


def curves(workdir: str) -> None:
  """curves.png: one panel a group of metrics that the run has, and one of held-out accuracy."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  folder = epath.Path(workdir)
  entries, evaluations = read_jsonl(folder / 'metrics.jsonl'), read_jsonl(folder / 'eval.jsonl')
  names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))

  def matching(pattern: str) -> list[str]:
    head, star, tail = pattern.partition('*')
    return [n for n in names if n.startswith(head) and n.endswith(tail)] if star else [n for n in names if n == pattern]

  panels = [(title, [n for p in patterns for n in matching(p)]) for title, patterns in CURVES]
  panels = [(title, found) for title, found in panels if found]
  count = len(panels) + bool(evaluations)
  columns = min(3, count)
  figure, axes = plt.subplots(-(-count // columns), columns, figsize=(5 * columns, 3.2 * -(-count // columns)), squeeze=False)
  axes = list(axes.flat)
  for axis, (title, found) in zip(axes, panels, strict=False):
    for name in found:
      points = [(e['step'], e[name]) for e in entries if e.get(name) is not None]
      axis.plot(*zip(*points, strict=True), label=name, marker='.' if len(points) < 40 else None)
    axis.set_title(title)
  if evaluations:
    axis = axes[len(panels)]
    for name in evaluations[-1]['evaluators']:
      points = [(e['step'], e['evaluators'][name]) for e in evaluations if e['evaluators'][name].get('accuracy') is not None]
      accuracy, error = ([m.get(key) or 0.0 for _, m in points] for key in ('accuracy', 'accuracy_stderr'))
      axis.errorbar([step for step, _ in points], accuracy, error, label=name, marker='o', capsize=3)
    axis.set_title('held-out accuracy (bars: one standard error)')
    axis.set_ylim(0, 1)
  for axis in axes[:count]:
    axis.set_xlabel('step')
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
  for axis in axes[count:]:
    axis.set_visible(False)
  figure.tight_layout()
  with (folder / 'curves.png').open('wb') as file:
    figure.savefig(file, format='png', dpi=90)
  plt.close(figure)


def summary_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  table = rich.table.Table(title=title, title_justify='left')
  for name in columns:
    table.add_column(name)
  for row in rows:
    table.add_row(*row)
  console().print(table)


def explanation(explained: Mapping[str, Any]) -> str:
  """What --explain prints: the resolved config, the effective formula, sizes in one unit each, and what is inert."""
  lines = [json.dumps(explained['config'], indent=1), f'hash: {explained["hash"]}']
  trained = explained.get('trainable_parameters')
  lines.append(f'parameters: {explained["parameters"]:,}; devices: {explained["devices"]}')
  lines += [f'trainable parameters: {trained:,}'] if trained else []
  lines += explained['formula']
  lines += [f'{name}: {value:,}' for name, value in explained['batch_sizes'].items()]
  lines.append('inert in this config (left at their defaults; setting one is refused):')
  lines += [f'  {key}: {why}' for key, why in sorted(explained['inert_defaults'].items())]
  return '\n'.join(lines)
