"""The tokenizer inside a GGUF file, and how GGUF metadata is read.

A byte-level BPE is given by its vocabulary, its ordered merges and its pre-tokenizer. The file holds the first two; the third it only
names (`tokenizer.ggml.pre`), so each name needs its entry in PRE.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from rl_reasoning.config import ConfigError, check

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: matched in text before any merge


@functools.lru_cache(maxsize=1)
def read_gguf(path: str, mtime: int):
  import gguf

  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # the parser meets bad bytes in whatever way numpy and struct do
    raise ConfigError(f'{path}: truncated or no GGUF file: {error}') from None


def open_gguf(path: str):
  """gguf.GGUFReader, the last one kept: a run reads architecture, weights and tokenizer from one file."""
  check(os.path.isfile(path), f'{path}: no such file')
  return read_gguf(path, os.stat(path).st_mtime_ns)


REQUIRED = object()
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def metadata(path: str, key: str, default: Any = REQUIRED) -> Any:
  field = open_gguf(path).get_field(key)
  check(field is not None or default is not REQUIRED, f'{path}: no metadata key {key!r}')
  return default if field is None else field.contents()


def pre_tokenizers() -> dict[str, Any]:
  from tokenizers import Regex, pre_tokenizers as pre

  byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=True)

  def split_at(digits: str) -> Any:  # as their tokenizer.json has it
    pattern = PATTERN.replace('DIGITS', digits)
    return pre.Sequence([pre.Split(Regex(pattern), 'isolated'), pre.ByteLevel(add_prefix_space=False, use_regex=False)])

  return {
    'smollm': pre.Sequence([pre.Digits(individual_digits=True), byte_level]),
    'qwen2': split_at(r'\p{N}'),
    'deepseek-r1-qwen': split_at(r'\p{N}'),  # of the models distilled into Qwen 2.5
    'llama-bpe': split_at(r'\p{N}{1,3}'),
  }


def load_gguf_tokenizer(path: str):
  """(transformers.PreTrainedTokenizerFast of the file's own vocabulary, merges, special tokens and chat template; ids that end a turn)."""
  import tokenizers
  import transformers

  kind, pre, known = metadata(path, 'tokenizer.ggml.model'), metadata(path, 'tokenizer.ggml.pre'), pre_tokenizers()
  elsewhere = 'name a folder with the tokenizer (roles.policy.tokenizer)'
  check(kind == 'gpt2', f"{path}: tokenizer model {kind!r} is not 'gpt2' (byte-level BPE): {elsewhere}")
  check(pre in known, f'{path}: pre-tokenizer {pre!r} is none of {", ".join(known)}: {elsewhere}')
  tokens, types = metadata(path, 'tokenizer.ggml.tokens'), metadata(path, 'tokenizer.ggml.token_type')
  merges = [tuple(merge.split(' ')) for merge in metadata(path, 'tokenizer.ggml.merges')]
  check(len(types) == len(tokens), f'{path}: {len(types)} values of tokenizer.ggml.token_type for {len(tokens)} tokens')
  try:
    ids = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, whatever the merges come to.
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=pre == 'llama-bpe'))
  except Exception as error:  # tokenizers raises plain Exception: a merge of tokens that are not there
    raise ConfigError(f'{path}: tokenizer.ggml.merges: {error}') from None
  inner.pre_tokenizer, inner.decoder = known[pre], tokenizers.decoders.ByteLevel()
  if pre == 'qwen2':  # as its tokenizer.json has it
    inner.normalizer = tokenizers.normalizers.NFC()
  added = [
    tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
    for token, kind in zip(tokens, types, strict=True)
    if kind in (CONTROL, USER_DEFINED)
  ]
  inner.add_tokens(added)
  special = {}
  for role, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'), ('unk', 'unknown')):
    index = metadata(path, f'tokenizer.ggml.{key}_token_id', None)
    if index is not None:
      check(index < len(tokens), f'{path}: tokenizer.ggml.{key}_token_id is {index}, there are {len(tokens)} tokens')
      special[f'{role}_token'] = tokens[index]
  result = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
  result.chat_template = metadata(path, 'tokenizer.chat_template', None)
  turn = metadata(path, 'tokenizer.ggml.eot_token_id', None)
  return result, () if turn is None else (int(turn),)
