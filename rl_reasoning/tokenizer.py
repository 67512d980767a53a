"""Text <-> token ids: Hugging Face tokenizers, a byte tokenizer for models of our own, chat templates, prompt / think / answer.

A tokenizer here is anything with `encode`, `decode`, `chat`, `vocabulary`, `end_id`, `end_ids`, `pad_id` and `vocab_size`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rl_reasoning.config import check
from rl_reasoning.verify.math import answer_elements

TEMPLATES = {
  'plain': '{prompt}',
  # DeepSeek-R1-Zero's template (2501.12948, table 1).
  'r1_zero': (
    'A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks '
    'about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are '
    'enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> '
    '<answer> answer here </answer>. User: {prompt}. Assistant:'
  ),
}
# 'chat' hands the prompt to the tokenizer's chat template as one user turn; 'chat_think' also asks for the tags.
THINK_INSTRUCTION = (
  '\nThink step by step inside <think> and </think>, then give only the final answer inside <answer> and </answer>.'
)


class Tokenizer(Protocol):
  end_id: int  # what ends a completion that is imitated
  end_ids: tuple[int, ...]  # every id that ends a sampled one
  pad_id: int
  vocab_size: int

  def encode(self, text: str) -> list[int]: ...
  def decode(self, ids: Sequence[int]) -> str: ...
  def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str: ...
  def vocabulary(self) -> dict[str, int]: ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, and one id each for the tags of reasoning, so that a tiny model needs no merges."""

  specials = ('<pad>', '<end>', '<think>', '</think>', '<answer>', '</answer>', '<user>', '<assistant>')

  def __init__(self):
    self.ids = {text: 256 + i for i, text in enumerate(self.specials)}
    self.texts = {i: text for text, i in self.ids.items()}
    self.split = re.compile('(' + '|'.join(map(re.escape, self.specials)) + ')')
    self.pad_id, self.end_id = self.ids['<pad>'], self.ids['<end>']
    self.end_ids = (self.end_id,)
    self.vocab_size = 256 + len(self.specials)

  def encode(self, text: str) -> list[int]:
    ids: list[int] = []
    for part in self.split.split(text):
      ids.extend([self.ids[part]] if part in self.ids else part.encode())
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """The end token and padding are left out; ids past the vocabulary (padded embeddings) show as U+FFFD."""
    out, run = [], bytearray()
    for i in map(int, ids):
      if i < 256:
        run.append(i)
        continue
      out.append(run.decode(errors='replace'))
      run.clear()
      if i != self.pad_id and i not in self.end_ids:
        out.append(self.texts.get(i, '\ufffd'))
    return ''.join(out) + run.decode(errors='replace')

  def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    text = ''.join(f'<{"assistant" if m["role"] == "assistant" else "user"}>{m["content"]}<end>' for m in messages)
    return text + '<assistant>' * add_generation_prompt

  def vocabulary(self) -> dict[str, int]:
    return {**{f'<0x{i:02X}>': i for i in range(256)}, **self.ids}


class HFTokenizer:
  """A transformers tokenizer from a folder or a GGUF file; end ids from it AND from generation_config. `added`: further tokens, which come
  out of text as one id each. Like the tags of published reasoning models they are not special: whoever decodes without special tokens
  still sees them."""

  def __init__(self, path: str, added: Sequence[str] = ()):
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # it advises PyTorch, which nothing here needs
    import transformers

    if path.endswith('.gguf'):
      from rl_reasoning.gguf_tokenizer import load_gguf_tokenizer

      self.inner, more = load_gguf_tokenizer(path)
    else:
      self.inner: Any = transformers.AutoTokenizer.from_pretrained(path)
      more = generation_end_ids(pathlib.Path(path))
    own = () if self.inner.eos_token_id is None else (self.inner.eos_token_id,)
    self.end_ids = tuple(sorted({*own, *more}))
    if not self.end_ids:
      raise ValueError(f'tokenizer {path!r}: no end id, neither in the tokenizer nor in generation_config')
    self.end_id = own[0] if own else self.end_ids[0]
    self.pad_id = self.inner.pad_token_id if self.inner.pad_token_id is not None else self.end_ids[0]
    if added:
      self.inner.add_tokens([transformers.AddedToken(token, normalized=False, special=False) for token in added])
    for token in added:
      if len(self.encode(token)) != 1:
        raise ValueError(f'tokenizer {path!r}: {token!r} cannot be added: it comes out as {self.encode(token)}')
    self.vocab_size = max(len(self.inner), 1 + max(self.inner.get_vocab().values()))

  def encode(self, text: str) -> list[int]:
    return self.inner.encode(text, add_special_tokens=False)

  def decode(self, ids: Sequence[int]) -> str:
    ids = [int(i) for i in ids if int(i) not in self.end_ids]
    return self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    return self.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)

  def vocabulary(self) -> dict[str, int]:
    return self.inner.get_vocab()


