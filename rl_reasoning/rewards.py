"""Rule rewards: REWARDS maps names to functions `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`.

Completions are texts, or lists of chat messages whose last one counts; columns are the data set's other columns. None is "no verdict",
never a zero. `rewards.functions` may also name 'my_package.my_module:function' with the same signature.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_reasoning.config import ConfigError, check
from rl_reasoning.rule_rewards import accuracy, accuracy_flexible, format, format_tags
from rl_reasoning.tokenizer import from_thinking

Reward = Callable[..., Sequence[float | None]]
CRASH = (Exception, SystemExit)  # a sys.exit() in a user's function must not end the run as if it were done
FLOAT32_MAX = float(np.finfo(np.float32).max)


class RewardError(ConfigError):
  """A reward function crashed or returned what is no reward. Names function and row."""


def columns_of(rows: Sequence[dict]) -> dict[str, list]:
  """What reward functions get beside prompt and completion."""
  return {k: [row.get(k) for row in rows] for k in set().union(*rows) - {'prompt'}}


def as_given(prompt: Any, rendered: str, text: str) -> tuple[Any, Any]:
  """(prompt, completion) as reward functions get them: texts, or chat messages where the prompt is a list of them (TRL's rule)."""
  if isinstance(prompt, str):
    return rendered, text
  return prompt, [{'role': 'assistant', 'content': from_thinking(rendered, text)}]


REWARDS: dict[str, Reward] = {
  'accuracy': accuracy,
  'accuracy_flexible': accuracy_flexible,
  'format': format,
  'format_tags': format_tags,
}


def resolve(name: str) -> Reward:
  """A function of REWARDS, or 'module:function'. Raises ConfigError."""
  if name in REWARDS:
    return REWARDS[name]
  module, _, attribute = name.partition(':')
  check(
    bool(module and attribute),
    f"config key 'rewards.functions': {name!r} is none of {', '.join(REWARDS)}, and no 'module:function'",
  )
  try:
    function = getattr(importlib.import_module(module), attribute)
  except CRASH as error:  # whatever the user's module raises
    raise ConfigError(f"config key 'rewards.functions': {name!r}: {type(error).__name__}: {error}") from error
  check(callable(function), f"config key 'rewards.functions': {name!r} is not callable")
  return function


def call(
  name: str, prompts: Sequence, completions: Sequence, ids: Sequence, columns: Mapping[str, Sequence]
) -> list[float | None]:
  values = list(resolve(name)(prompts=prompts, completions=completions, completion_ids=ids, **columns))
  if len(values) != len(completions):
    raise ValueError(f'returned {len(values)} rewards for {len(completions)} completions')
  for value in values:
    if value is not None and not (isinstance(value, (int, float, np.number, np.bool_)) and abs(value) < FLOAT32_MAX):
      raise ValueError(f'returned {value!r}, which is neither a finite number of float32 nor None')
  return [None if v is None else float(v) for v in values]


class Scores(NamedTuple):
  values_NR: np.ndarray  # float64, 0 where there is none
  has_NR: np.ndarray  # bool
  failed_NR: np.ndarray  # bool, a crash: unlike a None, never "does not apply to this prompt"


def score(names: Sequence[str], on_error: str, prompts: Sequence, completions: Sequence, completion_ids: Sequence,
          columns: Mapping[str, Sequence]) -> Scores:  # fmt: skip
  """What each function says of each completion. A function that crashes on the batch is called again row by row, so that the error names
  the row, and with on_error 'none' only that row goes without a verdict."""
  N, R = len(completions), len(names)
  values, has, failed = np.zeros((N, R)), np.zeros((N, R), bool), np.zeros((N, R), bool)
  for r, name in enumerate(names):
    try:
      column = call(name, prompts, completions, completion_ids, columns)
    except CRASH as whole:
      column = []
      for n in range(N):
        one = slice(n, n + 1)
        try:
          column += call(name, prompts[one], completions[one], completion_ids[one], {k: v[one] for k, v in columns.items()})
        except CRASH as error:
          if on_error == 'raise':
            text = f'reward {name!r} failed on row {n}: {type(error).__name__}: {error}; completion: {completions[n]!r}'
            raise RewardError(text) from error
          column.append(None)
          failed[n, r] = True
      if on_error == 'raise':  # every row by itself was well: the fault lies in how the function treats a batch
        raise RewardError(f'reward {name!r} failed on the batch: {type(whole).__name__}: {whole}') from whole
    has[:, r] = [v is not None for v in column]
    values[:, r] = [v or 0.0 for v in column]
  return Scores(values, has, failed)
