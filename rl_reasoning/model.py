"""Decoder-only transformers as pure functions on stacked pytrees, driven by the architecture record (arch.py).

One weight table (`weight_table`) says, per weight: shape, logical axes, initial scale and Hugging Face name. Init, shapes, shardings and
loading are maps over it. One `block` serves training, prefill and decode; what differs is the `attend` function handed to it.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rl_reasoning import attention, experts, lora, rope
from rl_reasoning.arch import Arch
from rl_reasoning.sharding import RULES, constrain, kv_axis, spec, ways, whole_embed
from rl_reasoning.structs import Array, Batch, PyTree


class Weight(NamedTuple):
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # logical axes, see sharding.RULES
  scale: float  # standard deviation at init; 0 means zeros, -1 means ones
  hf: str  # Hugging Face name; '{layer}' and '{expert}' where it is one of several
  fan_in: int = 0  # how many leading axes (after layer and expert) are inputs; Hugging Face stores [out, in]
  first: int = 0  # the number of the first layer of the stack


HEADS = ('lm', 'scalar')  # what a network says after a token: the next token's logits, one number (a reward, a value), or both


def attention_weights(a: Arch, L: int, out: float) -> dict[str, Weight]:
  D, H, A, K, attn = a.hidden_size, a.head_dim, a.num_attention_heads, a.num_key_value_heads, 'model.layers.{layer}.self_attn.'
  std, one = D**-0.5, 0 if a.norm_offset else -1
  if a.kv_lora_rank:
    R, Q, turned, V = a.kv_lora_rank, a.q_lora_rank, a.qk_rope_head_dim, a.v_head_dim
    weights = {
      'kv_down': Weight((L, D, R + turned), ('layer', 'embed', None), std, attn + 'kv_a_proj_with_mqa.weight', 1),
      'kv_down_norm': Weight((L, R), ('layer', None), one, attn + 'kv_a_layernorm.weight'),
      'kv_up': Weight((L, R, A, H - turned + V), ('layer', None, 'heads', None), R**-0.5, attn + 'kv_b_proj.weight', 1),
      'o': Weight((L, A, V, D), ('layer', 'heads', None, 'embed'), (A * V) ** -0.5 * out, attn + 'o_proj.weight', 2),
    }
    if not Q:
      return {'q': Weight((L, D, A, H), ('layer', 'embed', 'heads', None), std, attn + 'q_proj.weight', 1), **weights}
    return {
      'q_down': Weight((L, D, Q), ('layer', 'embed', None), std, attn + 'q_a_proj.weight', 1),
      'q_down_norm': Weight((L, Q), ('layer', None), one, attn + 'q_a_layernorm.weight'),
      'q_up': Weight((L, Q, A, H), ('layer', None, 'heads', None), Q**-0.5, attn + 'q_b_proj.weight', 1),
      **weights,
    }
  weights = {
    'q': Weight((L, D, A, H), ('layer', 'embed', 'heads', None), std, attn + 'q_proj.weight', 1),
    'k': Weight((L, D, K, H), ('layer', 'embed', 'kv_heads', None), std, attn + 'k_proj.weight', 1),
    'v': Weight((L, D, K, H), ('layer', 'embed', 'kv_heads', None), std, attn + 'v_proj.weight', 1),
    'o': Weight((L, A, H, D), ('layer', 'heads', None, 'embed'), (A * H) ** -0.5 * out, attn + 'o_proj.weight', 2),
  }
  if a.qkv_bias:
    weights['q_bias'] = Weight((L, A, H), ('layer', 'heads', None), 0, attn + 'q_proj.bias')
    weights['k_bias'] = Weight((L, K, H), ('layer', 'kv_heads', None), 0, attn + 'k_proj.bias')
    weights['v_bias'] = Weight((L, K, H), ('layer', 'kv_heads', None), 0, attn + 'v_proj.bias')
  if a.qk_norm:
    weights['q_norm'] = Weight((L, H), ('layer', None), one, attn + 'q_norm.weight')
    weights['k_norm'] = Weight((L, H), ('layer', None), one, attn + 'k_norm.weight')
  return weights


def swiglu_weights(a: Arch, L: int, out: float, F: int, hf: str, prefix: str = '') -> dict[str, Weight]:
  D, std = a.hidden_size, a.hidden_size**-0.5
  return {
    prefix + 'gate': Weight((L, D, F), ('layer', 'embed', 'mlp'), std, hf + 'gate_proj.weight', 1),
    prefix + 'up': Weight((L, D, F), ('layer', 'embed', 'mlp'), std, hf + 'up_proj.weight', 1),
    prefix + 'down': Weight((L, F, D), ('layer', 'mlp', 'embed'), F**-0.5 * out, hf + 'down_proj.weight', 1),
  }


def expert_weights(a: Arch, L: int, out: float) -> dict[str, Weight]:
  D, E, F, mlp = a.hidden_size, a.num_experts, a.moe_intermediate_size, 'model.layers.{layer}.mlp.'
  std, one = D**-0.5, mlp + 'experts.{expert}.'
  weights = {
    'router': Weight((L, D, E), ('layer', 'embed', None), std, mlp + 'gate.weight', 1),
    'experts_gate': Weight((L, E, D, F), ('layer', 'expert', 'embed', 'mlp'), std, one + 'gate_proj.weight', 1),
    'experts_up': Weight((L, E, D, F), ('layer', 'expert', 'embed', 'mlp'), std, one + 'up_proj.weight', 1),
    'experts_down': Weight((L, E, F, D), ('layer', 'expert', 'mlp', 'embed'), F**-0.5 * out, one + 'down_proj.weight', 1),
  }
  if a.scoring_func == 'sigmoid':
    weights['router_bias'] = Weight((L, E), ('layer', None), 0, mlp + 'gate.e_score_correction_bias')
  if a.n_shared_experts:
    weights |= swiglu_weights(a, L, out, a.n_shared_experts * F, mlp + 'shared_experts.', 'shared_')
  return weights


def layer_weights(a: Arch, stack: str) -> dict[str, Weight]:
  """The weights of a stack of layers. Residual outputs start smaller by sqrt(2 layers) (GPT-2)."""
  layers, D, name = a.stacks[stack], a.hidden_size, 'model.layers.{layer}.'
  L, out, one = len(layers), (2 * a.num_hidden_layers) ** -0.5, 0 if a.norm_offset else -1

  def norm(hf: str) -> Weight:
    return Weight((L, D), ('layer', None), one, name + hf + '.weight')

  weights = {'attn_norm': norm('input_layernorm'), **attention_weights(a, L, out)}
  if a.post_norms:
    weights |= {
      'attn_post_norm': norm('post_attention_layernorm'),
      'mlp_norm': norm('pre_feedforward_layernorm'),
      'mlp_post_norm': norm('post_feedforward_layernorm'),
    }
  else:
    weights['mlp_norm'] = norm('post_attention_layernorm')
  mixture = a.num_experts and stack == 'layers'
  weights |= expert_weights(a, L, out) if mixture else swiglu_weights(a, L, out, a.intermediate_size, name + 'mlp.')
  return {key: w._replace(first=layers.start) for key, w in weights.items()}


def weight_table(arch: Arch, heads: tuple[str, ...] = ('lm',)) -> dict[str, dict[str, Weight] | Weight]:
  """name -> Weight, layers stacked on the first axis. The scalar head starts as InstructGPT's (2203.02155), with standard deviation
  1 / sqrt(D + 1)."""
  a, D = arch, arch.hidden_size
  table: dict[str, Any] = {
    'embed': Weight((a.vocab_size, D), ('vocab', 'embed'), D**-0.5, 'model.embed_tokens.weight'),
    **{stack: layer_weights(a, stack) for stack in a.stacks},
    'final_norm': Weight((D,), (None,), 0 if a.norm_offset else -1, 'model.norm.weight'),
  }
  if 'lm' in heads and not a.tie_word_embeddings:
    table['lm_head'] = Weight((a.vocab_size, D), ('vocab', 'embed'), D**-0.5, 'lm_head.weight')
  if 'scalar' in heads:
    table['score'] = Weight((1, D), (None, 'embed'), (D + 1) ** -0.5, 'score.weight')
  return table


def is_weight(x) -> bool:
  return isinstance(x, Weight)


def count(table: PyTree, active: Arch | None = None) -> int:
  """Parameters of a weight table; of an `active` architecture those that a token meets, which is sent to few of the experts."""

  def met(w: Weight) -> int:
    size = math.prod(w.shape)
    return size // active.num_experts * active.num_experts_per_tok if active and '{expert}' in w.hf else size

  return sum(met(w) for w in jax.tree.leaves(table, is_leaf=is_weight))


def init(key: jax.Array, arch: Arch, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  return init_table(key, weight_table(arch, heads))


def init_table(key: jax.Array, table: PyTree) -> PyTree:
  """Random float32 weights. Each weight has a key of its own path, so adding one leaves the others as they were."""

  def make(path, w: Weight):
    if w.scale == -1:
      return jnp.ones(w.shape, jnp.float32)
    if w.scale == 0:
      return jnp.zeros(w.shape, jnp.float32)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return w.scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), w.shape, jnp.float32)

  return jax.tree_util.tree_map_with_path(make, table, is_leaf=is_weight)


def grown(params: PyTree, vocab_size: int) -> PyTree:
  """The weights with an embedding, and a head of its own where there is one, of so many rows. A new row is the mean of the others: so a new
  token is about as likely as a middling one, where a row at random could be the likeliest of all."""

  def grow(x: Array) -> Array:
    new = jnp.broadcast_to(x.mean(axis=0, keepdims=True), (vocab_size - x.shape[0], x.shape[1]))
    return jnp.concatenate([x, new])

  return {name: grow(x) if name in ('embed', 'lm_head') else x for name, x in params.items()}


def cast(w: dict[str, Array], dtype: str) -> dict[str, Array]:
  """A layer's weights as they compute. A router stays as it is: near ties decide."""
  return {name: p if name.startswith('router') else p.astype(dtype) for name, p in w.items()}


