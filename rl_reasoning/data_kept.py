"""What is kept of the completions of one problem, and in which form of a row: see datagen.py for the kinds."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl_reasoning.data_settings import Generate
from rl_reasoning.rewards import REWARDS, columns_of
from rl_reasoning.tokenizer import from_thinking, split_completion
from rl_reasoning.verified_pairs import spread
from rl_reasoning.verify.math import extract_answer

# Columns of the problem that tell how it is answered, or judge answers: beside our completions they would be taken for these or for their
# judgements.
DEMONSTRATION = ('completion', 'chain_of_thought', 'messages')
JUDGEMENT = ('completions', 'responses', 'chosen', 'rejected', 'ranks', 'margin', 'label', 'labels')
AT_ONCE = 512  # completions that are verified in one call: enough for all workers


def sift(samples: list[dict], dropped: collections.Counter, reason: str, good: Callable[[dict], bool]) -> list[dict]:
  """The good ones; the others are counted."""
  kept = [s for s in samples if good(s)]
  dropped[reason] += len(samples) - len(kept)
  return kept


def distinct(samples: list[dict], dropped: collections.Counter) -> list[dict]:
  """Completions of a prompt that have an end and a text, each text once, as they were sampled; `count` tells how often."""
  samples = sift(samples, dropped, 'truncated', lambda s: not s['truncated'])
  samples = sift(samples, dropped, 'empty', lambda s: bool(s['completion'].strip()))
  first: dict[str, dict] = {}
  for s in samples:
    first.setdefault(s['completion'], {**s, 'count': 0})['count'] += 1
  dropped['duplicate'] += len(samples) - len(first)
  return list(first.values())


def limited(samples: list[dict], dropped: collections.Counter, limit: int) -> list[dict]:
  dropped['over max_per_prompt'] += max(0, len(samples) - limit) if limit else 0
  return samples[: limit or None]


def judged(samples: list[dict], dropped: collections.Counter, key: str) -> list[dict]:
  """Those of which the rewards ('reward') or the verifier ('accuracy') say something."""
  return sift(samples, dropped, f'no {key}', lambda s: s[key] is not None)


def at_least(reward: float, least: float) -> bool:
  """Rewards are sums in float32: 0.7 of a config is above 0.7 of a reward."""
  return reward >= least - 1e-6 * max(1.0, abs(least))


def worth(samples: list[dict], dropped: collections.Counter, least: float | None) -> list[dict]:
  if least is None:
    return samples
  return sift(samples, dropped, 'below min_reward', lambda s: s['reward'] is not None and at_least(s['reward'], least))


def others(row: Mapping[str, Any]) -> dict[str, Any]:
  """The problem's further columns (its gold answer among them)."""
  return {key: value for key, value in row.items() if key not in ('prompt', *DEMONSTRATION, *JUDGEMENT)}


