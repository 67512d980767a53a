"""Rollouts: what a token depends on, where a completion ends, and that the sampler's log-probabilities are the trainer's."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import collect, config, model, preemption, rollout, sharding, stored

ARCH = model.Arch(40, 16, 24, 2, 8, 4, 4, qkv_bias=True)
END = (0, 17, 29)  # 0 is also what fills a row after its end: pad == eos must not matter
SETTINGS = config.Rollout(max_completion_length=20, temperature=0.8, chunk=8)
G = 2


@pytest.fixture(scope='module')
def params():
  rng, table = np.random.default_rng(1), model.weight_table(ARCH)
  return jax.tree.map(
    lambda w: jnp.float32(rng.normal(w.scale < 0, abs(w.scale) / 2 + 0.1, w.shape)), table, is_leaf=model.is_weight
  )


@pytest.fixture(scope='module')
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(1, 16, n).tolist() for n in (3, 1, 12, 7, 16, 5, 9, 2)]


def generate(params, prompts, settings=SETTINGS, **keys):
  return rollout.generate(
    params, ARCH, prompts, settings=settings, **{'group': G, 'end_ids': END, 'key': jax.random.key(7), **keys}
  )


@pytest.fixture(scope='module')
def rolled(params, prompts):
  return generate(params, prompts)


def assert_same(a, b):
  np.testing.assert_array_equal(a.tokens_NC, b.tokens_NC)
  np.testing.assert_array_equal(a.length_N, b.length_N)
  np.testing.assert_array_equal(a.truncated_N, b.truncated_N)
  np.testing.assert_allclose(a.logp_NC, b.logp_NC, atol=1e-5)


def pick(rolled, rows):
  return jax.tree.map(lambda x: x[rows], rolled)


def test_log_probabilities_are_the_trainers(params, prompts, rolled):
  """Failure: sampler and trainer disagree (positions, cache, temperature or shift): every ratio would be wrong."""
  batch = collect.to_batch(prompts, rolled, G)
  logp, _ = jax.jit(model.log_probs, static_argnums=1)(params, ARCH, batch, SETTINGS.temperature)
  np.testing.assert_allclose(np.asarray(logp) * batch.mask_NT, batch.logp_sample_NT, atol=1e-5)
  assert batch.mask_NT.sum() == rolled.length_N.sum()


def test_ends(rolled):
  """Failure: an end token is dropped, only one of several is honoured, something follows it, or a cut completion is not flagged."""
  last = []
  for tokens, logp, length, cut in zip(rolled.tokens_NC, rolled.logp_NC, rolled.length_N, rolled.truncated_N, strict=True):
    assert 1 <= length <= 20 and not set(tokens[: length - 1].tolist()) & set(END)
    assert np.all(tokens[length:] == 0) and np.all(logp[length:] == 0) and np.all(logp[:length] < 0)
    assert cut == (tokens[length - 1] not in END) and (not cut or length == 20)
    last.append(int(tokens[length - 1]))
  assert set(END) <= set(last) and rolled.truncated_N.any()  # else this test has seen nothing


def test_end_token_is_trained(prompts, rolled):
  """Failure: the stop action carries no gradient because pad == eos (trl#1623)."""
  batch = collect.to_batch(prompts, rolled, G)
  for n, length in enumerate(rolled.length_N):
    end = len(prompts[n // G]) + length - 1
    assert batch.mask_NT[n, end] == 1 and batch.tokens[n, end] == rolled.tokens_NC[n, length - 1]
    assert batch.mask_NT[n].sum() == length and batch.segment_NT[n, end] == 1 and np.all(batch.segment_NT[n, end + 1 :] == 0)


def test_randomness(params, prompts, rolled):
  """Failure: members of a group are equal, two steps draw the same, or the same key does not repeat."""
  first, second = rolled.tokens_NC[0::2], rolled.tokens_NC[1::2]
  assert np.all(np.any(first != second, axis=1))
  other = generate(params, prompts, key=jax.random.key(8))
  assert np.mean(np.any(other.tokens_NC != rolled.tokens_NC, axis=1)) > 0.9
  assert_same(generate(params, prompts), rolled)


def test_batch_composition(params, prompts, rolled):
  """Failure: a prompt's tokens depend on the batch that it sits in, on its place there or on the padding."""
  ids = [5, 0, 3]
  some = generate(params, [prompts[i] for i in ids], prompt_ids=ids)
  assert_same(some, pick(rolled, [10, 11, 0, 1, 6, 7]))


@pytest.mark.parametrize('chunk', [3, 64])
def test_cache_chunk(params, prompts, rolled, chunk):
  """Failure: growing the cache moves or loses entries."""
  assert_same(generate(params, prompts, dataclasses.replace(SETTINGS, chunk=chunk)), rolled)


@pytest.mark.parametrize('pace', [1, 5])
def test_pace(params, prompts, rolled, monkeypatch, pace):
  """Failure: tokens depend on how many of them a decode call samples, or each number of them is a program to compile."""
  calls, decode = [], rollout.decode
  monkeypatch.setattr(rollout, 'PACE', pace)
  monkeypatch.setattr(rollout, 'decode', lambda *arguments: calls.append(1) or decode(*arguments))
  programs = decode._cache_size()
  got = generate(params, prompts)
  jax.tree.map(np.testing.assert_array_equal, got, rolled)
  assert decode._cache_size() == programs and len(calls) >= 19 / pace


def test_preempted(params, prompts, monkeypatch):
  """Failure: a rollout runs to its end before SIGTERM is listened to, and past the grace period."""
  calls, decode = [], rollout.decode

  def decoded(*arguments):
    calls.append(1)
    if len(calls) == 2:
      signal.raise_signal(signal.SIGTERM)
    return decode(*arguments)

  monkeypatch.setattr(rollout, 'PACE', 3)
  monkeypatch.setattr(rollout, 'decode', decoded)
  with pytest.raises(preemption.Preempted), preemption.watched():
    generate(params, prompts)
  assert len(calls) == 2


def test_shared_prefill(params, prompts, rolled, monkeypatch):
  """Failure: members of a group read another prompt's cache, or share what is their own."""
  uniforms = rollout.uniforms

  def by_row(key, ids, group, length):
    return uniforms(key, ids[::G], G, length).reshape(-1, 1, length)

  monkeypatch.setattr(rollout, 'uniforms', by_row)
  alone = generate(params, [p for p in prompts for _ in range(G)], group=1, prompt_ids=[i for i in range(8) for _ in range(G)])
  assert_same(alone, rolled)


@pytest.mark.parametrize(
  ('sizes', 'sequence'), [((8, 1, 1), 1), ((2, 2, 2), 1), ((1, 2, 4), 1), ((4, 2, 1), 1), ((1, 1, 1), 1), ((1, 2, 2), 2)], ids=str
)
def test_mesh(params, prompts, rolled, sizes, sequence):
  """Failure: tokens depend on how many devices there are, or how weights and rows lie on them."""
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: sequence * int(np.prod(sizes))], sequence=sequence)
  with jax.set_mesh(mesh):
    spread = jax.device_put(params, stored.param_shardings(mesh, ARCH))
    assert_same(generate(spread, prompts, mesh=mesh), rolled)


def test_rows_that_do_not_divide(params, prompts):
  """Failure: rows that do not divide over the mesh are padded or dropped without a word."""
  mesh = sharding.make_mesh(8, 1, 1)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="axis 'rows' of size 3"):
    generate(jax.device_put(params, stored.param_shardings(mesh, ARCH)), prompts[:3], mesh=mesh)


