"""The transformer as a function: what a log-probability may depend on, and that every way of computing it gives the same number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import model
from rl_reasoning.structs import Batch

ARCH = model.Arch(37, 16, 24, 2, 4, 2, 8, qkv_bias=True, qk_norm=True)
LENGTHS = (9, 5, 7)


def random_params(arch, seed=0):
  """As at init, but with norms and biases moved, so that forgetting one shows (and in numpy: no compilation)."""
  rng = np.random.default_rng(seed)
  means = {-1: 1.0}
  return jax.tree.map(
    lambda w: rng.normal(means.get(w.scale, 0.0), w.scale if w.scale > 0 else 0.1, w.shape).astype(np.float32),
    model.weight_table(arch),
    is_leaf=model.is_weight,
  )


@pytest.fixture(scope='module')
def params():
  return random_params(ARCH)


@pytest.fixture(scope='module')
def texts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, ARCH.vocab_size, n) for n in LENGTHS]


def rows(texts, width, left=False) -> Batch:
  N = len(texts)
  tokens = np.full((N, width), 3, np.int32)  # padding holds a token like any other
  segment, position = np.zeros((N, width), np.int32), np.zeros((N, width), np.int32)
  for n, text in enumerate(texts):
    place = slice(width - len(text), width) if left else slice(0, len(text))
    tokens[n, place], segment[n, place], position[n, place] = text, 1, np.arange(len(text))
  return Batch(
    tokens=tokens, segment_NT=segment, position_NT=position, mask_NT=(position > 0).astype(np.float32),
    source_N=np.zeros(N, np.int32), group_N=np.arange(N),
  )  # fmt: skip


log_probs = jax.jit(model.log_probs, static_argnames=('arch', 'dtype', 'remat', 'entropy'))


def per_text(params, texts, width, left=False, **keys):
  logp, entropy = log_probs(params, ARCH, rows(texts, width, left), entropy=True, **keys)
  cut = [slice(width - len(t), width) if left else slice(0, len(t)) for t in texts]
  return [np.stack([logp[n, c], entropy[n, c]]) for n, c in enumerate(cut)]


@pytest.fixture(scope='module')
def gradient(params, texts):
  """Of the sum of all log-probabilities, one text a row: what every other way must give."""
  return jax.jit(jax.grad(lambda p: model.log_probs(p, ARCH, rows(texts, 9))[0].sum()))(params)


def assert_close(a, b, **tolerance):
  jax.tree.map(functools.partial(np.testing.assert_allclose, **{'atol': 2e-6, 'rtol': 1e-5, **tolerance}), a, b)


def test_closed_form(params, texts):
  """Failure: log-probability or entropy is not that of softmax(logits / temperature) at the token before."""
  batch = rows(texts, 9)
  hidden, _ = model.forward(params, ARCH, batch.tokens, batch.segment_NT, batch.position_NT)
  temperature = np.array([1.0, 0.5, 2.0])
  scores = np.asarray(model.logits(hidden, model.head(params)), np.float64) / temperature[:, None, None]
  full = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  logp, entropy = log_probs(params, ARCH, batch, temperature, entropy=True)
  for n, text in enumerate(texts):
    assert logp[n, 0] == 0 and entropy[n, 0] == 0
    for t in range(1, len(text)):
      assert float(logp[n, t]) == pytest.approx(full[n, t - 1, text[t]], abs=3e-6)
      assert float(entropy[n, t]) == pytest.approx(-(np.exp(full[n, t - 1]) * full[n, t - 1]).sum(), abs=3e-6)
    assert np.all(np.asarray(logp)[n, len(text) :] == 0) and np.all(np.asarray(entropy)[n, len(text) :] == 0)


def test_entropy_of_a_uniform_model():
  """Failure: entropy is not in nats, or not over the whole vocabulary."""
  uniform = jax.tree.map(np.zeros_like, random_params(ARCH))
  logp, entropy = log_probs(uniform, ARCH, rows([np.arange(5)], 5), entropy=True)
  np.testing.assert_allclose(np.asarray(entropy)[0, 1:], np.log(37), rtol=1e-6)
  np.testing.assert_allclose(np.asarray(logp)[0, 1:], -np.log(37), rtol=1e-6)


@pytest.mark.parametrize('width, left', [(9, True), (16, False), (16, True)])
def test_padding(params, texts, width, left):
  """Failure: padding tokens are attended, or positions count from the row's edge."""
  assert_close(per_text(params, texts, width, left), per_text(params, texts, 9))


