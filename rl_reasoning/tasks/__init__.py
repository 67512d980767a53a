"""TASKS: what `data.task` may pick. A task is a module of two functions:

rows(split, seed, size, path, **options) -> Iterator[dict]   options are the keys of `data.options`
files(path, split) -> list of files it reads                 only where it reads files

Beside prompt, chain_of_thought, completion and answer a row may have answer_kind (number, math, choice, text, set: how the answer is
compared) and difficulty (an int or a text: by what an evaluation groups). Rows of preferences have prompt and responses, ranks; completion,
label; or completions, labels (see preference.py). `python -m rl_reasoning.tasks rank` makes rankings by hand.
"""

from rl_reasoning.tasks import (
  aime,
  arithmetic,
  base_conversion,
  countdown,
  dataset,
  gsm8k,
  hh_rlhf,
  humaneval,
  knights_knaves,
  linear,
  math,
  mbpp,
  multiple_choice,
  pandalm,
  preference,
  reasoning_sets,
  reviews,
  svamp,
  word_problems,
)

TASKS = {
  'arithmetic': arithmetic,
  'countdown': countdown,
  'linear': linear,
  'base_conversion': base_conversion,
  'knights_knaves': knights_knaves,
  'word_problems': word_problems,
  'reviews': reviews,
  'gsm8k': gsm8k,
  'math': math,
  'aime': aime,
  'svamp': svamp,
  'multiple_choice': multiple_choice,
  'humaneval': humaneval,
  'mbpp': mbpp,
  'dataset': dataset,
  'reasoning_sets': reasoning_sets,
  'preference': preference,
  'hh_rlhf': hh_rlhf,
  'pandalm': pandalm,
}
