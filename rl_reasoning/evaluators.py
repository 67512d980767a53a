"""Evaluators: held-out problems -> completions -> accuracy, format, rewards, length, pass@k, maj@k; held-out judgements -> how well scores
agree with them. Named in the config:

eval.evaluators = {'greedy': {}, 'forced': {'prefix': '<think>'}, 'pass': {'num_samples': 8, 'temperature': 1.0},
                   'countdown': {'task': 'countdown', 'options': {'operands': 3}, 'size': 500},
                   'held out': {'kind': 'ranking', 'task': 'preference', 'path': 'pairs.jsonl'}}
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rl_reasoning import (
  checkpoint,
  collect,
  data,
  distributed,
  metrics,
  model,
  preemption,
  ranking_evaluator,
  resolution,
  rewards,
  rollout,
  sharding,
  stored,
  verify,
)
from rl_reasoning.advantages import combine_rewards
from rl_reasoning.build import Run
from rl_reasoning.config import Config, Data, Rollout, check, check_file_name, digest, from_mapping, to_dict
from rl_reasoning.estimates import bootstrap_interval, maj_at_k, mean_and_error, pass_at_k
from rl_reasoning.objectives.preference import Preference
from rl_reasoning.ranking_evaluator import RankingEvaluator
from rl_reasoning.rewards import REWARDS, as_given, columns_of, score
from rl_reasoning.structs import Array, Batch, PyTree, Rollout as Rolled
from rl_reasoning.tokenizer import from_thinking, parts, render_prompt
from rl_reasoning.verify.math import extract_answer, parse_number

COLUMNS = ('difficulty', 'dataset')  # of the rows: metrics are also given apart for each of their values
BINS = 8  # of accuracy by length


@dataclasses.dataclass(frozen=True)
class Evaluator:
  task: str = ''  # '': the task (or the mixture) of the section data
  path: str = ''  # '': that of the section data where the task is its own
  options: Mapping[str, Any] | None = None  # None: as for path
  size: int = 0  # problems of the test split; 0: eval.size
  seed: int | None = None  # None: eval.seed
  prefix: str = ''  # appended to every prompt: '<think>' forces the chain
  num_samples: int = 1
  ks: tuple[int, ...] = ()  # of pass@k and maj@k; empty: 2, 4, 8, ... up to num_samples
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  max_completion_length: int = 0  # 0: that of the rollout section
  kl_to: str = ''  # weights of the policy's architecture: metric kl is the KL divergence from them, nats a completion


KINDS = ('sampled', 'ranking')


def make_evaluators(settings: Mapping[str, Any]) -> dict[str, Evaluator | RankingEvaluator]:
  """The evaluators by name. Raises ConfigError naming the key that is unknown, out of its range or without effect."""
  evaluators: dict[str, Evaluator | RankingEvaluator] = {}
  for name, options in settings.items():
    key = f'eval.evaluators.{name}'
    check_file_name(key, name, 200)
    check(isinstance(options, Mapping), f'config key {key!r}: {options!r} is not a mapping')
    kind, options = options.get('kind', 'sampled'), {k: v for k, v in options.items() if k != 'kind'}
    check(kind in KINDS, f"config key '{key}.kind': {kind!r} is none of {', '.join(KINDS)}")
    if kind == 'ranking':
      evaluators[name] = ranking_evaluator.make_ranking_evaluator(options, key)
      continue
    e = evaluators[name] = from_mapping(Evaluator, options, key + '.')
    ranges = {'num_samples': e.num_samples >= 1, 'temperature': e.temperature >= 0, 'top_k': e.top_k >= 0, 'top_p': 0 < e.top_p <= 1,
              'min_p': 0 <= e.min_p < 1, 'max_completion_length': e.max_completion_length >= 0, 'size': e.size >= 0,
              'seed': e.seed is None or 0 <= e.seed < 2**32,
              'ks': len({*e.ks}) == len(e.ks) and all(1 <= k <= e.num_samples for k in e.ks)}  # fmt: skip
    for field, good in ranges.items():
      check(good, f"config key '{key}.{field}': {getattr(e, field)} is out of range")
    check(e.num_samples == 1 or e.temperature > 0,
          f"config key '{key}.num_samples': {e.num_samples} need a temperature above 0: greedy samples are all equal")  # fmt: skip
    check(e.num_samples > 1 or not e.ks, f"config key '{key}.ks' cannot act: there is one sample a problem")
    for field in ('top_k', 'top_p', 'min_p'):
      check(e.temperature > 0 or field not in options, f"config key '{key}.{field}' cannot act: temperature 0 is greedy")
    whole = e.temperature > 0 and e.top_k == 0 and e.top_p == 1 and e.min_p == 0
    check(
      whole or not e.kl_to,
      f"config key '{key}.kl_to': a KL divergence needs samples of the whole distribution, temperature above 0",
    )
  return evaluators


def data_of(given: Data, name: str, evaluator: Evaluator | RankingEvaluator) -> Data:
  """The section data as the evaluator reads it."""
  if evaluator.task:
    return dataclasses.replace(given, task=evaluator.task, path=evaluator.path, options=evaluator.options or {}, mixture={})
  for key in ('path', 'options'):
    idle = bool(given.mixture) and bool(getattr(evaluator, key))
    check(not idle, f"config key 'eval.evaluators.{name}.{key}' cannot act on data.mixture: name the task that it is for")
  options = given.options if evaluator.options is None else evaluator.options
  return dataclasses.replace(given, path=evaluator.path or given.path, options=options)


def seed_of(config: Config, evaluator: Evaluator | RankingEvaluator) -> int:
  return config.eval.seed if evaluator.seed is None else evaluator.seed


def test_problems(run: Run) -> dict[str, list[dict]]:
  """evaluator name -> the first problems of its test split; procedural tasks draw them by the seed."""
  config, found = run.config, {}
  problems: dict[str, list[dict]] = {}
  for name, e in make_evaluators(config.eval.evaluators).items():
    wanted = data_of(config.data, name, e), seed_of(config, e), e.size or config.eval.size
    key = digest([to_dict(wanted[0]), *wanted[1:]])
    problems[name] = found[key] if key in found else found.setdefault(key, data.open_test(*wanted))
  return problems


def encode_problems(run: Run, rows: Sequence[dict], name: str, evaluator: Evaluator) -> tuple[list[str], list[list[int]]]:
  """(prompts, their token ids), the prefix appended. Raises ConfigError for one beyond data.max_prompt_length."""
  tok, limit = run.tokenizer, run.config.data.max_prompt_length
  texts = [render_prompt(row['prompt'], run.config.roles.policy.template, tok) + evaluator.prefix for row in rows]
  prompts = [tok.encode(text) for text in texts]
  for row, ids in zip(rows, prompts, strict=True):
    check(len(ids) <= limit, f"config key 'data.max_prompt_length': {limit}, but eval.evaluators.{name} has a prompt of {len(ids)} tokens: "
          f'{data.excerpt(row["prompt"])}')  # fmt: skip
  return texts, prompts


def check_problems(
  run: Run, problems: Mapping[str, Sequence[dict]], evaluators: Mapping[str, Evaluator | RankingEvaluator]
) -> None:
  """Raises ConfigError, before a run spends its time, for problems that could not be evaluated at its end."""
  limits, models = run.config.data, resolution.model_names(run.config)
  # Of a completion's worth, beside its answer: what a network, a known gold reward or the user's own function says.
  worth = any(name in models or ':' in name or name.startswith('gold_') for name in run.config.rewards.functions)
  for name, evaluator in evaluators.items():
    if isinstance(evaluator, RankingEvaluator):
      template = run.config.roles.policy.template
      ranking_evaluator.check_rankings(problems[name], name, run.tokenizer, template, limits.max_length, limits.overlong)
      continue
    check(run.speaks, f"config key 'eval.evaluators.{name}': the network has no head for text; its kind is ranking")
    if evaluator.kl_to:
      grows = bool(parts(run.config.roles.policy.tokenizer)[1])
      resolution.check_reference(f'eval.evaluators.{name}.kl_to', evaluator.kl_to, run.arch, grows)
    encode_problems(run, problems[name], name, evaluator)
    gold = worth or rewards.any_gold(problems[name])
    task = evaluator.task or run.config.data.task
    check(gold, f'eval.evaluators.{name}: no problem of data.task {task!r} has a gold answer that can be checked')


def judge(run: Run, rows: Sequence[dict], samples: list[dict], evaluator: Evaluator, frozen: Mapping[str, PyTree]) -> None:
  """Writes into the samples of whole problems what is said of them: answer, accuracy, format, rewards. Of several processes each judges
  its own, if only none: reward models read them together."""
  config = run.config
  given = [as_given(rows[s['problem']]['prompt'], s['prompt'], s['completion']) for s in samples]
  asked, completions = [prompt for prompt, _ in given], [completion for _, completion in given]
  ids = [s['completion_ids'] for s in samples]
  columns = columns_of([rows[s['problem']] for s in samples])
  accuracy = REWARDS['accuracy_flexible'](asked, completions, ids, **columns)
  forms = REWARDS['format'](asked, completions, ids, **columns)
  names = config.rewards.functions
  limit = evaluator.max_completion_length or config.rollout.max_completion_length
  prompts = [rows[s['problem']]['prompt'] for s in samples]
  texts, ended = [from_thinking(s['prompt'], s['completion']) for s in samples], [not s['truncated'] for s in samples]
  routes = rewards.routes(config, columns, len(samples))
  known = collect.model_rewards(run, frozen, prompts, texts, ended, columns, routes, False)
  scores = score(
    names, config.rewards.on_error, asked, completions, ids, columns, options=config.rewards.options, timeout=config.rewards.timeout,
    max_completion_length=limit, known=known, routes=routes,
  )  # fmt: skip
  weights = config.rewards.weights or (1.0,) * len(names)
  paid, has = np.zeros(len(samples)), np.zeros(len(samples))
  if names and samples:
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, jax.local_devices()[:1])):  # of these samples alone
      paid, has = map(np.asarray, combine_rewards(*scores, weights, evaluator.num_samples))
  for i, (sample, right, form) in enumerate(zip(samples, accuracy, forms, strict=True)):
    sample.update(
      answer=extract_answer(from_thinking(sample['prompt'], sample['completion']), flexible=True),
      accuracy=None if right is None else float(right),
      format=None if form is None else float(form),
      rewards={name: float(scores.values_NR[i, r]) if scores.has_NR[i, r] else None for r, name in enumerate(names)},
      reward=float(paid[i]) if has[i] else None,
    )


@functools.partial(jax.jit, static_argnames=('arch', 'dtype'))
def masked_logp(params: PyTree, arch: model.Arch, batch: Batch, temperature: Array, dtype: str) -> Array:
  """[N, T]: the log-probability of each masked token, 0 elsewhere."""
  return batch.mask_NT * model.log_probs(params, arch, batch, temperature, dtype=dtype)[0]


def divergence(
  run: Run, params: PyTree, other: PyTree, prompts: list[list[int]], rolled: Rolled, evaluator: Evaluator
) -> np.ndarray:
  """[own rows]: log-probability of each completion under the policy less that under the other weights, at the sampling temperature: its
  mean is the KL divergence."""
  batch = sharding.put_batch(run.mesh, collect.to_batch(prompts, rolled, evaluator.num_samples).replace(logp_sample_NT=None))
  dtype, temperature = run.config.model.dtype, jnp.float32(evaluator.temperature)
  ours, theirs = (masked_logp(p, run.arch, batch, temperature, dtype).sum(axis=1) for p in (params, other))
  return sharding.own_rows(run.mesh, ours - theirs)


def identity(
  run: Run, fingerprint: int, rows: Sequence[dict], evaluator: Evaluator, frozen: Mapping[str, PyTree]
) -> dict[str, Any]:
  """All that samples depend on: what was sampled under another identity must not be mixed with these."""
  config = run.config
  own = {str(inspect.getsourcefile(function)) for function in REWARDS.values()}
  judges = [
    pathlib.Path(rewards.__file__),
    *map(pathlib.Path, sorted(own)),
    *sorted(pathlib.Path(verify.__path__[0]).glob('*.py')),
  ]
  settings = {
    'evaluator': dataclasses.asdict(dataclasses.replace(evaluator, ks=())), 'seed': seed_of(config, evaluator),
    'batch_size': config.eval.batch_size,
    'arch': dataclasses.asdict(run.arch), 'dtype': config.model.dtype, 'tokenizer': config.roles.policy.tokenizer,
    'template': config.roles.policy.template, 'max_completion_length': config.rollout.max_completion_length,
    'chunk': config.rollout.chunk, 'cache_dtype': config.rollout.cache_dtype, 'rewards': dataclasses.asdict(config.rewards),
    'reward_roles': config.roles.reward,
    'reward_models': {name: int(checkpoint.fingerprint(frozen[f'reward.{name}'])) for name in run.reward_models},
  }  # fmt: skip
  return {
    'checkpoint': fingerprint, 'config': digest(settings), 'problems': digest(list(rows)), 'code': data.content_hash(judges)[:12]
  }  # fmt: skip


class SampleFile:
  """FOLDER/NAME.jsonl, a line a sample, and FOLDER/NAME.json, what they are samples of. Whole batches only: a batch that a kill cut is
  made again, from the same prompts together, so that every number is what it would have been."""

  def __init__(self, folder: epath.Path, name: str, of: Mapping[str, Any]):
    folder.mkdir(parents=True, exist_ok=True)
    self.path, self.about, self.of = folder / f'{name}.jsonl', folder / f'{name}.json', dict(of)
    try:
      known = json.loads(self.about.read_text()) if self.about.exists() else {}
    except ValueError:  # a machine that lost its power leaves an empty file
      known = {}
    if known.get('of') != self.of:
      if known:
        differs = ', '.join(key for key in self.of if known['of'].get(key) != self.of[key])
        print(f'eval {name}: the samples in {self.path} are of another {differs}: made anew', flush=True)
      self.path.unlink(missing_ok=True)
      known = {'seconds': 0.0}
    self.seconds = known['seconds']
    self.lines = metrics.JsonLines(self.path, 0)

  def read(self, batch_rows: int, total: int) -> list[dict]:
    """The samples of whole batches; what is behind them is cut off."""
    kept = len(self.lines.lines)
    kept = kept if kept == total else kept // batch_rows * batch_rows
    del self.lines.lines[kept:]
    if self.path.exists():
      self.lines.rewrite()
    return [json.loads(line) for line in self.lines.lines]

  def append(self, samples: Sequence[Mapping[str, Any]], seconds: float) -> None:
    self.seconds += seconds
    part = self.about.parent / (self.about.name + '.part')
    part.write_text(json.dumps({'of': self.of, 'seconds': self.seconds}))
    part.replace(self.about)
    for sample in samples:
      self.lines.append(sample)


def in_batches(
  title: str, make: Callable[[list[int]], list[dict]], problems: int, num_samples: int, batch_size: int, file: SampleFile | None
) -> list[dict]:
  """The samples of all problems, in order, `num_samples` of each: what `make` gives for the numbers of up to `batch_size` problems,
  batch by batch into the file, from which it goes on. Of several processes the first one has them, and the file; the others have none."""
  samples = [] if file is None else file.read(batch_size * num_samples, problems * num_samples)
  first = distributed.from_main(lambda: len(samples) // num_samples)
  for start in range(first, problems, batch_size):
    distributed.mark(title)
    clock = time.perf_counter()
    ids = list(range(start, min(start + batch_size, problems)))
    batch = make(ids)
    preemption.check()  # before the batch is kept: the signal may have ended those who judged it, too
    if not distributed.is_main():
      continue
    samples += batch
    seconds, done = time.perf_counter() - clock, ids[-1] + 1
    if file is not None:
      file.append(batch, seconds)
    left = int(seconds * -(-(problems - done) // batch_size))  # by the latest batch: the first one compiles
    rate = sum(s['length'] for s in batch) / seconds
    print(f'{title}: {done}/{problems} problems, {rate:,.0f} tokens/s, left {left // 60}:{left % 60:02d}', flush=True)
  return samples


def collected(samples: list[dict]) -> list[dict]:
  """On the first process the samples of all, by problem; on the others none. They go to that one alone."""
  main = distributed.is_main()
  others = range(1, distributed.count())
  sent = distributed.move({} if main else {0: {distributed.index(): samples}}, others if main else ())
  by_problem: dict[int, list[dict]] = {}
  for some in (samples, *sent.values()) if main else ():
    for problem, of_one in itertools.groupby(some, key=lambda s: s['problem']):
      by_problem.setdefault(problem, list(of_one))
  return [s for problem in sorted(by_problem) for s in by_problem[problem]]


def sample_problems(
  run: Run, params: PyTree, rows: Sequence[dict], name: str, evaluator: Evaluator, folder: epath.Path | None,
  frozen: Mapping[str, PyTree] | None = None,
) -> list[dict]:  # fmt: skip
  """`num_samples` judged completions of each problem, in order; batch by batch into `folder`, from which it goes on. Every process samples
  and judges its own problems of a batch, and the first one is told.

  Tokens are a function of (seed, problem, member): an evaluation repeats exactly. `frozen` holds the weights of reward models.
  """
  frozen = frozen or {}
  config, tok, n = run.config, run.tokenizer, evaluator.num_samples
  batch_size = config.eval.batch_size
  settings = Rollout(
    max_completion_length=evaluator.max_completion_length or config.rollout.max_completion_length,
    temperature=evaluator.temperature, top_k=evaluator.top_k, top_p=evaluator.top_p, min_p=evaluator.min_p,
    chunk=config.rollout.chunk, cache_dtype=config.rollout.cache_dtype,
  )  # fmt: skip
  texts, prompts = encode_problems(run, rows, name, evaluator)
  file, other = None, None
  if evaluator.kl_to:
    other = stored.load_params(evaluator.kl_to, run.arch, jax.random.key(0), run.mesh)
  if folder is not None:
    of = identity(run, int(checkpoint.fingerprint(params)), rows, evaluator, frozen)
    if other is not None:  # its path may hold other weights by the time that an evaluation goes on
      of['kl_to'] = int(checkpoint.fingerprint(other))
    file = SampleFile(folder, name, of) if distributed.is_main() else None

  def make(ids: list[int]) -> list[dict]:
    own = sharding.own(run.mesh, batch_size).tolist()
    padded = [ids[min(place, len(ids) - 1)] for place in own]  # one compiled shape, and rows that divide over the mesh
    rolled = rollout.generate(
      params, run.arch, [prompts[i] for i in padded], settings=settings, group=n, end_ids=tok.end_ids,
      key=jax.random.key(seed_of(config, evaluator)), dtype=config.model.dtype, mesh=run.mesh, prompt_ids=padded,
    )  # fmt: skip
    batch = []
    for row in range(sum(place < len(ids) for place in own) * n):
      tokens = rolled.tokens_NC[row, : rolled.length_N[row]].tolist()
      batch.append({
        'problem': padded[row // n],
        'prompt': texts[padded[row // n]],
        'completion': tok.decode(tokens),
        'completion_ids': tokens,
        'length': len(tokens),
        'truncated': bool(rolled.truncated_N[row]),
      })  # fmt: skip
    if other is not None:
      for sample, kl in zip(batch, divergence(run, params, other, [prompts[i] for i in padded], rolled, evaluator)):
        sample['kl'] = float(kl)
    judge(run, rows, batch, evaluator, frozen)
    return collected(batch)

  return in_batches(f'eval {name}', make, len(rows), n, batch_size, file)


def vote(answer: str) -> Any:
  """What two answers share that count as one: their number, else their text, case and spaces aside."""
  number = parse_number(answer)
  return ' '.join(answer.casefold().split()) if number is None else number


def votes(samples: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
  """(how many samples, how right) of each answer to one problem; a sample without an answer is in none."""
  groups = collections.defaultdict(list)
  for s in samples:
    if s['answer'] is not None:
      groups[vote(s['answer'])].append(s['accuracy'])
  return tuple(sorted((len(right), float(np.mean(right))) for right in groups.values()))


def measure(samples: Sequence[Mapping[str, Any]], rows: Sequence[dict], evaluator: Evaluator) -> dict[str, Any]:
  """The metrics of whole problems. NAME_stderr is the standard error and NAME_ci95 the bootstrap interval of a mean over problems; a
  mean over nothing is left out, and so is the error of one problem.

  Accuracy (pass@1, the mean over samples) is whether the answer is right whatever the format; strict accuracy asks for the format too.
  Both, pass@k and maj@k are over the `problems` that have a gold answer, format, length and truncated over all, and reward (the weighted
  sum of the config's reward functions) over the problems with a verdict on each completion. maj@k is left out where answers are programs
  (rows with `tests`): no two of them are alike.
  """
  n = evaluator.num_samples

  def table(key: str) -> np.ndarray:
    return np.asarray([np.nan if s[key] is None else s[key] for s in samples], np.float64).reshape(-1, n)

  accuracy, form, reward, length = map(table, ('accuracy', 'format', 'reward', 'length'))
  judged, rewarded = ~np.isnan(accuracy).any(axis=1), ~np.isnan(reward).any(axis=1)
  values: dict[str, Any] = {
    'accuracy': accuracy[judged].mean(axis=1),
    'strict_accuracy': (accuracy * form)[judged].mean(axis=1),
    'format': form.mean(axis=1),
    'reward': reward[rewarded].mean(axis=1),
    'length': length.mean(axis=1),
    'truncated': table('truncated').mean(axis=1),
  }
  if evaluator.kl_to:
    values['kl'] = table('kl').mean(axis=1)
  for reward_name in samples[0]['rewards'] if samples else ():
    own = np.asarray([np.nan if (v := s['rewards'][reward_name]) is None else v for s in samples]).reshape(-1, n)
    values[f'rewards/{reward_name}'] = own[~np.isnan(own).any(axis=1)].mean(axis=1)
  of_code = any(rows[s['problem']].get('tests') is not None for s in samples)
  correct = (accuracy[judged] == 1).sum(axis=1)
  polls = [votes(samples[i * n : (i + 1) * n]) for i in np.flatnonzero(judged).tolist()]
  for k in evaluator.ks or [2**i for i in range(1, n.bit_length())]:
    values[f'pass@{k}'] = [pass_at_k(n, int(c), k) for c in correct]
    if not of_code:
      values[f'maj@{k}'] = [maj_at_k(n, poll, k) for poll in polls]
  result: dict[str, Any] = {'problems': float(judged.sum())}
  for name, x in values.items():
    if len(x):
      result[name], error = mean_and_error(x)
    if len(x) > 1:
      result[f'{name}_stderr'], result[f'{name}_ci95'] = error, bootstrap_interval(x)
  for name, chosen in (('length_right', accuracy == 1), ('length_wrong', accuracy < 1)):
    if chosen.any():
      result[name] = float(length[chosen].mean())
  return result


def accuracy_by_length(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
  """Accuracy of completions in bins of length that hold about as many each; equal lengths are in one bin."""
  pairs = sorted((s['length'], s['accuracy']) for s in samples if s['accuracy'] is not None)
  edges = sorted({pairs[len(pairs) * i // BINS][0] for i in range(BINS)} if pairs else [])
  bins = []
  for low, high in itertools.pairwise([*edges, math.inf]):
    inside = [pair for pair in pairs if low <= pair[0] < high]
    accuracy, error = mean_and_error([right for _, right in inside])
    mean = sum(length for length, _ in inside) / len(inside)
    bins.append({'low': inside[0][0], 'high': inside[-1][0], 'length': mean, 'completions': len(inside), 'accuracy': accuracy})
    if len(inside) > 1:
      bins[-1]['accuracy_stderr'] = error  # over completions: those of one problem are not independent
  return bins


@functools.partial(jax.jit, static_argnames=('arch', 'dtype', 'layers'))
def token_scores(params: PyTree, arch: model.Arch, batch: Batch, dtype: str, layers: int) -> Array:
  """[N, T]: the scalar head after every token; `layers` of them are in the batch's features already, where it has them."""
  hidden = model.hidden_states(params, arch, batch, dtype=dtype, frozen_layers=layers)
  return model.scores(params, hidden, batch.segment_NT)


def rank(
  run: Run, params: PyTree, rows: Sequence[dict], name: str, frozen: Mapping[str, PyTree], folder: epath.Path | None
) -> tuple[dict[str, Any], list[dict]]:
  """(metrics, samples) of held-out judgements, by the scores of a reward model, or by a policy's implicit reward: what its objective says
  that is (DPO, 2305.18290), else the log-probability of a response, less that under the run's reference where it has one."""
  config, reference = run.config, frozen.get('ref')
  dtype, layers = config.model.dtype, config.optim.frozen_layers

  def scores(batch: Batch) -> Array:
    preemption.check()
    if not run.speaks:
      return token_scores(params, run.arch, batch, dtype, layers)
    logp = masked_logp(params, run.arch, batch, jnp.float32(1), dtype)
    other: Any = None if reference is None else masked_logp(reference, run.arch, batch, jnp.float32(1), dtype)
    if isinstance(run.objective, Preference):
      return run.objective.implicit_reward(logp, other, batch.mask_NT)
    return jnp.sum(logp if other is None else logp - other, axis=1)

  result, samples = ranking_evaluator.evaluate_rankings(
    scores, rows, run.tokenizer, config.roles.policy.template, run.mesh, max_length=config.data.max_length,
    overlong=config.data.overlong, batch_size=config.eval.batch_size, prepare=lambda batch: collect.remembered(run, params, batch),
  )  # fmt: skip
  if folder is not None and distributed.is_main():
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(s) + '\n' for s in samples))
  return result, samples