def generation_end_ids(folder: pathlib.Path) -> tuple[int, ...]:
  """What ends a text besides the tokenizer's own end token: as generation_config.json says, or config.json where there is none."""
  for name in ('generation_config.json', 'config.json'):
    if (folder / name).is_file():
      try:
        ids = json.loads((folder / name).read_text()).get('eos_token_id')
      except (ValueError, AttributeError) as error:
        raise ValueError(f'{folder / name}: no JSON object: {error}') from None
      return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
  return ()


def parts(name: str) -> tuple[str, tuple[str, ...]]:
  """'FOLDER + <think> </think>' -> (FOLDER, the tokens that are added to its own)."""
  source, _, added = name.partition(' + ')
  return source, tuple(added.split())


def load(name: str) -> Tokenizer:
  """'bytes', a folder, or a .gguf file; of the latter two also with tokens to add, see `parts`."""
  source, added = parts(name)
  if source == 'bytes' and added:
    raise ValueError(f"tokenizer {name!r}: 'bytes' takes no further tokens")
  return ByteTokenizer() if source == 'bytes' else HFTokenizer(str(pathlib.Path(source).expanduser()), added)


def check_template(template: str) -> None:
  known = [*TEMPLATES, 'chat', 'chat_think']
  check(template in known or '{prompt}' in template,
        f"config key 'roles.policy.template': {template!r} is none of {', '.join(known)}, and no text with {{prompt}}")  # fmt: skip


def render_prompt(prompt: str | Sequence[Mapping[str, str]], template: str, tokenizer: Tokenizer) -> str:
  """A prompt column (text, or chat messages) as the text the model continues."""
  if not isinstance(prompt, str):
    check(
      template in ('plain', 'chat'), f"config key 'roles.policy.template': {template!r} cannot act on a prompt of chat messages"
    )
    return tokenizer.chat(prompt, True)
  if template in ('chat', 'chat_think'):
    content = prompt + THINK_INSTRUCTION * (template == 'chat_think')
    return tokenizer.chat([{'role': 'user', 'content': content}], True)
  check_template(template)
  return TEMPLATES.get(template, template).replace('{prompt}', prompt)


def render_completion(row: Mapping[str, Any]) -> str:
  """The text to imitate: chain of thought inside think tags and the answer inside answer tags where a row has both columns (an empty
  chain leaves the thinking out), else the completion as it stands."""
  chain = row.get('chain_of_thought')
  if chain is None:
    return row['completion']
  return f'<think>{chain}</think>' * bool(chain) + f'<answer>{row["completion"]}</answer>'


def render_messages(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
  """(text, imitate it?) pieces of a conversation: every assistant turn, its end token included, is imitated."""
  pieces, done = [], ''
  for index, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    context, whole = tokenizer.chat(messages[:index], True), tokenizer.chat(messages[: index + 1], False)
    if not (context.startswith(done) and whole.startswith(context)):
      raise ValueError('the chat template rewrites earlier turns: split the conversation into one row a turn')
    pieces += [(context[len(done) :], False), (whole[len(context) :], True)]
    done = whole
  if not pieces:
    raise ValueError('messages: no assistant turn to imitate')
  return pieces


def split_thinking(text: str) -> tuple[str, str] | None:
  """(thinking, what follows) of a text with one </think>; its <think> may stand in the prompt. None for any other text."""
  think, closed, rest = text.partition('</think>')
  think = think.lstrip().removeprefix('<think>')
  return None if not closed or '</think>' in rest or '<think>' in think + rest else (think.strip(), rest.strip())


class Parts(NamedTuple):
  think: str | None
  answer: str | None  # inside <answer>, after the thinking; None unless there is exactly one such element
  well_formed: bool


WELL_FORMED = re.compile(r'\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*', re.DOTALL)
TAGS = ('<think>', '</think>', '<answer>', '</answer>')


def from_thinking(prompt: Any, completion: str) -> str:
  """The completion with the <think> that its prompt has opened already, where the prompt (a text) ends in one."""
  return '<think>' * (isinstance(prompt, str) and prompt.rstrip().endswith('<think>')) + completion


def after_thinking(rendered: str, completion: str) -> str:
  """The reverse: a whole completion without the <think> that its rendered prompt has opened already."""
  return completion.removeprefix('<think>') if rendered.rstrip().endswith('<think>') else completion


def split_completion(text: str) -> Parts:
  """A completion into chain of thought and answer."""
  well_formed = all(text.count(tag) == 1 for tag in TAGS) and bool(WELL_FORMED.fullmatch(text))
  think, closed, rest = text.partition('</think>')
  answers = answer_elements(rest if closed or '<think>' in text else text)
  return Parts(think.replace('<think>', '') if closed else None, answers[0] if len(answers) == 1 else None, well_formed)
