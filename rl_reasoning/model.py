"""Decoder-only transformer of the Llama family as pure functions on a stacked pytree.

One weight table (`weight_table`) says, per weight: shape, logical axes, initial scale and Hugging Face name. Init, shapes, shardings and
loading are maps over it. One `block` serves training, prefill and decode; what differs is the `attend` function handed to it.
Sources: Llama (2302.13971), GQA (2305.13245), RoPE (2104.09864), Qwen3 q/k norm (2505.09388).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_reasoning.sharding import constrain
from rl_reasoning.structs import Array, Batch, PyTree

NEG_INF = -1e30  # finite: a row that attends to nothing must not become NaN


@dataclasses.dataclass(frozen=True)
class Arch:
  """Architecture record. Field names follow Hugging Face's config.json."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-5
  tie_word_embeddings: bool = True
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # Qwen3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in ('int', 'float') and not value > 0:
        raise ValueError(f'model.{field.name}: {value} must be positive')
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'model.num_attention_heads: {self.num_attention_heads} is not a multiple of '
        f'num_key_value_heads {self.num_key_value_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim: {self.head_dim} must be even, rotary embedding turns pairs')


class Weight(NamedTuple):
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # logical axes, see sharding.RULES
  scale: float  # standard deviation at init; 0 means zeros, -1 means ones
  hf: str  # Hugging Face name; '{}' is the layer
  fan_in: int = 0  # how many leading axes (after the layer) are inputs; Hugging Face stores [out, in]


HEADS = ('lm', 'scalar')  # what a network says after a token: the next token's logits, one number (a reward, a value), or both


def weight_table(arch: Arch, heads: tuple[str, ...] = ('lm',)) -> dict[str, dict[str, Weight] | Weight]:
  """name -> Weight, layers stacked on the first axis. Residual outputs start smaller by sqrt(2 L) (GPT-2); the scalar head as
  InstructGPT's (2203.02155), with standard deviation 1 / sqrt(D + 1)."""
  a, L, D, H = arch, arch.num_hidden_layers, arch.hidden_size, arch.head_dim
  A, K, F = a.num_attention_heads, a.num_key_value_heads, a.intermediate_size
  std, out = D**-0.5, (2 * L) ** -0.5
  attn, mlp = 'model.layers.{}.self_attn.', 'model.layers.{}.mlp.'
  layers = {
    'attn_norm': Weight((L, D), ('layer', None), -1, 'model.layers.{}.input_layernorm.weight'),
    'q': Weight((L, D, A, H), ('layer', 'embed', 'heads', None), std, attn + 'q_proj.weight', 1),
    'k': Weight((L, D, K, H), ('layer', 'embed', 'kv_heads', None), std, attn + 'k_proj.weight', 1),
    'v': Weight((L, D, K, H), ('layer', 'embed', 'kv_heads', None), std, attn + 'v_proj.weight', 1),
    'o': Weight((L, A, H, D), ('layer', 'heads', None, 'embed'), (A * H) ** -0.5 * out, attn + 'o_proj.weight', 2),
    'mlp_norm': Weight((L, D), ('layer', None), -1, 'model.layers.{}.post_attention_layernorm.weight'),
    'gate': Weight((L, D, F), ('layer', 'embed', 'mlp'), std, mlp + 'gate_proj.weight', 1),
    'up': Weight((L, D, F), ('layer', 'embed', 'mlp'), std, mlp + 'up_proj.weight', 1),
    'down': Weight((L, F, D), ('layer', 'mlp', 'embed'), F**-0.5 * out, mlp + 'down_proj.weight', 1),
  }
  if a.qkv_bias:
    layers['q_bias'] = Weight((L, A, H), ('layer', 'heads', None), 0, attn + 'q_proj.bias')
    layers['k_bias'] = Weight((L, K, H), ('layer', 'kv_heads', None), 0, attn + 'k_proj.bias')
    layers['v_bias'] = Weight((L, K, H), ('layer', 'kv_heads', None), 0, attn + 'v_proj.bias')
  if a.qk_norm:
    layers['q_norm'] = Weight((L, H), ('layer', None), -1, attn + 'q_norm.weight')
    layers['k_norm'] = Weight((L, H), ('layer', None), -1, attn + 'k_norm.weight')
  table: dict[str, Any] = {
    'embed': Weight((a.vocab_size, D), ('vocab', 'embed'), std, 'model.embed_tokens.weight'),
    'layers': layers,
    'final_norm': Weight((D,), (None,), -1, 'model.norm.weight'),
  }
  if 'lm' in heads and not a.tie_word_embeddings:
    table['lm_head'] = Weight((a.vocab_size, D), ('vocab', 'embed'), std, 'lm_head.weight')
  if 'scalar' in heads:
    table['score'] = Weight((1, D), (None, 'embed'), (D + 1) ** -0.5, 'score.weight')
  return table


