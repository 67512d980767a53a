"""The section `generate` of a config that makes data (datagen.py): its fields, and what of it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from rl_reasoning import api, config as config_lib, dedup
from rl_reasoning.config import Component, Config, check, coerce

SOURCES = ('checkpoint', 'api', 'published')
KEEPS = ('all', 'best', 'correct', 'reasoning', 'ranking', 'pairs', 'labels', 'steps', 'conditioned')
BY_STEPS = ('steps', 'conditioned')
BY_VERDICT, BY_REWARD = ('correct', 'pairs', 'labels', *BY_STEPS), ('best', 'ranking')
VERIFY = ('possible', 'always', 'never')


@dataclasses.dataclass(frozen=True)
class Api:
  """An OpenAI-compatible endpoint, as api.Endpoint has it, what it is asked, and what that may cost (0: no limit).

  Limits count all that the folder's answers have cost. Those of tokens and cost hold where max_tokens of `options` bounds thinking, too.
  `prices` has {'input', 'output'} of a million tokens for each model that it names.
  """

  url: str = ''  # with its version: https://api.deepseek.com/v1
  model: str = ''
  answers_as: str = ''
  key_env: str = ''  # the environment variable that holds the key
  system: str = ''  # a system message before the prompt
  template: str = '{prompt}'  # of the user message, for prompts that are texts
  options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'max_tokens': 8192})  # what else a request holds
  prices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  max_requests: int = 0
  max_tokens: int = 0  # of prompts and completions
  max_cost: float = 0.0
  concurrency: int = 64
  timeout: float = api.Endpoint.timeout
  attempts: int = api.Endpoint.attempts
  backoff: float = api.Endpoint.backoff


@dataclasses.dataclass(frozen=True)
class Price:
  input: float  # of a million tokens
  output: float


# Of the section api, what decides where and when an answer is bought, and not which.
BUYING = (
  'url', 'key_env', 'answers_as', 'prices', 'max_requests', 'max_tokens', 'max_cost', 'concurrency', 'timeout', 'attempts', 'backoff',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generate:
  source: str = (
    'checkpoint'  # checkpoint: sampled from roles.policy.init | api: from an endpoint | published: what data.* shows itself
  )
  keep: str = 'all'  # a name of data_kept.KEEP, 'steps' or 'conditioned'
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
  good: str = '[GOOD]'  # before a step that the right answer is reached from
  bad: str = '[BAD]'  # before any other
  threshold: float = 0.5  # share of continuations that reach it, from which on a step is good
  verify: str = 'possible'  # possible: what is verified wrong is left out | always: what has no verdict, too | never
  decontaminate: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> a Component: its test split is kept out
  ngram: int = dedup.NGRAM  # words that a row may not share with a problem of these
  near_duplicates: float = 0.0  # Jaccard similarity from which on the later of two rows is left out; 0: none is
  licence: str = ''  # for the card of the data
  api: Api = Api()


# Options that act with some kinds of `keep` only, and with some sources only.
ONLY = {
  'max_per_prompt': ('correct', 'reasoning', 'ranking', 'pairs', 'labels', *BY_STEPS),
  'min_reward': ('best', 'correct'),
  'step_separator': BY_STEPS,
  'rollouts_per_step': BY_STEPS,
  **dict.fromkeys(('good', 'bad', 'threshold'), ('conditioned',)),
  'verify': ('reasoning',),
  'decontaminate': ('best', 'correct', 'reasoning'),  # labels between steps would hide what was copied
  'near_duplicates': ('best', 'correct', 'reasoning', 'conditioned'),
}
FROM = {
  **dict.fromkeys(('temperature', 'top_k', 'top_p', 'min_p', 'seed', 'batch_size'), ('checkpoint',)),
  'num_samples': ('checkpoint', 'api'),
  'api': ('api',),
}


class Job(NamedTuple):
  config: Config
  generate: Generate
  keys_set: set[str]  # of both


def resolve(settings: Mapping[str, Any]) -> Job:
  """Raises ConfigError naming the key."""
  check('generate' in settings, "config section 'generate' is missing: it says what is sampled and kept")
  config = config_lib.resolve({key: value for key, value in settings.items() if key != 'generate'})
  return Job(config, coerce(settings['generate'], Generate, 'generate'), set(config_lib.flatten(settings)))


def evaluation_sets(g: Generate) -> dict[str, Component]:
  """The tasks of `decontaminate` by name. Raises ConfigError."""
  found = {}
  for name in sorted(g.decontaminate):
    key = f'generate.decontaminate.{name}'
    found[name] = coerce(g.decontaminate[name], Component, key)
    check(found[name].weight == 1, f"config key '{key}.weight' cannot act: nothing is drawn by it")
  return found


def price_of(a: Api) -> Price:
  """What the model costs; nothing where the table does not name it. Raises ConfigError."""
  table = {name: coerce(price, Price, f'generate.api.prices.{name}') for name, price in a.prices.items()}
  known = a.model in table
  check(
    known or not a.max_cost, f"config key 'generate.api.prices' has no {a.model!r}: generate.api.max_cost needs what it costs"
  )
  check(known or not table, f"config key 'generate.api.prices': generate.api.model, {a.model!r}, is none of {', '.join(table)}")
  return table.get(a.model, Price(0.0, 0.0))


def check_api(a: Api, num_samples: int) -> None:
  """Raises ConfigError for what api.py would not refuse by the name of the key."""
  for field in ('url', 'model'):
    check(bool(getattr(a, field)), f"config key 'generate.api.{field}' is empty")
  api.checked_url(a.url)
  check('{prompt}' in a.template, f"config key 'generate.api.template': {a.template!r} has no {{prompt}}")
  taken = sorted(api.OWN_OPTIONS & a.options.keys())
  check(not taken, f"config key 'generate.api.options': {', '.join(taken)} cannot be set here")
  greedy = a.options.get('temperature') == 0
  check(
    not greedy or num_samples == 1,
    f"config key 'generate.api.options.temperature': 0 is greedy, {num_samples} samples would be all equal",
  )
  price = price_of(a)
  ranges = {
    'prices': min(price.input, price.output) >= 0, 'max_requests': a.max_requests >= 0, 'max_tokens': a.max_tokens >= 0,
    'max_cost': a.max_cost >= 0, 'concurrency': a.concurrency >= 1, 'timeout': 0 < a.timeout <= api.LONGEST_TIMEOUT,
    'attempts': a.attempts >= 1, 'backoff': a.backoff >= 0,
  }  # fmt: skip
  for field, good in ranges.items():
    check(good, f"config key 'generate.api.{field}': {getattr(a, field)!r} is out of range")


def check_generate(g: Generate, given: set[str]) -> None:
  """Raises ConfigError for what is out of range, and for keys of `given` that cannot act beside the others."""
  for field, choices in (('source', SOURCES), ('keep', KEEPS), ('split', ('train', 'test')), ('verify', VERIFY)):
    check(getattr(g, field) in choices, f"config key 'generate.{field}': {getattr(g, field)!r} is none of {', '.join(choices)}")
  check(
    g.source == 'checkpoint' or g.keep == 'reasoning',
    f"config key 'generate.keep': {g.keep!r} is for source checkpoint; {g.source} gives 'reasoning'",
  )
  ranges = {
    'first': g.first >= 0, 'size': g.size >= 0, 'num_samples': g.num_samples >= 1, 'temperature': g.temperature >= 0,
    'top_k': g.top_k >= 0, 'top_p': 0 < g.top_p <= 1, 'min_p': 0 <= g.min_p < 1, 'seed': 0 <= g.seed < 2**32,
    'batch_size': g.batch_size >= 1, 'max_per_prompt': g.max_per_prompt >= 0, 'step_separator': bool(g.step_separator),
    'rollouts_per_step': g.rollouts_per_step >= 1, 'ngram': g.ngram >= 1, 'near_duplicates': 0 <= g.near_duplicates <= 1,
    'good': bool(g.good), 'bad': bool(g.bad) and g.bad != g.good, 'threshold': 0 < g.threshold <= 1,
  }  # fmt: skip
  for field, good in ranges.items():
    check(good, f"config key 'generate.{field}': {getattr(g, field)!r} is out of range")
  set_here = {key.split('.')[1] for key in given if key.startswith('generate.')}
  for table, what, value in ((ONLY, 'keep', g.keep), (FROM, 'source', g.source)):
    for field, good in table.items():
      check(field not in set_here or value in good,
            f"config key 'generate.{field}' cannot act: it is for generate.{what} {', '.join(good)}, not {value}")  # fmt: skip
  check(bool(g.decontaminate) or 'ngram' not in set_here, "config key 'generate.ngram' cannot act without generate.decontaminate")
  evaluation_sets(g)
  for field in ('top_k', 'top_p', 'min_p'):
    check(
      g.temperature > 0 or f'generate.{field}' not in given, f"config key 'generate.{field}' cannot act: temperature 0 is greedy"
    )
  sampled = g.num_samples if g.keep not in BY_STEPS else max(g.num_samples, g.rollouts_per_step)
  check(sampled == 1 or g.temperature > 0,
        f"config key 'generate.temperature': {g.temperature} is greedy, {sampled} samples would be all equal")  # fmt: skip
  several = g.keep not in ('all', 'ranking', 'pairs') or g.num_samples > 1
  check(several, f"config key 'generate.num_samples': {g.num_samples} leaves nothing to compare for generate.keep {g.keep}")
  check(g.keep != 'ranking' or g.max_per_prompt != 1, "config key 'generate.max_per_prompt': 1 leaves nothing to compare")
  check(g.split == 'train' or g.size > 0, "config key 'generate.size': say how many problems of the test split")
  if g.source == 'api':
    check_api(g.api, g.num_samples)
