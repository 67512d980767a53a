"""One evaluation of one checkpoint.

  python -m rl_reasoning.evaluate --config=FILE.py:NAME=VALUE --checkpoint=RUN_OR_WEIGHTS [--workdir=DIR] [--config.KEY=VALUE ...]
    [--overwrite]

The checkpoint is a run's workdir, a Hugging Face folder or a .gguf file; it stands for roles.policy.init. The config is that of a training
run, whose eval section counts, or one of its own that sets what evaluation reads (READ). DIR, by default RUN/evaluation, then holds
evaluation.json, evaluation.md, evaluation.png and samples/; the same command again goes on where it was interrupted. Exit codes: 0, 2.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.evaluate')

import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from rl_reasoning import (
  build,
  checkpoint,
  config as config_lib,
  environment,
  evaluators,
  metrics,
  ranking_evaluator,
  resolution,
  rewards,
  sharding,
  stored,
  tables,
  tokenizer,
  train,
)
from rl_reasoning.config import Config, check
from rl_reasoning.objectives.preference import Preference
from rl_reasoning.structs import PyTree

# Sections and keys that an evaluation reads, as prefixes.
READ = (
  'model.dtype', 'model.attention', 'model.arch', 'roles.policy.tokenizer', 'roles.policy.template', 'roles.reward', 'data.task',
  'data.path', 'data.options', 'data.mixture', 'data.max_prompt_length', 'data.max_length', 'data.overlong', 'data.cache_dir',
  'rollout.max_completion_length', 'rollout.chunk', 'rollout.cache_dtype', 'rewards', 'mesh', 'eval.size', 'eval.batch_size',
  'eval.seed', 'eval.evaluators',
)  # fmt: skip
ELSEWHERE = ('mesh', 'model.attention', 'data.cache_dir')  # of these, what says where and how and not what comes out
TRAINING = ('total_steps', 'objective', 'optim')  # a config that sets one of them is that of a training run
FILES = ('evaluation_config.json', 'evaluation.json', 'evaluation.md', 'evaluation.png', 'reliability.png')


def begins(key: str, prefixes: tuple[str, ...]) -> bool:
  return any(key == prefix or key.startswith(prefix + '.') for prefix in prefixes)


def check_keys(config: Config, keys_set: set[str], overridden: set[str]) -> None:
  """Refuses keys that cannot act: all of them in a config of its own, in a training run's only those of the command line."""
  training = any(begins(key, TRAINING) for key in keys_set - overridden)
  given = overridden if training else keys_set
  check('roles.policy.init' not in given, "config key 'roles.policy.init' cannot act here: --checkpoint stands for it")
  idle = resolution.inert_sections(config)
  dead = [repr(key) + (f': {idle[key]}' if key in idle else '') for key in sorted(given) if key in idle or not begins(key, READ)]
  check(not dead, 'config keys that cannot act in an evaluation:\n  ' + '\n  '.join(dead))


def open_run(config: Config, source: str) -> tuple[build.Run, PyTree, dict[str, PyTree]]:
  """(run, weights, weights of the reward models) of a checkpoint, without what only training needs. Raises ConfigError for whatever the
  user got wrong."""
  check(bool(source) and pathlib.Path(source).exists(), f'--checkpoint={source}: does not exist')
  policy = dataclasses.replace(config.roles.policy, init=source)
  policy = dataclasses.replace(
    policy, tokenizer=resolution.resolve_tokenizer(policy), template=resolution.resolve_template(policy)
  )
  config = dataclasses.replace(config, roles=dataclasses.replace(config.roles, policy=policy))
  arch = resolution.resolve_arch(config)
  tokenizer.check_template(policy.template)
  rewards.check_rewards(config.rewards, config.rollout.max_completion_length, resolution.model_names(config))
  mesh, tok = resolution.make_mesh(config), build.load_tokenizer(policy, arch)
  heads = stored.heads_in(source)
  judges, frozen = build.load_reward_models(config, mesh)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, arch=dataclasses.asdict(arch)))
  arch = resolution.with_attention(arch, config, mesh)
  run = build.Run(config, None, arch, tok, mesh, None, None, judges, None, 'lm' in heads)  # type: ignore[arg-type]
  return run, stored.load_params(source, arch, jax.random.key(0), mesh, heads), frozen


def with_implicit_reward(run: build.Run, source: str) -> tuple[build.Run, dict[str, PyTree]]:
  """A run that learned from preferences is held to judgements by its implicit reward, as it was while it trained: (run with its objective,
  weights of its reference). Raises ConfigError for a reference that is not there any more."""
  if not stored.is_run(source):
    return run, {}
  objective = resolution.make_objective(config_lib.resolve({'objective': stored.run_config(source, 'objective')}))
  if not isinstance(objective, Preference):
    return run, {}
  about = f'--checkpoint={source}: the implicit reward of a run of {objective.name} is over its reference'
  check('ref' not in objective.moving, f'{about}, which moved: only the run itself could tell')
  if 'ref' not in objective.frozen:
    return run._replace(objective=objective), {}
  roles = stored.run_config(source, 'roles')
  start = roles['ref']['init'] or roles['policy']['init']
  check(bool(start) and pathlib.Path(start).exists(), f'{about}, and {start!r} does not exist')
  reference = stored.load_params(start, run.arch, jax.random.key(0), run.mesh)
  return run._replace(objective=objective), {'ref': reference}


def settings_of(config: Config) -> dict[str, Any]:
  """The keys of a resolved config that decide the numbers."""
  flat = config_lib.flatten(config_lib.to_dict(config))
  return {key: value for key, value in flat.items() if begins(key, READ) and not begins(key, ELSEWHERE)}


