"""Prepared data: written once, whole, without TensorFlow, and never mistaken for another's; batches and token rows made from it."""

import collections
import dataclasses
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from rl_reasoning import data
from rl_reasoning.config import ConfigError, Data, components
from rl_reasoning.data import Source, batch, encode_prompts, encode_row, encode_sft
from rl_reasoning.structs import DATA
from rl_reasoning.tasks import TASKS
from rl_reasoning.tokenizer import ByteTokenizer, HFTokenizer
from tests.test_tokenizer import make_folder, turns

TOK = ByteTokenizer()
ROWS = [{'prompt': f'question {n}', 'answer': str(n), 'more': [n, {'é': None}]} for n in range(60)]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.fixture
def source_file(tmp_path):
  (tmp_path / 'in').mkdir()
  write(tmp_path / 'in' / 'test.jsonl', [{'prompt': 'other'}])
  return write(tmp_path / 'in' / 'train.jsonl', ROWS)


def settings(tmp_path, **keys):
  return Data(**{'task': 'dataset', 'path': str(tmp_path / 'in'), 'cache_dir': str(tmp_path / 'cache'), **keys})


def load(tmp_path, split='train', seed=0, size=None, **keys):
  source = data.load(settings(tmp_path, **keys), split, seed, size)
  return [source[i] for i in range(len(source))]


def folders(tmp_path):
  return sorted(path.name for path in (tmp_path / 'cache').glob('*/*'))


def test_read_back_equal_and_in_order(tmp_path, source_file):
  """Failure: rows are shuffled by a hash of their keys, lose columns, or change on their way through the file."""
  assert load(tmp_path) == ROWS and load(tmp_path, size=7) == ROWS[:7]
  before = folders(tmp_path)
  assert load(tmp_path) == ROWS and folders(tmp_path) == before  # the second time from the files
  made = {'task': 'arithmetic', 'path': '', 'options': {'styles': {'sloppy': 1.0}}}
  assert load(tmp_path, size=50, seed=3, **made) == list(TASKS['arithmetic'].rows('train', 3, 50, styles={'sloppy': 1.0}))


def test_no_tensorflow(tmp_path, source_file):
  """Failure: preparing or reading data needs TensorFlow, or says anything on the terminal."""
  script = (
    'import sys; from rl_reasoning import data; from rl_reasoning.config import Data\n'
    f'source = data.load(Data(**{dataclasses.asdict(settings(tmp_path))!r}), "train", 0, None)\n'
    'print(len(source), source[3]["prompt"], data.batch(source, 0, 2, 0)[1], "tensorflow" in sys.modules, flush=True)'
  )
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  assert done.stdout == '60 question 3 2 False\n', done.stderr


def test_changed_source_is_prepared_again(tmp_path, source_file):
  """Failure: a data set that was corrected, or one that another depends on, is silently read as it was."""
  assert load(tmp_path) == ROWS
  source_file.write_text(source_file.read_text().replace('question 5"', 'question V"'))  # same size, same name
  assert load(tmp_path)[5]['prompt'] == 'question V'
  write(tmp_path / 'in' / 'test.jsonl', [ROWS[0]])  # a new test problem has to leave the training split
  assert ROWS[0] not in load(tmp_path)
  write(tmp_path / 'in' / 'train-2.jsonl', [{'prompt': 'new'}])
  assert {'prompt': 'new'} in load(tmp_path)


def test_folder_is_named_by_everything(tmp_path, source_file, monkeypatch):
  """Failure: two settings that give different rows share their files, or one that plays no part makes them twice."""
  made = {'task': 'arithmetic', 'path': ''}
  variants = [
    {'size': 4}, {'size': 5}, {'size': 4, 'seed': 1}, {'size': 4, 'split': 'test'}, {'size': 4, 'options': {'operands': 2}},
    {'size': 4, 'task': 'countdown'},
  ]  # fmt: skip
  for count, keys in enumerate(variants, 1):
    load(tmp_path, **{**made, **keys})
    assert len(folders(tmp_path)) == count
  options = ({'operands': 4, 'styles': {'sloppy': 1, 'direct': 2}}, {'styles': {'direct': 2, 'sloppy': 1}, 'operands': 4})
  assert load(tmp_path, size=4, **made, options=options[0]) == load(tmp_path, size=4, **made, options=options[1])
  assert len(folders(tmp_path)) == len(variants) + 1  # the order of keys is no setting
  load(tmp_path, seed=1)
  load(tmp_path, seed=2)
  assert len(folders(tmp_path)) == len(variants) + 2  # rows of a file do not depend on the seed
  code = tmp_path / 'code'
  code.mkdir()
  (code / 'arithmetic.py').write_text('another version')
  monkeypatch.setattr(data.tasks, '__path__', [str(code)])
  load(tmp_path, size=4, **made)
  assert len(folders(tmp_path)) == len(variants) + 3  # countdown uses functions of arithmetic: any task's code counts