def is_weight(x) -> bool:
  return isinstance(x, Weight)


def init(key: jax.Array, arch: Arch, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """Random float32 weights. Each weight has a key of its own path, so adding one leaves the others as they were."""

  def make(path, w: Weight):
    if w.scale == -1:
      return jnp.ones(w.shape, jnp.float32)
    if w.scale == 0:
      return jnp.zeros(w.shape, jnp.float32)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return w.scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), w.shape, jnp.float32)

  return jax.tree_util.tree_map_with_path(make, weight_table(arch, heads), is_leaf=is_weight)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """Statistics in float32 whatever the compute dtype, as every published checkpoint of the family was trained."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return x32.astype(x.dtype) * scale.astype(x.dtype)


def rotate(x: Array, sin: Array, cos: Array) -> Array:
  """Rotary embedding on [N, T, heads, H], half-split layout (Hugging Face's). sin, cos: [N, T, 1, H / 2] float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rope_angles(arch: Arch, position_NT: Array) -> tuple[Array, Array]:
  half = arch.head_dim // 2
  frequency = arch.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position_NT[..., None, None].astype(jnp.float32) * frequency
  return jnp.sin(angle), jnp.cos(angle)


def project_qkv(arch: Arch, w: dict[str, Array], x: Array) -> tuple[Array, Array, Array]:
  """[N, T, D] -> q [N, T, heads, H], k and v [N, T, K, H]; one matmul where `fuse` joined the weights."""
  heads, K, H = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
  if 'qkv' in w:
    qkv = (x @ w['qkv']).reshape(*x.shape[:-1], heads + 2 * K, H)
    q, k, v = qkv[..., :heads, :], qkv[..., heads : heads + K, :], qkv[..., heads + K :, :]
  else:
    q, k, v = (jnp.einsum('ntd,dkh->ntkh', x, w[name]) for name in ('q', 'k', 'v'))
  if arch.qkv_bias:
    q, k, v = q + w['q_bias'], k + w['k_bias'], v + w['v_bias']
  if arch.qk_norm:
    q, k = rms_norm(q, w['q_norm'], arch.rms_norm_eps), rms_norm(k, w['k_norm'], arch.rms_norm_eps)
  return q, k, v


def block(arch: Arch, w: dict[str, Array], x: Array, rope: tuple[Array, Array], attend: Callable) -> tuple[Array, Any]:
  """One layer. `attend(q, k, v) -> (out like q, kept)`; `kept` is what the caller wants back (a cache, or None)."""
  q, k, v = project_qkv(arch, w, rms_norm(x, w['attn_norm'], arch.rms_norm_eps))
  out, kept = attend(rotate(q, *rope), rotate(k, *rope), v)
  x = x + jnp.einsum('ntkh,khd->ntd', out, w['o'])
  y = rms_norm(x, w['mlp_norm'], arch.rms_norm_eps)
  if 'gate_up' in w:
    gate, up = jnp.split(y @ w['gate_up'], 2, axis=-1)
  else:
    gate, up = y @ w['gate'], y @ w['up']
  return x + (jax.nn.silu(gate) * up) @ w['down'], kept


def causal_attention(arch: Arch, position_NT: Array, segment_NT: Array) -> Callable:
  """Attention within a segment, to positions not after one's own; float32 softmax. Padding is segment 0 and reads only padding."""
  mask = (segment_NT[:, :, None] == segment_NT[:, None, :]) & (position_NT[:, :, None] >= position_NT[:, None, :])
  bias = jnp.where(mask, 0.0, NEG_INF)[:, None, None]  # [N, 1, 1, T, S]

  def attend(q, k, v):
    N, T, heads, H = q.shape
    q = q.reshape(N, T, arch.num_key_value_heads, -1, H)
    scores = jnp.einsum('ntkqh,nskh->nkqts', q, k).astype(jnp.float32) * H**-0.5 + bias
    out = jnp.einsum('nkqts,nskh->ntkqh', jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return out.reshape(N, T, heads, H), (k, v)

  return attend


REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_layers(
  x: Array, layers: PyTree, arch: Arch, segment_NT: Array, position_NT: Array, dtype: str, remat: str = 'none', keep_cache: bool = False
) -> tuple[Array, Any]:  # fmt: skip
  """(x [N, T, D] after the stacked `layers`, their keys and values where the cache is kept)."""
  attend = causal_attention(arch, position_NT, segment_NT)
  rope = rope_angles(arch, position_NT)

  def layer(x, w):
    w = jax.tree.map(lambda p: p.astype(dtype), w)
    x, kept = block(arch, w, x, rope, attend)
    return constrain(x, 'rows', None, None), kept if keep_cache else None

  if REMAT[remat] is not None:
    layer = jax.checkpoint(layer, policy=REMAT[remat])
  return jax.lax.scan(layer, x, layers)


def forward(
  params: PyTree,
  arch: Arch,
  tokens: Array,
  segment_NT: Array,
  position_NT: Array,
  *,
  dtype: str = 'float32',
  remat: str = 'none',
  keep_cache: bool = False,
  frozen_layers: int = 0,
  features: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
  """Hidden states [N, T, D] before the head, after the final norm. `extras['cache']`: k and v [L, N, T, K, H] where asked for.

  The first `frozen_layers` have no gradient, nor has the embedding below them; `features` [N, T, D] is what they give (see `trunk`), where
  that is known already.
  """
  layers = params['layers']
  if frozen_layers:
    if features is None:
      features = trunk(params, arch, tokens, segment_NT, position_NT, frozen_layers, dtype)
    x = jax.lax.stop_gradient(features.astype(dtype))
    layers = jax.tree.map(lambda w: w[frozen_layers:], layers)
  else:
    x = constrain(embed(params, tokens, dtype), 'rows', None, None)
  x, cache = run_layers(x, layers, arch, segment_NT, position_NT, dtype, remat, keep_cache)
  return rms_norm(x, params['final_norm'].astype(dtype), arch.rms_norm_eps), {'cache': cache} if keep_cache else {}


def trunk(params: PyTree, arch: Arch, tokens: Array, segment_NT: Array, position_NT: Array, layers: int, dtype: str) -> Array:
  """[N, T, D]: what the first `layers` layers give."""
  x = constrain(embed(params, tokens, dtype), 'rows', None, None)
  return run_layers(x, jax.tree.map(lambda w: w[:layers], params['layers']), arch, segment_NT, position_NT, dtype)[0]


def embed(params: PyTree, tokens: Array, dtype: str) -> Array:
  return params['embed'].astype(dtype)[tokens]


def head(params: PyTree) -> Array:
  """[V, D]: the output matrix, which is the embedding itself where tied."""
  return params['lm_head'] if 'lm_head' in params else params['embed']


def logits(hidden: Array, head_VD: Array) -> Array:
  """float32 logits: a bfloat16 softmax moves log-probabilities by more than a policy update does."""
  return jnp.einsum('...d,vd->...v', hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=('arch', 'dtype', 'fuse'))
def decode_weights(params: PyTree, arch: Arch, dtype: str, fuse: bool) -> tuple[dict[str, Array], ...]:
  """Per-layer weights for the unrolled decode loop, made once a rollout. `fuse` joins q/k/v and gate/up into one matmul each
  (7 to 8 % of a decode step on CPU); off under tensor parallelism, where the joined axis would mix shards."""
  layers = []
  for index in range(arch.num_hidden_layers):
    w = {name: p[index].astype(dtype) for name, p in params['layers'].items()}
    if fuse:
      D = arch.hidden_size
      w['qkv'] = jnp.concatenate([w.pop(n).reshape(D, -1) for n in ('q', 'k', 'v')], axis=-1)
      w['gate_up'] = jnp.concatenate([w.pop('gate'), w.pop('up')], axis=-1)
    layers.append(w)
  return tuple(layers)


CHUNK_ELEMENTS = 2**24  # logits alive at once in the update: 64 MiB of float32


def hidden_states(
  params: PyTree, arch: Arch, batch: Batch, *, dtype: str = 'float32', remat: str = 'none', frozen_layers: int = 0
) -> Array:
  """`forward` of a batch, from its `extras['features']` where it has them."""
  return forward(
    params, arch, batch.tokens, batch.segment_NT, batch.position_NT, dtype=dtype, remat=remat,
    frozen_layers=frozen_layers, features=batch.extras.get('features'),
  )[0]  # fmt: skip


def scores(params: PyTree, hidden: Array, segment_NT: Array) -> Array:
  """float32 [N, T]: the scalar head after each token, 0 on padding."""
  return jnp.where(segment_NT > 0, logits(hidden, params['score'])[..., 0], 0.0)


class Output(NamedTuple):
  """What a network says after every token, before the logits are made of it: they are hidden @ head, and large."""

  hidden: Array  # [N, T, D]
  head: Array  # [V, D]


def over_vocabulary(function: Callable[..., PyTree], batch: Batch, outputs: Sequence[Output], *arrays: Array) -> PyTree:
  """`function(*logits, *arrays)` of every token: the float32 logits [N, t, V] from which each of the outputs would draw it, and the parts
  [N, t, ...] of the arrays [N, T, ...], which are aligned to the token they speak of. So are the results [N, T, ...], which are 0 where
  nothing comes before a token in its segment.

  The vocabulary is met in chunks of T, recomputed in the backward pass: [N, T, V] never exists.
  """
  (N, T, _), count = outputs[0].hidden.shape, len(outputs)

  def sized(x, before, after):  # zeros around the axis T
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))

  def chunk(*parts):
    every = [constrain(logits(hidden, output.head), 'rows', None, 'vocab') for hidden, output in zip(parts, outputs)]
    return function(*every, *parts[count:])

  # Row t of a hidden state speaks of token t + 1.
  parts = [output.hidden for output in outputs] + [sized(jnp.asarray(x)[:, 1:], 0, 1) for x in arrays]
  size = max(1, min(T, CHUNK_ELEMENTS // (N * sum(output.head.shape[0] for output in outputs))))
  if size >= T:
    results = chunk(*parts)
  else:
    pieces = -(-T // size)

    def split(x):  # [N, T, ...] -> [pieces, N, size, ...]
      return jnp.moveaxis(sized(x, 0, pieces * size - T).reshape(N, pieces, size, *x.shape[2:]), 1, 0)

    def join(x):
      return jnp.moveaxis(x, 0, 1).reshape(N, -1, *x.shape[3:])[:, :T]

    results = jax.tree.map(join, jax.lax.map(lambda some: jax.checkpoint(chunk)(*some), [split(x) for x in parts]))
  known = (batch.segment_NT > 0) & (batch.position_NT > 0)
  return jax.tree.map(lambda x: jnp.where(known.reshape(N, T, *(1,) * (x.ndim - 2)), sized(x[:, :-1], 1, 0), 0), results)


def log_probs(params: PyTree, arch: Arch, batch: Batch, temperature_N: Array | float = 1.0, *, dtype: str = 'float32', remat: str = 'none',
              **wanted: bool) -> tuple[Array, Array | None]:  # fmt: skip
  """`token_log_probs` after a forward pass."""
  hidden = hidden_states(params, arch, batch, dtype=dtype, remat=remat)
  return token_log_probs(Output(hidden, head(params)), batch, temperature_N, **wanted)


def token_log_probs(
  output: Output, batch: Batch, temperature_N: Array | float = 1.0, *, entropy: bool = False, entropy_gradient: bool = False
) -> tuple[Array, Array | None]:
  """Log-probability [N, T] of every token given those before it in its segment (0 where there is none), and the entropy [N, T] of the
  distribution it was drawn from, both under softmax(logits / temperature) over the whole vocabulary, float32. The entropy has a gradient
  only where one is asked for: a metric should not pay for it."""
  scale = jnp.broadcast_to(1.0 / jnp.asarray(temperature_N, jnp.float32), batch.tokens.shape[:1])[:, None, None]

  def chunk(scores, target):
    scores = scores * scale
    lse = jax.nn.logsumexp(scores, axis=-1)
    logp = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0] - lse
    if not entropy:
      return logp, None
    every = scores - lse[..., None]
    every = every if entropy_gradient else jax.lax.stop_gradient(every)
    return logp, -jnp.sum(jnp.exp(every) * every, axis=-1)

  return over_vocabulary(chunk, batch, [output], batch.tokens)


class Net(NamedTuple):
  """A role's network as the objectives see it: `token_log_probs` and `scores` of a batch with everything else filled in."""

  logp: Callable[..., tuple[Array, Array | None]]  # (params, rows, entropy=False, entropy_gradient=False)
  scores: Callable[..., Array]  # (params, rows) -> [N, T]
  logp_and_scores: Callable[..., tuple[Array, Array | None, Array]]  # as logp, in one pass
  output: Callable[..., Output]  # (params, rows): for `over_vocabulary`


def make_net(
  arch: Arch, temperature: Callable[[Batch], Array | float], *, dtype: str, remat: str, frozen_layers: int = 0, shift: float = 0.0,
) -> Net:  # fmt: skip
  """`temperature(rows)` gives one number a row; `shift` is subtracted from the scores."""

  def run(params, rows):
    if frozen_layers:  # where tied, it is the head, too
      params = {**params, 'embed': jax.lax.stop_gradient(params['embed'])}
    return params, hidden_states(params, arch, rows, dtype=dtype, remat=remat, frozen_layers=frozen_layers)

  def output(params, rows):
    params, hidden = run(params, rows)
    return Output(hidden, head(params))

  def logp(params, rows, **wanted):
    return token_log_probs(output(params, rows), rows, temperature(rows), **wanted)

  def shifted(params, hidden, rows):
    return scores(params, hidden, rows.segment_NT) - shift * (rows.segment_NT > 0)

  def only_scores(params, rows):
    params, hidden = run(params, rows)
    return shifted(params, hidden, rows)

  def logp_and_scores(params, rows, **wanted):
    params, hidden = run(params, rows)
    found = token_log_probs(Output(hidden, head(params)), rows, temperature(rows), **wanted)
    return *found, shifted(params, hidden, rows)

  return Net(logp, only_scores, logp_and_scores, output)
