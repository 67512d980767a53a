"""Rows that training must not see (decontamination) or need not see twice (near duplicates). Lists of rows in, (kept rows, counts of what
was left out) out, in the order in which they came; a row is anything with a prompt, its other texts are those of TEXTS.

Decontamination as in GPT-3 (2005.14165, appendix C): a row is left out where it shares n = 13 successive words, case and punctuation aside,
with the prompt of an evaluation problem; n-grams that more than 10 different prompts of the rows hold are taken for phrases that everybody
uses (there: more than 10 documents). s1 (2501.19393) and Open R1 take n = 8. A prompt that asks exactly what an evaluation asks is left out
whatever its length: many are shorter than 13 words.

Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing, of the library datasketch: of rows whose sets of 5 successive words
have an estimated Jaccard similarity of `threshold` or more the first one stays. The estimate is of 256 hashes, its standard error 0.03 at
most; of pairs at the threshold itself the index misses one in a hundred, of closer ones fewer.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rl_reasoning.config import check
from rl_reasoning.tasks import dataset

TEXTS = ('prompt', 'chain_of_thought', 'completion')
# Scripts that are written without spaces: there every letter is a word.
LETTERS = '\u0e01-\u0e5b\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff'
WORD = re.compile(rf'[{LETTERS}]|[^\W{LETTERS}]+')
NGRAM = 13
MOST_PROMPTS = 10
SHINGLE = 5
HASHES = 256

RECALL = 0.99

Kept = tuple[list[dict], collections.Counter]


def text_of(value: Any) -> str:
  """A column as one text: chat messages are what was said in them."""
  return value if isinstance(value, str) else '\n'.join(message['content'] for message in value)


def words(text: str) -> list[str]:
  return WORD.findall(text.casefold())


def ngrams(some: Sequence[str], n: int) -> set[str]:
  return {' '.join(some[i : i + n]) for i in range(len(some) - n + 1)}


def words_of(row: Mapping[str, Any]) -> list[str]:
  return words('\n'.join(text_of(row[column]) for column in TEXTS if row.get(column) is not None))


def decontaminate(rows: Sequence[dict], evaluation: Iterable[Mapping[str, Any]], ngram: int = NGRAM) -> Kept:
  """Rows that no problem of `evaluation` (rows with a prompt) has been copied into."""
  check(ngram >= 1, f'decontaminate: {ngram} words are no n-gram')
  asked: set[str] = set()
  theirs: set[str] = set()
  for problem in evaluation:
    asked.add(dataset.identity(problem))
    theirs |= ngrams(words(text_of(problem['prompt'])), ngram)
  shared = [theirs & ngrams(words_of(row), ngram) for row in rows]
  prompts: dict[str, set[str]] = collections.defaultdict(set)  # n-gram -> prompts whose rows hold it
  for row, found in zip(rows, shared, strict=True):
    for gram in found:
      prompts[gram].add(dataset.identity(row))
  kept, dropped = [], collections.Counter()
  for row, found in zip(rows, shared, strict=True):
    copied = any(len(prompts[gram]) <= MOST_PROMPTS for gram in found)
    if copied or dataset.identity(row) in asked:
      dropped['contaminated'] += 1
    else:
      kept.append(row)
  return kept, dropped


def bands(threshold: float) -> tuple[int, int]:
  """(bands, hashes in each) of the index: the longest bands by which a pair of that similarity s is found with probability RECALL or more.
  It is found where all r hashes of one of the b bands are equal: 1 - (1 - s^r)^b."""
  longest = [r for r in range(2, HASHES // 2 + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL]
  r = max(longest, default=1)
  return HASHES // r, r


def nearly_seen(threshold: float) -> Callable[[Mapping[str, Any]], bool]:
  """row -> whether it is nearly the same as one that came before it and was not nearly the same as another. Raises ConfigError."""
  import datasketch  # it takes a second to import, and most runs need none

  check(0 < threshold <= 1, f'near duplicates: a similarity of {threshold} is not in (0, 1]')
  index = datasketch.MinHashLSH(num_perm=HASHES, params=bands(threshold))
  sketches: dict[Any, Any] = {}  # of the rows that are new, by their number

  def seen(row: Mapping[str, Any]) -> bool:
    some = words_of(row)
    shingles = ngrams(some, SHINGLE) or {' '.join(some)}
    sketch = datasketch.MinHash(num_perm=HASHES)
    sketch.update_batch([shingle.encode() for shingle in shingles])
    if any(sketches[key].jaccard(sketch) >= threshold for key in index.query(sketch)):
      return True
    index.insert(len(sketches), sketch)
    sketches[len(sketches)] = sketch
    return False

  return seen


def near_duplicates(rows: Sequence[dict], threshold: float = 0.8) -> Kept:
  """Rows that are not nearly the same as one before them."""
  seen = nearly_seen(threshold)
  kept = [row for row in rows if not seen(row)]
  return kept, +collections.Counter({'near duplicate': len(rows) - len(kept)})
