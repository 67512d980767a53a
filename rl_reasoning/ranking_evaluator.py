"""Held-out preferences -> accuracy, calibration and the length baseline of a reward model, or of a policy through its implicit reward.

eval.evaluators = {'held_out': {'kind': 'ranking'}, 'transfer': {'kind': 'ranking', 'task': 'pandalm', 'path': 'data/pandalm', 'size': 500}}

What a row holds says how it is read: rankings, verdicts on completions, or verdicts on steps (see preferences.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rl_reasoning import preferences, sharding
from rl_reasoning.config import check, from_mapping
from rl_reasoning.data import excerpt
from rl_reasoning.rank_metrics import name_prompts, pointwise_metrics, ranking_metrics
from rl_reasoning.structs import Array, Batch
from rl_reasoning.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RankingEvaluator:
  """Its keys beside `kind`."""

  task: str = ''  # '': the task (or the mixture) of the section data
  path: str = ''  # '': that of the section data where the task is its own
  options: Mapping[str, Any] | None = None  # None: as for path
  size: int = 0  # rows of the test split; 0: eval.size
  seed: int | None = None  # of tasks that make their rows; None: eval.seed


def make_ranking_evaluator(options: Mapping[str, Any], key: str) -> RankingEvaluator:
  """`key` is that of the config, eval.evaluators.NAME. Raises ConfigError naming what is unknown or out of its range."""
  e = from_mapping(RankingEvaluator, options, key + '.')
  for field, good in {'size': e.size >= 0, 'seed': e.seed is None or 0 <= e.seed < 2**32}.items():
    check(good, f"config key '{key}.{field}': {getattr(e, field)} is out of range")
  return e


def reads_of(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the rows are: rankings, verdicts or steps. Raises ConfigError for rows without judgements, and for rows of several kinds."""
  found = {
    next((reads for reads in ('rankings', 'verdicts', 'steps') if {*preferences.COLUMNS[reads]} <= {*row}), '') for row in rows
  }
  told = '; '.join(f'{reads}: {", ".join(preferences.COLUMNS[reads])}' for reads in ('rankings', 'verdicts', 'steps'))
  check('' not in found, f'a row holds no judgement to hold scores against; columns: {", ".join(rows[0])}; wanted: {told}')
  check(len(found) == 1, f'the judgements to hold scores against are of several kinds: {", ".join(sorted(found))}')
  return found.pop()


def ranking_size(rows: Sequence[Mapping[str, Any]], reads: str) -> int:
  """Rows of a unit: every ranking whole, whatever size the objective trains on."""
  return max([2, *(len(row['responses']) for row in rows)]) if reads == 'rankings' else 1


def check_rankings(
  rows: Sequence[Mapping[str, Any]], name: str, tokenizer: Tokenizer, template: str, max_length: int, overlong: str
) -> None:
  """Raises ConfigError, before a run spends its time, for rows that could not be evaluated at its end."""
  reads = reads_of(rows)
  for row in rows if reads == 'rankings' else ():
    responses = row['responses']
    check(isinstance(responses, (list, tuple)), f'eval.evaluators.{name}: responses {excerpt(responses)} is no list')
  dropped = preferences.check_preferences(rows, reads, tokenizer, template, max_length, overlong, ranking_size(rows, reads))
  check(
    dropped < len(rows),
    f"config key 'data.max_length': {max_length}, and all {dropped} rows of eval.evaluators.{name} are longer",
  )


def last_masked(values_NT: np.ndarray, mask_NT: np.ndarray) -> np.ndarray:
  """[N]: the value at the last masked token of a row (of one that has none: at the last token)."""
  T = mask_NT.shape[1]
  last = T - 1 - np.argmax(mask_NT[:, ::-1] > 0, axis=1)
  return np.take_along_axis(values_NT, last[:, None], axis=1)[:, 0]


