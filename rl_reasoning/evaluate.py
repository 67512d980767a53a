"""Evaluators: held-out problems -> completions -> accuracy, format, length, pass@k. Named in the config:

eval.evaluators = {'greedy': {}, 'forced': {'prefix': '<think>'}, 'pass': {'num_samples': 8, 'temperature': 1.0}}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rl_reasoning import data, rollout
from rl_reasoning.advantages import combine_rewards
from rl_reasoning.build import Run
from rl_reasoning.config import Rollout, check, from_mapping
from rl_reasoning.rewards import REWARDS, as_given, columns_of, score
from rl_reasoning.structs import PyTree
from rl_reasoning.tokenizer import render_prompt


@dataclasses.dataclass(frozen=True)
class Evaluator:
  prefix: str = ''  # appended to every prompt: '<think>' forces the chain
  num_samples: int = 1
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  max_completion_length: int = 0  # 0: that of the rollout section


def make_evaluators(settings: Mapping[str, Any]) -> dict[str, Evaluator]:
  """The evaluators by name. Raises ConfigError naming the key that is unknown, out of its range or without effect."""
  evaluators = {}
  for name, options in settings.items():
    key = f'eval.evaluators.{name}'
    check(isinstance(options, Mapping), f'config key {key!r}: {options!r} is not a mapping')
    e = evaluators[name] = from_mapping(Evaluator, options, key + '.')
    ranges = {'num_samples': e.num_samples >= 1, 'temperature': e.temperature >= 0, 'top_k': e.top_k >= 0, 'top_p': 0 < e.top_p <= 1,
              'min_p': 0 <= e.min_p < 1, 'max_completion_length': e.max_completion_length >= 0}  # fmt: skip
    for field, good in ranges.items():
      check(good, f"config key '{key}.{field}': {getattr(e, field)} is out of range")
    check(e.num_samples == 1 or e.temperature > 0,
          f"config key '{key}.num_samples': {e.num_samples} need a temperature above 0: greedy samples are all equal")  # fmt: skip
    for field in ('top_k', 'top_p', 'min_p'):
      check(e.temperature > 0 or field not in options, f"config key '{key}.{field}' cannot act: temperature 0 is greedy")
  return evaluators


def pass_at_k(num_samples: int, correct: int, k: int) -> float:
  """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (2107.03374)."""
  return 1.0 - math.comb(num_samples - correct, k) / math.comb(num_samples, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Mean and its standard error over problems."""
  x = np.asarray(values, np.float64)
  return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else float('nan')


def encode_problems(run: Run, rows: Sequence[dict], name: str, evaluator: Evaluator) -> tuple[list[str], list[list[int]]]:
  """(prompts, their token ids), the prefix appended. Raises ConfigError for one beyond data.max_prompt_length."""
  tok, limit = run.tokenizer, run.config.data.max_prompt_length
  texts = [render_prompt(row['prompt'], run.config.roles.policy.template, tok) + evaluator.prefix for row in rows]
  prompts = [tok.encode(text) for text in texts]
  for row, ids in zip(rows, prompts, strict=True):
    check(len(ids) <= limit, f"config key 'data.max_prompt_length': {limit}, but eval.evaluators.{name} has a prompt of {len(ids)} tokens: "
          f'{data.excerpt(row["prompt"])}')  # fmt: skip
  return texts, prompts


def check_problems(run: Run, rows: Sequence[dict], evaluators: Mapping[str, Evaluator]) -> None:
  """Raises ConfigError, before a run spends its time, for problems that could not be evaluated at its end."""
  for name, evaluator in evaluators.items():
    encode_problems(run, rows, name, evaluator)
  verdicts = REWARDS['accuracy_flexible']([''] * len(rows), [''] * len(rows), **columns_of(rows))
  gold = any(verdict is not None for verdict in verdicts)
  check(gold, f'eval.evaluators: no problem of data.task {run.config.data.task!r} has a gold answer that can be checked')


