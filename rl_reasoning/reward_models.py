"""Scores of completions by networks: reward models by name, each with a tokenizer and a template of its own, and combinations of them.

A model is shown what it was trained on: the prompt in its template, the completion, and the end token where the completion has ended. Its
score is read after the last of these tokens (for an outcome model it is the log-odds of a right answer), less its shift. A process model
judges steps and no end: its score is that of the last step, read after the step's last token.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl_reasoning import distributed, model, preemption, sharding, tokenizer, weights
from rl_reasoning.advantages import EPSILON
from rl_reasoning.config import Combination, ConfigError, Reward, check, one_line
from rl_reasoning.data import pad_rows
from rl_reasoning.model import Arch
from rl_reasoning.structs import Array, Batch, PyTree
from rl_reasoning.tokenizer import Tokenizer, after_thinking, render_prompt, split_completion

# What trains a score of whole completions; that of a process model is one of steps, and its end token was never judged.
OBJECTIVES = ('reward_model', 'outcome_reward_model')
PROCESS = 'process_reward_model'
HEADS = ('scalar',)
ROWS, TOKENS = 16, 2**14  # of a micro-batch: that many rows, fewer where they are long


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """What is fixed of a reward model; its weights travel beside it."""

  name: str
  arch: Arch
  tokenizer: Tokenizer
  template: str
  reads: str  # whole | answer
  shift: float  # subtracted from its scores
  dtype: str  # compute
  process: bool = False  # a process model

  def render(self, prompt: Any) -> str:
    """A prompt as the data has it (text or chat messages), in the model's own template."""
    with_key = f'roles.reward.{self.name}.template'
    try:
      return render_prompt(prompt, self.template, self.tokenizer)
    except ConfigError as error:
      raise ConfigError(str(error).replace('roles.policy.template', with_key)) from None


def resolve(name: str, role: Reward, run: Mapping[str, Any] | None, process: bool = False) -> Reward:
  """The role with tokenizer and template filled in. `run` is the config of the run of ours that `init` names, None for a Hugging Face
  folder; `process` says whether a process model will do. Raises ConfigError for an init that is no reward model."""
  key = f"config key 'roles.reward.{name}.init'"
  known = (*OBJECTIVES, PROCESS) if process else OBJECTIVES
  wanted = f'a reward model is a run of objective {" or ".join(known)}, or a Hugging Face sequence classifier'
  if run is None:
    check(pathlib.Path(role.init).exists(), f'{key}: {role.init!r} does not exist')
    check(weights.source_heads(role.init) == HEADS, f'{key}: {role.init} is a language model and scores nothing; {wanted}')
    return dataclasses.replace(role, tokenizer=role.tokenizer or role.init, template=role.template or 'plain')
  trained = run['objective']['name']
  check(trained in known, f'{key}: {role.init} is a run of objective {trained!r}; {wanted}')
  policy = run['roles']['policy']  # the network that the run trained, whatever it is
  return dataclasses.replace(role, tokenizer=role.tokenizer or policy['tokenizer'], template=role.template or policy['template'])


def make(name: str, role: Reward, arch: Arch, shift: float, dtype: str, process: bool = False) -> RewardModel:
  """Of a resolved role. Raises ConfigError for a tokenizer that is missing, or that has more ids than the model embeddings."""
  key = f"config key 'roles.reward.{name}.tokenizer'"
  try:
    tok = tokenizer.load(role.tokenizer)
  except Exception as error:  # transformers raises all kinds
    reason = one_line(error)
    raise ConfigError(f'{key}: the reward model has no tokenizer at {role.tokenizer!r}: {reason}') from error
  fits = tok.vocab_size <= arch.vocab_size
  check(fits, f'{key}: {role.tokenizer!r} has {tok.vocab_size} ids, the model {arch.vocab_size} embeddings')
  made = RewardModel(name, arch, tok, role.template, role.reads, shift, dtype, process)
  try:
    made.render('')
  except ConfigError:
    raise
  except Exception as error:  # a chat template that is missing or fails
    reason = one_line(error)
    raise ConfigError(f"config key 'roles.reward.{name}.template': {role.template!r}: {reason}") from error
  return made


