"""One update against itself: however rows are split, padded or laid over devices, the gradient is that of the whole."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reasoning import build, metrics, model, sharding, stored, train, train_step
from rl_reasoning.objectives import OBJECTIVES as NAMED
from rl_reasoning.objectives.distill import Distill
from rl_reasoning.objectives.grpo import SETTINGS, Given, Grpo
from rl_reasoning.objectives.sft import Sft
from rl_reasoning.structs import DATA, ROLLOUT, Batch, TrainState

ARCH = model.Arch(40, 16, 24, 1, 8, 4, 4)
N, T, LIMIT, TEMPERATURE = 16, 12, 9, 0.8
GIVEN = Given(('accuracy',), (1.0,), LIMIT)


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile():
  """A third less compilation, for programs that run a few times."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def random_params(seed):
  rng, table = np.random.default_rng(seed), model.weight_table(ARCH)
  return jax.tree.map(
    lambda w: rng.normal(w.scale < 0, abs(w.scale) / 2, w.shape).astype(np.float32), table, is_leaf=model.is_weight
  )


PARAMS, OTHER = random_params(0), random_params(1)


def logp(params, rows, entropy=False, entropy_gradient=False):
  temperature = jnp.where(rows.source_N == ROLLOUT, TEMPERATURE, 1.0)
  return model.log_probs(params, ARCH, rows, temperature, entropy=entropy, entropy_gradient=entropy_gradient)


def output(params, rows):
  return model.Output(model.hidden_states(params, ARCH, rows), model.head(params))


NETS = {role: SimpleNamespace(logp=logp, output=output) for role in ('policy', 'ref', 'teacher')}


def make_batch(width=T, source=ROLLOUT, seed=0) -> Batch:
  """Ragged rows: prompts of 2 or 3 tokens, completions of 1 to 9, groups of 4 with a spread in their rewards."""
  rng = np.random.default_rng(seed)
  prompt, length = rng.integers(2, 4, N), rng.integers(1, LIMIT + 1, N)
  tokens = rng.integers(0, 40, (N, T)).astype(np.int32)
  place = np.arange(T)
  inside = place < (prompt + length)[:, None]
  position = np.where(inside, place, 0).astype(np.int32)
  sampled, reward = rng.normal(-3, 0.5, (N, T)).astype(np.float32), rng.random((N, 1)).astype(np.float32)
  batch = Batch(
    tokens=np.where(inside, tokens, 0), segment_NT=inside.astype(np.int32), position_NT=position,
    mask_NT=(inside & (place >= prompt[:, None])).astype(np.float32), source_N=np.full(N, source, np.int32),
    group_N=np.arange(N, dtype=np.int32) // 4,
  )  # fmt: skip
  if source == ROLLOUT:
    batch = batch.replace(
      logp_sample_NT=sampled,
      rewards_NR=reward,
      has_reward_NR=np.ones((N, 1), np.float32),
      failed_NR=np.zeros((N, 1), np.float32),
      truncated_N=(length == LIMIT).astype(np.float32),
    )
  pad = ((0, 0), (0, width - T))
  return dataclasses.replace(batch, **{k: np.pad(v, pad) for k, v in vars(batch).items() if getattr(v, 'shape', ()) == (N, T)})


def grpo(**keys) -> Grpo:
  return Grpo(GIVEN, **{'num_generations': 4, **keys})


def make_state(optimizer, other=None, params=PARAMS) -> TrainState:
  params = jax.tree.map(jnp.array, params)
  return TrainState(
    step=0, cursor={}, updates=jnp.int32(0), params={'policy': params}, opt={'policy': optimizer.init(params)}, aux={}, moving={},
    frozen={} if other is None else {'ref': other, 'teacher': other},
  )  # fmt: skip


def make_steps(objective, micro_batch=0, optimizer=None, shardings=None):
  return train_step.make_steps(
    objective, NETS, {'policy': optimizer or optax.sgd(1.0)}, lambda _: 1.0, micro_batch, LIMIT, shardings
  )


