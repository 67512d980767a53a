"""Mixtures of experts beyond one device and one pass: the expert axis, replay of the sampler's choices, loads and what balances them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import build, checkpoint, collect, config, data, experts, metrics, model, rollout, sharding, stored
from rl_reasoning.structs import Batch
from tests.test_e2e import logged, run, settings
from tests.test_families import read

ROWS, T = 8, 12
MIXTURE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32, 'scoring_func': 'sigmoid'}


def make_rows(arch, seed=0):
  """Right-padded rows of unequal length."""
  rng = np.random.default_rng(seed)
  length = rng.integers(4, T + 1, ROWS)
  segment = (np.arange(T) < length[:, None]).astype(np.int32)
  position = np.where(segment > 0, np.arange(T), 0).astype(np.int32)
  tokens = rng.integers(1, arch.vocab_size, (ROWS, T)).astype(np.int32) * segment
  return tokens, segment, position


def outputs(name, sizes, ways):
  """(logits, gradient, experts chosen) on a mesh with `ways` of the experts; 0: on no mesh."""
  arch, params, *_ = read(name)
  rows = make_rows(arch)

  def loss(params, tokens, segment, position):
    hidden, kept = model.forward(params, arch, tokens, segment, position)
    logits = model.logits(hidden, model.head(params))
    return jnp.sum(jnp.where(segment[..., None] > 0, jnp.tanh(logits), 0.0)), (logits, kept.chosen)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  if not ways:
    (_, (logits, chosen)), gradient = step(params, *rows)
    return jax.device_get((logits, gradient, chosen))
  mesh = sharding.make_mesh(*sizes, expert=ways)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, stored.param_shardings(mesh, arch))
    assert placed['layers']['experts_up'].sharding.spec[1] == 'expert'
    (_, (logits, chosen)), gradient = step(placed, *sharding.put_rows(mesh, rows))
    return jax.device_get((logits, gradient, chosen))


@pytest.fixture(scope='module', params=['mixtral', 'deepseek_v3'])
def alone(request):
  return request.param, outputs(request.param, (1, 1, 1), 0)


@pytest.mark.parametrize('sizes, ways', [((4, 1, 1), 2), ((1, 2, 2), 2), ((1, 4, 1), 2)], ids=str)
def test_expert_axis(alone, sizes, ways):
  """Failure: logits or gradients depend on where the experts lie: a token misses one of its experts, or meets one twice."""
  name, (logits, gradient, chosen) = alone
  got = outputs(name, sizes, ways)
  np.testing.assert_array_equal(got[2], chosen)
  np.testing.assert_allclose(got[0], logits, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), got[1], gradient)


def test_an_expert_gets_what_it_is_sent():
  """Failure: the grouped matmul takes a row through another expert than the one chosen, or weighs it by another's weight."""
  arch, params, *_ = read('mixtral')
  w = {name: jnp.asarray(x[0]) for name, x in params['layers'].items()}
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 5, arch.hidden_size)), jnp.float32)
  chosen = rng.integers(0, arch.num_experts, (3, 5, 2)).astype(np.int32)
  weights = rng.random((3, 5, 2)).astype(np.float32)
  own = [w[name] for name in experts.PROJECTIONS]
  expected = np.zeros(x.shape, np.float32)
  for n, t, i in np.ndindex(chosen.shape):
    gate, up, down = (np.asarray(one[chosen[n, t, i]]) for one in own)
    row = np.asarray(x[n, t])
    expected[n, t] += weights[n, t, i] * ((np.asarray(jax.nn.silu(row @ gate)) * (row @ up)) @ down)
  np.testing.assert_allclose(experts.through(arch, own, x, experts.Routed(chosen, weights)), expected, atol=1e-5)
  half = arch.num_experts // 2
  parts = [
    experts.through(arch, [one[first : first + half] for one in own], x, experts.Routed(chosen - first, weights))
    for first in (0, half)
  ]
  np.testing.assert_allclose(parts[0] + parts[1], expected, atol=1e-5)


def sample(arch, params, prompts, mesh=None, **keys):
  return rollout.generate(
    params, arch, prompts, settings=config.Rollout(max_completion_length=10, chunk=4), group=2, end_ids=(1, 2, 3, 4, 5, 6, 7, 8),
    key=jax.random.key(0), mesh=mesh, **keys,
  )  # fmt: skip


PROMPTS = [[9, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20], [21], [22, 23, 24], [25, 26], [27]]


