"""GKD against objectives.md, written once more as plain loops in float64; its identities, its rows, its teachers, its refusals."""

import dataclasses
import functools
import itertools
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reasoning import build, collect, config, data, losses, metrics, model, resolution, rollout, weights
from rl_reasoning.advantages import AGGREGATIONS, weigh
from rl_reasoning.config import ConfigError, from_mapping
from rl_reasoning.objectives.distill import Distill
from rl_reasoning.structs import DATA, ROLLOUT, Batch, Rollout, TrainState
from rl_reasoning.train_step import make_steps
from tests.test_tokenizer import make_folder

N, T, V, TEACHER_V, LIMIT = 6, 9, 7, 9, 5


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile():
  """A third less compilation, for programs that run a few times."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def random_params(arch: model.Arch, seed: int, spread: float = 0.5):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: rng.normal(w.scale < 0, spread, w.shape).astype(np.float32), model.weight_table(arch), is_leaf=model.is_weight
  )


def make_teacher(folder, vocab_size: int = 264) -> str:
  """A published checkpoint of another architecture than any policy of the tests, without a tokenizer."""
  arch = model.Arch(vocab_size, 8, 16, 1, 2, 1, 4, tie_word_embeddings=False, qkv_bias=True)
  weights.save(random_params(arch, 5), arch, f'{folder}/teacher')
  return f'{folder}/teacher'


# A network whose logits are its parameters: `logits` below hands on what stands for hidden states.
TABLE = SimpleNamespace(output=lambda p, rows: model.Output(p['logits'], p['lm_head']))
NETS = {'policy': TABLE, 'teacher': TABLE}


def table(logits) -> dict:
  return {'logits': jnp.asarray(logits), 'lm_head': np.zeros((logits.shape[-1], 1))}


@functools.cache
def make_rows() -> SimpleNamespace:
  """float64. The first row holds two packed texts; what stands outside the mask would be seen in any mean. Of three rows a prompt the
  policy sampled the first two."""
  rng = np.random.default_rng(3)
  prompt, length = rng.integers(1, 4, N), rng.integers(2, LIMIT + 1, N)
  place = np.arange(T)
  segment = (place < (prompt + length)[:, None]).astype(np.int32)
  position = np.tile(place, (N, 1))
  mask = (segment > 0) & (place >= prompt[:, None])
  mask[3, prompt[3] + 1] = False  # injected
  segment[0], position[0], mask[0] = np.repeat([1, 2, 0], [4, 4, 1]), [0, 1, 2, 3, 0, 1, 2, 3, 0], [0, 1, 1, 1, 0, 0, 1, 1, 0]
  logits, teacher = rng.normal(0, 1.5, (N, T, V)), rng.normal(0, 1.5, (N, T, TEACHER_V))
  before = np.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None]
  return SimpleNamespace(
    tokens=rng.integers(0, V, (N, T)), segment=segment, position=position, mask=mask.astype(np.float64), source=np.arange(N) % 3 // 2,
    logits=np.where(before, logits, 400 * logits), teacher=np.where(before, teacher, -300 * teacher),
  )  # fmt: skip


def to_batch(rows) -> Batch:
  return Batch(
    tokens=rows.tokens.astype(np.int32), segment_NT=rows.segment, position_NT=rows.position, mask_NT=rows.mask,
    source_N=np.where(rows.source, DATA, ROLLOUT).astype(np.int32), group_N=np.arange(N) // 3, truncated_N=np.arange(N) % 2.0,
  )  # fmt: skip


def make(**keys) -> Distill:
  return Distill(**{'num_generations': 3, 'on_policy_fraction': 2 / 3, **keys})


@pytest.fixture
def tables(monkeypatch):
  """run(objective, rows) -> (loss, metrics, gradient by the policy's logits), in float64."""
  monkeypatch.setattr(model, 'logits', lambda hidden, head, softcap: hidden)

  @jax.enable_x64(True)
  def run(objective, rows):
    policy, frozen = table(rows.logits), {'teacher': table(rows.teacher)}
    batch = objective.score(NETS, {'policy': policy}, frozen, to_batch(rows))
    batch, _, first = objective.prepare({}, batch)
    batch = batch.replace(weight_NT=weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, LIMIT))

    def loss(logits):
      return objective.loss(NETS, {'policy': {**policy, 'logits': logits}}, frozen, {}, batch)

    (value, more), grad = jax.value_and_grad(loss, has_aux=True)(policy['logits'])
    return jax.device_get((value, metrics.summarise(first | more), grad))

  return run