def to_imitate(row: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
  """A demonstration: the policy's own text, with the <think> that its template has opened (data.encode_row leaves it to the template again,
  and a filter or another template finds it whole)."""
  text = from_thinking(sample['prompt'], sample['completion'])
  return {**others(row), 'prompt': row['prompt'], 'completion': text, 'reward': sample['reward']}


# What a kind of `keep` makes of one problem: (problem, its samples, settings, counts of what is left out) -> (rows, samples in them).
Kept = tuple[list[dict], list[dict]]


def keep_all(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = distinct(samples, dropped)
  kept = sift(left, dropped, 'nothing to compare with', lambda s: len(left) > 1)
  found = {'prompt': row['prompt'], 'responses': [s['completion'] for s in kept], 'counts': [s['count'] for s in kept],
           'rewards': [s['reward'] for s in kept]}  # fmt: skip
  correct = [s['accuracy'] for s in kept]
  found |= {'correct': correct} if any(c is not None for c in correct) else {}
  return [{**others(row), **found}] if kept else [], kept


def keep_best(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'reward')
  best = max(left, key=lambda s: s['reward'], default=None)  # of equal ones the first
  kept = worth(sift(left, dropped, 'not the best', lambda s: s is best), dropped, g.min_reward)
  return [to_imitate(row, s) for s in kept], kept


def keep_correct(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'accuracy')
  left = worth(sift(left, dropped, 'not verified', lambda s: s['accuracy'] == 1), dropped, g.min_reward)
  kept = limited(left, dropped, g.max_per_prompt)
  return [to_imitate(row, s) for s in kept], kept


def keep_ranking(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = limited(judged(distinct(samples, dropped), dropped, 'reward'), dropped, g.max_per_prompt)
  levels = sorted({s['reward'] for s in left}, reverse=True)
  kept = sift(left, dropped, 'nothing to compare with', lambda s: len(levels) > 1)
  ranking = {
    'prompt': row['prompt'],
    'responses': [s['completion'] for s in kept],
    'ranks': [levels.index(s['reward']) for s in kept],
  }
  return [ranking] if kept else [], kept


def keep_pairs(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = judged(distinct(samples, dropped), dropped, 'accuracy')
  right, wrong = [s for s in left if s['accuracy'] == 1], [s for s in left if s['accuracy'] < 1]
  left = sift(left, dropped, 'nothing to compare with', lambda s: bool(right) and bool(wrong))
  pairs = spread(len(right), len(wrong), g.max_per_prompt) if left else []
  used = {id(right[i]) for i, _ in pairs} | {id(wrong[j]) for _, j in pairs}
  kept = sift(left, dropped, 'over max_per_prompt', lambda s: id(s) in used)
  responses = [[right[i]['completion'], wrong[j]['completion']] for i, j in pairs]
  return [{'prompt': row['prompt'], 'responses': texts, 'ranks': [0, 1]} for texts in responses], kept


def keep_labels(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  kept = limited(judged(distinct(samples, dropped), dropped, 'accuracy'), dropped, g.max_per_prompt)
  return [{'prompt': row['prompt'], 'completion': s['completion'], 'label': s['accuracy']} for s in kept], kept


def keep_reasoning(row: dict, samples: list[dict], g: Generate, dropped: collections.Counter) -> Kept:
  left = distinct(samples, dropped)
  parts = {s['completion']: split_completion(from_thinking(s['prompt'], s['completion'])) for s in left}
  left = sift(left, dropped, 'not in the format', lambda s: parts[s['completion']].well_formed)
  thoughts = {text: ((found.think or '').strip(), (found.answer or '').strip()) for text, found in parts.items()}
  left = sift(left, dropped, 'empty thought or answer', lambda s: all(thoughts[s['completion']]))
  if g.verify == 'always':
    left = judged(left, dropped, 'accuracy')
  if g.verify != 'never':
    left = sift(left, dropped, 'not verified', lambda s: s['accuracy'] in (None, 1))
  kept = limited(left, dropped, g.max_per_prompt)
  columns = [dict(zip(('chain_of_thought', 'completion'), thoughts[s['completion']])) for s in kept]
  return [{**others(row), 'prompt': row['prompt'], **found} for found in columns], kept


KEEP: dict[str, Callable[[dict, list[dict], Generate, collections.Counter], Kept]] = {
  'all': keep_all,
  'best': keep_best,
  'correct': keep_correct,
  'reasoning': keep_reasoning,
  'ranking': keep_ranking,
  'pairs': keep_pairs,
  'labels': keep_labels,
}


def keep_of(
  rows: Sequence[dict], samples: Sequence[dict], kind: str, g: Generate, dropped: collections.Counter
) -> tuple[list[dict], list[dict], list[dict]]:
  """(what KEEP makes of all problems, the samples in it, the problem of each of these). A sample says by `problem` whose it is."""
  made: list[dict] = []
  kept: list[dict] = []
  owners: list[dict] = []
  of: dict[int, list[dict]] = collections.defaultdict(list)
  for sample in samples:
    of[sample['problem']].append(sample)
  for index, row in enumerate(rows):
    some, chosen = KEEP[kind](row, of[index], g, dropped)
    made += some
    kept += chosen
    owners += [row] * len(chosen)
  return made, kept, owners


def mean(samples: Sequence[Mapping[str, Any]], key: str) -> float | None:
  values = [s[key] for s in samples if s[key] is not None]
  return sum(values) / len(values) if values else None


def kept_and_counted(rows: Sequence[dict], samples: Sequence[dict], g: Generate) -> tuple[list[dict], dict[str, Any]]:
  """(rows of `generate.keep`, counts), of samples that no checkpoint of ours gave."""
  dropped: collections.Counter[str] = collections.Counter()
  made, kept, _ = keep_of(rows, samples, g.keep, g, dropped)
  return made, {
    'prompts': len(rows), 'samples': len(samples), 'kept': len(kept), 'dropped': dropped,
    'without_verdict': sum(s['accuracy'] is None for s in kept),
    'accuracy': {'all': mean(samples, 'accuracy'), 'kept': mean(kept, 'accuracy')},
  }  # fmt: skip


def verdicts(rows: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[float | None]:
  """What the accuracy reward says of completions without their thinking. One that marks no answer (teachers box it) is all answer, as it is
  once it stands between the tags."""
  found: list[float | None] = []
  for start in range(0, len(rows), AT_ONCE):
    some, texts = rows[start : start + AT_ONCE], completions[start : start + AT_ONCE]
    texts = [text if extract_answer(text) is not None else f'<answer>{text}</answer>' for text in texts]
    found += REWARDS['accuracy']([''] * len(some), texts, [[]] * len(some), **columns_of([dict(row) for row in some]))
  return found
