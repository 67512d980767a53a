"""One frozen dataclass a config section; reading, overriding, checking and hashing of configs.

A config file defines `get_config(**arguments)` and returns a mapping (a dict or an ml_collections ConfigDict) of the keys it SETS; all
others keep the defaults below. `--config=file.py:objective=sft,size=2` passes arguments; `--config.optim.learning_rate=1e-4` overrides.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rl_reasoning.preemption import EXIT_CODE, Preempted


class ConfigError(ValueError):
  """The user's error: printed without a traceback, exit code 2."""


def check(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def check_file_name(key: str, name: str, longest: int) -> None:
  """Raises ConfigError for a name, of the config key, that cannot be that of a file; `longest` in bytes."""
  good = bool(name) and name[0] != '.' and not set(name) & set('/\\\0') and len(name.encode()) <= longest
  check(good, f'config key {key!r}: the name is that of a file, too')


def one_line(error: object) -> str:
  """What other libraries say in many lines, as part of an error of one."""
  return ' '.join(str(error).split())[:600]


class Parser(argparse.ArgumentParser):
  """A command line whose mistakes are ConfigErrors: one line, without the usage, which --help shows."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(message)


def exit_code(command: Callable[[list[str]], int | None], argv: Sequence[str], again: str = 'the same command goes on') -> int:
  """Runs a command line: what is the user's to mend is one line on stderr, not a traceback."""
  try:
    return command(list(argv)) or 0
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except Preempted as preempted:
    print(f'{preempted}; {again}', file=sys.stderr)
    return EXIT_CODE
  except KeyboardInterrupt:
    print(f'interrupted; {again}', file=sys.stderr)
    return 130


@dataclasses.dataclass(frozen=True)
class Model:
  preset: str = 'tiny'  # a name of presets.PRESETS; ignored keys are errors, see resolution.py
  arch: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of model.Arch that differ from the preset
  dtype: str = 'float32'  # compute; parameters and optimizer are float32
  remat: str = 'none'  # none | dots | full: what the backward pass recomputes
  # auto | xla | splash (kernels of TPUs; on CPUs interpreted, for tests) | cudnn (GPUs, bfloat16). auto: what the mesh's devices have, and
  # XLA's code where their kernel does not fit the model
  attention: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Role:
  init: str = ''  # '' random, or a run's workdir, a Hugging Face folder, a .gguf file
  # '' as init says (random: bytes), 'bytes', or a folder / .gguf file; 'FOLDER + <think> </think>' adds tokens, and rows to the embedding
  tokenizer: str = ''
  template: str = (
    ''  # '' as the run of init says, else plain; a name of tokenizer.TEMPLATES, 'chat', 'chat_think', a text with {prompt}
  )


@dataclasses.dataclass(frozen=True)
class Critic:
  init: str = (
    ''  # as of Role; '': the one reward model where it is a run of ours with the policy's tokenizer, else the policy's start
  )
  learning_rate: float = 0.0  # its peak, with optim's schedule; 0: optim.learning_rate


@dataclasses.dataclass(frozen=True)
class Teacher:
  init: str = ''  # as of Role; it may be larger than the policy, or of another architecture
  tokenizer: str = ''  # as of Role; it must have the policy's tokens


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward model of `roles.reward`; its name may stand in `rewards.functions`."""

  init: str  # a run of ours that trained one, or a Hugging Face sequence classifier
  tokenizer: str = ''  # its own, as of Role
  template: str = ''
  reads: str = 'whole'  # whole | answer: what of a completion it is shown


@dataclasses.dataclass(frozen=True)
class Roles:
  policy: Role = Role()  # the network that is trained: for the reward-model objectives that is the reward model
  ref: Role = Role()  # init '': the policy's own start
  critic: Critic = Critic()
  teacher: Teacher = Teacher()
  reward: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> a Reward


@dataclasses.dataclass(frozen=True)
class Data:
  task: str = 'arithmetic'  # a name of tasks.TASKS: what is asked and how rows are made
  path: str = ''  # folder or file of tasks that read one; '' the hub's name of the task
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the task's own keyword arguments
  train_size: int = 0  # rows of the training split; 0: all there are (procedural tasks need a number)
  batch_size: int = 32  # prompts a step
  max_prompt_length: int = 128  # tokens; a longer prompt is an error that names the row
  max_length: int = 256  # tokens of prompt and completion from data
  overlong: str = 'raise'  # raise | drop | truncate_prompt: preference rows beyond it, see preferences.py
  # A second stream of rows beside the prompts, where the objective mixes one in (PPO's ptx): a Component
  pretrain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Several tasks in one run: name -> {'task', 'path', 'options', 'train_size', 'weight'}, a Component; empty: the one `task` above
  mixture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  curriculum: str = (
    'none'  # none | pass_rate: what beside its weight decides how often a task of the mixture is drawn, see data.Train
  )
  curriculum_floor: float = 0.1  # the factor of a task that is always solved or never
  curriculum_decay: float = 0.9  # of the moving average of pass rates, a step
  cache_dir: str = '~/.cache/rl_reasoning/data'  # prepared ArrayRecord files


@dataclasses.dataclass(frozen=True)
class Component:
  """One task of `data.mixture`; its keys mean what those of the section data do."""

  task: str
  path: str = ''
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train_size: int = 0
  weight: float = 1.0  # its share of the prompts is its weight (times its factor of the curriculum) over the sum of all


@dataclasses.dataclass(frozen=True)
class Rollout:
  max_completion_length: int = 128  # tokens, the end token included
  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # 0: off
  top_p: float = 1.0
  min_p: float = 0.0
  chunk: int = 32  # first size of the completion cache; it doubles as completions grow
  # auto (model.dtype) | int8 | float8_e4m3fn: what keys and values of prompts and completions are kept in. With one byte a number the
  # sampler is not quite the policy that the trainer scores: see the metrics of their log-probabilities
  cache_dtype: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Rewards:
  functions: tuple[str, ...] = ('accuracy', 'format')  # names of rewards.REWARDS or 'module:function'
  weights: tuple[float, ...] = ()  # empty: all 1
  on_error: str = 'raise'  # raise | none: what a crash of a reward function does
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # function -> its keyword-only arguments
  # name -> a Combination of reward models; the name may stand in `functions`
  combinations: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  timeout: float = 60.0  # seconds a batch for a 'module:function', in a worker process; 0: in this process, without a limit
  # function or reward model -> the tasks of data.mixture whose prompts it speaks of; one that is not named here speaks of all
  only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Combination:
  """One reward of several reward models, see reward_models.combine."""

  rule: str  # mean | minimum | mean_minus_std | llama2
  of: tuple[str, ...]  # names of roles.reward; for llama2: the helpful one, the safe one
  k: float = 1.0  # of mean_minus_std: mean - k std
  threshold: float = 0.15  # of llama2: below this probability of being safe, safety counts


@dataclasses.dataclass(frozen=True)
class Optim:
  name: str = 'adamw'  # getattr(optax, name)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its keyword arguments: b1, b2, weight_decay, ...
  learning_rate: float = 1e-4  # the peak
  schedule: str = 'constant'  # constant | linear | cosine, after the warm-up, to zero one update after the last
  warmup_updates: int = 0
  grad_clip: float = 1.0  # global norm; 0: off
  micro_batch: int = 0  # rows a micro-batch over all devices; 0: the whole batch at once
  frozen_layers: int = 0  # the first layers, and the embedding below them, stay as they are
  router_replay: bool = (
    False  # of mixtures of experts: the update sends every token to the experts that the sampler chose (2510.11370)
  )
  router_bias_rate: float = (
    0.0  # what an update adds to the bias of an expert with too few tokens, or takes from it (DeepSeek-V3: 0.001)
  )
  cache_features: bool = False  # what frozen layers give of rows from data is computed once and kept in memory


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adapters of the trainable roles; their weights themselves then stay as they are."""

  rank: int = 0  # 0: no adapters, all weights are trained
  alpha: float = 32.0  # the adapters' product counts alpha / rank times
  targets: str = '.*'  # regular expression of whole paths, as 'layers/q': which projections have one; see lora.adapts


@dataclasses.dataclass(frozen=True)
class MeshSizes:
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1  # so many ways the tokens of a row lie, for long completions; in rollouts rows go over it
  expert: int = 1  # of mixtures of experts: so many ways the experts lie; rows go over it, too


@dataclasses.dataclass(frozen=True)
class Eval:
  every: int = 0  # steps; 0: never. The last step is always evaluated
  at_start: bool = True  # also before the first step
  size: int = 200  # problems of the test split
  batch_size: int = 64  # prompts at once
  seed: int = 0  # of sampling evaluators
  evaluators: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> options, see evaluate.py


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = 100  # steps; the last step is always saved
  keep: int = 2  # how many of the newest stay


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = 0
  total_steps: int = 100
  log_every: int = 1
  model: Model = Model()
  roles: Roles = Roles()
  data: Data = Data()
  objective: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'name': 'sft'})  # fields: objectives/
  rollout: Rollout = Rollout()
  rewards: Rewards = Rewards()
  optim: Optim = Optim()
  lora: Lora = Lora()
  mesh: MeshSizes = MeshSizes()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()


