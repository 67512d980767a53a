"""Sampling against its definition: the measure of every token is its probability, and the log-probability is that of the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import sampling

ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))
GRID = 20_000


def logits_of(vocab, seed=0, scale=2.0):
  return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def softmax(x):
  x = np.asarray(x, np.float64)
  e = np.exp(x - x.max())
  return e / e.sum()


def draw(logits, u, **settings):
  u = np.asarray(u, np.float32)
  settings = {'temperature': 1.0, **settings}
  token, logp = jax.jit(lambda x, u: sampling.sample(x, u, **settings))(np.broadcast_to(logits, (len(u), len(logits))), u)
  return np.asarray(token), np.asarray(logp)


def measure(logits, **settings):
  """(share of the unit interval that leads to each token, log-probability reported for it or nan)."""
  token, logp = draw(logits, (np.arange(GRID) + 0.5) / GRID, **settings)
  reported = np.full(len(logits), np.nan)
  reported[token] = logp
  return np.bincount(token, minlength=len(logits)) / GRID, reported


def truncated(probability, top_k=0, top_p=1.0, min_p=0.0):
  """The definition, one after the other, in float64: top-k, then top-p of what is left, then min-p."""
  p = probability.copy()
  if top_k:
    p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
  order = np.argsort(-p)
  before = np.cumsum(p[order]) - p[order]
  p[order[before >= top_p]] = 0
  p[p < min_p * p.max()] = 0
  return p / p.sum()


@pytest.mark.parametrize('vocab', [1, 2, 7, 8, 9, 10, 64, 100, 131, 264])
def test_measure_is_probability(vocab):
  """Failure: tokens are drawn with other probabilities than softmax gives, so rollouts are not the policy's."""
  logits = logits_of(vocab, seed=vocab)
  share, reported = measure(logits)
  np.testing.assert_allclose(share, softmax(logits), atol=2 / GRID)
  seen = share > 0
  np.testing.assert_allclose(reported[seen], np.log(softmax(logits))[seen], atol=2e-6)


@pytest.mark.parametrize('temperature', [0.3, 1.7])
def test_temperature(temperature):
  """Failure: temperature is not applied to the draw or to its log-probability (trl#4159)."""
  logits = logits_of(100, seed=1)
  share, reported = measure(logits, temperature=temperature)
  expected = softmax(logits.astype(np.float64) / temperature)
  np.testing.assert_allclose(share, expected, atol=2 / GRID)
  np.testing.assert_allclose(reported[share > 0], np.log(expected)[share > 0], atol=5e-6)


@pytest.mark.parametrize(
  'settings',
  [
    {'top_k': 1},
    {'top_k': 5},
    {'top_k': 1000},
    {'top_p': 0.7},
    {'top_p': 1e-6},
    {'min_p': 0.2},
    {'top_k': 20, 'top_p': 0.8, 'min_p': 0.1},
  ],
  ids=str,
)
def test_truncation_renormalises(settings):
  """Failure: truncated sampling keeps other tokens than it says, or reports log-probabilities of the untruncated distribution."""
  logits = logits_of(131, seed=2)
  share, reported = measure(logits, **settings)
  expected = truncated(softmax(logits), **settings)
  assert set(np.flatnonzero(share)) <= set(np.flatnonzero(expected))
  np.testing.assert_allclose(share, expected, atol=2 / GRID)
  np.testing.assert_allclose(reported[share > 0], np.log(expected[share > 0]), atol=5e-6)


def test_temperature_acts_before_truncation():
  """Failure: top-p looks at the distribution at temperature 1, so a hot sampler is cut as if it were cold."""
  logits = logits_of(64, seed=3)
  share, _ = measure(logits, temperature=3.0, top_p=0.6)
  np.testing.assert_allclose(share, truncated(softmax(logits / 3.0), top_p=0.6), atol=2 / GRID)


def test_greedy():
  """Failure: temperature 0 is not the best token, or its log-probability is not that at temperature 1."""
  logits = logits_of(100, seed=4)
  token, logp = draw(logits, [0.0, 0.3, ALMOST_ONE], temperature=0)
  assert set(token) == {int(np.argmax(logits))}
  np.testing.assert_allclose(logp, np.log(softmax(logits)).max(), atol=1e-6)


@pytest.mark.parametrize('nothing', [-np.inf, sampling.NEG_INF, -200.0])
@pytest.mark.parametrize('alive', [[50], [0, 99], [9, 10, 11], [31, 57, 98]], ids=str)
def test_ends_of_the_interval(alive, nothing):
  """Failure: u = 0 or u just below 1 falls on a token without probability (the first or the last of the vocabulary)."""
  logits = np.full(100, nothing, np.float32)
  logits[alive] = logits_of(len(alive), seed=5)
  token, logp = draw(logits, [0.0, ALMOST_ONE])
  assert token.tolist() == [alive[0], alive[-1]]
  assert np.all(np.isfinite(logp))


def test_tokens_without_mass_are_never_drawn():
  """Failure: rounding of running sums lets a token through that top-k removed; its log-probability is then -1e30 (a NaN later)."""
  rng, vocab = np.random.default_rng(6), 264
  for _ in range(4):
    logits = rng.normal(0, 3, vocab).astype(np.float32)
    logits[rng.random(vocab) < 0.6] = sampling.NEG_INF
    edges = np.cumsum(softmax(logits))  # the places where rounding matters, and their neighbours
    near = np.concatenate([edges + d for d in np.linspace(-4e-7, 4e-7, 33)] + [rng.random(2000)])
    token, logp = draw(logits, np.clip(near, 0, ALMOST_ONE))
    assert np.all(logits[token] > -100) and np.all(logp > -100)


def test_first_above_survives_rounding():
  """Failure: an entry without mass is chosen where x lies exactly on a running sum, or what is left of x is negative."""
  rng = np.random.default_rng(7)
  mass = (rng.random((4096, 24)) ** 4 * (rng.random((4096, 24)) < 0.5)).astype(np.float32)
  mass[:, 12] = 0.5
  sums = np.asarray(jnp.cumsum(mass, axis=-1))
  x = np.maximum(0, sums[np.arange(4096), rng.integers(0, 24, 4096)])
  x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(9))])
  mass = np.tile(mass, (3, 1))
  index, rest = jax.jit(sampling.first_above)(mass, x)
  assert np.all(mass[np.arange(len(x)), np.asarray(index)] > 0)
  assert np.all(np.asarray(rest) >= 0), f'least of what is left: {np.min(rest)}'


def test_rows_are_independent():
  """Failure: a row's token depends on its neighbours."""
  rng = np.random.default_rng(8)
  logits, u = rng.normal(0, 2, (16, 100)).astype(np.float32), rng.random(16).astype(np.float32)
  token, logp = sampling.sample(logits, u, temperature=1.0)
  for n in range(16):
    one, its = sampling.sample(logits[n : n + 1], u[n : n + 1], temperature=1.0)
    assert int(one[0]) == int(token[n]) and float(its[0]) == pytest.approx(float(logp[n]), abs=1e-6)


def test_bfloat16_logits_are_widened():
  """Failure: a draw or its log-probability is computed in bfloat16 (an error of 1 %)."""
  logits = logits_of(100, seed=9).astype(jnp.bfloat16)
  _, reported = measure(logits)
  expected = np.log(softmax(logits.astype(np.float32)))
  np.testing.assert_allclose(reported[~np.isnan(reported)], expected[~np.isnan(reported)], atol=5e-6)
