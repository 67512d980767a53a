"""Questions with lettered choices, from files or the hub, in the shapes of MMLU (2009.03300) and ARC (1803.05457):

question, choices (a list of texts), answer (the place of the right one counted from 0, its letter, or its text)
question, choices {text: [...], label: [...]}, answerKey (one of the labels)
"""

from __future__ import annotations

import pathlib
import random
import string
from collections.abc import Iterator, Mapping

from rl_reasoning.config import ConfigError, check
from rl_reasoning.tasks import dataset

LETTERS = string.ascii_uppercase


def files(path: str, split: str) -> list[pathlib.Path]:
  return dataset.files(path, split)


def read_choices(row: Mapping, place: str) -> tuple[list[str], int]:
  """(texts of the choices, place of the right one). Raises ConfigError for an answer that is none of them."""
  choices = row.get('choices', row.get('options'))
  texts, labels = (choices.get('text'), choices.get('label')) if isinstance(choices, Mapping) else (choices, None)
  good = isinstance(texts, list) and 2 <= len(texts) <= len(LETTERS) and all(isinstance(t, str) for t in texts)
  check(good, f"{place}: column 'choices' is no list of 2 to {len(LETTERS)} texts")
  texts = list(texts or [])
  labels = list(labels or LETTERS[: len(texts)])
  check(len(set(labels)) == len(labels) == len(texts), f'{place}: {len(texts)} choices, but labels {labels}')
  answer = row.get('answer', row.get('answerKey'))
  if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
    return texts, answer
  for names in (labels, texts):
    if isinstance(answer, str) and names.count(answer.strip()) == 1:
      return texts, names.index(answer.strip())
  raise ConfigError(f'{place}: answer {answer!r} is neither the place, the label nor the text of one of the {len(texts)} choices')


def rows(split: str, seed: int, size: int | None, path: str = '', *, subset: str = '', shuffle: bool = False) -> Iterator[dict]:
  """Rows {prompt, chain_of_thought, completion, answer, answer_kind, ...}; the answer is the letter that stands before the right choice.

  `subset` reads the files of one folder of that name only ('all' of cais/mmlu, 'ARC-Challenge' of allenai/ai2_arc: others repeat or mix
  them). `shuffle` puts a question's choices into an order of its own (by a hash of the question, the same in every run), for sets whose
  right answers stand in some places more often than in others.
  """

  def find(path: str, name: str) -> list[pathlib.Path]:
    found = [f for f in files(path, name) if subset in ('', f.parent.name)]
    missing = bool(subset) and not found and name == split
    check(not missing, f"config key 'data.options.subset': no {name} file in a folder {subset!r} below {path!r}")
    return found

  def convert(row: dict, place: str) -> dict:
    question = row.get('question')
    check(isinstance(question, str) and bool(question.strip()), f"{place}: no text column 'question'")
    texts, right = read_choices(row, place)
    order = list(range(len(texts)))
    if shuffle:
      random.Random(f'multiple_choice/{question}').shuffle(order)
    lines = [str(question).strip(), *(f'{LETTERS[n]}. {texts[i].strip()}' for n, i in enumerate(order))]
    letter = LETTERS[order.index(right)]
    known = {key: row[key] for key in ('subject', 'difficulty') if row.get(key) not in (None, '')}
    return {
      'prompt': '\n'.join(lines),
      'chain_of_thought': '',
      'completion': letter,
      'answer': letter,
      'answer_kind': 'choice',
      **known,
    }

  yield from dataset.split_rows(split, size, path, find, convert)