# What must be positive, and what may be zero. Checked once here, so that no module has to.
POSITIVE = [
  'total_steps',
  'log_every',
  'data.batch_size',
  'data.max_prompt_length',
  'data.max_length',
  'data.curriculum_floor',
  'rollout.max_completion_length',
  'rollout.chunk',
  'optim.learning_rate',
  'lora.alpha',
  'eval.size',
  'eval.batch_size',
  'checkpoint.every',
  'checkpoint.keep',
]
NOT_NEGATIVE = [
  'seed',
  'data.train_size',
  'data.curriculum_decay',
  'rollout.temperature',
  'rollout.top_k',
  'rollout.min_p',
  'rewards.timeout',
  'optim.warmup_updates',
  'optim.grad_clip',
  'optim.micro_batch',
  'optim.frozen_layers',
  'optim.router_bias_rate',
  'lora.rank',
  'roles.critic.learning_rate',
  'eval.every',
  'eval.seed',
]
CHOICES = {
  'data.curriculum': ('none', 'pass_rate'),
  'data.overlong': ('raise', 'drop', 'truncate_prompt'),
  'model.attention': ('auto', 'xla', 'splash', 'cudnn'),
  'model.dtype': ('float32', 'bfloat16'),
  'model.remat': ('none', 'dots', 'full'),
  'rewards.on_error': ('raise', 'none'),
  'rollout.cache_dtype': ('auto', 'int8', 'float8_e4m3fn'),
  'optim.schedule': ('constant', 'linear', 'cosine'),
}


