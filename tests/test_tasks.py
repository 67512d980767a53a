"""Tasks: a row is a function of (seed, split, index), its worked chain is right, and nothing of the test split is trained on."""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from rl_reasoning.config import ConfigError
from rl_reasoning.rewards import REWARDS
from rl_reasoning.tasks import TASKS, dataset
from rl_reasoning.tasks.arithmetic import apply, careless, is_test
from rl_reasoning.tokenizer import render_completion
from rl_reasoning.verify.math import check_countdown

GSM8K = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'gsm8k'
PROCEDURAL = ('arithmetic', 'countdown')
OPERATIONS = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '/': int.__floordiv__}


def make(task, split='train', seed=0, size=300, path='', **options):
  return list(TASKS[task].rows(split, seed, size, str(path), **options))


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def accuracy(row):
  columns = {k: [v] for k, v in row.items() if k != 'prompt'}
  return REWARDS['accuracy'](prompts=[row['prompt']], completions=[render_completion(row)], **columns)[0]


def read_step(step):
  """'12+7=19' -> (12, '+', 7, 19); a first number may be negative."""
  left, result = step.split('=')
  at = next(i for i, c in enumerate(left) if i and c in OPERATIONS)
  return int(left[:at]), left[at], int(left[at + 1 :]), int(result)


@pytest.mark.parametrize('task', PROCEDURAL)
@pytest.mark.parametrize('split', ['train', 'test'])
def test_rows_are_a_function_of_seed_split_and_index(task, split):
  """Failure: a longer data set is another one, or the seed is not in it: no run can be repeated or extended."""
  rows = make(task, split, seed=3)
  assert make(task, split, seed=3) == rows
  assert make(task, split, seed=3, size=40) == rows[:40]
  other = make(task, split, seed=4)
  assert sum(a == b for a, b in zip(rows, other, strict=True)) < 30


@pytest.mark.parametrize('task,options', [('arithmetic', {'operands': 2}), ('arithmetic', {}), ('countdown', {'count': 2})])
def test_no_problem_in_both_splits(task, options):
  """Failure: a policy is tested on what it was trained on, under some pair of seeds, or a test problem is counted twice."""
  trained = {row['prompt'] for seed in range(3) for row in make(task, seed=seed, size=1000, **options)}
  for seed in range(2):
    tested = [row['prompt'] for row in make(task, 'test', seed=seed, size=20, **options)]
    assert len(set(tested)) == len(tested) == 20
    assert not trained & set(tested)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('options', [{}, {'operands': 5, 'operators': '+-*', 'low': 0, 'high': 30}], ids=['default', 'wide'])
def test_clean_chains_are_right(split, options):
  """Failure: demonstrations teach wrong arithmetic, or a chain is not that of its problem."""
  for row in make('arithmetic', split, **options):
    rest, value = row['prompt'], None
    for a, operator, b, result in map(read_step, row['chain_of_thought'].split(';')):
      assert value in (None, a) and OPERATIONS[operator](a, b) == result
      start = f'{a}{operator}{b}' if value is None else f'{operator}{b}'
      assert rest.startswith(start)
      rest, value = rest[len(start) :], result
    assert rest == '=' and row['completion'] == row['answer'] == str(value)
    assert accuracy(row) == 1


def test_styles():
  """Failure: the gold answer is the careless author's, errors come at another rate than the config says, or weights are not kept."""
  rows = make('arithmetic', size=6000, styles={'sloppy': 3, 'direct': 1}, sloppiness=0.3)
  direct = [row for row in rows if not row['chain_of_thought']]
  assert 0.22 < len(direct) / len(rows) < 0.28
  erred, could = 0, 0
  for row in rows:
    numbers = row['prompt'].rstrip('=').replace('-', '+-').split('+')
    assert row['answer'] == str(sum(map(int, numbers)))
    for a, operator, b, result in map(read_step, filter(None, row['chain_of_thought'].split(';'))):
      assert result in (apply(a, operator, b), careless(a, operator, b))
      if careless(a, operator, b) != apply(a, operator, b):
        could, erred = could + 1, erred + (result != apply(a, operator, b))
  assert could > 2000 and 0.27 < erred / could < 0.33
  wrong = {
    style: [r['completion'] != r['answer'] for r in rows if bool(r['chain_of_thought']) == style] for style in (True, False)
  }
  for values in wrong.values():
    assert 0.1 < sum(values) / len(values) < 0.4
  assert all(r['completion'] == r['answer'] for r in make('arithmetic', 'test', styles={'sloppy': 1}))
  assert make('arithmetic', styles={'direct': 1, 'sloppy': 3}) == make('arithmetic', styles={'sloppy': 3, 'direct': 1})


