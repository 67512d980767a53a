"""How well scores order what people ranked, how well they mean what they say (calibration), and what length alone would have said.
Numpy only.

Each prompt counts once: a value of a prompt is its mean over the pairs (steps, completions) of all its rows, and intervals resample
prompts, because the pairs of one prompt are not independent. Means over nothing, and errors of one prompt, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_reasoning.estimates import bootstrap_interval, mean_and_error

BINS = 10


def sigmoid(x: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def won(difference: np.ndarray) -> np.ndarray:
  """1 where positive, 1/2 where 0."""
  return 0.5 * (np.sign(difference) + 1)


def over_prompts(name: str, values: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
  """The mean over prompts of the mean of a prompt's values, with `_stderr` and `_ci95` (bootstrap over prompts)."""
  if not len(values):
    return {}
  _, index, count = np.unique(prompts, return_inverse=True, return_counts=True)
  means = (np.bincount(index, weights=values) / count).tolist()
  mean, error = mean_and_error(means)
  several = {f'{name}_stderr': error, f'{name}_ci95': bootstrap_interval(means)} if len(means) > 1 else {}
  return {name: mean, **several}


def reliability(
  probability: np.ndarray, happened: np.ndarray, weight: np.ndarray, low: float
) -> tuple[list[dict[str, float]], float]:
  """(bins, ECE): what was predicted against how often it happened, in equal bins of the probability from `low` to 1.

  The expected calibration error (1706.04599) is the mean distance of the two, each bin by its weight. Empty bins are left out.
  """
  edges = np.linspace(low, 1, BINS + 1)
  place = np.clip(np.searchsorted(edges, probability, side='right') - 1, 0, BINS - 1)
  bins, error = [], 0.0
  for b in range(BINS):
    inside = place == b
    share = weight[inside].sum() / weight.sum() if inside.any() else 0.0
    if not share:
      continue
    predicted, observed = (float(np.average(x[inside], weights=weight[inside])) for x in (probability, happened))
    bins.append({'low': float(edges[b]), 'high': float(edges[b + 1]), 'predicted': predicted, 'observed': observed,
                 'share': float(share), 'count': int(inside.sum())})  # fmt: skip
    error += float(share) * abs(predicted - observed)
  return bins, error


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
  """Pearson's; None where one of them does not vary."""
  x, y = x - x.mean(), y - y.mean()
  scale = np.sqrt((x * x).sum() * (y * y).sum())
  return float((x * y).sum() / scale) if scale > 1e-12 * max(1.0, np.abs(x).max() * np.abs(y).max()) else None