def parse_value(text: str) -> Any:
  """A Python literal where it is one (1e-4, True, ('a', 'b')), else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError):
    return {'true': True, 'false': False}.get(text.lower(), text)  # 'none' is a choice of several keys; None is a literal


@contextlib.contextmanager
def blaming(path: str) -> Iterator[None]:
  """The file is the user's: whatever its code raises inside is told as a ConfigError with its place."""
  try:
    yield
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines = [error.lineno]
    place = f'{path}:{lines[-1]}' if lines else path
    raise ConfigError(f'{place}: {type(error).__name__}: {error}') from error


def read_module(spec: str) -> tuple[types.ModuleType, dict[str, Any]]:
  """'file.py:name=value,name=value' -> (the executed file, which defines get_config, and the arguments for it)."""
  path, _, text = spec.partition(':')
  arguments = {}
  for item in filter(None, text.split(',')):
    name, equals, value = item.partition('=')
    check(bool(equals), f'--config={spec}: {item!r} is not name=value')
    check(name not in arguments, f'--config={spec}: {name} is given twice')
    arguments[name] = parse_value(value)
  check(pathlib.Path(path).is_file(), f'--config: no file {path!r}')
  module = types.ModuleType(pathlib.Path(path).stem)
  module.__file__ = path
  with blaming(path):
    exec(compile(pathlib.Path(path).read_text(), path, 'exec', dont_inherit=True), module.__dict__)
  check(callable(getattr(module, 'get_config', None)), f'{path}: defines no get_config')
  return module, arguments


def read_file(spec: str) -> dict[str, Any]:
  """'file.py:name=value,name=value' -> the nested dict that its get_config(**arguments) returns."""
  module, arguments = read_module(spec)
  path = str(module.__file__)
  with blaming(path):
    try:
      inspect.signature(module.get_config).bind(**arguments)
    except TypeError as error:
      raise ConfigError(f'--config={spec}: get_config: {error}') from None
    found = module.get_config(**arguments)
    check(not (hasattr(found, 'to_dict') and 'stages' in found),
          f"{path}: a ConfigDict sorts its keys, and 'stages' have an order: return a plain dict")  # fmt: skip
    result = plain(found)
  check(isinstance(result, dict), f'{path}: get_config returns {result!r}, not a mapping')
  return result


