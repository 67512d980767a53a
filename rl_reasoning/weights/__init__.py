"""Published weights -> the model's pytree and back: Hugging Face folders (safetensors) and llama GGUF files. Pickles are not read.

A folder holds a causal language model (head 'lm') or a sequence classifier of one label, which is a reward model (head 'scalar').

A file offers tensors under Hugging Face names; the weight table says which it must hold and how each is laid out. All names and shapes
are compared before the first tensor is read, and every weight is built and put into its sharding alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rl_reasoning import families, lora, model, tokenizer
from rl_reasoning.config import ConfigError, Lora, check
from rl_reasoning.families import hf_arch, read_json
from rl_reasoning.model import Arch, Weight
from rl_reasoning.structs import PyTree
from rl_reasoning.tensors import Slices, Tensor, safetensors_tensors
from rl_reasoning.weights.gguf_weights import gguf_arch, gguf_tensors

TOKENIZER_FILES = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
  'tokenizer.model', 'chat_template.jinja', 'generation_config.json',
)  # fmt: skip


def is_gguf(path: str) -> bool:
  return path.endswith('.gguf')


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
  if not (isinstance(classes, list) and any(str(name).endswith(families.ENDINGS['scalar']) for name in classes)):
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


def our_names(tensors: dict[str, Tensor], arch: Arch) -> dict[str, Tensor]:
  """The tensors of a folder under the names of the weight table; fused projections apart."""
  ours, _ = families.rename(families.family_of(arch))
  result = {ours(name): tensor for name, tensor in tensors.items()}
  for fused, parts in fused_parts(arch).items():
    if fused not in result:
      continue
    tensor, start = result.pop(fused), 0
    for name, rows in parts.items():
      result[name] = Tensor(tensor.file, (rows, *tensor.shape[1:]), functools.partial(rows_from, tensor, start))
      start += rows
    check(start == tensor.shape[0], f'{tensor.file}: tensor {fused} has {tensor.shape[0]} rows, the architecture needs {start}')
  return result


def rows_from(tensor: Tensor, start: int, at: Slices) -> np.ndarray:
  first = slice(at[0].start + start, at[0].stop + start)
  return tensor.read((first, *at[1:]))


def fused_parts(arch: Arch) -> dict[str, dict[str, int]]:
  """name of a fused tensor -> names and rows of its parts, in their order (Phi-3)."""
  if families.family_of(arch) != 'phi3':
    return {}
  found = {}
  for layer in range(arch.num_hidden_layers):
    attn, mlp, H = f'model.layers.{layer}.self_attn.', f'model.layers.{layer}.mlp.', arch.head_dim
    heads = {'q': arch.num_attention_heads, 'k': arch.num_key_value_heads, 'v': arch.num_key_value_heads}
    found[attn + 'qkv_proj.weight'] = {f'{attn}{name}_proj.weight': count * H for name, count in heads.items()}
    found[mlp + 'gate_up_proj.weight'] = {f'{mlp}{name}_proj.weight': arch.intermediate_size for name in ('gate', 'up')}
  return found


def parts_of(w: Weight) -> dict[tuple[int, ...], str]:
  """index of the leading axes -> Hugging Face name: one a layer, and an expert, where the weight is stacked."""
  stacked = [w.shape[axis] for axis, name in enumerate(('{layer}', '{expert}')) if name in w.hf]
  numbers = np.ndindex(*stacked)
  return {n: w.hf.format(layer=w.first + n[0], expert=n[-1]) if n else w.hf for n in numbers}


def stacked_axes(w: Weight) -> int:
  return ('{layer}' in w.hf) + ('{expert}' in w.hf)


def hf_shape(w: Weight) -> tuple[int, ...]:
  """The shape of one of its tensors in a file."""
  own = w.shape[stacked_axes(w) :]
  if not stacked_axes(w):
    return own
  inputs, outputs = own[: w.fan_in], own[w.fan_in :]
  return (math.prod(outputs), math.prod(inputs)) if w.fan_in else (math.prod(outputs),)


def flat_slice(shape: Sequence[int], at: Slices) -> slice:
  """The part of the axes, flattened into one, that `at` selects: of the first a part, of the others all."""
  parts = [part.indices(size)[:2] for part, size in zip(at, shape, strict=True)]
  assert all(part == (0, size) for part, size in zip(parts[1:], shape[1:])), (shape, at)
  rest = math.prod(shape[1:])
  return slice(parts[0][0] * rest, parts[0][1] * rest)


def read_part(w: Weight, tensors: Mapping[str, Tensor], index: Slices) -> np.ndarray:
  """float32: the part of a weight that `index` selects, read slice by slice."""
  front = stacked_axes(w)
  x = np.empty([len(range(*part.indices(size))) for part, size in zip(index, w.shape, strict=True)], np.float32)
  own, at, names = w.shape[front:], index[front:], parts_of(w)
  if not front:
    return tensors[w.hf].read(tuple(slice(*part.indices(size)) for part, size in zip(at, own))).astype(np.float32, copy=False)
  inputs, outputs = slice(0, w.fan_in), slice(w.fan_in, None)
  rows = flat_slice(own[outputs], at[outputs])
  stored = (rows, flat_slice(own[inputs], at[inputs])) if w.fan_in else (rows,)
  chosen = [range(*part.indices(size)) for part, size in zip(index[:front], w.shape)]
  for n in np.ndindex(*x.shape[:front]):
    part = tensors[names[tuple(numbers[i] for numbers, i in zip(chosen, n))]].read(stored)
    x[n] = (part.T if w.fan_in else part).reshape(x.shape[front:])
  return x


def check_tensors(path: str, arch: Arch, heads: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
  """Exactly the weights of the table, in their shapes; beside them only what the family's list of names ignores, and a copy of a tied
  embedding."""
  table = jax.tree.leaves(model.weight_table(arch, heads), is_leaf=model.is_weight)
  expected = {name: hf_shape(w) for w in table for name in parts_of(w).values()}
  missing = [name for name in expected if name not in tensors]
  check(not missing, f'{path}: {len(missing)} weights are missing: {", ".join(missing[:4])}{", ..." * (len(missing) > 4)}')
  for name, shape in expected.items():
    file, found, _ = tensors[name]
    check(found == shape, f'{file}: tensor {name} has shape {found}, the architecture needs {shape}')
  ignored = re.compile(families.ignored(arch))
  unused = [name for name in tensors if name not in expected and not ignored.fullmatch(name)]
  head, embed = tensors.get('lm_head.weight'), tensors['model.embed_tokens.weight']
  if arch.tie_word_embeddings and head is not None:
    unused.remove('lm_head.weight')
    blocks = [(slice(row, min(row + 4096, embed.shape[0])), slice(0, embed.shape[1])) for row in range(0, embed.shape[0], 4096)]
    same = head.shape == embed.shape and all(np.array_equal(head.read(at), embed.read(at)) for at in blocks)
    check(same, f'{head.file}: tensor lm_head.weight differs from the embedding that tie_word_embeddings ties it to')
  if unused:
    more = ', ...' * (len(unused) > 4)
    raise ConfigError(f'{tensors[unused[0]].file}: {len(unused)} tensors that no weight reads: {", ".join(unused[:4])}{more}')


def open_tensors(path: str, arch: Arch) -> dict[str, Tensor]:
  """The tensors of a folder or file under the names of the weight table; nothing is read yet."""
  return gguf_tensors(path, arch) if is_gguf(path) else our_names(safetensors_tensors(pathlib.Path(path)), arch)


HOST_BYTES = 2**27


@functools.partial(jax.jit, donate_argnums=0)
def written(whole: jax.Array, piece: jax.Array, start: Sequence[int]) -> jax.Array:
  return jax.lax.dynamic_update_slice(whole, piece, [*start, *(0,) * (whole.ndim - len(start))])


def pieces(w: Weight, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Slices]]:
  """(start, slices) along the leading axes of a part of a weight, of at most HOST_BYTES, or of one tensor, or row, each."""
  row, axes = 4 * math.prod(shape[1:]), 1
  if stacked_axes(w) == 2 and row > HOST_BYTES:  # one layer at a time, of whose experts as many as there is room for
    row, axes = 4 * math.prod(shape[2:]), 2
  count = max(1, HOST_BYTES // max(1, row))
  for front in np.ndindex(*shape[: axes - 1]):
    for start in range(0, shape[axes - 1], count):
      stop = min(start + count, shape[axes - 1])
      yield (*front, start), (*(slice(n, n + 1) for n in front), slice(start, stop))


def put_part(w: Weight, tensors: Mapping[str, Tensor], index: Slices, devices: Sequence[Any]) -> list[jax.Array]:
  """The part of a weight that `index` selects, on every one of the devices."""
  bounds = [part.indices(size)[:2] for part, size in zip(index, w.shape, strict=True)]
  shape, parts = [stop - start for start, stop in bounds], []
  for start, own in pieces(w, shape):
    at = [slice(bounds[axis][0] + part.start, bounds[axis][0] + part.stop) for axis, part in enumerate(own)]
    x = read_part(w, tensors, (*at, *(slice(*bound) for bound in bounds[len(at) :])))
    if list(x.shape) == shape:
      return [jax.device_put(x, device) for device in devices]
    parts = parts or [jnp.zeros(shape, x.dtype, device=device) for device in devices]
    parts = [written(part, jax.device_put(x, device), start) for part, device in zip(parts, devices, strict=True)]
    jax.block_until_ready(parts)  # else pieces that wait for their device pile up
  return parts


def load(path: str, arch: Arch, shardings: PyTree | None = None, heads: tuple[str, ...] = ('lm',)) -> PyTree:
  """The parameters, float32, from a Hugging Face folder or a GGUF file, onto `shardings` (None: the default device), piece by piece: the
  host holds HOST_BYTES of them, or one tensor, at a time.

  Of `heads` those that the source has (see `source_heads`): one that it lacks is the caller's to make, one that is not asked for is left
  out. `shardings` are those of what is returned.
  """
  tensors, source = open_tensors(path, arch), source_heads(path)
  check_tensors(path, arch, source, tensors)

  def put(w: Weight, sharding=None) -> jax.Array:
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharers: dict[str, tuple[Any, list]] = {}  # a part that several devices hold is read once
    for device, index in sharding.addressable_devices_indices_map(w.shape).items():
      sharers.setdefault(str(index), (index, []))[1].append(device)
    parts = [part for index, devices in sharers.values() for part in put_part(w, tensors, index, devices)]
    return jax.make_array_from_single_device_arrays(w.shape, sharding, parts)

  table = model.weight_table(arch, tuple(head for head in heads if head in source))
  trees = (table,) + (() if shardings is None else (shardings,))
  with jax.ensure_compile_time_eval():  # under a trace too: device_put would give tracers, of which no array is made
    return jax.tree.map(put, *trees, is_leaf=model.is_weight)


def has_tokenizer(path: str) -> bool:
  return is_gguf(path) or any(
    (pathlib.Path(path) / name).is_file() for name in TOKENIZER_FILES if name != 'generation_config.json'
  )


def save_tokenizer(name: str, folder: pathlib.Path) -> None:
  source, added = tokenizer.parts(name)
  files = [] if is_gguf(source) else [file for name in TOKENIZER_FILES if (file := pathlib.Path(source) / name).is_file()]
  check(is_gguf(source) or bool(files), f'{source}: no tokenizer files')
  for file in files:
    shutil.copyfile(file, folder / file.name)
  settings = folder / 'generation_config.json'
  if not added and settings.is_file():
    return
  tok = tokenizer.HFTokenizer(source, added)
  if added or not files:
    tok.inner.save_pretrained(folder)
  if not settings.is_file():  # without it, who generates does not know where to stop
    ends = tok.end_ids[0] if len(tok.end_ids) == 1 else list(tok.end_ids)
    ids = {'bos_token_id': tok.inner.bos_token_id, 'eos_token_id': ends, 'pad_token_id': tok.inner.pad_token_id}
    settings.write_text(json.dumps({key: value for key, value in ids.items() if value is not None}, indent=1) + '\n')


def padding_of_its_own(folder: pathlib.Path) -> int | None:
  """The id of the padding token of a saved model's tokenizer; None where it has no token to spare.

  A sequence classifier reads its score at the last token that is no padding, by id: where the tokenizer pads with the end token, as many
  do, that would be the token before the end. The files then get another special token as padding.
  """
  tok = tokenizer.HFTokenizer(str(folder))  # of which class it is, and so what it adds, goes by config.json
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


DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}


def published(params: PyTree, table: PyTree, arch: Arch, dtype: str = 'float32') -> Iterator[tuple[str, np.ndarray]]:
  """The tensors under the family's names, one after another: the host holds one of them at a time."""
  _, theirs = families.rename(families.family_of(arch))
  fused = {name: (joined, list(parts)) for joined, parts in fused_parts(arch).items() for name in parts}
  waiting: dict[str, np.ndarray] = {}
  weights = zip(
    jax.tree.leaves(table, is_leaf=model.is_weight), jax.tree.leaves({name: params[name] for name in table}), strict=True
  )
  for w, stacked in weights:
    shape = hf_shape(w)
    for n, name in parts_of(w).items():
      with np.errstate(over='ignore'):
        x = np.asarray(stacked[n], np.float32 if name.endswith(EXACT) else DTYPES[dtype])
      check(dtype != 'float16' or bool(np.isfinite(x).all()), f'{theirs(name)}: numbers beyond those of float16; use bfloat16')
      x = np.ascontiguousarray(x.reshape(shape[::-1]).T if w.fan_in else x.reshape(shape))
      if name not in fused:
        yield theirs(name), x
        continue
      waiting[name], (joined, parts) = x, fused[name]
      if all(part in waiting for part in parts):
        yield theirs(joined), np.concatenate([waiting.pop(part) for part in parts])