def layer_axes(arch: Arch, stack: str) -> dict[str, tuple[str | None, ...]]:
  """The logical axes of one layer's weights, and of their adapters."""
  found: dict[str, tuple[str | None, ...]] = {}
  for name, w in layer_weights(arch, stack).items():
    inputs, outputs = w.axes[1 : 1 + w.fan_in], w.axes[1 + w.fan_in :]
    found |= {name: w.axes[1:], name + lora.A: (*inputs, None), name + lora.B: (None, *outputs)}
  return found


def as_computed(arch: Arch, stack: str, w: dict[str, Array], dtype: str) -> dict[str, Array]:
  """A layer's weights as they compute: cast, then gathered along fsdp, so that half as many bytes travel."""
  axes = layer_axes(arch, stack)
  return {name: whole_embed(p, axes[name]) if name in axes else p for name, p in cast(w, dtype).items()}


def block(
  arch: Arch,
  w: dict[str, Array],
  x: Array,
  turn: rope.Angles,
  attend: Callable,
  absorbed: bool = False,
  routing: experts.Routing = experts.UNTOLD,
) -> tuple[Array, Any, Array | None]:
  """(x after one layer, what `attend` kept, the experts chosen). `attend(q, k, v) -> (out like q, kept)`; `kept` is what the caller wants
  back (a cache, or None). See attention.latent_attention for `absorbed`."""
  out, kept = attention.attention(arch, w, attention.norm(arch, x, w['attn_norm']), turn, attend, absorbed)
  x = x + (attention.norm(arch, out, w['attn_post_norm']) if arch.post_norms else out)
  out, chosen = experts.mlp(arch, w, attention.norm(arch, x, w['mlp_norm']), routing)
  return x + (attention.norm(arch, out, w['mlp_post_norm']) if arch.post_norms else out), kept, chosen


REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Kept(NamedTuple):
  """What a forward pass leaves beside its hidden states, stacked over layers; None where it was not asked for, or is not there."""

  cache: Any = None  # k [L, N, T, K, H] and v
  chosen: Array | None = None  # experts, int32 [layers with experts, N, T, k]


def run_layers(x: Array, params: PyTree, arch: Arch, segment_NT: Array, position_NT: Array, dtype: str, remat: str = 'none',
               layers: range | None = None, keep_cache: bool = False, replay: Array | None = None) -> tuple[Array, Kept]:  # fmt: skip
  """x [N, T, D] after the `layers` (all of them). `replay` is as Kept.chosen."""
  layers, kinds, counts = layers or range(arch.num_hidden_layers), arch.kinds, segment_NT > 0
  distinct = sorted({kinds[layer] for layer in layers})
  windows = sorted({kind.window for kind in distinct})
  masks = attention.masks(arch, position_NT, segment_NT, windows)
  contexts = [(masks[windows.index(kind.window)], rope.angles(arch, position_NT, kind.rope)) for kind in distinct]
  context: Any = contexts[0]
  if len(distinct) > 1:
    context = jax.tree.map(lambda *every: jnp.stack(every), *contexts)

  def layer(stack, x, given):
    w, kind, replayed = given
    w = as_computed(arch, stack, w, dtype)
    mask, turn = context if kind is None else jax.tree.map(lambda every: every[kind], context)
    attention_of = attention.sequence_attention(arch, segment_NT, windows, mask)

    def attend(q, k, v):  # queries stay where their tokens are
      k, v = (constrain(x, 'rows', None, kv_axis(x.shape[2]), None) for x in (k, v))
      return attention_of(q, k, v)

    x, kept, chosen = block(arch, w, x, turn, attend, routing=experts.Routing(replayed, counts))
    return constrain(x, 'rows', 'time', None), Kept(kept if keep_cache else None, chosen)

  every: list[Kept] = []
  for stack, own in arch.stacks.items():
    some = range(max(own.start, layers.start), min(own.stop, layers.stop))
    if some:
      part = slice(some.start - own.start, some.stop - own.start)
      weights = params[stack] if len(some) == len(own) else jax.tree.map(lambda w, part=part: w[part], params[stack])
      kind = None if len(distinct) == 1 else jnp.asarray([distinct.index(kinds[i]) for i in some])
      replayed = replay[part] if replay is not None and stack == 'layers' else None
      step = functools.partial(layer, stack)
      step = step if REMAT[remat] is None else jax.checkpoint(step, policy=REMAT[remat])
      x, kept = jax.lax.scan(step, x, (weights, kind, replayed))
      every.append(kept)
  cache = every[0].cache
  if len(every) > 1:
    cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(kept.cache for kept in every))
  return x, Kept(cache, every[-1].chosen)


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
  replay: Array | None = None,
) -> tuple[Array, Kept]:
  """Hidden states [N, T, D] before the head, after the final norm.

  The first `frozen_layers` have no gradient, nor has the embedding below them; `features` [N, T, D] is what they give (see `trunk`), where
  that is known already.
  """
  if frozen_layers:
    if features is None:
      features = trunk(params, arch, tokens, segment_NT, position_NT, frozen_layers, dtype, replay)
    x = jax.lax.stop_gradient(features.astype(dtype))
  else:
    x = embed(params, arch, tokens, dtype)
  layers = range(frozen_layers, arch.num_hidden_layers)
  x, kept = run_layers(x, params, arch, segment_NT, position_NT, dtype, remat, layers, keep_cache, replay)
  return attention.norm(arch, x, params['final_norm'].astype(dtype)), kept


