"""Per-token mathematics against closed forms in float64, and the GRPO loss against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import losses
from rl_reasoning.advantages import weigh
from rl_reasoning.model import Net
from rl_reasoning.objectives.grpo import Given, Grpo
from rl_reasoning.structs import Batch

N, T, P = 4, 6, 5


@pytest.mark.parametrize('low, high', [(0.2, 0.2), (0.2, 0.28), (0.1, 10.0)])
def test_clipped_surrogate(low, high):
  """Failure: the clipped objective, or where it says that it clips, is not that of PPO."""
  ratio = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 3.0] * 2)
  advantage = np.repeat([1.5, -0.7], 9)
  loss, clipped = losses.clipped_surrogate(np.log(ratio), np.zeros(18), advantage, low, high)
  expected = [-min(a * r, a * min(max(r, 1 - low), 1 + high)) for a, r in zip(advantage, ratio, strict=True)]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_array_equal(clipped['low'], (advantage < 0) & (ratio < 1 - low))
  np.testing.assert_array_equal(clipped['high'], (advantage > 0) & (ratio > 1 + high))


def test_clip_stops_the_gradient_on_one_side_only():
  """Failure: the clip also stops moves that undo an overshoot (A > 0 with a small ratio, A < 0 with a large one)."""

  def total(logp, advantage):
    return jnp.sum(losses.clipped_surrogate(logp, jnp.zeros(3), advantage, 0.2, 0.2)[0])

  logp = jnp.log(jnp.array([0.5, 1.0, 2.0]))
  np.testing.assert_allclose(jax.grad(total)(logp, jnp.ones(3)), [-0.5, -1, 0], rtol=1e-6)
  np.testing.assert_allclose(jax.grad(total)(logp, -jnp.ones(3)), [0, 1, 2], rtol=1e-6)


def test_kl_estimators():
  """Failure: an estimator is not Schulman's, or its sign is turned."""
  logp, ref = np.array([-1.0, -2.0, -0.3, -5.0]), np.array([-1.0, -1.2, -2.5, -4.9])
  d = logp - ref
  np.testing.assert_allclose(losses.kl_estimate(logp, ref, 'k1'), d, rtol=1e-6)
  np.testing.assert_allclose(losses.kl_estimate(logp, ref, 'k2'), d**2 / 2, rtol=1e-6)
  np.testing.assert_allclose(losses.kl_estimate(logp, ref, 'k3'), np.exp(ref - logp) - (ref - logp) - 1, rtol=2e-5, atol=1e-7)
  with pytest.raises(ValueError, match='k4'):
    losses.kl_estimate(logp, ref, 'k4')


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_kl_gradients_on_policy(estimator):
  """Failure: a KL in the loss has another expected gradient than objectives.md says: k1 none, k2 KL(policy||ref), k3 KL(ref||policy)."""
  rng = np.random.default_rng(0)
  theta, ref = jnp.asarray(rng.normal(size=7), jnp.float32), jax.nn.log_softmax(jnp.asarray(rng.normal(size=7), jnp.float32))

  def expectation(theta):  # every token once, weighted with the probability that the policy samples it
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * losses.kl_estimate(logp, ref, estimator))

  def kl(p, q):
    return jnp.sum(jnp.exp(p) * (p - q))

  exact = {
    'k1': lambda theta: 0.0 * theta.sum(),
    'k2': lambda theta: kl(jax.nn.log_softmax(theta), ref),
    'k3': lambda theta: kl(ref, jax.nn.log_softmax(theta)),
  }[estimator]
  np.testing.assert_allclose(jax.grad(expectation)(theta), jax.grad(exact)(theta), atol=1e-6)
  if estimator != 'k2':  # k1 and k3 are unbiased in value
    np.testing.assert_allclose(expectation(theta), kl(jax.nn.log_softmax(theta), ref), atol=1e-6)


def test_per_sequence():
  """Failure: sums run over packed neighbours or over padding."""
  x = np.array([[1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32]], np.float32)
  segment = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
  expected = [[3, 3, 28, 28, 28, 32], [1, 2, 12, 12, 48, 48]]
  np.testing.assert_array_equal(losses.per_sequence(x, segment), expected)


