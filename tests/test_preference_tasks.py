"""Preference data: every shape becomes the same columns, what says nothing is counted, and rankings made by hand are never lost."""

import gzip
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from rl_reasoning import data, preferences
from rl_reasoning.config import ConfigError, Data
from rl_reasoning.tasks import TASKS, __main__ as tool, dataset, pandalm, preference, rank
from rl_reasoning.tasks.procedural import is_test
from rl_reasoning.tokenizer import ByteTokenizer

SHARED = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data'
HH, PANDALM = SHARED / 'hh_rlhf', SHARED / 'pandalm'
PAIR = {'prompt': 'Hi?', 'chosen': 'Hello.', 'rejected': 'No.'}
RANKING = {'prompt': 'Hi?', 'responses': ['a', 'b', 'c'], 'ranks': [2, 0.5, 2]}
VERDICT = {'prompt': 'Hi?', 'completion': 'Hello.', 'label': True}
STEPS = {'prompt': 'Hi?', 'completions': ['One.', 'Two.'], 'labels': [1, 0.25]}


def needs(folder):
  if not folder.exists():
    pytest.skip(f'{folder} is not here')


def said(*contents, role='user'):
  """Messages who take turns; the last one is the assistant's where their number is even."""
  roles = itertools.cycle([role, 'user' if role == 'assistant' else 'assistant'])
  return [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=False)]


def write(path, rows):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())
  return path


def make(task, path, split='test', size=None, **options):
  return list(TASKS[task].rows(split, 0, size, str(path), **options))


def read(tmp_path, *rows, **options):
  """The rows as the preference task gives them."""
  write(tmp_path / 'test.jsonl', rows)
  return make('preference', tmp_path, **options)


def longer_is_better(rows):
  """Share of the pairs without a tie, in rank and in length, whose longer response is the better one."""
  lengths = [[len(text) for _, text in sorted(zip(row['ranks'], row['responses']))] for row in rows if len({*row['ranks']}) == 2]
  return sum(a > b for a, b in lengths) / sum(a != b for a, b in lengths)


MESSAGES = said('Hi?', 'Hello.'), said('Hi?', 'No.')
TEXT = 'Human: Hi?\n\nAssistant:'


@pytest.mark.parametrize(
  'row,prompt,responses',
  [
    (PAIR, 'Hi?', ['Hello.', 'No.']),
    ({**PAIR, 'prompt': said('Hi?')}, said('Hi?'), ['Hello.', 'No.']),
    ({'prompt': 'Hi?', 'chosen': MESSAGES[0][1:], 'rejected': MESSAGES[1][1:]}, 'Hi?', ['Hello.', 'No.']),
    ({'prompt': said('Hi?'), 'chosen': MESSAGES[0][1:], 'rejected': MESSAGES[1][1:]}, said('Hi?'), ['Hello.', 'No.']),
    ({'chosen': MESSAGES[0], 'rejected': MESSAGES[1]}, said('Hi?'), ['Hello.', 'No.']),
    ({'prompt': None, 'chosen': MESSAGES[0], 'rejected': MESSAGES[1]}, said('Hi?'), ['Hello.', 'No.']),
    ({'prompt': 'Hi? ', 'chosen': MESSAGES[0], 'rejected': MESSAGES[1]}, said('Hi?'), ['Hello.', 'No.']),
    ({'prompt': said('Hi?'), 'chosen': MESSAGES[0], 'rejected': MESSAGES[1]}, said('Hi?'), ['Hello.', 'No.']),
    ({'prompt': said('Hi?', 'Yes?'), 'chosen': said('Go on', 'a'), 'rejected': said('Go on', 'b')}, said('Hi?', 'Yes?', 'Go on'),
     ['a', 'b']),
    ({'chosen': said('a', 'b', 'c', 'd'), 'rejected': said('a', 'b', 'c', 'e')}, said('a', 'b', 'c'), ['d', 'e']),
    ({'chosen': TEXT + ' Hello.', 'rejected': TEXT + ' Hello!'}, TEXT, [' Hello.', ' Hello!']),
    ({'chosen': f'{TEXT} a\n\n{TEXT} b', 'rejected': f'{TEXT} a\n\n{TEXT} c'}, f'{TEXT} a\n\n{TEXT}', [' b', ' c']),
    ({'chosen': '### Instruction:\nA\n\n### Response:\nx', 'rejected': '### Instruction:\nA\n\n### Response:\ny'},
     '### Instruction:\nA\n\n### Response:', ['\nx', '\ny']),
    ({'chosen': 'USER: A ASSISTANT: x', 'rejected': 'USER: A ASSISTANT: xy'}, 'USER: A ASSISTANT:', [' x', ' xy']),
    ({'chosen': '<|im_start|>assistant\nx', 'rejected': '<|im_start|>assistant\ny'}, '<|im_start|>assistant\n', ['x', 'y']),
  ],
)  # fmt: skip
def test_pairs(tmp_path, row, prompt, responses):
  """Failure: one of TRL's ways to write a pair loses its prompt, repeats it in the responses, or is read the wrong way round."""
  expected = {'prompt': prompt, 'responses': responses, 'ranks': [0, 1], 'source': 's', 'margin': 0.5}
  assert read(tmp_path, {**row, 'source': 's', 'margin': 0.5}) == [expected]