def softmax(x) -> np.ndarray:
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def kl(p, q) -> float:
  return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(p, q, beta: float) -> float:
  if beta in (0, 1):
    return kl(q, p) if beta else kl(p, q)
  m = beta * p + (1 - beta) * q
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


def expected(k: Distill, rows, logits) -> tuple[float, dict]:
  """(loss, metrics) as objectives.md says, in loops."""
  size = min(logits.shape[-1], rows.teacher.shape[-1])
  share = {source: np.zeros(rows.mask.shape) for source in (0, 1)}
  for source, own in share.items():
    alive = [n for n in range(N) if rows.source[n] == source and rows.mask[n].any()]
    M = rows.mask[alive].sum()
    for n in alive:
      lengths = np.array([rows.mask[n][rows.segment[n] == s].sum() for s in rows.segment[n]])
      own[n] = {
        'token_mean': 1 / M, 'sequence_mean': 1 / (len(alive) * np.maximum(lengths, 1)), 'sequence_sum': 1 / len(alive),
        'fixed_length': 1 / (len(alive) * LIMIT),
      }[k.aggregation]  # fmt: skip
  seen = {name: [] for name in ('divergence', 'kl/forward', 'kl/reverse', 'teacher/entropy', 'entropy', 'nll', 'teacher/kept')}
  totals = [0.0, 0.0]
  for n, t in zip(*np.nonzero(rows.mask)):
    p, q = (softmax(x[n, t - 1, :size] / k.temperature) for x in (rows.teacher, logits))
    if k.teacher_top_k:
      ids = np.argsort(-p)[: k.teacher_top_k]
      seen['teacher/kept'].append(p[ids].sum())
      p, q = (np.array([*x[ids], np.delete(x, ids).sum()]) for x in (p, q))
    here = softmax(logits[n, t - 1])
    values = {
      'divergence': divergence(p, q, k.jsd_beta), 'kl/forward': kl(p, q), 'kl/reverse': kl(q, p), 'teacher/entropy': -kl(p, p**0),
      'entropy': -kl(here, here**0), 'nll': -math.log(here[rows.tokens[n, t]]),
    }  # fmt: skip
    for name, value in values.items():
      seen[name].append(value)
    totals[rows.source[n]] += share[rows.source[n]][n, t] * values['divergence']
  told = {name: np.mean(values) for name, values in seen.items() if values}
  if len(k.sources) == 1:
    return sum(totals), told
  own = k.on_policy_fraction
  return own * totals[0] + (1 - own) * totals[1], told | {'loss/on_policy': totals[0], 'loss/data': totals[1]}


