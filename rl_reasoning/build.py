"""Config -> everything a run needs: architecture, tokenizer, mesh, roles, jitted steps, first state. Everything is checked here, before
anything is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl_reasoning import checkpoint, lora, model, optim, reward_models, rewards, sharding, tokenizer, train_step, weights
from rl_reasoning.config import (
  Component,
  Config,
  ConfigError,
  Lora,
  Role,
  Teacher,
  check,
  coerce,
  differences,
  digest,
  flatten,
  from_mapping,
  one_line,
  plain,
  reward_roles,
)
from rl_reasoning.model import Arch
from rl_reasoning.objectives import OBJECTIVES, reads_rewards, reward_model
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.ppo import Ppo
from rl_reasoning.presets import PRESETS
from rl_reasoning.reward_models import RewardModel
from rl_reasoning.structs import ROLLOUT, Array, Batch, PyTree, TrainState


class Features(NamedTuple):
  """What the frozen layers give of rows from data, remembered: a row that comes again costs no pass through them."""

  of: Callable[[PyTree, Array, Array, Array], jax.Array]  # (params, tokens, segment, position) -> [N, T, D]
  known: dict[bytes, np.ndarray]  # the row's token ids -> [tokens, D]

  def add(self, params: PyTree, batch: Batch, rows: int) -> Batch:
    """The batch (numpy, rows right-padded) with `extras['features']`. New rows pass `rows` at a time, those of like lengths together."""
    tokens, length = np.asarray(batch.tokens), np.sum(batch.segment_NT > 0, axis=1)
    names = [row[:n].tobytes() for row, n in zip(tokens, length, strict=True)]
    order = sorted({name: n for n, name in enumerate(names) if name not in self.known}.values(), key=lambda n: length[n])
    for start in range(0, len(order), rows):
      some = order[start : start + rows]
      T = min(sharding.size_class(int(length[some[-1]])), tokens.shape[1])
      padded = some + some[-1:] * (rows - len(some))
      found = jax.device_get(self.of(params, *(np.asarray(x)[padded, :T] for x in (tokens, batch.segment_NT, batch.position_NT))))
      self.known.update({names[n]: x[: length[n]].copy() for n, x in zip(some, found)})
    features = np.zeros((*tokens.shape, self.known[names[0]].shape[-1]), np.float32)
    for row, (name, n) in enumerate(zip(names, length, strict=True)):
      features[row, :n] = self.known[name]
    return batch.replace(extras={**batch.extras, 'features': features})


class Run(NamedTuple):
  """What stays the same during a run. `config` is resolved: every default filled in."""

  config: Config
  objective: Any
  arch: Arch
  tokenizer: tokenizer.Tokenizer
  mesh: Mesh
  steps: train_step.Steps
  init: Any  # () -> TrainState, born sharded
  reward_models: Mapping[str, RewardModel] = {}  # their weights are frozen roles: 'reward.NAME'
  features: Features | None = None  # with optim.cache_features
  speaks: bool = True  # whether the policy has a head for text: a reward model has none
  whole: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = train_step.plain_weights  # see train_step.make_steps
  replays: bool = False  # whether updates take the experts that the sampler chose

  def weights(self, state: TrainState) -> tuple[PyTree, dict[str, PyTree]]:
    """(what the policy runs on, the roles without gradients)."""
    params, others = self.whole(state.params, {**state.frozen, **state.moving})
    return params['policy'], others

  def flops(self, state: TrainState) -> float:
    """Of an update, a token: 2 a weight forward, 2 for the gradient of what goes in, 2 for that of a weight that is trained; of experts
    those that a token goes to; attention's own products left out."""
    share = self.arch.num_experts_per_tok / max(1, self.arch.num_experts)

    def active(tree: PyTree) -> float:
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      return sum(x.size * (share if 'experts_' in jax.tree_util.keystr(path) else 1) for path, x in leaves)

    return 4 * active(self.whole(state.params, {**state.frozen, **state.moving})[0]) + 2 * active(state.params)


def is_run(path: str) -> bool:
  return (pathlib.Path(path) / 'checkpoints').is_dir()


def run_config(path: str, *keys: str) -> Any:
  """One value of the config that a run of ours was resolved to."""
  try:
    value = json.loads((pathlib.Path(path) / 'config.json').read_text())
    for key in keys:
      value = value[key]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ConfigError(f'{path}/config.json: {type(error).__name__}: {error}') from None
  return value


def adapters_of(run: str) -> Lora:
  """The section `lora` of a run of ours; one from before there were adapters has none."""
  return from_mapping(Lora, run_config(run).get('lora', {}), 'lora.')


def read_arch(source: str) -> Arch:
  return from_mapping(Arch, run_config(source, 'model', 'arch')) if is_run(source) else weights.read_arch(source)


def longest(config: Config) -> int:
  """Tokens of the longest sequence that the config allows."""
  lengths = [config.rollout.max_completion_length]
  lengths += [e.get('max_completion_length') for e in config.eval.evaluators.values() if isinstance(e, Mapping)]
  return max(config.data.max_length, config.data.max_prompt_length + max(n for n in lengths if isinstance(n, int)))


