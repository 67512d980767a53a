"""A config resolved: what it leaves open is filled in, what cannot act or does not divide is refused, before anything is written."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from rl_reasoning import lora, model, optim, rewards, sharding, stored, tokenizer
from rl_reasoning.config import (
  Component,
  Config,
  ConfigError,
  Lora,
  Role,
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
from rl_reasoning.objectives import OBJECTIVES, reads_rewards
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.ppo import Ppo
from rl_reasoning.presets import PRESETS


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
  check(config.model.arch.get('attn_implementation', 'xla') == 'xla',
        "config key 'model.arch.attn_implementation' cannot act: model.attention names the code")  # fmt: skip
  if not source:
    arch = from_mapping(Arch, {**dataclasses.asdict(PRESETS[config.model.preset]), **config.model.arch}, 'model.arch.')
    return arch.for_length(longest(config))
  check(pathlib.Path(source).exists(), f"config key 'roles.policy.init': {source!r} does not exist")
  arch = with_added_tokens(stored.read_arch(source), config.roles.policy)
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
  return stored.run_config(role.init, 'roles', 'policy', 'tokenizer') if stored.is_run(role.init) else role.init


def resolve_template(role: Role) -> str:
  if role.template:
    return role.template
  return stored.run_config(role.init, 'roles', 'policy', 'template') if stored.is_run(role.init) else 'plain'


def check_speaks(key: str, source: str) -> None:
  """Refuses a reward model's weights where text is to come out: they have a head for scores only."""
  check('lm' in stored.heads_in(source), f'config key {key!r}: {source} is a reward model: it has no head for text')


def beyond_cudnn(arch: Arch, dtype: str) -> str:
  """Why cuDNN cannot compute this attention; '' where it can. A head of more than 128 numbers it takes on some GPUs only."""
  if dtype != 'bfloat16':
    return f'it computes in bfloat16, and model.dtype is {dtype}'
  if arch.attn_logit_softcapping:
    return 'it has no soft cap of scores'
  if arch.kv_lora_rank:
    return 'with latent attention, the heads of values are of another size than those of keys'
  return (
    '' if arch.head_dim <= 128 and arch.head_dim % 8 == 0 else f'a head of {arch.head_dim} numbers is no multiple of 8 up to 128'
  )


def with_attention(arch: Arch, config: Config, mesh: Mesh) -> Arch:
  """The architecture with the code that `model.attention` means on the devices of the mesh, which need not be those of this machine. Raises
  ConfigError for code that they, or the model, cannot run."""
  wanted, platform = config.model.attention, mesh.devices.flat[0].platform
  why = beyond_cudnn(arch, config.model.dtype)
  if wanted == 'auto':
    wanted = {'tpu': 'splash', 'gpu': 'xla' if why else 'cudnn'}.get(platform, 'xla')
  key = f"config key 'model.attention': {wanted!r}"
  if wanted == 'splash':
    check(platform in ('tpu', 'cpu'), f'{key} is a kernel of TPUs, and the devices are of platform {platform}')
    wanted = wanted if platform == 'tpu' else 'splash_interpret'
  if wanted == 'cudnn':
    check(platform == 'gpu', f'{key} is for GPUs, and the devices are of platform {platform}')
    check(not why, f'{key}: {why}')
  return dataclasses.replace(arch, attn_implementation=wanted)


