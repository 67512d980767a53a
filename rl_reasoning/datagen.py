"""Data made by a checkpoint: completions sampled from it, judged, and kept as rows that a later run trains on.

  python -m rl_reasoning.datagen --config=FILE.py:NAME=VALUE --workdir=DIR [--config.KEY=VALUE ...] [--overwrite]

get_config returns the keys of a training run that sampling reads (READ; roles.policy.init names the checkpoint) and a section `generate`.
A stage of a pipeline that has the section does the same, and a later stage trains on '{workdir}/STAGE/data.jsonl' (`data.path`; of this
single file tasks.dataset holds one prompt in ten out as the test split, by the hash by which procedural tasks have done so before).
DIR holds data.jsonl (when all is done), summary.json (what was kept, and why the rest was not), config.json and samples/, from which the
same command goes on after an interruption, bit for bit. Exit codes: 0, 2.

`generate.keep` says which completions become which rows (verified: accuracy 1, whatever the format):
  all       prompt, responses, counts, rewards, correct: all that differ, two or more, for ranking by hand or by a judge
  best      prompt, completion, reward: the highest reward of each prompt, for SFT (best of K: rejection sampling, Llama 2, 2307.09288)
  correct   prompt, completion, reward: every verified one, for SFT (expert iteration, 1705.08439; ReST-EM, 2312.06585)
  ranking   prompt, responses, ranks by reward, equal rewards tied: for reward models and preference losses
  pairs     prompt, responses [verified, not verified], ranks [0, 1]: the same, without a reward (rl_reasoning.verified_pairs makes them
            later, of what 'all' has kept)
  labels    prompt, completion, label (accuracy): for outcome reward models and KTO
  steps     prompt, completions (the steps of one), labels: for process reward models. A step's label is the share of `rollouts_per_step`
            continuations from its end that reach the right answer, of the last step the verdict itself (Math-Shepherd, 2312.08935)
Equal completions of a prompt count once. Empty ones and those without an end token are left out: whoever trains on the latter appends an
end where the policy made none. All of them are in samples/.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.datagen')

import collections
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from rl_reasoning import build, checkpoint, config as config_lib, data, environment, evaluate, evaluators, sharding, train
from rl_reasoning.config import Config, Rewards, check, coerce
from rl_reasoning.rewards import REWARDS, as_given, check_rewards, columns_of
from rl_reasoning.structs import PyTree
from rl_reasoning.verified_pairs import spread

# Keys that act here, as prefixes; `seed` is that of the rows, as in training, and generate.seed that of the samples.
READ = (
  'seed', 'model.dtype', 'model.arch', 'roles.policy', 'roles.reward', 'data.task', 'data.path', 'data.options', 'data.mixture',
  'data.train_size', 'data.max_prompt_length', 'data.cache_dir', 'rollout.max_completion_length', 'rollout.chunk', 'rewards', 'mesh',
)  # fmt: skip
# Of these, what says where things lie: the checkpoint is known by its fingerprint.
ELSEWHERE = ('mesh', 'data.cache_dir', 'roles.policy.init')
FILES = ('config.json', 'data.jsonl', 'summary.json')
# Columns of the problem that tell how it is answered: beside our completion they would be imitated in its place.
DEMONSTRATION = ('completion', 'chain_of_thought', 'messages')


@dataclasses.dataclass(frozen=True)
class Generate:
  keep: str = 'all'  # a name of KEEP, or 'steps'
  split: str = 'train'  # train (in the order of a run of the same seed) | test
  first: int = 0  # how many problems of the split to pass over, so that another round asks others
  size: int = 0  # problems; 0: all the training split has
  num_samples: int = 8  # completions a problem
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0  # of the samples
  batch_size: int = 64  # problems at once
  max_per_prompt: int = 0  # completions a problem (pairs: rows), the first sampled; 0: no limit
  min_reward: float | None = None  # what a completion must be worth to be kept
  step_separator: str = '\n'  # ends a step
  rollouts_per_step: int = 8


# Options that act with some kinds of `keep` only.
ONLY = {
  'max_per_prompt': ('correct', 'ranking', 'pairs', 'labels', 'steps'),
  'min_reward': ('best', 'correct'),
  'step_separator': ('steps',),
  'rollouts_per_step': ('steps',),
}
BY_VERDICT, BY_REWARD = ('correct', 'pairs', 'labels', 'steps'), ('best', 'ranking')


class Job(NamedTuple):
  config: Config
  generate: Generate
  keys_set: set[str]  # of both


def resolve(settings: Mapping[str, Any]) -> Job:
  """Raises ConfigError naming the key."""
  check('generate' in settings, "config section 'generate' is missing: it says what is sampled and kept")
  config = config_lib.resolve({key: value for key, value in settings.items() if key != 'generate'})
  return Job(config, coerce(settings['generate'], Generate, 'generate'), set(config_lib.flatten(settings)))


def check_generate(g: Generate, given: set[str]) -> None:
  """Raises ConfigError for what is out of range, and for keys of `given` that cannot act beside the others."""
  kinds = (*KEEP, 'steps')
  check(g.keep in kinds, f"config key 'generate.keep': {g.keep!r} is none of {', '.join(kinds)}")
  check(g.split in ('train', 'test'), f"config key 'generate.split': {g.split!r} is none of train, test")
  ranges = {
    'first': g.first >= 0, 'size': g.size >= 0, 'num_samples': g.num_samples >= 1, 'temperature': g.temperature >= 0,
    'top_k': g.top_k >= 0, 'top_p': 0 < g.top_p <= 1, 'min_p': 0 <= g.min_p < 1, 'seed': 0 <= g.seed < 2**32,
    'batch_size': g.batch_size >= 1, 'max_per_prompt': g.max_per_prompt >= 0, 'step_separator': bool(g.step_separator),
    'rollouts_per_step': g.rollouts_per_step >= 1,
  }  # fmt: skip
  for field, good in ranges.items():
    check(good, f"config key 'generate.{field}': {getattr(g, field)!r} is out of range")
  for field, keeps in ONLY.items():
    check(f'generate.{field}' not in given or g.keep in keeps,
          f"config key 'generate.{field}' cannot act: it is for generate.keep {', '.join(keeps)}, not {g.keep}")  # fmt: skip
  for field in ('top_k', 'top_p', 'min_p'):
    check(
      g.temperature > 0 or f'generate.{field}' not in given, f"config key 'generate.{field}' cannot act: temperature 0 is greedy"
    )
  sampled = g.num_samples if g.keep != 'steps' else max(g.num_samples, g.rollouts_per_step)
  check(sampled == 1 or g.temperature > 0,
        f"config key 'generate.temperature': {g.temperature} is greedy, {sampled} samples would be all equal")  # fmt: skip
  several = g.keep not in ('all', 'ranking', 'pairs') or g.num_samples > 1
  check(several, f"config key 'generate.num_samples': {g.num_samples} leaves nothing to compare for generate.keep {g.keep}")
  check(g.keep != 'ranking' or g.max_per_prompt != 1, "config key 'generate.max_per_prompt': 1 leaves nothing to compare")
  check(g.split == 'train' or g.size > 0, "config key 'generate.size': say how many problems of the test split")


def check_job(job: Job, earlier: Sequence[str] = ()) -> None:
  """Raises ConfigError for what can be told wrong before anything is sampled. Runs of `earlier` need not exist yet."""
  config, g, keys_set = job
  check_generate(g, keys_set)
  idle = build.inert_sections(config)
  ours = {key for key in keys_set if not evaluate.begins(key, ('generate',))}
  dead = [
    repr(key) + (f': {idle[key]}' if key in idle else '') for key in sorted(ours) if key in idle or not evaluate.begins(key, READ)
  ]
  check(not dead, 'config keys that cannot act beside a section generate:\n  ' + '\n  '.join(dead))
  source = config.roles.policy.init
  check(bool(source), "config key 'roles.policy.init' is empty: it names the checkpoint that is sampled from")
  inits = {'policy': source, **{f'reward.{name}': role.init for name, role in config_lib.reward_roles(config).items()}}
  for role, init in inits.items():
    check(init in earlier or pathlib.Path(init).exists(), f"config key 'roles.{role}.init': {init!r} does not exist")
  rewards, paid = config.rewards, g.keep in BY_REWARD or g.min_reward is not None
  check(bool(rewards.functions), "config key 'rewards.functions': empty, completions would be worth nothing")
  check(
    not rewards.weights or any(rewards.weights) or not paid, "config key 'rewards.weights': all 0, but what is kept goes by them"
  )
  check_rewards(rewards, config.rollout.max_completion_length, build.model_names(config))


def sift(samples: list[dict], dropped: collections.Counter, reason: str, good: Callable[[dict], bool]) -> list[dict]:
  """The good ones; the others are counted."""
  kept = [s for s in samples if good(s)]
  dropped[reason] += len(samples) - len(kept)
  return kept


def distinct(samples: list[dict], dropped: collections.Counter) -> list[dict]:
  """Completions of a prompt that have an end and a text, each text once, as they were sampled; `count` tells how often."""
  samples = sift(samples, dropped, 'truncated', lambda s: not s['truncated'])
  samples = sift(samples, dropped, 'empty', lambda s: bool(s['completion'].strip()))
  first: dict[str, dict] = {}
  for s in samples:
    first.setdefault(s['completion'], {**s, 'count': 0})['count'] += 1
  dropped['duplicate'] += len(samples) - len(first)
  return list(first.values())


def limited(samples: list[dict], dropped: collections.Counter, limit: int) -> list[dict]:
  dropped['over max_per_prompt'] += max(0, len(samples) - limit) if limit else 0
  return samples[: limit or None]


def judged(samples: list[dict], dropped: collections.Counter, key: str) -> list[dict]:
  """Those of which the rewards ('reward') or the verifier ('accuracy') say something."""
  return sift(samples, dropped, f'no {key}', lambda s: s[key] is not None)


def worth(samples: list[dict], dropped: collections.Counter, least: float | None) -> list[dict]:
  if least is None:
    return samples
  least -= 1e-6 * max(1.0, abs(least))  # rewards are sums in float32: 0.7 of a config is above 0.7 of a reward
  return sift(samples, dropped, 'below min_reward', lambda s: s['reward'] is not None and s['reward'] >= least)


def others(row: Mapping[str, Any]) -> dict[str, Any]:
  """The problem's further columns (its gold answer among them)."""
  return {key: value for key, value in row.items() if key not in ('prompt', *DEMONSTRATION)}