def one_update(objective, batch, micro_batch=0, optimizer=None, other=None):
  """(gradient under plain SGD of rate 1, summarised metrics)."""
  optimizer = optimizer or optax.sgd(1.0)
  state, steps = make_state(optimizer, other), make_steps(objective, micro_batch, optimizer)
  rows, _, _ = steps.prepare(state, steps.score(state, batch))
  state, got = steps.update(state, rows)
  return difference(PARAMS, state.params['policy']), metrics.summarise(got)


def difference(before, after):
  return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), before, after)


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def assert_equal_trees(a, b, tolerance):
  assert norm(difference(a, b)) < tolerance * norm(b), norm(difference(a, b)) / norm(b)


def assert_equal_metrics(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), name


DISTILL = {  # half of the rows are the policy's own
  'distill': Distill(num_generations=4, on_policy_fraction=0.5),
  'distill, top 6': Distill(
    num_generations=4, on_policy_fraction=0.5, teacher_top_k=6, aggregation='sequence_mean', temperature=0.25
  ),
}
OBJECTIVES = {
  'sft token_mean': Sft(), 'sft sequence_mean': Sft(aggregation='sequence_mean'), 'grpo sequence_mean': grpo(), **DISTILL
}  # fmt: skip


def rows_for(name, width=T) -> Batch:
  batch = make_batch(width, DATA if name.startswith('sft') else ROLLOUT)
  return batch.replace(source_N=np.tile(np.int32([ROLLOUT, ROLLOUT, DATA, DATA]), N // 4)) if name in DISTILL else batch


@functools.cache
def whole(name):
  return one_update(OBJECTIVES[name], rows_for(name), other=OTHER)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_micro_batches(name):
  """Failure: the objective, its gradient norm or a metric changes with the number of micro-batches (the peers' commonest bug)."""
  gradient, values = one_update(OBJECTIVES[name], rows_for(name), micro_batch=4, other=OTHER)
  assert_equal_trees(gradient, whole(name)[0], 1e-6)
  assert_equal_metrics(values, whole(name)[1])
  assert values['grad_norm'] == pytest.approx(norm(gradient), rel=1e-5)


def test_gradient_is_that_of_the_written_objective():
  """Failure: the update does not descend -sum over sequences of their mean of A logp (one plain loop says what that is)."""
  batch = make_batch()
  rewards = batch.rewards_NR[:, 0].reshape(4, 4).astype(np.float64)
  A = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
  factor = (A / batch.mask_NT.sum(1) / N)[:, None] * batch.mask_NT
  expected = jax.jit(jax.grad(lambda p: -jnp.sum(jnp.asarray(factor, jnp.float32) * logp(p, batch)[0])))(PARAMS)
  assert_equal_trees(whole('grpo sequence_mean')[0], expected, 1e-5)


@pytest.mark.parametrize('name', ['sft token_mean', 'grpo sequence_mean', 'distill'])
def test_padding_amount(name):
  """Failure: more padding changes the update or a metric."""
  gradient, values = one_update(OBJECTIVES[name], rows_for(name, 24), other=OTHER)
  assert_equal_trees(gradient, whole(name)[0], 2e-6)
  assert_equal_metrics(values, whole(name)[1])


def five_updates(sizes, sequence=1):
  """(gradient of the first update, parameters after five, metrics of all five) on a mesh of these sizes."""
  devices = jax.devices()[: sequence * int(np.prod(sizes))]
  mesh, optimizer = sharding.make_mesh(*sizes, devices=devices, sequence=sequence), optax.sgd(0.5, momentum=0.5)
  with jax.set_mesh(mesh):
    placed = stored.param_shardings(mesh, ARCH)
    opt = build.optimizer_shardings(mesh, optimizer, PARAMS, placed)
    params = jax.device_put(PARAMS, placed)
    state = make_state(optimizer).replace(
      params={'policy': params},
      opt={'policy': jax.device_put(optimizer.init(PARAMS), opt)},
      updates=jax.device_put(jnp.int32(0), sharding.replicated(mesh)),
      frozen={'ref': jax.device_put(OTHER, placed)},
    )
    shardings = {'params': {'policy': placed}, 'opt': {'policy': opt}}
    steps = make_steps(grpo(beta=0.1, aggregation='token_mean'), 8, optimizer, shardings)
    batch = sharding.put_rows(mesh, make_batch())
    rows, _, gathered = steps.prepare(state, steps.score(state, batch))
    first = None
    for _ in range(5):
      state, more = steps.update(state, rows)
      gathered = metrics.merge(gathered, more)
      first = first or difference(PARAMS, jax.device_get(state.params['policy']))
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state.params['policy'], placed)
    assert all(jax.tree.leaves(kept))
    return first, jax.device_get(state.params['policy']), metrics.summarise(gathered)


@pytest.fixture(scope='module')
def one_device():
  return five_updates((1, 1, 1))


@pytest.mark.parametrize(
  ('sizes', 'sequence'), [((8, 1, 1), 1), ((1, 8, 1), 1), ((2, 2, 2), 1), ((1, 2, 4), 1), ((1, 2, 1), 4), ((1, 2, 2), 2)], ids=str
)
def test_devices(one_device, sizes, sequence):
  """Failure: the update depends on how many devices there are, or on how rows, tokens and weights lie on them."""
  first, params, values = five_updates(sizes, sequence)
  assert_equal_trees(first, one_device[0], 1e-5)
  assert_equal_trees(params, one_device[1], 1e-5)
  assert_equal_trees(difference(params, PARAMS), difference(one_device[1], PARAMS), 1e-4)
  assert values.keys() == one_device[2].keys()
  for name, value in values.items():
    assert value == pytest.approx(one_device[2][name], rel=1e-4, abs=1e-5), name


def elsewhere(batch: Batch) -> Batch:
  """The same rows in another order of groups, 24 columns wide, each with another number of padding columns on its left."""
  order = np.arange(N).reshape(4, 4)[[2, 0, 3, 1]].reshape(-1)
  left = np.random.default_rng(9).integers(0, 25 - T, N)

  def move(x):
    if x.shape != (N, T):
      return x[order]
    wide = np.zeros((N, 24), x.dtype)
    for n, start in enumerate(left):
      wide[n, start : start + T] = x[order[n]]
    return wide

  return jax.tree.map(move, batch)


def step_of(objective, batch, micro_batch, mesh, rate):
  """(gradient of the first update, change after two or the one allowed, metrics) of one step with plain SGD."""
  optimizer = optax.sgd(rate)
  placed = stored.param_shardings(mesh, ARCH)
  state = make_state(optimizer)
  state = state.replace(params=jax.device_put(state.params, {'policy': placed}), aux=objective.init_aux(),
                        frozen=dict.fromkeys(('ref', 'teacher'), jax.device_put(OTHER, placed)))  # fmt: skip
  shardings = {
    'params': {'policy': placed},
    'opt': {'policy': jax.tree.map(lambda _: sharding.replicated(mesh), state.opt['policy'])},
  }
  steps = make_steps(objective, micro_batch, optimizer, shardings)
  rows, _, gathered = steps.prepare(state, steps.score(state, sharding.put_rows(mesh, batch)))
  first = None
  for part in steps.minibatches(rows, jax.random.key(0)):
    state, more = steps.update(state, part)
    first = first or difference(PARAMS, jax.device_get(state.params['policy']))
    gathered = metrics.merge(gathered, more)
  return first, difference(PARAMS, jax.device_get(state.params['policy'])), metrics.summarise(gathered)


@pytest.mark.parametrize('name', [*SETTINGS, *DISTILL])
def test_every_setting_is_invariant(name):
  """Failure: a setting's update depends on micro-batches, the amount or side of padding, the order of groups, or the devices. Its clip
  acts in the second update, or this test has not seen it."""
  updates = 1 if name == 'rloo' else 2
  objective = DISTILL.get(name) or NAMED[name](given=GIVEN, num_generations=4, num_iterations=updates)
  batch, results = rows_for(name), []
  for rows, micro_batch, sizes in ((batch, 0, (1, 1, 1)), (elsewhere(batch), 8, (2, 2, 2))):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
      results.append(step_of(objective, rows, micro_batch, mesh, 1.0 if name == 'dr_grpo' else 0.2))  # its gradient is small
  (first, change, values), (other_first, other_change, other_values) = results
  assert_equal_trees(other_first, first, 2e-5)
  assert_equal_trees(other_change, change, 2e-5)
  assert other_values.keys() == values.keys()
  for key, value in other_values.items():
    assert value == pytest.approx(values[key], rel=1e-4, abs=1e-5), key
  assert norm(change) > 1e-3
  assert name in DISTILL or (values['clip_ratio/region_mean'] > 0) == (name not in ('rloo', 'r1', 'cispo'))


DIRECTIONAL = {
  'grpo': {'beta': 0.3, 'entropy_coef': 0.5, 'num_iterations': 2, 'epsilon': 0.25},
  'gspo': {'num_iterations': 2, 'epsilon': 0.03, 'epsilon_high': 0.04},
  'reinforce_pp': {'num_iterations': 2},
}


@pytest.mark.parametrize('name', DIRECTIONAL)
def test_gradient_through_the_model(name):
  """Failure: the gradient that reaches the weights is not the slope of the loss along it: the model's log-probabilities or its entropy
  have another gradient than value. (GSPO's stop-gradient form has the gradient of its sequence ratio, so no factor stands still here.)"""
  objective = NAMED[name](given=GIVEN, num_generations=4, **DIRECTIONAL[name])
  steps, state = make_steps(objective), make_state(optax.sgd(1.0), other=OTHER)
  rows, _, _ = steps.prepare(state, steps.score(state, make_batch()))
  rows = rows.replace(weight_NT=rows.mask_NT / rows.mask_NT.sum(axis=1, keepdims=True) / N)
  moved = jax.tree.map(lambda a, b: a + 0.1 * (b - a), PARAMS, OTHER)  # so that ratios are not 1

  @jax.jit
  def loss(params):
    return objective.loss(NETS, {'policy': params}, {'ref': OTHER}, {}, rows)[0]

  if name == 'grpo':
    ratio = np.exp(np.asarray(logp(moved, rows)[0] - rows.logp_old_NT)[np.asarray(rows.mask_NT) > 0])
    assert (
      np.abs(np.abs(ratio - 1) - 0.25).min() > 2e-3 and np.any(ratio > 1.25) and np.any(ratio < 0.75)
    )  # clips, but at no kink
  gradient = jax.jit(jax.grad(loss))(moved)
  size = norm(gradient)

  def along(step):
    return float(loss(jax.tree.map(lambda x, g: x + step * g / size, moved, gradient)))

  assert (along(5e-4) - along(-5e-4)) / 1e-3 == pytest.approx(size, rel=3e-3)


def test_gradient_norm_is_that_before_clipping():
  """Failure: grad_norm shows what the clip left, so that a run that explodes looks calm."""
  clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
  change, values = one_update(OBJECTIVES['grpo sequence_mean'], make_batch(), micro_batch=4, optimizer=clipped)
  assert values['grad_norm'] == pytest.approx(norm(whole('grpo sequence_mean')[0]), rel=1e-5)
  assert norm(change) == pytest.approx(1e-3, rel=1e-2)


def test_several_updates_a_rollout():
  """Failure: logp_old is refreshed between the updates of a step (ratio 1, clip inert), or a pass leaves rows out."""
  objective, optimizer = grpo(num_iterations=2, num_minibatches=2), optax.sgd(5.0)
  steps, state = make_steps(objective, 4, optimizer), make_state(optimizer)
  scored = steps.score(state, make_batch())
  old = np.asarray(jax.jit(logp)(PARAMS, make_batch())[0])
  np.testing.assert_allclose(scored.logp_old_NT, old, atol=2e-6)  # scored in micro-batches, rows back in their places
  rows, _, _ = steps.prepare(state, scored)
  lookup = {row.tobytes(): n for n, row in enumerate(np.asarray(rows.tokens))}
  clipped, orders = [], []
  for part in steps.minibatches(rows, jax.random.key(3)):
    order = [lookup[row.tobytes()] for row in np.asarray(part.tokens)]
    np.testing.assert_allclose(part.logp_old_NT, old[order], atol=2e-6)
    orders.append(order)
    state, got = steps.update(state, part)
    clipped.append(metrics.summarise(got)['clip_ratio/region_mean'])
  assert len(orders) == 4 and int(state.updates) == 4
  assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3]) == list(range(N))
  assert orders[0] + orders[1] != orders[2] + orders[3] and orders[0] + orders[1] != list(range(N))
  assert clipped[0] == 0 and min(clipped[1:]) > 0.02


