"""Attention over a cache: the kernel against XLA's code, what is read of a cache, and caches of one byte a number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import collect, config, decode_attention, kv_cache, model, rollout, sharding
from tests.slices import needs_compiler, slice_of
from tests.test_model import random_params
from tests.test_splash import LATENT, by_splash

ARCH = model.Arch(40, 16, 24, 2, 8, 4, 4, qkv_bias=True)
CAPPED = dataclasses.replace(ARCH, attn_logit_softcapping=2.0)
B, G = 4, 2
BYTES = tuple(kv_cache.LARGEST)


def random_cache(arch, S, dtype, seed=0):
  """(queries, the cache of S tokens, its keys and values [B, G, S, K, H] before they were quantised)."""
  rng = np.random.default_rng(seed)
  K, H, Q = arch.num_key_value_heads, arch.head_dim, arch.num_attention_heads // arch.num_key_value_heads
  if arch.kv_lora_rank:
    K, H, Q = 1, arch.kv_lora_rank + arch.qk_rope_head_dim, arch.num_attention_heads
  q, k, v = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in ((B, G, K, Q, H), *[(B, G, S, K, H)] * 2))
  v = None if arch.kv_lora_rank else v
  return q, kv_cache.of(k, v, dtype), (k, v)


def total(sums):
  return np.asarray(sums.out / np.maximum(sums.total, 1e-30)), np.asarray(sums.best + jnp.log(jnp.maximum(sums.total, 1e-30)))


@pytest.mark.parametrize(
  'arch, S, window, dtype',
  [
    (ARCH, 300, 0, 'float32'),
    (CAPPED, 300, 130, 'float32'),
    (ARCH, 300, 130, 'int8'),
    (ARCH, 12, 0, 'float8_e4m3fn'),
    (LATENT, 300, 0, 'int8'),
    (LATENT, 12, 0, 'float32'),
  ],
  ids=['several blocks', 'window and soft cap', 'int8, window', 'float8', 'latent, int8', 'latent'],
)
def test_kernel(monkeypatch, arch, S, window, dtype):
  """Failure: the kernel reads a slot that is not filled or beyond the window, misses one, forgets a scale, or joins blocks wrongly."""
  monkeypatch.setattr(decode_attention, 'LARGEST_BLOCK', 128)  # three blocks of 300, the last one with slots that are not there
  q, cache, _ = random_cache(arch, S, dtype)
  # One row of each kind: nothing filled (a completion that is done), the first block, up to its edge, all; a group differs in itself
  filled = np.minimum(np.array([[0, 5], [128, 129], [200, 299], [S, 1]], np.int32), S)
  slot = np.arange(S)
  read = (slot < filled[..., None]) & (slot >= (filled - window if window else 0 * filled)[..., None])
  bias = np.where(read, 0.0, -1e30).astype(np.float32)[:, :, None, None]
  ours = jax.jit(lambda q, cache: decode_attention.by_kernel(by_splash(arch), window, q, cache, filled))(q, cache)
  theirs = decode_attention.by_xla(arch, q, cache, bias)
  some = filled > 0
  for a, b in zip(total(ours), total(theirs), strict=True):
    np.testing.assert_allclose(a[some], b[some], atol=1e-5)
  assert np.all(np.asarray(ours.total)[~some] == 0) and np.all(np.asarray(ours.out)[~some] == 0)
  other = decode_attention.Sums(*(x + 1.0 for x in ours))  # a second part, which the empty one must not move
  np.testing.assert_allclose(decode_attention.joined(other, ours)[~some], (other.out / other.total)[~some], atol=1e-6)


@pytest.mark.parametrize('window', [0, 40])
def test_blocks_that_are_fetched(window):
  """Failure: a block without a slot to be read is fetched (a block is fetched where it is another one than that of the step before), or one
  with such a slot is not."""
  size, blocks = 16, 8
  for filled in range(size * blocks + 1):
    nearest = decode_attention.nearest(np.arange(blocks), filled, window, size).tolist()
    wanted = {slot // size for slot in range(max(0, filled - window) if window else 0, filled)} or {0}
    assert set(nearest) == wanted and nearest == sorted(nearest)
    assert all(nearest[j] == j for j in wanted)


def test_rollout():
  """Failure: with the kernels of TPUs the sampler is another one: in a block, a head or a row of another device."""
  rng, params = np.random.default_rng(0), random_params(ARCH)
  prompts = [rng.integers(1, 16, n).tolist() for n in (3, 1, 12, 7)]
  settings, mesh = config.Rollout(max_completion_length=12, chunk=16), sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    ours, theirs = (
      rollout.generate(params, arch, prompts, settings=settings, group=G, end_ids=(17,), key=jax.random.key(3), mesh=mesh)
      for arch in (by_splash(ARCH), ARCH)
    )
  np.testing.assert_array_equal(ours.tokens_NC, theirs.tokens_NC)
  np.testing.assert_allclose(ours.logp_NC, theirs.logp_NC, atol=1e-5)
  assert len(set(theirs.length_N.tolist())) > 1  # some were done before others


@pytest.mark.parametrize('dtype', BYTES)
def test_quantised(dtype):
  """Failure: a number is further from what it stands for than its rounding allows, a token's scale is another's, or zeros become NaN."""
  _, (keys, values), (k, v) = random_cache(ARCH, 20, dtype)
  for part, x, order in ((keys, k, (0, 1, 3, 4, 2)), (values, v, (0, 1, 3, 2, 4))):
    assert part.data.dtype == dtype and part.scale.dtype == jnp.float32 and part.scale.shape == (B, G, 4, 20)
    scale = part.scale[:, :, :, None] if part is keys else part.scale[..., None]
    error = np.abs(part.data.astype(jnp.float32) * scale - x.transpose(order))
    largest = np.abs(x).max(axis=-1).transpose(0, 1, 3, 2)  # of a token and head
    largest = largest[:, :, :, None] if part is keys else largest[..., None]
    # int8: half a step of 1/127 of the largest; float8 with 3 bits: 1/16 of the number, or half a step of its smallest ones
    bound = largest / 254 if dtype == 'int8' else np.maximum(np.abs(x.transpose(order)) / 16, largest / 448 / 1024)
    assert np.all(error <= bound * 1.001)
  zeros = kv_cache.of(jnp.zeros((1, 3, 2, 4)), None, dtype)[0]
  assert np.all(np.asarray(zeros.data.astype(jnp.float32)) == 0) and np.all(np.isfinite(zeros.scale))


@pytest.mark.parametrize('dtype, most', [('int8', 0.06), ('float8_e4m3fn', 0.4)])
@pytest.mark.parametrize('arch', [ARCH, LATENT], ids=['grouped', 'latent'])
def test_rollout_with_a_quantised_cache(arch, dtype, most):
  """Failure: a cache is not kept in one byte a number, or what is read of it is not what was written: the sampler's log-probabilities are
  far from the trainer's (and nearer than rounding allows: it is not quantised at all)."""
  rng, params = np.random.default_rng(0), random_params(arch)
  prompts = [rng.integers(1, 16, n).tolist() for n in (3, 1, 12, 7)]
  settings = config.Rollout(max_completion_length=12, chunk=16, cache_dtype=dtype)
  given = dict(settings=settings, group=G, end_ids=(17,), key=jax.random.key(3))
  states = rollout.decoding(params, arch, prompts, pace=3, **given)
  _, state = next(states), next(states)
  parts = [part for layer in state.cache for part in layer if part is not None]
  assert len(parts) == arch.num_hidden_layers * (1 if arch.kv_lora_rank else 2)
  assert all(part.data.dtype == dtype for part in parts)
  rolled = rollout.generate(params, arch, prompts, **given)
  batch = collect.to_batch(prompts, rolled, G)
  logp, _ = jax.jit(model.log_probs, static_argnums=1)(params, arch, batch)
  gap = np.abs(np.asarray(logp) * batch.mask_NT - batch.logp_sample_NT)
  assert 1e-4 < gap.max() < most