def test_other_shapes(tmp_path):
  """Failure: a ranking, a verdict or steps are changed on the way, further columns are lost, or the encoder refuses what this reads."""
  rows = [
    {**RANKING, 'answer': '7', 'margin': None},
    {**VERDICT, 'safety': True, 'responses': None, 'ranks': None},
    {**VERDICT, 'completion': said('Hello.', role='assistant'), 'label': 0.5},
    {**STEPS, 'margin': 'far'},
  ]
  found = read(tmp_path, *rows)
  assert found == [rows[0], {**VERDICT, 'safety': True}, {**VERDICT, 'label': 0.5}, rows[3]]
  for row, reads in zip(found, ('rankings', 'verdicts', 'unpaired', 'steps'), strict=True):
    assert preferences.check_preferences([row], reads, ByteTokenizer(), 'plain', 100, size=3) == 0
  (separated,) = read(tmp_path, STEPS, step_separator='\n')
  assert separated == {**STEPS, 'completions': ['One.\n', 'Two.']}
  assert read(tmp_path, {'q': 'Hi?', 'good': 'a', 'bad': 'b'}, columns={'q': 'prompt', 'good': 'chosen', 'bad': 'rejected'}) == [
    {'prompt': 'Hi?', 'responses': ['a', 'b'], 'ranks': [0, 1]}
  ]


@pytest.mark.parametrize(
  'row,reason',
  [
    ({**PAIR, 'prompt': None}, "no column prompt, and in 'chosen' or 'rejected' no marker"), ({**PAIR, 'prompt': '  '}, 'prompt is empty'),
    ({**PAIR, 'prompt': 3}, "'prompt' is int"), ({**PAIR, 'prompt': []}, "'prompt' is not a list of"),
    ({'chosen': 'x\n\nHello Assistant: y', 'rejected': 'x\n\nHello Assistant: z'}, 'no marker'),
    ({'chosen': MESSAGES[0][1:], 'rejected': MESSAGES[1][1:]}, 'no prompt'), ({**RANKING, 'prompt': None}, 'no prompt'),
    ({'completion': 'a', 'label': 1}, 'no prompt'), ({'completions': ['a'], 'labels': [1]}, 'no prompt'),
    ({**PAIR, 'rejected': MESSAGES[1]}, 'are str and list'), ({**PAIR, 'rejected': 3}, 'are str and int'),
    ({'chosen': MESSAGES[0], 'rejected': [{'role': 'assistant', 'content': None}]}, "'rejected' is not a list of"),
    ({'chosen': MESSAGES[0], 'rejected': said('a', 'b', 'c')}, "ends with a message of 'user'"),
    ({'prompt': 'Other?', 'chosen': MESSAGES[0], 'rejected': MESSAGES[1]}, 'prompt is none of the messages'),
    ({**PAIR, 'margin': -0.5}, "'margin' is -0.5"), ({**PAIR, 'margin': float('nan')}, "'margin' is nan"),
    ({**RANKING, 'margin': 1}, 'a margin is between two'),
    ({**RANKING, 'responses': ['a', 'b'], 'ranks': [1, 1], 'margin': 2}, 'two responses that tie'),
    ({**RANKING, 'responses': ['a'], 'ranks': [0]}, 'a ranking of 1,'),
    ({**RANKING, 'responses': [], 'ranks': []}, 'a ranking of 0,'), ({**RANKING, 'ranks': [0, 1]}, '3 texts, but 2 ranks'),
    ({**RANKING, 'ranks': [0, 1, float('nan')]}, "'ranks' holds nan, no finite"), ({**RANKING, 'ranks': [0, 1, True]}, 'holds True'),
    ({**RANKING, 'ranks': [0, 1, float('inf')]}, 'holds inf'), ({**RANKING, 'ranks': [0, 1, 10**400]}, 'no finite number'),
    ({**RANKING, 'ranks': [0, 1, 4]}, 'holds 4: places are from 0'), ({**RANKING, 'ranks': [0.5, -1.5, 2]}, 'holds -1.5'),
    ({**RANKING, 'ranks': ['1', '2', '3']}, "holds '1'"), ({**RANKING, 'ranks': 'first'}, "'ranks' is str"),
    ({**RANKING, 'responses': ['a', 'b', 3]}, "'responses' is no list of texts"), ({**RANKING, 'responses': 'abc'}, 'no list of texts'),
    ({**VERDICT, 'label': 1.5}, "'label' is 1.5"), ({**VERDICT, 'label': float('nan')}, "'label' is nan"),
    ({**VERDICT, 'label': 'good'}, "'label' is 'good'"), ({**VERDICT, 'completion': 3}, "'completion' is int"),
    ({**VERDICT, 'completion': MESSAGES[0]}, 'has 2 messages'), ({**STEPS, 'labels': [1]}, '2 texts, but 1 labels'),
    ({**STEPS, 'labels': [1, -1]}, 'holds -1'), ({**STEPS, 'completions': [], 'labels': []}, 'no step to judge'),
    ({'prompt': 'a', 'chosen': 'b'}, 'no preference: .* responses [+] ranks, chosen [+] rejected'),
    ({**PAIR, **VERDICT}, 'which of chosen [+] rejected, completion [+] label is meant'),
    ({**PAIR, 'completions': ['a']}, "'completions' has the name of what reward functions get"),
  ],
)  # fmt: skip
def test_refused(tmp_path, row, reason):
  """Failure: a row that cannot be meant is trained on or ends the run later, or the error does not say where it stands."""
  with pytest.raises(ConfigError, match=rf'test\.jsonl:2: .*{reason}'):
    read(tmp_path, PAIR, row)