def test_learning_rate_counts_updates():
  """Failure: the schedule counts micro-batches or steps."""
  steps = train_step.make_steps(Sft(), NETS, {'policy': optax.sgd(1.0)}, lambda count: 0.1 * (count + 1), 4, LIMIT)
  state = make_state(optax.sgd(1.0))
  for expected in (0.1, 0.2):
    state, got = steps.update(state, make_batch(source=DATA))
    assert metrics.summarise(got)['learning_rate'] == pytest.approx(expected)


def test_metrics_mean_what_they_say():
  """Failure: a mean is over padding, or a maximum is not the maximum of the step."""
  batch = make_batch()
  values = whole('grpo sequence_mean')[1]
  policy, entropy = jax.jit(functools.partial(logp, entropy=True))(PARAMS, batch)
  m = batch.mask_NT > 0
  gap = np.abs(np.asarray(policy) - batch.logp_sample_NT)[m]
  assert values['sampling/logp_difference/mean'] == pytest.approx(gap.mean(), rel=1e-4)
  assert values['sampling/logp_difference/max'] == pytest.approx(gap.max(), rel=1e-4)
  assert values['entropy'] == pytest.approx(np.asarray(entropy)[m].mean(), rel=1e-5)
  assert values['clip_ratio/region_mean'] == 0
  assert values['loss'] == pytest.approx(values['policy_loss'])
  nll = whole('sft token_mean')[1]
  data = make_batch(source=DATA)
  assert nll['nll'] == pytest.approx(-np.asarray(logp(PARAMS, data)[0])[data.mask_NT > 0].mean(), rel=1e-5)
  assert nll['loss'] == pytest.approx(nll['nll'], rel=1e-5)


