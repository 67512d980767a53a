"""Attention of sequences by other code than XLA's: the same numbers, and programs of TPUs and GPUs that hold no scores of all heads."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import attention, config, model, resolution, sharding, splash
from tests.slices import needs_compiler, slice_of
from tests.test_model import random_params, rows

ARCH = model.Arch(37, 16, 24, 2, 4, 2, 8, qkv_bias=True)
# Gemma 2's kinds of layers; windows shorter than the rows
LOCAL = dataclasses.replace(
  ARCH, num_hidden_layers=3, sliding_window=5, layer_types=('sliding_attention', 'full_attention', 'sliding_attention'),
  attn_logit_softcapping=2.0, qkv_bias=False,
)  # fmt: skip
LATENT = model.Arch(37, 16, 24, 2, 4, 4, 12, kv_lora_rank=8, q_lora_rank=6, qk_rope_head_dim=4, v_head_dim=6)


def by_splash(arch):
  return dataclasses.replace(arch, attn_implementation='splash_interpret')


def segments(N, T):
  """Rows in turn: full, padded on the right, padded on the left, three packed with padding behind, and nothing but padding."""
  segment = np.zeros((N, T), np.int32)
  for n in range(N):
    if n % 5 < 3:
      segment[n, (T // 3 if n % 5 == 2 else 0) : (T - T // 4 if n % 5 == 1 else T)] = 1
    elif n % 5 == 3:
      segment[n, : T - 2] = 1 + np.arange(T - 2) * 3 // (T - 2)
  starts = np.diff(segment, axis=1, prepend=-1) != 0
  position = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
  return segment, position.astype(np.int32)


def both(arch, N, T, V=None, mesh=None):
  """(results and gradients of XLA's code, those of splash), padding left out."""
  rng, (segment, position) = np.random.default_rng(T), segments(N, T)
  H, V, K = arch.head_dim, V or arch.head_dim, arch.num_key_value_heads
  q, k, v, weight = (
    jnp.asarray(rng.normal(0, 1, (N, T, heads, size)), jnp.float32)
    for heads, size in ((arch.num_attention_heads, H), (K, H), (K, V), (arch.num_attention_heads, V))
  )
  weight = weight * (segment > 0)[..., None, None]
  window = arch.sliding_window

  def run(arch):
    [mask] = attention.masks(arch, position, segment, [window])
    attend = attention.sequence_attention(arch, segment, [window], mask)

    def total(*qkv):
      out = attend(*qkv)[0]
      return jnp.sum(out * weight), out * (weight != 0)

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients

  return run(arch), run(by_splash(arch))


# Rows over one block, of an odd length, of several blocks, and heads of keys and values of different sizes; one head of keys for all.
@pytest.mark.parametrize(
  'T, K, H, V, window, cap',
  [(33, 2, 8, 8, 0, 0.0), (150, 2, 8, 8, 40, 0.0), (600, 1, 4, 4, 130, 3.0), (40, 4, 12, 6, 0, 0.0)],
  ids=['odd', 'window', 'blocks and soft cap', 'latent'],
)
def test_splash(T, K, H, V, window, cap):
  """Failure: the kernel reads another segment, beyond the window or the padding, or its backward pass is not that of its forward pass."""
  types = ('sliding_attention',) * 2 if window else ()
  arch = model.Arch(
    37, 16, 24, 2, 4, K, H, sliding_window=window, layer_types=types, attn_logit_softcapping=cap, query_pre_attn_scalar=3.0
  )
  for ours, theirs in zip(*both(arch, 5, T, V), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
  'sizes, T',
  [
    ((2, 2, 2, 1, 1), 24),
    ((1, 2, 2, 1, 2), 24),
    ((1, 1, 2, 4, 1), 40),
    pytest.param((1, 1, 2, 4, 1), 600, marks=pytest.mark.prove),
  ],
  ids=str,
)
def test_over_devices(sizes, T):
  """Failure: a device computes rows, heads or queries that are another's, or a gradient is added up over devices that each have all of
  it."""
  data, fsdp, tensor, sequence, expert = sizes
  mesh = sharding.make_mesh(data, fsdp, tensor, sequence=sequence, expert=expert)
  with jax.set_mesh(mesh):
    for ours, theirs in zip(*both(ARCH, 8, T), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
  'arch, learns', [(LOCAL, False), (LATENT, False), pytest.param(LOCAL, True, marks=pytest.mark.prove)],
  ids=['mixed windows', 'latent', 'mixed windows, gradients'],
)  # fmt: skip
def test_networks(arch, learns):
  """Failure: layers get the window of others, or the choice of code does not reach a network: log-probabilities and gradients differ."""
  rng = np.random.default_rng(0)
  batch = rows([rng.integers(0, 37, n) for n in (21, 9, 14)], 24)
  params = random_params(arch)

  def run(arch):
    def total(params):
      logp = model.log_probs(params, arch, batch, remat='full')[0]
      return logp.sum(), logp

    return jax.jit(jax.grad(total, has_aux=True) if learns else total)(params)

  for ours, theirs in zip(jax.tree.leaves(run(arch)), jax.tree.leaves(run(by_splash(arch))), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  'wanted, platform, arch, dtype, found',
  [
    ('auto', 'cpu', ARCH, 'float32', 'xla'),
    ('auto', 'tpu', LOCAL, 'float32', 'splash'),
    ('auto', 'gpu', ARCH, 'bfloat16', 'cudnn'),
    ('auto', 'gpu', ARCH, 'float32', 'xla'),
    ('auto', 'gpu', LOCAL, 'bfloat16', 'xla'),
    ('auto', 'gpu', LATENT, 'bfloat16', 'xla'),
    ('xla', 'tpu', ARCH, 'float32', 'xla'),
    ('splash', 'cpu', ARCH, 'float32', 'splash_interpret'),
    ('splash', 'gpu', ARCH, 'float32', 'kernel of TPUs'),
    ('cudnn', 'cpu', ARCH, 'bfloat16', 'is for GPUs'),
    ('cudnn', 'gpu', ARCH, 'float32', 'model.dtype is float32'),
    ('cudnn', 'gpu', LOCAL, 'bfloat16', 'no soft cap'),
    ('cudnn', 'gpu', dataclasses.replace(ARCH, head_dim=130), 'bfloat16', 'a head of 130 numbers'),
  ],
)
def test_choice(wanted, platform, arch, dtype, found):
  """Failure: the code is that of another machine than the mesh's, a model gets a kernel that cannot compute it, or what was asked for is
  replaced without a word."""
  mesh: Any = SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform)]]))
  settings = config.Config(model=config.Model(attention=wanted, dtype=dtype))
  if ' ' in found:
    with pytest.raises(config.ConfigError, match=f"config key 'model.attention': '{wanted}'.*{found}"):
      resolution.with_attention(arch, settings, mesh)
  else:
    assert resolution.with_attention(arch, settings, mesh).attn_implementation == found