@pytest.mark.parametrize(
  'row,reason',
  [
    ({**PAIR, 'rejected': ' Hello.'}, 'with equal texts'), ({**RANKING, 'responses': ['a', 'b', 'a '], 'ranks': [0, 1, 2]}, 'equal texts'),
    ({**RANKING, 'responses': ['a', 'a', 'a'], 'ranks': [0, 0, 0]}, 'with equal texts'), ({**PAIR, 'chosen': ' \n'}, 'an empty turn'),
    ({**PAIR, 'prompt': said('a', '', 'b')}, 'an empty turn'), ({**RANKING, 'responses': ['', 'b', 'c']}, 'an empty turn'),
    ({**VERDICT, 'completion': ''}, 'an empty turn'), ({**STEPS, 'completions': ['a', ' ']}, 'an empty turn'),
    ({'chosen': MESSAGES[0], 'rejected': said('Ho?', 'No.')}, 'that differ before the last turn'),
    ({'chosen': TEXT + ' a', 'rejected': f'{TEXT} b\n\n{TEXT} c'}, 'that differ before the last turn'),
    ({**PAIR, 'prompt': 'x' * 15}, 'longer than 20 characters'), ({**PAIR, 'prompt': said('x' * 10, 'y' * 5)}, 'longer than 20 char'),
    ({**STEPS, 'prompt': 'x' * 13}, 'longer than 20 characters'), ({**RANKING, 'ranks': [1, 1, 1]}, 'with nothing but ties'),
  ],
)  # fmt: skip
def test_left_out(tmp_path, capsys, row, reason):
  """Failure: what a few rows of every real set have ends the run or is trained on, or nobody is told."""
  options = {'max_chars': 20} if 'longer' in reason else {'pairs': True} if 'ties' in reason else {}
  kept = {**PAIR, 'prompt': 'x' * 14}  # twenty characters with the longer response
  assert len(read(tmp_path, kept, row, row, **options)) == 1
  told = capsys.readouterr().err
  assert told.startswith(f'{tmp_path}/test.jsonl: 2 of 3 rows are left out: 2 ') and reason in told and told.count('\n') == 1


def test_counts_once_a_split(tmp_path, capsys):
  """Failure: a file that is read for the other split's prompts is counted as if it were trained on, or counts are added up twice."""
  equal = {**PAIR, 'rejected': 'Hello.'}
  write(tmp_path / 'test.jsonl', [PAIR, equal, equal])
  write(tmp_path / 'train.jsonl', [{**PAIR, 'prompt': 'Ho?'}, equal, {**PAIR, 'chosen': ' '}])
  assert [row['prompt'] for row in make('preference', tmp_path, 'train')] == ['Ho?']
  assert capsys.readouterr().err == (
    f'{tmp_path}/train.jsonl: 2 of 3 rows are left out: 1 with an empty turn, 1 with equal texts\n'
  )
  assert len(make('preference', tmp_path)) == 1
  assert capsys.readouterr().err == f'{tmp_path}/test.jsonl: 2 of 3 rows are left out: 2 with equal texts\n'


def test_pairs_of_rankings(tmp_path):
  """Failure: a ranking gives too few pairs, its ties, pairs the wrong way round, or rows beyond the size."""
  ranking = {'prompt': 'q', 'responses': ['a', 'b', 'c', 'd'], 'ranks': [3, 1, 3, 0], 'answer': '5'}
  pairs = read(tmp_path, ranking, PAIR, pairs=True)
  assert [(row['responses'], row['ranks'], row['prompt']) for row in pairs] == [
    (texts, [0, 1], 'q') for texts in (['b', 'a'], ['d', 'a'], ['b', 'c'], ['d', 'b'], ['d', 'c'])
  ] + [(['Hello.', 'No.'], [0, 1], 'Hi?')]
  assert all(row['answer'] == '5' for row in pairs[:5])
  assert read(tmp_path, ranking, PAIR, pairs=True, size=3) == pairs[:3]
  assert read(tmp_path, ranking) == [ranking]  # whole, as it stands


@pytest.mark.parametrize(
  'task,options,reason',
  [
    ('preference', {'max_chars': -1}, 'max_chars'), ('preference', {'columns': {'a': 'b'}}, 'columns'),
    ('preference', {'step_separator': '\n'}, 'step_separator.* cannot act: .*test.jsonl:1'), ('hh_rlhf', {'max_chars': -1}, 'max_chars'),
    ('hh_rlhf', {'test_share': 0.0}, 'test_share'), ('hh_rlhf', {'test_share': 1.0}, 'test_share'),
  ],
)  # fmt: skip
def test_options_out_of_range(tmp_path, task, options, reason):
  """Failure: an option that cannot be meant, or that nothing reads, is taken."""
  write(tmp_path / 'test.jsonl', [PAIR])
  with pytest.raises(ConfigError, match=rf'data\.options\.{reason}'):
    make(task, tmp_path, **options)


