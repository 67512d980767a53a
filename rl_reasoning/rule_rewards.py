"""Reward functions that are rules: `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, listed in rewards.REWARDS.

Prompts and completions are texts, or chat messages whose last one counts; columns are the data set's other columns. A function's own
options are its keyword-only arguments, set by `rewards.options.NAME`. None is "no verdict", never a zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tokenizer import TAGS, from_thinking, split_completion
from rl_reasoning.verify.answers import verdicts
from rl_reasoning.verify.code import Job, complete, extract_program, run
from rl_reasoning.verify.math import check_countdown, extract_answer
from rl_reasoning.verify.text import LANGUAGES, chain_of_thought, count_steps, is_mixed, language_share, repeated_share


def last_text(message: Any) -> str:
  return message if isinstance(message, str) else message[-1]['content']


def whole_text(prompt: Any, completion: Any) -> str:
  return from_thinking(prompt, last_text(completion))


def grade(prompts: Sequence, completions: Sequence, columns: Mapping[str, Any], flexible: bool) -> list[float | None]:
  """Verdicts by each row's own columns, so that one reward serves a mixture of tasks: `tests` (code), else `numbers` and `target`
  (countdown), else `answer`, read as `answer_kind` says or as it looks (verify/answers.py)."""
  absent = [None] * len(completions)
  tests, numbers, target, gold, kind = (columns.get(k, absent) for k in ('tests', 'numbers', 'target', 'answer', 'answer_kind'))
  texts = [whole_text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
  values: list[float | bool | None] = list(absent)
  coded = [n for n in range(len(texts)) if tests[n] is not None]
  answered = [n for n in range(len(texts)) if tests[n] is None]
  if coded:
    some = {
      k: [v[n] for n in coded] for k, v in columns.items() if k != 'unsafe'
    }  # code_binary's option is no matter of the data
    found = code_binary([''] * len(coded), [texts[n] for n in coded], unsafe=False, **some)
    for n, value in zip(coded, found, strict=True):
      values[n] = value
  for n in [n for n in answered if numbers[n] is not None and target[n] is not None]:
    values[n] = check_countdown(numbers[n], target[n], extract_answer(texts[n]))
    answered.remove(n)
  answers = [extract_answer(texts[n], flexible=flexible) for n in answered]
  right = verdicts([gold[n] for n in answered], answers, [kind[n] for n in answered])
  for n, value in zip(answered, right, strict=True):
    values[n] = value
  return [None if value is None else float(value) for value in values]


def accuracy(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
  """1 where the one marked answer after the thinking is the column `answer` (solves `numbers` to `target`, passes `tests`), else 0."""
  return grade(prompts, completions, columns, flexible=False)


def accuracy_flexible(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
  """As `accuracy`, but an unmarked text answers with its last number. What evaluators call accuracy."""
  return grade(prompts, completions, columns, flexible=True)


def format(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """1 for exactly '<think>...</think><answer>...</answer>' with each tag once, space around them allowed; else 0."""
  return [float(split_completion(whole_text(p, c)).well_formed) for p, c in zip(prompts, completions, strict=True)]


def format_soft(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """1 where the four tags stand in the order of the format, whatever is around and between them; else 0."""
  values = []
  for prompt, completion in zip(prompts, completions, strict=True):
    rest, found = whole_text(prompt, completion), ''
    for tag in TAGS:
      _, found, rest = rest.partition(tag)  # nothing is left behind a tag that is missing, so the last tells of all
    values.append(float(bool(found)))
  return values


def format_tags(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """A quarter for each of the four tags that stands exactly once, and after the tags before it in the format."""
  values = []
  for prompt, completion in zip(prompts, completions, strict=True):
    text = whole_text(prompt, completion)
    place, score = -1, 0.0
    for tag in TAGS:
      if text.count(tag) == 1 and text.index(tag) > place:
        place, score = text.index(tag), score + 0.25
    values.append(score)
  return values


def reasoning_steps(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """min(1, n / 3) for n marked steps ('Step 1:', '1.', '-', 'First,', ...) in the chain of thought: open-r1's reward, but only there, and
  counting only steps that differ (verify.text.count_steps)."""
  chains = [chain_of_thought(whole_text(p, c)) for p, c in zip(prompts, completions, strict=True)]
  return [min(1.0, count_steps(chain) / 3) for chain in chains]


def language(prompts, completions, completion_ids=None, *, language: str = 'en', **columns) -> list[float]:
  """The language-consistency reward of DeepSeek-R1 (2501.12948): how much of the chain of thought is in the target language, 0 for an
  empty chain. The paper counts words and names no detector; here it is the script of the letters (verify.text.language_share)."""
  check_option('language', 'language', language in LANGUAGES, f'{language!r} is none of {", ".join(LANGUAGES)}')
  return [language_share(chain_of_thought(whole_text(p, c)), language) for p, c in zip(prompts, completions, strict=True)]


def mixed(prompts, completions, completion_ids=None, **columns) -> list[float]:
  """1 where the chain of thought is in several languages (verify.text.is_mixed): to be measured, or paid with a negative weight."""
  return [float(is_mixed(chain_of_thought(whole_text(p, c)))) for p, c in zip(prompts, completions, strict=True)]


def check_option(function: str, key: str, condition: bool, message: str) -> None:
  """Functions check their options before they look at rows, so that a call without rows is a check of the config."""
  check(condition, f"config key 'rewards.options.{function}.{key}': {message}")


def tokens_of(function: str, completion_ids: Sequence | None) -> Sequence:
  """Lengths are never those of texts: a limit on tokens is no limit on characters (a bug of several published trainers)."""
  if completion_ids is None:
    raise ValueError(f'reward {function!r} counts tokens, and completion_ids is None')
  return completion_ids


def length(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
  """Kimi k1.5's length reward (2501.12599): lam = 0.5 - (tokens - min) / (max - min) within the group; lam where the answer is right,
  min(0, lam) where it is wrong, 0 for all where max = min.

  A group is the adjacent rows of one prompt. A row without a verdict of `accuracy` gets None and does not count in its group's min and max.
  """
  tokens = [len(ids) for ids in tokens_of('length', completion_ids)]
  right = accuracy(prompts, completions, completion_ids, **columns)
  values: list[float | None] = [None] * len(completions)
  for _, rows in itertools.groupby(range(len(completions)), key=lambda n: prompts[n]):
    judged = [n for n in rows if right[n] is not None]
    low, high = min((tokens[n] for n in judged), default=0), max((tokens[n] for n in judged), default=0)
    for n in judged:
      lam = 0.5 - (tokens[n] - low) / (high - low) if high > low else 0.0
      values[n] = lam if right[n] == 1 else min(0.0, lam)
  return values


def cosine(
  prompts, completions, completion_ids=None, *, max_completion_length: int, min_value_wrong: float = -1.0,
  max_value_wrong: float = -0.5, min_value_correct: float = 0.5, max_value_correct: float = 1.0, **columns,
) -> list[float | None]:  # fmt: skip
  """The cosine reward (2502.03373; default values: open-r1): b + (a - b) (1 + cos(pi t / L)) / 2 for t tokens, from a at none to b at
  L = max_completion_length. Right answers fall from their maximum to their minimum; mirrored, wrong ones rise from theirs to theirs.

  Lengths beyond L count as L, or the cosine would turn back. The paper's extra value for answers cut at L is not here: add `overlong`.
  None where `accuracy` has no verdict.
  """
  for kind, low, high in (('wrong', min_value_wrong, max_value_wrong), ('correct', min_value_correct, max_value_correct)):
    check_option('cosine', f'min_value_{kind}', low <= high, f'{low} is above max_value_{kind}, {high}')
  ids = tokens_of('cosine', completion_ids)
  values: list[float | None] = []
  for tokens, right in zip(ids, accuracy(prompts, completions, completion_ids, **columns), strict=True):
    short, long = (max_value_correct, min_value_correct) if right == 1 else (min_value_wrong, max_value_wrong)
    progress = min(len(tokens), max_completion_length) / max_completion_length
    values.append(None if right is None else long + (short - long) * (1 + math.cos(math.pi * progress)) / 2)
  return values


def repetition(
  prompts, completions, completion_ids=None, *, ngram_size: int = 20, max_penalty: float = 1.0, **columns
) -> list[float]:
  """-max_penalty * (1 - distinct / all) of the completion's n-grams (2502.03373; open-r1); 0 where it is shorter than one.

  Of TOKENS, not of words as in open-r1: a text without spaces (Chinese, code, a loop of one character) is one word. English chains of
  thought of 900 tokens repeat 26 % of their 3-grams and 1 % of their 20-grams, loops nearly all of either: hence the default.
  """
  whole = isinstance(ngram_size, int) and ngram_size >= 1
  check_option('repetition', 'ngram_size', whole, f'{ngram_size!r} is no whole number from 1')
  check_option('repetition', 'max_penalty', max_penalty >= 0, f'{max_penalty} must not be negative: it is subtracted')
  return [0.0 - max_penalty * repeated_share(ids, ngram_size) for ids in tokens_of('repetition', completion_ids)]


def overlong(
  prompts, completions, completion_ids=None, *, max_completion_length: int, buffer: int | None = None, **columns
) -> list[float]:
  """DAPO's soft overlong punishment (2503.14476, equation 13): 0 up to L - c tokens, then down to -1 at L, c = `buffer` and L =
  max_completion_length. Without a buffer a fifth of L, the paper's 4,096 of 20,480."""
  c, L = max(1, max_completion_length // 5) if buffer is None else buffer, max_completion_length
  check_option('overlong', 'buffer', 0 < c <= L, f'{c} is not from 1 to rollout.max_completion_length, {L}')
  return [min(0.0, max(-1.0, (L - c - len(ids)) / c)) for ids in tokens_of('overlong', completion_ids)]


def code_job(program: str, columns: Mapping[str, Any], n: int) -> Job:
  """What row `n` asks of a program. Raises ConfigError for columns of other types."""
  found: list[Any] = [columns[k][n] if columns.get(k) else None for k in ('tests', 'stub', 'setup', 'entry_point')]
  tests, stub, setup, entry_point = found
  for name, value in (('entry_point', entry_point), ('setup', setup), ('stub', stub)):
    check(value is None or isinstance(value, str), f'column {name!r} of a row with tests is {value!r}, not text')
  several = isinstance(tests, (list, tuple)) and all(isinstance(test, str) for test in tests)
  check(several or (isinstance(tests, str) and bool(entry_point)),
        "column 'tests' is neither a list of texts nor one text beside an 'entry_point'")  # fmt: skip
  return Job(
    program=complete(program, stub or '', entry_point), tests=tests if isinstance(tests, str) else tuple(tests),
    entry_point=entry_point, setup=setup or '', stub=stub or '',
  )  # fmt: skip


def passed_share(prompts: Sequence, completions: Sequence, columns: Mapping[str, Any], unsafe: bool) -> list[float | None]:
  """The share of each row's `tests` that its program passes."""
  tests = columns.get('tests', [None] * len(completions))
  values: list[float | None] = [0.0 if given else None for given in tests]
  jobs = {}
  for n in [n for n, given in enumerate(tests) if given]:
    program = extract_program(whole_text(prompts[n], completions[n]))
    if program and not program.isspace():
      jobs[n] = code_job(program, columns, n)
  if any(tests) or not completions:  # without rows only the sandbox and the option are checked
    for n, verdict in zip(jobs, run(list(jobs.values()), unsafe=unsafe), strict=True):
      values[n] = None if verdict is None else verdict.passed / verdict.total
  return values


def code(prompts, completions, completion_ids=None, *, unsafe: bool = False, **columns) -> list[float | None]:
  """The share of `tests` that the completion's program passes, run in a sandbox (verify/code.py): a program that hangs or ends its process
  passes none. `tests` is a list of texts, each a test by itself, or one text that defines check(candidate), for `entry_point`; `setup` runs
  after the program and before the tests; `stub` is the code of the prompt that a completion may go on from. None without tests, and where
  the sandbox itself fails. Raises ConfigError where there is no sandbox; `unsafe` runs programs with the user's own rights."""
  return passed_share(prompts, completions, columns, unsafe)


def code_binary(prompts, completions, completion_ids=None, *, unsafe: bool = False, **columns) -> list[float | None]:
  """1 where the program passes all `tests`, else 0; otherwise as `code`."""
  found = passed_share(prompts, completions, columns, unsafe)
  return [None if share is None else float(share == 1) for share in found]
