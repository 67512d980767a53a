"""Data for a later run: completions of a checkpoint or of a model behind an API, judged and kept as rows, or a published set converted.

  python -m rl_reasoning.datagen --config=FILE.py:NAME=VALUE --workdir=DIR [--config.KEY=VALUE ...] [--overwrite]

get_config returns the keys of a training run that are read here (READ) and a section `generate` (data_settings.Generate). A stage of a
pipeline that has the section does the same, and a later stage trains on '{workdir}/STAGE/data.jsonl' (`data.path`; of this single file
tasks.dataset holds one prompt in ten out as the test split, by the hash by which procedural tasks have done so before).
DIR holds data.jsonl (when all is done) and array_record/ (the same rows), README.md (their card: source, model, settings, licence, counts,
filters), summary.json (what was kept, and why the rest was not), config.json, and samples/ or answers.jsonl, from which the same command
goes on after an interruption, bit for bit. Exit codes: 0 (also where a budget ended: `not_asked` of the summary), 2.

`generate.source` says where completions come from; data.* says what is asked:
  checkpoint  roles.policy.init, sampled as an evaluation samples (data_from_checkpoint.py)
  api         an OpenAI-compatible endpoint, generate.api (data_from_api.py)
  published   nothing is asked: the chains that the tasks show themselves (data_from_sets.py), as those of tasks.reasoning_sets

`generate.keep` says which completions become which rows (verified: accuracy 1, whatever the format); without a checkpoint 'reasoning':
  all       prompt, responses, counts, rewards, correct: all that differ, two or more, for ranking by hand or by a judge
  best      prompt, completion, reward: the highest reward of each prompt, for SFT (best of K: rejection sampling, Llama 2, 2307.09288)
  correct   prompt, completion, reward: every verified one, for SFT (expert iteration, 1705.08439; ReST-EM, 2312.06585)
  reasoning prompt, chain_of_thought, completion: every one in the format, for SFT (cold start and rejection sampling of DeepSeek-R1);
            `verify` says what becomes of those that are wrong, and of those without a verdict
  ranking   prompt, responses, ranks by reward, equal rewards tied: for reward models and preference losses
  pairs     prompt, responses [verified, not verified], ranks [0, 1]: the same, without a reward (rl_reasoning.verified_pairs makes them
            later, of what 'all' has kept)
  labels    prompt, completion, label (accuracy): for outcome reward models and KTO
  steps     prompt, completions (the steps of one), labels: for process reward models. A step's label is the share of `rollouts_per_step`
            continuations from its end that reach the right answer, of the last step the verdict itself (Math-Shepherd, 2312.08935)
  conditioned prompt, completion: the steps, each behind `good` where its label is at least `threshold`, else behind `bad`, for SFT
            (return-conditioned RL, 2403.04642); the method 'conditioned' of rl_reasoning.inference then asks for good ones
Equal completions of a prompt count once. Empty ones and those without an end token are left out: whoever trains on the latter appends an
end where the policy made none. All of them are in samples/. Rows for SFT can be decontaminated against evaluation sets and rid of near
duplicates (`decontaminate`, `near_duplicates`: dedup.py).
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.datagen')

import collections
import dataclasses
import json
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from rl_reasoning import config as config_lib, data, data_written, environment, evaluate, resolution, stored, train
from rl_reasoning.config import Config, check
from rl_reasoning.data_from_api import Teacher
from rl_reasoning.data_from_checkpoint import Checkpoint
from rl_reasoning.data_from_sets import Published
from rl_reasoning.data_settings import BUYING, BY_REWARD, Job, check_generate, resolve
from rl_reasoning.rewards import check_rewards

# Keys that act here, as prefixes; `seed` is that of the rows, as in training, and generate.seed that of the samples.
ASKED = ('seed', 'data.task', 'data.path', 'data.options', 'data.mixture', 'data.train_size', 'data.cache_dir')
READ = (
  *ASKED, 'model.dtype', 'model.attention', 'model.arch', 'roles.policy', 'roles.reward', 'data.max_prompt_length',
  'rollout.max_completion_length', 'rollout.chunk', 'rollout.cache_dtype', 'rewards', 'mesh',
)  # fmt: skip
# Of these, what says where things lie: the checkpoint is known by its fingerprint.
ELSEWHERE = ('mesh', 'model.attention', 'data.cache_dir', 'roles.policy.init')


class Source(Protocol):
  """Where completions come from. Opening one (with a job) raises ConfigError for what is wrong with its settings."""

  told: dict[str, Any]  # who answered, for summary and card
  about: dict[str, Any]  # what beside the settings decides the rows

  def check(self, rows: Sequence[dict]) -> None: ...  # ConfigError for problems that it cannot be asked
  def make(
    self, rows: Sequence[dict], folder: epath.Path
  ) -> tuple[list[dict], dict[str, Any]]: ...  # (rows of `keep`, counts), or goes on


def check_job(job: Job, earlier: Sequence[str] = ()) -> None:
  """Raises ConfigError for what can be told wrong before anything is sampled. Runs of `earlier` need not exist yet."""
  config, g, keys_set = job
  check_generate(g, keys_set)
  idle = resolution.inert_sections(config)
  ours = {key for key in keys_set if not evaluate.begins(key, ('generate',))}
  read = READ if g.source == 'checkpoint' else ASKED
  dead = [
    repr(key) + (f': {idle[key]}' if key in idle else '') for key in sorted(ours) if key in idle or not evaluate.begins(key, read)
  ]
  check(not dead, 'config keys that cannot act beside a section generate:\n  ' + '\n  '.join(dead))
  if g.source != 'checkpoint':
    return
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
  check_rewards(rewards, config.rollout.max_completion_length, resolution.model_names(config))


def drawn(job: Job) -> list[dict]:
  """The rows of `generate.split` that are asked. Raises ConfigError."""
  config, g = job.config, job.generate
  if g.split == 'train':
    split = data.open_train(config.data, config.seed)
    count = len(split)
    rows = split.draw(split.first(), min(count, g.first + g.size))[0] if g.size else split.whole()
  else:
    rows = data.open_test(config.data, config.seed, g.first + g.size)
    count = len(rows)
  wanted = f"config keys 'generate.first' and 'generate.size': {g.first} and {g.size}"
  check(g.first + max(g.size, 1) <= count, f'{wanted}, but the {g.split} split has {count} problems')
  rows = rows[g.first : g.first + g.size if g.size else None]  # of a mixture every task gives one, and that may be more
  for row in rows:
    check('prompt' in row, f'a row has no column prompt to complete; columns: {", ".join(row)}')
  return rows


def problems(job: Job) -> tuple[list[dict], int]:
  """(the problems that are asked, each prompt once; how many draws repeated one). Raises ConfigError."""
  rows = drawn(job)
  once = {json.dumps(row['prompt']): row for row in reversed(rows)}  # the first of each
  return list(reversed(once.values())), len(rows) - len(once)


def settings_of(job: Job, config: Config) -> dict[str, Any]:
  """The keys that decide the rows, for config.json."""
  g, flat = job.generate, config_lib.flatten(config_lib.to_dict(config))
  read = READ if g.source == 'checkpoint' else ASKED
  settings = {key: value for key, value in flat.items() if evaluate.begins(key, read) and not evaluate.begins(key, ELSEWHERE)}
  chosen = dataclasses.asdict(g)
  asked = {key: value for key, value in chosen.pop('api').items() if key not in BUYING}
  return {'config': settings, 'generate': {**chosen, **({'api': asked} if g.source == 'api' else {})}}


def open_source(job: Job) -> Source:
  if job.generate.source == 'checkpoint':
    return Checkpoint(job)
  return Teacher(job) if job.generate.source == 'api' else Published(job)


def generate(job: Job, workdir: str, overwrite: bool = False) -> dict[str, Any]:
  """Makes the data, or goes on; writes the files and the summary that it returns. Raises ConfigError, also where no row is left."""
  check_job(job)
  g, folder = job.generate, epath.Path(workdir)
  source = open_source(job)
  config = source.config if isinstance(source, Checkpoint) else job.config
  rows, repeated = (
    (drawn(job), None) if g.source == 'published' else problems(job)
  )  # several chains of one problem are welcome there
  source.check(rows)
  check(not stored.is_run(workdir), f'--workdir={workdir} holds a training run')
  about = {**source.about, **settings_of(job, config)}
  about |= {'problems': config_lib.digest(rows)} if g.source != 'checkpoint' else {}  # there samples/ knows whose they are
  evaluate.open_workdir(folder, data_written.FILES, about, 'data of another config', overwrite)
  finished = folder / 'summary.json'
  if finished.exists():
    summary = train.read_json(finished)
    if not (summary.get('not_asked') or summary.get('failed')):  # else more may be had, of what was not bought yet
      return summary
  evaluation = data_written.evaluation_rows(
    g, job.config.data, job.config.seed
  )  # what is wrong with them is told before anything is asked
  made, counted = source.make(rows, folder)
  made, dropped = data_written.left_out(made, g, evaluation)
  found = collections.Counter(counted['dropped']) + collections.Counter(dropped)
  counted = {**counted, 'rows': len(made), 'dropped': dict(sorted(found.items()))}
  why = f'; {counted["not_asked"]} were not asked: the limit was {counted["budget_ended_by"]}' if counted.get('not_asked') else ''
  check(
    bool(made), f"config key 'generate.keep': {g.keep} leaves none of {counted['samples']} completions: {counted['dropped']}{why}"
  )
  asked = {} if repeated is None else {'repeated_prompts': repeated}
  summary = {**source.told, 'source': g.source, 'keep': g.keep, **asked, **counted}
  data_written.write(folder, made, data_written.card(made, g, source.told, about, summary), summary)
  return summary


def describe(summary: Mapping[str, Any]) -> str:
  """One line of what came out."""
  why = ', '.join(f'{count} {reason}' for reason, count in summary['dropped'].items())
  parts = [f'{summary["rows"]} rows of {summary["kept"]} completions, kept of {summary["samples"]} ({summary["keep"]})']
  parts += [f'left out: {why}'] * bool(why)
  if summary.get('failed'):
    parts.append(f'{summary["failed"]} failed')
  if summary.get('not_asked'):
    parts.append(
      f'{summary["not_asked"]} not asked, the limit was {summary["budget_ended_by"]}: raise it, and the same command goes on'
    )
  return '; '.join(parts)


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


def interrupt(*_: Any) -> None:
  raise KeyboardInterrupt


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, interrupt)  # answers that are on their way are waited for: they are paid
  sys.exit(main(sys.argv[1:]))