def test_pairs_of_verdicts(tmp_path):
  """Failure: a knob that cannot act on verdicts is accepted."""
  with pytest.raises(ConfigError, match=r"'data\.options\.pairs' cannot act: .*test\.jsonl:2"):
    read(tmp_path, PAIR, VERDICT, pairs=True)


def test_splits_of_preferences(tmp_path):
  """Failure: a prompt of the test split is trained on, or a single file's splits overlap, lose rows or change with the share."""
  write(tmp_path / 'test.jsonl', [PAIR])
  write(tmp_path / 'train.jsonl', [{**RANKING, 'prompt': said(' hi?')}, {**PAIR, 'prompt': 'Ho?'}])
  assert [row['prompt'] for row in make('preference', tmp_path, 'train')] == ['Ho?']
  single = write(tmp_path / 'all.jsonl', [{**PAIR, 'prompt': f'Is it {n}?'} for n in range(300)])
  train, test = (make('preference', single, split) for split in ('train', 'test'))
  assert len(train) + len(test) == 300 and 15 < len(test) < 50 and not [row for row in test if row in train]
  assert all(is_test(dataset.identity(row)) for row in test) and not any(is_test(dataset.identity(row)) for row in train)
  held_out = [{row['prompt'] for row in train + test if is_test(dataset.identity(row), share)} for share in (0.1, 0.25, 0.5)]
  assert held_out[0] < held_out[1] < held_out[2] and 50 < len(held_out[1]) < 100 and 120 < len(held_out[2]) < 180


def test_through_the_config(tmp_path):
  """Failure: the options of a task cannot be written in a config, or its rows do not pass through the prepared files."""
  write(tmp_path / 'd' / 'train.jsonl', [{**RANKING, 'q': RANKING['prompt'], 'prompt': None}])
  options = {'columns': {'q': 'prompt', 'prompt': 'none'}, 'pairs': True, 'max_chars': 1000}
  write(tmp_path / 'd' / 'test.jsonl', [{'q': 'Ho?', 'prompt': None, 'chosen': 'a', 'rejected': 'b'}])
  settings = Data(task='preference', path=str(tmp_path / 'd'), cache_dir=str(tmp_path / 'cache'), options=options)
  source = data.load(settings, 'train', 0, None)
  assert [source[i]['responses'] for i in range(len(source))] == [['b', 'a'], ['b', 'c']]


DIALOGUE = '\n\nHuman: {}\n\nAssistant:'


def pair(question, chosen, rejected):
  asked = DIALOGUE.format(question)
  return {'chosen': f'{asked} {chosen}', 'rejected': f'{asked} {rejected}'}


def test_dialogues(tmp_path, capsys):
  """Failure: a turn is lost or given to the other speaker, what a model invented is trained on, or a crooked dialogue ends the run."""
  two = f'{DIALOGUE.format("Hi?")} Yes?\n\nHuman: Why: say.\n\nAssistant:'
  rows = [
    {'chosen': two + ' Human: so. ', 'rejected': two + '\n\nNo.'},
    pair('Twice?', 'One.\n\nAssistant: Two.\n\nHuman: Go on.\n\nAssistant: x', 'One.\n\nAssistant: Two.\n\nHuman: Go on.\n\nAssistant: y'),
    {column: text.strip() for column, text in pair('Bare?', 'x', 'y').items()},
    pair('Sequel?', 'x', 'y\n\nHuman: And?\n\nAssistant: z'), pair('Doubled?', 'x', 'y\n\nAssistant: z'), pair('Equal?', 'x', ' x'),
    pair('Empty?', 'x', ''), pair('', 'x', 'y'), {'chosen': '\n\nAssistant: x', 'rejected': '\n\nAssistant: y'},
    pair('Cut?', 'x\n\nHuman: And?', 'x\n\nHuman: And?'), {'chosen': 'Hm.' + two + ' a', 'rejected': 'Hm.' + two + ' b'},
    pair('Two answers?', 'z\n\nAssistant: x', 'z\n\nAssistant: y'),
    {'chosen': '\n\nHuman: a\n\nHuman: b', 'rejected': '\n\nHuman: a\n\nHuman: c'},
  ]  # fmt: skip
  write(tmp_path / 'helpful_test.jsonl.gz', rows)
  write(tmp_path / 'helpful_train.jsonl.gz', [pair('HI?', 'x', 'y'), pair('hi? why: SAY.', 'x', 'y'), pair('New?', 'x', 'y')])
  found = make('hh_rlhf', tmp_path)
  assert found == [
    {'prompt': said('Hi?', 'Yes?', 'Why: say.'), 'responses': ['Human: so.', 'No.'], 'ranks': [0, 1]},
    {'prompt': said('Twice?', 'One.\n\nTwo.', 'Go on.'), 'responses': ['x', 'y'], 'ranks': [0, 1]},
    {'prompt': said('Bare?'), 'responses': ['x', 'y'], 'ranks': [0, 1]},
  ]
  assert capsys.readouterr().err == (
    f'{tmp_path}/helpful_test.jsonl.gz: 10 of 13 rows are left out: 5 that are no dialogue from Human to Assistant, '
    '2 that differ before the last turn, 2 with an empty turn, 1 with equal texts\n'
  )
  assert [row['prompt'][0]['content'] for row in make('hh_rlhf', tmp_path, 'train')] == ['HI?', 'New?']
  assert make('hh_rlhf', tmp_path, size=2) == found[:2] and len(make('hh_rlhf', tmp_path, max_chars=10)) == 1
  for row, reason in (
    ({'chosen': 'a', 'rejected': 'b'}, 'no turn of Human'),
    ({'chosen': 'a'}, 'no turn'),
    ({}, "column 'chosen'"),
  ):
    write(tmp_path / 'helpful_test.jsonl.gz', [rows[0], row])
    with pytest.raises(ConfigError, match=rf'helpful_test\.jsonl\.gz:2: .*{reason}'):
      make('hh_rlhf', tmp_path)


