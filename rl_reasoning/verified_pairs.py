"""Preferences without a judge: completions that a verifier took, each against one of the same prompt that it did not.

  python -m rl_reasoning.verified_pairs FILE --out=PAIRS.jsonl [--most=8] [--seed=0]

Rows of FILE have `prompt`, `responses` (texts) and `correct`, a verdict for each: true or 1 is verified, false and any share below 1 is
not, and null (no verdict, as in a row without the column) is in no pair, nor is an empty text. So datagen writes them with keep 'all', of
one checkpoint or of several rounds in one file (its keep 'pairs' makes the pairs of one round at once, by the same `spread`), and so may
whoever else verifies. Rows of one prompt are put together. Output rows are prompt, responses (the verified one first) and ranks [0, 1], at
most --most a prompt, chosen by the seed so that every response is used about equally often; beside it lies summary_of_PAIRS.json. The
responses are held in memory. Exit codes: 0, 2.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rl_reasoning import judge
from rl_reasoning.config import Parser, check


def check_verdicts(place: str, verdicts: Any, count: int) -> None:
  good = isinstance(verdicts, list) and all(v is None or (isinstance(v, (bool, int, float)) and 0 <= v <= 1) for v in verdicts)
  check(good, f"{place}: column 'correct' is no list of true, false, null or numbers from 0 to 1")
  check(len(verdicts) == count, f"{place}: column 'correct' has {len(verdicts)} verdicts for {count} responses")


def spread(right: int, wrong: int, most: int = 0) -> list[tuple[int, int]]:
  """At most `most` (0: all) different pairs of indices below `right` and `wrong`, both positive, each index in as many as any other of its
  side or one more, as far as the numbers allow.

  In step through both, with a shift whenever the same pairs would come again: every pair comes once in right * wrong steps.
  """
  cycle, every = math.lcm(right, wrong), right * wrong
  return [(k % right, (k + k // cycle) % wrong) for k in range(min(most or every, every))]


def choose(right: Sequence[str], wrong: Sequence[str], most: int, seed: str) -> list[tuple[str, str]]:
  random_ = random.Random(seed)
  right, wrong = (random_.sample(texts, len(texts)) for texts in (right, wrong))
  return [(right[i], wrong[j]) for i, j in spread(len(right), len(wrong), most)]


def verified_pairs(path: pathlib.Path, most: int, seed: int, counts: collections.Counter) -> Iterator[dict[str, Any]]:
  """Rows of pairs in the order in which prompts come first. Counts into `counts` what becomes of prompts and responses."""
  # prompt as JSON -> text without the space around it -> text, verdicts
  prompts: dict[str, dict[str, tuple[str, set[bool]]]] = {}
  for place, row, checked in judge.read_rows(path):
    verdicts = row.get('correct')
    if verdicts is None:
      verdicts = [None] * len(checked.responses)
    check_verdicts(place, verdicts, len(checked.responses))
    texts = prompts.setdefault(json.dumps(checked.prompt, sort_keys=True), {})
    for text, value in zip(checked.responses, verdicts):
      counts['responses'] += 1
      if value is None:
        counts['responses_without_verdict'] += 1
        continue
      if not text.strip():
        counts['responses_empty'] += 1
        continue
      counts['responses_repeated'] += text.strip() in texts
      texts.setdefault(text.strip(), (text, set()))[1].add(value == 1)
  check(bool(prompts), f'{path} has no rows')
  check(any(prompts.values()), f"{path}: no row has a verdict in a column 'correct'")
  for key, texts in prompts.items():
    # One text with both verdicts says that the verifier wavers, not which is better.
    counts['texts_with_both_verdicts'] += sum(len(verdicts) == 2 for _, verdicts in texts.values())
    right, wrong = ([text for text, verdicts in texts.values() if verdicts == {kind}] for kind in (True, False))
    counts['prompts'] += 1
    if not right or not wrong:
      counts['prompts_all_verified' if right else 'prompts_none_verified' if wrong else 'prompts_without_verdict'] += 1
      continue
    for pair in choose(right, wrong, most, f'{seed} {key}'):
      counts['pairs'] += 1
      yield {'prompt': json.loads(key), 'responses': list(pair), 'ranks': [0, 1]}


def command(argv: Sequence[str]) -> None:
  parser = Parser(prog='python -m rl_reasoning.verified_pairs', allow_abbrev=False,
                  description='Pairs of verified and unverified responses.')  # fmt: skip
  parser.add_argument('file', metavar='FILE', help='rows of prompt, responses and correct')
  parser.add_argument('--out', required=True, metavar='PAIRS.jsonl')
  parser.add_argument('--most', type=int, default=8, metavar='N', help='pairs of a prompt')
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args(argv)
  check(flags.most >= 1, f'--most={flags.most}: at least one')
  out, path = judge.check_out(flags.out, flags.file), pathlib.Path(flags.file).expanduser()
  judge.check_ours(out, judge.summary_path(out))
  counts: collections.Counter = collections.Counter(prompts=0, pairs=0)
  judge.write_rows(out, verified_pairs(path, flags.most, flags.seed, counts))
  summary = json.dumps(counts, indent=1)
  judge.summary_path(out).write_text(summary + '\n')
  print(summary)


if __name__ == '__main__':
  sys.exit(judge.exit_code(command, sys.argv[1:]))
