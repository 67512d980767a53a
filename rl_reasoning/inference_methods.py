"""The ways of rl_reasoning.inference to spend tokens: a frozen dataclass each, whose fields are its config keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rl_reasoning import evaluators, rounds
from rl_reasoning.config import Config, check, check_file_name, digest, from_mapping
from rl_reasoning.estimates import best_at_k, maj_at_k, pass_at_k, weighted_maj_at_k
from rl_reasoning.rank_metrics import sigmoid
from rl_reasoning.rounds import Chain, Source
from rl_reasoning.tokenizer import from_thinking
from rl_reasoning.verify.math import extract_answer

Samples = list[dict]  # of one problem


class Asked(NamedTuple):
  """What a method is asked: some problems, as token ids and as numbers, and how beginnings are scored."""

  prompts: list[list[int]]
  problems: list[int]
  score: rounds.Score
  rows: int  # problems at once


class Made(NamedTuple):
  chain: Chain
  tokens: int  # that it took


class Point(NamedTuple):
  """One point of a method's curve, over problems: how right (None: no gold answer), and tokens."""

  label: str
  right: list[float | None]
  tokens: list[float]


def mean(samples: Samples, key: str) -> float:
  return sum(s[key] for s in samples) / len(samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """One completion a problem. The fields of a class are the keys of scale.NAME."""

  method: str
  prefix: str = ''  # begins every answer, and is no token of it
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  words: ClassVar[tuple[str, ...]] = ()  # what `by` may be beside a reward model

  @property
  def samples(self) -> int:
    return 1

  def refusals(self) -> dict[str, bool]:
    """field -> whether its value is out of range."""
    return {
      'temperature': self.temperature < 0,
      'top_k': self.top_k < 0,
      'top_p': not 0 < self.top_p <= 1,
      'min_p': not 0 <= self.min_p < 1,
    }

  def variants(self) -> dict[str, Method]:
    """What is sampled apart, by what its name adds to the method's."""
    return {'': self}

  def question(self, prompt: Any) -> Any:
    return prompt

  def limit(self, config: Config) -> int:
    return config.rollout.max_completion_length

  def make(self, source: Source, asked: Asked) -> list[Made]:
    found = rounds.sample(source, asked.prompts, asked.problems, self.samples, asked.rows)
    return [Made(chain, len(chain.ids)) for chains in found for chain in chains]

  def points(self, label: str, problems: Sequence[Samples]) -> list[Point]:
    return [Point(label, [s[0]['accuracy'] for s in problems], [mean(s, 'tokens') for s in problems])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(Method):
  instruction: str = "\nLet's think step by step."  # appended to the question

  def question(self, prompt: Any) -> Any:
    if isinstance(prompt, str):
      return prompt + self.instruction
    return [*prompt[:-1], {**prompt[-1], 'content': prompt[-1]['content'] + self.instruction}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Method):
  shots: int = 4
  separator: str = '\n\n'  # after an example, but not in a chat, where examples are turns

  def refusals(self) -> dict[str, bool]:
    return {**super().refusals(), 'shots': self.shots < 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Method):
  """Several samples a problem, the answer one of theirs."""

  num_samples: tuple[int, ...] = (1, 2, 4, 8)  # a point each; the most are drawn
  temperature: float = 1.0

  @property
  def samples(self) -> int:
    return max(self.num_samples)

  def refusals(self) -> dict[str, bool]:
    ks = self.num_samples
    bad = not ks or min(ks) < 1 or len({*ks}) < len(ks)
    return {**super().refusals(), 'num_samples': bad, 'temperature': self.temperature <= 0}

  def at(self, samples: Samples, k: int) -> float:
    """How right the answer is that k of the samples come to."""
    raise NotImplementedError

  def points(self, label: str, problems: Sequence[Samples]) -> list[Point]:
    def right(samples: Samples, k: int) -> float | None:
      return None if any(s['accuracy'] is None for s in samples) else self.at(samples, k)

    return [
      Point(str(k), [right(s, k) for s in problems], [k * mean(s, 'tokens') for s in problems]) for k in sorted(self.num_samples)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote(Sampled):
  def at(self, samples: Samples, k: int) -> float:
    return maj_at_k(len(samples), evaluators.votes(samples), k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedVote(Sampled):
  by: str

  words: ClassVar = ('likelihood', 'likelihood_per_token')

  def log_weights(self, samples: Samples) -> list[float]:
    if self.by not in self.words:
      scores = [s['rewards'][self.by] for s in samples]
      return [-math.inf if score is None else -float(np.logaddexp(0, -score)) for score in scores]  # of the sigmoid
    return [s['logp'] if self.by == 'likelihood' else s['logp'] / s['length'] for s in samples]

  def at(self, samples: Samples, k: int) -> float:
    answers = [None if s['answer'] is None else evaluators.vote(s['answer']) for s in samples]
    number = {answer: n for n, answer in enumerate(dict.fromkeys(answers))}
    groups = [None if answer is None else number[answer] for answer in answers]
    return weighted_maj_at_k(groups, self.log_weights(samples), [s['accuracy'] for s in samples], k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(Sampled):
  by: str

  words: ClassVar = ('oracle',)

  def at(self, samples: Samples, k: int) -> float:
    if self.by == 'oracle':
      return pass_at_k(len(samples), sum(s['accuracy'] == 1 for s in samples), k)
    scores = [s['rewards'][self.by] for s in samples]
    return best_at_k([-math.inf if x is None else x for x in scores], [s['accuracy'] for s in samples], k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetForcing(Method):
  budgets: tuple[tuple[int, ...], ...]  # (minimum, maximum) tokens of thinking, a point each
  prefix: str = '<think>'  # opens the thinking
  end: str = '</think>'  # closes it
  wait: str = 'Wait'  # takes the place of what closed it too early
  forced: str = ''  # follows `end` where the maximum has closed it: '\nFinal Answer:'
  max_answer: int = 64  # tokens after the thinking; rollout.max_completion_length plays no part

  def refusals(self) -> dict[str, bool]:
    good = [len(b) == 2 and 0 <= b[0] <= b[1] and b[1] > 0 for b in self.budgets]
    found = {'budgets': not good or not all(good) or len({*self.budgets}) < len(good), 'max_answer': self.max_answer < 1}
    return {**super().refusals(), **found, 'end': not self.end, 'wait': not self.wait}

  def variants(self) -> dict[str, Method]:
    return {f'{b[0]}-{b[1]}': dataclasses.replace(self, budgets=(b,)) for b in self.budgets}

  def limit(self, config: Config) -> int:
    return max(self.budgets[0][1], self.max_answer)

  def make(self, source: Source, asked: Asked) -> list[Made]:
    ((minimum, maximum),) = self.budgets
    budget = rounds.Budget(minimum, maximum, self.max_answer, self.end, self.wait, self.forced)
    chains = rounds.force_budget(source, asked.prompts, asked.problems, budget, asked.rows)
    return [Made(chain, len(chain.ids)) for chain in chains]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioned(Method):
  label: str  # stands before every step: the `good` of the data that the policy learned from
  step_separator: str = '\n'  # ends a step

  def refusals(self) -> dict[str, bool]:
    return {**super().refusals(), 'label': not self.label, 'step_separator': not self.step_separator}

  def make(self, source: Source, asked: Asked) -> list[Made]:
    chains = rounds.put_before_steps(source, asked.prompts, asked.problems, self.label, self.step_separator, asked.rows)
    return [Made(chain, len(chain.ids)) for chain in chains]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(Method):
  by: str
  beams: tuple[int, ...] = (1, 2, 4)  # a point each
  expansions: int = 4  # samples of the next step of each beam
  step_separator: str = '\n'  # ends a step
  max_steps: int = 40
  temperature: float = 1.0

  def refusals(self) -> dict[str, bool]:
    bad = not self.beams or min(self.beams) < 1 or len({*self.beams}) < len(self.beams)
    counts = {'expansions': self.expansions < 1, 'max_steps': self.max_steps < 1, 'step_separator': not self.step_separator}
    return {**super().refusals(), **counts, 'beams': bad, 'temperature': self.temperature <= 0}

  def variants(self) -> dict[str, Method]:
    return {str(n): dataclasses.replace(self, beams=(n,)) for n in self.beams}

  def make(self, source: Source, asked: Asked) -> list[Made]:
    tok = source.run.tokenizer
    how = rounds.Beams(self.beams[0], self.expansions, self.step_separator, self.max_steps)
    kept, tokens = rounds.beam_search(source, asked.prompts, asked.problems, how, asked.score, asked.rows * self.beams[0])
    texts = [[tok.decode(prompt) for prompt in asked.prompts], [[tok.decode(c.ids) for c in chains] for chains in kept]]
    return [
      Made(chosen(chains, [from_thinking(p, t) for t in ts]), n) for p, ts, chains, n in zip(*texts, kept, tokens, strict=True)
    ]


def chosen(chains: Sequence[Chain], texts: Sequence[str]) -> Chain:
  """Of the beams with the answer of the largest summed sigmoid(score) the best; without any answer the best of all. Best first."""
  sums: dict[Any, float] = {}
  answers = [extract_answer(text, flexible=True) for text in texts]
  keys = [None if a is None else (evaluators.vote(a),) for a in answers]
  for chain, key in zip(chains, keys, strict=True):
    if key is not None:
      sums[key] = sums.get(key, 0.0) + float(sigmoid(np.asarray(chain.score)))
  winner = max(sums, key=lambda key: sums[key], default=None)
  return chains[keys.index(winner)] if winner is not None else chains[0]


def by(method: Method) -> str:
  """What the method goes by, where it has such a key."""
  return getattr(method, 'by', '')


METHODS: dict[str, type[Method]] = {
  'zero_shot': ZeroShot,
  'few_shot': FewShot,
  'vote': Vote,
  'weighted_vote': WeightedVote,
  'best_of_n': BestOfN,
  'budget_forcing': BudgetForcing,
  'conditioned': Conditioned,
  'beam_search': BeamSearch,
}


def make_methods(settings: Mapping[str, Any], models: Sequence[str]) -> dict[str, Method]:
  """The methods by name; `models` are the reward models. Raises ConfigError naming the key that is unknown, out of range or without
  effect."""
  methods: dict[str, Method] = {}
  check(isinstance(settings, Mapping), f"config section 'scale': {settings!r} is not a mapping")
  check(bool(settings), "config section 'scale' is empty: it says how tokens are spent, try {'voting': {'method': 'vote'}}")
  for name, options in settings.items():
    key = f'scale.{name}'
    check_file_name(key, name, 150)
    check(isinstance(options, Mapping), f'config key {key!r}: {options!r} is not a mapping')
    kind = options.get('method')
    check(kind in METHODS, f"config key '{key}.method': {kind!r} is none of {', '.join(METHODS)}")
    method = methods[name] = from_mapping(METHODS[kind], options, key + '.')
    for field, bad in method.refusals().items():
      check(not bad, f"config key '{key}.{field}': {getattr(method, field)!r} is out of range")
    for field in ('top_k', 'top_p', 'min_p'):
      check(method.temperature > 0 or field not in options, f"config key '{key}.{field}' cannot act: temperature 0 is greedy")
    if 'by' in options:
      known, there = ''.join(f'{word}, ' for word in method.words), ', '.join(models) or 'it is empty'
      check(
        by(method) in (*method.words, *models), f"config key '{key}.by': {by(method)!r} is none of {known}roles.reward: {there}"
      )
  return methods


def alike(method: Method) -> str:
  """The same for methods that draw the same samples: what makes of them one answer, and how many they are, is left out."""
  settings = dataclasses.asdict(method)
  if isinstance(method, Sampled):
    settings = {**{k: v for k, v in settings.items() if k not in ('by', 'num_samples')}, 'method': 'sampled'}
  return digest(settings)
