"""Completions of a checkpoint: sampled as evaluations sample, judged by the rewards, kept as data_kept.py has it."""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from rl_reasoning import build, checkpoint, config as config_lib, data, evaluate, evaluators, sharding, train
from rl_reasoning.config import Rewards, check
from rl_reasoning.data_kept import keep_of, mean, others
from rl_reasoning.data_settings import BY_STEPS, BY_VERDICT, Generate, Job
from rl_reasoning.rewards import REWARDS, any_gold, as_given, columns_of
from rl_reasoning.structs import PyTree


def split_steps(text: str, separator: str) -> list[str]:
  """Steps that join to the text, each with the separator that ends it; one that says nothing belongs to its neighbour."""

  def blank(step: str) -> bool:
    return not step.replace(separator, '').strip()

  steps: list[str] = []
  for piece in re.findall(f'.*?{re.escape(separator)}|.+', text, re.DOTALL):
    if steps and (blank(piece) or blank(steps[-1])):
      steps[-1] += piece
    else:
      steps.append(piece)
  return steps


class Sampler(NamedTuple):
  """What draws and judges completions: the one place that calls the evaluators' sampling."""

  run: build.Run
  params: PyTree
  frozen: Mapping[str, PyTree]  # weights of reward models
  generate: Generate
  folder: epath.Path

  def __call__(self, rows: Sequence[dict], name: str, num_samples: int, seed: int) -> list[dict]:
    g, config = self.generate, self.run.config
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=g.batch_size))
    evaluator = evaluators.Evaluator(
      seed=seed, num_samples=num_samples, temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p
    )
    run = self.run._replace(config=config)
    return evaluators.sample_problems(run, self.params, rows, name, evaluator, self.folder, self.frozen)

  def to_continue(self) -> Sampler:
    """For texts that are rendered already, template and chat markers included, and that are judged elsewhere."""
    config = self.run.config
    config = dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, max_prompt_length=sys.maxsize),  # the problems have passed it
      roles=dataclasses.replace(config.roles, policy=dataclasses.replace(config.roles.policy, template='plain')),
      rewards=Rewards(functions=('accuracy_flexible',)),
    )
    return self._replace(run=self.run._replace(config=config, reward_models={}), frozen={})

  def seconds(self, name: str) -> float:
    path = self.folder / f'{name}.json'
    return train.read_json(path)['seconds'] if path.exists() else 0.0


def label_steps(sampler: Sampler, chosen: Sequence[tuple[dict, dict]]) -> tuple[list[dict], list[dict]]:
  """(rows of `keep` steps for (problem, completion) pairs, the continuations that were sampled for them).

  A beginning that two completions of a problem share is continued once. What is judged is the whole of beginning and continuation; a
  continuation without an end token has reached nothing.
  """
  g = sampler.generate
  chains = [(row, sample, split_steps(sample['completion'], g.step_separator)) for row, sample in chosen]
  starts: dict[tuple[str, str], dict] = {}  # (rendered prompt, beginning) -> problem
  for row, sample, steps in chains:
    starts |= {(sample['prompt'], ''.join(steps[:n])): row for n in range(1, len(steps))}
  found = sorted(starts.items(), key=lambda item: len(item[0][0]) + len(item[0][1]))  # like lengths share a batch: less padding
  rows = [{**others(row), 'prompt': asked + begun} for (asked, begun), row in found]
  seed = int(config_lib.digest(['steps', g.seed])[:8], 16)  # not the numbers by which the chain itself was drawn
  continued = sampler.to_continue()(rows, 'continuations', g.rollouts_per_step, seed) if rows else []
  share = {}
  for index, ((asked, begun), row) in enumerate(found):
    some = continued[index * g.rollouts_per_step : (index + 1) * g.rollouts_per_step]
    given = [as_given(row['prompt'], asked, begun + s['completion']) for s in some]
    questions, answers = map(list, zip(*given, strict=True))
    verdicts = REWARDS['accuracy_flexible'](
      questions, answers, [s['completion_ids'] for s in some], **columns_of([row] * len(some))
    )
    reached = [verdict == 1 and not s['truncated'] for verdict, s in zip(verdicts, some, strict=True)]
    share[asked, begun] = sum(reached) / len(reached)
  made = []
  for row, sample, steps in chains:
    labels = [share[sample['prompt'], ''.join(steps[:n])] for n in range(1, len(steps))]
    made.append({'prompt': row['prompt'], 'completions': steps, 'labels': [*labels, sample['accuracy']]})
  return made, continued


