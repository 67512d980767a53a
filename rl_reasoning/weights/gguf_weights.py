"""GGUF files, as llama.cpp writes them: the architecture from the metadata, tensors under Hugging Face names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from rl_reasoning import rope
from rl_reasoning.arch import Arch, RopeScaling
from rl_reasoning.config import ConfigError, check
from rl_reasoning.families import make_arch
from rl_reasoning.gguf_tokenizer import metadata, open_gguf
from rl_reasoning.tensors import Slices, Tensor

ROPE_FACTORS = 'rope_freqs.weight'  # what Llama 3.1's frequencies are divided by; no metadata tell of it
GGUF_FAMILIES: dict[str, dict[str, Any]] = {'llama': {}, 'qwen2': {'qkv_bias': True}, 'qwen3': {'qk_norm': True}}
GGUF_NAMES = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
GGUF_BLOCK = {
  'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm', 'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm', 'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}  # fmt: skip


def gguf_arch(path: str) -> Arch:
  family = metadata(path, 'general.architecture')
  check(family in GGUF_FAMILIES, f'{path}: general.architecture {family!r} is none of {", ".join(GGUF_FAMILIES)}')

  def get(key: str, *default: Any) -> Any:
    value = metadata(path, f'{family}.{key}', *default)
    # Metadata are float32: the shortest decimal that reads back as the same one is what config.json said (1e-5, not 9.99999975e-06).
    return float(str(np.float32(value))) if isinstance(value, float) else value

  kind = get('rope.scaling.type', 'none')
  check(kind == 'none', f'{path}: {family}.rope.scaling.type {kind!r} is not built, only the default one is')
  tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
  shapes = {name: tensor.shape.tolist() for name, tensor in tensors.items()}
  check('token_embd.weight' in shapes, f'{path}: no tensor token_embd.weight')
  heads, D = get('attention.head_count'), get('embedding_length')
  check(isinstance(heads, int) and heads > 0, f'{path}: {family}.attention.head_count {heads!r} is no positive integer')
  arch = make_arch(path, {
    'vocab_size': shapes['token_embd.weight'][-1],
    'hidden_size': D,
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': get('attention.head_count_kv', heads),
    'head_dim': get('attention.key_length', D // heads),
    'rope_theta': get('rope.freq_base', 10_000.0),
    'max_position_embeddings': get('context_length', 0),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'tie_word_embeddings': 'output.weight' not in shapes,
    **GGUF_FAMILIES[family],
  })  # fmt: skip
  turned = get('rope.dimension_count', arch.head_dim)
  check(turned == arch.head_dim, f'{path}: {family}.rope.dimension_count {turned} is not the head dimension {arch.head_dim}')
  if ROPE_FACTORS not in tensors:
    return arch
  factors = np.asarray(tensors[ROPE_FACTORS].data, np.float32)
  stretched = dataclasses.replace(arch, rope_scaling=RopeScaling('llama3', float(factors.max()), 8192))
  wanted = np.asarray(rope.frequencies(arch) / rope.frequencies(stretched))
  same = factors.shape == wanted.shape and np.allclose(factors, wanted, rtol=1e-4)
  check(same, f"{path}: {ROPE_FACTORS} is not what Llama 3's scaling of lengths beyond 8192 tokens gives, which alone is read")
  return stretched


def hf_name(name: str) -> str:
  """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'; a name not known stays as it is."""
  *front, kind = name.split('.')
  if len(front) == 3 and front[0] == 'blk' and front[2] in GGUF_BLOCK:
    return f'model.layers.{front[1]}.{GGUF_BLOCK[front[2]]}.{kind}'
  return f'{GGUF_NAMES[front[0]]}.{kind}' if len(front) == 1 and front[0] in GGUF_NAMES else name


def gguf_tensors(path: str, arch: Arch) -> dict[str, Tensor]:
  import gguf

  def read(tensor, heads: int | None, at: Slices) -> np.ndarray:
    rows = np.arange(tensor.data.shape[0])
    if (
      heads
    ):  # of llama alone: rows of a head lie as the pairs that RoPE turns, 0, H/2, 1, ...; Hugging Face splits a head in halves
      rows = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    try:
      x = gguf.dequantize(tensor.data[rows[at[0]]], tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
      raise ConfigError(f'{path}: tensor {tensor.name}: {error}') from None
    return x[(slice(None), *at[1:])]

  paired_heads = {'attn_q.weight': arch.num_attention_heads, 'attn_k.weight': arch.num_key_value_heads}
  heads = paired_heads if metadata(path, 'general.architecture') == 'llama' else {}
  result = {}
  for tensor in open_gguf(path).tensors:
    paired = heads.get('.'.join(tensor.name.split('.')[2:]))
    shape = tuple(tensor.shape.tolist()[::-1])
    result[hf_name(tensor.name)] = Tensor(path, shape, functools.partial(read, tensor, paired))
  result.pop(ROPE_FACTORS, None)
  return result