@pytest.mark.parametrize('names', [
  ('helpful_train_gt.jsonl', 'helpful_train_w2s.jsonl.gz', 'helpful_test.jsonl', 'harmless_base_test.jsonl.gz'),
  ('helpful/train-gt.jsonl', 'helpful/train-w2s.jsonl.gz', 'helpful/test.jsonl', 'harmless-base/test.jsonl.gz'),
])  # fmt: skip
def test_subsets(tmp_path, names):
  """Failure: a subset, split or part is read from the wrong file, the published folders from none, or a prompt is in both splits."""
  questions = [[f'{name[:10]} {n}?' for n in range(60)] for name in ('gt', 'w2s', 'test', 'harmless')]
  questions[1][0] = questions[2][5]
  for name, asked in zip(names, questions, strict=True):
    write(tmp_path / name, [pair(question, 'x', 'y') for question in asked])
  write(tmp_path / 'red-team-attempts' / 'red_team_attempts.jsonl.gz', [{'transcript': 'a'}])

  def asked(split, **options):
    return [row['prompt'][0]['content'] for row in make('hh_rlhf', tmp_path, split, **options)]

  gt, w2s, test, harmless = questions
  assert asked('train', subset='helpful') == gt + w2s[1:] and asked('test', subset='helpful') == test
  assert asked('train', subset='helpful', part='w2s') == w2s[1:] and asked('test', subset='helpful', part='gt') == test
  train, held_out = (asked(split, subset='harmless_base', test_share=0.5) for split in ('train', 'test'))
  assert sorted(train + held_out) == sorted(harmless) and 15 < len(held_out) < 45
  assert len(asked('test', subset='harmless')) < len(held_out)
  both = make('hh_rlhf', tmp_path, 'train', part='gt', safety=True, test_share=0.5)
  assert {row['prompt'][0]['content']: row['safety'] for row in both} == {
    **dict.fromkeys(train, True),
    **dict.fromkeys(gt, False),
  }
  single = make('hh_rlhf', tmp_path / names[3], 'train') + make('hh_rlhf', tmp_path / names[3])
  assert sorted(row['prompt'][0]['content'] for row in single) == sorted(harmless)
  for options, reason in (
    ({'subset': 'help'}, "'help' begins none of harmless-base, helpful"), ({'part': 'g'}, "'g' is none of gt, w2s"),
    ({'subset': 'helpful', 'test_share': 0.2}, 'cannot act'),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=rf'data\.options\.(subset|part|test_share).*{reason}'):
      asked('train', **options)
  with pytest.raises(ConfigError, match='its name does not say'):
    make('hh_rlhf', write(tmp_path / 'mine.jsonl', [pair('a', 'x', 'y')]), safety=True)
  (tmp_path / 'none').mkdir()
  with pytest.raises(ConfigError, match=r"'data\.path': no file named like"):
    make('hh_rlhf', tmp_path / 'none')


def test_hh_rlhf_from_the_hub(tmp_path, monkeypatch):
  """Failure: without a path another data set is fetched, or its folders are not understood."""
  import huggingface_hub

  write(tmp_path / 'helpful-base' / 'test.jsonl.gz', [pair('Hi?', 'x', 'y')])
  asked = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: asked.append(name) or str(tmp_path))
  assert len(make('hh_rlhf', '', subset='helpful-base') + make('hh_rlhf', '', 'train')) == 1
  assert {*asked} == {'Anthropic/hh-rlhf'}


