"""One step's rows: from data, or prompts -> rollouts -> rewards -> Batch, or both side by side.

Of several processes each draws, encodes, rolls out and judges its own prompts (`sharding.own`), and all know the lengths and scores of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_reasoning import (
  advantages,
  config as config_lib,
  data,
  distributed,
  preferences,
  reward_models,
  rewards,
  rollout,
  sharding,
)
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
  """Groups of this process, with what the reward functions say of them. The first two count prompts, the others completions."""

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


def roll_out(
  run: Run, state: TrainState, rows: list[dict], numbers: Sequence[int], key: jax.Array, timer: PhaseTimer
) -> tuple[Judged, rewards.Scores]:
  """(groups of this process: rolled out, decoded and judged; the scores of all processes). `numbers` count the step's prompts, so that no
  two of them share random numbers."""
  config, tok, group = run.config, run.tokenizer, run.objective.sources['rollout']
  template = config.roles.policy.template
  prompts = data.encode_prompts(rows, tok, template, config.data.max_prompt_length)
  with timer('rollout') as phase:
    rolled = rollout.generate(
      run.weights(state)[0], run.arch, prompts, settings=config.rollout, group=group, end_ids=tok.end_ids, key=key,
      dtype=config.model.dtype, mesh=run.mesh, prompt_ids=numbers, records=run.replays,
    )  # fmt: skip
    phase.tokens = int(sharding.all_rows(run.mesh, rolled.length_N).sum())
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
    of_all = rewards.Scores(*(sharding.all_rows(run.mesh, x) for x in scores))
    own = sharding.own(run.mesh, len(of_all.values_NR))
  return Judged(rows, prompts, asked, texts, rolled, rewards.Scores(*(x[own] for x in of_all))), of_all


def has_spread(run: Run, scores: rewards.Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(spread_B, reward_N, has_reward_N): whether the weighted rewards of a group differ."""
  given, group = run.objective.given, run.objective.num_generations
  reward, has = advantages.combine_rewards(*scores, given.reward_weights, group)
  spread = advantages.group_statistics(reward, has, group)[2]
  return np.asarray(spread[:, 0]), np.asarray(reward), np.asarray(has)