def resolve_arch(config: Config) -> Arch:
  """The architecture: that of roles.policy.init where it names weights, else the preset with `model.arch` over it.

  Refuses a field set in the config that contradicts the weights.
  """
  source = config.roles.policy.init
  check(config.model.preset in PRESETS, f"config key 'model.preset': {config.model.preset!r} is none of {', '.join(PRESETS)}")
  if not source:
    arch = from_mapping(Arch, {**dataclasses.asdict(PRESETS[config.model.preset]), **config.model.arch}, 'model.arch.')
    return arch.for_length(longest(config))
  check(pathlib.Path(source).exists(), f"config key 'roles.policy.init': {source!r} does not exist")
  arch = with_added_tokens(read_arch(source), config.roles.policy)
  wanted = from_mapping(Arch, {**dataclasses.asdict(arch), **config.model.arch}, 'model.arch.')
  for key in sorted(config.model.arch):
    ours, theirs = getattr(wanted, key), getattr(arch, key)
    check(ours == theirs, f"config key 'model.arch.{key}': {ours!r}, but {source} has {theirs!r}")
  return arch.for_length(longest(config))


EMBEDDINGS = 64  # an embedding that grows has a multiple of so many rows, so that it divides over devices


def with_added_tokens(arch: Arch, role: Role) -> Arch:
  """The architecture with rows of the embedding for the tokens that the tokenizer adds, where it has none to spare."""
  name = resolve_tokenizer(role)
  if not tokenizer.parts(name)[1]:
    return arch
  size = open_tokenizer('roles.policy.tokenizer', name).vocab_size
  return arch if size <= arch.vocab_size else dataclasses.replace(arch, vocab_size=-(-size // EMBEDDINGS) * EMBEDDINGS)


def open_tokenizer(key: str, name: str) -> tokenizer.Tokenizer:
  try:
    return tokenizer.load(name)
  except Exception as error:  # a missing file, a damaged one: transformers raises all kinds
    raise ConfigError(f'config key {key!r}: {name!r}: {one_line(error)}') from error


def resolve_tokenizer(role: Role) -> str:
  if role.tokenizer:
    return role.tokenizer
  if not role.init:
    return 'bytes'
  return run_config(role.init, 'roles', 'policy', 'tokenizer') if is_run(role.init) else role.init


def resolve_template(role: Role) -> str:
  if role.template:
    return role.template
  return run_config(role.init, 'roles', 'policy', 'template') if is_run(role.init) else 'plain'


def check_speaks(key: str, source: str) -> None:
  """Refuses a reward model's weights where text is to come out: they have a head for scores only."""
  check('lm' in heads_in(source), f'config key {key!r}: {source} is a reward model: it has no head for text')


def heads_of(objective) -> tuple[str, ...]:
  """The heads of the policy under an objective; a class that decides by its fields has 'lm'."""
  heads = getattr(getattr(objective, 'func', objective), 'heads', None)
  return heads['policy'] if isinstance(heads, Mapping) else ('lm',)


def heads_in(source: str) -> tuple[str, ...]:
  """The heads of stored weights."""
  if not is_run(source):
    return weights.source_heads(source)
  name = run_config(source, 'objective', 'name')
  return heads_of(OBJECTIVES[name]) if name in OBJECTIVES else ('lm',)


def check_reference(key: str, source: str, arch: Arch, grows: bool = False) -> None:
  """A reference is run by the policy's own forward function, so it must be of the same architecture; where the policy's embedding `grows`,
  its own grows with it."""
  check(pathlib.Path(source).exists(), f'config key {key!r}: {source!r} does not exist')
  unnamed = {'model_type': '', 'max_position_embeddings': 0}
  own, theirs = (dataclasses.replace(a.for_length(0), **unnamed) for a in (arch, read_arch(source)))
  if grows and theirs.vocab_size < own.vocab_size:
    theirs = dataclasses.replace(theirs, vocab_size=own.vocab_size)
  other = differences(dataclasses.asdict(own), dataclasses.asdict(theirs))
  check(not other, f'config key {key!r}: {source} is of another architecture than the policy: {"; ".join(other)}')
  check_speaks(key, source)


def load_tokenizer(role: Role, arch: Arch) -> tokenizer.Tokenizer:
  """Raises ConfigError for one that cannot be read, that has no chat template where the role asks for one, or more ids than embeddings."""
  tok = open_tokenizer('roles.policy.tokenizer', role.tokenizer)
  try:
    tokenizer.render_prompt('', role.template, tok)
  except Exception as error:  # a template that fails: jinja raises all kinds
    raise ConfigError(f"config key 'roles.policy.tokenizer': {role.tokenizer!r}: {one_line(error)}") from error
  check(tok.vocab_size <= arch.vocab_size,
        f'the tokenizer {role.tokenizer!r} has {tok.vocab_size} ids, the model {arch.vocab_size} embeddings')  # fmt: skip
  return tok


def check_teacher(teacher: Teacher, arch: Arch, tok: tokenizer.Tokenizer, own: str) -> None:
  """Refuses a teacher whose tokens are not those of the policy's tokenizer `tok`, called `own`: distributions over other things cannot be
  compared. Embeddings may be padded to other sizes."""
  check(tok.vocab_size <= arch.vocab_size, f"config key 'roles.teacher.init': {teacher.init} has {arch.vocab_size} embeddings, the "
        f"policy's tokenizer {tok.vocab_size} ids")  # fmt: skip
  if teacher.tokenizer == own:
    return
  key = "config key 'roles.teacher.tokenizer'"
  theirs, ours = open_tokenizer('roles.teacher.tokenizer', teacher.tokenizer).vocabulary(), tok.vocabulary()
  other = sorted({*ours.items()} ^ {*theirs.items()}, key=lambda item: item[1])
  check(not other, f"{key}: {teacher.tokenizer!r} has other tokens than the policy's {own!r}, the first one with id "
        f'{other and other[0][1]}; where they mean the same, name the policy\'s here, too')  # fmt: skip


def make_objective(config: Config):
  """The objective dataclass from its mapping; unknown names and keys are refused."""
  settings = dict(config.objective)
  name = settings.get('name', 'sft')
  check(isinstance(name, str) and name in OBJECTIVES, f"config key 'objective.name': {name!r} is none of {', '.join(OBJECTIVES)}")
  cls: Any = OBJECTIVES[name]
  preset, cls = (cls.keywords, cls.func) if isinstance(cls, functools.partial) else ({}, cls)
  given = {}
  if 'given' in {f.name for f in dataclasses.fields(cls)}:
    names = config.rewards.functions
    weights = config.rewards.weights or (1.0,) * len(names)
    given['given'] = Given(names, weights, config.rollout.max_completion_length)
  return from_mapping(cls, {**preset, **settings}, 'objective.', **given)


def keys_under(config: Config, prefix: str) -> list[str]:
  return [key for key in flatten(dataclasses.asdict(config)) if key == prefix or key.startswith(prefix + '.')]


def inert_sections(config: Config) -> dict[str, str]:
  """key -> why it cannot act, whatever the objective, and in an evaluation without one."""
  why = {}
  if config.data.mixture:
    why |= dict.fromkeys(('data.task', 'data.path', 'data.options', 'data.train_size'), 'data.mixture names the tasks')
  else:
    why['rewards.only'] = 'there is no data.mixture whose tasks it could name'
  if config.data.curriculum == 'none':
    why |= dict.fromkeys(('data.curriculum_floor', 'data.curriculum_decay'), 'data.curriculum is none')
  if not any(':' in name for name in config.rewards.functions):
    why['rewards.timeout'] = 'no reward function is a module:function; those of REWARDS keep their own limits'
  return {key: reason for prefix, reason in why.items() for key in keys_under(config, prefix)}


def inert(config: Config, objective, arch: Arch) -> dict[str, str]:
  """key -> why it cannot act in this config. A key that a config sets and that is here is refused; defaults here are only listed."""
  dead = inert_sections(config)

  def drop(prefix: str, why: str):
    dead.update(dict.fromkeys(keys_under(config, prefix), why))

  rl = 'rollout' in objective.sources
  kinds = (
    [e.get('kind', 'sampled') for e in config.eval.evaluators.values() if isinstance(e, Mapping)] if config.eval.every else []
  )
  evaluates, ranks = 'sampled' in kinds, 'ranking' in kinds
  if not rl and not evaluates:
    drop('rollout', 'nothing is sampled: the objective learns from data, and nothing is evaluated')
    drop('data.max_prompt_length', 'only rollouts take prompts; data rows are limited by data.max_length')
  if not rl and evaluates:
    drop('rollout.temperature', 'evaluators name their own temperature, and the objective samples nothing')
    for key in ('top_k', 'top_p', 'min_p'):
      drop(f'rollout.{key}', 'evaluators name their own truncation, and the objective samples nothing')
  if not reads_rewards(objective) and not evaluates:
    for key in ('rewards', 'roles.reward'):
      drop(key, 'the objective reads no rewards, and no samples are evaluated')
  if rl and 'data' not in objective.sources and not ranks:
    drop(
      'data.max_length',
      'no row comes from data; rollouts are limited by data.max_prompt_length and rollout.max_completion_length',
    )
  if not config.eval.every:
    drop('eval', 'eval.every is 0')
    dead.pop('eval.every')
  elif not config.eval.evaluators:
    drop('eval', 'eval.evaluators is empty')
    dead.pop('eval.evaluators')
  if config.roles.policy.init:
    drop('model.preset', 'the architecture comes with roles.policy.init')
  if 'critic' not in objective.trainable:
    drop('roles.critic', 'the objective has no critic of its own')
  if 'teacher' not in objective.frozen:
    drop('roles.teacher', 'the objective has no teacher')
  if not objective.reads or objective.reads in ('demonstrations', 'text'):
    if not ranks:
      drop('data.overlong', 'only preference rows may be cut or dropped')
  if objective.reads != 'text':
    drop('data.pretrain', 'the objective mixes no rows in')
  if not (rl and arch.num_experts):
    drop('optim.router_replay', 'the policy has no experts' if rl else 'nothing is learned from what the policy samples')
  if arch.scoring_func != 'sigmoid' or config.lora.rank:
    drop(
      'optim.router_bias_rate', 'the weights themselves are frozen' if config.lora.rank else 'no router of the policy has a bias'
    )
  if not config.lora.rank:
    drop('lora', 'lora.rank is 0')
    dead.pop('lora.rank')
  else:
    drop('optim.frozen_layers', 'with lora.rank, all weights are frozen')
  if not config.optim.frozen_layers:
    drop('optim.cache_features', 'optim.frozen_layers is 0')
  elif rl:
    drop('optim.cache_features', 'rows of rollouts do not come again')
  if not {'ref'} & {*objective.frozen, *objective.moving}:
    drop('roles.ref', 'the objective keeps no reference (its coefficient is 0)')
  else:
    drop('roles.ref.tokenizer', 'the reference reads the tokens that the policy sampled')
    drop('roles.ref.template', 'the reference reads the tokens that the policy sampled')
  dead.update({f'objective.{key}': why for key, why in objective.inert().items()})
  return dead


def check_splits(config: Config, objective) -> None:
  """The rows of a step divide into updates and micro-batches, whatever the mesh: an error here names key, number and divisor."""
  rows, minibatches = config.data.batch_size * objective.update_rows, objective.num_minibatches
  alone = objective.reads == 'unpaired' and config.data.batch_size == 1
  check(not alone, "config key 'data.batch_size': 1, but KTO's mismatched completions are those of other rows")
  check(rows % minibatches == 0, f"config key 'objective.num_minibatches': {rows} rows a step do not divide by {minibatches}")
  update = rows // minibatches
  micro = config.optim.micro_batch or update
  check(micro <= update, f"config key 'optim.micro_batch': {micro} rows are more than the {update} of an update")
  check(update % micro == 0, f"config key 'optim.micro_batch': {update} rows an update do not divide by {micro}")
  if isinstance(objective, Ppo):
    objective.check_step(config.data.batch_size)
  together, collected = objective.rows_together, config.data.batch_size * sum(objective.sources.values())
  check(
    update % together == 0,
    f"config key 'objective.num_minibatches': {update} rows an update cut the {together} rows that stay together",
  )
  check(micro % together == 0, f"config key 'optim.micro_batch': {micro} rows cut the {together} rows that stay together")
  check(
    not config.optim.micro_batch or collected % micro == 0,
    f"config key 'optim.micro_batch': the {collected} rows of a step do not divide by {micro}",
  )


def check_sizes(config: Config, objective, mesh: Mesh) -> None:
  """Every split is even and divides over the mesh, too."""
  check_splits(config, objective)
  devices = sharding.axis_size(mesh, 'rows')
  where = f'over the {devices} row shards of mesh {dict(mesh.shape)}'
  prompts, size = config.data.batch_size, config.eval.batch_size
  check(prompts % devices == 0, f"config key 'data.batch_size': {prompts} does not divide {where}")
  check(not config.eval.every or size % devices == 0, f"config key 'eval.batch_size': {size} does not divide {where}")
  update, unit = prompts * objective.update_rows // objective.num_minibatches, devices * objective.rows_together
  check(update % unit == 0, f"config key 'objective.num_minibatches': {update} rows an update do not divide {where}")
  micro = config.optim.micro_batch or update
  check(micro % unit == 0, f"config key 'optim.micro_batch': {micro} rows do not divide {where}")


def batch_sizes(config: Config, objective) -> dict[str, int]:
  """What a step holds, in one unit each: what --explain prints. Rows are completions where all are the policy's own; a pair is two rows."""
  rows = config.data.batch_size * sum(objective.sources.values())
  update = config.data.batch_size * objective.update_rows // objective.num_minibatches
  longest = {'rollout': config.data.max_prompt_length + config.rollout.max_completion_length, 'data': config.data.max_length}
  unit = 'completions' if set(objective.sources) == {'rollout'} else 'rows'
  return {
    'prompts_per_step': config.data.batch_size,
    f'{unit}_per_step': rows,
    'updates_per_step': objective.num_iterations * objective.num_minibatches,
    f'{unit}_per_update': update,
    f'{unit}_per_micro_batch': min(config.optim.micro_batch or update, update),
    'max_tokens_per_step': config.data.batch_size * sum(n * longest[source] for source, n in objective.sources.items()),
  }


def resolve_critic(config: Config, absent: Sequence[str]) -> str:
  """Where the critic starts: the one reward model, where there is one that reads the policy's tokens (InstructGPT, 2203.02155), else
  the policy's start with a fresh head."""
  models = list(reward_roles(config).values())
  if config.roles.critic.init or len(models) != 1 or models[0].init in absent or not is_run(models[0].init):
    return config.roles.critic.init
  own = resolve_tokenizer(Role(models[0].init, models[0].tokenizer))
  return models[0].init if own == resolve_tokenizer(config.roles.policy) else ''


def check_lora(config: Config, objective, arch: Arch) -> None:
  """Refuses adapters of what is not there, and a reference that is none of the base."""
  start, ref = config.roles.policy.init, config.roles.ref.init
  check(bool(start), "config key 'lora.rank': roles.policy.init is empty: adapters of random weights have nothing to adapt")
  grown = arch.vocab_size > read_arch(start).vocab_size
  check(
    not grown,
    "config key 'lora.rank': the embedding is not trained, and roles.policy.tokenizer adds tokens that it has no rows for",
  )
  lora.table(model.weight_table(arch, objective.heads['policy']), config.lora)
  if objective.moving:
    check(
      ref in ('', start),
      "config key 'roles.ref.init': with lora.rank a reference that moves is the policy's start and an adapter",
    )
    ema = getattr(objective, 'ref_model_ema', None)
    check(ema is None, "config key 'objective.ref_model_ema': the mean of two adapters' factors is no mean of weights")


def resolve(config: Config, keys_set: set[str], absent: Sequence[str] = ()) -> tuple[Config, Any, Arch]:
  """Fills what a config leaves open (architecture, tokenizer, the objective's defaults) and refuses keys that cannot act. The runs `absent`
  need not exist yet."""
  objective = make_objective(config)
  arch = resolve_arch(config)
  dead = inert(config, objective, arch)
  refused = [f'{key!r}: {dead[key]}' for key in sorted(keys_set) if key in dead]
  check(not refused, 'config keys that cannot act here:\n  ' + '\n  '.join(refused))
  if 'rollout' in objective.sources:
    truncated = config.rollout.top_k or config.rollout.top_p < 1 or config.rollout.min_p > 0
    check(not truncated, 'config section rollout: top_k, top_p and min_p must be off in training: the policy would be scored over another '
          'distribution than it was sampled from (use them in an evaluator)')  # fmt: skip
    check(config.rollout.temperature > 0, "config key 'rollout.temperature': 0 is greedy, which explores nothing")
  if reads_rewards(objective):
    check(bool(config.rewards.functions), "config key 'rewards.functions': empty, nothing would be learned")
    check(
      not config.rewards.weights or any(config.rewards.weights), "config key 'rewards.weights': all 0, nothing would be learned"
    )
  for name, role in reward_roles(config).items():
    key, there = f"config key 'roles.reward.{name}.init'", pathlib.Path(role.init).exists()
    check(there or role.init in absent, f'{key}: {role.init!r} does not exist')
  if 'lm' in objective.heads['policy'] and config.roles.policy.init:
    check_speaks('roles.policy.init', config.roles.policy.init)
  if objective.reads == 'text':
    check(bool(config.data.pretrain), "config key 'data.pretrain' is empty: objective.ptx_coef wants rows to mix in")
    c = coerce(config.data.pretrain, Component, 'data.pretrain')
    check(
      'weight' not in config.data.pretrain, "config key 'data.pretrain.weight' cannot act: objective.ptx_coef weighs these rows"
    )
    check(c.train_size >= 0, f"config key 'data.pretrain.train_size': {c.train_size} must not be negative")
  frozen, layers = config.optim.frozen_layers, arch.num_hidden_layers
  check(
    frozen < layers or bool(config.lora.rank),
    f"config key 'optim.frozen_layers': {frozen} of {layers} layers leave none to train",
  )
  if config.data.curriculum != 'none':
    measured = reads_rewards(objective) and 'accuracy' in config.rewards.functions
    check(
      measured,
      f"config key 'data.curriculum': {config.data.curriculum!r} goes by the reward 'accuracy' of rollouts, which this run has not",
    )
  if 'rewards.functions' not in dead:
    rewards.check_rewards(config.rewards, config.rollout.max_completion_length, model_names(config))
  ways = config.mesh.expert
  check(ways == 1 or bool(arch.num_experts), f"config key 'mesh.expert': {ways}, but the policy has no experts")
  if config.lora.rank:
    check_lora(config, objective, arch)
  settings = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name != 'given'}
  policy = config.roles.policy
  policy = dataclasses.replace(policy, tokenizer=resolve_tokenizer(policy), template=resolve_template(policy))
  tokenizer.check_template(policy.template)
  if config.roles.ref.init and {'ref'} & {*objective.frozen, *objective.moving}:
    check_reference('roles.ref.init', config.roles.ref.init, arch, bool(tokenizer.parts(policy.tokenizer)[1]))
  critic = config.roles.critic
  if 'critic' in objective.trainable:
    critic = dataclasses.replace(critic, init=resolve_critic(config, absent))
    check(not critic.init or critic.init in absent or pathlib.Path(critic.init).exists(),
          f"config key 'roles.critic.init': {critic.init!r} does not exist")  # fmt: skip
  teacher = config.roles.teacher
  if 'teacher' in objective.frozen:
    check(bool(teacher.init), "config key 'roles.teacher.init' is empty: it names whom the policy is to learn from")
    there = pathlib.Path(teacher.init).exists()
    check(there or teacher.init in absent, f"config key 'roles.teacher.init': {teacher.init!r} does not exist")
    if teacher.init not in absent:
      check_speaks('roles.teacher.init', teacher.init)
      teacher = dataclasses.replace(teacher, tokenizer=resolve_tokenizer(Role(teacher.init, teacher.tokenizer)))
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, arch=dataclasses.asdict(arch)),
    roles=dataclasses.replace(config.roles, policy=policy, critic=critic, teacher=teacher),
    objective=plain(settings),
  )
  return config, objective, arch