def check_reference(key: str, source: str, arch: Arch, grows: bool = False) -> None:
  """A reference is run by the policy's own forward function, so it must be of the same architecture; where the policy's embedding `grows`,
  its own grows with it."""
  check(pathlib.Path(source).exists(), f'config key {key!r}: {source!r} does not exist')
  unnamed = {'model_type': '', 'max_position_embeddings': 0, 'attn_implementation': 'xla'}
  own, theirs = (dataclasses.replace(a.for_length(0), **unnamed) for a in (arch, stored.read_arch(source)))
  if grows and theirs.vocab_size < own.vocab_size:
    theirs = dataclasses.replace(theirs, vocab_size=own.vocab_size)
  other = differences(dataclasses.asdict(own), dataclasses.asdict(theirs))
  check(not other, f'config key {key!r}: {source} is of another architecture than the policy: {"; ".join(other)}')
  check_speaks(key, source)


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
  if not arch.num_experts or arch.scoring_func != 'sigmoid' or config.lora.rank:
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

  def where(axis: str) -> str:
    return f'over the {sharding.axis_size(mesh, axis)} row shards of mesh {dict(mesh.shape)}'

  prompts, size, ways = config.data.batch_size, config.eval.batch_size, mesh.shape['sequence']
  check(8 % ways == 0, f"config key 'mesh.sequence': {ways}, but padded lengths are multiples of 8")
  rows, rolls = 'rollout_rows' if 'rollout' in objective.sources else 'rows', sharding.axis_size(mesh, 'rollout_rows')
  check(prompts % sharding.axis_size(mesh, rows) == 0, f"config key 'data.batch_size': {prompts} does not divide {where(rows)}")
  check(
    not config.eval.every or size % rolls == 0, f"config key 'eval.batch_size': {size} does not divide {where('rollout_rows')}"
  )
  update, unit = prompts * objective.update_rows // objective.num_minibatches, row_unit(mesh, objective)
  check(update % unit == 0, f"config key 'objective.num_minibatches': {update} rows an update do not divide {where('rows')}")
  micro = config.optim.micro_batch or update
  check(micro % unit == 0, f"config key 'optim.micro_batch': {micro} rows do not divide {where('rows')}")


def row_unit(mesh: Mesh, objective) -> int:
  """The fewest rows that divide over the mesh."""
  return sharding.axis_size(mesh, 'rows') * objective.rows_together


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
  if config.roles.critic.init or len(models) != 1 or models[0].init in absent or not stored.is_run(models[0].init):
    return config.roles.critic.init
  own = resolve_tokenizer(Role(models[0].init, models[0].tokenizer))
  return models[0].init if own == resolve_tokenizer(config.roles.policy) else ''


def check_lora(config: Config, objective, arch: Arch) -> None:
  """Refuses adapters of what is not there, and a reference that is none of the base."""
  start, ref = config.roles.policy.init, config.roles.ref.init
  check(bool(start), "config key 'lora.rank': roles.policy.init is empty: adapters of random weights have nothing to adapt")
  grown = arch.vocab_size > stored.read_arch(start).vocab_size
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


def check_config(config: Config, keys_set: set[str], earlier: Sequence[str]) -> None:
  """Raises ConfigError for what can be told wrong of a run before it begins. `earlier` runs need not exist yet: what depends on their
  weights is then not checked."""
  roles = config.roles
  absent = [path for path in earlier if not stored.is_run(path)]
  named = {'policy': roles.policy, 'ref': roles.ref}
  replaced = {n: dataclasses.replace(r, init='') for n, r in named.items() if r.init in absent}
  if replaced:
    config = dataclasses.replace(config, roles=dataclasses.replace(roles, **replaced))
    keys_set = {key for key in keys_set if not key.startswith(('model.', 'roles.'))}
  if 'policy' in replaced:  # what adapters adapt, and whether it has experts, is not there to be looked at
    whole_mesh = dataclasses.replace(config.mesh, expert=1, data=-1)
    config = dataclasses.replace(config, lora=Lora(), mesh=whole_mesh)
    keys_set = {key for key in keys_set if not key.startswith(('lora.', 'optim.router_', 'mesh.'))}
  config, objective, arch = resolve(config, keys_set, absent)
  mesh = make_mesh(config)
  check_sizes(config, objective, mesh)
  with_attention(arch, config, mesh)
  optim.make(config.optim, 1, arch.stacks)


def model_names(config: Config) -> set[str]:
  """What `rewards.functions` may name beside functions."""
  return {*config.roles.reward, *config.rewards.combinations}


def explain(config: Config, keys_set: set[str], devices: int) -> dict[str, Any]:
  """Resolved config, hash, the effective formula, batch sizes, and what is inert: for --explain, sweeps and launchers."""
  resolved, objective, arch = resolve(config, keys_set)
  check_splits(resolved, objective)
  optim.make(config.optim, 1, arch.stacks)
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


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  try:
    return sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  except ValueError as error:
    raise ConfigError(str(error)) from None