def refill_size(wanted: int, rate: float, size: int, devices: int) -> int:
  """Prompts of a refill: all of `size`, or a half or a quarter where that still promises the `wanted` groups at this rate of acceptance
  and divides over the devices. Few sizes, because each is a program to compile."""
  fits = [size // part for part in (4, 2) if size % (part * devices) == 0 and size // part * rate >= wanted]
  return fits[0] if fits else size


def regrouped(run: Run, judged: Judged, ids: Sequence[int], holders: Mapping[int, set[int]], order: Sequence[int]) -> Judged:
  """This process's share of `order`, the groups of the step; it has those of `ids`. A group that was rolled out elsewhere comes from the
  first of its `holders`, processes by id; the others stay where they are."""
  at, here = {i: n for n, i in enumerate(ids)}, distributed.index()
  places = [[order[b] for b in sharding.own(run.mesh, len(order), process)] for process in range(distributed.count())]
  outgoing = {
    process: {i: judged.take([at[i]]) for i in wanted if process not in holders[i] and min(holders[i]) == here}
    for process, wanted in enumerate(places)
  }
  for i, group in distributed.move(outgoing, [i for i in places[here] if i not in at]).items():
    at[i], judged = len(at), judged.join(group)
  return judged.take([at[i] for i in places[here]])


def accepted_groups(
  run: Run, train: data.Train, state: TrainState, cursor: dict[str, Any], key: jax.Array, timer: PhaseTimer
) -> tuple[Judged, dict[str, Any], dict[str, Mean]]:
  """DAPO's dynamic sampling (2503.14476): `data.batch_size` groups whose rewards differ. What is accepted is kept, and new prompts are
  drawn for the rest, at most `max_refills` times; then groups without spread fill up, which prepare masks."""
  B = run.config.data.batch_size
  devices = sharding.axis_size(run.mesh, 'rollout_rows')
  mine, ids, holders = None, [], {}  # the groups here; for every id the processes that hold its group
  good, spare, drawn, refills, paid, judged = [], [], 0, -1, 0.0, 0.0
  while True:
    size = refill_size(B - len(good), len(good) / drawn, B, devices) if drawn else B
    with timer('data'):
      own = sharding.own(run.mesh, size)
      rows, cursor = train.draw(cursor, size, own)
    got, scores = roll_out(run, state, rows, (drawn + own).tolist(), key, timer)
    cursor = observed(train, cursor, run, got.rows, scores)
    spread, reward, has = has_spread(run, scores)
    for process in range(distributed.count()):
      for b in sharding.own(run.mesh, size, process):
        holders.setdefault(drawn + int(b), set()).add(process)
    mine, ids = mine.join(got) if mine else got, ids + (drawn + own).tolist()
    good += (drawn + np.flatnonzero(spread)).tolist()
    spare += (drawn + np.flatnonzero(~spread)).tolist()
    drawn, refills, paid, judged = drawn + size, refills + 1, paid + float((reward * has).sum()), judged + float(has.sum())
    if len(good) >= B or refills == run.objective.max_refills:
      break
  metrics = {
    'dynamic_sampling/refills': Mean(refills, 1),
    'dynamic_sampling/drawn_prompts': Mean(drawn, 1),
    'dynamic_sampling/accepted_ratio': Mean(len(good), drawn),
    'dynamic_sampling/unfilled_groups': Mean(max(0, B - len(good)), 1),
    'dynamic_sampling/reward_of_all': Mean(paid, judged),  # `reward` speaks of the rows that are kept
  }
  return regrouped(run, mine, ids, holders, (good + spare)[:B]), cursor, metrics


def observed(train: data.Train, cursor: dict[str, Any], run: Run, rows: list[dict], scores: rewards.Scores) -> dict[str, Any]:
  """The cursor with the pass rates that a curriculum goes by: each prompt's mean accuracy. Rows are this process's, scores all."""
  if not train.adapts:
    return cursor
  column = run.config.rewards.functions.index('accuracy')
  group = run.objective.num_generations
  values, has = scores.values_NR[:, column].reshape(-1, group), scores.has_NR[:, column].reshape(-1, group)
  correct = [float(v[h].mean()) if h.any() else None for v, h in zip(values, has, strict=True)]
  if distributed.count() > 1:
    tasks = list(train.sources)
    own = np.asarray([tasks.index(row['dataset']) for row in rows])
    rows = [{'dataset': tasks[i]} for i in sharding.all_rows(run.mesh, own)]
  return train.observe(cursor, rows, correct)


def from_policy(run: Run, train: data.Train, state: TrainState, key: jax.Array, timer: PhaseTimer) -> Collected:
  """Prompts -> rollouts -> rewards -> rows, still in numpy."""
  config = run.config
  metrics: dict[str, Mean] = {}
  if run.objective.dynamic_sampling:
    judged, cursor, metrics = accepted_groups(run, train, state, state.cursor, key, timer)
  else:
    with timer('data'):
      own = sharding.own(run.mesh, config.data.batch_size)
      rows, cursor = train.draw(state.cursor, config.data.batch_size, own)
    judged, scores = roll_out(run, state, rows, own.tolist(), key, timer)
    cursor = observed(train, cursor, run, judged.rows, scores)
  (values, has, failed), names = judged.scores, judging(run)
  batch = to_batch(judged.prompts, judged.rolled, run.objective.sources['rollout'])
  batch = batch.replace(group_N=sharding.own(run.mesh, config.data.batch_size)[batch.group_N].astype(np.int32))
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
  """Rows of data as the objective reads them, numpy. `group_N` counts from the first of them."""
  config, reads = run.config, run.objective.reads
  template, limits = config.roles.policy.template, config.data
  if reads in ('demonstrations', 'text'):
    whole = reads == 'text' or run.objective.train_on_prompt
    return data.encode_sft(rows, run.tokenizer, template, limits.max_length, whole)
  size = run.objective.rows_together
  return preferences.encode_preferences(rows, reads, run.tokenizer, template, limits.max_length, limits.overlong, size)


def drawn_rows(run: Run, draw: Callable, cursor: dict[str, Any], size: int) -> tuple[Batch, dict[str, Any]]:
  """(the encoded rows of this process of the next `size` rows of data, next cursor). KTO's mismatched completions are those of
  neighbours, wherever they belong: of them every process reads all rows, and keeps its own."""
  own, neighbours = sharding.own(run.mesh, size), run.objective.reads == 'unpaired'
  rows, cursor = draw(cursor, size, None if neighbours else own)
  batch = encode(run, rows)
  if neighbours:
    n = sharding.own(run.mesh, batch.tokens.shape[0])
    return jax.tree.map(lambda x: x[n], batch), cursor
  return batch.replace(group_N=own[batch.group_N].astype(np.int32)), cursor


def remembered(run: Run, params: PyTree, batch: Batch) -> Batch:
  """The batch with what frozen layers give of it, where the run keeps that."""
  return batch if run.features is None else run.features.add(params, batch, 16 * sharding.axis_size(run.mesh, 'rows'))


def beside(rolled: Batch, other: Batch, prompts: int) -> Batch:
  """Rows of rollouts and rows of data, those of a prompt adjacent: its completions, then its share of the others. What only completions
  have is 0 in the others; experts are -1, not known."""
  T = max(rolled.tokens.shape[1], other.tokens.shape[1])
  rolled, other = sharding.widened(rolled, T), sharding.widened(other, T)

  def together(a, b):
    return np.concatenate([x.reshape(prompts, -1, *x.shape[1:]) for x in (a, b)], axis=1).reshape(-1, *a.shape[1:])

  def join(name: str) -> Any:
    a, b = getattr(rolled, name), getattr(other, name)
    return a if a is None else together(a, np.zeros((other.tokens.shape[0], *a.shape[1:]), a.dtype) if b is None else b)

  extras = {}
  if 'chosen' in rolled.extras:
    a = rolled.extras['chosen']
    extras['chosen'] = together(a, np.full((other.tokens.shape[0], *a.shape[1:]), -1, a.dtype))
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
  """The rows of the step after `state`, a function of (state, key) alone. Samples are those of this process."""
  config, sources = run.config, run.objective.sources
  if 'rollout' in sources:
    got = from_policy(run, train, state, key, timer)
    if 'data' in sources:
      draw = train.draw if train.pretrain is None else train.draw_pretrain
      with timer('data'):
        batch, cursor = drawn_rows(run, draw, got.cursor, config.data.batch_size * sources['data'])
      prompts = len(sharding.own(run.mesh, config.data.batch_size))
      got = got._replace(batch=beside(got.batch, batch, prompts), cursor=cursor)
  else:
    with timer('data'):
      batch, cursor = drawn_rows(run, train.draw, state.cursor, config.data.batch_size * (imitated(run.objective) or 1))
    if run.features is not None:
      with timer('features'):
        batch = remembered(run, state.params['policy'], batch)
    got = Collected(batch, cursor, [], {})
  length_N = sharding.all_rows(run.mesh, np.sum(got.batch.segment_NT > 0, axis=1))
  tokens = state.cursor['num_tokens'] + int(length_N.sum())
  return got._replace(batch=sharding.put_batch(run.mesh, got.batch), cursor={**got.cursor, 'num_tokens': tokens})