def packed(texts, contents=None) -> Batch:
  tokens = np.concatenate(contents or texts)[None].astype(np.int32)
  segment = np.concatenate([np.full(len(t), i + 1) for i, t in enumerate(texts)])[None]
  position = np.concatenate([np.arange(len(t)) for t in texts])[None]
  return Batch(
    tokens=np.pad(tokens, ((0, 0), (0, 3))), segment_NT=np.pad(segment, ((0, 0), (0, 3))), position_NT=np.pad(position, ((0, 0), (0, 3))),
    mask_NT=np.ones((1, tokens.size + 3), np.float32), source_N=np.zeros(1, np.int32), group_N=np.zeros(1, np.int32),
  )  # fmt: skip


def test_packing(params, texts):
  """Failure: a packed sequence reads its neighbour, or its first token is scored by it."""
  together = np.stack(log_probs(params, ARCH, packed(texts), entropy=True))[:, 0]
  starts = np.cumsum((0, *LENGTHS))
  assert_close([together[:, a : a + n] for a, n in zip(starts, LENGTHS, strict=False)], per_text(params, texts, 9))
  assert np.all(together[:, starts] == 0)


def test_packed_gradient(params, texts, gradient):
  """Failure: packing changes the gradient."""
  together = jax.jit(jax.grad(lambda p: model.log_probs(p, ARCH, packed(texts))[0].sum()))(params)
  assert_close(together, gradient, atol=1e-4, rtol=1e-4)


def test_causal(params, texts):
  """Failure: a token's probability reads the token itself or a later one."""
  text, other = texts[0], texts[0].copy()
  other[5] = (other[5] + 1) % ARCH.vocab_size
  before, after = (np.asarray(log_probs(params, ARCH, rows([t], 9))[0])[0] for t in (text, other))
  np.testing.assert_array_equal(before[:5], after[:5])
  assert np.all(np.abs(before[5:] - after[5:]) > 1e-6)


@pytest.mark.parametrize('elements', [1, 37 * 3 * 4])
def test_chunks_of_the_vocabulary(params, texts, gradient, elements, monkeypatch):
  """Failure: log-probabilities, entropies or gradients depend on how many logits are alive at once."""
  whole = log_probs(params, ARCH, rows(texts, 9), entropy=True)

  def loss(params):
    result = model.log_probs(params, ARCH, rows(texts, 9), entropy=True)
    return jnp.sum(result[0]), result

  monkeypatch.setattr(model, 'CHUNK_ELEMENTS', elements)
  assert '[3,9,37]' not in str(jax.make_jaxpr(loss)(params))  # else nothing was cut, and nothing compared
  grad, result = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert_close(result, whole)
  assert_close(grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat(params, texts, gradient, remat):
  """Failure: recomputing in the backward pass changes the gradient."""
  again = jax.jit(jax.grad(lambda p: model.log_probs(p, ARCH, rows(texts, 9), remat=remat)[0].sum()))(params)
  assert_close(again, gradient, atol=1e-5)


def test_entropy_has_no_gradient(params, texts):
  """Failure: asking for the entropy moves the policy."""
  gradient = jax.jit(jax.grad(lambda p: model.log_probs(p, ARCH, rows(texts, 9), entropy=True)[1].sum()))(params)
  assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(gradient))


def test_grouped_queries_are_repeated_heads(params, texts):
  """Failure: query heads read another key head than in the published models (consecutive heads share one)."""
  many = dataclasses.replace(ARCH, num_key_value_heads=4)
  layers = dict(params['layers'])
  for name, axis in (('k', 2), ('v', 2), ('k_bias', 1), ('v_bias', 1)):
    layers[name] = jnp.repeat(layers[name], 2, axis=axis)
  assert_close(log_probs({**params, 'layers': layers}, many, rows(texts, 9))[0], log_probs(params, ARCH, rows(texts, 9))[0])


def test_bfloat16(params, texts):
  """Failure: bfloat16 computes something else, or the log-probabilities themselves are rounded to it."""
  low = log_probs(params, ARCH, rows(texts, 9), dtype='bfloat16')[0]
  exact = log_probs(params, ARCH, rows(texts, 9))[0]
  assert low.dtype == jnp.float32
  assert 1e-5 < np.abs(low - exact).max() < 0.15
  assert np.any(np.asarray(low) != np.asarray(low.astype(jnp.bfloat16).astype(jnp.float32)))


def test_rope_base_acts(params, texts):
  """Failure: rope_theta is read nowhere (it moved no logit in a peer)."""
  other = dataclasses.replace(ARCH, rope_theta=100.0)
  assert np.abs(log_probs(params, other, rows(texts, 9))[0] - log_probs(params, ARCH, rows(texts, 9))[0]).max() > 1e-3


def test_only_distances_count(params, texts):
  """Failure: rotary positions are absolute: shifting a sequence changes it."""
  batch = rows(texts, 9)
  moved = batch.replace(position_NT=batch.position_NT + 50)
  a = np.asarray(log_probs(params, ARCH, batch)[0])[:, 1:]
  b = np.asarray(log_probs(params, ARCH, moved)[0])[:, 1:]
  np.testing.assert_allclose(b, a, atol=2e-5)