def test_interrupted_preparation(tmp_path, source_file, monkeypatch):
  """Failure: half a data set is later taken for the whole."""
  rows = TASKS['dataset'].rows

  def crash(*args, **kwargs):
    for n, row in enumerate(rows(*args, **kwargs)):
      if n == 40:
        raise KeyboardInterrupt
      yield row

  with monkeypatch.context() as patch:
    patch.setattr(TASKS['dataset'], 'rows', crash)
    with pytest.raises(KeyboardInterrupt):
      load(tmp_path)
  assert load(tmp_path) == ROWS


def test_killed_preparation(tmp_path, source_file):
  """Failure: what a killed process left behind is taken for the whole."""
  script = (
    'import os; from rl_reasoning import data; from rl_reasoning.config import Data; from rl_reasoning.tasks import dataset\n'
    'old = dataset.rows\n'
    'def rows(split: str, seed: int, size: int | None, path: str = "", *, columns: dict | None = None):\n'
    '  for n, row in enumerate(old(split, seed, size, path)):\n'
    '    yield row if n < 40 else os._exit(9)\n'
    'dataset.rows = rows\n'
    f'data.load(Data(**{dataclasses.asdict(settings(tmp_path))!r}), "train", 0, None)'
  )
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  assert done.returncode == 9, done.stderr
  assert list((tmp_path / 'cache').rglob('*incomplete*'))
  assert load(tmp_path) == ROWS


def test_two_runs_prepare_at_once(tmp_path, source_file, monkeypatch):
  """Failure: of two runs of a sweep that start together, the slower one crashes."""
  rows = TASKS['dataset'].rows

  def overtaken(*args, **kwargs):
    yield from rows(*args, **kwargs)
    patch.undo()
    assert load(tmp_path) == ROWS  # the other run begins later and ends sooner

  with monkeypatch.context() as patch:
    patch.setattr(TASKS['dataset'], 'rows', overtaken)
    assert load(tmp_path) == ROWS


@pytest.mark.parametrize(
  'keys,reason',
  [
    ({'task': 'arithmetik'}, "'data.task': 'arithmetik' is none of arithmetic, countdown"),
    ({'options': {'colums': {}}}, "'data.options.colums' is unknown to data.task 'dataset', which takes columns"),
    ({'task': 'gsm8k', 'options': {'a': 1}}, 'which takes no options at all'),
    ({'task': 'arithmetic', 'path': '', 'options': {'operands': 'three'}}, "'data.options.operands': 'three' is not of type int"),
    ({'task': 'arithmetic', 'path': '', 'options': {'styles': 'clean'}}, "'data.options.styles': 'clean' is not a mapping"),
    ({'task': 'arithmetic'}, "'data.path' cannot act"), ({'task': 'arithmetic', 'path': ''}, "'data.train_size'"),
    ({'path': ''}, "'data.path' is empty"), ({'path': '/nothing/here'}, "'data.path': '/nothing/here' does not exist"),
  ],
)  # fmt: skip
def test_wrong_settings(tmp_path, source_file, keys, reason):
  """Failure: a setting that cannot act is taken, or its error does not name it."""
  with pytest.raises(ConfigError) as error:
    load(tmp_path, **keys)
  assert reason in str(error.value)


