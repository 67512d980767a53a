"""A step's rows: dynamic sampling keeps what it accepted, refills within its bound, and goes on exactly."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rl_reasoning import build, collect, config, metrics, rollout
from rl_reasoning.structs import Rollout, TrainState

DAPO = {
  'data': {'train_size': 64, 'batch_size': 8, 'max_prompt_length': 32},
  'objective': {'name': 'dapo', 'num_generations': 4, 'max_refills': 3},
  'rewards': {'functions': ('format',)},
  'rollout': {'max_completion_length': 16},
}
GOOD, BAD = (
  [258, 49, 259, 260, 53, 261, 257],
  [65, 65, 257],
)  # '<think>1</think><answer>5</answer>' and 'AA', with their end token


class Numbered:
  """Prompts '0', '1', ...: the cursor counts them, and notes what a curriculum is told."""

  adapts = False

  def observe(self, cursor, rows, correct):
    return {**cursor, 'seen': cursor.get('seen', []) + [(row['prompt'], c) for row, c in zip(rows, correct, strict=True)]}

  def draw(self, cursor, size, chosen):
    at = cursor['train']
    return [{'prompt': str(at + i), 'answer': '5'} for i in chosen], {**cursor, 'train': at + size}


def fake(spread, asked, params, arch, prompts, *, settings, group, prompt_ids, **_):
  """Groups of prompts in `spread` have one good completion among bad ones; the others are all bad."""
  asked.append(list(prompt_ids))
  N, C = len(prompts) * group, settings.max_completion_length
  tokens, length = np.zeros((N, C), np.int32), np.zeros(N, np.int32)
  for n in range(N):
    ids = GOOD if n % group == 0 and int(bytes(prompts[n // group]).decode()) in spread else BAD
    tokens[n, : len(ids)], length[n] = ids, len(ids)
  return Rollout(tokens, np.full((N, C), -1.0, np.float32), length, np.zeros(N, bool))


@pytest.fixture
def sample(monkeypatch):
  def run_once(spread, settings=DAPO, cursor=0, adapts=False):
    run = build.build(config.resolve(settings))
    asked: list = []
    monkeypatch.setattr(rollout, 'generate', functools.partial(fake, spread, asked))
    state = TrainState(0, {'train': cursor, 'num_tokens': 0}, 0, {'policy': None}, {}, {}, {}, {})
    with jax.set_mesh(run.mesh):
      numbered = Numbered()
      numbered.adapts = adapts
      got = collect.collect(run, numbered, state, jax.random.key(0), metrics.PhaseTimer())
      prepared = jax.jit(run.objective.prepare)({}, got.batch)[0]
    return got, prepared, asked

  return run_once


def prompts_of(got):
  return [s['prompt'] for s in got.samples[::4]]


def test_accepted_groups_are_kept(sample):
  """Failure: a refill throws away groups that had spread, or fills the step with others than the first accepted."""
  got, prepared, asked = sample({0, 2, 3, 9, 10, 12, 14, 17, 18, 19})
  assert prompts_of(got) == ['0', '2', '3', '9', '10', '12', '14', '17']
  assert got.cursor['train'] == 24 and asked == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
  values = metrics.summarise(got.metrics)
  assert values == {
    'dynamic_sampling/refills': 2, 'dynamic_sampling/drawn_prompts': 24, 'dynamic_sampling/accepted_ratio': 10 / 24,
    'dynamic_sampling/unfilled_groups': 0, 'dynamic_sampling/reward_of_all': 10 / 96,
  }  # fmt: skip
  assert (np.asarray(prepared.mask_NT).sum(axis=1) > 0).all()
  for n, one in enumerate(got.samples):  # rows, rewards and tokens stay together
    length = 7 if n % 4 == 0 else 3
    assert one['length'] == length == np.asarray(got.batch.mask_NT)[n].sum() and one['rewards']['format'] == (n % 4 == 0)


def test_refills_are_bounded(sample):
  """Failure: a task without spread is sampled for ever, or what fills up is trained."""
  got, prepared, asked = sample({1, 30})
  assert len(asked) == 1 + 3 and prompts_of(got)[:2] == ['1', '30'] and prompts_of(got)[2:] == ['0', '2', '3', '4', '5', '6']
  alive = np.asarray(prepared.mask_NT).sum(axis=1) > 0
  assert alive.tolist() == [True] * 8 + [False] * 24
  values = metrics.summarise(got.metrics)
  assert values['dynamic_sampling/unfilled_groups'] == 6 and values['dynamic_sampling/refills'] == 3


def test_without_it_nothing_is_drawn_again(sample):
  """Failure: dynamic sampling cannot be switched off."""
  settings = config.merge(DAPO, {'objective': {'dynamic_sampling': False}})
  settings['objective'].pop('max_refills')
  got, prepared, asked = sample({1}, settings)
  assert asked == [list(range(8))] and not got.metrics and prompts_of(got) == [str(i) for i in range(8)]
  assert (np.asarray(prepared.mask_NT).sum(axis=1) > 0).all()  # rows without spread count in N and M; their advantage is 0
  assert not np.asarray(prepared.advantage_NT)[8:].any() and not np.asarray(prepared.advantage_NT)[:4].any()


def test_goes_on_from_the_cursor(sample):
  """Failure: the next step reads prompts twice, or a resumed run reads others."""
  spread = {i for i in range(100) if i % 3 == 0}
  first = sample(spread)[0]
  second = sample(spread, cursor=first.cursor['train'])[0]
  assert not set(prompts_of(first)) & set(prompts_of(second))
  again = sample(spread, cursor=first.cursor['train'])[0]
  assert again.cursor == second.cursor and prompts_of(again) == prompts_of(second)


def test_a_curriculum_is_told_of_every_prompt(sample):
  """Failure: pass rates are measured on the accepted groups alone, where no task is ever mastered, or on another reward."""
  settings = config.merge(DAPO, {'rewards': {'functions': ('format', 'accuracy')}})
  got = sample({0, 9}, settings, adapts=True)[0]
  assert [p for p, _ in got.cursor['seen']] == [str(i) for i in range(got.cursor['train'])]
  assert {p for p, c in got.cursor['seen'] if c == 0.25} == {'0', '9'} and {c for _, c in got.cursor['seen']} == {0.25, 0.0}


@pytest.mark.parametrize(
  'wanted, rate, size, devices, found',
  [
    (1, 0.5, 32, 1, 8),
    (5, 0.5, 32, 1, 16),
    (9, 0.5, 32, 1, 32),
    (1, 0.0, 32, 1, 32),
    (1, 1.0, 8, 8, 8),
    (1, 0.9, 16, 8, 8),
    (3, 1.0, 6, 1, 3),
  ],
)
def test_refill_size(wanted, rate, size, devices, found):
  """Failure: a refill is too small to fill the step, does not divide over the devices, or is of an odd size that compiles anew."""
  assert collect.refill_size(wanted, rate, size, devices) == found


def test_judged_keeps_groups_together():
  """Failure: taking or joining groups mixes rows of one prompt with another's rewards."""
  from rl_reasoning.rewards import Scores

  def judged(first):
    n = np.arange(first * 2, first * 2 + 6)
    return collect.Judged(
      [{'i': i} for i in range(first, first + 3)], [[i] for i in range(first, first + 3)], [f'q{i}' for i in n], [f'c{i}' for i in n],
      Rollout(n[:, None], n[:, None] * 1.0, n, n > 2), Scores(n[:, None] * 1.0, n[:, None] > 0, n[:, None] < 0),
    )  # fmt: skip

  got = judged(0).join(judged(3)).take([4, 0])
  assert got.rows == [{'i': 4}, {'i': 0}] and got.prompts == [[4], [0]] and got.texts == ['c8', 'c9', 'c0', 'c1']
  assert got.rolled.length_N.tolist() == [8, 9, 0, 1] == got.scores.values_NR[:, 0].tolist()
  assert dataclasses.is_dataclass(got.rolled)
