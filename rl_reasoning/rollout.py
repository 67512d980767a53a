"""Completions from a policy: prefill once a prompt, share its keys and values among the group, decode in jitted loops.

Prompts are padded on the left, so that all rows of a batch write the same cache slot at the same time. The completion cache doubles as
completions grow (`rollout.chunk` first): attention reads what is filled, and a batch that ends early never pays for the limit.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl_reasoning import (
  attention,
  config as config_lib,
  decode_attention,
  distributed,
  kv_cache,
  model,
  preemption,
  rope,
  sampling,
  sharding,
)
from rl_reasoning.structs import Array, PyTree, Rollout

PACE = 64  # tokens of a decode call: between two of them a rollout can be preempted


class Decoder(NamedTuple):
  """What is static in a rollout: hashable, one compilation each."""

  arch: model.Arch
  dtype: str
  fuse: bool
  end_ids: tuple[int, ...]
  settings: config_lib.Rollout
  group: int  # completions a prompt
  records: bool = False  # the experts of every token

  @property
  def cache_dtype(self) -> str:
    return self.dtype if self.settings.cache_dtype == 'auto' else self.settings.cache_dtype

  def pick(self, logits_BGV: Array, u_BG: Array) -> tuple[Array, Array]:
    s = self.settings
    token, logp = sampling.sample(
      logits_BGV.reshape(-1, logits_BGV.shape[-1]), u_BG.reshape(-1),
      temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p,
    )  # fmt: skip
    return token.reshape(u_BG.shape), logp.reshape(u_BG.shape)

  def is_end(self, token: Array) -> Array:
    return jnp.isin(token, jnp.asarray(self.end_ids, jnp.int32))


class Decoding(NamedTuple):
  """State of the decode loop; leading axes [B, G]."""

  t: Array  # tokens sampled so far
  tokens: Array  # [B, G, C]
  logp: Array  # [B, G, C]
  done: Array  # bool [B, G]
  cache: tuple[kv_cache.Cache, ...]  # one a layer, [B, G, ...]
  # Where they are recorded, the experts of every token that the network read: (of the prompts [B, P, layers, k], of completions
  # [B, G, C, layers, k]).
  chosen: tuple[Array, Array] | None = None


def uniforms(key: jax.Array, prompt_ids_B: Array, group: int, length: int) -> Array:
  """[B, G, C] uniform numbers, a function of (key, prompt id, member, token): not of the batch or the devices."""

  def row(prompt_id, member):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, prompt_id), member), (length,))

  return jax.vmap(lambda b: jax.vmap(lambda g: row(b, g))(jnp.arange(group)))(prompt_ids_B)


def placed(layer: kv_cache.Cache) -> kv_cache.Cache:
  return kv_cache.with_axes(lambda x, axes: sharding.constrain(x, *axes), layer)


@functools.partial(jax.jit, static_argnames=('decoder',))
def prefill(params: PyTree, decoder: Decoder, prompts_BP: Array, valid_BP: Array, u_BGC: Array) -> tuple[tuple, Decoding]:
  """Prompt cache per layer, and the first sampled token of each row."""
  arch, (B, G, C) = decoder.arch, u_BGC.shape
  position = jnp.maximum(jnp.cumsum(valid_BP, axis=1) - 1, 0)
  hidden, kept = model.forward(params, arch, prompts_BP, valid_BP, position, dtype=decoder.dtype, keep_cache=True)
  k, v = jax.tree.map(lambda x: sharding.constrain(x, None, 'rows', None, sharding.kv_axis(x.shape[3]), None), kept.cache)
  cache = tuple(kv_cache.of(k[i], None if v is None else v[i], decoder.cache_dtype) for i in range(arch.num_hidden_layers))
  cache = tuple(placed(layer) for layer in cache)
  last = sharding.constrain(hidden[:, -1], 'rollout_rows', None)
  head = sharding.whole_embed(model.head(params).astype(decoder.dtype), ('vocab', 'embed'))
  logits = model.logits(last, head, arch.final_logit_softcapping)
  logits = sharding.constrain(logits, 'rollout_rows', 'vocab')
  token, logp = decoder.pick(jnp.broadcast_to(logits[:, None], (B, G, logits.shape[-1])), u_BGC[:, :, 0])

  def none_of(x):
    return jnp.zeros((B, G, 0, *x.shape[3:]), decoder.dtype)

  empty = kv_cache.of(none_of(k), None if v is None else none_of(v), decoder.cache_dtype)
  chosen = None
  if decoder.records:
    prompts = jnp.moveaxis(jnp.asarray(kept.chosen), 0, 2)
    chosen = prompts, jnp.zeros((B, G, C, *prompts.shape[2:]), jnp.int32)
  return cache, Decoding(
    t=jnp.int32(1),
    tokens=jnp.zeros((B, G, C), jnp.int32).at[:, :, 0].set(token),
    logp=jnp.zeros((B, G, C), jnp.float32).at[:, :, 0].set(logp),
    done=decoder.is_end(token),
    cache=(empty,) * arch.num_hidden_layers,
    chosen=chosen,
  )


def cache_bias(valid_BP: Array, S: int, t: Array, window: int) -> tuple[Array, Array]:
  """What the new token's scores get over the prompt [B, 1, 1, 1, P] and over its own completion [S]: prompts end where completions begin,
  so how far back a slot lies is one number for all rows."""
  prompt, own = valid_BP > 0, jnp.arange(S) < t
  if window:
    P = valid_BP.shape[1]
    prompt, own = prompt & (P + t - 1 - jnp.arange(P) < window), own & (t - 1 - jnp.arange(S) < window)
  return jnp.where(prompt[:, None, None, None], 0.0, attention.NEG_INF), jnp.where(own, 0.0, attention.NEG_INF)


def cached_attention(
  arch: model.Arch,
  window: int,
  prompt_cache: kv_cache.Cache,
  cache: kv_cache.Cache,
  bias: tuple[Array, Array],
  t: Array,
  done_BG: Array,
):
  """Attention of one new token a row over its prompt (shared by the group) and its own completion so far. The kernel reads nothing of the
  completions that are done."""
  prompt_bias, own_bias = bias

  def attend(q, k, v):
    B, G, heads, H = q.shape
    new = kv_cache.of(k[:, :, None], None if v is None else v[:, :, None], kv_cache.dtype_of(cache))
    kept = kv_cache.written(cache, new, t - 1)
    q = q.reshape(B, G, k.shape[2], -1, H) * jnp.asarray(rope.score_scale(arch), q.dtype)
    prompt = decode_attention.by_xla(arch, q, prompt_cache, prompt_bias)
    if arch.attn_implementation.startswith('splash'):
      own = decode_attention.by_kernel(arch, window, q, kept, jnp.where(done_BG, 0, t))
    else:
      own = decode_attention.by_xla(arch, q, kept, own_bias)
    return decode_attention.joined(prompt, own).reshape(B, G, heads, -1), kept

  return attend


@functools.partial(jax.jit, static_argnames=('size',))
def grow(cache: tuple, size: int) -> tuple:
  """The completion cache with `size` slots."""
  return tuple(placed(kv_cache.grown(layer, size)) for layer in cache)  # what is empty would lie whole on every device


@functools.partial(jax.jit, static_argnames=('decoder',), donate_argnames=('state',))
def decode(outer: PyTree, layers: tuple, prompt_cache: tuple, valid_BP: Array, u_BGC: Array, state: Decoding, until: int,
           decoder: Decoder) -> Decoding:  # fmt: skip
  """Samples until there are `until` tokens, the cache is full or every row is done. Layers are unrolled: a cache carried through a scan
  over layers is 2.2 times slower on CPU."""
  arch, C = decoder.arch, u_BGC.shape[-1]
  S = kv_cache.slots(state.cache[0])
  limit = jnp.minimum(until, min(S + 1, C))
  length_B, kinds = jnp.sum(valid_BP, axis=1), arch.kinds

  def body(state: Decoding) -> Decoding:
    t = state.t
    token = jax.lax.dynamic_index_in_dim(state.tokens, t - 1, axis=2, keepdims=False)
    position = jnp.broadcast_to((length_B + t - 1)[:, None], token.shape)
    turns = {kind: rope.angles(arch, position, kind) for kind in {kind.rope for kind in kinds}}
    biases = {window: cache_bias(valid_BP, S, t, window) for window in {kind.window for kind in kinds}}
    x, cache, every = model.scaled(arch, outer['embed'][token]), [], []
    for w, kind, prompt_kv, own_kv in zip(layers, kinds, prompt_cache, state.cache, strict=True):
      attend = cached_attention(arch, kind.window, prompt_kv, own_kv, biases[kind.window], t, state.done)
      x, kept, chosen = model.block(arch, w, x, turns[kind.rope], attend, absorbed=True)
      cache.append(kept)
      every += [] if chosen is None else [chosen]
    x = attention.norm(arch, x, outer['final_norm'])
    logits = sharding.constrain(model.logits(x, model.head(outer), arch.final_logit_softcapping), 'rollout_rows', None, 'vocab')
    token, logp = decoder.pick(logits, jax.lax.dynamic_index_in_dim(u_BGC, t, axis=2, keepdims=False))
    token, logp = jnp.where(state.done, 0, token), jnp.where(state.done, 0.0, logp)
    kept = state.chosen
    if kept is not None:
      new = jnp.stack(every, axis=2)[:, :, None]
      kept = kept[0], jax.lax.dynamic_update_slice_in_dim(kept[1], new, t - 1, axis=2)
    return Decoding(
      t=t + 1,
      tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], t, axis=2),
      logp=jax.lax.dynamic_update_slice_in_dim(state.logp, logp[..., None], t, axis=2),
      done=state.done | decoder.is_end(token),
      cache=tuple(cache),
      chosen=kept,
    )

  return jax.lax.while_loop(lambda s: (s.t < limit) & ~jnp.all(s.done), body, state)


def decoding(
  params: PyTree,
  arch: model.Arch,
  prompts: Sequence[Sequence[int]],
  *,
  settings: config_lib.Rollout,
  group: int,
  end_ids: tuple[int, ...],
  key: jax.Array | None = None,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  prompt_ids: Sequence[int] | None = None,
  u_BGC: Array | None = None,
  pace: int = 0,
  records: bool = False,
) -> Iterator[Decoding]:
  """The states of `generate` as they come: after every `pace` tokens (0: whenever the cache is full), the last one when all is done. A
  state must be read before the next one is asked for, which takes over its memory. Raises Preempted between two of them."""
  if not all(len(p) for p in prompts):
    raise ValueError('rollout: a prompt has no token; a decoder needs at least one to continue')
  B, C = len(prompts), settings.max_completion_length
  P = sharding.size_class(distributed.largest(max(len(p) for p in prompts)))
  tokens_BP, valid_BP = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, P - len(prompt) :], valid_BP[row, P - len(prompt) :] = prompt, 1
  numbers = np.asarray(range(B) if prompt_ids is None else prompt_ids, np.int32) if u_BGC is None else u_BGC
  fuse = mesh is None or mesh.shape['tensor'] == 1
  if mesh is not None:
    tokens_BP, valid_BP, numbers = sharding.put_rows(mesh, (tokens_BP, valid_BP, numbers))
  u_BGC = jax.jit(uniforms, static_argnums=(2, 3))(key, numbers, group, C) if u_BGC is None else numbers
  decoder = Decoder(arch, dtype, fuse, tuple(end_ids), settings, group, records)
  prompt_cache, state = prefill(params, decoder, tokens_BP, valid_BP, u_BGC)
  yield state
  weights = model.decode_weights(params, arch, dtype, fuse)
  size, full = settings.chunk, 0
  while (t := int(state.t)) < C and not bool(jnp.all(state.done)):
    distributed.mark(f'rollout, token {t}')
    preemption.check()
    if t > full:
      full, size = min(size, C), 2 * size
      state = state._replace(cache=grow(state.cache, full))
    state = decode(*weights, prompt_cache, valid_BP, u_BGC, state, t + pace if pace else C, decoder)
    yield state


def generate(
  params: PyTree,
  arch: model.Arch,
  prompts: Sequence[Sequence[int]],
  *,
  settings: config_lib.Rollout,
  group: int,
  end_ids: tuple[int, ...],
  key: jax.Array | None = None,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  prompt_ids: Sequence[int] | None = None,
  u_BGC: Array | None = None,
  records: bool = False,
) -> Rollout:
  """`group` completions of each prompt, as numpy arrays; row n belongs to prompt n // group. With a mesh over several processes, prompts
  and completions are those of this one (`sharding.own`).

  `prompt_ids` (default: 0, 1, ...) with `key` fix the random numbers: a prompt keeps its tokens in whatever batch it sits. `u_BGC` are
  numbers in the place of those. `records`: also the experts of every token. Raises ValueError for an empty prompt, and where the prompts
  do not divide over the mesh.
  """
  B, C = len(prompts), settings.max_completion_length
  states = decoding(
    params, arch, prompts, settings=settings, group=group, end_ids=end_ids, key=key, dtype=dtype, mesh=mesh, prompt_ids=prompt_ids,
    u_BGC=u_BGC, pace=PACE, records=records,
  )  # fmt: skip
  state = collections.deque(states, maxlen=1).pop()
  tokens, logp, done = sharding.own_rows(mesh, (state.tokens, state.logp, state.done))
  tokens, logp, done = tokens.reshape(B * group, C), logp.reshape(B * group, C), done.reshape(-1)
  length = np.where(done, 1 + np.argmax(np.isin(tokens, end_ids), axis=1), C).astype(np.int32)
  chosen = None
  if state.chosen is not None:
    of_prompts, own = sharding.own_rows(mesh, state.chosen)
    own, chosen = own.reshape(B * group, *own.shape[2:]), np.empty(B * group, object)
    for n in range(B * group):
      prompt = of_prompts[n // group]
      chosen[n] = np.concatenate([prompt[len(prompt) - len(prompts[n // group]) :], own[n, : length[n] - 1]])
  return Rollout(tokens, logp, length, ~done, chosen)