def within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Values less the mean of their group."""
  _, index, count = np.unique(groups, return_inverse=True, return_counts=True)
  return values - (np.bincount(index, weights=values) / count)[index]


def spread(scores: np.ndarray) -> dict[str, float]:
  return {'score_mean': float(scores.mean()), 'score_std': float(scores.std()), 'score_min': float(scores.min()),
          'score_max': float(scores.max())}  # fmt: skip


def per_prompt_weights(prompts: np.ndarray) -> np.ndarray:
  """Of each value: the values of a prompt weigh 1 together."""
  _, index, count = np.unique(prompts, return_inverse=True, return_counts=True)
  return 1.0 / count[index]


def ranking_metrics(
  scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]], prompts: Sequence[int]
) -> dict[str, Any]:
  """Of rankings, each a sequence over its responses; `prompts` says which rankings are of one prompt. A pair is two responses of a ranking
  whose ranks differ (the smaller is better); ranks that tie are left out, scores that tie are half right.

  accuracy, margin       the preferred response scores higher; by how much
  ece, reliability       predicted is sigmoid(|difference|), how sure the model is of its own choice (1/2 .. 1); observed, whether rightly
  length_accuracy        of the rule that the longer response is better (equal lengths are half right); length_difference, in tokens
  accuracy_longer_preferred, accuracy_shorter_preferred   the model's accuracy where that rule is right, and where it is wrong: one that
                         only counts tokens has 1 and 0
  score_length_correlation   within rankings: what scores of different prompts differ by means nothing
  demonstration_mean     mean score of the best-ranked responses
  problems, pairs, frac_ties   prompts with a pair, pairs, and which part of all two responses ties
  """
  prompt, margin, longer, ties, possible = [], [], [], 0, 0
  best: list[float] = []
  for row_prompt, s, r, n in zip(prompts, scores, ranks, lengths, strict=True):
    pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]]
    possible += len(r) * (len(r) - 1) // 2
    ties += len(r) * (len(r) - 1) // 2 - len(pairs)
    prompt += [row_prompt] * len(pairs)
    margin += [s[i] - s[j] for i, j in pairs]
    longer += [n[i] - n[j] for i, j in pairs]
    best += [s[i] for i in range(len(r)) if pairs and r[i] == min(r)]
  result: dict[str, Any] = {'problems': float(len(set(prompt))), 'pairs': len(prompt)}
  if possible:
    result['frac_ties'] = ties / possible
    result |= spread(np.concatenate([np.asarray(s, np.float64) for s in scores]))
  if not prompt:
    return result
  of, d, more = np.asarray(prompt), np.asarray(margin, np.float64), np.asarray(longer, np.float64)
  right = won(d)
  result |= {
    'demonstration_mean': float(np.mean(best)),
    'length_difference': float(np.average(more, weights=per_prompt_weights(of))),
  }
  chosen = {
    'accuracy': (right, of), 'margin': (d, of), 'length_accuracy': (won(more), of),
    'accuracy_longer_preferred': (right[more > 0], of[more > 0]), 'accuracy_shorter_preferred': (right[more < 0], of[more < 0]),
  }  # fmt: skip
  for name, (values, whose) in chosen.items():
    result |= over_prompts(name, values, whose)
  result['reliability'], result['ece'] = reliability(sigmoid(np.abs(d)), right, per_prompt_weights(of), 0.5)
  ranking = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
  flat = [within(np.concatenate([np.asarray(row, np.float64) for row in x]), ranking) for x in (scores, lengths)]
  if (value := correlation(*flat)) is not None:
    result['score_length_correlation'] = value
  return result


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
  """The chance that a positive scores above a negative, ties half (Mann and Whitney's U). None where there is only one kind."""
  positives, negatives = int(positive.sum()), int((~positive).sum())
  if not positives or not negatives:
    return None
  _, index, count = np.unique(scores, return_inverse=True, return_counts=True)
  rank = np.cumsum(count) - (count - 1) / 2  # from 1; those that tie share the mean
  return float((rank[index][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def pointwise_metrics(scores: Sequence[float], labels: Sequence[float], prompts: Sequence[int]) -> dict[str, Any]:
  """Of single completions or steps: scores are log-odds, labels in [0, 1].

  accuracy      at a probability of 1/2, over labels other than 1/2; majority_accuracy, of always saying what is more frequent
  auc           of labels above 1/2 against those below, all values together
  ece, reliability   predicted is sigmoid(score) (0 .. 1), observed the mean label
  brier         mean of (probability - label)^2
  """
  s, y, of = np.asarray(scores, np.float64), np.asarray(labels, np.float64), np.asarray(prompts)
  result: dict[str, Any] = {'problems': float(len(set(of.tolist()))), 'judged': len(s)}
  if not len(s):
    return result
  probability, sided = sigmoid(s), y != 0.5
  right = won(s * np.sign(y - 0.5))[sided]
  result |= {**spread(s), 'mean_label': float(y.mean()), 'mean_probability': float(probability.mean())}
  result |= over_prompts('accuracy', right, of[sided])
  result |= over_prompts('brier', (probability - y) ** 2, of)
  if sided.any():
    share = over_prompts('share', (y > 0.5)[sided].astype(np.float64), of[sided])['share']
    result['majority_accuracy'] = max(share, 1 - share)
  if (value := auc(s[sided], y[sided] > 0.5)) is not None:
    result['auc'] = value
  result['reliability'], result['ece'] = reliability(probability, y, per_prompt_weights(of), 0.0)
  return result


def name_prompts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
  """The same number for rows of the same prompt."""
  seen: dict[str, int] = {}
  return [seen.setdefault(repr(row['prompt']), len(seen)) for row in rows]
