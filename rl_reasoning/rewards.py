"""Rule rewards: REWARDS maps names to functions `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`.

Completions are texts, or lists of chat messages whose last one counts; columns are the data set's other columns. None is "no verdict",
never a zero. `rewards.functions` may also name 'my_package.my_module:function' with the same signature: it runs in a worker process, one
call a batch, within `rewards.timeout` seconds, and gets and returns what JSON can say. A function's keyword-only arguments are its options
(`rewards.options.NAME`); one called max_completion_length is given the number of tokens at which completions are cut.
Names of reward models and of their combinations (reward_models.py) may stand there too: `score` is handed what they say.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_reasoning.config import Config, ConfigError, Rewards, check
from rl_reasoning.rule_rewards import (
  accuracy,
  accuracy_flexible,
  code,
  code_binary,
  cosine,
  format,
  format_soft,
  format_tags,
  language,
  length,
  mixed,
  overlong,
  reasoning_steps,
  repetition,
)
from rl_reasoning.tasks.reviews import gold_reviews
from rl_reasoning.tokenizer import from_thinking
from rl_reasoning.verify.pool import shared

Reward = Callable[..., Sequence[float | None]]
CRASH = (Exception, SystemExit)  # a sys.exit() in a user's function must not end the run as if it were done
FLOAT32_MAX = float(np.finfo(np.float32).max)


class RewardError(ConfigError):
  """A reward function crashed or returned what is no reward. Names function and row."""


def columns_of(rows: Sequence[dict]) -> dict[str, list]:
  """What reward functions get beside prompt and completion."""
  return {k: [row.get(k) for row in rows] for k in set().union(*rows) - {'prompt'}}


def any_gold(rows: Sequence[dict]) -> bool:
  """Whether any of the problems has a gold answer that can be checked."""
  return any(REWARDS['accuracy_flexible']([''], [''], [[]], **columns_of([row]))[0] is not None for row in rows)


def as_given(prompt: Any, rendered: str, text: str) -> tuple[Any, Any]:
  """(prompt, completion) as reward functions get them: texts, or chat messages where the prompt is a list of them (TRL's rule)."""
  if isinstance(prompt, str):
    return rendered, text
  return prompt, [{'role': 'assistant', 'content': from_thinking(rendered, text)}]


REWARDS: dict[str, Reward] = {
  'accuracy': accuracy,
  'accuracy_flexible': accuracy_flexible,
  'format': format,
  'format_soft': format_soft,
  'format_tags': format_tags,
  'reasoning_steps': reasoning_steps,
  'language': language,
  'mixed': mixed,
  'length': length,
  'cosine': cosine,
  'repetition': repetition,
  'overlong': overlong,
  'code': code,
  'code_binary': code_binary,
  'gold_reviews': gold_reviews,
}


def resolve(name: str, networks: Collection[str] = ()) -> Reward:
  """A function of REWARDS, or 'module:function'. Raises ConfigError, which lists `networks` among the names that would do."""
  if name in REWARDS:
    return REWARDS[name]
  module, _, attribute = name.partition(':')
  check(
    bool(module and attribute),
    f"config key 'rewards.functions': {name!r} is none of {', '.join([*REWARDS, *networks])}, and no 'module:function'",
  )
  try:
    function = getattr(importlib.import_module(module), attribute)
  except CRASH as error:  # whatever the user's module raises
    raise ConfigError(f"config key 'rewards.functions': {name!r}: {type(error).__name__}: {error}") from error
  check(callable(function), f"config key 'rewards.functions': {name!r} is not callable")
  return function


def keyword_only(function: Reward) -> list[str]:
  """Names of the keyword-only arguments, where the function tells."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except ValueError:
    return []
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def arguments(name: str, options: Mapping[str, Any], max_completion_length: int | None) -> dict[str, Any]:
  """What a function gets beside the rows: its options, and max_completion_length where it asks for it."""
  given = {} if max_completion_length is None else {'max_completion_length': max_completion_length}
  wanted = keyword_only(resolve(name))
  return {**options.get(name, {}), **{k: v for k, v in given.items() if k in wanted}}


def check_rewards(rewards: Rewards, max_completion_length: int, models: Collection[str] = ()) -> None:
  """Raises ConfigError, before a run spends its time, for functions that do not exist and options that they do not take. `models` are the
  names of the reward models.

  Functions of REWARDS are called on no rows, so that they check the values of their options themselves.
  """
  networks = sorted({*models, *rewards.combinations})
  for name in networks:
    key = f'rewards.combinations.{name}' if name in rewards.combinations else f'roles.reward.{name}'
    check(name not in REWARDS, f'config key {key!r}: a rule reward has that name')
    check(name not in rewards.options, f"config key 'rewards.options.{name}': it has no options; its keys are those of {key}")
  functions = [name for name in rewards.functions if name not in networks]
  for name in functions:
    resolve(name, networks)
    check(
      name in REWARDS or not name.startswith('__main__:') or not rewards.timeout,
      f"config key 'rewards.functions': a worker process cannot import {name!r} from the script itself: move it to a module, or set "
      'rewards.timeout to 0',
    )
  for name, options in rewards.options.items():
    key = f'rewards.options.{name}'
    check(name in functions, f'config key {key!r}: {name!r} is none of rewards.functions')
    check(isinstance(options, Mapping), f'config key {key!r}: {options!r} is not a mapping')
    known = [option for option in keyword_only(resolve(name)) if option != 'max_completion_length']
    for option in options:
      hint = f'it has {", ".join(known)}' if known else 'it has none'
      check(option in known, f"config key '{key}.{option}' is unknown: no option of {name!r}; {hint}")
  for name in functions:
    if name in REWARDS:
      try:
        REWARDS[name]([], [], [], **arguments(name, rewards.options, max_completion_length))
      except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
          raise
        raise ConfigError(f"config key 'rewards.options.{name}': {error}") from error


class Failed(NamedTuple):
  """Why a call gave no rewards."""

  text: str
  error: BaseException | None = None


def checked(values: Any, count: int) -> list[float | None]:
  """What a function returned, as rewards. Raises TypeError and ValueError."""
  values = list(values)
  if len(values) != count:
    raise ValueError(f'returned {len(values)} rewards for {count} completions')
  for value in values:
    if value is not None and not (isinstance(value, (int, float, np.number, np.bool_)) and abs(float(value)) < FLOAT32_MAX):
      raise ValueError(f'returned {value!r}, which is neither a finite number of float32 nor None')
  return [None if v is None else float(v) for v in values]


def calls(name: str, batches: Sequence[Mapping[str, Any]], timeout: float) -> Iterator[list[float | None] | Failed]:
  """What the function returns on each batch of rows (keyword arguments); a user's runs in workers, `timeout` seconds a batch."""
  size = shared('rewards').size
  for start in range(0, len(batches), size):  # whoever stops at the first failure need not wait for all
    some = batches[start : start + size]
    values: list[Any] = []
    if timeout and name not in REWARDS:
      try:
        outcomes = shared('rewards').map(name, some, timeout)
        hint = ' (rewards.timeout, shared by its rows where they are called one by one)'
        values = [o.value if o.status == 'value' else Failed(o.message + hint * (o.status == 'timeout')) for o in outcomes]
      except TypeError as error:
        values = [Failed(f'what a worker is sent must be JSON: {error}', error)] * len(some)
    for n, batch in enumerate(some):
      try:
        value = values[n] if values else resolve(name)(**batch)
        yield value if isinstance(value, Failed) else checked(value, len(batch['completions']))
      except CRASH as error:
        yield Failed(f'{type(error).__name__}: {error}', error)


def routes(config: Config, columns: Mapping[str, Sequence], count: int) -> dict[str, np.ndarray]:
  """name -> bool_N, the rows that it speaks of, for what `rewards.only` limits to tasks of the mixture (the column `dataset`). A row of
  another task, an evaluator's own, is in none."""
  if not config.data.mixture:
    return {}
  tasks = columns.get('dataset', [None] * count)
  return {name: np.asarray([task in chosen for task in tasks], bool) for name, chosen in config.rewards.only.items()}


class Scores(NamedTuple):
  values_NR: np.ndarray  # float64, 0 where there is none
  has_NR: np.ndarray  # bool
  failed_NR: np.ndarray  # bool, a crash: unlike a None, never "does not apply to this prompt"


def score(names: Sequence[str], on_error: str, prompts: Sequence, completions: Sequence, completion_ids: Sequence,
          columns: Mapping[str, Sequence], *, options: Mapping[str, Any] | None = None, timeout: float = Rewards.timeout,
          max_completion_length: int | None = None, known: Mapping[str, Sequence[float | None]] | None = None,
          routes: Mapping[str, np.ndarray] | None = None) -> Scores:  # fmt: skip
  """What each function says of each completion. A function that crashes on the batch, or takes longer than `timeout` seconds for it (0: no
  limit, in this process), is called again row by row, so that the error names the row, and with on_error 'none' only that row goes
  without a verdict. A row by itself has its share of the limit, and a second at least. Names in `known` have their values there: nothing is
  called for them, and a value that is no number is an error, whatever `on_error`. A function in `routes` is called on its own rows only:
  the others have no verdict, and as whole groups they are none of its business. Raises RewardError."""
  N, R = len(completions), len(names)
  values, has, failed = np.zeros((N, R)), np.zeros((N, R), bool), np.zeros((N, R), bool)
  for r, name in enumerate(names):
    if known and name in known:
      try:
        column = checked(known[name], N)
      except ValueError as error:
        raise RewardError(f'reward {name!r}: {error}') from None
      has[:, r] = [v is not None for v in column]
      values[:, r] = [v or 0.0 for v in column]
      continue
    given = arguments(name, options or {}, max_completion_length)
    own = keyword_only(REWARDS[name]) if name in REWARDS else []  # a column 'unsafe' of the data must not set an option
    rows = {k: v for k, v in columns.items() if k not in own}
    rows |= {'prompts': prompts, 'completions': completions, 'completion_ids': completion_ids}
    chosen = list(range(N))
    if routes and name in routes:
      chosen = np.flatnonzero(routes[name]).tolist()
      rows = {k: [v[n] for n in chosen] for k, v in rows.items()}
    if not chosen:
      continue
    for key in given.keys() & rows.keys():
      raise RewardError(f'reward {name!r}: its option {key!r} has the name of a column of the data')
    (column,) = calls(name, [{**rows, **given}], timeout)
    if isinstance(column, Failed):
      whole, column = column, []
      alone = [{k: v[i : i + 1] for k, v in rows.items()} | given for i in range(len(chosen))]
      for n, got in zip(chosen, calls(name, alone, min(timeout, max(1.0, timeout / len(chosen))))):
        if isinstance(got, Failed):
          if on_error == 'raise':
            raise RewardError(f'reward {name!r} failed on row {n}: {got.text}; completion: {completions[n]!r}') from got.error
          got = [None]
          failed[n, r] = True
        column += got
      if on_error == 'raise':  # every row by itself was well: the fault lies in how the function treats a batch
        raise RewardError(f'reward {name!r} failed on the batch: {whole.text}') from whole.error
    has[chosen, r] = [v is not None for v in column]
    values[chosen, r] = [v or 0.0 for v in column]
  return Scores(values, has, failed)