@needs_compiler
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2'])
def test_decode_compiles_for_a_slice(topology):
  """Failure: the kernel is not compiled for TPUs, a device holds heads or rows of others, or a step copies the cache."""
  mesh = sharding.make_mesh(2, 2, 2, devices=slice_of(topology))
  arch = model.Arch(512, 64, 64, 2, 8, 4, 128, attn_implementation='splash')
  G, S, P = 32, 16384, 64  # a cache of 0.5 GiB a device, beside which nothing else counts
  decoder = rollout.Decoder(arch, 'bfloat16', False, (0,), config.Rollout(max_completion_length=S, cache_dtype='int8'), G)
  table = model.weight_table(arch)

  def on(shape, *axes, dtype=jnp.bfloat16):
    axes = axes + (None,) * (len(shape) - len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, shape, axes, 'x'))

  def spread(tree, *axes):
    return jax.tree.map(lambda x: on(x.shape, *axes[: x.ndim], dtype=x.dtype), tree)

  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda w: on(w.shape, *w.axes, dtype=jnp.float32), table, is_leaf=model.is_weight)
    tokens, u = on((B, P), 'rows', dtype=jnp.int32), on((B, G, S), 'rows', dtype=jnp.float32)
    outer, layers = jax.eval_shape(lambda p: model.decode_weights(p, arch, 'bfloat16', False), params)
    outer = {name: on(x.shape, None if name == 'final_norm' else 'vocab') for name, x in outer.items()}
    layers = tuple({name: on(x.shape, *table['layers'][name].axes[1:]) for name, x in layer.items()} for layer in layers)
    prompt_cache, state = jax.eval_shape(lambda p, *rows: rollout.prefill(p, decoder, *rows), params, tokens, tokens, u)
    cache = spread(jax.eval_shape(lambda cache: rollout.grow(cache, S), state.cache), 'rows', None, 'kv_heads')
    state = spread(state._replace(cache=()), 'rows')._replace(cache=cache)
    given = outer, layers, spread(prompt_cache, 'rows', 'kv_heads'), tokens, u, state, state.t
    compiled = rollout.decode.lower(*given, decoder).compile()
  memory = compiled.memory_analysis()
  of_device = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // 8
  assert memory.alias_size_in_bytes >= of_device
  assert memory.temp_size_in_bytes < of_device / 8  # a layer's keys alone are a quarter
  assert compiled.as_text().count('decode_attention') >= 2