def trunk(
  params: PyTree,
  arch: Arch,
  tokens: Array,
  segment_NT: Array,
  position_NT: Array,
  layers: int,
  dtype: str,
  replay: Array | None = None,
) -> Array:
  """[N, T, D]: what the first `layers` layers give."""
  x = embed(params, arch, tokens, dtype)
  return run_layers(x, params, arch, segment_NT, position_NT, dtype, layers=range(layers), replay=replay)[0]


def embed(params: PyTree, arch: Arch, tokens: Array, dtype: str) -> Array:
  """[N, T, D]. Looked up in float32, so that the gradients of a token that comes often add up. Along fsdp each device looks up its part of
  D: what travels are activations, not the table."""
  tokens = constrain(tokens, 'outer_rows', None)
  x = constrain(params['embed'][tokens], 'outer_rows', None, 'embed').astype(dtype)
  return constrain(scaled(arch, x), 'rows', 'time', None)


def scaled(arch: Arch, x: Array) -> Array:
  """What was looked up in the embedding, as the first layer reads it."""
  return x * jnp.asarray(arch.hidden_size**0.5, x.dtype) if arch.scale_embeddings else x


def head(params: PyTree) -> Array:
  """[V, D]: the output matrix, which is the embedding itself where tied."""
  return params['lm_head'] if 'lm_head' in params else params['embed']