def test_hh_rlhf_as_published(capsys):
  """Failure: chosen and rejected are swapped or cut elsewhere (the length baselines would differ), splits leak, or too few pairs are held
  out; the numbers are those counted when the data were fetched."""
  needs(HH)
  train, test = (make('hh_rlhf', HH, split, subset='helpful', part='gt') for split in ('train', 'test'))
  assert (len(train), len(test)) == (3964, 3991)
  assert not {dataset.identity(row) for row in train} & {dataset.identity(row) for row in test}
  assert 0.62 < longer_is_better(train) < 0.64 and 0.62 < longer_is_better(test) < 0.64
  assert all(len(row['prompt']) == 1 for row in train + test)
  told = capsys.readouterr().err
  assert '9 of 4,000 rows are left out: 6 that differ before the last turn, 1 with an empty turn, 2 with equal texts' in told
  safe, tested = (make('hh_rlhf', HH, split, subset='harmless', safety=True, test_share=0.25) for split in ('train', 'test'))
  assert len(safe + tested) == 2303 and len(tested) >= 500 and all(row['safety'] for row in safe + tested)
  assert 0.43 < longer_is_better(safe + tested) < 0.45 and {len(row['prompt']) for row in safe} >= {1, 3, 5, 7}
  assert capsys.readouterr().err.count('9 of 2,312 rows are left out: 5 that differ') == 2
  for row in safe + tested:
    assert [message['role'] for message in row['prompt']] == ['user', *['assistant', 'user'] * (len(row['prompt']) // 2)]
  assert preferences.check_preferences(tested, 'rankings', ByteTokenizer(), 'chat', 10**6) == 0


JUDGED = {
  'instruction': 'Do.',
  'input': '',
  'response1': 'a',
  'response2': 'b',
  'annotator1': 1,
  'annotator2': 1,
  'annotator3': 2,
}


def test_pandalm(tmp_path, capsys):
  """Failure: a vote counts for the other response, a tie is none, what JSON took for a bool is refused, or it is trained on."""
  rows = [
    JUDGED, {**JUDGED, 'input': ' It. ', 'annotator1': 2}, {**JUDGED, 'annotator1': 0, 'annotator2': 0, 'response1': True, 'response2': 5},
    {**JUDGED, 'annotator3': 0, 'annotator2': 2}, {**JUDGED, 'response2': None},
  ]  # fmt: skip
  (tmp_path / 'testset-v1.json').write_text(json.dumps(rows))
  assert make('pandalm', tmp_path) == [
    {'prompt': 'Do.', 'responses': ['a', 'b'], 'ranks': [0, 1]},
    {'prompt': 'Do.\n\nIt.', 'responses': ['a', 'b'], 'ranks': [1, 0]},
    {'prompt': 'Do.', 'responses': ['True', '5'], 'ranks': [0, 0]},
  ]
  assert '2 of 5 rows are left out: 1 with an empty turn, 1 without a majority' in capsys.readouterr().err
  assert len(make('pandalm', tmp_path / 'testset-v1.json', size=1)) == 1
  with pytest.raises(ConfigError, match=r"'data\.task': 'pandalm' is for evaluation only"):
    make('pandalm', tmp_path, 'train')
  for key, value in (
    ('annotator2', 3),
    ('annotator2', True),
    ('annotator2', None),
    ('annotator2', '1'),
    ('input', KeyError),
    ('input', ['It.']),
  ):
    row = {k: value if k == key else v for k, v in JUDGED.items() if not (k == key and value is KeyError)}
    (tmp_path / 'testset-v1.json').write_text(json.dumps([JUDGED, row]))
    with pytest.raises(ConfigError, match=rf'testset-v1\.json:2: .*{key[:9]}'):
      make('pandalm', tmp_path)
  for path, reason in (('', 'is empty'), (tmp_path / 'none', 'no file testset')):
    (tmp_path / 'none').mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=rf"'data\.path'.*{reason}"):
      make('pandalm', path)


def test_pandalm_as_published():
  """Failure: majorities, ties or responses are read wrongly. "Longer is better" is right on 67 % of all its pairs."""
  needs(PANDALM)
  every = [pandalm.convert(row, place) for place, row in dataset.read(PANDALM / 'testset-v1.json')]
  assert len(every) == 999 and sum(row['ranks'] == [0, 0] for row in every) == 105
  assert 0.665 < longer_is_better(every) < 0.68
  rows = make('pandalm', PANDALM)
  assert len(rows) == 945 and 0.65 < longer_is_better(rows) < 0.66  # without those of which one is empty
  assert preferences.check_preferences(rows, 'rankings', ByteTokenizer(), 'chat', 10**6) == 0


SAMPLES = [
  {'prompt': 'One?', 'responses': ['a', ' a', '', 'b', 'c'], 'rewards': [1, 1, 0, 0, 0], 'answer': '1'},
  {'prompt': said('Two?'), 'responses': ['x', 'y']},
  {'prompt': 'Alone?', 'responses': ['same', 'same ', '']},
  {'prompt': 'Three?', 'responses': ['k', 'l', 'm']},
]


@pytest.fixture
def session(tmp_path, monkeypatch, capsys):
  """session(*typed) -> (exit code, rows of the output, what was printed)."""
  path = write(tmp_path / 'train.jsonl', SAMPLES)

  def run(*typed, flags=()):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''.join(line + '\n' for line in typed)))
    code = tool.main(['rank', str(path), '--ranked-by=ann', *flags])
    out = tmp_path / 'ranked_train.jsonl'
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return code, rows, capsys.readouterr()

  return run


