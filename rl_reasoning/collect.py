"""One step's rows: from data, or prompts -> rollouts -> rewards -> Batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from rl_reasoning import data, rewards, rollout, sharding
from rl_reasoning.build import Run
from rl_reasoning.metrics import PhaseTimer
from rl_reasoning.structs import ROLLOUT, Batch, Rollout, TrainState
from rl_reasoning.tokenizer import render_prompt


class Collected(NamedTuple):
  batch: Batch  # on the mesh
  cursor: dict[str, int]
  samples: list[dict[str, Any]]  # completions with their rewards, for the table and the files


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
  return Batch(
    tokens=tokens, segment_NT=segment, position_NT=position, mask_NT=mask, logp_sample_NT=logp,
    source_N=np.full(N, ROLLOUT, np.int32), group_N=np.repeat(np.arange(len(prompts), dtype=np.int32), group),
    truncated_N=rolled.truncated_N.astype(np.float32),
  )  # fmt: skip


def from_policy(run: Run, state: TrainState, rows: list[dict], key: jax.Array, timer: PhaseTimer) -> tuple[Batch, list[dict]]:
  """Rolls out, decodes and judges: (batch of numpy arrays, samples)."""
  config, tok, group = run.config, run.tokenizer, run.objective.sources['rollout']
  prompts = data.encode_prompts(rows, tok, config.roles.policy.template, config.data.max_prompt_length)
  with timer('rollout') as phase:
    rolled = rollout.generate(
      state.params['policy'], run.arch, prompts, settings=config.rollout, group=group, end_ids=tok.end_ids, key=key,
      dtype=config.model.dtype, mesh=run.mesh,
    )  # fmt: skip
    phase.tokens = int(rolled.length_N.sum())
  batch = to_batch(prompts, rolled, group)
  with timer('reward'):
    ids = [rolled.tokens_NC[n, : rolled.length_N[n]].tolist() for n in range(len(rolled.length_N))]
    texts = [tok.decode(i) for i in ids]
    asked = [render_prompt(row['prompt'], config.roles.policy.template, tok) for row in rows for _ in range(group)]
    columns = rewards.columns_of([row for row in rows for _ in range(group)])
    names = config.rewards.functions
    given = [rewards.as_given(rows[n // group]['prompt'], asked[n], texts[n]) for n in range(len(texts))]
    questions, answers = map(list, zip(*given, strict=True))
    values, has, failed = rewards.score(names, config.rewards.on_error, questions, answers, ids, columns)
  batch = batch.replace(
    rewards_NR=values.astype(np.float32), has_reward_NR=has.astype(np.float32), failed_NR=failed.astype(np.float32)
  )
  samples = [
    {
      'prompt': asked[n],
      'completion': texts[n],
      'rewards': {name: float(values[n, r]) if has[n, r] else None for r, name in enumerate(names)},
      'length': int(rolled.length_N[n]),
      'truncated': bool(rolled.truncated_N[n]),
    }
    for n in range(len(texts))
  ]
  return batch, samples


def check_rows(run: Run, source: data.Source) -> None:
  """Encodes every row that the run will read. Raises ConfigError for one over the limit: better now than at step 1,000, where raising
  the limit would be another config."""
  config = run.config
  template, limits = config.roles.policy.template, config.data
  count = min(len(source), config.total_steps * limits.batch_size)
  for start in range(0, count, 1024):
    rows, _ = data.batch(source, start, min(1024, count - start), config.seed)
    if 'rollout' in run.objective.sources:
      data.encode_prompts(rows, run.tokenizer, template, limits.max_prompt_length)
    else:
      data.encode_rows(rows, run.tokenizer, template, limits.max_length)


def collect(run: Run, source: data.Source, state: TrainState, key: jax.Array, timer: PhaseTimer) -> Collected:
  """The rows of the step after `state`, a function of (state, key) alone."""
  config = run.config
  with timer('data'):
    rows, position = data.batch(source, state.cursor['train'], config.data.batch_size, config.seed)
  if 'rollout' in run.objective.sources:
    batch, samples = from_policy(run, state, rows, key, timer)
  else:
    with timer('data'):
      template = config.roles.policy.template
      batch = data.encode_sft(rows, run.tokenizer, template, config.data.max_length, run.objective.train_on_prompt)
    samples = []
  tokens = state.cursor['num_tokens'] + int(np.sum(batch.segment_NT > 0))
  return Collected(sharding.put_rows(run.mesh, batch), {'train': position, 'num_tokens': tokens}, samples)