def score_units(
  scores_fn: Callable[[Batch], Array], rows: Sequence[Mapping[str, Any]], reads: str, size: int, mesh: Mesh, batch_size: int,
  encode: Callable[[Sequence[Mapping[str, Any]]], Batch], prepare: Callable[[Batch], Batch],
) -> list[dict[str, Array]]:  # fmt: skip
  """Of each row: present, scores and lengths of its responses ([size]), or present, and the scores of its steps.

  Rows of about the same length share a batch, and every batch has `batch_size` units: few shapes to compile, little padding. Of several
  processes each puts its rows of a batch through the network, and all learn the scores.
  """
  whole = encode(rows)
  units = [{'present': whole.extras['present'][u * size : (u + 1) * size]} for u in range(len(rows))]
  length = whole.segment_NT.sum(axis=1).reshape(len(rows), size).max(axis=1)
  order = np.argsort(length, kind='stable').tolist()
  for start in range(0, len(rows), batch_size):
    some = order[start : start + batch_size]
    batch = encode([rows[i] for i in some + some[-1:] * (batch_size - len(some))])
    own = sharding.own(mesh, batch.tokens.shape[0])
    mine = jax.tree.map(lambda x: x[own], prepare(batch))  # noqa: B023  called here
    values = sharding.all_rows(mesh, sharding.own_rows(mesh, scores_fn(sharding.put_rows(mesh, mine)))).astype(np.float64)
    if values.ndim == 2 and reads != 'steps':
      values = last_masked(values, np.asarray(batch.mask_NT))
    tokens = batch.mask_NT.sum(axis=1)
    for place, i in enumerate(some):
      own = slice(place * size, (place + 1) * size)
      if reads == 'steps':
        if values.ndim != 2:
          raise ValueError('steps are measured by a process model: scores_fn must give a score after every token')
        units[i]['scores'] = values[place][batch.extras['step'][place] > 0]
      else:
        units[i] |= {'scores': values[own], 'lengths': tokens[own]}
  return units


def evaluate_rankings(
  scores_fn: Callable[[Batch], Array], rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str, mesh: Mesh, *,
  max_length: int, overlong: str, batch_size: int, prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
  """(metrics of rank_metrics, a sample for every response, completion or step).

  `scores_fn` gives the score after every token, [N, T], of which that after the last token of a response counts (after the last of each
  step, where steps are judged), or one score a response, [N], as a policy's implicit reward is. `batch_size` counts rows of data. Rows
  beyond `max_length` are left out, as `overlong` says, and counted in frac_absent. `check_rankings` has passed.
  """
  reads = reads_of(rows)
  size = ranking_size(rows, reads)
  ordered = [preferences.preferred_first(row) for row in rows] if reads == 'rankings' and size == 2 else list(rows)

  def encode(some):
    return preferences.encode_preferences(some, reads, tokenizer, template, max_length, overlong, size)

  units = score_units(scores_fn, ordered, reads, size, mesh, batch_size, encode, prepare)
  present = [i for i, unit in enumerate(units) if unit['present'].any()]
  prompts = name_prompts(rows)
  samples: list[dict[str, Any]] = []
  for i in present:
    row, scores = ordered[i], units[i]['scores']
    texts = row['responses'] if reads == 'rankings' else row['completions'] if reads == 'steps' else [row['completion']]
    for k, text in enumerate(texts):
      sample = {'problem': i, 'prompt': row['prompt'], 'completion': text, 'score': float(scores[k])}
      if reads != 'steps':
        sample['length'] = int(units[i]['lengths'][k])
      if reads == 'rankings':
        sample['rank'] = row['ranks'][k]
      else:
        sample['label'] = float(row['labels'][k] if reads == 'steps' else row['label'])
      samples.append(sample)
  if reads == 'rankings':
    counts = [len(ordered[i]['responses']) for i in present]
    scores = [units[i]['scores'][:n].tolist() for i, n in zip(present, counts, strict=True)]
    lengths = [units[i]['lengths'][:n].tolist() for i, n in zip(present, counts, strict=True)]
    result = ranking_metrics(scores, [ordered[i]['ranks'] for i in present], lengths, [prompts[i] for i in present])
  else:
    whose = [prompts[s['problem']] for s in samples]
    result = pointwise_metrics([s['score'] for s in samples], [s['label'] for s in samples], whose)
  return {**result, 'frac_absent': 1 - len(present) / len(rows)}, samples