def rows_that_do_not_count(objective, batch, row):
  """Asserts that what stands in this row moves nothing but its own length and reward."""
  tokens = batch.tokens.copy()
  tokens[row] = (tokens[row] + 7) % 40
  steps, optimizer = make_steps(objective), optax.sgd(1.0)
  results = []
  for rows in (batch, batch.replace(tokens=tokens)):
    state = make_state(optimizer)
    ready, _, _ = steps.prepare(state, rows)
    state, _ = steps.update(state, ready)
    results.append(jax.device_get(state.params['policy']))
  assert norm(difference(PARAMS, results[0])) > 1e-3
  assert_equal_trees(results[0], results[1], 1e-8)


def test_row_without_reward():
  """Failure: a completion without a verdict is trained as if it had earned 0."""
  batch = make_batch()
  has = batch.has_reward_NR.copy()
  has[5] = 0
  rows_that_do_not_count(OBJECTIVES['grpo sequence_mean'], batch.replace(has_reward_NR=has), 5)


def test_truncated_completion_is_masked():
  """Failure: mask_truncated_completions leaves cut completions in the gradient."""
  batch = make_batch()
  cut = np.zeros(N, np.float32)
  cut[5] = 1
  rows_that_do_not_count(grpo(mask_truncated_completions=True), batch.replace(truncated_N=cut), 5)


