"""Inference-time scaling: what accuracy costs in tokens, by methods that spend them in different ways. Named in the config:

scale = {'step by step': {'method': 'zero_shot'}, 'voting': {'method': 'vote', 'num_samples': (1, 4, 16)}, ...}

  zero_shot       one completion of the question and `instruction` (2205.11916); '' asks the bare question
  few_shot        one completion after `shots` worked examples, the first training rows in the order of `seed` (2005.14165)
  vote            the answer that most of k samples give (self-consistency, 2203.11171)
  weighted_vote   the same, each sample weighing what `by` says: a reward model's score through a sigmoid, which for an outcome model is its
                  probability of being right; 'likelihood', the policy's own probability of the completion, 'likelihood_per_token', its
                  geometric mean (both of the distribution sampled from; the second is the "normalized" sum of 2203.11171, table 1)
  best_of_n       the sample of k that `by` likes best: a reward model, or 'oracle', the verifier, which is given the gold answer: pass@k
  budget_forcing  thinking of at least and at most so many tokens, a point for each pair of `budgets` (s1, 2501.19393): rounds.force_budget
  conditioned     one completion with `label` put in before every step, of a policy that learned from steps with labels (return-conditioned
                  RL, 2403.04642; `generate.keep` conditioned makes such data)
  beam_search     steps chosen by the reward model `by`, a point for each number of `beams` (2408.03314): rounds.beam_search. The answer
                  is the one with the largest sum of sigmoid(score) over the last beams. An outcome model has seen whole completions only;
                  what it says of beginnings is its extrapolation
`by` names a reward model of roles.reward; a process model says there what the last step is worth. Numbers at k are exact expectations over
all choices of k of the samples drawn (of a weighted vote over 10,000 choices where there are more). Methods that sample alike share
samples: they are in the file of the first of them.

Tokens are those after the prompt: drawn by the policy or put in ("Wait", a forced tag), and of all expansions of a beam search. Prompts,
which few-shot examples make long, and passes of reward models are not in them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rl_reasoning import (
  build,
  checkpoint,
  config as config_lib,
  data,
  evaluate,
  evaluators,
  inference_methods,
  resolution,
  reward_models,
  rounds,
  sharding,
  stored,
  tables,
  train,
)
from rl_reasoning.config import Config, Rewards, Rollout, check
from rl_reasoning.data_from_checkpoint import split_steps
from rl_reasoning.estimates import bootstrap_interval, mean_and_error
from rl_reasoning.inference_methods import (
  Asked,
  BeamSearch,
  BudgetForcing,
  FewShot,
  Method,
  Point,
  Sampled,
  alike,
  by,
  make_methods,
)
from rl_reasoning.rewards import any_gold
from rl_reasoning.rounds import Chain, Source
from rl_reasoning.structs import PyTree
from rl_reasoning.tokenizer import THINK_INSTRUCTION, Tokenizer, after_thinking, from_thinking, render_completion, render_prompt

# Keys that act, as prefixes, and those that do where there are worked examples.
READ = (
  'model.dtype', 'model.attention', 'model.arch', 'roles.policy.tokenizer', 'roles.policy.template', 'roles.reward', 'data.task',
  'data.path', 'data.options', 'data.mixture', 'data.max_prompt_length', 'data.cache_dir', 'rollout.max_completion_length',
  'rollout.chunk', 'rollout.cache_dtype', 'mesh', 'eval.size', 'eval.batch_size', 'eval.seed',
)  # fmt: skip
EXAMPLES = ('seed', 'data.train_size')
FILES = ('scale_config.json', 'scale.json', 'scale.md', 'scale.png')


class Job(NamedTuple):
  config: Config
  methods: dict[str, Method]


def keys_read(methods: Mapping[str, Method]) -> tuple[str, ...]:
  return READ + (EXAMPLES if any(isinstance(m, FewShot) for m in methods.values()) else ())


def resolve(settings: Mapping[str, Any]) -> Job:
  """Raises ConfigError naming the key that is wrong or cannot act."""
  check('scale' in settings, "config section 'scale' is missing: it names the methods")
  given = {key: value for key, value in settings.items() if key != 'scale'}
  keys_set = set(config_lib.flatten(given))
  roles = given.get('roles', {})
  named = roles.get('reward', {}) if isinstance(roles, Mapping) else {}
  models = list(named) if isinstance(named, Mapping) else []  # what it is instead is told by config.resolve
  methods = make_methods(settings['scale'], models)
  idle = sorted({*models} - {by(method) for method in methods.values()})
  check(not idle, f"config key 'roles.reward.{', '.join(idle)}' cannot act: no method of scale goes by it")
  read = keys_read(methods)
  dead = sorted(key for key in keys_set if not evaluate.begins(key, read))
  check('roles.policy.init' not in dead, "config key 'roles.policy.init' cannot act here: --checkpoint stands for it")
  check(not dead, 'config keys that cannot act beside a section scale:\n  ' + '\n  '.join(map(repr, dead)))
  config = config_lib.resolve({**given, 'rewards': {'functions': tuple(models)}})
  refused = resolution.inert_sections(config)
  dead = [f'{key!r}: {refused[key]}' for key in sorted(keys_set) if key in refused]
  check(not dead, 'config keys that cannot act here:\n  ' + '\n  '.join(dead))
  return Job(config, methods)


def examples_of(config: Config, methods: Mapping[str, Method]) -> list[dict]:
  """The training rows that are shown: the first ones that differ in their prompt."""
  shots = max((m.shots for m in methods.values() if isinstance(m, FewShot)), default=0)
  if not shots:
    return []
  split = data.open_train(config.data, config.seed)
  once: dict[str, dict] = {}
  for row in split.preview(len(split)):
    worked = 'prompt' in row and ('completion' in row)
    check(worked, f'method few_shot: a training row has no worked answer (prompt, completion); columns: {", ".join(row)}')
    once.setdefault(json.dumps(row['prompt']), row)
    if len(once) == shots:
      break
  check(len(once) == shots, f'method few_shot: {shots} shots, but the training split has {len(once)} different prompts')
  return list(once.values())


def render(method: Method, row: Mapping[str, Any], examples: Sequence[dict], template: str, tok: Tokenizer) -> str:
  """What the policy goes on from."""
  prompt = method.question(row['prompt'])
  if not isinstance(method, FewShot):
    return render_prompt(prompt, template, tok) + method.prefix
  shown = examples[: method.shots]
  if template in ('chat', 'chat_think') or not isinstance(prompt, str):
    more = THINK_INSTRUCTION * (template == 'chat_think')

    def turns(asked: Any) -> list[dict]:
      return [{'role': 'user', 'content': asked + more}] if isinstance(asked, str) else list(asked)

    told = [turn for e in shown for turn in (*turns(e['prompt']), {'role': 'assistant', 'content': render_completion(e)})]
    return render_prompt([*told, *turns(prompt)], 'chat', tok) + method.prefix
  text = ''
  for e in shown:
    asked = render_prompt(e['prompt'], template, tok)
    text += asked + after_thinking(asked, render_completion(e)) + method.separator
  return text + render_prompt(prompt, template, tok) + method.prefix


class Bench(NamedTuple):
  """What all methods have in common."""

  run: build.Run
  params: PyTree
  frozen: Mapping[str, PyTree]  # weights of the reward models
  rows: list[dict]
  examples: list[dict]
  fingerprint: int
  folder: epath.Path


def prompts_of(bench: Bench, name: str, method: Method) -> tuple[list[str], list[list[int]]]:
  """(texts, token ids). Raises ConfigError for one beyond data.max_prompt_length."""
  config, tok = bench.run.config, bench.run.tokenizer
  texts = [render(method, row, bench.examples, config.roles.policy.template, tok) for row in bench.rows]
  prompts, limit = [tok.encode(text) for text in texts], config.data.max_prompt_length
  for row, ids in zip(bench.rows, prompts, strict=True):
    check(len(ids) <= limit, f"config key 'data.max_prompt_length': {limit}, but scale.{name} has a prompt of {len(ids)} tokens: "
          f'{data.excerpt(row["prompt"])}')  # fmt: skip
  return texts, prompts


def check_method(bench: Bench, name: str, method: Method) -> None:
  """Raises ConfigError for what only the tokenizer, the template or the problems can tell."""
  tok, template = bench.run.tokenizer, bench.run.config.roles.policy.template
  prompts_of(bench, name, method)
  if isinstance(method, FewShot):
    turns = template in ('chat', 'chat_think') or not isinstance(bench.rows[0]['prompt'], str)
    check(not turns or method.separator == FewShot.separator,
          f"config key 'scale.{name}.separator' cannot act: in a chat the examples are turns")  # fmt: skip
  if isinstance(method, BudgetForcing):
    for minimum, maximum in method.budgets:
      wait = len(tok.encode(method.wait))
      check(minimum == 0 or minimum + wait - 1 <= maximum, f"config key 'scale.{name}.budgets': ({minimum}, {maximum}) leaves no room for "
            f'the {wait} tokens of {method.wait!r}')  # fmt: skip
  if isinstance(method, BeamSearch) and bench.run.reward_models[by(method)].reads == 'answer':
    check(False, f"config key 'scale.{name}.by': {by(method)!r} reads answers only, and a beginning has none")


def sample_variant(bench: Bench, name: str, method: Method, models: Sequence[str]) -> list[dict]:
  """The judged samples of all problems, `method.samples` each, in the file NAME."""
  config, tok = bench.run.config, bench.run.tokenizer
  judges = {model: bench.run.reward_models[model] for model in models}
  chosen_models = {model: config.roles.reward[model] for model in models}
  own = dataclasses.replace(
    config, rewards=Rewards(functions=tuple(models)), roles=dataclasses.replace(config.roles, reward=chosen_models)
  )
  run = bench.run._replace(config=own, reward_models=judges)
  evaluator = evaluators.Evaluator(num_samples=method.samples)
  texts, prompts = prompts_of(bench, name, method)
  settings = Rollout(
    method.limit(config), method.temperature, method.top_k, method.top_p, method.min_p, config.rollout.chunk,
    config.rollout.cache_dtype,
  )  # fmt: skip
  source, size = Source(run, bench.params, settings, config.eval.seed), config.eval.batch_size

  def score(asked: Sequence[tuple[int, Chain]], ids: Sequence[int]) -> list[float]:
    made = bench.run.reward_models[by(method)]
    whole = [from_thinking(texts[ids[p]], tok.decode(chain.ids)) for p, chain in asked]
    separator = method.step_separator if isinstance(method, BeamSearch) else ''
    shown = [split_steps(text, separator) if made.process else text for text in whole]
    values, has = reward_models.score_texts(
      made, bench.frozen[f'reward.{by(method)}'], [bench.rows[ids[p]]['prompt'] for p, _ in asked], shown,
      [chain.ended for _, chain in asked], run.mesh,
    )  # fmt: skip
    return [float(v) if h else -math.inf for v, h in zip(values, has, strict=True)]

  def make(ids: list[int]) -> list[dict]:
    asked = Asked([prompts[i] for i in ids], ids, lambda pairs: score(pairs, ids), size)
    samples = []
    for index, (chain, tokens) in enumerate(method.make(source, asked)):
      problem = ids[index // method.samples]
      samples.append({
        'problem': problem, 'prompt': texts[problem], 'completion': tok.decode(chain.ids), 'completion_ids': chain.ids,
        'sampled': chain.sampled, 'length': len(chain.ids), 'injected': chain.sampled.count(0), 'tokens': tokens, 'logp': chain.logp,
        'thinking': chain.thinking, 'truncated': not chain.ended,
      })  # fmt: skip
    evaluators.judge(run, bench.rows, samples, evaluator, bench.frozen)
    return samples

  weights = {
    f'reward.{model}': bench.frozen[f'reward.{model}'] for model in (*models, by(method)) if model in bench.run.reward_models
  }
  of = evaluators.identity(run, bench.fingerprint, bench.rows, evaluator, weights)
  code = [pathlib.Path(str(module.__file__)) for module in (rounds, inference_methods)]
  guided = checkpoint.fingerprints(weights)
  of |= {'method': config_lib.digest([alike(method), texts, guided]), 'methods_code': data.content_hash(code)[:12]}
  file = evaluators.SampleFile(bench.folder / 'samples', name, of)
  return evaluators.in_batches(f'scale {name}', make, len(bench.rows), method.samples, size, file)


def summary(point: Point, samples: Sequence[dict], prompt_tokens: float) -> dict[str, Any]:
  """What a point says, over the problems that have a gold answer."""
  judged = [i for i, right in enumerate(point.right) if right is not None]
  found: dict[str, Any] = {'label': point.label, 'problems': len(judged), 'prompt_tokens': prompt_tokens}
  for key, values in (('accuracy', point.right), ('tokens', point.tokens)):
    x = [float(values[i] or 0.0) for i in judged]
    found[key], error = mean_and_error(x)
    if len(x) > 1:
      found |= {f'{key}_stderr': error, f'{key}_ci95': bootstrap_interval(x)}
  for key in ('truncated', 'format', 'injected', 'thinking'):
    known = [s[key] for s in samples if s[key] is not None]
    found[key] = float(np.mean(known)) if known else None
  return found


def scale(job: Job, source: str, workdir: str, overwrite: bool = False) -> dict[str, Any]:
  """Samples, or goes on; writes scale.json, which it returns, scale.md and scale.png. Raises ConfigError."""
  wanted, methods = job
  bare = dataclasses.replace(wanted, rewards=Rewards(functions=()), roles=dataclasses.replace(wanted.roles, reward={}))
  run, params, _ = evaluate.open_run(bare, source)
  check(run.speaks, f'--checkpoint={source}: is a reward model: it has no head for text')
  models, frozen = build.load_reward_models(wanted, run.mesh, process=True)
  config = dataclasses.replace(run.config, roles=dataclasses.replace(run.config.roles, reward=wanted.roles.reward))
  limits = [variant.limit(config) for m in methods.values() for variant in m.variants().values()]
  arch = run.arch.for_length(
    config.data.max_prompt_length + max(limits)
  )  # a forced budget may be longer than a completion's limit
  run = run._replace(config=config, reward_models=models, arch=arch)
  sharding.check_rows('eval.batch_size', config.eval.batch_size, run.mesh)
  flat = config_lib.flatten(config_lib.to_dict(config))
  read = keys_read(methods)
  settings = {k: v for k, v in flat.items() if evaluate.begins(k, read) and not evaluate.begins(k, evaluate.ELSEWHERE)}
  settings |= {f'scale.{name}': dataclasses.asdict(method) for name, method in methods.items()}
  with jax.set_mesh(run.mesh):
    rows, folder = data.open_test(config.data, config.eval.seed, config.eval.size), epath.Path(workdir)
    bench = Bench(run, params, frozen, rows, examples_of(config, methods), int(checkpoint.fingerprint(params)), folder)
    for name, method in methods.items():
      check_method(bench, name, method)
    check(any_gold(rows), 'no problem of the task has a gold answer that can be checked')
    check(not stored.is_run(workdir), f'--workdir={workdir} holds a training run')
    about = {'checkpoint': source, 'fingerprint': bench.fingerprint, 'config': settings}
    about |= {'frozen': checkpoint.fingerprints(frozen)} if frozen else {}
    evaluate.open_workdir(folder, FILES, about, 'the curves of another config', overwrite)
    finished = folder / FILES[1]
    if finished.exists():
      return train.read_json(finished)
    result: dict[str, Any] = {
      'checkpoint': source, 'fingerprint': bench.fingerprint, 'config_hash': config_lib.digest(settings), 'hardware': evaluate.hardware(),
      'problems': len(rows), 'methods': {}, 'seconds': 0.0,
    }  # fmt: skip
    drawn: dict[str, tuple[str, list[dict]]] = {}  # alike -> (name of the file, samples)
    for name, method in methods.items():
      points, files = [], []
      for label, variant in method.variants().items():
        key = alike(variant)
        sharing = [m for m in methods.values() if key in map(alike, m.variants().values())]
        if isinstance(variant, Sampled):  # the most that one of them asks for
          variant = dataclasses.replace(variant, num_samples=(max(m.samples for m in sharing),))
        if key not in drawn:
          file = f'{name} {label}'.strip()
          asked = [] if isinstance(variant, BeamSearch) else list(dict.fromkeys(by(m) for m in sharing if by(m) in models))
          drawn[key] = file, sample_variant(bench, file, variant, asked)
          result['seconds'] += train.read_json(folder / 'samples' / f'{file}.json')['seconds']
        file, samples = drawn[key]
        files.append(file)
        groups = [samples[i : i + variant.samples] for i in range(0, len(samples), variant.samples)]
        length = float(np.mean([len(ids) for ids in prompts_of(bench, name, variant)[1]]))
        points += [summary(point, samples, length) for point in method.points(label, groups)]
      own = {key: value for key, value in dataclasses.asdict(method).items() if key in ('method', 'by')}
      result['methods'][name] = {**own, 'samples': files, 'points': points}
  train.write_atomically(folder / FILES[2], tables.scale_markdown(result))
  tables.plot_scale(result, folder / FILES[3])
  train.write_atomically(finished, json.dumps(result, indent=1))
  return result