def plain(value: Any) -> Any:
  """Mappings (ConfigDict included) to dicts, lists to tuples: what compares, hashes and prints one way."""
  if hasattr(value, 'to_dict'):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  return tuple(plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def merge(base: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Nested union; `other` wins key by key, so overriding one key keeps the rest of its section."""
  result = dict(base)
  for key, value in other.items():
    both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
    result[key] = merge(result[key], value) if both else value
  return result


def override(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
  """One dotted key: override(c, 'optim.learning_rate', 1e-4)."""
  first, *rest = key.split('.')
  nested: Any = value
  for name in reversed(rest):
    nested = {name: nested}
  return merge(settings, {first: nested})


# A sweep is a list of dicts: dotted overrides of a base config, and three keys of the entry's own. See launch/sweep.py.
ENTRY_KEYS = ('name', 'arguments', 'report')


def entry_name(entry: Mapping[str, Any]) -> str:
  """The name of an entry of a sweep, by default made from its overrides: {'objective.name': 'grpo', 'optim.learning_rate': 1e-4} is
  grpo-learning_rate=0.0001."""
  if 'name' in entry:
    return entry['name']
  overrides = {**entry.get('arguments', {}), **{k: v for k, v in entry.items() if k not in ENTRY_KEYS}}
  parts = []
  for key, value in overrides.items():
    text = re.sub(r'[^\w.=+-]+', '_', str(value), flags=re.ASCII).strip('_')  # it is a folder's name
    parts.append(text if key.endswith('.name') else f'{key.rpartition(".")[2]}={text}')
  return '-'.join(parts) or 'default'


def product(*sweeps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Every combination of one entry of each sweep, the last one varying fastest: product(objectives, learning_rates).

  Names are joined by '-'. Raises ConfigError for a key that two of the sweeps set: one of them would not act. (The sum of two sweeps is
  their `+`, and entries that vary together are one list of dicts.)
  """
  result = []
  for entries in itertools.product(*sweeps):
    joined: dict[str, Any] = {'name': '-'.join(entry_name(entry) for entry in entries)}
    for key in (k for entry in entries for k in entry if k not in ENTRY_KEYS):
      check(sum(key in entry for entry in entries) == 1, f'product: {key!r} is set by two of the sweeps')
    for entry in entries:
      arguments = entry.get('arguments', {})
      twice = joined.get('arguments', {}).keys() & arguments
      check(not twice, f'product: argument {", ".join(sorted(twice))} is set by two of the sweeps')
      joined |= {k: v for k, v in entry.items() if k not in ENTRY_KEYS}
      joined |= {'arguments': {**joined.get('arguments', {}), **arguments}} if arguments else {}
      joined |= {'report': False} if not entry.get('report', True) else {}
    result.append(joined)
  return result


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  result = {}
  for key, value in settings.items():
    if isinstance(value, Mapping) and value:
      result.update(flatten(value, f'{prefix}{key}.'))
    else:
      result[prefix + key] = value
  return result


def coerce(value: Any, kind: Any, key: str) -> Any:
  """`value` as a field of type `kind`, or ConfigError naming the key. An int is a float; nothing else converts by itself."""
  if dataclasses.is_dataclass(kind):
    check(isinstance(value, Mapping), f'config key {key!r}: {value!r} is not a section')
    return from_mapping(typing.cast(type, kind), value, key + '.')
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    check(isinstance(value, (tuple, list)), f'config key {key!r}: {value!r} is not a tuple, write ({value!r},)')
    return tuple(coerce(v, arguments[0], f'{key}[{i}]') for i, v in enumerate(value))
  if origin in (typing.Union, types.UnionType):
    return None if value is None else coerce_to_one_of(value, [a for a in arguments if a is not type(None)], key)
  if origin is not None and issubclass(origin, Mapping):
    check(isinstance(value, Mapping), f'config key {key!r}: {value!r} is not a mapping')
    check_json(plain(value), key)
    kind = arguments[1] if arguments else Any
    return plain(value) if kind is Any else {str(k): coerce(v, kind, f'{key}.{k}') for k, v in value.items()}
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
  check(right, f'config key {key!r}: {value!r} is not of type {kind.__name__}')
  check_json(value, key)
  return value


def coerce_to_one_of(value: Any, kinds: Sequence[Any], key: str) -> Any:
  for kind in kinds[:-1]:
    try:
      return coerce(value, kind, key)
    except ConfigError:
      continue
  return coerce(value, kinds[-1], key)


def check_json(value: Any, key: str) -> None:
  """Refuses what config.json could not hold or would not read back as itself."""
  if isinstance(value, Mapping):
    for name, item in value.items():
      check_json(item, f'{key}.{name}')
  elif isinstance(value, tuple):
    for index, item in enumerate(value):
      check_json(item, f'{key}[{index}]')
  else:
    check(value is None or isinstance(value, (str, int, float)), f'config key {key!r}: {value!r} is neither text nor number')
    check(not isinstance(value, float) or math.isfinite(value), f'config key {key!r}: {value!r} is not finite')


def from_mapping(cls: type, settings: Mapping[str, Any], prefix: str = '', **given: Any) -> Any:
  """A frozen dataclass from a mapping. An unknown key is refused with the nearest known one; `given` fields are no keys.

  Raises ConfigError, also for what the class itself refuses by a ValueError.
  """
  kinds = typing.get_type_hints(cls)
  fields = {f.name for f in dataclasses.fields(cls)} - set(given)
  for key in settings:
    if key not in fields:
      near = difflib.get_close_matches(key, sorted(fields), 1)
      hint = f'; did you mean {prefix + near[0]!r}?' if near else f'; known here: {", ".join(sorted(fields))}'
      raise ConfigError(f'config key {prefix + key!r} is unknown{hint}')
  values = {key: coerce(value, kinds[key], prefix + key) for key, value in settings.items()}
  for field in dataclasses.fields(cls):
    optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    check(optional or field.name in {*values, *given}, f'config key {prefix + field.name!r} is missing')
  try:
    return cls(**values, **given)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from None


def components(data: Data) -> dict[str, Component]:
  """The tasks of `data.mixture` by name, sorted: the order of keys in a config must not matter. Raises ConfigError."""
  found = {}
  for name in sorted(data.mixture):
    key = f'data.mixture.{name}'
    check(bool(re.fullmatch(r'[\w-]+', name)), f'config key {key!r}: a name is of letters, digits, _ and -')
    component = found[name] = coerce(data.mixture[name], Component, key)
    check(component.weight > 0, f"config key '{key}.weight': {component.weight} must be positive")
    check(component.train_size >= 0, f"config key '{key}.train_size': {component.train_size} must not be negative")
  return found


def reward_roles(config: Config) -> dict[str, Reward]:
  """The reward models by name. Raises ConfigError."""
  found = {}
  for name in sorted(config.roles.reward):
    key = f'roles.reward.{name}'
    check(bool(re.fullmatch(r'[\w-]+', name)), f'config key {key!r}: a name is of letters, digits, _ and -')
    role = found[name] = coerce(config.roles.reward[name], Reward, key)
    check(role.reads in ('whole', 'answer'), f"config key '{key}.reads': {role.reads!r} is none of whole, answer")
  return found


COMBINATIONS = ('mean', 'minimum', 'mean_minus_std', 'llama2')


def combinations(config: Config) -> dict[str, Combination]:
  """The combinations of reward models by name. Raises ConfigError."""
  found, models = {}, reward_roles(config)
  for name in sorted(config.rewards.combinations):
    key = f'rewards.combinations.{name}'
    check(bool(re.fullmatch(r'[\w-]+', name)), f'config key {key!r}: a name is of letters, digits, _ and -')
    check(name not in models, f'config key {key!r}: roles.reward has the same name')
    c = found[name] = coerce(config.rewards.combinations[name], Combination, key)
    check(c.rule in COMBINATIONS, f"config key '{key}.rule': {c.rule!r} is none of {', '.join(COMBINATIONS)}")
    for member in c.of:
      check(member in models, f"config key '{key}.of': {member!r} is none of roles.reward: {', '.join(models) or 'it is empty'}")
    right = len(c.of) == 2 if c.rule == 'llama2' else len(c.of) >= 2
    wanted = 'the helpful and the safe one' if c.rule == 'llama2' else 'two or more'
    check(right and len(set(c.of)) == len(c.of), f"config key '{key}.of': {c.of} are not {wanted}")
    check(c.k >= 0, f"config key '{key}.k': {c.k} must not be negative")
    check(0 < c.threshold < 1, f"config key '{key}.threshold': {c.threshold} is not in (0, 1)")
    for field, rule in (('k', 'mean_minus_std'), ('threshold', 'llama2')):
      idle = c.rule != rule and field in config.rewards.combinations[name] and getattr(c, field) != getattr(Combination, field)
      check(not idle, f"config key '{key}.{field}' cannot act: it is of rule {rule}")
  return found


def check_routes(config: Config) -> None:
  """Raises ConfigError for a name in `rewards.only` that is none, and for a task of the mixture that no reward speaks of."""
  functions, only, tasks = config.rewards.functions, config.rewards.only, components(config.data)
  for name, chosen in only.items():
    key = f'rewards.only.{name}'
    check(name in functions, f'config key {key!r}: {name!r} is none of rewards.functions: {", ".join(functions)}')
    check(bool(chosen), f'config key {key!r} is empty: leave {name!r} out of rewards.functions')
    for task in chosen:
      check(task in tasks, f'config key {key!r}: {task!r} is none of data.mixture: {", ".join(tasks)}')
  for task in tasks if only else ():
    speaks = any(task in only.get(name, tasks) for name in functions)
    check(speaks, f"config key 'rewards.only': none of rewards.functions speaks of data.mixture.{task}")


def resolve(settings: Mapping[str, Any]) -> Config:
  """The whole config, checked key by key. Raises ConfigError."""
  config = from_mapping(Config, settings)
  values = flatten(to_dict(config))
  for key in POSITIVE:
    check(values[key] > 0, f'config key {key!r}: {values[key]} must be positive')
  for key in NOT_NEGATIVE:
    check(values[key] >= 0, f'config key {key!r}: {values[key]} must not be negative')
  for key in ('seed', 'eval.seed'):
    check(values[key] < 2**32, f'config key {key!r}: {values[key]} does not fit into 32 bits')
  for key, choices in CHOICES.items():
    check(values[key] in choices, f'config key {key!r}: {values[key]!r} is none of {", ".join(choices)}')
  check(0 < config.rollout.top_p <= 1, f"config key 'rollout.top_p': {config.rollout.top_p} is not in (0, 1]")
  check(config.rollout.min_p < 1, f"config key 'rollout.min_p': {config.rollout.min_p} is not in [0, 1)")
  for key in ('curriculum_floor', 'curriculum_decay'):
    check(getattr(config.data, key) < 1, f"config key 'data.{key}': {getattr(config.data, key)} must be below 1")
  try:
    re.compile(config.lora.targets)
  except re.error as error:
    raise ConfigError(f"config key 'lora.targets': {config.lora.targets!r} is no regular expression: {error}") from None
  mixed = bool(components(config.data)) or config.data.curriculum == 'none'
  check(mixed, f"config key 'data.curriculum': {config.data.curriculum!r} has nothing to choose from without data.mixture")
  weights, functions = config.rewards.weights, config.rewards.functions
  check(
    not weights or len(weights) == len(functions),
    f"config key 'rewards.weights': {len(weights)} weights for {len(functions)} functions",
  )
  twice = sorted({name for name in functions if functions.count(name) > 1})
  check(not twice, f"config key 'rewards.functions': {', '.join(twice)} is named twice; rewards.weights says how much it counts")
  combined = combinations(config)
  used = {*functions, *(member for name in functions if name in combined for member in combined[name].of)}
  for key, names in (('roles.reward', reward_roles(config)), ('rewards.combinations', combined)):
    idle = sorted(names.keys() - used)
    check(not idle, f"config key '{key}.{', '.join(idle)}': rewards.functions does not name it")
  if config.data.mixture:  # without one the key cannot act: resolution.inert_sections
    check_routes(config)
  return config


def to_dict(config: Any) -> dict[str, Any]:
  return plain(dataclasses.asdict(config))


def to_json(config: Any) -> str:
  return json.dumps(to_dict(config), indent=1, sort_keys=True)


def digest(settings: Any) -> str:
  """Twelve hex digits of anything JSON can say; the same for equal content, whatever the order of keys."""
  return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """'key: old -> new' for every key in which two configs differ (both as read back from JSON)."""
  old, new = flatten(plain(old)), flatten(plain(new))
  missing = object()
  return [
    f'{key}: {old.get(key, "absent")!r} -> {new.get(key, "absent")!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key, missing) != new.get(key, missing)
  ]
