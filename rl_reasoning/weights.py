"""Published weights -> the model's pytree and back: Hugging Face folders (safetensors) and llama GGUF files. Pickles are not read.

A folder holds a causal language model (head 'lm') or a sequence classifier of one label, which is a reward model (head 'scalar').

A file offers tensors under Hugging Face names; the weight table says which it must hold and how each is laid out. All names and shapes
are compared before the first tensor is read, and every weight is built and put into its sharding alone.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_reasoning import model
from rl_reasoning.config import ConfigError, check, from_mapping
from rl_reasoning.gguf_tokenizer import load_gguf_tokenizer, metadata, open_gguf
from rl_reasoning.model import Arch, Weight
from rl_reasoning.structs import PyTree
from rl_reasoning.tokenizer import HFTokenizer

# model_type -> (what the classes that transformers builds begin with, what sets it apart from the others)
FAMILIES: dict[str, tuple[str, dict[str, bool]]] = {
  'llama': ('Llama', {'qkv_bias': False, 'qk_norm': False}),
  'qwen2': ('Qwen2', {'qkv_bias': True, 'qk_norm': False}),
  'qwen3': ('Qwen3', {'qkv_bias': False, 'qk_norm': True}),
}
CLASSES = {'lm': 'ForCausalLM', 'scalar': 'ForSequenceClassification'}  # and what they end in
TOKENIZER_FILES = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
  'tokenizer.model', 'chat_template.jinja', 'generation_config.json',
)  # fmt: skip


def is_gguf(path: str) -> bool:
  return path.endswith('.gguf')


def make_arch(file: str, settings: Mapping[str, Any]) -> Arch:
  try:
    return from_mapping(Arch, settings)
  except ValueError as error:
    raise ConfigError(f'{file}: {error}') from None


def read_json(file: pathlib.Path) -> dict[str, Any]:
  check(file.is_file(), f'{file}: no such file')
  try:
    value = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f'{file}: not JSON: {error}') from None
  check(isinstance(value, dict), f'{file}: holds no JSON object')
  return value


def read_arch(path: str) -> Arch:
  """The architecture from a folder's config.json or a GGUF file's metadata. Raises ConfigError for what this model cannot be."""
  return gguf_arch(path) if is_gguf(path) else hf_arch(pathlib.Path(path) / 'config.json')


def source_heads(path: str) -> tuple[str, ...]:
  """What a folder or file holds beside the trunk: ('lm',), or ('scalar',) for a sequence classifier. Raises ConfigError for a classifier of
  several labels."""
  if is_gguf(path):
    return ('lm',)
  file = pathlib.Path(path) / 'config.json'
  config = read_json(file)
  classes = config.get('architectures') or []
  if not (isinstance(classes, list) and any(str(name).endswith(CLASSES['scalar']) for name in classes)):
    return ('lm',)
  labels = config.get('id2label') or config.get('num_labels') or 1  # its tensor tells where the file does not
  count = len(labels) if isinstance(labels, dict) else labels
  check(count == 1, f'{file}: a classifier of {count!r} labels; a reward model has one')
  return ('scalar',)


def score_shift(path: str) -> float:
  """What is to be subtracted from a classifier's scores: the key of that name, which our exports have; else 0."""
  file = pathlib.Path(path) / 'config.json'
  shift = read_json(file).get('score_shift', 0.0)
  good = isinstance(shift, (int, float)) and not isinstance(shift, bool) and math.isfinite(shift)
  check(good, f'{file}: score_shift {shift!r} is no finite number')
  return float(shift)


