"""What an evaluation comes to, to read: evaluation.md and evaluation.png, from the numbers of evaluation.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

METRICS = (  # key, name of the column, format
  ('accuracy', 'accuracy (pass@1)', '.3f'),
  ('strict_accuracy', 'strict', '.3f'),
  ('format', 'format', '.3f'),
  ('reward', 'reward', '.3f'),
  ('length', 'tokens', '.1f'),
  ('length_right', 'tokens if right', '.1f'),
  ('length_wrong', 'tokens if wrong', '.1f'),
  ('truncated', 'truncated', '.3f'),
)
JUDGED = (  # of evaluators that hold scores against judgements
  ('accuracy', 'accuracy', '.3f'),
  ('length_accuracy', 'longer is better', '.3f'),
  ('accuracy_longer_preferred', 'where longer is', '.3f'),
  ('accuracy_shorter_preferred', 'where shorter is', '.3f'),
  ('auc', 'AUC', '.3f'),
  ('margin', 'margin', '.3f'),
  ('ece', 'ECE', '.3f'),
  ('score_length_correlation', 'correlation with length', '.2f'),
)


def ks_of(metrics: Mapping[str, Any]) -> list[int]:
  return sorted(int(key[5:]) for key in metrics if re.fullmatch(r'pass@\d+', key))


def cell(metrics: Mapping[str, Any], key: str, form: str = '.3f') -> str:
  """'0.275 [0.240, 0.310]': a mean and its 95 % interval, or what there is of it."""
  if key not in metrics:
    return ''
  interval = metrics.get(f'{key}_ci95')
  return f'{metrics[key]:{form}}' + (f' [{interval[0]:{form}}, {interval[1]:{form}}]' if interval else '')


def text(value: Any) -> str:
  """Without what would end a cell of the table."""
  return str(value).replace('|', '\\|').replace('\n', ' ')


def rows_to_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [columns, ['---'] * len(columns), *rows]
  return ''.join('| ' + ' | '.join(map(text, line)) + ' |\n' for line in lines)


def markdown(result: Mapping[str, Any]) -> str:
  """The tables of an evaluation.json."""
  judged = {name: m for name, m in result['evaluators'].items() if 'reliability' in m}
  evaluators = {name: m for name, m in result['evaluators'].items() if name not in judged}
  parts = [
    f'# Evaluation of {result["checkpoint"]}\n\n'
    f'Weights {result["fingerprint"]}, config {result["config_hash"]}, {result["hardware"]["device"]}, '
    f'{result["tokens"]:,} tokens. In brackets: 95 % bootstrap intervals over problems.\n'
  ]
  for columns, kind in ((METRICS, evaluators), (JUDGED, judged)):
    if kind:
      names = ('evaluator', 'problems', *(name for _, name, _ in columns))
      rows = [[name, f'{m["problems"]:.0f}', *(cell(m, key, form) for key, _, form in columns)] for name, m in kind.items()]
      parts.append(rows_to_markdown(names, rows))
  for name, m in evaluators.items():
    if ks := ks_of(m):
      rows = [['pass', cell(m, 'accuracy'), *(cell(m, f'pass@{k}') for k in ks if k > 1)]]
      if f'maj@{ks[-1]}' in m:
        rows.append(['maj', cell(m, 'accuracy'), *(cell(m, f'maj@{k}') for k in ks if k > 1)])
      parts.append(f'## {name}: k samples\n\n' + rows_to_markdown(['', '@1', *(f'@{k}' for k in ks if k > 1)], rows))
  for column in ('difficulty', 'dataset'):
    rows = []
    for name, m in evaluators.items():
      for value, inside in m.get(column, {}).items():
        last = f'pass@{ks[-1]}' if (ks := ks_of(inside)) else ''
        best = f'{last}: {cell(inside, last)}' if last else ''
        rows.append([name, value, f'{inside["problems"]:.0f}', cell(inside, 'accuracy'), best, cell(inside, 'length', '.1f')])
    if rows:
      names = ('evaluator', column, 'problems', 'accuracy (pass@1)', 'best of k', 'tokens')
      parts.append(f'## By {column}\n\n' + rows_to_markdown(names, rows))
  return '\n'.join(parts)


def plot(result: Mapping[str, Any], path: epath.Path) -> None:
  """Left: accuracy against k, a line and a 95 % band for pass@k and maj@k; an evaluator of one sample is its point at 1. Right: accuracy
  against response length in bins of about as many completions, each at its mean length, bars of one standard error."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  from matplotlib.ticker import MaxNLocator

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  largest = 1
  for index, (name, m) in enumerate(result['evaluators'].items()):
    color = f'C{index % 10}'
    if 'accuracy' not in m or 'reliability' in m:
      continue
    ks = [1, *(k for k in ks_of(m) if k > 1)]
    largest = max(largest, ks[-1])
    for kind, style in (('pass', '-'), ('maj', '--')):
      keys = ['accuracy', *(f'{kind}@{k}' for k in ks[1:])]
      if len(ks) == 1 or keys[-1] not in m:
        continue
      left.plot(ks, [m[key] for key in keys], style, color=color, marker='o', markersize=4, label=f'{name}: {kind}@k')
      if all(f'{key}_ci95' in m for key in keys):
        left.fill_between(ks, *zip(*(m[f'{key}_ci95'] for key in keys), strict=True), color=color, alpha=0.15, linewidth=0)
    if len(ks) == 1:
      low, high = m.get('accuracy_ci95', (m['accuracy'],) * 2)
      bars = [[max(0.0, m['accuracy'] - low)], [max(0.0, high - m['accuracy'])]]
      left.errorbar([1], [m['accuracy']], bars, color=color, marker='s', capsize=3, linestyle='none', label=f'{name}: accuracy')
    bins = m['by_length']
    lengths, accuracies = [b['length'] for b in bins], [b['accuracy'] for b in bins]
    errors = [b.get('accuracy_stderr', 0.0) for b in bins]
    right.errorbar(lengths, accuracies, errors, color=color, marker='o', markersize=4, capsize=3, label=name)
  left.set_xscale('log', base=2)
  left.set_xlim(0.9, largest * 1.1)
  ticks = [2**i for i in range(math.floor(math.log2(largest)) + 1)]
  left.set_xticks(ticks, [str(k) for k in ticks])
  left.set_xlabel('k samples')
  left.set_title('accuracy by samples (bands: 95 %)')
  right.xaxis.set_major_locator(MaxNLocator(integer=True))
  right.set_xlabel('response length (tokens)')
  right.set_title('accuracy by length (bars: one standard error)')
  for axis in (left, right):
    axis.set_ylabel('accuracy')
    axis.set_ylim(-0.02, min(1.02, max(0.1, axis.get_ylim()[1])))
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize=7, handlelength=3, loc='upper left', bbox_to_anchor=(1.01, 1))
  figure.tight_layout()
  with path.open('wb') as file:
    figure.savefig(file, format='png', dpi=100)
  plt.close(figure)