def answer_of(text: str) -> str | None:
  """What R1's helpfulness reward reads (2501.12948, section 2.3.4), the final answer only: what is inside <answer>, or without that tag all
  that comes after the thinking. None where there is no answer, or no telling which."""
  inside = split_completion(text).answer
  if inside is None:
    before, closed, rest = text.partition('</think>')
    inside = rest if closed else before
    if '<answer>' in inside or (not closed and '<think>' in inside):
      return None
  return inside.strip() or None


def encode(made: RewardModel, prompt: Any, completion: str | Sequence[str], ended: bool) -> list[int]:
  """Token ids of a row; empty: there is nothing to score. A completion in steps is encoded step by step, as process models are trained."""
  pieces: list[str | None] = [completion] if isinstance(completion, str) else list(completion)
  if made.reads == 'answer':
    pieces = [answer_of(''.join(map(str, pieces)))]
  if pieces[0] is None:
    return []
  asked = made.render(prompt)
  pieces[0] = after_thinking(asked, pieces[0])
  ids = [i for piece in pieces for i in made.tokenizer.encode(str(piece))]
  return [*made.tokenizer.encode(asked), *ids, *[made.tokenizer.end_id] * (bool(ended) and not made.process)]


@functools.partial(jax.jit, static_argnames=('arch', 'dtype'))
def last_scores(params: PyTree, batch: Batch, arch: Arch, dtype: str) -> Array:
  """[N]: the score after the last token of each row, 0 for one that is all padding."""
  scores_NT = model.scores(params, model.hidden_states(params, arch, batch, dtype=dtype), batch.segment_NT)
  last_N = jnp.maximum(jnp.sum(batch.segment_NT > 0, axis=1) - 1, 0)
  return jnp.take_along_axis(scores_NT, last_N[:, None], axis=1)[:, 0]


