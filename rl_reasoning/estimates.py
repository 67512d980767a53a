"""What n samples of a problem say: pass@k, majority and weighted votes, the best of k, and how sure a mean over problems is. Numpy only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap: an end of its interval then moves by some percent of the interval's width from seed to seed
BLOCK = 2**22  # indices drawn at once
CHOICES = 10_000  # of k samples that are looked at one by one; where there are more, that many drawn at random


def pass_at_k(num_samples: int, correct: int, k: int) -> float:
  """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (2107.03374)."""
  return 1.0 - math.comb(num_samples - correct, k) / math.comb(num_samples, k)


@functools.lru_cache(maxsize=2**16)
def maj_at_k(num_samples: int, groups: tuple[tuple[int, float], ...], k: int) -> float:
  """Expected rightness of the answer that most of k samples give (self-consistency, 2203.11171), over all choices of k of the n samples.

  `groups`: (how many samples give it, how right it is) of each answer; samples in no group cast no vote. Answers that tie for the most
  votes share the win equally; nobody's vote is wrong. Exact for every n: the votes of a random choice are independent binomials under the
  condition that they add up to k, so the sum over choices is a product of polynomials in (votes, answers that tie).
  """
  p = k / num_samples
  silent = num_samples - sum(size for size, _ in groups)

  def binomial(size: int) -> np.ndarray:
    if p == 1:  # all samples are chosen
      return np.eye(size + 1)[size]
    # Through logarithms: the counts of choices soon leave the floats.
    logs = [math.log(math.comb(size, j)) + j * math.log(p) + (size - j) * math.log1p(-p) for j in range(min(size, k) + 1)]
    return np.exp(logs)

  chances, none = [(binomial(size), value) for size, value in groups], binomial(silent)
  total = 0.0
  for top in range(1, min(k, max((size for size, _ in groups), default=0)) + 1):
    most = min(k // top, len(groups))  # answers that can tie
    ways = np.zeros((most + 1, k + 1))  # [tied, votes] probability
    ways[0, : len(none)] = none
    right = np.zeros_like(ways)  # the same, weighted by the sum of the tied answers' rightness
    for chance, value in chances:
      below = chance[:top]
      after = [np.stack([np.convolve(row, below)[: k + 1] for row in x]) for x in (ways, right)]
      if len(chance) > top:
        tied = ways[:-1, : k + 1 - top] * chance[top]
        after[0][1:, top:] += tied
        after[1][1:, top:] += right[:-1, : k + 1 - top] * chance[top] + tied * value
      ways, right = after
    total += float(np.sum(right[1:, k] / np.arange(1, most + 1)))
  return total / float(binomial(num_samples)[k])


def best_at_k(scores: Sequence[float], right: Sequence[float], k: int) -> float:
  """Expected rightness of the sample with the highest score among k, over all choices of k of the n samples; those that tie share the win
  equally. Exact: the winner is among the m samples of one score, with L below it, in C(L + m, k) - C(L, k) of the C(n, k) choices."""
  score, value = np.asarray(scores, np.float64), np.asarray(right, np.float64)
  n, total = len(score), 0.0
  for best in np.unique(score):
    below, tied = int((score < best).sum()), score == best
    total += (math.comb(below + int(tied.sum()), k) - math.comb(below, k)) / math.comb(n, k) * value[tied].mean()
  return float(total)


def choices_of(n: int, k: int, seed: int = 0) -> np.ndarray:
  """[S, k]: all choices of k of n, or CHOICES of them drawn at random where there are more. The same call gives the same."""
  if math.comb(n, k) <= CHOICES:
    return np.asarray(list(itertools.combinations(range(n), k)), int)
  rng = np.random.default_rng(seed)
  return rng.permuted(np.tile(np.arange(n), (CHOICES, 1)), axis=1)[:, :k]


def weighted_maj_at_k(groups: Sequence[int | None], log_weights: Sequence[float], right: Sequence[float], k: int) -> float:
  """Expected rightness of the answer whose samples have the largest sum of weights among k, over choices of k of the n samples (see
  `choices_of`). `groups` numbers the answers; a sample without one, or of weight 0 (log -inf), has no say. Weights come as logarithms,
  of which each choice's largest is taken off: those of long completions are far below what a float holds. Sums that are equal up to
  rounding tie and share the win equally; where nobody has a say nothing is right."""
  log_N = np.asarray([-np.inf if g is None else w for g, w in zip(groups, log_weights, strict=True)], np.float64)
  names = sorted({g for g, w in zip(groups, log_N) if g is not None and w > -np.inf})
  if not names:
    return 0.0
  member_GN = np.asarray([[g == name for g in groups] for name in names])
  value_G = np.asarray([np.asarray(right, np.float64)[member].mean() for member in member_GN])
  chosen_SK = choices_of(len(log_N), k)
  top_S = np.maximum(log_N[chosen_SK].max(axis=1, keepdims=True), -1e300)  # where nobody has a say: -inf less -inf is no number
  sum_SG = (member_GN[:, chosen_SK] * np.exp(log_N[chosen_SK] - top_S)).sum(axis=2).T
  best_S = sum_SG.max(axis=1, keepdims=True)
  wins_SG = (sum_SG >= best_S * (1 - 1e-9)) & (best_S > 0)
  return float((wins_SG @ value_G / wins_SG.sum(axis=1).clip(1)).mean())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Mean and its standard error over problems."""
  x = np.asarray(values, np.float64)
  return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else float('nan')


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float]:
  """[low, high]: the 95 % percentile bootstrap interval of the mean over problems. The same values give the same interval.

  Of values that are all equal (every problem wrong) the interval has no width: resampling cannot show what was never seen.
  """
  x = np.asarray(values, np.float64)
  rng, rows = np.random.default_rng(seed), max(1, BLOCK // len(x))
  means = [x[rng.integers(0, len(x), (min(rows, RESAMPLES - start), len(x)))].mean(axis=1) for start in range(0, RESAMPLES, rows)]
  return [float(v) for v in np.quantile(np.concatenate(means), (0.025, 0.975))]
