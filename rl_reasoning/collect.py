"""One step's rows: from data, or prompts -> rollouts -> rewards -> Batch, or both side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_reasoning import advantages, config as config_lib, data, preferences, reward_models, rewards, rollout, sharding
from rl_reasoning.build import Run
from rl_reasoning.config import check
from rl_reasoning.metrics import PhaseTimer
from rl_reasoning.objectives import reads_rewards
from rl_reasoning.structs import ROLLOUT, Batch, Mean, PyTree, Rollout, TrainState
from rl_reasoning.tokenizer import from_thinking, render_prompt


class Collected(NamedTuple):
  batch: Batch  # on the mesh
  cursor: dict[str, Any]
  samples: list[dict[str, Any]]  # completions with their rewards, for the table and the files
  metrics: dict[str, Mean]


class Judged(NamedTuple):
  """Groups of completions with what the reward functions say of them. The first two count prompts, the others completions."""

  rows: list[dict]
  prompts: list[list[int]]
  asked: list[str]
  texts: list[str]
  rolled: Rollout
  scores: rewards.Scores

  def take(self, groups: Sequence[int]) -> Judged:
    """The given groups, in that order."""
    group = len(self.texts) // len(self.rows)
    n = [i * group + member for i in groups for member in range(group)]

    def arrays(x):
      return jax.tree.map(lambda a: a[n], x)

    return Judged(
      [self.rows[i] for i in groups], [self.prompts[i] for i in groups], [self.asked[i] for i in n], [self.texts[i] for i in n],
      arrays(self.rolled), arrays(self.scores),
    )  # fmt: skip

  def join(self, other: Judged) -> Judged:
    def arrays(a, b):
      return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)

    return Judged(
      self.rows + other.rows, self.prompts + other.prompts, self.asked + other.asked, self.texts + other.texts,
      arrays(self.rolled, other.rolled), arrays(self.scores, other.scores),
    )  # fmt: skip


def to_batch(prompts: list[list[int]], rolled: Rollout, group: int) -> Batch:
  """Right-padded [N, T] rows of prompt and completion; the end token is kept and trained."""
  N = len(prompts) * group
  lengths = [len(prompts[n // group]) for n in range(N)]
  T = sharding.size_class(max(p + int(c) for p, c in zip(lengths, rolled.length_N, strict=True)))
  tokens, mask, logp = np.zeros((N, T), np.int32), np.zeros((N, T), np.float32), np.zeros((N, T), np.float32)
  segment, position = np.zeros((N, T), np.int32), np.zeros((N, T), np.int32)
  for n in range(N):
    start, end = lengths[n], lengths[n] + int(rolled.length_N[n])
    tokens[n, :start], tokens[n, start:end] = prompts[n // group], rolled.tokens_NC[n, : end - start]
    mask[n, start:end], logp[n, start:end] = 1, rolled.logp_NC[n, : end - start]
    segment[n, :end], position[n, :end] = 1, np.arange(end)
  extras = {}
  if rolled.chosen_N is not None:  # -1: the last token, which the sampler has not read, and padding
    extras['chosen'] = np.full((N, T, *rolled.chosen_N[0].shape[1:]), -1, np.int16)
    for n, chosen in enumerate(rolled.chosen_N):
      extras['chosen'][n, : len(chosen)] = chosen
  return Batch(
    tokens=tokens, segment_NT=segment, position_NT=position, mask_NT=mask, logp_sample_NT=logp,
    source_N=np.full(N, ROLLOUT, np.int32), group_N=np.repeat(np.arange(len(prompts), dtype=np.int32), group),
    truncated_N=rolled.truncated_N.astype(np.float32), extras=extras,
  )  # fmt: skip


def model_rewards(
  run: Run,
  frozen: Mapping[str, PyTree],
  prompts: Sequence,
  texts: Sequence[str],
  ended: Any,
  columns: Mapping[str, Sequence],
  routes: Mapping[str, np.ndarray],
  whitened: bool,
) -> dict[str, list[float | None]]:
  """What the reward models that `rewards.functions` names say of completions; prompts as the data have them. `whitened` as in
  reward_models.combine: in training alone."""
  if not run.reward_models:
    return {}
  functions, combined = run.config.rewards.functions, config_lib.combinations(run.config)
  return reward_models.known_rewards(
    functions, run.reward_models, frozen, combined, prompts, texts, ended, columns, run.mesh, routes, whitened
  )


def judging(run: Run) -> tuple[str, ...]:
  """The reward functions that judge rollouts."""
  return run.config.rewards.functions if reads_rewards(run.objective) else ()


def roll_out(run: Run, state: TrainState, rows: list[dict], first_id: int, key: jax.Array, timer: PhaseTimer) -> Judged:
  """Rolls out, decodes and judges. `first_id` counts the step's prompts, so that no two of them share random numbers."""
  config, tok, group = run.config, run.tokenizer, run.objective.sources['rollout']
  template = config.roles.policy.template
  prompts = data.encode_prompts(rows, tok, template, config.data.max_prompt_length)
  with timer('rollout') as phase:
    rolled = rollout.generate(
      run.weights(state)[0], run.arch, prompts, settings=config.rollout, group=group, end_ids=tok.end_ids, key=key,
      dtype=config.model.dtype, mesh=run.mesh, prompt_ids=range(first_id, first_id + len(rows)), records=run.replays,
    )  # fmt: skip
    phase.tokens = int(rolled.length_N.sum())
  with timer('reward'):
    ids = [rolled.tokens_NC[n, : rolled.length_N[n]].tolist() for n in range(len(rolled.length_N))]
    texts = [tok.decode(i) for i in ids]
    asked = [render_prompt(row['prompt'], template, tok) for row in rows for _ in range(group)]
    given = [rewards.as_given(rows[n // group]['prompt'], asked[n], texts[n]) for n in range(len(texts))]
    questions, answers = map(list, zip(*given, strict=True))
    columns = rewards.columns_of([row for row in rows for _ in range(group)])
    r = config.rewards
    whole = [from_thinking(a, text) for a, text in zip(asked, texts, strict=True)]
    questioned = [row['prompt'] for row in rows for _ in range(group)]
    functions, routes = judging(run), rewards.routes(config, columns, len(texts))
    known = model_rewards(run, state.frozen, questioned, whole, ~rolled.truncated_N, columns, routes, True) if functions else {}
    scores = rewards.score(
      functions, r.on_error, questions, answers, ids, columns, options=r.options, timeout=r.timeout,
      max_completion_length=config.rollout.max_completion_length, known=known, routes=routes,
    )  # fmt: skip
  return Judged(rows, prompts, asked, texts, rolled, scores)


def has_spread(run: Run, judged: Judged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(spread_B, reward_N, has_reward_N): whether the weighted rewards of a group differ."""
  given, group = run.objective.given, run.objective.num_generations
  reward, has = advantages.combine_rewards(*judged.scores, given.reward_weights, group)
  spread = advantages.group_statistics(reward, has, group)[2]
  return np.asarray(spread[:, 0]), np.asarray(reward), np.asarray(has)


def refill_size(wanted: int, rate: float, size: int, devices: int) -> int:
  """Prompts of a refill: all of `size`, or a half or a quarter where that still promises the `wanted` groups at this rate of acceptance
  and divides over the devices. Few sizes, because each is a program to compile."""
  fits = [size // part for part in (4, 2) if size % (part * devices) == 0 and size // part * rate >= wanted]
  return fits[0] if fits else size


def accepted_groups(
  run: Run, train: data.Train, state: TrainState, cursor: dict[str, Any], key: jax.Array, timer: PhaseTimer
) -> tuple[Judged, dict[str, Any], dict[str, Mean]]:
  """DAPO's dynamic sampling (2503.14476): `data.batch_size` groups whose rewards differ. What is accepted is kept, and new prompts are
  drawn for the rest, at most `max_refills` times; then groups without spread fill up, which prepare masks."""
  B = run.config.data.batch_size
  devices = sharding.axis_size(run.mesh, 'rows')
  kept, spare, drawn, refills, paid, judged = None, None, 0, -1, 0.0, 0.0
  while True:
    size = refill_size(B - len(kept.rows), len(kept.rows) / drawn, B, devices) if kept else B
    with timer('data'):
      rows, cursor = train.draw(cursor, size)
    got = roll_out(run, state, rows, drawn, key, timer)
    cursor = observed(train, cursor, run, got)
    spread, reward, has = has_spread(run, got)
    drawn, refills, paid, judged = drawn + size, refills + 1, paid + float((reward * has).sum()), judged + float(has.sum())
    good, rest = got.take(np.flatnonzero(spread).tolist()), got.take(np.flatnonzero(~spread).tolist())
    kept, spare = (kept.join(good), spare.join(rest)) if kept and spare else (good, rest)
    if len(kept.rows) >= B or refills == run.objective.max_refills:
      break
  found = len(kept.rows)
  metrics = {
    'dynamic_sampling/refills': Mean(refills, 1),
    'dynamic_sampling/drawn_prompts': Mean(drawn, 1),
    'dynamic_sampling/accepted_ratio': Mean(found, drawn),
    'dynamic_sampling/unfilled_groups': Mean(max(0, B - found), 1),
    'dynamic_sampling/reward_of_all': Mean(paid, judged),  # `reward` speaks of the rows that are kept
  }
  return kept.join(spare).take(range(B)), cursor, metrics


def observed(train: data.Train, cursor: dict[str, Any], run: Run, judged: Judged) -> dict[str, Any]:
  """The cursor with the pass rates that a curriculum goes by: each prompt's mean accuracy."""
  if not train.adapts:
    return cursor
  column = run.config.rewards.functions.index('accuracy')
  group = run.objective.num_generations
  values, has = judged.scores.values_NR[:, column].reshape(-1, group), judged.scores.has_NR[:, column].reshape(-1, group)
  correct = [float(v[h].mean()) if h.any() else None for v, h in zip(values, has, strict=True)]
  return train.observe(cursor, judged.rows, correct)


def from_policy(run: Run, train: data.Train, state: TrainState, key: jax.Array, timer: PhaseTimer) -> Collected:
  """Prompts -> rollouts -> rewards -> rows, still in numpy."""
  config = run.config
  metrics: dict[str, Mean] = {}
  if run.objective.dynamic_sampling:
    judged, cursor, metrics = accepted_groups(run, train, state, state.cursor, key, timer)
  else:
    with timer('data'):
      rows, cursor = train.draw(state.cursor, config.data.batch_size)
    judged = roll_out(run, state, rows, 0, key, timer)
    cursor = observed(train, cursor, run, judged)
  (values, has, failed), names = judged.scores, judging(run)
  batch = to_batch(judged.prompts, judged.rolled, run.objective.sources['rollout'])
  if names:
    batch = batch.replace(
      rewards_NR=values.astype(np.float32), has_reward_NR=has.astype(np.float32), failed_NR=failed.astype(np.float32)
    )
  samples = [
    {
      'prompt': judged.asked[n],
      'completion': judged.texts[n],
      'rewards': {name: float(values[n, r]) if has[n, r] else None for r, name in enumerate(names)},
      'length': int(judged.rolled.length_N[n]),
      'truncated': bool(judged.rolled.truncated_N[n]),
    }
    for n in range(len(judged.texts))
  ]
  return Collected(batch, cursor, samples, metrics)


def encode(run: Run, rows: Sequence[dict]) -> Batch:
  """Rows of data as the objective reads them, numpy."""
  config, reads = run.config, run.objective.reads
  template, limits = config.roles.policy.template, config.data
  if reads in ('demonstrations', 'text'):
    whole = reads == 'text' or run.objective.train_on_prompt
    return data.encode_sft(rows, run.tokenizer, template, limits.max_length, whole)
  size = run.objective.rows_together
  return preferences.encode_preferences(rows, reads, run.tokenizer, template, limits.max_length, limits.overlong, size)


def remembered(run: Run, params: PyTree, batch: Batch) -> Batch:
  """The batch with what frozen layers give of it, where the run keeps that."""
  return batch if run.features is None else run.features.add(params, batch, 16 * sharding.axis_size(run.mesh, 'rows'))


def beside(rolled: Batch, other: Batch, prompts: int) -> Batch:
  """Rows of rollouts and rows of data, those of a prompt adjacent: its completions, then its share of the others. What only completions
  have is 0 in the others; experts are -1, not known."""
  T = max(rolled.tokens.shape[1], other.tokens.shape[1])

  def join(name: str) -> Any:
    a, b = getattr(rolled, name), getattr(other, name)
    if a is None:
      return None
    if b is None:
      b = np.zeros((other.tokens.shape[0], *(other.tokens.shape[1:] if name.endswith('_NT') else a.shape[1:])), a.dtype)
    if name == 'tokens' or name.endswith('_NT'):
      a, b = (np.pad(x, ((0, 0), (0, T - x.shape[1]))) for x in (a, b))
    return np.concatenate([x.reshape(prompts, -1, *x.shape[1:]) for x in (a, b)], axis=1).reshape(-1, *a.shape[1:])

  extras = {}
  if 'chosen' in rolled.extras:
    a = rolled.extras['chosen']
    a = np.pad(a, ((0, 0), (0, T - a.shape[1]), (0, 0), (0, 0)), constant_values=-1)
    b = np.full((other.tokens.shape[0], *a.shape[1:]), -1, a.dtype)
    extras['chosen'] = np.concatenate([x.reshape(prompts, -1, *x.shape[1:]) for x in (a, b)], axis=1).reshape(-1, *a.shape[1:])
  return Batch(**{name: join(name) for name in vars(rolled) if name != 'extras'}, extras=extras)


def imitated(objective) -> int:
  """How many rows of demonstrations a prompt of the batch size comes to."""
  return objective.sources['data'] if objective.reads == 'demonstrations' else 0


def check_rows(run: Run, train: data.Train) -> None:
  """Encodes every row that the run will read. Raises ConfigError for one over the limit: better now than at step 1,000, where raising
  the limit would be another config."""
  config, objective = run.config, run.objective
  template, limits = config.roles.policy.template, config.data
  rolls_out = 'rollout' in objective.sources
  refills = objective.max_refills if rolls_out and objective.dynamic_sampling else 0
  drawn = rolls_out * (1 + refills) + imitated(objective) or 1  # a prompt; of preferences a row of data is one
  rows, read, dropped = iter(train.preview(config.total_steps * limits.batch_size * drawn)), 0, 0
  while some := list(itertools.islice(rows, 1024)):
    read += len(some)
    if rolls_out:
      data.encode_prompts(some, run.tokenizer, template, limits.max_prompt_length)
    if imitated(objective):
      data.encode_rows(some, run.tokenizer, template, limits.max_length)
    elif not rolls_out:
      dropped += preferences.check_preferences(
        some, objective.reads, run.tokenizer, template, limits.max_length, limits.overlong, objective.rows_together
      )
  check(dropped < max(read, 1), f"config key 'data.max_length': {limits.max_length}, and all of the {read} rows are longer")
  if dropped:
    print(f'data: {dropped} of {read} rows are longer than data.max_length = {limits.max_length} and are dropped', flush=True)
  if train.pretrain is not None:
    count = min(len(train.pretrain), config.total_steps * limits.batch_size * objective.sources['data'])
    for start in range(0, count, 1024):
      some, _ = data.batch(train.pretrain, start, min(1024, count - start), train.seed)
      data.encode_rows(some, run.tokenizer, template, limits.max_length)


def collect(run: Run, train: data.Train, state: TrainState, key: jax.Array, timer: PhaseTimer) -> Collected:
  """The rows of the step after `state`, a function of (state, key) alone."""
  config, sources = run.config, run.objective.sources
  if 'rollout' in sources:
    got = from_policy(run, train, state, key, timer)
    if 'data' in sources:
      draw = train.draw if train.pretrain is None else train.draw_pretrain
      with timer('data'):
        rows, cursor = draw(got.cursor, config.data.batch_size * sources['data'])
      got = got._replace(batch=beside(got.batch, encode(run, rows), config.data.batch_size), cursor=cursor)
  else:
    with timer('data'):
      rows, cursor = train.draw(state.cursor, config.data.batch_size * (imitated(run.objective) or 1))
      batch = encode(run, rows)
    if run.features is not None:
      with timer('features'):
        batch = remembered(run, state.params['policy'], batch)
    got = Collected(batch, cursor, [], {})
  tokens = state.cursor['num_tokens'] + int(np.sum(got.batch.segment_NT > 0))
  return got._replace(batch=sharding.put_rows(run.mesh, got.batch), cursor={**got.cursor, 'num_tokens': tokens})
