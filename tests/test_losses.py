"""Per-token mathematics against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import losses

ratios = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 3.1, 12.0] * 2)
advantages = np.repeat([1.5, -0.7], 10)


@pytest.mark.parametrize('delta', [None, 3.0])
@pytest.mark.parametrize('low, high', [(0.2, 0.2), (0.2, 0.28), (0.1, 10.0), (10.0, 10.0)])
def test_clipped_surrogate(low, high, delta):
  """Failure: the clipped objective, its dual clip, or where they say that they clip, is not that of PPO."""
  loss, clipped = losses.clipped_surrogate(ratios, advantages, low, high, delta)
  expected = [-min(a * r, a * min(max(r, 1 - low), 1 + high)) for a, r in zip(advantages, ratios, strict=True)]
  if delta is not None:
    expected = [min(x, -delta * a) if a < 0 else x for a, x in zip(advantages, expected, strict=True)]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_array_equal(clipped['low'], (advantages < 0) & (ratios < 1 - low))
  np.testing.assert_array_equal(clipped['high'], (advantages > 0) & (ratios > 1 + high))
  assert ('dual' in clipped) == (delta is not None)
  if delta is not None:
    np.testing.assert_array_equal(clipped['dual'], (advantages < 0) & (ratios > delta))


def test_clip_stops_the_gradient_on_one_side_only():
  """Failure: the clip also stops moves that undo an overshoot (A > 0 with a small ratio, A < 0 with a large one)."""

  def total(ratio, advantage, delta=None):
    return jnp.sum(losses.clipped_surrogate(ratio, advantage, 0.2, 0.2, delta)[0])

  ratio = jnp.array([0.5, 1.0, 2.0, 4.0])
  np.testing.assert_allclose(jax.grad(total)(ratio, jnp.ones(4)), [-1, -1, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(jax.grad(total)(ratio, -jnp.ones(4)), [0, 1, 1, 1], rtol=1e-6)
  np.testing.assert_allclose(jax.grad(total)(ratio, -jnp.ones(4), 3.0), [0, 1, 1, 0], rtol=1e-6)


def test_clipped_value_loss():
  """Failure: the value's clip frees what it should hold or holds what it should free, says that it acts where it does not, or loses the
  gradient of a value that is still near the old one."""
  value = np.array([1.0, 1.1, 2.0, 2.0, 0.0, 0.0, 1.0 + 1e-7, 5.0], np.float32)
  returns = np.array([3.0, 3.0, 3.0, -3.0, -3.0, 3.0, 3.0, 3.0], np.float32)
  loss, clipped = losses.clipped_value_loss(value, np.ones(8, np.float32), returns, 0.2)
  # Beyond 0.2 of the old value 1 only the worse of both counts: what moved towards its return is held at 1.2 or 0.8, what moved away is
  # not, nor the last one, which overshot its return by more than 1.2 falls short of it.
  held = np.array([1.0, 1.1, 1.2, 2.0, 0.8, 0.0, 1.0, 5.0])
  np.testing.assert_allclose(loss, 0.5 * (held - returns) ** 2, rtol=1e-6)
  np.testing.assert_array_equal(clipped, [0, 0, 1, 0, 1, 0, 0, 0])
  slope = jax.grad(lambda v: jnp.sum(losses.clipped_value_loss(v, jnp.ones(8), returns, 0.2)[0]))(jnp.asarray(value))
  np.testing.assert_allclose(slope, np.where(clipped, 0, value - returns), rtol=1e-6)


def test_importance_ratio():
  """Failure: GSPO's ratio is over padding, over unmasked tokens or over a packed neighbour, or a token has another's gradient."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    logp, old = rng.normal(-2, 1, (2, 8)), rng.normal(-2, 1, (2, 8))
    segment = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    mask = np.array([[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1, 0, 0.0]])
    np.testing.assert_allclose(losses.importance_ratio(logp, old, mask, segment, 'token'), np.exp(logp - old))
    sequences = [(0, [1, 2, 3]), (0, [5, 6]), (1, [2, 4, 5])]
    ratio = losses.importance_ratio(logp, old, mask, segment, 'sequence')
    slope = jax.grad(lambda x: jnp.sum(mask * losses.importance_ratio(x, old, mask, segment, 'sequence')))(logp)
    for row, places in sequences:
      s = np.exp((logp - old)[row, places].mean())
      np.testing.assert_allclose(ratio[row, np.array(places)], s)
      np.testing.assert_allclose(slope[row, np.array(places)], s)  # d/dlogp_t of s * exp(logp_t - sg(logp_t)), of no other token
    assert np.all(np.asarray(slope)[mask == 0] == 0)


