"""How often one policy beats another by a judge's column, raw and with the advantage of length taken out.

  python -m rl_reasoning.win_rate A.jsonl B.jsonl --judge=REWARD [--out=FILE.json]

A and B are sample files of two evaluations of the same problems (DIR/samples/NAME.jsonl of rl_reasoning.evaluate, or of a training run).
REWARD is a function of their `rewards.functions`: best a reward model that neither was trained against. Exit codes: 0, 2.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rl_reasoning import metrics, train
from rl_reasoning.config import Parser, check
from rl_reasoning.estimates import bootstrap_interval
from rl_reasoning.rank_metrics import sigmoid
from rl_reasoning.tasks import dataset
from rl_reasoning.tasks.preference import is_finite

RESAMPLES = 500  # of the length-controlled rate: each is a fit
RIDGE = (
  1.0  # weight of the squared coefficient of length beside the summed log loss, halved: one comparison's worth, for small sets
)
STEPS = 50  # of Newton: a dozen are enough


class Comparisons(NamedTuple):
  """Every completion of A against every one of B, problem by problem."""

  problem_M: np.ndarray  # 0, 1, ...: which problem
  win_M: np.ndarray  # 1 where A's reward is the higher one, 0 where B's, 1/2 where they are equal
  longer_M: np.ndarray  # tokens of A - tokens of B
  weight_M: np.ndarray  # those of a problem add up to 1


def read_samples(path: str, judge: str) -> dict[int, list[dict]]:
  """problem -> its samples. Raises ConfigError for a file that is missing, empty or no sample file, and where the judge is no column."""
  check(pathlib.Path(path).is_file(), f'{path}: no such file')
  found = collections.defaultdict(list)
  for place, sample in dataset.read(pathlib.Path(path)):
    for key, kind in {'problem': int, 'prompt': str, 'length': int, 'rewards': dict}.items():
      check(key in sample, f'{place}: no {key}: not a sample of an evaluation')
      check(isinstance(sample[key], kind), f'{place}: {key} is {type(sample[key]).__name__}: not a sample of an evaluation')
    columns = sample['rewards']
    check(judge in columns, f'{place}: no reward {judge!r}; it has {", ".join(columns) or "none"}')
    check(
      columns[judge] is None or is_finite(columns[judge]), f'{place}: reward {judge!r} is {columns[judge]!r}, no finite number'
    )
    found[sample['problem']].append(sample)
  check(bool(found), f'{path}: holds no samples')
  return dict(found)


def check_same_problems(a: Mapping[int, Sequence[dict]], b: Mapping[int, Sequence[dict]], names: tuple[str, str]) -> None:
  """Raises ConfigError naming a problem that one file lacks, or whose prompt is another one."""
  for mine, other, name in ((a, b, names[1]), (b, a, names[0])):
    lacking = sorted(mine.keys() - other.keys())
    check(not lacking, f'{name}: lacks {len(lacking)} of the problems, the first is problem {lacking[:1]}')
  for problem in sorted(a):
    prompts = {sample['prompt'] for sample in (*a[problem], *b[problem])}
    check(len(prompts) == 1, f'{names[0]} and {names[1]}: problem {problem} has different prompts: {sorted(prompts)[:2]}')


def compare(a: Mapping[int, Sequence[dict]], b: Mapping[int, Sequence[dict]], judge: str) -> tuple[Comparisons, int]:
  """(comparisons, how many were left out because the judge gave no verdict on one of the two). Problems without any are left out."""
  problem, win, longer, weight, silent = [], [], [], [], 0
  kept = 0
  for key in sorted(a):
    pairs = [(x, y) for x in a[key] for y in b[key]]
    known = [(x, y) for x, y in pairs if x['rewards'][judge] is not None and y['rewards'][judge] is not None]
    silent += len(pairs) - len(known)
    for x, y in known:
      problem.append(kept)
      win.append((1 + np.sign(x['rewards'][judge] - y['rewards'][judge])) / 2)
      longer.append(x['length'] - y['length'])
      weight.append(1 / len(known))
    kept += bool(known)
  return Comparisons(np.array(problem, int), np.array(win), np.array(longer, float), np.array(weight)), silent


def squash(longer_M: np.ndarray) -> np.ndarray:
  """tanh of the length difference in units of its standard deviation: twice as long as very long counts no more."""
  spread = longer_M.std()
  return np.tanh(longer_M / spread) if spread > 0 else np.zeros_like(longer_M)


def fit(x_M: np.ndarray, win_M: np.ndarray, weight_RM: np.ndarray) -> np.ndarray:
  """[R, 2] (theta, phi) of P(win) = sigmoid(theta + phi x), for each row of weights: Newton's method on the log loss + RIDGE / 2 phi^2.

  theta is not penalised: it is the answer, and a penalty would draw every win rate towards 1/2. Where all comparisons of positive weight
  are won, or all lost, it is infinite.
  """
  rate_R = np.round(weight_RM @ win_M / weight_RM.sum(axis=1), 12)  # a sum of weights that misses 1 by rounding is decided, too
  decided_R = (rate_R == 0) | (rate_R == 1)
  with np.errstate(divide='ignore'):
    theta_R2 = np.stack([np.log(rate_R) - np.log1p(-rate_R), np.zeros_like(rate_R)], axis=1)
  live_L = np.flatnonzero(~decided_R)
  w, theta = weight_RM[live_L], theta_R2[live_L]

  def loss(theta):
    z = theta[:, :1] + theta[:, 1:] * x_M
    return (w * (np.logaddexp(0, z) - win_M * z)).sum(axis=1) + RIDGE / 2 * theta[:, 1] ** 2

  for _ in range(STEPS):
    p = sigmoid(theta[:, :1] + theta[:, 1:] * x_M)
    residual, curvature = w * (p - win_M), w * p * (1 - p)
    g0, g1 = residual.sum(axis=1), residual @ x_M + RIDGE * theta[:, 1]
    h00, h01, h11 = curvature.sum(axis=1), curvature @ x_M, curvature @ x_M**2 + RIDGE
    step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / (h00 * h11 - h01**2)[:, None]
    before, size = loss(theta), np.ones(len(theta))
    for _ in range(30):  # a full step may overshoot where the probabilities are near 0 or 1
      worse = loss(theta - size[:, None] * step) > before + 1e-12
      if not worse.any():
        break
      size[worse] /= 2
    theta = theta - size[:, None] * step
    if np.abs(step).max(initial=0.0) < 1e-9:
      break
  theta_R2[live_L] = theta
  return theta_R2


def length_controlled(compared: Comparisons, seed: int = 0) -> tuple[float, list[float], float]:
  """(rate, its 95 % bootstrap interval over problems, coefficient of length): what the win rate would be at equal lengths, sigmoid(theta)
  of AlpacaEval 2's regression (2404.04475) without its terms for instructions, which need the answers of many models."""
  x, problems = squash(compared.longer_M), int(compared.problem_M[-1]) + 1
  theta, phi = fit(x, compared.win_M, compared.weight_M[None])[0]
  rng, rates = np.random.default_rng(seed), []
  counts = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)
  for block in np.array_split(counts, max(1, RESAMPLES * len(x) // 2**22)):
    rates.append(fit(x, compared.win_M, block[:, compared.problem_M] * compared.weight_M)[:, 0])
  interval = np.quantile(sigmoid(np.concatenate(rates)), (0.025, 0.975))
  return float(sigmoid(theta)), [float(v) for v in interval], float(phi)


def win_rate(file_a: str, file_b: str, judge: str) -> dict[str, Any]:
  """The numbers of one pair of sample files. Rates are means over problems of the share of comparisons that A wins, a tie half.

  Raises ConfigError for files that cannot be compared.
  """
  a, b = read_samples(file_a, judge), read_samples(file_b, judge)
  check_same_problems(a, b, (file_a, file_b))
  compared, silent = compare(a, b, judge)
  check(len(compared.win_M) > 0, f'reward {judge!r} gave no verdict on both sides of any comparison')
  rates = np.bincount(compared.problem_M, compared.win_M * compared.weight_M)
  controlled, interval, phi = length_controlled(compared)
  ties = np.bincount(compared.problem_M, (compared.win_M == 0.5) * compared.weight_M)
  return {
    'a': file_a, 'b': file_b, 'judge': judge, 'problems': len(rates), 'comparisons': len(compared.win_M), 'no_verdict': silent,
    'win_rate': float(rates.mean()), 'win_rate_ci95': bootstrap_interval(rates.tolist()), 'ties': float(ties.mean()),
    'length_controlled_win_rate': controlled, 'length_controlled_win_rate_ci95': interval, 'length_coefficient': phi,
    'length_a': float(np.mean([s['length'] for group in a.values() for s in group])),
    'length_b': float(np.mean([s['length'] for group in b.values() for s in group])),
  }  # fmt: skip


def command(argv: Sequence[str]) -> None:
  parser = Parser(prog='python -m rl_reasoning.win_rate', allow_abbrev=False, description='How often A beats B.')
  parser.add_argument('a', metavar='A.jsonl', help='samples of an evaluation')
  parser.add_argument('b', metavar='B.jsonl', help='those of another one, of the same problems')
  parser.add_argument('--judge', required=True, metavar='REWARD', help='which of their rewards says who wins')
  parser.add_argument('--out', default='', metavar='FILE.json')
  flags = parser.parse_args(argv)
  out = epath.Path(flags.out)
  check(not flags.out or (out.parent.is_dir() and not out.is_dir()), f'--out={out}: no folder {out.parent}, or a folder itself')
  result = win_rate(flags.a, flags.b, flags.judge)
  if flags.out:
    train.write_atomically(out, json.dumps(result, indent=1))

  def cell(key: str) -> str:
    low, high = result[f'{key}_ci95']
    return f'{result[key]:.3f} [{low:.3f}, {high:.3f}]'

  columns = ('win rate of A', 'length-controlled', 'ties', 'problems', 'tokens A', 'tokens B')
  row = [cell('win_rate'), cell('length_controlled_win_rate'), f'{result["ties"]:.3f}', str(result['problems'])]
  row += [f'{result["length_a"]:.1f}', f'{result["length_b"]:.1f}']
  metrics.summary_table(f'A: {flags.a}\nB: {flags.b}\njudge: {flags.judge}', columns, [row])


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
