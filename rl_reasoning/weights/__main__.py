"""What weights are, and from one format to another.

  python -m rl_reasoning.weights inspect SRC
  python -m rl_reasoning.weights convert SRC DST [--dtype=bfloat16] [--adapter] [--tokenizer=FOLDER]

SRC: a run of ours, a Hugging Face folder, or a .gguf file. DST: a folder that transformers reads; with --adapter one that peft reads beside
the weights that a run with lora.rank adapts. Exit codes: 0, 2.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence

from rl_reasoning import lora, model, resolution, stored, tensors, tokenizer, weights
from rl_reasoning.arch import Arch
from rl_reasoning.config import Parser, Role, check, exit_code, one_line
from rl_reasoning.gguf_tokenizer import open_gguf


def size(count: float) -> str:
  """Bytes as people read them."""
  power = min(4, int(math.log(max(count, 1), 1024)))
  return f'{count / 1024**power:.1f} {("B", "KiB", "MiB", "GiB", "TiB")[power]}'


def tensors_by_dtype(source: str) -> dict[str, tuple[int, int]]:
  """dtype -> (tensors, numbers) of a folder or file."""
  found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  kinds = (
    ((t.tensor_type.name, int(t.n_elements)) for t in open_gguf(source).tensors)
    if weights.is_gguf(source)
    else ((kind, math.prod(shape)) for kind, shape in tensors.stored_kinds(pathlib.Path(source)))
  )
  for kind, count in kinds:
    found[kind][0] += 1
    found[kind][1] += count
  return {kind: (count, numbers) for kind, (count, numbers) in sorted(found.items())}


def cache_numbers(arch: Arch) -> int:
  """Numbers that a token leaves in the cache, all layers together; of layers with a window the cache holds all, too."""
  latent, heads = arch.kv_lora_rank + arch.qk_rope_head_dim, 2 * arch.num_key_value_heads * arch.head_dim
  return arch.num_hidden_layers * (latent if arch.kv_lora_rank else heads)


def about_architecture(arch: Arch) -> Iterator[str]:
  for field in dataclasses.fields(arch):
    value = getattr(arch, field.name)
    if field.default is dataclasses.MISSING or value != field.default:
      yield f'  {field.name}: {value}'


def inspect(source: str) -> Iterator[str]:
  check(pathlib.Path(source).exists(), f'{source}: does not exist')
  ours, arch, heads = stored.is_run(source), stored.read_arch(source), stored.heads_in(source)
  kind = 'a run of ours' if ours else 'a GGUF file' if weights.is_gguf(source) else 'a Hugging Face folder'
  yield f'{source}: {kind}, head for {" and ".join({"lm": "text", "scalar": "a score"}[head] for head in heads)}'
  yield 'architecture (what is not named is at its default):'
  yield from about_architecture(arch)
  table = model.weight_table(arch, heads)
  total, active = model.count(table), model.count(table, arch)
  yield f'parameters: {total:,}' + (f', of which a token meets {active:,}' if active != total else '')
  if ours:
    settings = stored.adapters_of(source)
    if settings.rank:
      trained = model.count(lora.table(table, settings))
      yield f'adapters: rank {settings.rank}, alpha {settings.alpha:g}, {trained:,} parameters ({size(4 * trained)}), of '\
            f'{stored.run_config(source, "roles", "policy", "init")}'  # fmt: skip
      yield f'memory of training: {size(4 * total + 16 * trained)} with these adapters'
  else:
    weights.check_tensors(source, arch, heads, weights.open_tensors(source, arch))
    for name, (count, numbers) in tensors_by_dtype(source).items():
      yield f'stored: {count} tensors of {name}, {numbers:,} numbers'
    yield 'every tensor is accounted for, in its shape'
  yield f'memory: weights {size(4 * total)} in float32, {size(2 * total)} in bfloat16; trained in full by AdamW {size(16 * total)}'
  yield f'cache: {size(2 * cache_numbers(arch))} a token in bfloat16'
  yield from about_tokenizer(source, arch)


def about_tokenizer(source: str, arch: Arch) -> Iterator[str]:
  name = resolution.resolve_tokenizer(Role(source))
  try:
    tok = tokenizer.load(name)
  except Exception as error:  # transformers raises all kinds
    yield f'tokenizer: {name} cannot be read: {one_line(error)}'
    return
  inner = getattr(tok, 'inner', None)
  template = 'a' if getattr(inner, 'chat_template', None) else 'no'
  more = '' if tok.vocab_size <= arch.vocab_size else f', MORE than the {arch.vocab_size:,} embeddings'
  yield f'tokenizer: {tok.vocab_size:,} ids{more}, ends at {sorted(tok.end_ids)}, {template} chat template'


def convert(source: str, target: str, dtype: str, adapter: bool, tokenizer_path: str | None) -> None:
  check(pathlib.Path(source).exists(), f'{source}: does not exist')
  if stored.is_run(source):
    check(tokenizer_path is None, '--tokenizer: a run of ours knows its own')
    stored.export(source, target, dtype, adapter)
    if adapter:
      base, shift = stored.run_config(source, 'roles', 'policy', 'init'), stored.score_shift(source)
      if stored.is_run(base) or weights.is_gguf(base):
        print(f'{base}, which they adapt, is nothing that peft opens: convert it, too, and load {target} beside that')
      if shift:
        print(f'peft gives the scores before the shift of {-shift:+g}')
    return
  check(not adapter, f'--adapter: {source} is no run of ours')
  arch, heads = weights.read_arch(source), weights.source_heads(source)
  shift = weights.score_shift(source) if 'scalar' in heads else 0.0
  if not tokenizer_path and weights.has_tokenizer(source):
    tokenizer_path = source
  if tokenizer_path:
    size = resolution.open_tokenizer('--tokenizer', tokenizer_path).vocab_size
    check(size <= arch.vocab_size, f'the tokenizer {tokenizer_path} has {size} ids, {source} {arch.vocab_size} embeddings')
  weights.save(weights.load(source, arch, heads=heads), arch, target, tokenizer_path, heads, shift, dtype)
  if not tokenizer_path:
    print(f'{source} has no tokenizer, so {target} has none; --tokenizer names one')


def command(argv: Sequence[str]) -> None:
  parser = Parser(prog='python -m rl_reasoning.weights', allow_abbrev=False, description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
  commands = parser.add_subparsers(dest='command', required=True)
  one = commands.add_parser('inspect', help='architecture, parameters, dtypes, memory, tokenizer')
  one.add_argument('source', metavar='SRC')
  two = commands.add_parser('convert', help='write a folder that transformers, or peft, reads')
  two.add_argument('source', metavar='SRC')
  two.add_argument('target', metavar='DST')
  two.add_argument('--dtype', choices=tuple(weights.DTYPES), default='float32')
  two.add_argument('--adapter', action='store_true', help='the adapters alone')
  two.add_argument('--tokenizer', help='a folder or .gguf file; default: that of SRC')
  flags = parser.parse_args(argv)
  if flags.command == 'inspect':
    print('\n'.join(inspect(flags.source)))
  else:
    convert(flags.source, flags.target, flags.dtype, flags.adapter, flags.tokenizer)


if __name__ == '__main__':
  sys.exit(exit_code(command, sys.argv[1:]))