def objective(**keys) -> Grpo:
  return Grpo(Given(('accuracy',), (1.0,)), num_generations=2, **keys)


class Linear:
  """A network whose log-probabilities are linear in its parameters: gradients are known."""

  def __init__(self, seed=1):
    rng = np.random.default_rng(seed)
    self.x, self.bias = rng.normal(size=(N, T, P)), rng.normal(-2, 0.5, size=(N, T))

  def logp(self, params, rows, entropy=False):
    value = jnp.asarray(self.x) @ params + jnp.asarray(self.bias)
    return value, (jnp.zeros_like(value) if entropy else None)

  def nets(self):
    return {role: Net(None, self.logp) for role in ('policy', 'ref')}  # type: ignore[arg-type]


def make_batch(**fields) -> Batch:
  rng = np.random.default_rng(2)
  lengths = np.array([6, 4, 5, 3])
  segment = (np.arange(T) < lengths[:, None]).astype(np.int32)
  mask = segment * (np.arange(T) >= 2).astype(np.float64)
  return Batch(
    **{
      'tokens': np.zeros((N, T), np.int32),
      'segment_NT': segment,
      'position_NT': np.tile(np.arange(T, dtype=np.int32), (N, 1)),
      'mask_NT': mask,
      'source_N': np.zeros(N, np.int32),
      'group_N': np.arange(N, dtype=np.int32) // 2,
      'logp_sample_NT': rng.normal(-2, 0.5, (N, T)),
      'advantage_NT': np.array([1.2, -0.8, 0.5, -2.0])[:, None] * mask,
      'weight_NT': mask * rng.random((N, T)),
      **fields,
    }
  )


def value_and_grad(grpo, net, batch, params, frozen):
  def loss(p):
    return grpo.loss(net.nets(), {'policy': p}, {'ref': frozen}, {}, batch)[0]

  return jax.value_and_grad(loss)(params), loss


