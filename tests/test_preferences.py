"""Judged completions as rows of a batch: which tokens, in which order, what of a row that is too long, and what is refused."""

import re

import numpy as np
import pytest

from rl_reasoning import preferences
from rl_reasoning.config import ConfigError
from rl_reasoning.data import encode_row
from rl_reasoning.preferences import (
  check_preferences,
  encode_preferences,
  encode_rankings,
  encode_steps,
  encode_unpaired,
  encode_verdicts,
)
from rl_reasoning.structs import DATA
from rl_reasoning.tokenizer import ByteTokenizer
from tests.test_tokenizer import turns

TOK = ByteTokenizer()
PAIR = {'prompt': 'ab', 'responses': ['long one', 'no'], 'ranks': [2, 1]}
RANKING = {'prompt': 'q', 'responses': ['x', 'yy', 'z'], 'ranks': [3, 1.5, 3]}
VERDICT = {'prompt': 'q', 'completion': 'yes', 'label': True}
STEPS = {'prompt': 'q', 'completions': ['1+1\n', 'é', '=2'], 'labels': [1, 0.25, 0]}


def row_tokens(batch, n) -> list[int]:
  """The tokens of row n; checks that it is laid out as one sequence, then padding, with the mask on the completion."""
  end = int(batch.segment_NT[n].sum())
  rest = [0] * (batch.tokens.shape[1] - end)
  assert batch.segment_NT[n].tolist() == [1] * end + rest
  assert batch.position_NT[n].tolist() == [*range(end)] + rest
  assert batch.tokens[n, end:].tolist() == rest and batch.mask_NT[n, end:].tolist() == rest
  return batch.tokens[n, :end].tolist()


def whole(prompt: str, completion: str) -> tuple[list[int], list[int]]:
  return encode_row({'prompt': prompt, 'completion': completion}, TOK, 'plain')


def same(batch, n, prompt, completion):
  ids, mask = whole(prompt, completion)
  assert row_tokens(batch, n) == ids and batch.mask_NT[n, : len(ids)].tolist() == mask


def absent(batch, n) -> bool:
  return row_tokens(batch, n) == [] and batch.extras['present'][n] == 0


def test_pairs():
  """Failure: the preferred response is not first, a response lacks its end token, or the margin is not the pair's."""
  batch = encode_rankings([PAIR, {**PAIR, 'ranks': [0, 1], 'margin': 0.5}, {**PAIR, 'ranks': [7, 7]}], TOK, 'plain', 11)
  for n, text in enumerate(['no', 'long one', 'long one', 'no', 'long one', 'no']):
    same(batch, n, 'ab', text)
  assert batch.extras['rank'].tolist() == [0, 1, 0, 1, 0, 0] and batch.extras['present'].tolist() == [1] * 6
  assert batch.extras['margin'].tolist() == [0, 0, 0.5, 0.5, 0, 0]
  assert batch.group_N.tolist() == [0, 0, 1, 1, 2, 2] and batch.source_N.tolist() == [DATA] * 6
  assert {x.dtype for x in batch.extras.values()} == {np.dtype(np.float32)}


def test_rankings():
  """Failure: a ranking is put in another order, its padding is attended to, or close ranks become a tie in float32."""
  far = {'prompt': 'q', 'responses': ['a', 'b'], 'ranks': [10**8 + 2, 10**8 + 1]}
  batch = encode_rankings([RANKING, far], TOK, 'plain', 99, size=4)
  for n, text in enumerate(['x', 'yy', 'z']):
    same(batch, n, 'q', text)
  assert batch.extras['present'].tolist() == [1, 1, 1, 0, 1, 1, 0, 0] and all(absent(batch, n) for n in (3, 6, 7))
  rank = batch.extras['rank']
  assert rank[1] < rank[0] == rank[2] and rank[5] < rank[4]
  assert batch.group_N.tolist() == [0] * 4 + [1] * 4


def test_template_and_messages():
  """Failure: a prompt of chat messages, or the template, is rendered otherwise than where the policy is sampled."""
  talk = {**VERDICT, 'prompt': turns('q1', 'a1', 'q2')}
  assert row_tokens(encode_verdicts([talk], TOK, 'plain', 99), 0) == TOK.encode(TOK.chat(talk['prompt'], True) + 'yes<end>')
  assert row_tokens(encode_verdicts([VERDICT], TOK, 'Q: {prompt}', 99), 0) == TOK.encode('Q: qyes<end>')