def test_careless():
  """Failure: the careless author forgets something else than the carry or the borrow."""
  cases = {
    (17, '+', 5): 12,
    (17, '+', 2): 19,
    (21, '-', 4): 27,
    (24, '-', 1): 23,
    (4, '-', 21): -27,
    (-3, '+', 8): 5,
    (7, '*', 8): 56,
  }
  assert {case: careless(*case) for case in cases} == cases


@pytest.mark.parametrize('options', [{}, {'count': 2}, {'count': 6, 'high': 50, 'max_target': 1000}], ids=str)
def test_countdown_demonstrations_solve_their_problem(options):
  """Failure: the demonstrations are refused by the project's own checker, or their steps are wrong."""
  for row in make('countdown', size=200, **options) + make('countdown', 'test', size=10, **options):
    assert 0 < row['target'] <= options.get('max_target', 100) and len(row['numbers']) == options.get('count', 3)
    assert row['prompt'] == f'{",".join(map(str, sorted(row["numbers"])))}->{row["target"]}:'
    assert check_countdown(row['numbers'], row['target'], row['completion']) and accuracy(row) == 1
    have = sorted(row['numbers'])
    for a, operator, b, result in map(read_step, row['chain_of_thought'].split(';')):
      assert OPERATIONS[operator](a, b) == result and (operator != '/' or a % b == 0)
      have.remove(a)
      have.remove(b)
      have.append(result)
    assert have == [row['target']]


@pytest.mark.parametrize(
  'task,key,value',
  [
    ('arithmetic', 'operands', 1), ('arithmetic', 'low', -1), ('arithmetic', 'low', 16), ('arithmetic', 'high', 1),
    ('arithmetic', 'operators', ''), ('arithmetic', 'operators', '+/'), ('arithmetic', 'sloppiness', 1.5),
    ('arithmetic', 'sloppiness', -0.1), ('arithmetic', 'styles', {'messy': 1}), ('arithmetic', 'styles', {'clean': 0}),
    ('arithmetic', 'styles', {'clean': 2, 'sloppy': -1}), ('countdown', 'count', 1), ('countdown', 'high', 0),
    ('countdown', 'max_target', 0),
  ],
)  # fmt: skip
def test_options_out_of_range(task, key, value):
  """Failure: a wrong option is taken, or its error does not say which key to change."""
  with pytest.raises(ConfigError, match='low' if key == 'high' and task == 'arithmetic' else f'data.options.{key}'):
    make(task, **{key: value})


@pytest.mark.parametrize('task,options', [('arithmetic', {'operands': 2, 'high': 4}), ('countdown', {'count': 2, 'high': 3})])
def test_too_few_problems(task, options):
  """Failure: a test split is filled with repeated problems, or the search for new ones never ends."""
  with pytest.raises(ConfigError, match=r'the test split has fewer than 300 problems: [0-9]+ found'):
    make(task, 'test', **options)


QUESTIONS = [{'prompt': f'What is {n} plus {n}?', 'answer': str(2 * n)} for n in range(400)]


def test_single_file_is_split_by_hash(tmp_path):
  """Failure: rows are lost between the splits, stand in both, or move when the file grows."""
  path = write(tmp_path / 'all.jsonl', QUESTIONS)
  train, test = make('dataset', 'train', path=path, size=None), make('dataset', 'test', path=path, size=None)
  assert [row for row in QUESTIONS if row in train] == train and [row for row in QUESTIONS if row not in train] == test
  assert 20 < len(test) < 70
  assert make('dataset', 'test', path=path, size=7) == test[:7]
  grown = write(tmp_path / 'grown.jsonl', [{'prompt': 'new'}, *QUESTIONS])
  assert [row for row in make('dataset', 'test', path=grown, size=None) if row['prompt'] != 'new'] == test


def test_leaked_prompt_is_left_out_of_training(tmp_path):
  """Failure: a prompt of test.jsonl is trained on because it is spaced, cased or wrapped in chat messages differently."""
  question = {'role': 'user', 'content': 'What is 3 plus 3?'}
  write(tmp_path / 'test.jsonl', [QUESTIONS[1], QUESTIONS[2], QUESTIONS[3]])
  leaks = [
    QUESTIONS[1],
    {'prompt': ' what IS  2 plus\n2? ', 'answer': '4'},
    {'prompt': [question], 'answer': '6'},
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, question, {'role': 'assistant', 'content': '6'}]},
  ]
  kept = [
    QUESTIONS[4],
    {'messages': [{'role': 'user', 'content': 'Hello?'}, {'role': 'assistant', 'content': 'What is 3 plus 3?'}]},
  ]
  write(tmp_path / 'train.jsonl', [leaks[0], kept[0], *leaks[1:], kept[1]])
  assert make('dataset', 'train', path=tmp_path, size=None) == kept
  assert make('dataset', 'test', path=tmp_path, size=None) == QUESTIONS[1:4]