def test_padding_rows_have_finite_gradients(params, texts, gradient):
  """Failure: a row that attends to nothing, or an all-padding row, makes the gradient NaN."""
  batch = rows([*texts, np.array([], np.int64)], 12)

  def loss(p):
    logp, _ = model.log_probs(p, ARCH, batch)
    return jnp.sum(batch.mask_NT * logp)

  wide = jax.jit(jax.grad(loss))(params)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(wide))
  assert_close(wide, gradient, atol=1e-4, rtol=1e-4)


def test_every_weight_counts(gradient):
  """Failure: a weight of the table is loaded but never used (a key's bias without q/k norm would cancel; here it must not)."""
  assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(gradient))


def test_untied_head(texts):
  """Failure: an untied output matrix is not read."""
  arch = dataclasses.replace(ARCH, tie_word_embeddings=False)
  tree = random_params(arch)
  other = {**tree, 'lm_head': tree['lm_head'] * 2}
  assert np.abs(log_probs(tree, arch, rows(texts, 9))[0] - log_probs(other, arch, rows(texts, 9))[0]).max() > 1e-3


def test_initial_weights():
  """Failure: two weights share their random numbers, or a scale is not that of the table."""
  arch = model.Arch(64, 128, 256, 2, 4, 4, 32)
  tree = jax.jit(model.init, static_argnums=1)(jax.random.key(0), arch)
  table = model.weight_table(arch)
  assert abs(np.corrcoef(np.ravel(tree['layers']['gate']), np.ravel(tree['layers']['up']))[0, 1]) < 0.02
  for name, x in tree['layers'].items():
    expected = {-1: 0.0}.get(table['layers'][name].scale, table['layers'][name].scale)
    assert float(np.std(x)) == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize('field, value', [('num_key_value_heads', 3), ('head_dim', 7), ('hidden_size', 0), ('rope_theta', -1.0)])
def test_impossible_architectures(field, value):
  """Failure: an impossible architecture is found by a shape error far away, or not at all."""
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(ARCH, **{field: value})


def test_frozen_layers(params):
  """Failure: what is frozen has a gradient (a tied embedding through the head), the layers above have none, or features that are given
  stand in for other layers than those that would have made them."""
  texts = [np.arange(6), np.arange(3, 12)]
  batch = rows(texts, 9)
  features = model.trunk(params, ARCH, batch.tokens, batch.segment_NT, batch.position_NT, 1, 'float32')
  net = model.make_net(ARCH, lambda rows: 1.0, dtype='float32', remat='none', frozen_layers=1)

  def total(params, batch):
    return net.logp(params, batch)[0].sum()

  loss = jax.jit(jax.value_and_grad(total))
  (plain, gradient), (given, same) = loss(params, batch), loss(params, batch.replace(extras={'features': features}))
  assert_close(given, plain)
  assert_close(plain, log_probs(params, ARCH, batch)[0].sum())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, same)
  assert not np.any(gradient['embed']) and np.any(gradient['final_norm'])
  for x in gradient['layers'].values():
    assert not np.any(x[0]) and np.all(np.any(x[1:].reshape(x.shape[0] - 1, -1), axis=1))


def test_scores_and_values_share_a_pass(params):
  """Failure: the scalar head reads another state than the one after its token, padding scores, one pass gives other numbers than two, or
  the shift moves something else."""
  both = model.init(jax.random.key(3), ARCH, ('lm', 'scalar'))
  batch = rows([np.arange(6), np.arange(3, 12)], 9)
  net = model.make_net(ARCH, lambda rows: 1.0, dtype='float32', remat='none')
  logp, entropy, scores = jax.jit(net.logp_and_scores)(both, batch)
  assert entropy is None and not np.any(np.asarray(scores)[np.asarray(batch.segment_NT) == 0])
  assert_close(scores, jax.jit(net.scores)(both, batch))
  assert_close(logp, log_probs(both, ARCH, batch)[0])
  lower = model.make_net(ARCH, lambda rows: 1.0, dtype='float32', remat='none', shift=0.75)
  for found in (jax.jit(lower.scores)(both, batch), jax.jit(lower.logp_and_scores)(both, batch)[2]):
    assert_close(found, np.asarray(scores) - 0.75 * (np.asarray(batch.segment_NT) > 0))
  changed = batch.replace(tokens=np.asarray(batch.tokens).copy())
  changed.tokens[1, 5] = 0
  moved = np.abs(np.asarray(jax.jit(net.scores)(both, changed)) - np.asarray(scores))[1] > 1e-6
  assert not moved[:5].any() and moved[5:].all()