def test_reference():
  """Failure: the KL is to the moving policy or to nothing, or its gradient does not pull to the reference."""
  batch = make_batch()
  batch = batch.replace(rewards_NR=np.full((N, 1), 0.5, np.float32))  # no advantage: only the KL pulls
  for ref in (PARAMS, OTHER):
    gradient, values = one_update(grpo(beta=0.7), batch, other=ref)
    d = np.asarray(logp(ref, batch)[0] - logp(PARAMS, batch)[0], np.float64)[batch.mask_NT > 0]
    assert values['kl'] == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-4, abs=1e-6)
    assert values['policy_loss'] == 0
    assert norm(gradient) < 1e-6 if ref is PARAMS else norm(gradient) > 1e-3


def test_moving_reference():
  """Failure: the reference follows at the wrong count, is missed where a step crosses the multiple, or shares the policy's buffers."""
  run = SimpleNamespace(objective=grpo(beta=0.1, ref_model_sync_updates=3))
  assert run.objective.moving == ('ref',) and run.objective.frozen == ()
  state = make_state(optax.sgd(1.0)).replace(moving={'ref': jax.tree.map(jnp.array, OTHER)})
  for before, now, moves in ((0, 1, False), (2, 3, True), (3, 5, False), (4, 7, True), (0, 9, True)):
    after = train.sync_moving(run, before, state.replace(updates=jnp.int32(now)))
    jax.tree.map(np.testing.assert_array_equal, after.moving['ref'], PARAMS if moves else OTHER)
  jax.tree.map(lambda x: x.delete(), state.params)  # as donation does
  jax.tree.map(np.testing.assert_array_equal, after.moving['ref'], PARAMS)
  still = SimpleNamespace(objective=grpo(beta=0.1))
  assert still.objective.frozen == ('ref',) and train.sync_moving(still, 2, state).moving is state.moving