def hardware() -> dict[str, Any]:
  device = jax.devices()[0]
  cpu = f'{platform.machine()} CPU, {os.cpu_count()} cores'
  return {
    'device': f'{jax.device_count()} x {device.device_kind}' if device.platform != 'cpu' else cpu, 'jax': jax.__version__
  }  # fmt: skip


def open_workdir(folder: epath.Path, names: Sequence[str], about: dict[str, Any], another: str, overwrite: bool) -> None:
  """Writes the first of the files, or checks that the one there is of the same config and weights and not, as an error would say, of
  `another`. All the files, and samples/, are what `overwrite` deletes."""
  path = folder / names[0]
  if overwrite:
    for file in [folder / name for name in names] + list((folder / 'samples').glob('*.json*')):
      file.unlink(missing_ok=True)
  about = json.loads(json.dumps(about))
  if path.exists():
    old = train.read_json(path)
    changed = config_lib.differences({**old, 'checkpoint': ''}, {**about, 'checkpoint': ''})  # it may have moved
    check(not changed, f'{folder} holds {another} (--overwrite deletes it, --workdir=DIR begins another):\n  '
          + '\n  '.join(changed))  # fmt: skip
    return
  left = [name for name in names if (folder / name).exists()]
  check(not left, f'{folder} has {", ".join(left)} but no {names[0]}; --overwrite deletes them')
  try:
    folder.mkdir(parents=True, exist_ok=True)
    train.write_atomically(path, json.dumps(about, indent=1))
  except OSError as error:
    raise config_lib.ConfigError(f'--workdir={folder}: {error}') from None


def run_evaluation(config: Config, source: str, workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
  """Evaluates, or goes on; returns and writes evaluation.json. Raises ConfigError."""
  check(bool(config.eval.evaluators), "config key 'eval.evaluators' is empty: nothing to evaluate, try {'greedy': {}}")
  chosen = evaluators.make_evaluators(config.eval.evaluators)
  run, params, frozen = open_run(config, source)
  if any(isinstance(e, ranking_evaluator.RankingEvaluator) for e in chosen.values()) and run.speaks:
    run, reference = with_implicit_reward(run, source)
    frozen = {**frozen, **reference}
  sharding.check_rows('eval.batch_size', config.eval.batch_size, run.mesh)
  folder, settings = epath.Path(workdir), settings_of(run.config)
  fingerprint = int(checkpoint.fingerprint(params))
  with jax.set_mesh(run.mesh):
    problems = evaluators.test_problems(run)
    evaluators.check_problems(run, problems, chosen)
    about = {'checkpoint': source, 'fingerprint': fingerprint, 'config': settings}
    about |= {'frozen': checkpoint.fingerprints(frozen)} if frozen else {}
    open_workdir(folder, FILES, about, 'another evaluation', overwrite)
    finished = folder / 'evaluation.json'
    if finished.exists():
      return train.read_json(finished)
    result: dict[str, Any] = {
      'checkpoint': source, 'fingerprint': fingerprint, 'config_hash': config_lib.digest(settings), 'hardware': hardware(),
      'tokens': 0, 'seconds': 0.0, 'evaluators': {},
    }  # fmt: skip
    for name, evaluator in chosen.items():
      began = time.perf_counter()
      numbers, samples = evaluators.evaluate(run, params, problems[name], name, evaluator, folder / 'samples', frozen)
      result['evaluators'][name] = numbers
      if isinstance(evaluator, evaluators.Evaluator):
        numbers['by_length'] = evaluators.accuracy_by_length(samples)
        result['tokens'] += sum(s['length'] for s in samples)
        result['seconds'] += train.read_json(folder / 'samples' / f'{name}.json')['seconds']
      else:
        result['seconds'] += time.perf_counter() - began
  train.write_atomically(folder / 'evaluation.md', tables.markdown(result))
  tables.plot(result, folder / 'evaluation.png')
  if any(isinstance(e, ranking_evaluator.RankingEvaluator) for e in chosen.values()):
    tables.plot_reliability(result, folder / 'reliability.png')
  train.write_atomically(finished, json.dumps(result, indent=1))
  return result


def command(argv: list[str]) -> None:
  flags = train.read_flags(argv, ('config', 'checkpoint', 'workdir', 'overwrite', 'config.KEY'))
  source = flags.get('checkpoint', '')
  check(bool(source), '--checkpoint=RUN_OR_WEIGHTS is missing')
  settings = config_lib.read_file(flags['config'])
  check('stages' not in settings, f'{flags["config"]}: the stages of a pipeline: an evaluation takes the config of one run')
  keys_set = set(config_lib.flatten(settings))
  settings, overridden = train.overridden(settings, flags), set(config_lib.flatten(train.overridden({}, flags)))
  config = config_lib.resolve(settings)
  check_keys(config, keys_set | overridden, overridden)
  workdir = flags.get('workdir') or (os.path.join(source, 'evaluation') if stored.is_run(source) else '')
  check(bool(workdir), f'--workdir=DIR is missing: {source} is no workdir of ours')
  environment.cache_compilations()
  result = run_evaluation(config, source, workdir, overwrite='overwrite' in flags)
  columns, rows = train.evaluation_table([('', result['evaluators'])], '')
  metrics.summary_table(source, columns[1:], [row[1:] for row in rows])
  print(f'{workdir}/evaluation.md, evaluation.png, evaluation.json; samples: {workdir}/samples/')


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