@pytest.mark.parametrize('keys', [{}, {'epsilon_high': 0.5}, {'beta': 0.3}, {'beta': 0.3, 'kl_estimator': 'k2'}], ids=str)
def test_gradient_against_finite_differences(keys):
  """Failure: the gradient of the GRPO loss is not that of its value, or something that is to be constant has a gradient."""
  with jax.enable_x64(True):
    grpo, net, rng = objective(num_iterations=2, **keys), Linear(), np.random.default_rng(3)
    params, ref = jnp.asarray(rng.normal(0, 0.1, P)), jnp.asarray(rng.normal(0, 0.1, P))
    old = np.asarray(net.logp(params, None)[0]) + np.tile([0.6, -0.6, 0.1, -0.1], 6).reshape(N, T)
    batch = make_batch(logp_old_NT=old, logp_ref_NT=net.logp(ref, None)[0])
    high = 0.2 if grpo.epsilon_high is None else grpo.epsilon_high
    ratio = np.exp(np.asarray(net.logp(params, None)[0]) - old)
    for kink in (0.8, 1 + high):
      assert np.abs(ratio - kink).min() > 1e-3
    assert np.any((ratio > 1 + high) & (batch.advantage_NT > 0)) and np.any((ratio < 0.8) & (batch.advantage_NT < 0))
    (_, grad), loss = value_and_grad(grpo, net, batch, params, ref)
    for index in range(P):
      step = jnp.zeros(P).at[index].set(1e-6)
      assert (loss(params + step) - loss(params - step)) / 2e-6 == pytest.approx(float(grad[index]), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize('aggregation', ['token_mean', 'sequence_mean', 'sequence_sum', 'fixed_length'])
def test_first_update_is_the_policy_gradient(aggregation):
  """Failure: on-policy the loss is not -sum(weight advantage), or its gradient not that of sum(weight advantage logp)."""
  grpo, net = objective(aggregation=aggregation), Linear()
  batch = make_batch()
  weight = np.asarray(weigh(batch.mask_NT.astype(np.float32), batch.segment_NT, batch.source_N, aggregation, T), np.float64)
  params = jnp.asarray(np.random.default_rng(4).normal(0, 0.1, P), jnp.float32)
  (value, grad), _ = value_and_grad(grpo, net, batch.replace(weight_NT=weight), params, None)
  pull = weight * np.asarray(batch.advantage_NT)
  np.testing.assert_allclose(value, -pull.sum(), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(grad, -np.einsum('nt,ntp->p', pull, net.x), rtol=1e-5, atol=1e-6)


def test_old_policy_is_read_when_there():
  """Failure: the ratio is always 1 and the clip inert, because logp_old is not used."""
  grpo, net = objective(num_iterations=2), Linear()
  params = jnp.zeros(P)
  logp = net.logp(params, None)[0]
  batch = make_batch(logp_old_NT=logp - np.log(1.5))  # every ratio is 1.5
  value, metrics = grpo.loss(net.nets(), {'policy': params}, {}, {}, batch)
  a, w = batch.advantage_NT, batch.weight_NT
  np.testing.assert_allclose(value, np.sum(w * np.where(a > 0, -1.2 * a, -1.5 * a)), rtol=1e-5)
  share = (a > 0).sum() / batch.mask_NT.sum()
  assert metrics['clip_ratio/high_mean'].total / metrics['clip_ratio/high_mean'].count == pytest.approx(share)
  assert metrics['clip_ratio/low_mean'].total == 0


@pytest.mark.parametrize('extreme', [-1e4, 1e4])
@pytest.mark.parametrize('estimator', ['k2', 'k3'])
def test_extreme_values_outside_the_mask(extreme, estimator):
  """Failure: 0 * inf of a token that is not trained makes the loss or the gradient NaN (OpenRLHF#1240)."""
  grpo, net = objective(num_iterations=2, beta=0.1, kl_estimator=estimator), Linear()
  params = jnp.asarray(np.random.default_rng(5).normal(0, 0.1, P), jnp.float32)
  logp = np.asarray(net.logp(params, None)[0])
  outside = make_batch().mask_NT == 0
  calm = make_batch(logp_old_NT=logp - 0.1, logp_ref_NT=logp + 0.1)
  wild = make_batch(
    logp_old_NT=np.where(outside, extreme, logp - 0.1),
    logp_ref_NT=np.where(outside, -extreme, logp + 0.1),
    logp_sample_NT=np.where(outside, extreme, calm.logp_sample_NT),
  )
  results = []
  for batch in (calm, wild):
    (value, metrics), grad = jax.value_and_grad(
      lambda p, batch: grpo.loss(net.nets(), {'policy': p}, {}, {}, batch), has_aux=True
    )(params, batch)
    results.append((value, grad, metrics))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), results[1], results[0])


def test_metrics_are_over_masked_tokens():
  """Failure: entropy, KL or the distance to the sampler is averaged over padding or prompt tokens."""
  grpo, net, rng = objective(num_iterations=2, beta=0.1), Linear(), np.random.default_rng(6)
  params = jnp.zeros(P)
  logp, mask = np.asarray(net.logp(params, None)[0]), make_batch().mask_NT
  old, ref, sampled = (logp + rng.normal(0, 0.1, (N, T)) for _ in range(3))
  spread = rng.random((N, T))
  nets = {'policy': Net(None, lambda p, rows, entropy=False: (net.logp(p, rows)[0], spread))}  # type: ignore[arg-type]
  batch = make_batch(logp_old_NT=old, logp_ref_NT=ref, logp_sample_NT=sampled)
  metrics = grpo.loss(nets, {'policy': params}, {}, {}, batch)[1]
  m = mask > 0

  def mean(name):
    return float(metrics[name].total / metrics[name].count)

  assert mean('entropy') == pytest.approx(spread[m].mean(), rel=1e-5)
  assert mean('kl') == pytest.approx((np.exp(ref - logp) - (ref - logp) - 1)[m].mean(), rel=1e-3)
  assert mean('sampling/logp_difference/mean') == pytest.approx(np.abs(old - sampled)[m].mean(), rel=1e-4)
  assert float(metrics['sampling/logp_difference/max'].value) == pytest.approx(np.abs(old - sampled)[m].max(), rel=1e-4)