def logits(hidden: Array, head_VD: Array, softcap: float = 0.0) -> Array:
  """float32 logits: a bfloat16 softmax moves log-probabilities by more than a policy update does."""
  scores = jnp.einsum('...d,vd->...v', hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return softcap * jnp.tanh(scores / softcap) if softcap else scores


@functools.partial(jax.jit, static_argnames=('arch', 'dtype', 'fuse'))
def decode_weights(params: PyTree, arch: Arch, dtype: str, fuse: bool) -> tuple[dict[str, Array], tuple[dict[str, Array], ...]]:
  """(embedding, final norm and head, the weights of each layer) for the unrolled decode loop, made once a rollout: cast, and whole along
  fsdp, so that nothing is gathered token by token. `fuse` joins q/k/v and gate/up into one matmul each
  (7 to 8 % of a decode step on CPU); off under tensor parallelism, where the joined axis would mix shards. Adapters are merged in float32
  alone: in bfloat16, W + AB is W where AB is small, and the sampler would miss an adapter's first updates."""
  layers = []
  for stack, numbers in arch.stacks.items():
    for index in range(len(numbers)):
      own = {name: p[index] for name, p in params[stack].items()}
      w = as_computed(arch, stack, lora.merged_layer(own, tuple(own) if dtype == 'float32' else (attention.ABSORBED,)), dtype)
      if fuse and 'k' in w and not lora.adapted(w, 'q', 'k', 'v'):
        w['qkv'] = jnp.concatenate([w.pop(n).reshape(arch.hidden_size, -1) for n in ('q', 'k', 'v')], axis=-1)
      if fuse and 'gate' in w and not lora.adapted(w, 'gate', 'up'):
        w['gate_up'] = jnp.concatenate([w.pop('gate'), w.pop('up')], axis=-1)
      layers.append(w)
  outer = {name: whole_embed(params[name].astype(dtype), ('vocab', 'embed')) for name in ('embed', 'lm_head') if name in params}
  return {**outer, 'final_norm': params['final_norm'].astype(dtype)}, tuple(layers)


CHUNK_ELEMENTS = 2**24  # logits alive at once in the update, on each device: 64 MiB of float32


def hidden_states(
  params: PyTree,
  arch: Arch,
  batch: Batch,
  *,
  dtype: str = 'float32',
  remat: str = 'none',
  frozen_layers: int = 0,
  replays: bool = False,
) -> Array:
  """`forward` of a batch, from its `extras['features']` where it has them; `replays`: with the experts `extras['chosen']`, where it has
  them."""
  chosen = batch.extras.get('chosen') if replays else None  # [N, T, layers, k]
  return forward(
    params, arch, batch.tokens, batch.segment_NT, batch.position_NT, dtype=dtype, remat=remat,
    frozen_layers=frozen_layers, features=batch.extras.get('features'),
    replay=None if chosen is None else jnp.moveaxis(chosen, 2, 0).astype(jnp.int32),
  )[0]  # fmt: skip


def scores(params: PyTree, hidden: Array, segment_NT: Array) -> Array:
  """float32 [N, T]: the scalar head after each token, 0 on padding."""
  return jnp.where(segment_NT > 0, logits(hidden, params['score'])[..., 0], 0.0)


class Output(NamedTuple):
  """What a network says after every token, before the logits are made of it: they are hidden @ head, and large."""

  hidden: Array  # [N, T, D]
  head: Array  # [V, D]
  softcap: float = 0.0  # of the logits; 0: none


def output_of(params: PyTree, arch: Arch, hidden: Array) -> Output:
  return Output(hidden, head(params), arch.final_logit_softcapping)


def over_vocabulary(function: Callable[..., PyTree], batch: Batch, outputs: Sequence[Output], *arrays: Array) -> PyTree:
  """`function(*logits, *arrays)` of every token: the float32 logits [N, t, V] from which each of the outputs would draw it, and the parts
  [N, t, ...] of the arrays [N, T, ...], which are aligned to the token they speak of. So are the results [N, T, ...], which are 0 where
  nothing comes before a token in its segment.

  The vocabulary is met in chunks of T, recomputed in the backward pass: [N, T, V] never exists. Every device goes through its own rows, and
  what they say of the head is added up once, after the last chunk; `function` closes over no arrays.
  """
  (N, T, _), count = outputs[0].hidden.shape, len(outputs)

  def sized(x, before, after):  # zeros around the axis T
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))

  # Row t of a hidden state speaks of token t + 1.
  parts = [output.hidden for output in outputs] + [sized(jnp.asarray(x)[:, 1:], 0, 1) for x in arrays]
  heads = [output.head for output in outputs]
  size = max(1, CHUNK_ELEMENTS * ways('rows', 'vocab') // (N * sum(head.shape[0] for head in heads)))

  def local(parts, heads):
    def chunk(*some):
      every = [
        constrain(logits(hidden, head, output.softcap), 'rows', None, 'vocab')
        for hidden, head, output in zip(some, heads, outputs)
      ]
      return function(*every, *some[count:])

    return in_pieces(chunk, parts, size)

  if ways('rows', 'time') == 1:
    results = local(parts, heads)
  else:
    rows = {axis for name in ('rows', 'time') for axis in np.ravel(RULES[name]).tolist()}

    def own_rows(parts, heads):  # float32: what the chunks say of a head adds up
      return local(parts, [head.astype(jnp.float32) for head in heads])

    # As it computes, whole along fsdp, and cut by the vocabulary: outside, since a gather inside would undo that cut.
    heads = [whole_embed(head.astype(hidden.dtype), ('vocab', 'embed')) for head, hidden in zip(heads, parts)]
    split = spec('rows', 'time')
    results = jax.shard_map(own_rows, in_specs=(split, PartitionSpec()), out_specs=split, axis_names=rows)(parts, heads)
  known = (batch.segment_NT > 0) & (batch.position_NT > 0)
  return jax.tree.map(lambda x: jnp.where(known.reshape(N, T, *(1,) * (x.ndim - 2)), sized(x[:, :-1], 1, 0), 0), results)


def in_pieces(function: Callable[..., PyTree], parts: Sequence[Array], size: int) -> PyTree:
  """`function(*parts)` of [N, T, ...], `size` of T at a time; each piece is computed again in the backward pass."""
  N, T = parts[0].shape[:2]
  if size >= T:
    return function(*parts)
  count = -(-T // size)

  def split(x):  # [N, T, ...] -> [count, N, size, ...]
    x = jnp.pad(x, ((0, 0), (0, count * size - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(N, count, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(N, -1, *x.shape[3:])[:, :T]

  return jax.tree.map(join, jax.lax.map(lambda some: jax.checkpoint(function)(*some), [split(x) for x in parts]))


def log_probs(params: PyTree, arch: Arch, batch: Batch, temperature_N: Array | float = 1.0, *, dtype: str = 'float32', remat: str = 'none',
              **wanted: bool) -> tuple[Array, Array | None]:  # fmt: skip
  """`token_log_probs` after a forward pass."""
  hidden = hidden_states(params, arch, batch, dtype=dtype, remat=remat)
  return token_log_probs(output_of(params, arch, hidden), batch, temperature_N, **wanted)


def token_log_probs(
  output: Output, batch: Batch, temperature_N: Array | float = 1.0, *, entropy: bool = False, entropy_gradient: bool = False
) -> tuple[Array, Array | None]:
  """Log-probability [N, T] of every token given those before it in its segment (0 where there is none), and the entropy [N, T] of the
  distribution it was drawn from, both under softmax(logits / temperature) over the whole vocabulary, float32. The entropy has a gradient
  only where one is asked for: a metric should not pay for it."""
  scale_N = jnp.broadcast_to(1.0 / jnp.asarray(temperature_N, jnp.float32), batch.tokens.shape[:1])

  def chunk(scores, target, scale):
    scores = scores * scale[..., None]
    lse = jax.nn.logsumexp(scores, axis=-1)
    logp = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0] - lse
    if not entropy:
      return logp, None
    every = scores - lse[..., None]
    every = every if entropy_gradient else jax.lax.stop_gradient(every)
    return logp, -jnp.sum(jnp.exp(every) * every, axis=-1)

  return over_vocabulary(chunk, batch, [output], batch.tokens, jnp.broadcast_to(scale_N[:, None], batch.tokens.shape))


class Net(NamedTuple):
  """A role's network as the objectives see it: `token_log_probs` and `scores` of a batch with everything else filled in."""

  logp: Callable[..., tuple[Array, Array | None]]  # (params, rows, entropy=False, entropy_gradient=False)
  scores: Callable[..., Array]  # (params, rows) -> [N, T]
  logp_and_scores: Callable[..., tuple[Array, Array | None, Array]]  # as logp, in one pass
  output: Callable[..., Output]  # (params, rows): for `over_vocabulary`


def make_net(
  arch: Arch, temperature: Callable[[Batch], Array | float], *, dtype: str, remat: str, frozen_layers: int = 0, shift: float = 0.0,
  replays: bool = False,
) -> Net:  # fmt: skip
  """`temperature(rows)` gives one number a row; `shift` is subtracted from the scores; `replays` as in `hidden_states`."""

  def run(params, rows):
    if frozen_layers:  # where tied, it is the head, too
      params = {**params, 'embed': jax.lax.stop_gradient(params['embed'])}
    return params, hidden_states(params, arch, rows, dtype=dtype, remat=remat, frozen_layers=frozen_layers, replays=replays)

  def output(params, rows):
    params, hidden = run(params, rows)
    return output_of(params, arch, hidden)

  def logp(params, rows, **wanted):
    return token_log_probs(output(params, rows), rows, temperature(rows), **wanted)

  def shifted(params, hidden, rows):
    return scores(params, hidden, rows.segment_NT) - shift * (rows.segment_NT > 0)

  def only_scores(params, rows):
    params, hidden = run(params, rows)
    return shifted(params, hidden, rows)

  def logp_and_scores(params, rows, **wanted):
    params, hidden = run(params, rows)
    found = token_log_probs(output_of(params, arch, hidden), rows, temperature(rows), **wanted)
    return *found, shifted(params, hidden, rows)

  return Net(logp, only_scores, logp_and_scores, output)