def evaluate(
  run: Run, params: PyTree, rows: Sequence[dict], name: str, evaluator: Evaluator
) -> tuple[dict[str, float], list[dict]]:
  """(metrics, samples). Accuracy is whether the answer is right whatever the format; strict accuracy asks for the format too.

  Both are over the `problems` that have a gold answer; format, length and truncated are over all completions, reward (the weighted sum of
  the config's reward functions) over the problems with a verdict on each completion. Tokens are a function of (eval.seed, problem,
  member): an evaluation repeats exactly. `check_problems` has passed.
  """
  config, tok, n = run.config, run.tokenizer, evaluator.num_samples
  batch_size = config.eval.batch_size
  settings = Rollout(
    max_completion_length=evaluator.max_completion_length or config.rollout.max_completion_length,
    temperature=evaluator.temperature, top_k=evaluator.top_k, top_p=evaluator.top_p, min_p=evaluator.min_p,
    chunk=config.rollout.chunk,
  )  # fmt: skip
  texts, prompts = encode_problems(run, rows, name, evaluator)
  samples: list[dict] = []
  for start in range(0, len(rows), batch_size):
    ids = list(range(start, min(start + batch_size, len(rows))))
    padded = ids + [ids[-1]] * (batch_size - len(ids))  # one compiled shape, and rows that divide over the mesh
    rolled = rollout.generate(
      params, run.arch, [prompts[i] for i in padded], settings=settings, group=n, end_ids=tok.end_ids,
      key=jax.random.key(config.eval.seed), dtype=config.model.dtype, mesh=run.mesh, prompt_ids=padded,
    )  # fmt: skip
    for row in range(len(ids) * n):
      tokens = rolled.tokens_NC[row, : rolled.length_N[row]].tolist()
      samples.append({
        'problem': ids[row // n],
        'prompt': texts[ids[row // n]],
        'completion': tok.decode(tokens),
        'completion_ids': tokens,
        'length': len(tokens),
        'truncated': bool(rolled.truncated_N[row]),
      })  # fmt: skip
  given = [as_given(rows[s['problem']]['prompt'], s['prompt'], s['completion']) for s in samples]
  asked, completions = map(list, zip(*given, strict=True))
  ids = [s['completion_ids'] for s in samples]
  columns = columns_of([rows[s['problem']] for s in samples])
  accuracy = REWARDS['accuracy_flexible'](asked, completions, ids, **columns)
  form = np.asarray(REWARDS['format'](asked, completions, ids, **columns), np.float64)
  judged = [a is not None for a in accuracy]
  for sample, a, f in zip(samples, accuracy, form, strict=True):
    sample.update(accuracy=a, format=float(f))
  per_problem = np.asarray([a or 0.0 for a in accuracy]).reshape(-1, n)
  keep = np.asarray(judged).reshape(-1, n).all(axis=1)
  strict = (per_problem * form.reshape(-1, n))[keep]
  per_problem = per_problem[keep]
  result = {'problems': float(keep.sum())}
  result['accuracy'], result['accuracy_stderr'] = mean_and_error(per_problem.mean(axis=1))
  result['strict_accuracy'], result['strict_accuracy_stderr'] = mean_and_error(strict.mean(axis=1))
  result['format'] = float(form.mean())
  functions = config.rewards.functions
  scores = score(functions, config.rewards.on_error, asked, completions, ids, columns)
  paid = combine_rewards(*scores, config.rewards.weights or (1.0,) * len(functions), n)
  reward, verdict = (np.asarray(x).reshape(-1, n) for x in paid)
  if (whole := verdict.all(axis=1)).any():
    result['reward'], result['reward_stderr'] = mean_and_error(reward[whole].mean(axis=1))
  result['length'] = float(np.mean([s['length'] for s in samples]))
  result['truncated'] = float(np.mean([s['truncated'] for s in samples]))
  for k in (2**i for i in range(1, n.bit_length()) if 2**i <= n):
    values = [pass_at_k(n, int(c), k) for c in per_problem.sum(axis=1)]
    result[f'pass@{k}'], result[f'pass@{k}_stderr'] = mean_and_error(values)
  return result, samples


def evaluate_all(run: Run, params: PyTree, rows: Sequence[dict]) -> dict[str, dict[str, float]]:
  """evaluator name -> metrics."""
  evaluators = make_evaluators(run.config.eval.evaluators)
  return {name: evaluate(run, params, rows, name, evaluator)[0] for name, evaluator in evaluators.items()}


def test_problems(run: Run) -> Sequence[dict]:
  """The first `eval.size` problems of the test split; procedural tasks draw them by `eval.seed`."""
  config = run.config
  source = data.load(config.data, 'test', config.eval.seed, config.eval.size)
  return [source[i] for i in range(min(config.eval.size, len(source)))]