def plot_reliability(result: Mapping[str, Any], path: epath.Path) -> None:
  """What scores predict against how often it happened, a curve for each evaluator that has one; on the diagonal a model means what it says.
  A point's area is the share of the pairs (or verdicts) in its bin."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(5, 4.6))
  curves = {name: m for name, m in result['evaluators'].items() if 'reliability' in m}
  low = min((b['low'] for m in curves.values() for b in m['reliability']), default=0.0)
  low = 0.5 if low >= 0.5 else 0.0  # of pairs: how sure the model is of its own choice
  axis.plot([low, 1], [low, 1], color='gray', linewidth=1, linestyle='--')
  for index, (name, m) in enumerate(curves.items()):
    x, y = [b['predicted'] for b in m['reliability']], [b['observed'] for b in m['reliability']]
    axis.plot(x, y, color=f'C{index % 10}', label=f'{name}: ECE {m["ece"]:.3f}')
    axis.scatter(x, y, [10 + 150 * b['share'] for b in m['reliability']], color=f'C{index % 10}')
  axis.set_xlabel('predicted probability')
  axis.set_ylabel('how often it was so')
  axis.set_title('calibration')
  axis.grid(alpha=0.3)
  if curves:
    axis.legend(fontsize=7, handlelength=3, loc='upper left', bbox_to_anchor=(1.01, 1))
  figure.tight_layout()
  with path.open('wb') as file:
    figure.savefig(file, format='png', dpi=100)
  plt.close(figure)


SCALED = (  # key of a point, name of the column, format
  ('problems', 'problems', 'd'),
  ('accuracy', 'accuracy', '.3f'),
  ('tokens', 'tokens a problem', '.1f'),
  ('prompt_tokens', 'of the prompt', '.1f'),
  ('truncated', 'truncated', '.3f'),
  ('format', 'format', '.3f'),
  ('thinking', 'of thinking', '.1f'),
  ('injected', 'put in', '.1f'),
)


def scale_title(name: str, method: Mapping[str, Any]) -> str:
  """'best: best_of_n by oracle'."""
  return f'{name}: {method["method"]}' + (f' by {method["by"]}' if 'by' in method else '')


def scale_markdown(result: Mapping[str, Any]) -> str:
  """The table of a scale.json."""
  rows = []
  for name, method in result['methods'].items():
    for point in method['points']:
      cells = [cell(point, key, form) if point[key] is not None else '' for key, _, form in SCALED]
      rows.append([scale_title(name, method), point['label'], *cells])
  return (
    f'# Inference-time scaling of {result["checkpoint"]}\n\n'
    f'Weights {result["fingerprint"]}, config {result["config_hash"]}, {result["hardware"]["device"]}. In brackets: 95 % bootstrap '
    f'intervals over problems. Tokens are those after the prompt: drawn or put in, of all samples and expansions.\n\n'
  ) + rows_to_markdown(['method', 'at', *(name for _, name, _ in SCALED)], rows)


def plot_scale(result: Mapping[str, Any], path: epath.Path) -> None:
  """Accuracy against the mean tokens a problem, a line a method through its points in their order, bars of 95 %."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(10, 5))
  for index, (name, method) in enumerate(result['methods'].items()):
    points = method['points']
    x, y = [p['tokens'] for p in points], [p['accuracy'] for p in points]
    bounds = [p.get('accuracy_ci95', (p['accuracy'],) * 2) for p in points]
    bars = [[max(0.0, v - low) for v, (low, _) in zip(y, bounds)], [max(0.0, high - v) for v, (_, high) in zip(y, bounds)]]
    style: dict[str, Any] = {'linestyle': '--' if method.get('by') == 'oracle' else '-', 'marker': 'osD^vP*X'[index % 8]}
    color = plt.get_cmap('tab20')(index * 2 % 20 + index // 10 % 2)
    axis.errorbar(x, y, bars, color=color, markersize=5, capsize=2, label=scale_title(name, method), **style)
    for point in points:
      axis.annotate(point['label'], (point['tokens'], point['accuracy']), (2, 3), textcoords='offset points', fontsize=6)
  axis.set_xscale('log', base=2)
  axis.xaxis.set_major_formatter('{x:g}')
  axis.set_xlabel('tokens a problem')
  axis.set_ylabel('accuracy')
  axis.set_title('accuracy by tokens (bars: 95 %)')
  axis.set_ylim(-0.02, min(1.02, max(0.1, axis.get_ylim()[1])))
  axis.grid(alpha=0.3)
  axis.legend(fontsize=7, handlelength=3, loc='upper left', bbox_to_anchor=(1.01, 1))
  figure.tight_layout()
  with path.open('wb') as file:
    figure.savefig(file, format='png', dpi=100)
  plt.close(figure)