ALONE = {'on_policy_fraction': 1.0}
CASES = {
  'jsd': {},
  'forward': {'jsd_beta': 0.0},
  'reverse': {'jsd_beta': 1.0},
  'uneven': {'jsd_beta': 0.1},
  'uneven the other way': {'jsd_beta': 0.9, 'temperature': 0.6},
  'hot': {'temperature': 2.0, 'jsd_beta': 0.0},
  'top 1': {'teacher_top_k': 1},
  'top 3': {'teacher_top_k': 3, 'jsd_beta': 0.3, 'temperature': 2.0},
  'top 3, forward': {'teacher_top_k': 3, 'jsd_beta': 0.0},
  'top 3, reverse': {'teacher_top_k': 3, 'jsd_beta': 1.0},
  'all but one': {'teacher_top_k': V - 1},
  'all of them': {'teacher_top_k': V},
  'more than there are': {'teacher_top_k': 50, 'jsd_beta': 1.0},
  'by sequences': {'aggregation': 'sequence_mean', 'teacher_top_k': 3},
  'own samples': {**ALONE, 'aggregation': 'fixed_length'},
  'sums': {**ALONE, 'aggregation': 'sequence_sum'},
  'data': {'on_policy_fraction': 0.0},
}


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient(case, tables):
  """Failure: loss, metrics or gradient are not those of objectives.md; the gradient is taken by finite differences of the loops, also in
  the directions of tokens that are not learned."""
  objective, rows = make(**CASES[case]), SimpleNamespace(**vars(make_rows()))
  if len(objective.sources) == 1:
    rows.source = np.full(N, 'data' in objective.sources, int)
  value, told, grad = tables(objective, rows)
  loss, seen = expected(objective, rows, rows.logits)
  assert value == pytest.approx(loss, rel=1e-6)
  assert {name: told[name] for name in seen} == pytest.approx(seen, rel=1e-6)
  assert ('teacher/kept' in told) == bool(objective.teacher_top_k) and ('loss/data' in told) == (len(objective.sources) == 2)
  rng, eps = np.random.default_rng(0), 1e-5
  for _ in range(3):
    x = rng.normal(size=rows.logits.shape)
    there, here = (expected(objective, rows, rows.logits + e * x)[0] for e in (eps, -eps))
    assert np.sum(grad * x) == pytest.approx((there - here) / (2 * eps), rel=1e-5, abs=1e-9)
  unlearned = np.pad(rows.mask[:, 1:], ((0, 0), (0, 1))) == 0
  assert np.all(grad[unlearned] == 0) and np.all(np.any(grad[~unlearned] != 0, axis=-1))


def test_every_key_is_tried():
  """Failure: a new key stands in no golden case."""
  tried = {key for case in CASES.values() for key in case} | {'num_generations', 'name'}
  assert tried == {f.name for f in dataclasses.fields(Distill)}
  assert {CASES[case].get('aggregation', 'token_mean') for case in CASES} == set(AGGREGATIONS)


def test_ids_that_only_one_knows(tables):
  """Failure: embeddings that one of the two networks pads further than the other take part, or shift what is compared."""
  rows, size = SimpleNamespace(**vars(make_rows())), 5
  rows.teacher = rows.teacher[..., :size]
  for keys in ({}, {'teacher_top_k': 3}):
    value, told, grad = tables(make(**keys), rows)
    loss, seen = expected(make(**keys), rows, rows.logits)
    assert value == pytest.approx(loss, rel=1e-6) and {name: told[name] for name in seen} == pytest.approx(seen, rel=1e-6)
    assert np.all(grad[..., size:] == 0)


@jax.enable_x64(True)
def test_identities():
  """Failure: the divergence is not the paper's: it does not tend to the two KLs, is not symmetric, is not 0 where the distributions are
  equal, has a gradient there, or is not log 2 where they share nothing."""
  rng = np.random.default_rng(1)
  p, q = (jnp.asarray(np.log([softmax(x) for x in rng.normal(0, 1, (20, 11))])) for _ in range(2))
  forward, reverse = losses.kl_divergence(p, q), losses.kl_divergence(q, p)
  np.testing.assert_allclose(forward, [kl(a, b) for a, b in zip(np.exp(p), np.exp(q))], rtol=1e-10)
  assert np.all(forward > 0.1) and np.all(np.abs(forward - reverse) > 1e-4)
  np.testing.assert_array_equal(losses.jensen_shannon(p, q, 0), forward)
  np.testing.assert_array_equal(losses.jensen_shannon(p, q, 1), reverse)
  np.testing.assert_allclose(losses.jensen_shannon(p, q, 1e-7) / 1e-7, forward, rtol=1e-4)
  np.testing.assert_allclose(losses.jensen_shannon(p, q, 1 - 1e-7) / 1e-7, reverse, rtol=1e-4)
  apart = [jnp.asarray([[0.0, losses.NO_MASS], [losses.NO_MASS, 0.0]][i]) for i in range(2)]
  for b in (0.1, 0.5, 0.8):
    np.testing.assert_allclose(losses.jensen_shannon(p, q, b), losses.jensen_shannon(q, p, 1 - b), rtol=1e-12)
    assert float(losses.jensen_shannon(*apart, b)) == pytest.approx(kl([b, 1 - b], [1, 1]) * -1)
  for b in (0, 0.1, 0.5, 1):
    logits = p + 3.0

    def equal(x, b=b):
      return losses.jensen_shannon(p, jax.nn.log_softmax(x), b).sum()

    value, grad = jax.value_and_grad(equal)(logits)
    assert abs(value) < 1e-14 and np.abs(grad).max() < 1e-14, b


