"""Published sets of reasoning in the columns in which they were published: rows prompt, chain_of_thought, completion, answer where there is
one. From files or the hub; a layout is known by its columns, the first of LAYOUTS that a row has, or named.

  openr1_math            open-r1/OpenR1-Math-220k: problem, generations (complete and verified, by math-verify or Llama), answer
  openthoughts_metadata  open-thoughts/OpenThoughts-114k, its folder metadata: problem, deepseek_reasoning, deepseek_solution
  conversations          OpenThoughts-114k, bespokelabs/Bespoke-Stratos-17k: a turn of the user, one of the assistant in marks of thought
                         and solution or with think tags (what the system is told is that format, and ours is another)
  s1k_1_1                simplescaling/s1K-1.1: question, deepseek_thinking_trajectory, deepseek_attempt, solution
  s1k                    simplescaling/s1K: question, thinking_trajectories, attempt, solution (if a number or boxed: the answer)
  marco_o1               AIDC-AI/Marco-o1, CoT_demo.json: instruction, and response (or output) in <Thought> and <Output>
  marco_o1_messages      the same as chat messages
  numina_cot             AI-MO/NuminaMath-CoT: problem, solution, whose last box is completion and answer
  limo                   GAIR/LIMO: question, solution, answer

A row without the columns of its layout, or with other than texts in them, is refused with file and line. What real sets have a few of is
left out, and counted on stderr: no or several marks, nothing verified, an empty part, no boxed answer, a text that holds our own tags.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset
from rl_reasoning.tasks.math import last_box
from rl_reasoning.tasks.preference import EMPTY, LeftOut, Unusable
from rl_reasoning.tokenizer import render_completion, split_completion, split_thinking
from rl_reasoning.verify.math import parse_number

MARKED = (
  re.compile(
    r'\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*', re.DOTALL
  ),
  re.compile(r'\s*<Thought>(.*)</Thought>\s*<Output>(.*)</Output>\s*', re.DOTALL),
)
MARK = re.compile(r'<\|(?:begin|end)_of_(?:thought|solution)\|>|</?(?:Thought|Output)>')
ROLES = {'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant', 'system': 'system'}
NO_MARKS = 'without a thought and an answer in their marks'
UNVERIFIED = 'without a generation that is complete and verified'
NO_BOX = 'without a boxed answer'
OUR_TAGS = 'whose texts hold the tags of our format'
AGAIN = ('metadata', 'all', 'extended')  # folders in which the hub's sets hold their problems a second time, or more of them


def text(row: Mapping, place: str, column: str) -> str:
  value = row[column]
  check(isinstance(value, str), f'{place}: column {column!r} is {type(value).__name__}, not text')
  return value


def split(said: str) -> tuple[str, str]:
  """(chain of thought, completion) of a text in one of the known marks."""
  for form in MARKED:
    if (found := form.fullmatch(said)) and not MARK.search(found[1] + found[2]):
      return found[1], found[2]
  found = split_thinking(said)
  if found is None or MARK.search(said):
    raise Unusable(NO_MARKS)
  return found


def made(prompt: str, chain: str, completion: str, answer: Any = None) -> dict:
  row = {'prompt': prompt.strip(), 'chain_of_thought': chain.strip(), 'completion': completion.strip()}
  if not all(row.values()):
    raise Unusable(EMPTY)
  if not split_completion(render_completion(row)).well_formed:
    raise Unusable(OUR_TAGS)
  return row if answer is None else {**row, 'answer': str(answer).strip(), 'answer_kind': 'math'}


def flags(row: Mapping, place: str, column: str, count: int) -> list:
  """A verdict on each of `count` generations; None where the set has none."""
  values = row.get(column)
  if values is None:
    return [None] * count
  good = isinstance(values, list) and len(values) == count
  check(good, f'{place}: column {column!r} is no list of {count}, one for each generation')
  return values


def openr1_math(row: Mapping, place: str) -> Iterator[dict]:
  said = row['generations']
  check(
    isinstance(said, list) and all(isinstance(one, str) for one in said), f"{place}: column 'generations' is no list of texts"
  )
  columns = ('is_reasoning_complete', 'correctness_math_verify', 'correctness_llama')
  verdicts = zip(*(flags(row, place, column, len(said)) for column in columns), strict=True)
  found = False
  for one, (complete, right, judged) in zip(said, verdicts, strict=True):
    marked = split_thinking(one)
    if complete is not False and (right or judged) and marked is not None:
      with contextlib.suppress(Unusable):  # another one may do
        yield made(text(row, place, 'problem'), *marked, row['answer'])
        found = True
  if not found:
    raise Unusable(UNVERIFIED)


def openthoughts_metadata(row: Mapping, place: str) -> Iterator[dict]:
  problem, chain, completion = (text(row, place, column) for column in ('problem', 'deepseek_reasoning', 'deepseek_solution'))
  yield made(problem, chain, completion)


def of_turns(turns: list[tuple[str, str]], place: str, column: str) -> dict:
  """Of one question and one answer, whatever the system was told."""
  asked = [(role, said) for role, said in turns if role != 'system']
  roles = [role for role, _ in asked]
  check(
    roles == ['user', 'assistant'],
    f'{place}: column {column!r} has turns of {", ".join(roles) or "nobody"}, not of user, assistant',
  )
  return made(asked[0][1], *split(asked[1][1]))


def conversations(row: Mapping, place: str) -> Iterator[dict]:
  turns = row['conversations']
  good = isinstance(turns, list) and all(
    isinstance(t, dict) and ROLES.get(t.get('from', '')) and isinstance(t.get('value'), str) for t in turns
  )
  check(
    good, f'{place}: column \'conversations\' is no list of {{"from", "value"}} turns of user, human, assistant, gpt or system'
  )
  yield of_turns([(ROLES[turn['from']], turn['value']) for turn in turns], place, 'conversations')


def marco_o1_messages(row: Mapping, place: str) -> Iterator[dict]:
  dataset.check_messages(place, 'messages', row['messages'])
  yield of_turns([(message['role'], message['content']) for message in row['messages']], place, 'messages')


def marco_o1(row: Mapping, place: str) -> Iterator[dict]:
  yield made(text(row, place, 'instruction'), *split(text(row, place, 'response' if 'response' in row else 'output')))


def gold_of(solution: str) -> str | None:
  """The answer that a solution is or ends in."""
  return last_box(solution) or (solution if parse_number(solution) is not None else None)


def s1k(row: Mapping, place: str) -> Iterator[dict]:
  chains = row['thinking_trajectories']
  good = isinstance(chains, list) and bool(chains) and isinstance(chains[0], str)
  check(good, f"{place}: column 'thinking_trajectories' is no list of texts")
  yield made(text(row, place, 'question'), chains[0], text(row, place, 'attempt'), gold_of(text(row, place, 'solution')))


def s1k_1_1(row: Mapping, place: str) -> Iterator[dict]:
  chain, completion = (text(row, place, f'deepseek_{column}') for column in ('thinking_trajectory', 'attempt'))
  yield made(text(row, place, 'question'), chain, completion, gold_of(text(row, place, 'solution')))


def numina_cot(row: Mapping, place: str) -> Iterator[dict]:
  solution = text(row, place, 'solution')
  box = last_box(solution)
  if not box:
    raise Unusable(NO_BOX)
  yield made(text(row, place, 'problem'), solution, box, box)


def limo(row: Mapping, place: str) -> Iterator[dict]:
  answer = str(row['answer'])
  yield made(text(row, place, 'question'), text(row, place, 'solution'), answer, answer)


# Columns that tell a layout; of two that fit, the first. Columns may be spelt in several ways: ('response', 'output').
LAYOUTS: dict[str, tuple[tuple[str | tuple[str, ...], ...], Callable[[Mapping, str], Iterator[dict]]]] = {
  'openr1_math': (('problem', 'generations', 'answer'), openr1_math),
  'openthoughts_metadata': (('problem', 'deepseek_reasoning', 'deepseek_solution'), openthoughts_metadata),
  'conversations': (('conversations',), conversations),
  's1k_1_1': (('question', 'solution', 'deepseek_thinking_trajectory', 'deepseek_attempt'), s1k_1_1),
  's1k': (('question', 'solution', 'thinking_trajectories', 'attempt'), s1k),
  'marco_o1': (('instruction', ('response', 'output')), marco_o1),
  'numina_cot': (('problem', 'solution', 'source'), numina_cot),
  'limo': (('question', 'solution', 'answer'), limo),
  'marco_o1_messages': (('messages',), marco_o1_messages),
}


def has(row: Mapping, columns: tuple[str | tuple[str, ...], ...]) -> bool:
  return all(any(name in row for name in ((column,) if isinstance(column, str) else column)) for column in columns)


def convert(row: Mapping, place: str, layout: str = '') -> list[dict]:
  """The rows that a row of a layout gives. Raises ConfigError, or Unusable."""
  fitting = [name for name, (columns, _) in LAYOUTS.items() if has(row, columns)]
  check(bool(fitting), f'{place}: no known layout ({", ".join(LAYOUTS)}) has the columns {", ".join(row)}')
  check(layout in ('', *fitting), f'{place}: layout {layout!r} wants other columns than {", ".join(row)}')
  return list(LAYOUTS[layout or fitting[0]][1](row, place))


def files(path: str, split: str) -> list[pathlib.Path]:
  """Those of a split by their names; where no file is named after the test split, or none after any (LIMO), the same ones for both."""
  check(bool(path), "config key 'data.path' is empty: this task reads files")
  where = dataset.fetch(path)
  if where.is_file():
    return [where]
  every = sorted(f for f in where.rglob('*') if f.name.endswith(dataset.ENDINGS))
  every = [f for f in every if not set(f.relative_to(where).parts[:-1]) & set(AGAIN)]
  named = {name: [f for f in every if f.name.startswith(name)] for name in ('train', 'test')}
  return named[split] if named['test'] else named['train'] or every


def rows(
  split: str,
  seed: int,
  size: int | None,
  path: str = '',
  *,
  layout: str = '',
  all_generations: bool = False,
  test_share: float = 0.1,
) -> Iterator[dict]:
  """Rows of a split, in the order of the files; prompts of the test split are left out of training.

  `layout` names one of LAYOUTS. `all_generations` makes a row of every generation that is verified (openr1_math), not of the first. Of sets
  without a test split `test_share` of the prompts, by hash, are that; with 0 there is none.
  """
  check(layout in ('', *LAYOUTS), f"config key 'data.options.layout': {layout!r} is none of {', '.join(LAYOUTS)}")
  check(0 <= test_share < 1, f"config key 'data.options.test_share': {test_share} is not in [0, 1)")
  mixed = set(files(path, 'train')) & set(files(path, 'test'))
  check(test_share == 0.1 or bool(mixed), "config key 'data.options.test_share' cannot act: the set has a test split of its own")

  def converted(row: dict, place: str) -> dict:
    found = convert(row, place, layout)
    return {**found[0], 'others': found[1:]}

  left_out = LeftOut()
  kept = dataset.split_rows(split, None, path, files, left_out.counted(converted), mixed.__contains__, test_share)
  given = ([row, *others] if all_generations else [row] for row in kept for others in [row.pop('others')])
  yield from itertools.islice(itertools.chain.from_iterable(given), size)
  left_out.report(files(path, split))