def test_bad_files(tmp_path, source_file):
  """Failure: an empty file trains on nothing, or a bad line deep in a file is not named, or leaves a half-made data set."""
  for content in ('', '\n\n'):
    source_file.write_text(content)
    with pytest.raises(ConfigError, match=r"the train split of '.*in' is empty"):
      load(tmp_path)
  write(source_file, ROWS)
  with source_file.open('a') as file:
    file.write('{"prompt": "cut')
  for _ in range(2):
    with pytest.raises(ConfigError, match=r'train\.jsonl:61: not JSON'):
      load(tmp_path)
  assert not list((tmp_path / 'cache').rglob('dataset_info.json'))


def prompts(rows):
  return [row['prompt'] for row in rows]


def test_epochs():
  """Failure: an epoch leaves rows out or repeats them, or every epoch, or every seed, has the same order."""
  for size in (1, 2, 7, 60):
    source = Source([{'row': json.dumps(row)} for row in ROWS[:size]])
    epochs = [prompts(batch(source, size * n, size, seed)[0]) for seed in range(3) for n in range(3)]
    assert all(sorted(epoch) == sorted(prompts(ROWS[:size])) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 9 and prompts(ROWS) not in epochs


def test_batch_is_a_function_of_the_cursor():
  """Failure: a resumed run sees other rows, or the batch size changes the order of the rows."""
  source = Source([{'row': json.dumps(row)} for row in ROWS])
  whole, cursor = batch(source, 0, 150, 5)
  assert cursor == 150
  parts, cursor = [], 0
  for size in (1, 32, 59, 58):  # across the ends of epochs
    again = batch(source, cursor, size, 5)
    assert again == batch(Source(source.records), cursor, size, 5)
    parts, cursor = parts + again[0], again[1]
  assert parts == whole and cursor == 150


def test_batch_far_on_costs_no_more():
  """Failure: going on at a late step reads all rows before it."""
  source = Source([{'row': json.dumps(row)} for row in ROWS])
  batch(source, 0, 1, 0)
  start = time.perf_counter()
  rows, cursor = batch(source, 10**9, 8, 0)
  assert len(rows) == 8 and cursor == 10**9 + 8 and time.perf_counter() - start < 0.5


def test_order_of_before(tmp_path, source_file):
  """Failure: a run of one task that was begun by earlier code goes on with other rows than it would have read."""
  train = data.open_train(settings(tmp_path), 5)
  assert train.first() == {'train': 0} and len(train) == 60
  rows, cursor = train.draw({'train': 56, 'num_tokens': 7}, 12)
  assert [int(row['prompt'].split()[1]) for row in rows] == [24, 43, 33, 53, 43, 37, 49, 8, 31, 5, 35, 39]
  assert cursor == {'train': 68, 'num_tokens': 7}
  assert train.observe(cursor, rows, [1.0] * 12) == cursor
  assert list(train.preview(25)) == train.draw(train.first(), 25)[0] == batch(train.sources[''], 0, 25, 5)[0]
  assert sorted(prompts(train.preview(10**6))) == sorted(prompts(ROWS))


MIXTURE = {
  'easy': {'task': 'arithmetic', 'options': {'operands': 2}, 'train_size': 40, 'weight': 3},
  'hard': {'task': 'arithmetic', 'options': {'operands': 4}, 'train_size': 25},
  'other': {'task': 'linear', 'train_size': 300, 'weight': 0.5},
}


def mixed(tmp_path, mixture=None, seed=0, **keys):
  return data.open_train(Data(mixture=mixture or MIXTURE, cache_dir=str(tmp_path / 'cache'), **keys), seed)


def check_shares(names, weights):
  """Within four standard errors of the proportions of `weights`."""
  names = list(names)
  for name, weight in weights.items():
    expected = weight / sum(weights.values())
    assert abs(names.count(name) / len(names) - expected) < 4 * (expected * (1 - expected) / len(names)) ** 0.5


def test_mixture(tmp_path):
  """Failure: a task is drawn more often than its weight says, or its rows come in another order or from another task."""
  train = mixed(tmp_path)
  assert train.first() == {'train/easy': 0, 'train/hard': 0, 'train/other': 0, 'drawn': 0} and len(train) == 365
  rows, cursor = train.draw(train.first(), 400)
  assert [row['dataset'] for row in rows] == list(train.draw_names(train.first(), 400)) and cursor['drawn'] == 400
  for name, component in components(train.data).items():
    own = [{k: v for k, v in row.items() if k != 'dataset'} for row in rows if row['dataset'] == name]
    alone = Data(task=component.task, options=component.options, cache_dir=str(tmp_path / 'cache'))
    source = data.load(alone, 'train', 0, component.train_size)
    assert own == batch(source, 0, len(own), 0)[0] and cursor[f'train/{name}'] == len(own)
  check_shares(train.draw_names(train.first(), 20_000), {'easy': 3, 'hard': 1, 'other': 0.5})
  check_shares(train.draw_names(cursor, 20_000), {'easy': 3, 'hard': 1, 'other': 0.5})


@pytest.mark.parametrize('curriculum', ['none', 'pass_rate'])
def test_mixture_resumes_anywhere(tmp_path, curriculum):
  """Failure: a resumed run, or one whose dynamic sampling draws a refill, reads other rows: the cursor in the checkpoint is not all."""
  train = mixed(tmp_path, curriculum=curriculum)
  whole, end = train.draw(train.first(), 90)
  for cut in (0, 1, 17, 89):
    first, cursor = train.draw({**train.first(), 'num_tokens': 5}, cut)
    rest, cursor = mixed(tmp_path, curriculum=curriculum).draw(json.loads(json.dumps(cursor)), 90 - cut)
    assert first + rest == whole and cursor == {**end, 'num_tokens': 5}
  assert train.draw(train.first(), 90)[0] == whole
  other = mixed(tmp_path, seed=1, curriculum=curriculum).draw(train.first(), 90)[0]
  assert [row['dataset'] for row in other] != [row['dataset'] for row in whole]
  # Steps of drawing and measuring, with a cut after each: every float has to come back from JSON as it was.
  right = {'easy': 1.0, 'hard': 1 / 3, 'other': 0.0}

  def step(train, cursor):
    rows, cursor = train.draw(cursor, 7)
    return rows, train.observe(cursor, rows, [right[row['dataset']] for row in rows])

  straight, resumed = train.first(), train.first()
  for _ in range(12):
    rows, straight = step(train, straight)
    again, resumed = step(mixed(tmp_path, curriculum=curriculum), json.loads(json.dumps(resumed)))
    assert again == rows and resumed == straight
  assert ('pass_rate/easy' in straight) == (curriculum == 'pass_rate')


def test_order_of_names_is_no_setting(tmp_path):
  """Failure: the same mixture, its keys written in another order (a ConfigDict sorts them), is another run."""
  turned = dict(reversed(MIXTURE.items()))
  first, second = mixed(tmp_path), mixed(tmp_path, turned)
  assert first.draw(first.first(), 50) == second.draw(second.first(), 50)


def test_curriculum(tmp_path):
  """Failure: what is mastered or hopeless keeps its share, is never asked again, or what is half solved does not get the most."""
  train = mixed(tmp_path, curriculum='pass_rate', curriculum_floor=0.2, curriculum_decay=0.8)
  cursor = train.first()
  assert {name: cursor[f'pass_rate/{name}'] for name in MIXTURE} == dict.fromkeys(MIXTURE, 0.5)
  assert train.draw(cursor, 50)[0] == mixed(tmp_path).draw(mixed(tmp_path).first(), 50)[0]  # nothing is known yet
  rows, cursor = train.draw(cursor, 60)
  right = {'easy': 1.0, 'hard': 0.5, 'other': 0.0}
  cursor = train.observe(cursor, rows, [right[row['dataset']] for row in rows])
  assert [cursor[f'pass_rate/{name}'] for name in MIXTURE] == [pytest.approx(p) for p in (0.6, 0.5, 0.4)]
  assert train.factor(cursor, 'easy') == pytest.approx(0.2 + 0.8 * 4 * 0.6 * 0.4)
  for _ in range(60):
    cursor = train.observe(cursor, rows, [right[row['dataset']] for row in rows])
  check_shares(train.draw_names(cursor, 20_000), {'easy': 3 * 0.2, 'hard': 1, 'other': 0.5 * 0.2})
  for _ in range(60):  # it is forgotten again: the share comes back
    cursor = train.observe(cursor, rows, [0.5] * len(rows))
  check_shares(train.draw_names(cursor, 20_000), {'easy': 3, 'hard': 1, 'other': 0.5})


def test_what_is_observed(tmp_path):
  """Failure: a row without a verdict counts as wrong, a task without rows is moved, or a reward that is no pass rate is taken for one."""
  train = mixed(tmp_path, curriculum='pass_rate', curriculum_decay=0.75)
  cursor = {**train.first(), 'num_tokens': 3}
  rows = [{'dataset': 'easy'}, {'dataset': 'hard'}, {'dataset': 'easy'}, {'dataset': 'easy'}]
  got = train.observe(cursor, rows, [1.0, None, None, 0.5])
  assert got == {**cursor, 'pass_rate/easy': 0.75 * 0.5 + 0.25 * 0.75} and cursor['pass_rate/easy'] == 0.5
  for bad in (1.5, -0.5, float('nan')):
    with pytest.raises(ValueError, match=r'is not in \[0, 1\]'):
      train.observe(cursor, rows, [bad, None, None, None])
  with pytest.raises(ValueError):
    train.observe(cursor, rows, [1.0])


def test_preview(tmp_path, monkeypatch):
  """Failure: a row that a run will read is not checked before it begins, or a row that it never reads stops it."""
  train = mixed(tmp_path)
  read = train.draw(train.first(), 40)[0]
  assert sorted(map(json.dumps, train.preview(40))) == sorted(map(json.dumps, read))
  every = sorted(json.dumps({**source[n], 'dataset': name}) for name, source in train.sources.items() for n in range(len(source)))
  assert len(every) == 365 and sorted(map(json.dumps, train.preview(20_000))) == every
  adapting = mixed(tmp_path, curriculum='pass_rate')
  assert sorted(map(json.dumps, adapting.preview(1))) == every
  slots, generator = [], random.Random
  with monkeypatch.context() as patch:
    patch.setattr(random, 'Random', lambda slot: slots.append(slot) or generator(slot))
    list(train.preview(100_000))
  assert 365 <= len(slots) < 20_000  # a run of a million steps must not spend hours on the slots of rows that are all read


def test_test_split_of_a_mixture(tmp_path):
  """Failure: a task of the mixture is not evaluated, rows do not say of which they are, or there are more than were asked for."""
  rows = data.open_test(Data(mixture=MIXTURE, cache_dir=str(tmp_path / 'cache')), 7, 45)
  assert collections.Counter(row['dataset'] for row in rows) == {'easy': 30, 'hard': 10, 'other': 5}
  assert [row['prompt'] for row in rows[:30]] == [row['prompt'] for row in TASKS['arithmetic'].rows('test', 7, 30, operands=2)]
  few = data.open_test(Data(mixture=MIXTURE, cache_dir=str(tmp_path / 'cache')), 7, 2)
  assert {row['dataset'] for row in few} == set(MIXTURE)
  single = data.open_test(Data(train_size=5, cache_dir=str(tmp_path / 'cache')), 7, 30)
  assert single == list(TASKS['arithmetic'].rows('test', 7, 30))


@pytest.mark.parametrize(
  'component,reason',
  [
    ({'task': 'arithmetik', 'train_size': 5}, "config key 'data.mixture.a.task': 'arithmetik' is none of"),
    ({'task': 'arithmetic'}, "config key 'data.mixture.a.train_size': data.mixture.a.task 'arithmetic' makes its rows"),
    ({'task': 'arithmetic', 'train_size': 5, 'path': 'x'}, "config key 'data.mixture.a.path' cannot act"),
    ({'task': 'arithmetic', 'train_size': 5, 'options': {'operand': 2}}, "'data.mixture.a.options.operand' is unknown"),
    ({'task': 'arithmetic', 'train_size': 5, 'options': {'operands': 1}}, "config key 'data.mixture.a.options.operands': 1 must be"),
    ({'task': 'gsm8k', 'path': '/no/such/folder'}, "config key 'data.mixture.a.path': '/no/such/folder' does not exist"),
    ({'task': 'aime', 'path': 'IN'}, "config key 'data.mixture.a.task': 'aime' is for evaluation"),
    ({'task': 'dataset', 'path': 'IN'}, "config key 'data.mixture.a': its rows have a column 'dataset'"),
    ({'train_size': 5}, "config key 'data.mixture.a.task' is missing"), (3, "config key 'data.mixture.a': 3 is not a section"),
    ({'task': 'linear', 'weigth': 2}, "config key 'data.mixture.a.weigth' is unknown; did you mean 'data.mixture.a.weight'?"),
    ({'task': 'linear', 'weight': 0}, "config key 'data.mixture.a.weight': 0.0 must be positive"),
    ({'task': 'linear', 'weight': -1}, "config key 'data.mixture.a.weight': -1.0 must be positive"),
    ({'task': 'linear', 'weight': 'much'}, "config key 'data.mixture.a.weight': 'much' is not of type float"),
    ({'task': 'linear', 'weight': float('inf')}, "config key 'data.mixture.a.weight': inf is not finite"),
    ({'task': 'linear', 'train_size': -1}, "config key 'data.mixture.a.train_size': -1 must not be negative"),
    ({'task': 'linear', 'train_size': 2.5}, "config key 'data.mixture.a.train_size': 2.5 is not of type int"),
  ],
)  # fmt: skip
def test_wrong_mixture(tmp_path, component, reason):
  """Failure: a mistake in a mixture is taken, or told under a key that the config does not have."""
  write(tmp_path / 'train.jsonl', [{'prompt': 'a', 'dataset': 'mine'}])
  if isinstance(component, dict) and component.get('path') == 'IN':
    component = {**component, 'path': str(tmp_path)}
  with pytest.raises(ConfigError) as error:
    mixed(tmp_path, {'a': component, 'b': {'task': 'linear', 'train_size': 5}})
  assert reason in str(error.value)


@pytest.mark.parametrize('name', ['', 'a.b', 'a/b', 'a b', 'a=b'])
def test_names_of_a_mixture(tmp_path, name):
  """Failure: a name that no command line can address, or that makes a metric's name ambiguous, is taken."""
  with pytest.raises(ConfigError, match=r"config key 'data\.mixture\..*': a name is of letters, digits, _ and -"):
    mixed(tmp_path, {name: {'task': 'linear', 'train_size': 5}})


def test_column_of_the_mixture_in_a_later_row(tmp_path):
  """Failure: a row that says of itself which data set it is from silently changes the mixture's accounts."""
  write(tmp_path / 'train.jsonl', [{'prompt': 'a'}, {'prompt': 'b', 'dataset': 'mine'}])
  train = mixed(tmp_path, {'a': {'task': 'dataset', 'path': str(tmp_path)}})
  with pytest.raises(ConfigError, match=r"'data\.mixture\.a': its rows have a column 'dataset'"):
    list(train.preview(100))


def test_encode_prompts():
  """Failure: a prompt is cut, a limit is off by one, or the error does not show which prompt."""
  rows = [{'prompt': '12345'}, {'prompt': 'é'}]
  assert encode_prompts(rows, TOK, 'plain', 5) == [list(b'12345'), list('é'.encode())]
  with pytest.raises(ConfigError, match=r"'data.max_prompt_length': 4, but a prompt has 5: '12345'"):
    encode_prompts(rows, TOK, 'plain', 4)
  with pytest.raises(ConfigError, match='no column prompt to roll out from; columns: text'):
    encode_prompts([{'text': 'a'}], TOK, 'plain', 4)


ROW = {'prompt': '2+3=', 'chain_of_thought': 'é', 'completion': '5', 'answer': '5'}


def test_encode_row():
  """Failure: the prompt is imitated, or the completion or its end token is not (trl#1623)."""
  ids, flags = encode_row(ROW, TOK, 'plain')
  assert ids == [
    *b'2+3=',
    TOK.ids['<think>'],
    *'é'.encode(),
    TOK.ids['</think>'],
    TOK.ids['<answer>'],
    ord('5'),
    TOK.ids['</answer>'],
    TOK.end_id,
  ]
  assert flags == [0] * 4 + [1] * 8
  assert encode_row({'text': 'ab', 'source': 'book'}, TOK, 'Q{prompt}') == ([*b'ab', TOK.end_id], [1, 1, 1])
  assert encode_row({'prompt': 'a', 'completion': 'b'}, TOK, 'Q{prompt}') == ([*b'Qab', TOK.end_id], [0, 0, 1, 1])
  chat = encode_row({'prompt': turns('a'), 'completion': 'b'}, TOK, 'plain')
  assert chat == (TOK.encode('<user>a<end><assistant>b<end>'), [0, 0, 0, 0, 1, 1])
  for row in ({'prompt': 'a'}, {'completion': 'b'}):
    with pytest.raises(ConfigError, match='nothing to imitate; columns: '):
      encode_row(row, TOK, 'plain')


def test_messages(tmp_path):
  """Failure: an assistant turn or its end token is not imitated, or a user's is, or what the template writes after the end."""
  conversation = {'messages': turns('q1', 'a1', 'q2', 'a2')}
  ids, flags = encode_row(conversation, TOK, 'plain')
  assert ids == TOK.encode(TOK.chat(conversation['messages'], False))
  assert [i for i, flag in zip(ids, flags, strict=True) if flag] == TOK.encode('a1<end>a2<end>')
  tok = HFTokenizer(make_folder(tmp_path / 'tok'))
  ids, flags = encode_row(conversation, tok, 'plain')
  assert ids == tok.encode(tok.chat(conversation['messages'], False))
  assert [i for i, flag in zip(ids, flags, strict=True) if flag] == tok.encode('a1<|im_end|>a2<|im_end|>')
  assert flags[-2:] == [1, 0]  # ChatML's newline
  other_end = HFTokenizer(make_folder(tmp_path / 'other', eos='<|endoftext|>'))
  with pytest.raises(ConfigError, match='no assistant turn with an end token'):
    encode_row(conversation, other_end, 'plain')
  with pytest.raises(ConfigError, match='no assistant turn to imitate: '):
    encode_row({'messages': turns('q')}, TOK, 'plain')


@pytest.mark.parametrize('train_on_prompt', [False, True])
def test_encode_sft(train_on_prompt):
  """Failure: padding is trained on or attended to, positions are off, or train_on_prompt does nothing."""
  rows = [ROW, {'prompt': 'a', 'completion': 'b' * 20}, {'prompt': 'ab', 'completion': ''}]
  got = encode_sft(rows, TOK, 'plain', 22, train_on_prompt)
  assert got.tokens.shape == (3, 24) and got.mask_NT.dtype == np.float32
  for n, row in enumerate(rows):
    ids, flags = encode_row(row, TOK, 'plain')
    rest = [0] * (24 - len(ids))
    assert got.tokens[n].tolist() == ids + rest
    assert got.segment_NT[n].tolist() == [1] * len(ids) + rest
    assert got.position_NT[n].tolist() == [*range(len(ids))] + rest
    assert got.mask_NT[n].tolist() == ([0] + [1] * (len(ids) - 1) if train_on_prompt else flags) + rest
  assert got.source_N.tolist() == [DATA] * 3 and got.group_N.tolist() == [0, 1, 2]
  assert got.logp_sample_NT is None


def test_row_that_is_too_long():
  """Failure: a row is cut and loses its answer and end, a limit is off by one, or the error does not show the row."""
  row = {'prompt': 'long ' * 30, 'completion': '5'}
  assert encode_sft([row], TOK, 'plain', 152, False).mask_NT.sum() == 2
  with pytest.raises(ConfigError, match=r"'data.max_length': 151, but a row has 152 tokens: 'long long .*\.\.\.'"):
    encode_sft([ROW, row], TOK, 'plain', 151, False)


def test_gsm8k_comes_back_as_it_was_made(tmp_path):
  """Failure: what is rolled out and graded after preparation is not what the task made."""
  (tmp_path / 'in').mkdir()
  for split in ('train', 'test'):
    write(tmp_path / 'in' / f'{split}.jsonl', [{'question': f'{split} ½?', 'answer': 'One.\n#### 1,000'}])
  assert load(tmp_path, 'test', task='gsm8k') == list(TASKS['gsm8k'].rows('test', 0, None, str(tmp_path / 'in')))