def test_unpaired():
  """Failure: the mismatched completion is the row's own or answers the same prompt, has another prompt, or the label of its own row."""
  rows = [{'prompt': p, 'completion': c, 'label': y} for p, c, y in (('p0', 'c0', 1), ('p1', 'cc1', False), ('p2', 'c2', 0.5))]
  batch = encode_unpaired(rows, TOK, 'plain', 99)
  for n, (p, c) in enumerate([('p0', 'c0'), ('p0', 'cc1'), ('p1', 'cc1'), ('p1', 'c2'), ('p2', 'c2'), ('p2', 'c0')]):
    same(batch, n, p, c)
  assert batch.extras['label'].tolist() == [1, 1, 0, 0, 0.5, 0.5] and batch.group_N.tolist() == [0, 0, 1, 1, 2, 2]
  short = encode_unpaired(rows, TOK, 'plain', 6, 'drop')  # p1 cc1 has 6, so all fit
  assert short.extras['present'].tolist() == [1] * 6
  twice = encode_unpaired([rows[0], {**rows[0], 'completion': 'c3'}, rows[1]], TOK, 'plain', 99)
  for n, (p, c) in {1: ('p0', 'cc1'), 3: ('p0', 'cc1'), 5: ('p1', 'c0')}.items():
    same(twice, n, p, c)
  assert encode_unpaired([rows[0]] * 2, TOK, 'plain', 99).extras['present'].tolist() == [1, 0, 1, 0]
  with pytest.raises(ConfigError, match=r"'data.batch_size': 1, but KTO's"):
    encode_unpaired(rows[:1], TOK, 'plain', 99)


def test_mismatch_that_is_too_long():
  """Failure: a run stops at a step whose neighbours happen not to fit, which nothing before it could tell."""
  rows = [{'prompt': 'long prompt', 'completion': 'a', 'label': 1}, {'prompt': 'p', 'completion': 'long answer', 'label': 1}]
  for overlong in ('raise', 'drop'):
    batch = encode_unpaired(rows, TOK, 'plain', 13, overlong)
    assert batch.extras['present'].tolist() == [1, 0, 1, 1] and absent(batch, 1)
  batch = encode_unpaired(rows, TOK, 'plain', 13, 'truncate_prompt')
  same(batch, 0, 'long prompt', 'a')
  same(batch, 1, 't', 'long answer')
  # A dropped row takes its mismatch along, and its completion still serves the row before it.
  batch = encode_unpaired([VERDICT, {**VERDICT, 'prompt': 'too long'}], TOK, 'plain', 8, 'drop')
  same(batch, 1, 'q', 'yes')
  assert batch.extras['present'].tolist() == [1, 1, 0, 0]


def test_steps():
  """Failure: a step's label stands at another token than its last, or the last step's at the end token."""
  batch = encode_steps([STEPS, {**STEPS, 'prompt': 'q' * 99}], TOK, 'plain', 99, 'drop')
  same(batch, 0, 'q', '1+1\né=2')
  ends = [4, 6, 8]  # 'é' is two bytes
  assert [TOK.decode(batch.tokens[0, : end + 1]) for end in ends] == ['q1+1\n', 'q1+1\né', 'q1+1\né=2']
  assert np.flatnonzero(batch.extras['step'][0]).tolist() == ends and batch.tokens[0, 9] == TOK.end_id
  assert batch.extras['step_label'][0, ends].tolist() == [1, 0.25, 0] and batch.extras['step_label'].sum() == 1.25
  assert absent(batch, 1) and not batch.extras['step'][1].any()


def test_overlong():
  """Failure: a limit is off by one, a unit loses one of its responses, or the responses of a unit see different prompts."""
  pair = {'prompt': 'abcdef', 'responses': ['long one', 'no'], 'ranks': [1, 2]}  # 15 tokens and 9
  for overlong in preferences.OVERLONG:
    same(encode_rankings([pair], TOK, 'plain', 15, 2, overlong), 0, 'abcdef', 'long one')
  with pytest.raises(ConfigError, match=r"'data.max_length': 14, but a row has 15 tokens \('data.overlong' .*: 'abcdef'"):
    encode_rankings([pair], TOK, 'plain', 14)
  batch = encode_rankings([PAIR, pair], TOK, 'plain', 14, 2, 'drop')
  same(batch, 0, 'ab', 'no')
  assert absent(batch, 2) and absent(batch, 3)
  for limit, prompt in ((14, 'bcdef'), (10, 'f')):
    batch = encode_rankings([pair], TOK, 'plain', limit, 2, 'truncate_prompt')
    same(batch, 0, prompt, 'long one')
    same(batch, 1, prompt, 'no')
  batch = encode_rankings([pair], TOK, 'plain', 9, 2, 'truncate_prompt')
  assert absent(batch, 0) and absent(batch, 1) and batch.tokens.shape == (2, 16)
  for overlong, dropped in (('drop', 2), ('truncate_prompt', 1)):
    rows = [pair, PAIR, {**pair, 'responses': ['a' * 14, 'b']}]
    assert check_preferences(rows, 'rankings', TOK, 'plain', 14, overlong) == dropped
  assert check_preferences([STEPS, VERDICT | STEPS], 'steps', TOK, 'plain', 10) == 0
  with pytest.raises(ConfigError, match=r"'data\.max_length': 9, but a row has 10 tokens"):
    check_preferences([STEPS], 'steps', TOK, 'plain', 9)