def evaluate(
  run: Run, params: PyTree, rows: Sequence[dict], name: str, evaluator: Evaluator | RankingEvaluator, folder: epath.Path | None = None,
  frozen: Mapping[str, PyTree] | None = None,
) -> tuple[dict[str, Any], list[dict]]:  # fmt: skip
  """(metrics, samples): of `measure`, those of each difficulty and data set under the column's name, or of `rank`; what is measured on
  samples, on the first process alone. `check_problems` has passed."""
  if isinstance(evaluator, RankingEvaluator):
    return rank(run, params, rows, name, frozen or {}, folder)
  samples = sample_problems(run, params, rows, name, evaluator, folder, frozen)
  if not distributed.is_main():
    return {}, []
  result = measure(samples, rows, evaluator)
  for column in COLUMNS:
    groups = collections.defaultdict(list)
    for s in samples:
      value = rows[s['problem']].get(column)
      groups[value if value is None or isinstance(value, (str, int, float)) else json.dumps(value)].append(s)
    groups.pop(None, None)
    for value in sorted(groups, key=lambda v: (isinstance(v, str), v)):
      result.setdefault(column, {})[str(value)] = measure(groups[value], rows, evaluator)
  return result, samples


def evaluate_all(
  run: Run, params: PyTree, problems: Mapping[str, Sequence[dict]], folder: epath.Path | None = None,
  frozen: Mapping[str, PyTree] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
  """evaluator name -> metrics; samples go to `folder`/NAME.jsonl where there is one."""
  evaluators = make_evaluators(run.config.eval.evaluators)
  return {name: evaluate(run, params, problems[name], name, e, folder, frozen)[0] for name, e in evaluators.items()}
