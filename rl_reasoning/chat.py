"""A conversation with a checkpoint in the terminal: tokens as they come, the thinking folded.

Every turn of the person is a line. /unfold shows the thinking from now on, /fold hides it, /new forgets the conversation, /quit ends it.
With a chat template the model sees the turns before, its own without their thinking, as R1's template has it; with any other template
every question stands alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

import jax
import numpy as np

from rl_reasoning import rollout, rounds, sharding
from rl_reasoning.build import Run
from rl_reasoning.config import Rollout
from rl_reasoning.metrics import printable
from rl_reasoning.structs import PyTree
from rl_reasoning.tokenizer import THINK_INSTRUCTION, Tokenizer, from_thinking, render_prompt

PACE = 4  # tokens between two looks at what has come
HELP = '/unfold shows the thinking, /fold hides it, /new forgets what was said, /quit ends'


class Talker(NamedTuple):
  run: Run
  params: PyTree
  settings: Rollout
  seed: int


def stream(talker: Talker, prompt: list[int], turn: int) -> Iterator[list[int]]:
  """The ids of one completion as far as there are any, again and again until it is whole. They are those of rollout.generate with the key
  of the turn."""
  run = talker.run
  copies = sharding.axis_size(run.mesh, 'rows')  # rows divide over the mesh
  states = rollout.decoding(
    talker.params, run.arch, [prompt] * copies, settings=talker.settings, group=1, end_ids=run.tokenizer.end_ids,
    key=jax.random.fold_in(jax.random.key(talker.seed), turn), dtype=run.config.model.dtype, mesh=run.mesh, prompt_ids=[0] * copies,
    pace=PACE,
  )  # fmt: skip
  for state in states:
    count, tokens, done = jax.device_get((state.t, state.tokens[0, 0], state.done[0, 0]))
    if done:
      count = 1 + int(np.argmax(np.isin(tokens, run.tokenizer.end_ids)))
    yield tokens[:count].tolist()


class Parts(NamedTuple):
  """A completion so far. Before it is clear whether it begins by thinking, both texts are empty."""

  thinking: str | None
  closed: bool  # whether the thinking has ended, or there is none
  answer: str


def parts(prompt: str, text: str) -> Parts:
  whole = from_thinking(prompt, text)
  begun = whole.lstrip()
  if begun.startswith('<think>'):
    thinking, closed, answer = begun.removeprefix('<think>').partition('</think>')
    return Parts(thinking, bool(closed), answer.lstrip('\n'))
  if '<think>'.startswith(begun):
    return Parts(None, False, '')
  return Parts(None, True, whole)


def settled(text: str, tag: str = '') -> str:
  """Without what the next tokens may change: half a character, the beginning of the tag."""
  text = text.rstrip('\ufffd')
  cut = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
  return text[: len(text) - cut]


def say(states: Iterable[list[int]], prompt: str, tokenizer: Tokenizer, out: TextIO, *, unfold: bool, live: bool) -> str:
  """Shows a completion as it comes, and returns its text. Folded thinking is one line, 'thinking… N tokens', which counts up where the
  screen is `live`. An interruption ends the completion where it is."""
  text, ids, shown, thought = '', [], {'thinking': 0, 'answer': 0}, False

  def more(kind: str, whole: str) -> None:
    out.write(printable(whole[shown[kind] :]))
    shown[kind] = max(shown[kind], len(whole))

  def show(final: bool) -> None:
    nonlocal thought
    thinking, closed, answer = parts(prompt, text)
    if not thinking and not closed and final:
      answer = text  # the beginning of a tag, and no more
    if thinking is not None and not thought:
      over = closed or final
      if unfold:
        more('thinking', thinking if over else settled(thinking, '</think>'))
      if over:
        count = rounds.before(tokenizer, ids, '</think>') if closed else len(ids)
        out.write('\n' * unfold + '\r\033[K' * live + f'thinking… {count} tokens\n')
        thought = True
      elif live and not unfold:
        out.write(f'\r\033[Kthinking… {len(ids)} tokens')
    more('answer', answer if final else settled(answer))
    out.flush()

  try:
    for ids in states:
      text = tokenizer.decode(ids)
      show(False)
  except KeyboardInterrupt:
    out.write(' [interrupted]')
  show(True)
  out.write('\n')
  out.flush()
  return text


def question(talker: Talker, told: list[dict[str, str]], line: str) -> str:
  """What the model goes on from."""
  template, tok = talker.run.config.roles.policy.template, talker.run.tokenizer
  if template not in ('chat', 'chat_think'):
    return render_prompt(line, template, tok)
  content = line + THINK_INSTRUCTION * (template == 'chat_think')
  return render_prompt([*told, {'role': 'user', 'content': content}], 'chat', tok)


def answer(
  talker: Talker, told: list[dict[str, str]], line: str, turn: int, out: TextIO, *, unfold: bool, live: bool
) -> list[dict[str, str]]:
  """Asks and shows what comes; returns the conversation with both."""
  prompt, tok = question(talker, told, line), talker.run.tokenizer
  states = stream(talker, tok.encode(prompt), turn)
  said = parts(prompt, say(states, prompt, tok, out, unfold=unfold, live=live))
  return [*told, {'role': 'user', 'content': line}, {'role': 'assistant', 'content': said.answer}]


def chat(talker: Talker, lines: Iterable[str], out: TextIO, *, unfold: bool, live: bool) -> list[dict[str, str]]:
  """One answer a line; returns the conversation."""
  told: list[dict[str, str]] = []
  turn = 0
  out.write(HELP + '\n')
  if talker.run.config.roles.policy.template not in ('chat', 'chat_think'):
    out.write(f'template {talker.run.config.roles.policy.template!r} is none of chats: every question stands alone\n')
  out.flush()
  for line in map(str.strip, lines):
    if line in ('/unfold', '/fold'):
      unfold = line == '/unfold'
    elif line == '/new':
      told = []
    elif line == '/quit':
      break
    elif line.startswith('/'):
      out.write(f'{line.split()[0]} is no command: {HELP}\n')
    elif line:
      told = answer(talker, told, line, turn, out, unfold=unfold, live=live)
      turn += 1
    out.flush()
  return told
