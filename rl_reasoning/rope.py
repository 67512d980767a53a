"""Rotary embedding (2104.09864) and the ways of stretching it: linear (2306.15595), dynamic NTK, YaRN (2309.00071), LongRoPE (2402.13753),
Llama 3.1's. As transformers has them, in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp

from rl_reasoning.arch import Arch, RopeScaling
from rl_reasoning.structs import Array

Angles = tuple[Array, Array]  # sin and cos [N, T, 1, rotary_dim / 2], float32


def powers(theta: float, dim: int) -> Array:
  """theta ** (2 i / dim): the wavelengths over 2 pi."""
  return jnp.float32(theta) ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def yarn(theta: float, dim: int, s: RopeScaling) -> Array:
  """Frequencies that turn often enough within the original length stay, slow ones are interpolated, with a ramp between."""

  def dimension(turns: float) -> float:  # where a frequency turns so often
    return dim * math.log(s.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(s.beta_fast), dimension(s.beta_slow)
  if s.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / (high - low if high > low else 0.001), 0, 1)
  own = 1 / powers(theta, dim)
  return own / s.factor * ramp + own * (1 - ramp)


def llama3(theta: float, dim: int, s: RopeScaling) -> Array:
  own = 1 / powers(theta, dim)
  wavelength = 2 * math.pi / own
  original = s.original_max_position_embeddings
  smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  between = (1 - smooth) * own / s.factor + smooth * own
  slow, fast = wavelength > original / s.low_freq_factor, wavelength < original / s.high_freq_factor
  return jnp.where(slow, own / s.factor, jnp.where(fast, own, between))


def frequencies(arch: Arch, kind: str = 'global') -> Array:
  """float32 [rotary_dim / 2], radians a token."""
  dim, s = arch.rotary_dim, arch.rope_scaling
  if kind == 'local':
    return 1 / powers(arch.local_rope_theta, dim)
  original = s.original_max_position_embeddings
  if s.rope_type == 'linear':
    return 1 / powers(arch.rope_theta, dim) / s.factor
  if s.rope_type == 'dynamic':
    stretch = s.factor * max(s.length, original) / original - (s.factor - 1)
    return 1 / powers(arch.rope_theta * stretch ** (dim / (dim - 2)), dim)
  if s.rope_type == 'yarn':
    return yarn(arch.rope_theta, dim, s)
  if s.rope_type == 'longrope':
    return 1 / (jnp.asarray(s.long_factor if s.length > original else s.short_factor, jnp.float32) * powers(arch.rope_theta, dim))
  if s.rope_type == 'llama3':
    return llama3(arch.rope_theta, dim, s)
  return 1 / powers(arch.rope_theta, dim)


def magnitude(scale: float, mscale: float = 1.0) -> float:
  return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def attention_factor(s: RopeScaling) -> float:
  """What sin and cos are multiplied by: scores grow with the length that YaRN and LongRoPE stretch to."""
  if s.rope_type not in ('yarn', 'longrope') or s.attention_factor:
    return s.attention_factor if s.rope_type in ('yarn', 'longrope') else 1.0
  if s.rope_type == 'longrope':
    return math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_position_embeddings)) if s.factor > 1 else 1.0
  if s.mscale and s.mscale_all_dim:
    return magnitude(s.factor, s.mscale) / magnitude(s.factor, s.mscale_all_dim)
  return magnitude(s.factor)


def score_scale(arch: Arch) -> float:
  """What queries times keys are multiplied by before the softmax."""
  scale, s = (arch.query_pre_attn_scalar or arch.head_dim) ** -0.5, arch.rope_scaling
  if arch.kv_lora_rank and s.rope_type != 'default' and s.mscale_all_dim:
    scale *= magnitude(s.factor, s.mscale_all_dim) ** 2
  return scale


def angles(arch: Arch, position_NT: Array, kind: str = 'global') -> Angles:
  if kind == 'none':
    shape = (*position_NT.shape, 1, arch.rotary_dim // 2)
    return jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)
  angle = position_NT[..., None, None].astype(jnp.float32) * frequencies(arch, kind)
  factor = 1.0 if kind == 'local' else attention_factor(arch.rope_scaling)
  return jnp.sin(angle) * factor, jnp.cos(angle) * factor


def rotate(x: Array, rope: Angles, interleaved: bool = False) -> Array:
  """[N, T, heads, H] with its first 2 * (H / 2 of `rope`) dimensions turned. Pairs are (i, i + half), Hugging Face's layout, or
  `interleaved` (2 i, 2 i + 1); either comes out in the first layout."""
  (sin, cos), x32 = rope, x.astype(jnp.float32)
  half = sin.shape[-1]
  a, b = (x32[..., : 2 * half : 2], x32[..., 1 : 2 * half : 2]) if interleaved else (x32[..., :half], x32[..., half : 2 * half])
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x32[..., 2 * half :]], axis=-1)
  return turned.astype(x.dtype)