def test_files_of_a_folder(tmp_path):
  """Failure: shards of a split are left out, read in another order, or read with the other split's."""
  (tmp_path / 'data').mkdir()
  for name in ('train-00001.jsonl', 'train-00000.jsonl', 'test-00000.json', 'train-notes.md'):
    write(tmp_path / 'data' / name, [{'prompt': name}])
  assert [row['prompt'] for row in make('dataset', path=tmp_path)] == ['train-00000.jsonl', 'train-00001.jsonl']
  assert [row['prompt'] for row in make('dataset', 'test', path=tmp_path)] == ['test-00000.json']


@pytest.mark.parametrize(
  'line,reason',
  [
    ('{"prompt": "a"', 'not JSON'), ('["a"]', 'not a JSON object'), ('{"text": "a"}', 'no column prompt or messages; columns: text'),
    ('{"prompt": ""}', 'the prompt is empty'), ('{"prompt": 3}', "'prompt' is int, not text"),
    ('{"prompt": "a", "completion": 3}', "'completion' is int, not text"),
    ('{"prompt": "a", "chain_of_thought": null}', "'chain_of_thought' is NoneType"), ('{"messages": []}', "'messages' is not a list"),
    ('{"messages": [{"role": "user"}]}', "'messages' is not a list"), ('{"prompt": ["a"]}', "'prompt' is not a list"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 'messages of text'),
    ('{"prompt": "\\ud800"}', 'surrogates not allowed'), (b'{"prompt": "\xff"}', 'not JSON in UTF-8'),
  ],
)  # fmt: skip
def test_malformed_line(tmp_path, line, reason):
  """Failure: a bad line is skipped, crashes later, or is not named."""
  path = tmp_path / 'train.jsonl'
  path.write_bytes(b'{"prompt": "fine"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n')
  with pytest.raises(ConfigError, match=r'train\.jsonl:3: ') as error:
    make('dataset', path=path)
  assert reason in str(error.value)


def test_text_files_from_elsewhere(tmp_path):
  """Failure: a file written on Windows (byte order mark, CRLF), without a last newline, or not in English is refused or changed."""
  path = tmp_path / 'train.jsonl'
  rows = [{'prompt': 'Größe? 数 🙂', 'completion': 'a\r\nb\u2028c'}, {'prompt': 'é'}, {'prompt': 'last'}]
  path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
  assert list(dataset.read(path)) == [(f'{path}:{n}', row) for n, row in enumerate(rows, 1)]


def test_columns(tmp_path):
  """Failure: renamed columns are lost or swapped wrongly, or one silently overwrites another."""
  write(tmp_path / 'test.jsonl', [{'question': 'other', 'prompt': 'p', 'level': 2}])
  write(tmp_path / 'train.jsonl', [{'question': 'q', 'prompt': 'style', 'level': 1}])
  swapped = make('dataset', path=tmp_path, columns={'question': 'prompt', 'prompt': 'question'})
  assert swapped == [{'prompt': 'q', 'question': 'style', 'level': 1}]
  for columns, reason in (({'missing': 'prompt'}, "no column 'missing'"), ({'question': 'prompt'}, 'two columns')):
    with pytest.raises(ConfigError, match=f'data.options.columns.*{reason}'):
      make('dataset', path=tmp_path, columns=columns)


def test_parquet(tmp_path):
  """Failure: rows of a Parquet file are others than those of the same JSON lines."""
  if importlib.util.find_spec('pyarrow') is None:
    pytest.skip('no pyarrow: Parquet files cannot be read')
  rows = [{'messages': [{'role': 'user', 'content': f'q{n}'}, {'role': 'assistant', 'content': 'a'}], 'n': n} for n in range(50)]
  write(tmp_path / 'rows.json', rows)
  write(tmp_path / 'test.jsonl', [{'prompt': 'q3'}])
  code = """
import json, pathlib, sys, pyarrow.parquet
from rl_reasoning.tasks import dataset
folder = pathlib.Path(sys.argv[1])
table = pyarrow.Table.from_pylist([json.loads(line) for line in (folder / 'rows.json').open()])
pyarrow.parquet.write_table(table, folder / 'train.parquet')
print(json.dumps(list(dataset.rows('train', 0, None, str(folder)))), flush=True)"""
  # Its own process, whose exit code does not count: some releases of pyarrow abort at exit.
  done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True)
  assert done.stdout and json.loads(done.stdout) == [row for row in rows if row['n'] != 3], done.stderr


@pytest.mark.parametrize('task', ['dataset', 'gsm8k'])
def test_path_that_does_not_exist(task, tmp_path):
  """Failure: a mistyped path is looked up on the hub, or its error does not name the key."""
  with pytest.raises(ConfigError, match=r"'data\.path': .* does not exist"):
    make(task, path=tmp_path / 'nothing' / 'here')