def test_rankings_are_of_what_was_shown(session, tmp_path):
  """Failure: the number typed is taken for another response than the one that was shown under it, or the first place is always the same."""
  code, rows, told = session('2 1=3', '1 2', '3>2 >1')
  assert code == 0 and [row['prompt'] for row in rows] == ['One?', said('Two?'), 'Three?']
  assert 'train.jsonl: 1 rows are left out' in told.out and '3 rankings; 0 rows' in told.out
  shown = [block.split('\n')[1].removeprefix('  | ') for block in told.out.split('\n[')[1:]]
  expected = [{1: 1, 2: 0, 3: 1}, {1: 0, 2: 1}, {1: 2, 2: 1, 3: 0}]
  for row, ranks in zip(rows, expected, strict=True):
    seen, shown = shown[: len(ranks)], shown[len(ranks) :]
    assert dict(zip(row['responses'], row['ranks'], strict=True)) == {seen[n - 1]: r for n, r in ranks.items()}
    assert [row['responses'][i] for i in row['shown']] == seen and row['ranked_by'] == 'ann'
  assert not shown and rows[0]['responses'] == ['a', 'b', 'c']  # each text once, empty ones never
  assert (
    len(make('preference', tmp_path / 'ranked_train.jsonl') + make('preference', tmp_path / 'ranked_train.jsonl', 'train')) == 3
  )
  assert dataset.files(str(tmp_path), 'train') == [tmp_path / 'train.jsonl']  # the rankings are no training file by their name
  items = [rank.Item(str(n), 'p', ['a', 'b', 'c']) for n in range(300)]
  orders = [tuple(rank.shuffled(item, seed=0)) for item in items]
  assert all(30 < orders.count(order) < 75 for order in itertools.permutations(range(3)))
  assert (
    orders == [tuple(rank.shuffled(item, seed=0)) for item in items] != [tuple(rank.shuffled(item, seed=1)) for item in items]
  )


@pytest.mark.parametrize(
  'text,found',
  [
    ('2 1=3', [[1], [0, 2]]), ('3>1 > 2', [[2], [0], [1]]), ('1 = 2=3', [[0, 1, 2]]), (' 1  2\t3 ', [[0], [1], [2]]), ('', None),
    ('1 2', None),
    ('1 2 2', None), ('1 2 3 4', None), ('0 1 2', None), ('1 2 =', None), ('1 = = 2 3', None), ('1 2 ３', None), ('1 2 -3', None),
    ('123', None), ('1,2,3', None), ('9' * 5000, None),
  ],
)  # fmt: skip
def test_read_answer(text, found):
  """Failure: a mistyped ranking is saved as if it were meant, or ends the session."""
  assert rank.read_answer(text, 3) == found


def test_session_goes_on(session):
  """Failure: a row is asked twice, one is lost, an answer that cannot be read is saved, or skipped rows are never asked again."""
  _, rows, told = session('what', '1 2 3', 'Q')
  assert len(rows) == 1 and told.out.count('One?') == 1 and 'name each of 1 to 3 once, or one of s, q' in told.out
  _, rows, told = session('s', '1=2=3')
  assert [row['prompt'] for row in rows] == ['One?', 'Three?'] and rows[1]['ranks'] == [0, 0, 0]
  assert 'One?' not in told.out and '1 rows of' in told.out
  _, rows, told = session()
  assert len(rows) == 2 and 'Two?' in told.out and 'Three?' not in told.out
  _, rows, _ = session('1 2')
  assert len(rows) == 3
  code, again, told = session()
  assert (code, again) == (0, rows) and 'that was the last' in told.out


def test_undo(session):
  """Failure: undo takes back another answer than the last one, or a ranking that is taken back stays in the file."""
  _, rows, told = session('u', '1 2 3', 's', 'u', 'u', '3 2 1', '1 2', '1 2 3', 'u', 'u', '2 1', '3 2 1', 'q')
  assert [row['prompt'] for row in rows] == ['One?', said('Two?'), 'Three?'] and 'nothing to undo' in told.out
  best = [row['responses'][row['ranks'].index(0)] for row in rows]
  assert best == [row['responses'][row['shown'][-1]] for row in rows]
  _, after, _ = session('u', '1=2=3')  # of the session before
  assert after[:2] == rows[:2] and after[2]['ranks'] == [0, 0, 0]
  assert session('u', 'u', 'u', 'u')[1] == []


def test_interrupt(session, monkeypatch):
  """Failure: Ctrl-C loses a ranking or leaves a traceback."""
  typed = iter(['1 2 3', '1 2'])

  def interrupted(prompt):
    for line in typed:
      return line
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr('builtins.input', interrupted)
    code, rows, told = session()
  assert code == 130 and len(rows) == 2 and 'the same command goes on' in told.err
  assert len(session('1 2 3')[1]) == 3


def test_torn_line(tmp_path, monkeypatch):
  """Failure: after a full disk or a lost machine the tool refuses to go on, keeps half a line, or takes a whole one off."""
  path = write(tmp_path / 'train.jsonl', SAMPLES)
  out = tmp_path / 'out.jsonl'
  monkeypatch.setattr(os, 'fsync', lambda _: None)  # hundreds of them take seconds
  items, _ = rank.read_items(path)
  lines = [rank.ranking(item, rank.shuffled(item, 0), [[0], [1]], 'é') for item in items[1:2] * 2]
  whole = [json.dumps({**line, 'row': str(n)}).encode() + b'\n' for n, line in enumerate(lines)]
  for end in range(len(whole[1]) + 1):
    out.write_bytes(whole[0] + whole[1][:end])
    with rank.Ranked(out) as ranked:
      complete = end >= len(whole[1]) - 1
      assert [key for key, _ in ranked.history] == ['0', '1'][: 1 + complete]
      assert out.read_bytes() == b''.join(whole[: 1 + complete])
      ranked.append({**lines[0], 'row': '2'})
      ranked.append({**lines[0], 'row': '3'})
      ranked.undo()
    assert [json.loads(line)['row'] for line in out.read_text().splitlines()] == (['0', '1', '2'] if complete else ['0', '2'])