@pytest.mark.parametrize(
  'reads, change, why',
  [
    ('rankings', {'ranks': None}, "ranks 'None' is no list"),
    ('rankings', {'ranks': [1]}, '2 responses but 1 ranks'),
    ('rankings', {'ranks': [1, 'b']}, "rank 'b' is no number"),
    ('rankings', {'ranks': [1, float('nan')]}, 'rank nan is no number'),
    ('rankings', {'responses': ['a'], 'ranks': [1]}, 'two responses or more'),
    (
      'rankings',
      {'responses': ['a', 'b', 'c'], 'ranks': [1, 2, 3]},
      r'reads 2 responses, but a row has 3 \(objective.ranking_size',
    ),
    ('rankings', {'responses': ['a', ' \n']}, r"one of the responses, ' \\n', is no text, or empty"),
    ('rankings', {'responses': 'ab'}, "responses 'ab' is no list"),
    ('rankings', {'responses': ['a', 'a']}, 'two responses are equal, but not their ranks'),
    ('rankings', {'margin': -0.1}, 'margin -0.1 is no number of at least 0'),
    ('rankings', {'prompt': ' '}, 'the prompt is no text'),
    ('rankings', {'prompt': []}, 'the prompt is no text'),
    ('rankings', {'prompt': [{'role': 'user', 'content': ''}]}, 'the prompt is no text'),
    ('rankings', {'prompt': [{'role': 'user'}]}, 'the prompt is no text'),
    ('rankings', {'ranks': [0, 10**400]}, 'rank 1000.* is no number'),
    ('rankings', {'ranks': [False, True]}, 'rank False is no number'),
    ('unpaired', {'completion': ''}, "completion '' is no text, or empty"),
    ('verdicts', {'label': 1.5}, r'label 1.5 is no number in \[0, 1\]'),
    ('verdicts', {'label': None}, r'label None is no number in \[0, 1\]'),
    ('steps', {'labels': [1, 0]}, '3 completions but 2 labels'),
    ('steps', {'labels': [1, 0, 2]}, 'label 2 is no number'),
    ('steps', {'completions': [], 'labels': []}, 'completions is empty'),
    ('steps', {'completions': ['a', '', 'b']}, "one of the completions, '', is no text"),
  ],
)
def test_refused(reads, change, why):
  """Failure: a row that says nothing, or contradicts itself, is learned from; or the error does not show which row."""
  good = {'rankings': PAIR, 'unpaired': VERDICT, 'verdicts': VERDICT, 'steps': STEPS}[reads]
  bad = {**good, **change}
  assert check_preferences([good], reads, TOK, 'plain', 99) == 0
  for call in (check_preferences, encode_preferences):
    with pytest.raises(ConfigError, match=why) as caught:
      call([good, bad], reads, TOK, 'plain', 99)
    assert str(caught.value).endswith(f': {preferences.excerpt(bad["prompt"])}')


@pytest.mark.parametrize('reads', preferences.COLUMNS)
def test_columns(reads):
  """Failure: a row without a column is a KeyError, far from the data."""
  row = {**PAIR, **VERDICT, **STEPS}
  for name in preferences.COLUMNS[reads]:
    lacking = {key: value for key, value in row.items() if key != name}
    with pytest.raises(ConfigError, match=re.escape(f'a row of {reads} has no column {name}; columns: {", ".join(lacking)}')):
      encode_preferences([lacking] * 2, reads, TOK, 'plain', 99)


def test_margin_and_ties():
  """Failure: a margin is given to more than a pair, equal samples that tie are refused, or a margin of None is not 0."""
  with pytest.raises(ConfigError, match='a margin is between two responses, and there are 3'):
    encode_rankings([{**RANKING, 'margin': 1}], TOK, 'plain', 99, 3)
  assert encode_rankings([{**PAIR, 'margin': None}], TOK, 'plain', 99).extras['margin'].tolist() == [0, 0]
  assert check_preferences([{**PAIR, 'responses': ['a', 'a'], 'ranks': [1, 1]}], 'rankings', TOK, 'plain', 99) == 0