EXACT = 'mlp.gate.e_score_correction_bias'  # float32 in bfloat16 checkpoints, too
SHARD_BYTES = 5 * 2**30  # as transformers splits files


def write_tensors(tensors: Iterator[tuple[str, np.ndarray]], folder: pathlib.Path, shard_bytes: int = SHARD_BYTES) -> None:
  """model.safetensors, or, where there is more than `shard_bytes`, parts of at most that and the index that names them."""
  import safetensors.numpy

  files: list[list[str]] = []
  held: dict[str, np.ndarray] = {}
  total = size = 0

  def write() -> None:
    safetensors.numpy.save_file(held, folder / f'part{len(files)}', metadata={'format': 'pt'})
    files.append(list(held))
    held.clear()

  for name, x in tensors:
    if held and size + x.nbytes > shard_bytes:
      write()
      size = 0
    held[name] = x
    size += x.nbytes
    total += x.nbytes
  write()
  if len(files) == 1:
    (folder / 'part0').rename(folder / 'model.safetensors')
    return
  names = [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
  for i, name in enumerate(names):
    (folder / f'part{i}').rename(folder / name)
  index = {'metadata': {'total_size': total}, 'weight_map': {t: name for name, own in zip(names, files) for t in own}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


def save(
  params: PyTree,
  arch: Arch,
  path: str,
  tokenizer_path: str | None = None,
  heads: tuple[str, ...] = ('lm',),
  score_shift: float = 0.0,
  dtype: str = 'float32',
) -> None:
  """Writes a Hugging Face folder that transformers reads; all of it or nothing. `tokenizer_path`: as of
  tokenizer.load, but for bytes. `dtype`: one of
  DTYPES.

  With heads ('scalar',) it is a sequence classifier, of which transformers gives the scores before the shift. Without a tokenizer it knows
  no padding, and transformers refuses batches of several rows.
  """
  check(len(heads) == 1, f'{path}: transformers has no class with the heads {", ".join(heads)}: save one')
  check(dtype in DTYPES, f'{path}: dtype {dtype!r} is none of {", ".join(DTYPES)}')
  config, table = families.hf_config(arch, heads[0]), model.weight_table(arch, heads)
  families.check_exports(arch, config)
  config |= {'dtype': dtype}
  if heads == ('scalar',):
    config |= {
      'num_labels': 1,
      'id2label': {'0': 'LABEL_0'},
      'label2id': {'LABEL_0': 0},
      'problem_type': 'regression',
      'pad_token_id': None,
      'score_shift': score_shift,
    }
  with new_folder(path) as part:

    def write_config(**more):
      (part / 'config.json').write_text(json.dumps({**config, **more}, indent=2) + '\n')

    write_config()
    write_tensors(published(params, table, arch, dtype), part)
    if tokenizer_path:
      save_tokenizer(tokenizer_path, part)
    if heads == ('scalar',) and tokenizer_path:
      write_config(pad_token_id=padding_of_its_own(part))


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[pathlib.Path]:
  """A folder that is there when it is whole. Raises ConfigError where there is something already."""
  target = pathlib.Path(path).absolute()
  check(not os.path.lexists(target), f'{path}: exists already')
  part = target.with_name(f'.{target.name}.{os.getpid()}.part')
  part.mkdir(parents=True)
  try:
    yield part
    part.rename(target)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def save_adapter(
  adapter: PyTree, arch: Arch, settings: Lora, path: str, base: str, heads: tuple[str, ...] = ('lm',), dtype: str = 'float32'
) -> None:
  """Writes the folder of an adapter that peft loads beside the model `base`, a classifier beside one of num_labels=1; all of it or nothing.

  Raises ConfigError for projections that are fused in transformers, of which an adapter of a part is none, and for adapters of dense
  layers beside experts: peft takes every .gate_proj, .up_proj and .down_proj of such a model for one of an expert.
  """
  family = families.family_of(arch)
  table = lora.table(model.weight_table(arch, heads), settings)
  _, theirs = families.rename(family)
  rows = jax.tree.leaves({stack: own for stack, own in table.items() if stack != 'score'}, is_leaf=model.is_weight)
  modules = dict.fromkeys(name.rpartition('.lora_')[0] for w in rows for name in parts_of(w).values())
  joined = {part.removesuffix('.weight') for parts in fused_parts(arch).values() for part in parts} & modules.keys()
  for module in sorted(joined):
    raise ConfigError(
      f'{path}: the adapter of {module}: {family} has it in one matrix with others, where it is no adapter: merge it'
    )
  for module in modules if arch.num_experts else ():
    check(
      '.mlp.' not in module,
      f'{path}: the adapter of {module}: peft takes it for one of an expert: merge it, or adapt attention alone',
    )
  config = {
    'peft_type': 'LORA', 'task_type': 'SEQ_CLS' if heads == ('scalar',) else 'CAUSAL_LM', 'base_model_name_or_path': base,
    'r': settings.rank, 'lora_alpha': settings.alpha, 'lora_dropout': 0.0, 'bias': 'none', 'inference_mode': True,
    'target_modules': [theirs(name) for name in modules], 'modules_to_save': ['score'] if 'score' in table else None,
  }  # fmt: skip
  with new_folder(path) as part:
    (part / 'adapter_config.json').write_text(json.dumps(config, indent=2) + '\n')
    tensors = ((f'base_model.model.{name}', x) for name, x in published(adapter, table, arch, dtype))
    write_tensors(tensors, part, sys.maxsize)
    (part / 'model.safetensors').rename(part / 'adapter_model.safetensors')