def to_imitate(row: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
  """A demonstration: the policy's own text, which tokenizer.render_completion leaves as it stands."""
  return {**others(row), 'prompt': row['prompt'], 'completion': sample['completion'], 'reward': sample['reward']}


# What a kind of `keep` makes of one problem: (problem, its samples, settings, counts of what is left out) -> (rows, samples in them).
Kept = tuple[list[dict], list[dict]]


def keep_all(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = distinct(samples, dropped)
  kept = sift(left, dropped, 'nothing to compare with', lambda s: len(left) > 1)
  found = {'prompt': row['prompt'], 'responses': [s['completion'] for s in kept], 'counts': [s['count'] for s in kept],
           'rewards': [s['reward'] for s in kept]}  # fmt: skip
  correct = [s['accuracy'] for s in kept]
  found |= {'correct': correct} if any(c is not None for c in correct) else {}
  return [{**others(row), **found}] if kept else [], kept


def keep_best(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'reward')
  best = max(left, key=lambda s: s['reward'], default=None)  # of equal ones the first
  kept = worth(sift(left, dropped, 'not the best', lambda s: s is best), dropped, g.min_reward)
  return [to_imitate(row, s) for s in kept], kept


def keep_correct(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'accuracy')
  left = worth(sift(left, dropped, 'not verified', lambda s: s['accuracy'] == 1), dropped, g.min_reward)
  kept = limited(left, dropped, g.max_per_prompt)
  return [to_imitate(row, s) for s in kept], kept


def keep_ranking(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = limited(judged(distinct(samples, dropped), dropped, 'reward'), dropped, g.max_per_prompt)
  levels = sorted({s['reward'] for s in left}, reverse=True)
  kept = sift(left, dropped, 'nothing to compare with', lambda s: len(levels) > 1)
  ranking = {
    'prompt': row['prompt'],
    'responses': [s['completion'] for s in kept],
    'ranks': [levels.index(s['reward']) for s in kept],
  }
  return [ranking] if kept else [], kept


def keep_pairs(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'accuracy')
  right, wrong = [s for s in left if s['accuracy'] == 1], [s for s in left if s['accuracy'] < 1]
  left = sift(left, dropped, 'nothing to compare with', lambda s: bool(right) and bool(wrong))
  pairs = spread(len(right), len(wrong), g.max_per_prompt) if left else []
  used = {id(right[i]) for i, _ in pairs} | {id(wrong[j]) for _, j in pairs}
  kept = sift(left, dropped, 'over max_per_prompt', lambda s: id(s) in used)
  responses = [[right[i]['completion'], wrong[j]['completion']] for i, j in pairs]
  return [{'prompt': row['prompt'], 'responses': texts, 'ranks': [0, 1]} for texts in responses], kept


def keep_labels(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  kept = limited(judged(distinct(samples, dropped), dropped, 'accuracy'), dropped, g.max_per_prompt)
  return [{'prompt': row['prompt'], 'completion': s['completion'], 'label': s['accuracy']} for s in kept], kept


KEEP: dict[str, Callable[[dict, list[dict], Generate, collections.Counter], Kept]] = {
  'all': keep_all,
  'best': keep_best,
  'correct': keep_correct,
  'ranking': keep_ranking,
  'pairs': keep_pairs,
  'labels': keep_labels,
}


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

  def to_continue(self) -> 'Sampler':
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


def problems(job: Job) -> tuple[list[dict], int]:
  """(the problems that are asked, each prompt once; how many draws repeated one). Raises ConfigError."""
  config, g = job.config, job.generate
  if g.split == 'train':
    split = data.open_train(config.data, config.seed)
    count = len(split)
    rows = split.draw(split.first(), min(count, g.first + (g.size or count)))[0]
  else:
    rows = data.open_test(config.data, config.seed, g.first + g.size)
    count = len(rows)
  wanted = f"config keys 'generate.first' and 'generate.size': {g.first} and {g.size}"
  check(g.first + max(g.size, 1) <= count, f'{wanted}, but the {g.split} split has {count} problems')
  rows = rows[g.first : g.first + g.size if g.size else None]  # of a mixture every task gives one, and that may be more
  for row in rows:
    check('prompt' in row, f'a row has no column prompt to complete; columns: {", ".join(row)}')
  once = {json.dumps(row['prompt']): row for row in reversed(rows)}  # the first of each
  return list(reversed(once.values())), len(rows) - len(once)


def mean(samples: Sequence[Mapping[str, Any]], key: str) -> float | None:
  values = [s[key] for s in samples if s[key] is not None]
  return sum(values) / len(values) if values else None


def make_data(sampler: Sampler, rows: Sequence[dict]) -> tuple[list[dict], dict[str, Any]]:
  """(rows of `generate.keep`, what was counted on the way)."""
  g, tok = sampler.generate, sampler.run.tokenizer
  samples = sampler(rows, 'samples', g.num_samples, g.seed)
  dropped: collections.Counter[str] = collections.Counter()
  made: list[dict] = []
  kept: list[dict] = []
  owners: list[dict] = []  # the problem of each in `kept`
  choose = KEEP['labels' if g.keep == 'steps' else g.keep]
  for index, row in enumerate(rows):
    some, chosen = choose(row, samples[index * g.num_samples : (index + 1) * g.num_samples], g, dropped)
    made += some
    kept += chosen
    owners += [row] * len(chosen)
  counted: dict[str, Any] = {}
  continued: list[dict] = []
  if g.keep == 'steps':
    made, continued = label_steps(sampler, list(zip(owners, kept, strict=True)))
    labels = [label for row in made for label in row['labels']]
    counted = {'steps': len(labels), 'continuations': len(continued), 'label': sum(labels) / len(labels) if labels else None}
  # Text that a tokenizer cuts otherwise than the policy did, or that is no text (half a character), is imitated by other tokens.
  differs = sum(tok.encode(s['completion']) != [i for i in s['completion_ids'] if i not in tok.end_ids] for s in kept)
  return made, {
    'prompts': len(rows), 'samples': len(samples), 'rows': len(made), 'kept': len(kept),
    'dropped': {reason: count for reason, count in sorted(dropped.items()) if count}, **counted,
    'reward': {'all': mean(samples, 'reward'), 'kept': mean(kept, 'reward')},
    'accuracy': {'all': mean(samples, 'accuracy'), 'kept': mean(kept, 'accuracy')},
    'other_tokens': differs, 'tokens': sum(s['length'] for s in samples + continued),
    'seconds': sampler.seconds('samples') + (sampler.seconds('continuations') if continued else 0.0),
  }  # fmt: skip


def generate(job: Job, workdir: str, overwrite: bool = False) -> dict[str, Any]:
  """Samples, or goes on; writes data.jsonl and the summary that it returns. Raises ConfigError, also where no row is left."""
  check_job(job)
  g, folder, source = job.generate, epath.Path(workdir), job.config.roles.policy.init
  run, params, frozen = evaluate.open_run(job.config, source)
  config = run.config
  check(run.speaks, f"config key 'roles.policy.init': {source} is a reward model: it has no head for text")
  devices = sharding.axis_size(run.mesh, 'rows')
  check(g.batch_size % devices == 0, f"config key 'generate.batch_size': {g.batch_size} does not divide over the {devices} row shards of "
        f'mesh {dict(run.mesh.shape)}')  # fmt: skip
  flat = config_lib.flatten(config_lib.to_dict(config))
  settings = {key: value for key, value in flat.items() if evaluate.begins(key, READ) and not evaluate.begins(key, ELSEWHERE)}
  fingerprint = int(checkpoint.fingerprint(params))
  with jax.set_mesh(run.mesh):
    rows, repeated = problems(job)
    # Too long a prompt is told now, under its own key.
    data.encode_prompts(rows, run.tokenizer, config.roles.policy.template, config.data.max_prompt_length)
    verdicts = (REWARDS['accuracy_flexible']([''], [''], [[]], **columns_of([row]))[0] for row in rows)
    gold = g.keep not in BY_VERDICT or any(verdict is not None for verdict in verdicts)
    check(gold, f"config key 'generate.keep': {g.keep!r} goes by verdicts, and no problem has a gold answer that can be checked")
    check(not build.is_run(workdir), f'--workdir={workdir} holds a training run')
    about = {'fingerprint': fingerprint, 'config': settings, 'generate': dataclasses.asdict(g)}
    evaluate.open_workdir(folder, FILES, about, 'data of another config', overwrite)
    finished = folder / 'summary.json'
    if finished.exists():
      return train.read_json(finished)
    made, counted = make_data(Sampler(run, params, frozen, g, folder / 'samples'), rows)
  check(bool(made), f"config key 'generate.keep': {g.keep} leaves none of {counted['samples']} completions: {counted['dropped']}")
  train.write_atomically(folder / 'data.jsonl', ''.join(json.dumps(row) + '\n' for row in made))
  summary = {'checkpoint': source, 'fingerprint': fingerprint, 'keep': g.keep, 'repeated_prompts': repeated, **counted}
  train.write_atomically(finished, json.dumps(summary, indent=1))
  return summary


def describe(summary: Mapping[str, Any]) -> str:
  """One line of what came out."""
  why = ', '.join(f'{count} {reason}' for reason, count in summary['dropped'].items())
  return (f'{summary["rows"]} rows of {summary["kept"]} completions, kept of {summary["samples"]} ({summary["keep"]})'
          + f'; left out: {why}' * bool(why))  # fmt: skip


def command(argv: list[str]) -> None:
  flags = train.read_flags(argv, ('config', 'workdir', 'overwrite', 'config.KEY'))
  check(bool(flags.get('workdir')), '--workdir=DIR is missing')
  settings = config_lib.read_file(flags['config'])
  check('stages' not in settings, f'{flags["config"]}: the stages of a pipeline: rl_reasoning.pipeline runs them')
  environment.cache_compilations()
  summary = generate(resolve(train.overridden(settings, flags)), flags['workdir'], 'overwrite' in flags)
  print(f'{flags["workdir"]}/data.jsonl: {describe(summary)}')


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