@pytest.mark.parametrize('content', ['notes\n', 'notes', '{"prompt": "a"}\n', '{"row": 1}\nx', '{"row": [1]}\n', '[]\n', '\n'])
def test_file_of_another_kind(session, tmp_path, content):
  """Failure: a file that is not of this tool is cut or written into."""
  out = tmp_path / 'ranked_train.jsonl'
  out.write_text(content)
  code = tool.main(['rank', str(tmp_path / 'train.jsonl')])
  assert code == 2 and out.read_text() == content


def test_refused_by_the_tool(session, tmp_path, capsys, monkeypatch):
  """Failure: bad rows, a second session into one file or a full disk crash with a traceback, or pass."""
  path, out = tmp_path / 'train.jsonl', tmp_path / 'ranked_train.jsonl'

  def error(*argv):
    code = tool.main(['rank', *map(str, argv)])
    told = capsys.readouterr().err
    assert code == 2 and told.startswith('error: ') and 'Traceback' not in told
    return told

  assert 'no such file' in error(tmp_path / 'none.jsonl') and 'the file that is read' in error(path, f'--out={path}')
  assert 'must end with .jsonl' in error(path, '--out=a.txt') and 'a local file' in error(path, '--out=gs://a/b.jsonl')
  assert '--out=' in error(path, f'--out={tmp_path}/none/a.jsonl')
  with rank.Ranked(out):
    assert 'another session' in error(path)
  for row, reason in (({'prompt': 'a'}, 'no responses'), ({**SAMPLES[0], 'prompt': ' '}, 'the prompt is empty'),
                      ({**SAMPLES[0], 'responses': ['a', 3]}, 'no list of texts'), ({'responses': ['a', 'b']}, 'no prompt')):  # fmt: skip
    assert f'bad.jsonl:2: {reason}' in error(write(tmp_path / 'bad.jsonl', [SAMPLES[0], row])).replace(
      "column 'responses' is ", ''
    )
  assert 'no row has two' in error(write(tmp_path / 'bad.jsonl', SAMPLES[2:3]))
  assert 'no row has two' in error(write(tmp_path / 'bad.jsonl', [{**SAMPLES[0], 'prompt': [{'role': 'user', 'content': ' '}]}]))
  (tmp_path / 'bad.jsonl').write_text('[' * 100_000)
  assert 'bad.jsonl:1: not JSON' in error(tmp_path / 'bad.jsonl')
  assert error(path, '--seed=x').count('\n') == 1

  def full(_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    code, _, told = session('1 2 3')
  assert code == 2 and 'No space left' in told.err


def test_hostile_texts(tmp_path, monkeypatch, capsys):
  """Failure: a response steers the terminal, reorders what is read, or passes itself off as another response."""
  texts = ['\x1b[2J\x07a\rb', 'first\n[2]\n  | \u202eevil\u2028\x85end', 'fine: é 数 👩\u200d🔬\tx']
  path = write(tmp_path / 'd.jsonl', [{'prompt': [{'role': 'us\x1ber', 'content': 'q\x00\u2066'}], 'responses': texts}])
  monkeypatch.setattr(sys, 'stdin', io.StringIO('q\n'))
  assert tool.main(['rank', str(path)]) == 0
  told = capsys.readouterr().out
  assert not {*'\x1b\x07\r\x00\x85\u202e\u2028\u2066'} & {*told}
  assert '\\x1b[2J\\x07a\\rb' in told and 'us\\x1ber:' in told and 'fine: é 数 👩\u200d🔬\tx' in told
  assert sorted(line[:3] for line in told.split('\n') if line.startswith('[')) == ['[1]', '[2]', '[3]']


def test_as_a_command(tmp_path):
  """Failure: the command does not start, loads jax, or stumbles over a terminal that is not of UTF-8."""
  path = write(tmp_path / 'd.jsonl.gz', [{'prompt': 'Größe?', 'responses': ['数', 'b']}])
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'rl_reasoning.tasks', 'rank', path], cwd=pathlib.Path(__file__).parent.parent,
    input=b'\xff\n2 1\n', capture_output=True, env={**os.environ, 'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert b'Gr\\xf6\\xdfe?' in done.stdout and b'that is no ranking' in done.stdout
  assert b'rl_reasoning.tasks.rank' in done.stderr and b'jax' not in done.stderr
  (row,) = map(json.loads, (tmp_path / 'ranked_d.jsonl').read_text().splitlines())
  assert row['prompt'] == 'Größe?' and sorted(row['ranks']) == [0, 1] and row['ranked_by']


def test_every_reason_is_counted_once():
  """Failure: a row that a caller reads twice counts twice, or rows of another file are counted here."""
  left_out = preference.LeftOut()

  def convert(row, place):
    raise preference.Unusable('bad')

  converted = left_out.counted(convert)
  assert [converted({}, 'a:1'), converted({}, 'a:1'), converted({}, 'b:1')] == [None] * 3
  assert left_out.reasons == {'a:1': 'bad', 'b:1': 'bad'}