@pytest.mark.parametrize('name', ['qwen3_moe', 'deepseek_v3'])
def test_replay(name):
  """Failure: what is recorded is not what the sampler chose, it is replayed for another token, layer or role, or its weights are not the
  router's of now."""
  arch, params, *_ = read(name)
  rolled = sample(arch, params, PROMPTS, records=True)
  batch = collect.to_batch(PROMPTS, rolled, 2)
  lengths = [len(PROMPTS[n // 2]) + int(rolled.length_N[n]) for n in range(16)]
  assert [len(chosen) for chosen in rolled.chosen_N] == [n - 1 for n in lengths] and len(set(rolled.length_N.tolist())) > 1
  recorded = batch.extras['chosen']
  for n, length in enumerate(lengths):
    assert (recorded[n, : length - 1] >= 0).all() and (recorded[n, length - 1 :] == -1).all()

  def chosen_by(params, replay):
    return np.moveaxis(
      model.forward(params, arch, batch.tokens, batch.segment_NT, batch.position_NT, replay=replay)[1].chosen, 0, 2
    )

  known = recorded >= 0
  np.testing.assert_array_equal(np.sort(chosen_by(params, None), -1)[known[..., :1].repeat(recorded.shape[-1], -1)],
                                np.sort(recorded, -1)[known])  # fmt: skip
  noise = np.random.default_rng(0).normal(0, 1.0, params['layers']['router'].shape)
  moved = {**params, 'layers': {**params['layers'], 'router': params['layers']['router'] + noise.astype(np.float32)}}
  assert (chosen_by(moved, None)[known] != recorded[known]).any()
  replayed = chosen_by(moved, jnp.moveaxis(jnp.asarray(recorded, jnp.int32), 2, 0))
  np.testing.assert_array_equal(replayed[known], recorded[known])
  keys = {'dtype': 'float32', 'remat': 'none'}
  nets = [model.make_net(arch, lambda rows: 1.0, replays=replays, **keys) for replays in (True, False)]
  with_replay, without = (net.logp(moved, batch)[0] for net in nets)
  bare = batch.replace(extras={})
  assert np.abs(with_replay - without).max() > 1e-3
  np.testing.assert_array_equal(nets[0].logp(moved, bare)[0], nets[1].logp(moved, bare)[0])
  gradient = jax.grad(lambda p: jnp.sum(nets[0].logp(p, batch)[0] * batch.mask_NT))(moved)
  assert np.abs(gradient['layers']['router']).max() > 0


@pytest.mark.parametrize('ways', [2, 4])
def test_rollout_over_the_expert_axis(ways):
  """Failure: the sampler's tokens depend on where the experts lie."""
  arch, params, *_ = read('deepseek_v3')
  one = sample(arch, params, PROMPTS, records=True)
  mesh = sharding.make_mesh(-1, 1, 1, expert=ways)
  with jax.set_mesh(mesh):
    several = sample(arch, jax.device_put(params, stored.param_shardings(mesh, arch)), PROMPTS, mesh, records=True)
  np.testing.assert_array_equal(several.tokens_NC, one.tokens_NC)
  np.testing.assert_allclose(several.logp_NC, one.logp_NC, atol=1e-4)
  assert all((a == b).all() for a, b in zip(several.chosen_N, one.chosen_N, strict=True))


def test_loads_are_counts():
  """Failure: the load of an expert is not the number of tokens sent to it, or padding counts."""
  arch, params, *_ = read('deepseek_v3')
  tokens, segment, position = make_rows(arch)
  mixtures = len(arch.stacks['layers'])

  def loss(load):
    joined = {**params, 'layers': {**params['layers'], experts.LOAD: load}}
    hidden, kept = model.forward(joined, arch, tokens, segment, position, remat='full')
    return jnp.sum(jnp.tanh(hidden)), kept.chosen

  load, chosen = jax.grad(loss, has_aux=True)(jnp.zeros((mixtures, arch.num_experts)))
  for layer in range(mixtures):
    np.testing.assert_array_equal(load[layer], np.bincount(chosen[layer][segment > 0].reshape(-1), minlength=arch.num_experts))
  assert load.sum() == segment.sum() * arch.num_experts_per_tok * mixtures


def test_balance():
  """Failure: the metrics or the bias's update are not those of 2408.15664."""
  load = jnp.asarray([[4.0, 4, 4, 4], [10, 6, 0, 0]])
  told = experts.balance(load)
  assert told['router/max_violation'] == pytest.approx((0 + 1.5) / 2) and told['router/unused'] == pytest.approx(2 / 8)
  np.testing.assert_allclose(experts.balanced(jnp.zeros((2, 4)), load, 0.5), [[0, 0, 0, 0], [-0.5, -0.5, 0.5, 0.5]])


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('data'))


def train(cache, workdir, objective='sft', **keys):
  run(settings(objective, cache, model__arch=MIXTURE, **keys), workdir)
  return logged(workdir)


def test_the_bias_balances(cache, tmp_path):
  """Failure: the bias stays where it is, moves the wrong way, or the optimizer moves it too."""
  keys = {'total_steps': 30, 'optim__learning_rate': 3e-3}
  apart, even = train(cache, tmp_path / 'a', **keys), train(cache, tmp_path / 'b', optim__router_bias_rate=0.02, **keys)
  violation = [np.mean([entry['router/max_violation'] for entry in entries[-5:]]) for entries in (apart, even)]
  assert violation[1] < 0.6 * violation[0]
  assert even[-1]['loss'] < 0.8 * even[0]['loss']
  biases = [checkpoint.restore_params(str(tmp_path / name), 'policy')['layers']['router_bias'] for name in 'ab']
  assert (np.asarray(biases[0]) == 0).all() and np.abs(biases[1]).max() <= 30 * 0.02 + 1e-6


def test_micro_batches_do_not_change_loads(cache, tmp_path):
  """Failure: loads are of one micro-batch alone: a bias would move by another rule."""
  whole, parts = train(cache, tmp_path / 'a', total_steps=1), train(cache, tmp_path / 'b', total_steps=1, optim__micro_batch=8)
  for name in ('router/max_violation', 'router/unused', 'loss'):
    assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-5)


@pytest.mark.parametrize('mesh', [{}, {'expert': 4}], ids=str)
def test_grpo_with_experts(mesh, cache, tmp_path):
  """Failure: a run with experts, recorded choices and a group's replay does not come to its end, or sampler and trainer disagree."""
  keys = {'total_steps': 2, 'optim__router_replay': True, 'objective__num_minibatches': 2, 'objective__beta': 0.1}
  entries = train(cache, tmp_path / 'run', 'grpo', mesh=mesh, **keys)
  assert entries[0]['sampling/logp_difference/max'] < 1e-4 and entries[-1]['router/max_violation'] > 0


@pytest.mark.parametrize('frozen_layers', [0, 1])
def test_networks_take_the_recorded_choices(frozen_layers, cache):
  """Failure: with optim.router_replay the policy chooses for itself, in all layers or in frozen ones, or the reference does not."""
  keys = {'optim__router_replay': True, 'objective__beta': 0.1, 'optim__frozen_layers': frozen_layers, 'model__arch': MIXTURE}
  keys |= {'objective__num_minibatches': 2}  # else no network scores what the update scores itself
  job = build.build(config.resolve(settings('grpo', cache, **keys)))
  with jax.set_mesh(job.mesh):
    state = job.init()
    rows = data.open_train(job.config.data, job.config.seed)
    state = state.replace(cursor={**rows.first(), **state.cursor})
    batch = collect.collect(job, rows, state, jax.random.key(0), metrics.PhaseTimer()).batch
    chosen = np.asarray(batch.extras['chosen'])  # [N, T, layers, k]; another expert, in the first layer alone
    other = np.where((chosen >= 0) & (np.arange(chosen.shape[2]) == 0)[:, None], (chosen + 1) % MIXTURE['num_experts'], chosen)
    own, moved = (
      jax.device_get(job.steps.score(state, batch.replace(extras={**batch.extras, 'chosen': jnp.asarray(x)})))
      for x in (chosen, other)
    )
  assert np.abs(own.logp_old_NT - moved.logp_old_NT).max() > 1e-4
  np.testing.assert_array_equal(own.logp_ref_NT, moved.logp_ref_NT)


def test_rows_of_data_have_no_choice(cache, tmp_path):
  """Failure: rows beside the rollouts are sent to the experts of another row."""
  arch, params, *_ = read('qwen3_moe')
  rolled = collect.to_batch(PROMPTS, sample(arch, params, PROMPTS, records=True), 2)
  other = Batch(*(np.zeros((8, 20), np.int32),) * 4, np.ones(8, np.int32), np.arange(8, dtype=np.int32))
  joined = collect.beside(rolled, other, 8)
  chosen = joined.extras['chosen'].reshape(8, 3, *joined.extras['chosen'].shape[1:])
  assert (chosen[:, 2] == -1).all()
  np.testing.assert_array_equal(chosen[:, :2].reshape(rolled.extras['chosen'].shape[0], *chosen.shape[2:])[:, : rolled.tokens.shape[1]],
                                rolled.extras['chosen'])  # fmt: skip


@pytest.mark.parametrize('keys, wanted', [
  ({'mesh.expert': 2}, "'mesh.expert': 2, but the policy has no experts"),
  ({'optim.router_bias_rate': 0.1}, "'optim.router_bias_rate': no router of the policy has a bias"),
  ({'model.arch': {'scoring_func': 'sigmoid', 'n_group': 2}}, 'num_experts is 0, so scoring_func, n_group cannot act'),
  ({'model.arch': {**MIXTURE, 'n_group': 4, 'topk_group': 2}}, 'n_group: 4 groups of one expert'),
  ({'optim.router_replay': True}, "'optim.router_replay': nothing is learned from what the policy samples"),
  ({'model.arch': {**MIXTURE, 'num_experts': 6}, 'mesh.expert': 4}, "axis 'expert' of size 6 does not divide over 4"),
])  # fmt: skip
def test_refusals(keys, wanted, cache):
  """Failure: an axis, a rate or a replay of experts that are not there."""
  chosen = settings('sft', cache)
  for key, value in keys.items():
    chosen = config.override(chosen, key, value)
  with pytest.raises(config.ConfigError) as caught:
    build.build(config.resolve(chosen), set(config.flatten(chosen)))
  assert wanted in str(caught.value)