def test_capped_reinforce():
  """Failure: CISPO's weight is not min(r, cap), has a gradient, or a token beyond the cap loses its gradient."""
  with jax.enable_x64(True):
    logp = np.log(ratios) - 3.0

    def loss(x):
      return jnp.sum(losses.capped_reinforce(x, jnp.exp(x + 3.0), advantages, 5.0)[0])

    weight = np.minimum(ratios, 5.0)
    assert weight.max() == 5.0
    np.testing.assert_allclose(loss(logp), np.sum(-weight * advantages * logp))
    np.testing.assert_allclose(jax.grad(loss)(logp), -weight * advantages)
    np.testing.assert_array_equal(losses.capped_reinforce(logp, ratios, advantages, 5.0)[1]['high'], ratios > 5.0)


def test_soft_overlong():
  """Failure: DAPO's penalty begins elsewhere, is steeper, or goes on beyond -1. Its numbers: a limit of 20,480 with a buffer of 4,096."""
  length = np.array([1.0, 16383, 16384, 16385, 18432, 20479, 20480, 20500])
  got = losses.soft_overlong(length, 20480, 4096)
  np.testing.assert_allclose(got, [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1], rtol=1e-6)


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


def test_losses_of_pairs():
  """Failure: a pair's loss is not its paper's in closed form, or a large margin overflows."""
  with jax.enable_x64(True):
    D = np.array([-3.0, -0.2, 0.0, 0.5, 1.0, 2.5])

    def log_sigmoid(x):
      return -np.log(1 + np.exp(-x))

    np.testing.assert_allclose(losses.dpo(D), -log_sigmoid(D))
    np.testing.assert_allclose(losses.dpo(D, 0.2), -0.8 * log_sigmoid(D) - 0.2 * log_sigmoid(-D))
    np.testing.assert_allclose(losses.dpo(D, 0.5), losses.dpo(-D, 0.5))  # labels that say nothing
    lowest = np.log(4.0)  # sigmoid(D) is 0.8 there
    np.testing.assert_allclose(jax.grad(lambda x: losses.dpo(x, 0.2))(lowest), 0, atol=1e-15)
    np.testing.assert_allclose(losses.ipo(D, 0.25), (D / 0.25 - 2.0) ** 2)
    np.testing.assert_allclose(losses.hinge(D), [4, 1.2, 1, 0.5, 0, 0])
    w, loser = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -0.5, -4.0])
    np.testing.assert_allclose(losses.cpl(w, loser, 0.3), -np.log(np.exp(w) / (np.exp(w) + np.exp(0.3 * loser))))
    lower = losses.cpl(w - 1, loser - 1, 0.3) - losses.cpl(w, loser, 0.3)
    assert np.all(lower > 0) and np.allclose(losses.cpl(w - 1, loser - 1, 1.0), losses.cpl(w, loser, 1.0))
  for loss in (losses.dpo, lambda x: losses.dpo(x, 0.1), lambda x: losses.cpl(x, -x, 0.5)):
    value, slope = jax.value_and_grad(lambda x, loss=loss: jnp.sum(loss(x)))(jnp.float32([-1e4, 1e4]))
    assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_log_odds():
  """Failure: ORPO's odds are not p / (1 - p), lose their digits near p = 1, or are infinite there."""
  p = np.array([1e-6, 0.1, 0.5, 0.9, 0.999])
  np.testing.assert_allclose(losses.log_odds(np.float32(np.log(p))), np.log(p / (1 - p)), rtol=2e-4, atol=1e-6)
  value, slope = jax.value_and_grad(losses.log_odds)(jnp.float32(0.0))
  assert value == pytest.approx(np.log(1e6), rel=1e-4) and slope == 0
  assert losses.log_odds(jnp.float32(-1e4)) == -1e4


def test_kto():
  """Failure: a desirable completion loses for being likely, z0 has the wrong sign, or a label between 0 and 1 is rounded."""
  h, z0 = np.array([-2.0, 0.0, 0.7, 3.0]), 0.7

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  good, bad = 1.5 * (1 - sigmoid(0.4 * (h - z0))), 0.5 * (1 - sigmoid(0.4 * (z0 - h)))
  with jax.enable_x64(True):
    for label in (0.0, 0.25, 1.0):
      np.testing.assert_allclose(losses.kto(h, z0, label, 0.4, 1.5, 0.5), label * good + (1 - label) * bad)