def hf_arch(file: pathlib.Path) -> Arch:
  config = read_json(file)

  def need(key: str) -> Any:
    check(config.get(key) is not None, f'{file}: no key {key!r}')
    return config[key]

  family = need('model_type')
  check(family in FAMILIES, f'{file}: model_type {family!r} is none of {", ".join(FAMILIES)}')
  check(config.get('hidden_act', 'silu') == 'silu', f'{file}: hidden_act {config.get("hidden_act")!r} is not silu')
  for key in ('attention_bias', 'mlp_bias'):
    check(not config.get(key), f'{file}: {key} is on: the model has no bias on its output projections')
  check(config.get('partial_rotary_factor') in (None, 1), f'{file}: partial_rotary_factor {config.get("partial_rotary_factor")}')
  for key in ('rope_scaling', 'rope_parameters'):
    check(isinstance(config.get(key) or {}, dict), f'{file}: {key} {config.get(key)!r} is no JSON object')
  rope = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  check(kind in ('default', 'none', None), f'{file}: rope type {kind!r} is not built, only the default one is')
  known = {'rope_type', 'type', 'rope_theta', 'factor'}  # 'default' reads no other
  check(not rope.keys() - known, f'{file}: rope parameters {sorted(rope.keys() - known)} are not known')
  for key in ('num_hidden_layers', 'num_attention_heads', 'hidden_size'):
    check(isinstance(need(key), int) and need(key) > 0, f'{file}: {key} {config[key]!r} is no positive integer')
  layers, heads = config['num_hidden_layers'], config['num_attention_heads']
  if config.get('layer_types'):
    other = sorted(set(map(str, config['layer_types'])) - {'full_attention'})
    check(not other, f'{file}: layer_types {", ".join(other)}: only full attention is built')
  elif config.get('use_sliding_window') and config.get('sliding_window'):
    first = config.get('max_window_layers', 28)
    check(first >= layers, f'{file}: sliding_window {config["sliding_window"]} is in use from layer {first} of {layers}')
  theta = rope.get('rope_theta', config.get('rope_theta'))
  return make_arch(str(file), {
    **{key: need(key) for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'rms_norm_eps')},
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': heads if config.get('num_key_value_heads') is None else config['num_key_value_heads'],
    'head_dim': config['hidden_size'] // heads if config.get('head_dim') is None else config['head_dim'],
    'rope_theta': 10_000.0 if theta is None else theta,  # as transformers fills it in
    'tie_word_embeddings': bool(config.get('tie_word_embeddings', False)),
    **FAMILIES[family][1],
  })  # fmt: skip