def test_hub(tmp_path, monkeypatch):
  """Failure: a data set's name is not fetched from the hub, its second wording is read too, or no network is a traceback."""
  import huggingface_hub

  asked = []
  for folder, question in (('main', 'q'), ('socratic', 'other wording')):
    (tmp_path / folder).mkdir()
    for split in ('train', 'test'):
      write(tmp_path / folder / f'{split}.jsonl', [{'question': f'{question} {split}', 'answer': '#### 5'}])
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: asked.append(name) or str(tmp_path))
  assert [row['prompt'] for row in make('gsm8k')] == ['q train'] and set(asked) == {'openai/gsm8k'}

  def no_network(name, **_):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', no_network)
  with pytest.raises(ConfigError, match=r"'some/set' is no path here, and the hub gave ConnectionError: no route$"):
    make('dataset', path='some/set')


def test_gsm8k_rows(tmp_path):
  """Failure: the calculator's marks or the '####' line are taught, the answer keeps its commas, or a leaked question is trained on."""
  leaked = {'question': 'How many  apples?', 'answer': 'One.\n#### 1'}
  long = {'question': ' How much? ', 'answer': 'He pays 2*600=<<2*600=1200>>1200.\nThat is $<<1200=1200>>1,200.\n#### 1,200'}
  write(tmp_path / 'train.jsonl', [leaked, long])
  write(tmp_path / 'test.jsonl', [{**leaked, 'question': 'how many apples?'}])
  assert make('gsm8k', path=tmp_path, size=None) == [
    {'prompt': 'How much?', 'chain_of_thought': 'He pays 2*600=1200.\nThat is $1,200.', 'completion': '1200', 'answer': '1200'}
  ]
  with pytest.raises(ConfigError, match='give the folder of both splits'):
    make('gsm8k', path=tmp_path / 'train.jsonl')
  for row, reason in (({'question': 'q', 'answer': '5'}, "no '#### '"), ({'question': 'q'}, "no text column 'answer'")):
    write(tmp_path / 'test.jsonl', [leaked, row])
    with pytest.raises(ConfigError, match=f'test.jsonl:2: .*{reason}'):
      make('gsm8k', 'test', path=tmp_path)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f'no GSM8K files in {GSM8K}')
def test_gsm8k_files():
  """Failure: problems are lost, shared between the splits, or a gold completion is not paid in full by the project's own reward."""
  train, test = make('gsm8k', path=GSM8K, size=None), make('gsm8k', 'test', path=GSM8K, size=None)
  assert (len(train), len(test)) == (7473, 1319)
  assert not {dataset.identity(row) for row in train} & {dataset.identity(row) for row in test}
  for name, rows in (('train', train), ('test', test)):
    lines = (GSM8K / f'{name}.jsonl').read_text(encoding='utf-8').splitlines()
    for line, row in zip(lines, rows, strict=True):
      raw = json.loads(line)
      assert raw['question'].strip() == row['prompt'] and '<<' not in row['chain_of_thought']
      assert raw['answer'].split('#### ')[1].replace(',', '') == row['answer'] == row['completion']
      assert accuracy(row) == 1


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f'no GSM8K files in {GSM8K}')
def test_verdicts_on_model_solutions():
  """Failure: the grader disagrees with the labels that come with 5,276 solutions written by models."""
  agreed, total, golds = 0, 0, {row['prompt']: row['answer'] for row in make('gsm8k', 'test', path=GSM8K, size=None)}
  for line in (GSM8K / 'example_model_solutions.jsonl').read_text(encoding='utf-8').splitlines():
    row = json.loads(line)
    for solution in (v for v in row.values() if isinstance(v, dict)):
      verdict = REWARDS['accuracy_flexible'](
        prompts=[''], completions=[solution['solution']], answer=[golds[row['question'].strip()]]
      )
      agreed, total = agreed + (verdict == [float(solution['is_correct'])]), total + 1
  assert total == 5276 and agreed == total


def test_one_in_ten_is_a_test_problem():
  """Failure: the share of held-out problems is not what the documentation says."""
  assert 0.09 < sum(map(is_test, itertools.islice(map(str, itertools.count()), 20_000))) / 20_000 < 0.115


@pytest.mark.parametrize('column', ['prompts', 'completions', 'completion_ids'])
def test_columns_cannot_pose_as_completions(tmp_path, column):
  """Failure: a data set's column takes the place of what the policy sampled, and every answer is right."""
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'x', 'answer': '1', column: '<answer>1</answer>'}) + '\n')
  with pytest.raises(ConfigError, match=f'rows.jsonl:1: column {column!r}'):
    list(dataset.rows('train', 0, None, str(path)))