def test_greedy_is_the_argmax_of_the_full_forward(params, prompts):
  """Failure: the cached forward is not the forward: greedy decoding takes another path."""
  settings = dataclasses.replace(SETTINGS, temperature=0.0, max_completion_length=10, chunk=4)
  got = generate(params, prompts, settings, group=1, end_ids=(17,))

  @jax.jit
  def best(tokens, length):
    valid = (np.arange(32) < length[:, None]).astype(np.int32)
    hidden, _ = model.forward(params, ARCH, tokens, valid, np.tile(np.arange(32), (8, 1)))
    scores = jax.nn.log_softmax(model.logits(hidden[np.arange(8), length - 1], model.head(params)))
    return scores.argmax(-1), scores.max(-1)

  tokens, length = np.zeros((8, 32), np.int32), np.array([len(p) for p in prompts])
  for n, prompt in enumerate(prompts):
    tokens[n, : len(prompt)] = prompt
  for t in range(10):
    token, logp = best(tokens, length)
    alive = t < got.length_N
    np.testing.assert_array_equal(got.tokens_NC[alive, t], np.asarray(token)[alive])
    np.testing.assert_allclose(got.logp_NC[alive, t], np.asarray(logp)[alive], atol=1e-5)  # at temperature 1
    tokens[np.arange(8), length], length = np.asarray(token), length + 1
  assert len({tuple(row) for row in got.tokens_NC.tolist()}) > 4


@pytest.mark.parametrize('limit, ends', [(1, (17,)), (6, tuple(range(40)))], ids=['limit of one', 'ends at once'])
def test_shortest(params, prompts, limit, ends):
  """Failure: a completion of one token is decoded past its end, or its flag is wrong."""
  got = generate(params, prompts, dataclasses.replace(SETTINGS, max_completion_length=limit), end_ids=ends)
  assert np.all(got.length_N == 1) and got.tokens_NC.shape == (16, limit)
  np.testing.assert_array_equal(got.truncated_N, ~np.isin(got.tokens_NC[:, 0], ends))


def test_empty_prompt(params):
  """Failure: an empty prompt is continued from padding."""
  with pytest.raises(ValueError, match='no token'):
    generate(params, [[1, 2], []])