def to_condition(row: Mapping[str, Any], g: Generate) -> dict[str, Any]:
  """A demonstration of judged steps, each behind the label that says what came of it."""
  marked = [
    (g.good if label >= g.threshold else g.bad) + step for step, label in zip(row['completions'], row['labels'], strict=True)
  ]
  return {'prompt': row['prompt'], 'completion': ''.join(marked)}


def make_data(sampler: Sampler, rows: Sequence[dict]) -> tuple[list[dict], dict[str, Any]]:
  """(rows of `generate.keep`, what was counted on the way)."""
  g, tok = sampler.generate, sampler.run.tokenizer
  samples = sampler(rows, 'samples', g.num_samples, g.seed)
  dropped: collections.Counter[str] = collections.Counter()
  made, kept, owners = keep_of(rows, samples, 'labels' if g.keep in BY_STEPS else g.keep, g, dropped)
  counted: dict[str, Any] = {}
  continued: list[dict] = []
  if g.keep in BY_STEPS:
    made, continued = label_steps(sampler, list(zip(owners, kept, strict=True)))
    labels = [label for row in made for label in row['labels']]
    counted = {'steps': len(labels), 'continuations': len(continued), 'label': sum(labels) / len(labels) if labels else None}
  if g.keep == 'conditioned':
    made = [to_condition(row, g) for row in made]
  # Text that a tokenizer cuts otherwise than the policy did, or that is no text (half a character), is imitated by other tokens.
  differs = sum(tok.encode(s['completion']) != [i for i in s['completion_ids'] if i not in tok.end_ids] for s in kept)
  return made, {
    'prompts': len(rows), 'samples': len(samples), 'kept': len(kept), 'dropped': dropped, **counted,
    'reward': {'all': mean(samples, 'reward'), 'kept': mean(kept, 'reward')},
    'accuracy': {'all': mean(samples, 'accuracy'), 'kept': mean(kept, 'accuracy')},
    'other_tokens': differs, 'tokens': sum(s['length'] for s in samples + continued),
    'seconds': sampler.seconds('samples') + (sampler.seconds('continuations') if continued else 0.0),
  }  # fmt: skip


class Checkpoint:
  """The source of data that a job names; opening it loads the weights."""

  def __init__(self, job: Job):
    self.job, self.path = job, job.config.roles.policy.init
    self.run, self.params, self.frozen = evaluate.open_run(job.config, self.path)
    check(self.run.speaks, f"config key 'roles.policy.init': {self.path} is a reward model: it has no head for text")
    sharding.check_rows('generate.batch_size', job.generate.batch_size, self.run.mesh)
    self.config = self.run.config
    fingerprint = int(checkpoint.fingerprint(self.params))
    self.told = {'checkpoint': self.path, 'fingerprint': fingerprint}
    self.about: dict[str, Any] = {'fingerprint': fingerprint}
    if self.frozen:
      self.about['frozen'] = checkpoint.fingerprints(self.frozen)

  def check(self, rows: Sequence[dict]) -> None:
    config, g = self.config, self.job.generate
    # Too long a prompt is told now, under its own key.
    data.encode_prompts(rows, self.run.tokenizer, config.roles.policy.template, config.data.max_prompt_length)
    gold = g.keep not in BY_VERDICT or any_gold(rows)
    check(gold, f"config key 'generate.keep': {g.keep!r} goes by verdicts, and no problem has a gold answer that can be checked")

  def make(self, rows: Sequence[dict], folder: epath.Path) -> tuple[list[dict], dict[str, Any]]:
    with jax.set_mesh(self.run.mesh):
      return make_data(Sampler(self.run, self.params, self.frozen, self.job.generate, folder / 'samples'), rows)