def rows_at_once(length: int, mesh: Mesh | None) -> int:
  """Rows of a micro-batch of so many tokens a row: a multiple of the row shards."""
  devices = 1 if mesh is None else sharding.axis_size(mesh, 'rows')
  return -(-max(1, min(ROWS, TOKENS // length)) // devices) * devices


def score_texts(
  made: RewardModel,
  params: PyTree,
  prompts: Sequence[Any],
  completions: Sequence[str | Sequence[str]],
  ended: Sequence[bool],
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(score_N float32, has_N): of rows in any order and number; 0 and False where there is nothing to score.

  `prompts` are those of the data, `completions` whole texts (or their steps), with the <think> that the policy's prompt has opened
  (`tokenizer.from_thinking`). Rows go through the network from the longest on, in micro-batches of one size a padded length, so that few
  programs are compiled; with whom a row shares one changes its score by rounding only. Every process gives rows of its own, if only none.
  """
  ids = [encode(made, *row) for row in zip(prompts, completions, ended, strict=True)]
  order = sorted((n for n in range(len(ids)) if ids[n]), key=lambda n: -len(ids[n]))
  score_N, has_N = np.zeros(len(ids), np.float32), np.zeros(len(ids), bool)
  longest = np.zeros(distributed.largest(len(order)), np.int64)  # of all processes, from the longest on
  longest[: len(order)] = [len(ids[n]) for n in order]
  longest, start = distributed.gather(longest).max(axis=0), 0
  while start < len(longest):
    preemption.check()
    size = len(sharding.own(mesh, rows_at_once(sharding.size_class(int(longest[start])), mesh)))
    some = order[start : start + size]
    batch = pad_rows([(ids[n], [0] * len(ids[n])) for n in some] + [([], [])] * (size - len(some)), np.arange(size))
    batch = batch if mesh is None else sharding.put_batch(mesh, batch)
    score_N[some] = sharding.own_rows(mesh, last_scores(params, batch, made.arch, made.dtype))[: len(some)]
    has_N[some] = True
    start += size
  return np.where(has_N, score_N - np.float32(made.shift), np.float32(0)), has_N


def whiten(x_N: np.ndarray, has_N: np.ndarray) -> np.ndarray:
  """(x - mean) / (std + 1e-4) over the rows that have one; exactly 0 where they are all equal."""
  x = x_N[has_N]
  if not len(x) or x.max() == x.min():
    return np.zeros_like(x_N)
  return np.where(has_N, (x_N - x.mean()) / (x.std() + EPSILON), 0.0)


def combine(
  rule: str, score_MN: np.ndarray, has_MN: np.ndarray, safety_N: np.ndarray, k: float = Combination.k,
  threshold: float = Combination.threshold, whitened: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """(score_N, has_N) of M members; a row that a member has no score for has none.

  mean, minimum, mean_minus_std: mean - k std of an ensemble (std of the M members as they are, ddof 0; 2310.02743 subtracts the variance).
  llama2 (2307.09288, section 3.2.3), members (helpful, safe): the safe score where the prompt is marked `safety` or sigmoid(safe) is below
  the threshold, else the helpful one; where `whitened`, for training, what was chosen is whitened over all rows given, which are to be the
  step's (so that its mean is 0 whatever the policy does).
  """
  score_MN, has_N = np.asarray(score_MN, np.float64), np.all(has_MN, axis=0)
  if rule == 'llama2':
    helpful, safe = score_MN
    unsafe = safe < np.log(threshold / (1 - threshold))  # sigmoid(safe) < threshold, and no overflow
    score = np.where(np.asarray(safety_N, bool) | unsafe, safe, helpful)
    if whitened:
      return whiten(score, has_N), has_N
  elif rule == 'mean':
    score = score_MN.mean(axis=0)
  elif rule == 'minimum':
    score = score_MN.min(axis=0)
  elif rule == 'mean_minus_std':
    score = score_MN.mean(axis=0) - k * score_MN.std(axis=0)
  else:
    raise ValueError(f'no rule {rule!r}')
  return np.where(has_N, score, 0.0), has_N


def known_rewards(
  functions: Sequence[str],
  models: Mapping[str, RewardModel],
  frozen: Mapping[str, PyTree],
  combinations: Mapping[str, Combination],
  prompts: Sequence[Any],
  completions: Sequence[str],
  ended: Sequence[bool],
  columns: Mapping[str, Sequence],
  mesh: Mesh | None = None,
  routes: Mapping[str, np.ndarray] | None = None,
  whitened: bool = True,
) -> dict[str, list[float | None]]:
  """The columns of those `functions` that are reward models or combinations, for `rewards.score(..., known=...)`.

  `frozen` holds the weights of model NAME under 'reward.NAME'; every model runs once, whoever asks for it. The column `safety` of the data
  marks prompts for the llama2 rule. Rows as in `score_texts`; a name in `routes` has a value on its own rows only, and a model scores no
  row that nobody asks it about. `whitened` as in `combine`.
  """
  N = len(completions)
  speaks = {name: np.ones(N, bool) if not routes or name not in routes else routes[name] for name in functions}
  members = {name: combinations[name].of if name in combinations else (name,) for name in functions}
  found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

  def scored(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in found:
      asked = np.any([speaks[function] for function in functions if name in members[function]], axis=0)
      rows = np.flatnonzero(asked).tolist()
      found[name] = score_N, has_N = np.zeros(N, np.float32), np.zeros(N, bool)
      score_N[rows], has_N[rows] = score_texts(
        models[name], frozen[f'reward.{name}'], [prompts[n] for n in rows], [completions[n] for n in rows], [ended[n] for n in rows], mesh
      )  # fmt: skip
    return found[name]

  known: dict[str, list[float | None]] = {}
  for name in functions:
    if name in combinations:
      c = combinations[name]
      score_MN, has_MN = map(np.stack, zip(*map(scored, c.of), strict=True))
      marks = columns.get('safety', [False] * N)
      for mark in marks:
        check(mark in (None, False, True), f"column 'safety' of the data: {mark!r} is neither true nor false")
      safety_N = np.asarray([bool(mark) for mark in marks])
      of_rows = [score_MN.T, (has_MN & speaks[name]).T, safety_N]
      together = c.rule == 'llama2' and whitened  # over the rows of all processes
      score_NM, has_NM, safety_N = [sharding.all_rows(mesh, x) for x in of_rows] if together else of_rows
      score_N, has_N = combine(c.rule, score_NM.T, has_NM.T, safety_N, c.k, c.threshold, whitened)
      if together:
        score_N, has_N = (x[sharding.own(mesh, len(x))] for x in (score_N, has_N))
    elif name in models:
      score_N, has_N = scored(name)
      has_N = has_N & speaks[name]
    else:
      continue
    known[name] = [float(s) if has else None for s, has in zip(score_N, has_N, strict=True)]
  return known