def gguf_arch(path: str) -> Arch:
  family = metadata(path, 'general.architecture')
  check(family == 'llama', f"{path}: general.architecture {family!r} is not 'llama'")

  def get(key: str, *default: Any) -> Any:
    value = metadata(path, f'llama.{key}', *default)
    # Metadata are float32: the shortest decimal that reads back as the same one is what config.json said (1e-5, not 9.99999975e-06).
    return float(str(np.float32(value))) if isinstance(value, float) else value

  kind = get('rope.scaling.type', 'none')
  check(kind == 'none', f'{path}: llama.rope.scaling.type {kind!r} is not built, only the default one is')
  shapes = {tensor.name: tensor.shape.tolist() for tensor in open_gguf(path).tensors}
  check('token_embd.weight' in shapes, f'{path}: no tensor token_embd.weight')
  heads, D = get('attention.head_count'), get('embedding_length')
  check(isinstance(heads, int) and heads > 0, f'{path}: llama.attention.head_count {heads!r} is no positive integer')
  arch = make_arch(path, {
    'vocab_size': shapes['token_embd.weight'][-1],
    'hidden_size': D,
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': get('attention.head_count_kv', heads),
    'head_dim': get('attention.key_length', D // heads),
    'rope_theta': get('rope.freq_base', 10_000.0),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'tie_word_embeddings': 'output.weight' not in shapes,
  })  # fmt: skip
  turned = get('rope.dimension_count', arch.head_dim)
  check(turned == arch.head_dim, f'{path}: llama.rope.dimension_count {turned} is not the head dimension {arch.head_dim}')
  return arch


class Tensor(NamedTuple):
  file: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def safetensors_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  import safetensors

  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    names: Any = read_json(index).get('weight_map')
    good = isinstance(names, dict) and bool(names) and all(isinstance(name, str) for name in names.values())
    check(good, f"{index}: no key 'weight_map' of tensor names to file names")
    files = [folder / name for name in sorted(set(names.values()))]
  else:
    files = [folder / 'model.safetensors']
    if not files[0].is_file():
      pickles = sorted(p.name for pattern in ('*.bin', '*.pt', '*.pth') for p in folder.glob(pattern))
      check(not pickles, f'{folder}: only {", ".join(pickles)}: pickle is not read; convert the weights to safetensors')
      raise ConfigError(f'{folder}: no weights (model.safetensors or model.safetensors.index.json)')
  result = {}
  for file in files:
    check(file.is_file(), f'{file}: no such file, but {index.name} names it')
    try:
      opened = safetensors.safe_open(file, framework='np')
      for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        kind = part.get_dtype()
        check(kind in ('F32', 'F16', 'BF16', 'F64'), f'{file}: tensor {name}: dtype {kind} is not read')
        result[name] = Tensor(str(file), tuple(part.get_shape()), lambda opened=opened, name=name: opened.get_tensor(name))
    except (safetensors.SafetensorError, OSError) as error:
      raise ConfigError(f'{file}: truncated or no safetensors file: {error}') from None
  return result


GGUF_NAMES = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
GGUF_BLOCK = {
  'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'ffn_norm': 'post_attention_layernorm', 'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
}  # fmt: skip


def hf_name(name: str) -> str:
  """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'; a name not known stays as it is."""
  *front, kind = name.split('.')
  if len(front) == 3 and front[0] == 'blk' and front[2] in GGUF_BLOCK:
    return f'model.layers.{front[1]}.{GGUF_BLOCK[front[2]]}.{kind}'
  return f'{GGUF_NAMES[front[0]]}.{kind}' if len(front) == 1 and front[0] in GGUF_NAMES else name


def gguf_tensors(path: str, arch: Arch) -> dict[str, Tensor]:
  import gguf

  def read(tensor, heads: int | None) -> np.ndarray:
    try:
      x = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
      raise ConfigError(f'{path}: tensor {tensor.name}: {error}') from None
    if heads:  # rows of a head lie as the pairs that RoPE turns: 0, H/2, 1, H/2 + 1, ...; Hugging Face splits a head in halves
      x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return x

  heads = {'attn_q.weight': arch.num_attention_heads, 'attn_k.weight': arch.num_key_value_heads}
  result = {}
  for tensor in open_gguf(path).tensors:
    paired = heads.get('.'.join(tensor.name.split('.')[2:]))
    shape = tuple(tensor.shape.tolist()[::-1])
    result[hf_name(tensor.name)] = Tensor(path, shape, lambda tensor=tensor, paired=paired: read(tensor, paired))
  return result


def layers_of(w: Weight) -> list[str]:
  """The Hugging Face names of a weight: one a layer where it is stacked."""
  return [w.hf.format(layer) for layer in range(w.shape[0])] if '{}' in w.hf else [w.hf]


def hf_shape(w: Weight) -> tuple[int, ...]:
  if '{}' not in w.hf:
    return w.shape
  inputs, outputs = w.shape[1 : 1 + w.fan_in], w.shape[1 + w.fan_in :]
  return (math.prod(outputs), math.prod(inputs)) if w.fan_in else (math.prod(outputs),)


def check_tensors(path: str, arch: Arch, heads: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
  """Exactly the weights of the table, in their shapes; beside them only what says nothing (buffers, a copy of a tied embedding)."""
  table = jax.tree.leaves(model.weight_table(arch, heads), is_leaf=model.is_weight)
  expected = {name: hf_shape(w) for w in table for name in layers_of(w)}
  missing = [name for name in expected if name not in tensors]
  check(not missing, f'{path}: {len(missing)} weights are missing: {", ".join(missing[:4])}{", ..." * (len(missing) > 4)}')
  for name, shape in expected.items():
    file, found, _ = tensors[name]
    check(found == shape, f'{file}: tensor {name} has shape {found}, the architecture needs {shape}')
  unused = [name for name in tensors if name not in expected and not name.endswith('rotary_emb.inv_freq')]
  head, embed = tensors.get('lm_head.weight'), tensors['model.embed_tokens.weight']
  if arch.tie_word_embeddings and head is not None:
    unused.remove('lm_head.weight')
    same = head.shape == embed.shape and np.array_equal(head.read(), embed.read())
    check(same, f'{head.file}: tensor lm_head.weight differs from the embedding that tie_word_embeddings ties it to')
  if unused:
    more = ', ...' * (len(unused) > 4)
    raise ConfigError(f'{tensors[unused[0]].file}: {len(unused)} tensors that no weight reads: {", ".join(unused[:4])}{more}')


def load(path: str, arch: Arch, shardings: PyTree | None = None, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """The parameters, float32, from a Hugging Face folder or a GGUF file, each put into its sharding (None: the default device).

  Of `heads` those that the source has (see `source_heads`): one that it lacks is the caller's to make, one that is not asked for is left
  out. `shardings` are those of what is returned.
  """
  tensors = gguf_tensors(path, arch) if is_gguf(path) else safetensors_tensors(pathlib.Path(path))
  source = source_heads(path)
  check_tensors(path, arch, source, tensors)

  def put(w: Weight, sharding=None) -> jax.Array:
    names = layers_of(w)
    x = np.empty(w.shape, np.float32)
    for part, name in zip(x if '{}' in w.hf else [x], names, strict=True):
      stored = tensors[name].read()
      part[...] = (stored.T if w.fan_in else stored).reshape(part.shape)
    return jnp.asarray(x) if sharding is None else jax.make_array_from_callback(w.shape, sharding, lambda index: x[index])

  table = model.weight_table(arch, tuple(head for head in heads if head in source))
  trees = (table,) + (() if shardings is None else (shardings,))
  return jax.tree.map(put, *trees, is_leaf=model.is_weight)


def hf_config(arch: Arch, head: str) -> dict[str, Any]:
  own = {'qkv_bias': arch.qkv_bias, 'qk_norm': arch.qk_norm}
  family = next((name for name, (_, traits) in FAMILIES.items() if traits == own), None)
  if family is None:
    raise ConfigError('an architecture with both qkv_bias and qk_norm has no model_type in transformers')
  fields = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
            'head_dim', 'rms_norm_eps', 'tie_word_embeddings')  # fmt: skip
  return {
    'architectures': [FAMILIES[family][0] + CLASSES[head]],
    'model_type': family,
    'dtype': 'float32',
    'hidden_act': 'silu',
    **{name: getattr(arch, name) for name in fields},
    'rope_theta': arch.rope_theta,  # where transformers 4 and most other readers look
    'rope_parameters': {'rope_type': 'default', 'rope_theta': arch.rope_theta},
    'bos_token_id': None,  # the tokenizer and generation_config.json know; a class's default would be wrong
    'eos_token_id': None,
  }


def save_tokenizer(source: str, folder: pathlib.Path) -> None:
  if is_gguf(source):
    tokenizer = load_gguf_tokenizer(source)
    tokenizer.save_pretrained(folder)
    ids = {f'{role}_token_id': getattr(tokenizer, f'{role}_token_id') for role in ('bos', 'eos', 'pad')}
    (folder / 'generation_config.json').write_text(json.dumps({k: v for k, v in ids.items() if v is not None}, indent=1))
    return
  files = [file for name in TOKENIZER_FILES if (file := pathlib.Path(source) / name).is_file()]
  check(bool(files), f'{source}: no tokenizer files')
  for file in files:
    shutil.copyfile(file, folder / file.name)


def padding_of_its_own(folder: pathlib.Path) -> int | None:
  """The id of the padding token of a saved model's tokenizer; None where it has no token to spare.

  A sequence classifier reads its score at the last token that is no padding, by id: where the tokenizer pads with the end token, as many
  do, that would be the token before the end. The files then get another special token as padding.
  """
  tok = HFTokenizer(str(folder))  # of which class it is, and so what it adds, goes by config.json
  pad = tok.inner.pad_token_id
  if pad is not None and pad != tok.end_id:
    return pad
  added = tok.inner.added_tokens_decoder
  free = [i for i, token in added.items() if token.special and i not in (*tok.end_ids, tok.inner.bos_token_id)]
  if not free:
    return None
  pad = max(free)  # the last ones are the least in use: reserved, unused, of other modalities
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    file = folder / name
    if file.is_file():
      file.write_text(json.dumps({**read_json(file), 'pad_token': str(added[pad])}, indent=2, ensure_ascii=False) + '\n')
  return pad


def save(
  params: PyTree,
  arch: Arch,
  path: str,
  tokenizer_path: str | None = None,
  heads: tuple[str, ...] = ('lm',),
  score_shift: float = 0.0,
) -> None:
  """Writes a Hugging Face folder that transformers reads; all of it or nothing. `tokenizer_path`: a folder or a .gguf file.

  With heads ('scalar',) it is a sequence classifier, of which transformers gives the scores before the shift. Without a tokenizer it knows
  no padding, and transformers refuses batches of several rows.
  """
  import safetensors.numpy

  target = pathlib.Path(path).absolute()
  check(not os.path.lexists(target), f'{path}: exists already')
  check(len(heads) == 1, f'{path}: transformers has no class with the heads {", ".join(heads)}: save one')
  config, table = hf_config(arch, heads[0]), model.weight_table(arch, heads)
  if heads == ('scalar',):
    config |= {
      'num_labels': 1,
      'id2label': {'0': 'LABEL_0'},
      'label2id': {'LABEL_0': 0},
      'problem_type': 'regression',
      'pad_token_id': None,
      'score_shift': score_shift,
    }
  part = target.with_name(f'.{target.name}.{os.getpid()}.part')
  part.mkdir(parents=True)

  def write_config(**more):
    (part / 'config.json').write_text(json.dumps({**config, **more}, indent=2) + '\n')

  try:
    write_config()
    tensors = {}

    def add(w: Weight, stacked: jax.Array) -> None:
      x = np.asarray(stacked, np.float32)
      for name, piece in zip(layers_of(w), x if '{}' in w.hf else [x], strict=True):
        shape = hf_shape(w)
        tensors[name] = np.ascontiguousarray(piece.reshape(shape[::-1]).T if w.fan_in else piece.reshape(shape))

    jax.tree.map(add, table, {name: params[name] for name in table}, is_leaf=model.is_weight)
    safetensors.numpy.save_file(tensors, part / 'model.safetensors', metadata={'format': 'pt'})
    if tokenizer_path:
      save_tokenizer(tokenizer_path, part)
    if heads == ('scalar',) and tokenizer_path:
      write_config(pad_token_id=padding_of_its_own(part))
    part.rename(target)
  finally:
    shutil.rmtree(part, ignore_errors=True)
