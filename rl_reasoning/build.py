"""Config -> everything a run needs: architecture, tokenizer, mesh, roles, jitted steps, first state."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl_reasoning import distributed, lora, model, optim, resolution, reward_models, sharding, stored, tokenizer, train_step
from rl_reasoning.config import Config, ConfigError, Role, Teacher, check, one_line, reward_roles
from rl_reasoning.model import Arch
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


def load_tokenizer(role: Role, arch: Arch) -> tokenizer.Tokenizer:
  """Raises ConfigError for one that cannot be read, that has no chat template where the role asks for one, or more ids than embeddings."""
  tok = resolution.open_tokenizer('roles.policy.tokenizer', role.tokenizer)
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
  theirs, ours = resolution.open_tokenizer('roles.teacher.tokenizer', teacher.tokenizer).vocabulary(), tok.vocabulary()
  other = sorted({*ours.items()} ^ {*theirs.items()}, key=lambda item: item[1])
  check(not other, f"{key}: {teacher.tokenizer!r} has other tokens than the policy's {own!r}, the first one with id "
        f'{other and other[0][1]}; where they mean the same, name the policy\'s here, too')  # fmt: skip


def load_reward_models(
  config: Config, mesh: Mesh, process: bool = False, load: Callable[..., PyTree] = stored.load_params
) -> tuple[dict[str, RewardModel], dict[str, PyTree]]:
  """(what is fixed of each, by name; their weights, as the frozen roles 'reward.NAME'). `process`: process models, too. Raises
  ConfigError."""
  models, params = {}, {}
  for name, role in reward_roles(config).items():
    init = role.init
    check(pathlib.Path(init).exists(), f"config key 'roles.reward.{name}.init': {init!r} does not exist")
    ours = stored.is_run(init)
    trained = stored.run_config(init) if ours else None
    role = reward_models.resolve(name, role, trained, process)
    arch, shift = stored.read_arch(init).for_length(resolution.longest(config)), stored.score_shift(init)
    arch = resolution.with_attention(arch, config, mesh)
    of_steps = trained is not None and trained['objective']['name'] == reward_models.PROCESS
    models[name] = reward_models.make(name, role, arch, shift, config.model.dtype, of_steps)
    params[f'reward.{name}'] = load(init, arch, jax.random.key(0), mesh, ('scalar',))
  return models, params


def build(
  config: Config, keys_set: set[str] | None = None, devices: Sequence[Any] | None = None, making: stored.Making = stored.ARRAYS
) -> Run:
  """A run on `devices` (None: those that are here). Raises ConfigError for whatever the user got wrong."""
  config, objective, arch = resolution.resolve(config, keys_set or set())
  adapted = bool(config.lora.rank)
  chosen = dataclasses.replace(config.optim, frozen_layers=0) if adapted else config.optim
  mesh = resolution.make_mesh(config, devices)
  resolution.check_sizes(config, objective, mesh)
  sharding.check_processes(mesh)
  alone = distributed.count() == 1 or not config.optim.cache_features
  check(alone, "config key 'optim.cache_features': what is remembered is remembered by one process, and there are several")
  tok = load_tokenizer(config.roles.policy, arch)
  if config.roles.policy.init and (rows := stored.read_arch(config.roles.policy.init).vocab_size) < arch.vocab_size:
    print(
      f'roles.policy.tokenizer adds tokens: the embedding grows from {rows} to {arch.vocab_size} rows, new ones the mean of the old'
    )
  updates = config.total_steps * objective.num_iterations * objective.num_minibatches
  critic = config.roles.critic
  archs = {'policy': arch, 'ref': arch}
  if 'critic' in objective.trainable:
    archs['critic'] = stored.read_arch(critic.init).for_length(resolution.longest(config)) if critic.init else arch
    size = archs['critic'].vocab_size
    check(tok.vocab_size <= size, f"config key 'roles.critic.init': {critic.init} has {size} embeddings, the policy's tokenizer "
          f'{tok.vocab_size} ids')  # fmt: skip
    frozen, layers = chosen.frozen_layers, archs['critic'].num_hidden_layers
    check(frozen < layers, f"config key 'optim.frozen_layers': {frozen} of the critic's {layers} layers leave none to train")
  teacher = config.roles.teacher
  if 'teacher' in objective.frozen:
    archs['teacher'] = stored.read_arch(teacher.init).for_length(resolution.longest(config))
    check_teacher(teacher, archs['teacher'], tok, config.roles.policy.tokenizer)
  archs = {role: resolution.with_attention(a, config, mesh) for role, a in archs.items()}
  arch = archs['policy']
  peak = critic.learning_rate or chosen.learning_rate
  optimizer, schedule = optim.make(chosen, updates, arch.stacks)
  optimizers = {
    'policy': optimizer,
    'critic': optim.make(dataclasses.replace(chosen, learning_rate=peak), updates, archs.get('critic', arch).stacks)[0],
  }

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
      shift=stored.score_shift(critic.init) if role == 'critic' and critic.init else 0.0,  # its values begin where the rewards are
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
    shardings[role] = stored.table_shardings(mesh, tables[role])
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
  judges, judge_params = load_reward_models(config, mesh, load=making.load)

  def init() -> TrainState:
    key, everywhere = jax.random.key(config.seed), sharding.replicated(mesh)

    def load(role):
      own = jax.random.fold_in(key, 1) if role == 'critic' else key  # a fresh critic is no copy of a fresh policy
      return making.load(inits[role], archs[role], own, mesh, objective.heads[role])

    def adapter(role, of=None):  # a scalar head is trained whole
      own = making.make(functools.partial(model.init_table, table=tables[role]), shardings[role], jax.random.fold_in(key, 2))
      return {**own, **({'score': of['score']} if of and 'score' in of else {})}

    loaded = {role: load(role) for role in objective.trainable}
    params, frozen = loaded, {role: load(role) for role in objective.frozen if not (role == 'ref' and ref_is_base)}
    moving = {role: adapter('policy') if adapted else load(role) for role in objective.moving}
    if adapted:
      params = {role: adapter(role, of) for role, of in loaded.items()}
      frozen |= {bases[role]: {name: w for name, w in of.items() if name != 'score'} for role, of in reversed(loaded.items())}
    return TrainState(
      step=0,
      cursor={'num_tokens': 0},  # and what data.Train.first adds
      updates=making.make(lambda: jnp.int32(0), everywhere),
      params=params,
      opt={role: making.make(optimizers[role].init, opt_shardings[role], params[role]) for role in params},
      aux=making.make(objective.init_aux, everywhere),
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