def test_others_are_summed():
  """Failure: where the kept ids hold nearly everything, the bucket for the rest drowns in rounding, in value or gradient."""
  logits = np.array([9.0, 8.5, -12.0, -13.0, -14.0])
  exact = softmax(logits)
  logp = functools.partial(jax.nn.log_softmax, axis=-1)
  rest = losses.buckets(logp(jnp.asarray(logits, jnp.float32)), jnp.array([1, 0]))[-1]
  assert float(rest) == pytest.approx(math.log(exact[2:].sum()), rel=1e-6) and exact[2:].sum() < 1e-8
  slope = jax.grad(lambda x: losses.buckets(logp(x), jnp.array([1, 0]))[-1])(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(slope[2:], (exact / exact[2:].sum())[2:], rtol=1e-5)


def test_top_k_approaches_the_whole(tables):
  """Failure: with every id kept (or all but one, which is its own bucket) the loss or its gradient is another than over the whole
  vocabulary, or fewer buckets show more of the difference."""
  rows = make_rows()
  for keys in ({}, {'jsd_beta': 0.0}, {'jsd_beta': 1.0}):
    whole = tables(make(**keys), rows)
    values = []
    for k in (1, 3, V - 1, V):
      value, _, grad = tables(make(**keys, teacher_top_k=k), rows)
      values.append(value)
      if k >= V - 1:
        assert value == pytest.approx(whole[0], rel=1e-10)
        np.testing.assert_allclose(grad, whole[2], rtol=1e-8, atol=1e-14)
    assert all(a < b for a, b in itertools.pairwise(values[:3]))


ARCH = model.Arch(40, 16, 24, 1, 4, 2, 4)
LARGER = model.Arch(44, 24, 32, 2, 3, 3, 8, tie_word_embeddings=False, qk_norm=True)
REAL = {
  role: model.make_net(arch, lambda rows: 1.0, dtype='float32', remat='none')
  for role, arch in (('policy', ARCH), ('teacher', LARGER))
}
PARAMS, TAUGHT = random_params(ARCH, 0), random_params(LARGER, 1)


def real_rows(seed: int = 0, rows: int = 8) -> Batch:
  rng, width = np.random.default_rng(seed), 12
  place, length = np.arange(width), rng.integers(4, width + 1, rows)[:, None]
  mask = ((place < length) & (place > 1)).astype(np.float32)
  return Batch(
    tokens=rng.integers(0, 40, (rows, width)).astype(np.int32), segment_NT=(place < length).astype(np.int32),
    position_NT=np.tile(place, (rows, 1)), mask_NT=mask, weight_NT=mask / mask.sum(), source_N=np.full(rows, DATA, np.int32),
    group_N=np.arange(rows),
  )  # fmt: skip


def learned(objective, nets, params, frozen, batch):
  """((loss, metrics), gradient) by the policy's weights."""

  def loss(params):
    rows = objective.score(nets, {'policy': jax.lax.stop_gradient(params)}, frozen, batch)
    return objective.loss(nets, {'policy': params}, frozen, {}, rows)

  return jax.value_and_grad(loss, has_aux=True)(params)


def size_of(tree) -> float:
  return float(optax.global_norm(tree))


@pytest.mark.parametrize('keys', [{}, {'jsd_beta': 0.0}, {'jsd_beta': 1.0}, {'teacher_top_k': 5}], ids=str)
def test_teacher_is_the_student(keys):
  """Failure: a policy that is its teacher is moved, or told that it differs; or one that is not is left alone."""
  objective, nets = Distill(on_policy_fraction=0.0, **keys), dict.fromkeys(('policy', 'teacher'), REAL['policy'])
  run = jax.jit(functools.partial(learned, objective, nets))
  (value, told), gradient = run(PARAMS, {'teacher': PARAMS}, real_rows())
  (far, _), pull = run(PARAMS, {'teacher': random_params(ARCH, 7)}, real_rows())
  told = metrics.summarise(told)
  assert max(abs(float(x)) for x in (value, told['kl/forward'], told['kl/reverse'])) < 1e-6 and far > 0.05
  assert size_of(gradient) < 1e-5 * size_of(pull)


@pytest.mark.parametrize('top_k', [0, 5])
def test_chunks_of_the_vocabulary(top_k, monkeypatch):
  """Failure: loss or gradient depend on how many logits are alive at once, or all are, of the teacher or of the policy."""
  objective, batch = Distill(on_policy_fraction=0.0, teacher_top_k=top_k), real_rows()
  run = jax.jit(functools.partial(learned, objective, REAL))
  (value, told), gradient = run(PARAMS, {'teacher': TAUGHT}, batch)
  monkeypatch.setattr(model, 'CHUNK_ELEMENTS', 8 * 84 * 5)

  def cut(params):
    return learned(objective, REAL, params, {'teacher': TAUGHT}, batch)

  text = str(jax.make_jaxpr(cut)(PARAMS))
  assert '[8,12,40]' not in text and '[8,12,44]' not in text and '[8,12,24]' in text
  (again, told_again), other = jax.jit(cut)(PARAMS)
  assert float(again) == pytest.approx(float(value), rel=1e-5)
  assert metrics.summarise(told_again) == pytest.approx(metrics.summarise(told), rel=1e-5)
  assert size_of(jax.tree.map(jnp.subtract, other, gradient)) < 1e-5 * size_of(gradient)


def test_each_network_runs_where_it_is_read():
  """Failure: the teacher is run where its buckets are known already, or in `score` where nothing of it could be kept."""
  called = []

  def output(role, params, rows):
    called.append(role)
    return REAL[role].output(params, rows)

  nets = {role: SimpleNamespace(output=functools.partial(output, role)) for role in REAL}
  for top_k, in_score, in_loss in ((0, [], ['policy', 'teacher']), (5, ['teacher'], ['policy'])):
    objective, frozen, params = Distill(teacher_top_k=top_k), {'teacher': TAUGHT}, {'policy': PARAMS}
    rows = jax.eval_shape(functools.partial(objective.score, nets), params, frozen, real_rows())
    assert called == in_score and set(rows.extras) == ({'teacher_ids', 'teacher_logp'} if top_k else set())
    called.clear()
    jax.eval_shape(functools.partial(objective.loss, nets), params, frozen, {}, rows)
    assert called == in_loss
    called.clear()
  assert rows.extras['teacher_ids'].shape == (8, 12, 5) and rows.extras['teacher_logp'].shape == (8, 12, 6)
  assert rows.extras['teacher_ids'].dtype == np.int32


@pytest.mark.parametrize('keys', [{}, {'jsd_beta': 0.0, 'teacher_top_k': 8}], ids=str)
def test_learns(keys):
  """Failure: a student that is taught for a while is not nearer to a teacher of another architecture, on texts that it has not seen."""
  objective, optimizer = Distill(on_policy_fraction=0.0, **keys), optax.adam(1e-2)
  steps = make_steps(objective, REAL, {'policy': optimizer}, lambda _: 1e-2, 0, LIMIT)
  params = jax.tree.map(jnp.array, PARAMS)
  state = TrainState(step=0, cursor={}, updates=jnp.int32(0), params={'policy': params}, opt={'policy': optimizer.init(params)}, aux={},
                     moving={}, frozen={'teacher': TAUGHT})  # fmt: skip
  held_out = real_rows(10_000, 16)

  @jax.jit
  def whole(params):
    return Distill(on_policy_fraction=0.0).loss(REAL, params, {'teacher': TAUGHT}, {}, held_out)[1]

  before = metrics.summarise(whole(state.params))
  for seed in range(60):
    rows, _, _ = steps.prepare(state, steps.score(state, real_rows(seed, 16)))
    state, _ = steps.update(state, rows)
  after = metrics.summarise(whole(state.params))
  for name in ('kl/forward', 'kl/reverse', 'divergence'):
    assert after[name] < 0.8 * before[name], (name, before[name], after[name])


SETTINGS = {
  'model': {'preset': 'tiny'},
  'data': {'task': 'arithmetic', 'train_size': 64, 'batch_size': 8, 'max_prompt_length': 32, 'max_length': 64},
  'objective': {'name': 'distill', 'num_generations': 4, 'on_policy_fraction': 0.5},
  'rollout': {'max_completion_length': 16},
}


def resolved(settings, teacher: str, **roles):
  settings = config.merge(settings, {'roles': {'teacher': {'init': teacher, 'tokenizer': 'bytes'}, **roles}})
  return config.resolve(settings), set(config.flatten(settings))


@pytest.fixture
def step(tmp_path, monkeypatch):
  """(settings) -> (collected rows of the first step, the run, its data, prompts that were rolled out)."""
  teacher, asked = make_teacher(tmp_path), []

  def generate(params, arch, prompts, *, settings, group, **others):
    asked.extend(prompts)
    count, C = len(prompts) * group, settings.max_completion_length
    tokens = np.tile(np.array([53, 54, 257] + [0] * (C - 3), np.int32), (count, 1))
    return Rollout(tokens, np.full((count, C), -1.0, np.float32), np.full(count, 3), np.zeros(count, bool))

  monkeypatch.setattr(rollout, 'generate', generate)

  def run_once(settings):
    asked.clear()
    run = build.build(*resolved(config.override(settings, 'data.cache_dir', str(tmp_path / 'cache')), teacher))
    train = data.open_train(run.config.data, 0)
    collect.check_rows(run, train)
    state = TrainState(0, {**train.first(), 'num_tokens': 0}, 0, {'policy': None}, {}, {}, {}, {})
    with jax.set_mesh(run.mesh):
      got = collect.collect(run, train, state, jax.random.key(0), metrics.PhaseTimer())
    return got, run, train, list(asked)

  return run_once


def test_rows_of_both_kinds(step):
  """Failure: the fraction is another than asked for, rows of a prompt are not adjacent, a demonstration is read twice or is not the data's,
  or a reward is asked for."""
  got, run, train, asked = step(SETTINGS)
  source = np.asarray(got.batch.source_N)
  assert source.reshape(8, 4).tolist() == [[ROLLOUT, ROLLOUT, DATA, DATA]] * 8
  rows = data.batch(train.sources[''], 0, 24, 0)[0]
  assert [bytes(p).decode() for p in asked] == [row['prompt'] for row in rows[:8]] and got.cursor['train'] == 24
  shown = data.encode_sft(rows[8:], run.tokenizer, 'plain', 64, False)
  tokens, mask = (np.asarray(x)[source == DATA] for x in (got.batch.tokens, got.batch.mask_NT))
  width = min(shown.tokens.shape[1], tokens.shape[1])
  np.testing.assert_array_equal(tokens[:, :width], shown.tokens[:, :width])
  np.testing.assert_array_equal(mask[:, :width], shown.mask_NT[:, :width])
  assert got.batch.rewards_NR is None and got.samples[0]['rewards'] == {} and len(got.samples) == 16
  told = metrics.summarise(run.objective.prepare({}, jax.device_get(got.batch))[2])
  assert told['frac_on_policy'] == 0.5 and told['completions/mean_length'] == 3 and told['completions/max_length'] == 3
  sizes = resolution.batch_sizes(run.config, run.objective)
  assert sizes['rows_per_step'] == 32 and sizes['max_tokens_per_step'] == 8 * (2 * (32 + 16) + 2 * 64)


def test_rows_of_data_alone(step):
  """Failure: without samples of its own the policy is sampled from all the same, or a prompt's share of rows is not read."""
  settings = {k: v for k, v in SETTINGS.items() if k != 'rollout'}
  settings = {**settings, 'data': {k: v for k, v in settings['data'].items() if k != 'max_prompt_length'}}
  got, run, _, asked = step(config.merge(settings, {'objective': {'num_generations': 2, 'on_policy_fraction': 0.0}}))
  assert not asked and np.asarray(got.batch.source_N).tolist() == [DATA] * 16 and got.cursor['train'] == 16
  told = metrics.summarise(run.objective.prepare({}, jax.device_get(got.batch))[2])
  assert told == {'frac_on_policy': 0.0}


def test_prompts_alone(step, tmp_path):
  """Failure: on its own samples the policy cannot learn from a file of prompts, because an answer or a demonstration is missing."""
  (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': f'{n}+1='}) + '\n' for n in range(40)))
  settings = config.merge(SETTINGS, {'data': {'task': 'dataset', 'path': str(tmp_path / 'prompts.jsonl')}})
  settings['data'] = {k: v for k, v in settings['data'].items() if k not in ('train_size', 'max_length')}
  settings['objective'] = {'name': 'distill'}
  got, _, _, asked = step(settings)
  assert len(asked) == 8 and np.asarray(got.batch.source_N).tolist() == [ROLLOUT] * 8 and got.cursor['train'] == 8
  mixed = config.merge(settings, {'objective': {'num_generations': 2, 'on_policy_fraction': 0.5}})
  with pytest.raises(ConfigError, match='a row has nothing to imitate'):
    step(mixed)


def refusal(call, *arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments)
  return str(caught.value)


def test_teachers_that_are_refused(tmp_path):
  """Failure: a teacher that is not there, says nothing, or speaks of other tokens is found when the run has begun, or never."""
  good, small = make_teacher(tmp_path), make_teacher(tmp_path / 'small', 256)
  build.build(*resolved(SETTINGS, good))
  for init, wanted in (
    ('', "'roles.teacher.init' is empty"),
    ('/no/such', "'roles.teacher.init': '/no/such' does not exist"),
    ('tests/fixtures/classifier', "'roles.teacher.init': tests/fixtures/classifier is a reward model"),
    (small, "has 256 embeddings, the policy's tokenizer 264 ids"),
  ):
    assert wanted in refusal(build.build, *resolved(SETTINGS, init))
  letters, others = make_folder(tmp_path / 'letters'), make_folder(tmp_path / 'others', template='{{ messages }}')
  text = refusal(build.build, *resolved(SETTINGS, good, policy={'tokenizer': letters}))
  assert "config key 'roles.teacher.tokenizer': 'bytes' has other tokens than the policy's" in text and 'with id 0' in text
  same = {'policy': {'tokenizer': letters}, 'teacher': {'init': good, 'tokenizer': others}}
  build.build(config.resolve(config.merge(SETTINGS, {'roles': same})))
  missing = config.merge(SETTINGS, {'roles': {'teacher': {'init': good}}})  # weights without a tokenizer
  assert "config key 'roles.teacher.tokenizer'" in refusal(build.build, config.resolve(missing))
  later = config.resolve(config.merge(SETTINGS, {'roles': {'teacher': {'init': '/no/such'}}}))
  resolution.check_config(later, set(), earlier=['/no/such'])  # a stage before this one trains it


def test_a_trunk_that_is_remembered_is_not_the_teachers(tmp_path, monkeypatch):
  """Failure: the teacher is fed what the policy's frozen layers give."""
  make_net, frozen = model.make_net, []

  def note(arch, *given, **keys):
    frozen.append((arch.hidden_size, keys['frozen_layers']))
    return make_net(arch, *given, **keys)

  monkeypatch.setattr(model, 'make_net', note)
  remembers = {'frozen_layers': 1, 'cache_features': True}
  settings = config.merge(SETTINGS, {'objective': {'on_policy_fraction': 0.0}, 'optim': remembers})
  build.build(resolved(settings, make_teacher(tmp_path))[0])
  assert sorted(set(frozen)) == [(8, 0), (64, 1)]


# key -> a value that is refused
REFUSED = {
  'jsd_beta': 1.1, 'num_generations': 0, 'on_policy_fraction': 0.4, 'temperature': 0.0, 'teacher_top_k': -1, 'aggregation': 'mean'
}  # fmt: skip


@pytest.mark.parametrize('key', REFUSED)
def test_refusals(key):
  """Failure: a value that makes no sense is trained with, or refused without its key."""
  with pytest.raises(ConfigError, match=re.escape(f"config key 'objective.{key}'")):
    from_mapping(Distill, {key: REFUSED[key]}, 'objective.')


def test_refusals_are_complete():
  """Failure: a new key takes any value."""
  assert set(REFUSED) == {f.name for f in dataclasses.fields(Distill)} - {'name'}
  for keys, key in (({'jsd_beta': -0.1}, 'jsd_beta'), ({'on_policy_fraction': 1.5, 'num_generations': 2}, 'on_policy_fraction'),
                    ({'on_policy_fraction': 0.5}, 'on_policy_fraction'),
                    ({'aggregation': 'fixed_length', 'num_generations': 2, 'on_policy_fraction': 0.5}, 'aggregation')):  # fmt: skip
    with pytest.raises(ValueError, match=f'objective.{key}'):
      Distill(**keys)
  Distill(num_generations=3, on_policy_fraction=1 / 3)  # of which three are not exactly 1


def test_what_it_needs(tmp_path):
  """Failure: reward functions are asked for, or are taken where nobody reads them."""
  teacher = make_teacher(tmp_path)
  text = refusal(resolution.resolve, *resolved(config.merge(SETTINGS, {'rewards': {'functions': ('format',)}}), teacher))
  assert "'rewards.functions': the objective reads no rewards" in text
  evaluated = {'eval': {'every': 1, 'evaluators': {'greedy': {}}}, 'rewards': {'functions': ('format',)}}
  resolution.resolve(*resolved(config.merge(SETTINGS, evaluated), teacher))
  curriculum = {'mixture': {'a': {'task': 'linear', 'train_size': 8}}, 'curriculum': 'pass_rate'}
  mixed = {**SETTINGS, 'data': {'batch_size': 8, **curriculum}}
  assert "'pass_rate' goes by the reward 'accuracy'" in refusal(resolution.resolve, *resolved(mixed, teacher))


def test_formula():
  """Failure: --explain keeps silent about a key that acts."""
  values = {
    'jsd_beta': 0.0, 'num_generations': 4, 'on_policy_fraction': 0.0, 'temperature': 2.0, 'teacher_top_k': 9, 'aggregation': 'sequence_sum'
  }  # fmt: skip
  assert values.keys() == {f.name for f in dataclasses.fields(Distill)} - {'name'}
  for key, value in values.items():
    assert Distill().formula() != Distill(**{key: value}).formula(), key
  text = '\n'.join(Distill(num_generations=4, on_policy_fraction=0.25, jsd_beta=0.1).formula())
  for words in ('0.1 KL(P || M) + 0.9 KL(Q || M), M = 0.1 P + 0.9 Q', "1 of the policy's own samples and 3 from data", '0.25 the mean over',
                'the whole vocabulary', '0.75 that over rows from data'):  # fmt: skip
    assert words in text, words