def test_blocks():
  """Failure: a row is cut, padded by more than a block's share, or blocks are of a size that the kernel does not take."""
  for T in range(1, 5000):
    size = splash.block_of(T)
    assert size % 128 == 0 and size <= 512 and -T % size < max(128, T / 2)


@needs_compiler
@pytest.mark.parametrize('K, H, V, window, cap', [(2, 64, 64, 300, 30.0), (4, 192, 128, 0, 0.0)], ids=['gemma', 'latent'])
def test_compiles_for_a_slice(K, H, V, window, cap):
  """Failure: the kernels are not compiled for TPUs (a shape they do not take, a look at this machine's devices), or there are scores of all
  tokens to all, or keys repeated for the heads that share them."""
  mesh, (N, T, heads) = sharding.make_mesh(2, 2, 2, devices=slice_of('v5e:2x4')), (8, 1024, 4)

  def shape(*sizes, axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*axes)))

  def total(q, k, v, segment_NT):
    out = splash.splash(q, k, v, segment_NT, scale=0.1, window=window, cap=cap, interpret=False)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  by_head = 'rows', None, 'heads', None
  q, k, v = (shape(N, T, *x, axes=by_head) for x in ((heads, H), (K, H), (K, V)))
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, shape(N, T, axes=('rows', None), dtype=jnp.int32)).compile()
    )
  own = N // 4 * T * heads // 2 * max(H, 128) * 2  # bytes of a device's queries in bfloat16
  text = compiled.as_text()
  assert text.count('tpu_custom_call') >= 3 and f'{T},{T}]' not in text
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * own < N // 4 * heads // 2 * T * T * 4


def test_lowers_for_gpus(monkeypatch):
  """Failure: cuDNN's kernel is not asked for, forward or backward, or not for what rows of several segments read."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)  # there is none here to be asked
  arch = dataclasses.replace(ARCH, attn_implementation='cudnn')
  segment, position = segments(4, 23)
  [mask] = attention.masks(arch, position, segment, [0])

  def total(q, k, v):
    return jnp.sum(attention.sequence_attention(arch, segment, [0], mask)(q, k, v)[0].astype(jnp.float32))

  q, k = (jax.ShapeDtypeStruct((4, 23, heads, 8), jnp.bfloat16) for heads in (4, 2))
  text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmhaScaleBiasSoftmax(' in text and '__cudnn$fmhaScaleBiasSoftmaxBackward' in text
  assert 'tensor<4x1x24x24xbf16>' in text