def load_params(init: str, arch: Arch, key: jax.Array, mesh: Mesh, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """Weights of a role, born in their shards: random, from a run of ours, or from a published checkpoint. A head that is not wanted is left
  out, and a scalar head that is not there is born at random."""
  shardings = param_shardings(mesh, arch, heads)
  if not init:
    return jax.jit(model.init, static_argnums=(1, 2), out_shardings=shardings)(key, arch, heads)
  check(pathlib.Path(init).exists(), f'config section roles: init {init!r} does not exist')
  rows = read_arch(init).vocab_size
  if rows < arch.vocab_size:
    smaller = load_params(init, dataclasses.replace(arch, vocab_size=rows), key, mesh, heads)
    return jax.jit(model.grown, static_argnums=1, out_shardings=shardings)(smaller, arch.vocab_size)
  if is_run(init):
    params = restore_policy(init, arch, mesh)
  else:
    kept = tuple(head for head in heads if head in weights.source_heads(init))
    params = weights.load(init, arch, param_shardings(mesh, arch, kept), kept)
  missing = [name for name in shardings if name not in params]
  check('lm_head' not in missing, f'config section roles: {init} has no language-model head')

  def head(key):
    fresh = model.init(key, arch, heads)
    return {name: fresh[name] for name in missing}

  born = jax.jit(head, out_shardings={name: shardings[name] for name in missing})(key) if missing else {}
  return {name: born[name] if name in missing else params[name] for name in shardings}


def restore_policy(run: str, arch: Arch, mesh: Mesh) -> PyTree:
  """The policy's weights in a run of ours, with all the heads that it has; adapters are merged. Raises ConfigError where the weights that
  they adapt are not those of then."""
  names, config = checkpoint.weight_names(run, 'policy'), run_config(run)
  settings = adapters_of(run)
  if not settings.rank:
    stored = tuple(head for head, name in (('lm', 'lm_head'), ('scalar', 'score')) if name in names)
    return checkpoint.restore_params(run, 'policy', shardings=param_shardings(mesh, arch, stored))
  scalar = ('scalar',) if 'score' in names else ()
  start, heads = config['roles']['policy']['init'], tuple(head for head in heads_in(run) if head != 'scalar')
  base = {name: w for name, w in load_params(start, arch, jax.random.key(0), mesh, heads + scalar).items() if name != 'score'}
  try:
    trained_on = json.loads((pathlib.Path(run) / 'frozen.json').read_text())['base']
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ConfigError(f'{run}/frozen.json: {type(error).__name__}: {error}') from None
  check(int(checkpoint.fingerprint(base)) == trained_on, f'{run} holds adapters of {start}, whose weights are not those of then')
  shardings = table_shardings(mesh, lora.table(model.weight_table(arch, heads + scalar), settings))
  adapter = checkpoint.restore_params(run, 'policy', shardings=shardings)
  return jax.jit(lora.merge, out_shardings=param_shardings(mesh, arch, heads + scalar))(lora.join(base, adapter, settings))


def export(run: str, path: str, dtype: str = 'float32', adapter: bool = False) -> None:
  """Writes the policy of a run of ours as a Hugging Face folder, or its adapters alone as one of peft's. Raises ConfigError."""
  arch, tok, heads = read_arch(run), run_config(run, 'roles', 'policy', 'tokenizer'), heads_in(run)
  head = 'lm' if 'lm' in heads else 'scalar'
  if adapter:
    settings = adapters_of(run)
    check(settings.rank > 0, f'{run}: a run without adapters (lora.rank 0)')
    check(not score_shift(run), f'{run}: its scores are shifted, which a folder of adapters cannot tell: merge them')
    base, params = run_config(run, 'roles', 'policy', 'init'), checkpoint.restore_params(run, 'policy')
    weights.save_adapter(params, arch, settings, path, base, (head,), dtype)
    return
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  tokenizer_path = None if tok == 'bytes' else tok
  weights.save(restore_policy(run, arch, mesh), arch, path, tokenizer_path, (head,), score_shift(run), dtype)


def param_shardings(mesh: Mesh, arch: Arch, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  return table_shardings(mesh, model.weight_table(arch, heads))


def table_shardings(mesh: Mesh, table: PyTree) -> PyTree:
  """Raises ConfigError for a weight that does not divide over the mesh."""

  def place(path, w: model.Weight):
    try:
      return sharding.named(mesh, w.shape, w.axes, 'weight ' + jax.tree_util.keystr(path, simple=True, separator='/'))
    except ValueError as error:
      raise ConfigError(str(error)) from None

  return jax.tree_util.tree_map_with_path(place, table, is_leaf=model.is_weight)


def make_mesh(config: Config) -> Mesh:
  try:
    return sharding.make_mesh(**dataclasses.asdict(config.mesh))
  except ValueError as error:
    raise ConfigError(str(error)) from None


def check_config(config: Config, keys_set: set[str], earlier: Sequence[str]) -> None:
  """Raises ConfigError for what can be told wrong of a run before it begins. `earlier` runs need not exist yet: what depends on their
  weights is then not checked."""
  roles = config.roles
  absent = [path for path in earlier if not is_run(path)]
  named = {'policy': roles.policy, 'ref': roles.ref}
  replaced = {n: dataclasses.replace(r, init='') for n, r in named.items() if r.init in absent}
  if replaced:
    config = dataclasses.replace(config, roles=dataclasses.replace(roles, **replaced))
    keys_set = {key for key in keys_set if not key.startswith(('model.', 'roles.'))}
  if 'policy' in replaced:  # what adapters adapt, and whether it has experts, is not there to be looked at
    whole_mesh = dataclasses.replace(config.mesh, expert=1, data=-1)
    config = dataclasses.replace(config, lora=Lora(), mesh=whole_mesh)
    keys_set = {key for key in keys_set if not key.startswith(('lora.', 'optim.router_', 'mesh.'))}
  config, objective, _ = resolve(config, keys_set, absent)
  check_sizes(config, objective, make_mesh(config))
  optim.make(config.optim, 1)


def model_names(config: Config) -> set[str]:
  """What `rewards.functions` may name beside functions."""
  return {*config.roles.reward, *config.rewards.combinations}


def score_shift(init: str) -> float:
  """What is subtracted from the scores of a reward model; 0 for what is none."""
  if 'scalar' not in heads_in(init):
    return 0.0
  return reward_model.shift(checkpoint.restore_aux(init)) if is_run(init) else weights.score_shift(init)


def load_reward_models(config: Config, mesh: Mesh, process: bool = False) -> tuple[dict[str, RewardModel], dict[str, PyTree]]:
  """(what is fixed of each, by name; their weights, as the frozen roles 'reward.NAME'). `process`: process models, too. Raises
  ConfigError."""
  models, params = {}, {}
  for name, role in reward_roles(config).items():
    init = role.init
    check(pathlib.Path(init).exists(), f"config key 'roles.reward.{name}.init': {init!r} does not exist")
    ours = is_run(init)
    trained = run_config(init) if ours else None
    role = reward_models.resolve(name, role, trained, process)
    arch, shift = read_arch(init).for_length(longest(config)), score_shift(init)
    of_steps = trained is not None and trained['objective']['name'] == reward_models.PROCESS
    models[name] = reward_models.make(name, role, arch, shift, config.model.dtype, of_steps)
    params[f'reward.{name}'] = load_params(init, arch, jax.random.key(0), mesh, ('scalar',))
  return models, params


def build(config: Config, keys_set: set[str] | None = None) -> Run:
  """Raises ConfigError for whatever the user got wrong."""
  config, objective, arch = resolve(config, keys_set or set())
  adapted = bool(config.lora.rank)
  chosen = dataclasses.replace(config.optim, frozen_layers=0) if adapted else config.optim
  mesh = make_mesh(config)
  check_sizes(config, objective, mesh)
  tok = load_tokenizer(config.roles.policy, arch)
  if config.roles.policy.init and (rows := read_arch(config.roles.policy.init).vocab_size) < arch.vocab_size:
    print(
      f'roles.policy.tokenizer adds tokens: the embedding grows from {rows} to {arch.vocab_size} rows, new ones the mean of the old'
    )
  updates = config.total_steps * objective.num_iterations * objective.num_minibatches
  critic = config.roles.critic
  archs = {'policy': arch, 'ref': arch}
  if 'critic' in objective.trainable:
    archs['critic'] = read_arch(critic.init).for_length(longest(config)) if critic.init else arch
    size = archs['critic'].vocab_size
    check(tok.vocab_size <= size, f"config key 'roles.critic.init': {critic.init} has {size} embeddings, the policy's tokenizer "
          f'{tok.vocab_size} ids')  # fmt: skip
    frozen, layers = chosen.frozen_layers, archs['critic'].num_hidden_layers
    check(frozen < layers, f"config key 'optim.frozen_layers': {frozen} of the critic's {layers} layers leave none to train")
  teacher = config.roles.teacher
  if 'teacher' in objective.frozen:
    archs['teacher'] = read_arch(teacher.init).for_length(longest(config))
    check_teacher(teacher, archs['teacher'], tok, config.roles.policy.tokenizer)
  peak = critic.learning_rate or chosen.learning_rate
  optimizer, schedule = optim.make(chosen, updates)
  optimizers = {'policy': optimizer, 'critic': optim.make(dataclasses.replace(chosen, learning_rate=peak), updates)[0]}

  def temperature(rows):
    rolled = rows.source_N == ROLLOUT
    return jnp.where(rolled, config.rollout.temperature, 1.0) if 'rollout' in objective.sources else 1.0

  frozen_layers, replays = chosen.frozen_layers, config.optim.router_replay and bool(arch.num_experts)
  # What starts elsewhere has a trunk of its own: what is remembered of the policy's is not what it gives.
  own_trunk = {'teacher'} | ({'ref'} if config.roles.ref.init not in ('', config.roles.policy.init) else set())
  nets = {
    role: model.make_net(
      a, temperature, dtype=config.model.dtype, remat=config.model.remat,
      frozen_layers=0 if role in own_trunk else frozen_layers,
      shift=score_shift(critic.init) if role == 'critic' and critic.init else 0.0,  # its values begin where the rewards are
      replays=role == 'policy' and replays,
    )
    for role, a in archs.items()
  }  # fmt: skip
  start = config.roles.policy.init
  inits = {'policy': start, 'ref': config.roles.ref.init or start, 'critic': critic.init or start, 'teacher': teacher.init}
  tables, shardings, opt_shardings = {}, {}, {}
  for role in objective.trainable:
    full = model.weight_table(archs[role], objective.heads[role])
    tables[role] = lora.table(full, config.lora) if adapted else full
    shardings[role] = table_shardings(mesh, tables[role])
    shapes = jax.eval_shape(functools.partial(model.init_table, table=tables[role]), jax.random.key(0))
    opt_shardings[role] = optimizer_shardings(mesh, optimizers[role], shapes, shardings[role])
  # Of adapters: the frozen roles that they adapt. What starts from the same weights shares them, the reference with them.
  bases = {role: 'base' if inits[role] == start else f'base.{role}' for role in objective.trainable}
  ref_is_base = adapted and inits['ref'] == start

  def whole(params, frozen):
    joined, others = {role: lora.join(frozen[bases[role]], own, config.lora) for role, own in params.items()}, dict(frozen)
    if 'ref' in objective.moving:
      others['ref'] = lora.join(frozen['base'], frozen['ref'], config.lora)
    elif 'ref' in objective.frozen and ref_is_base:
      others['ref'] = frozen['base']
    return joined, others

  whole = whole if adapted else train_step.plain_weights
  steps = train_step.make_steps(
    objective, nets, optimizers, schedule, config.optim.micro_batch, config.rollout.max_completion_length,
    {'params': shardings, 'opt': opt_shardings}, whole,
    {role: (len(archs[role].stacks['layers']), archs[role].num_experts) for role in objective.trainable if archs[role].num_experts},
    config.optim.router_bias_rate,
  )  # fmt: skip
  judges, judge_params = load_reward_models(config, mesh)

  def init() -> TrainState:
    key = jax.random.key(config.seed)

    def load(role):
      own = jax.random.fold_in(key, 1) if role == 'critic' else key  # a fresh critic is no copy of a fresh policy
      return load_params(inits[role], archs[role], own, mesh, objective.heads[role])

    def adapter(role, of=None):  # a scalar head is trained whole
      init = jax.jit(functools.partial(model.init_table, table=tables[role]), out_shardings=shardings[role])
      return {**init(jax.random.fold_in(key, 2)), **({'score': of['score']} if of and 'score' in of else {})}

    loaded = {role: load(role) for role in objective.trainable}
    params, frozen = loaded, {role: load(role) for role in objective.frozen if not (role == 'ref' and ref_is_base)}
    moving = {role: adapter('policy') if adapted else load(role) for role in objective.moving}
    if adapted:
      params = {role: adapter(role, of) for role, of in loaded.items()}
      frozen |= {bases[role]: {name: w for name, w in of.items() if name != 'score'} for role, of in reversed(loaded.items())}
    return TrainState(
      step=0,
      cursor={'num_tokens': 0},  # and what data.Train.first adds
      updates=jax.device_put(jnp.int32(0), sharding.replicated(mesh)),
      params=params,
      opt={role: jax.jit(optimizers[role].init, out_shardings=opt_shardings[role])(params[role]) for role in params},
      aux=jax.device_put(objective.init_aux(), sharding.replicated(mesh)),
      moving=moving,
      frozen={**frozen, **judge_params},
    )

  features = None
  if config.optim.cache_features and not adapted:

    def trunk(params, tokens, segment, position):
      return model.trunk(params, arch, tokens, segment, position, frozen_layers, config.model.dtype)

    features = Features(jax.jit(trunk), {})
  speaks = 'lm' in objective.heads['policy']
  return Run(config, objective, arch, tok, mesh, steps, init, judges, features, speaks, whole, replays)


def optimizer_shardings(mesh: Mesh, optimizer, shapes: PyTree, shardings: PyTree) -> PyTree:
  """The optimizer's moments lie as their parameters do; what is no copy of the parameters (a count) is replicated."""
  import optax

  state = jax.eval_shape(optimizer.init, shapes)
  return optax.tree_map_params(
    optimizer,
    lambda x, shape, s: s if x.shape == shape.shape else sharding.replicated(mesh),  # adafactor's rows and columns
    state,
    shapes,
    shardings,
    transform_non_params=lambda _: sharding.replicated(mesh),
  )


def explain(config: Config, keys_set: set[str], devices: int) -> dict[str, Any]:
  """Resolved config, hash, the effective formula, batch sizes, and what is inert: for --explain, sweeps and launchers."""
  resolved, objective, arch = resolve(config, keys_set)
  check_splits(resolved, objective)
  optim.make(config.optim, 1)
  table = model.weight_table(arch, objective.heads['policy'])
  counts = {'parameters': model.count(table)}
  if config.lora.rank:
    counts['trainable_parameters'] = model.count(lora.table(table, config.lora))
  dead = inert(config, objective, arch)
  if getattr(objective, 'epsilon', 0.0) >= 1 and 'objective.epsilon' not in dead:
    dead['objective.epsilon, its lower bound'] = 'no ratio is below 1 - epsilon: only epsilon_high clips'
  return {
    'config': plain(dataclasses.asdict(resolved)),
    'hash': digest(dataclasses.asdict(resolved)),
    **counts,
    'devices': devices,
    'formula': objective.formula(),
    'batch_sizes': batch_sizes(resolved, objective),
    'inert_defaults': dead,
  }