def test_moving_average():
  """Failure: an EMA reference moves at other counts than every update or the multiple, weighs old and new the wrong way, or replaces."""
  for keys, before, now, moves in (({}, 0, 1, True), ({}, 4, 4, False), ({'ref_model_sync_updates': 4}, 1, 3, False),
                                   ({'ref_model_sync_updates': 4}, 3, 9, True)):  # fmt: skip
    run = SimpleNamespace(objective=grpo(beta=0.1, ref_model_ema=0.9, **keys))
    assert run.objective.moving == ('ref',) and run.objective.frozen == ()
    state = make_state(optax.sgd(1.0)).replace(moving={'ref': jax.tree.map(jnp.array, OTHER)}, updates=jnp.int32(now))
    after = train.sync_moving(run, before, state)
    wanted = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, OTHER, PARAMS) if moves else OTHER
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), after.moving['ref'], wanted)


def test_extreme_values_outside_the_mask():
  """Failure: 0 * inf on a prompt token or on padding makes the update NaN (OpenRLHF#1240)."""
  objective, optimizer = grpo(num_iterations=2, beta=0.1), optax.sgd(1.0)
  steps, state = make_steps(objective, 8, optimizer), make_state(optimizer, other=OTHER)
  rows, _, _ = steps.prepare(state, steps.score(state, make_batch()))
  outside = np.asarray(rows.mask_NT) == 0
  wild = rows.replace(
    logp_old_NT=np.where(outside, -1e4, rows.logp_old_NT).astype(np.float32),
    logp_ref_NT=np.where(outside, 1e4, rows.logp_ref_NT).astype(np.float32),
  )
  calm, values = steps.update(state, rows)
  calm = jax.device_get(calm.params['policy'])
  after, got = steps.update(make_state(optimizer, other=OTHER), wild)
  assert_equal_metrics(metrics.summarise(got), metrics.summarise(values))
  assert_equal_trees(jax.device_get(after.params['policy']), calm, 1e-8)


def test_deal():
  """Failure: rows that belong together are cut apart, or come back in another order."""
  x = np.arange(24).reshape(12, 2)
  dealt = train_step.deal({'x': x}, 3, 2)
  assert dealt['x'].shape == (3, 4, 2)
  assert [row[0] // 4 for row in np.asarray(dealt['x'][0])] == [0, 0, 3, 3]  # pairs 0 and 3 of six
  np.testing.assert_array_equal(train_step.undeal(dealt, 2)['x'], x)
