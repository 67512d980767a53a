"""Data from a teacher behind an API, and from published sets: a server that fails at random, limits, resume, and what is written."""

import collections
import json
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import tensorflow_datasets as tfds

from rl_reasoning import config, data_from_api, datagen, pipeline
from rl_reasoning.api import Answer
from rl_reasoning.config import ConfigError
from rl_reasoning.tasks import dataset
from tests.test_api import KEY, asked, chat, serve

__all__ = ['serve']  # a fixture

ROOT = pathlib.Path(__file__).parent.parent
SIZE = 40


def answered(question, thinking='reasoning_content', value=None, **more):
  """What a teacher says to 'What is 3+4?', thinking beside the text or in it."""
  a, b = question.removeprefix('What is ').removesuffix('?').split('+')
  value = int(a) + int(b) if value is None else value
  found = chat(f'So it is \\boxed{{{value}}}.', model='teacher', **more)
  message = found['choices'][0]['message']
  if thinking == 'reasoning_content':
    message['reasoning_content'] = f'Well, {a} and {b}.'
  else:
    message['content'] = f'<think>\nWell, {a} and {b}.\n</think>\n\n{message["content"]}'
  return found


def teach(body, _):
  return answered(asked(body))


def problems(folder, size=SIZE):
  path = folder / 'data' / 'train.jsonl'
  path.parent.mkdir(exist_ok=True)
  rows = [{'prompt': f'What is {i}+{2 * i}?', 'answer': str(3 * i)} for i in range(size)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows


def settings(server, folder, size=SIZE, **changes):
  """Of a job whose problems lie in `folder`; changes are of the section generate, those of its section api by 'api.KEY'."""
  if not (folder / 'data').exists():
    problems(folder, size)
  found = {
    'data': {'task': 'dataset', 'path': str(folder / 'data'), 'cache_dir': str(folder / 'cache')},
    'generate': {
      'source': 'api', 'keep': 'reasoning', 'num_samples': 1,
      'api': {'url': server if isinstance(server, str) else server.url, 'model': 'teacher', 'options': {'max_tokens': 50},
              'timeout': 5.0, 'backoff': 0.001},
    },
  }  # fmt: skip
  for key, value in changes.items():
    found = config.override(found, f'generate.{key}', value)
  return found


def make(server, folder, out='out', **changes):
  """(summary, rows) of a job."""
  summary = datagen.generate(datagen.resolve(settings(server, folder, **changes)), str(folder / out))
  return summary, read(folder / out)


def read(folder, name='data.jsonl'):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def api(**keys):
  return {f'api.{key}': value for key, value in keys.items()}


TROUBLES = {
  'rate': (429, {'error': {'message': 'slow down'}}, {'Retry-After': '0.01'}), 'error': (500, 'oops'), 'gateway': (503, ''),
  'slow': None, 'half': None, 'garbled': '{"choices": [{"message"', 'not chat': '<html>', 'empty': None, 'other model': None, 'cut': None,
}  # fmt: skip


class Moody:
  """A teacher who gives each question up to three different troubles, chosen by its text, before the answer."""

  def __init__(self):
    self.left, self.met, self.lock = {}, collections.Counter(), threading.Lock()

  def __call__(self, body, _):
    question = asked(body)
    rng = random.Random(question)
    with self.lock:
      left = self.left.setdefault(question, rng.sample(list(TROUBLES), rng.randint(0, 3)))
      trouble = left.pop() if left else ''
      self.met[trouble] += 1
    good = answered(question, rng.choice(['reasoning_content', 'think']))
    if trouble == 'slow':
      time.sleep(1.4)
    elif trouble == 'half':
      text = json.dumps(good)
      return 200, text[: len(text) // 2], {'Content-Length': str(len(text)), 'Connection': 'close'}
    elif trouble == 'cut':
      raise ConnectionAbortedError
    elif trouble == 'empty':
      return chat(' \n', model='teacher')
    elif trouble == 'other model':
      return {**good, 'model': 'teacher-mini'}
    elif trouble:
      return TROUBLES[trouble]
    return good


def test_a_server_that_fails_at_random(serve, tmp_path, capsys, monkeypatch):
  """Failure: a passing trouble costs a prompt, gives it twice or out of order, an answer of another model or an empty one is taken, or the
  key is told to anyone but the server."""
  monkeypatch.setenv('TEACHER_KEY', KEY)
  moody = Moody()
  server = serve(moody)
  summary, rows = make(server, tmp_path, **api(key_env='TEACHER_KEY', concurrency=16, timeout=1.0, attempts=12))
  assert all(moody.met[trouble] for trouble in TROUBLES), moody.met  # else nothing was shown
  first = datagen.problems(datagen.resolve(settings(server, tmp_path)))[0]
  assert [row['prompt'] for row in rows] == [row['prompt'] for row in first] and len({r['prompt'] for r in rows}) == SIZE
  for row in rows:
    a, b = row['prompt'].removeprefix('What is ').removesuffix('?').split('+')
    assert row == {
      'prompt': f'What is {a}+{b}?', 'answer': str(int(a) + int(b)), 'chain_of_thought': f'Well, {a} and {b}.',
      'completion': f'So it is \\boxed{{{int(a) + int(b)}}}.',
    }  # fmt: skip
  lines = read(tmp_path / 'out', 'answers.jsonl')
  assert len(lines) == SIZE == len({line['key'] for line in lines}) and all('answer' in line for line in lines)
  assert summary['posts'] == len(server.bodies) > SIZE and summary['failed'] == summary['not_asked'] == 0
  assert all(headers['Authorization'] == f'Bearer {KEY}' for headers in server.headers)
  told = capsys.readouterr()
  assert KEY not in told.out + told.err
  assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())


def test_what_no_retry_mends(serve, tmp_path):
  """Failure: a prompt that the server never answers is asked for ever, ends the others, or is no longer asked by the same command."""
  well, answers = [], threading.Event()

  def reply(body, _):
    number = int(asked(body).split()[2].split('+')[0])
    if well or number % 10 > 2:
      answers.set()
      return teach(body, _)
    answers.wait(5)  # else a teacher without any answer is no teacher
    time.sleep(0.05)
    return [chat('', model='teacher'), (400, {'error': {'message': 'flagged'}}), '{"cho'][number % 10]

  server = serve(reply)
  summary, rows = make(server, tmp_path, **api(concurrency=4))
  count = collections.Counter(map(asked, server.bodies))
  assert {count[f'What is {n}+{2 * n}?'] for n in range(0, 40, 10)} == {4}  # an empty answer is paid like any other
  assert {count[f'What is {n}+{2 * n}?'] for n in range(1, 40, 10)} == {1}
  assert {count[f'What is {n}+{2 * n}?'] for n in range(2, 40, 10)} == {4}
  assert summary['failed'] == 12 and len(rows) == SIZE - 12 and summary['samples'] == SIZE - 12
  assert summary['failures'] == {'the reply is empty': 4, '400': 4, 'the reply is no chat completion': 4}
  well.append(True)
  before = len(server.bodies)
  summary, rows = make(server, tmp_path)
  assert len(rows) == SIZE and len(server.bodies) == before + 12 and summary['failed'] == 0
  assert make(server, tmp_path) == (summary, rows) and len(server.bodies) == before + 12


@pytest.mark.parametrize('name, good', [
  ('teacher', True), ('org/Teacher', True), ('teacher-2024-08-06', True), ('teacher-0528:free', True), ('', True), (None, True),
  ('teacher-mini', False), ('teach', False), ('teacher2', False), ('other', False), ('teacher-r1-distill', False),
])  # fmt: skip
def test_model_of_the_answer(serve, tmp_path, name, good):
  """Failure: another model's answers are bought as the teacher's, or the name that an endpoint gives the same model is refused."""
  server = serve(lambda body, _: {**teach(body, _), 'model': name})
  if good:
    assert len(make(server, tmp_path, size=3)[1]) == 3
    return
  with pytest.raises(ConfigError, match=f"the reply is of model '{name}', not of 'teacher'; if it is an alias"):
    make(server, tmp_path, size=3)
  assert len(make(server, tmp_path, 'named', size=3, **api(answers_as=name))[1]) == 3


PRICES = {
  'prices': {'teacher': {'input': 1000.0, 'output': 2000.0}}
}  # a reply of chat() costs 10 + 10 thousandths, at most 360 + 100


@pytest.mark.parametrize('limit', [{'max_cost': 1.0, **PRICES}, {'max_tokens': 800}, {'max_requests': 11}])
def test_limits_and_resume(serve, tmp_path, limit, capsys):
  """Failure: a limit is passed, what was bought is lost or bought again when the limit is raised, or rows differ from those of one go."""
  server = serve(teach)
  job = {**api(concurrency=4), **api(**PRICES)}
  summary, rows = make(server, tmp_path, **{**job, **api(**limit)})
  told = capsys.readouterr().out
  assert f'{SIZE} requests (0 are answered)' in told and 'at most 2,000 tokens of completions' in told
  assert 'at the prices of teacher 0.' in told and ' to 4.' in told and f'limit: {summary["budget_ended_by"]}' in told
  spent = summary['prompt_tokens'] + summary['completion_tokens']
  assert summary['cost'] == pytest.approx((summary['prompt_tokens'] * 1 + summary['completion_tokens'] * 2) / 1000)
  assert summary['posts'] == len(server.bodies) == len(rows) < SIZE and summary['not_asked'] == SIZE - len(rows) and len(rows) > 5
  assert (
    summary['cost'] <= limit.get('max_cost', 9)
    and spent <= limit.get('max_tokens', 9999)
    and len(rows) <= limit.get('max_requests', 99)
  )
  assert 'not asked, the limit was' in datagen.describe(summary)

  job |= api(concurrency=2)
  whole, rows = make(server, tmp_path, **job)
  assert set(collections.Counter(map(asked, server.bodies)).values()) == {1} and whole['not_asked'] == 0
  assert f'requests ({SIZE - summary["not_asked"]} are answered)' in capsys.readouterr().out
  make(serve(teach), tmp_path, 'again', **job)
  assert (tmp_path / 'out' / 'data.jsonl').read_bytes() == (tmp_path / 'again' / 'data.jsonl').read_bytes()
  datagen.generate(datagen.resolve(settings(server, tmp_path, **job)), str(tmp_path / 'out'), overwrite=True)
  assert len(server.bodies) == SIZE  # what is paid is not thrown away
  with pytest.raises(ConfigError, match=r'data of another config .*\n  generate.api.model'):
    make(server, tmp_path, **{**job, **api(model='other', prices={'other': {'input': 1.0, 'output': 1.0}})})


def test_nothing_was_bought(serve, tmp_path):
  """Failure: a limit that allows nothing looks like data without rows, or writes files."""
  server = serve(teach)
  with pytest.raises(ConfigError, match=r'leaves none of 0 completions: .*40 were not asked: the limit was a cost of 0.001'):
    make(server, tmp_path, **api(max_cost=0.001, **PRICES))
  assert not server.bodies and not (tmp_path / 'out' / 'data.jsonl').exists()


def test_concurrency_reaches_64(serve, tmp_path):
  """Failure: fewer requests are on their way than the setting allows (or more): a teacher that takes minutes would take days."""
  together = threading.Barrier(64)

  def reply(body, _):
    together.wait(20)  # nobody is answered before 64 have asked
    return teach(body, _)

  server = serve(reply)
  summary, rows = make(server, tmp_path, size=128, **api(timeout=30.0))
  assert len(rows) == 128 and server.most == 64 and summary['posts'] == 128


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGKILL'])
def test_interrupted(serve, tmp_path, name):
  """Failure: what was bought before an interruption is lost; after Ctrl-C or a scheduler's SIGTERM anything is bought twice, after kill -9
  more than what was on its way."""
  enough, again = threading.Event(), []

  def reply(body, _):
    if len(server.bodies) > SIZE // 2 and not again:
      enough.set()
      time.sleep(0.3)
    return teach(body, _)

  server = serve(reply)
  (tmp_path / 'file.py').write_text(f'def get_config():\n  return {settings(server, tmp_path, **api(concurrency=4))!r}\n')
  command = [sys.executable, '-m', 'rl_reasoning.datagen', f'--config={tmp_path / "file.py"}', f'--workdir={tmp_path / "out"}']
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  assert enough.wait(300)
  process.send_signal(getattr(signal, name))
  error = process.communicate(timeout=300)[1]
  assert process.returncode == (130 if name == 'SIGTERM' else -signal.SIGKILL), error
  assert not (tmp_path / 'out' / 'data.jsonl').exists() and len(server.bodies) < SIZE
  found = len(read(tmp_path / 'out', 'answers.jsonl')) if name == 'SIGTERM' else None
  assert found in (None, len(server.bodies))
  again.append(True)
  make(server, tmp_path, **api(concurrency=4))
  count = collections.Counter(map(asked, server.bodies))
  assert len(count) == SIZE and count.total() - SIZE <= (0 if name == 'SIGTERM' else 4)
  make(serve(teach), tmp_path, 'again')
  assert (tmp_path / 'out' / 'data.jsonl').read_bytes() == (tmp_path / 'again' / 'data.jsonl').read_bytes()


@pytest.mark.parametrize('reasoning, text, wanted', [
  ('so', ' 4 ', ('so', '4')), ('', '<think>so</think>\n4', ('so', '4')), ('', 'so</think>4', ('so', '4')),
  ('so', 'Hm <answer>4</answer>', ('so', '4')),
  ('so', '<answer>4</answer><answer>5</answer>', ('so', '<answer>4</answer><answer>5</answer>')),
  ('', '4', None), ('', '<think>so', None), ('', '<think>a</think>b</think>', None), (' ', '<think>so</think>4', ('so', '4')),
])  # fmt: skip
def test_thought_and_answer(reasoning, text, wanted):
  """Failure: thinking is looked for in the wrong place, or part of it becomes the answer."""
  assert data_from_api.thought_and_answer(Answer((text,), (reasoning,), ('stop',))) == wanted


def test_samples_and_what_is_left_out(serve, tmp_path):
  """Failure: several samples of a prompt are one request, a wrong or cut answer is kept, or a limit a prompt is none."""
  count, lock = collections.Counter(), threading.Lock()

  def reply(body, _):
    with lock:
      count[asked(body)] += 1
      turn = count[asked(body)]
    good = answered(asked(body))
    good['choices'][0]['message']['reasoning_content'] += f' Turn {turn // 2}.'  # the second and the third are alike
    if turn == 4:
      return answered(asked(body), value=-1)
    return answered(asked(body), finish='length') if turn == 5 else chat('I know: 4.', model='teacher') if turn == 6 else good

  server = serve(reply)
  changes = {
    'num_samples': 6,
    'size': 5,
    **api(system='Think.', template='Q: {prompt}', options={'max_tokens': 50, 'temperature': 0.6}),
  }
  found = settings(server, tmp_path, **changes)
  (tmp_path / 'data' / 'train.jsonl').write_text(
    ''.join(json.dumps({'prompt': f'What is {i}+{i}?', 'answer': str(2 * i)}) + '\n' for i in range(5))
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys.modules[__name__], 'asked', lambda body: body['messages'][-1]['content'].removeprefix('Q: '))
    summary = datagen.generate(datagen.resolve(found), str(tmp_path / 'out'))
  assert len(server.bodies) == 30 and summary['samples'] == 30 and summary['prompts'] == 5
  assert summary['dropped'] == {'duplicate': 5, 'not in the format': 5, 'not verified': 5, 'truncated': 5}
  assert summary['kept'] == summary['rows'] == 10 and summary['accuracy']['kept'] == 1.0
  body = server.bodies[0]
  assert body['messages'][0] == {'role': 'system', 'content': 'Think.'} and body['messages'][1]['content'].startswith(
    'Q: What is'
  )
  assert body['temperature'] == 0.6 and set(body) == {'model', 'messages', 'max_tokens', 'temperature'}
  limited = datagen.generate(
    datagen.resolve(config.override(found, 'generate.max_per_prompt', 1)), str(tmp_path / 'out'), overwrite=True
  )
  assert limited['rows'] == 5 and len(server.bodies) == 30


def test_without_a_gold_answer(serve, tmp_path):
  """Failure: what cannot be verified counts as wrong, or as right where only verified rows are wanted."""
  server = serve(
    lambda body, _: (
      {**chat('Fine.', model='teacher')} | {'choices': [{'message': {'content': 'Fine.', 'reasoning_content': 'Hm.'}}]}
    )
  )
  rows = [{'prompt': f'Write poem {i}.', **({'answer': '4'} if i % 2 else {})} for i in range(6)]
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  summary, made = make(server, tmp_path)
  assert len(made) == 3 == summary['without_verdict'] and summary['dropped'] == {'not verified': 3}
  assert make(server, tmp_path, 'all', verify='never')[0]['rows'] == 6
  with pytest.raises(ConfigError, match=r"leaves none of 6 completions: .*'no accuracy': 3, 'not verified': 3"):
    make(server, tmp_path, 'none', verify='always')


def test_what_is_written(serve, tmp_path):
  """Failure: the ArrayRecord files hold other rows than data.jsonl, the card does not tell where the data are from and what was done, or a
  later stage cannot train on them."""
  server = serve(teach)
  evaluation = tmp_path / 'evaluation'
  evaluation.mkdir()
  (evaluation / 'test.jsonl').write_text(json.dumps({'prompt': 'what is  7+14?'}) + '\n')
  summary, rows = make(
    server, tmp_path, licence='CC-BY-4.0', near_duplicates=0.9, decontaminate={'exam': {'task': 'dataset', 'path': str(evaluation)}},
    **api(**PRICES),
  )  # fmt: skip
  assert summary['dropped'] == {'contaminated': 1} and summary['rows'] == len(rows) == SIZE - 1 and summary['kept'] == SIZE
  assert not any('7+14' in row['prompt'] for row in rows)
  out = tmp_path / 'out'
  source = tfds.builder_from_directory(out / 'array_record' / 'rows' / '1.0.0').as_data_source('rows')
  assert [json.loads(source[i]['row']) for i in range(len(source))] == rows
  card = (out / 'README.md').read_text()
  for text in (
    'license: cc-by-4.0', '- model: teacher', f'- url: {server.url}', 'licence: CC-BY-4.0', '| prompts | 40 |', '| rows | 39 |',
    '| left out, contaminated | 1 |', f'exam (dataset {evaluation})', 'no 13 successive words', 'near duplicates (MinHash',
    '"generate"', 'the final answer is the gold answer, where there is one', 'answer, chain_of_thought, completion, prompt',
    "builder_from_directory('array_record/rows/1.0.0')",
  ):  # fmt: skip
    assert text in card, text
  before = card
  make(server, tmp_path, 'moved', licence='CC-BY-4.0', near_duplicates=0.9,
       decontaminate={'exam': {'task': 'dataset', 'path': str(evaluation)}}, **api(**PRICES))  # fmt: skip
  assert (tmp_path / 'moved' / 'README.md').read_text() == before
  assert (
    len(list(dataset.rows('train', 0, None, str(out / 'data.jsonl'))))
    + len(list(dataset.rows('test', 0, None, str(out / 'data.jsonl'))))
    == 39
  )


def test_published(tmp_path):
  """Failure: a published set loses rows beside those that are wrong, alike or not in the format, or gains chains of others."""

  def row(n, answer, said=None, **more):
    return {'question': f'What is {n}+{n}?', 'solution': '9', 'thinking_trajectories': [f'Well, {n} twice.'],
            'attempt': f'So \\boxed{{{said or answer}}}', **more} | {'solution': str(answer)}  # fmt: skip

  path = tmp_path / 'train.jsonl'
  rows = [row(1, 2), row(2, 4, said=5), row(1, 2), row(1, 2, thinking_trajectories=['One and one.']), row(3, 'a proof', said=6)]
  path.write_text(''.join(json.dumps(one) + '\n' for one in rows))
  found = {
    'data': {'task': 'reasoning_sets', 'path': str(path), 'options': {'test_share': 0.0}, 'cache_dir': str(tmp_path / 'cache')},
    'generate': {'source': 'published', 'keep': 'reasoning', 'licence': 'Apache-2.0'},
  }
  summary = datagen.generate(datagen.resolve(found), str(tmp_path / 'out'))
  made = read(tmp_path / 'out')
  assert sorted(r['chain_of_thought'] for r in made) == ['One and one.', 'Well, 1 twice.', 'Well, 3 twice.']
  assert (summary['prompts'], summary['samples'], summary['without_verdict']) == (3, 5, 1)
  assert (
    summary['dropped'] == {'duplicate': 1, 'not verified': 1}
    and f'data: reasoning_sets {path}' in (tmp_path / 'out' / 'README.md').read_text()
  )
  # The chains of any other task that shows them, and a mixture of tasks.
  found['data'] = {
    'mixture': {'sets': {'task': 'reasoning_sets', 'path': str(path), 'options': {'test_share': 0.0}},
                'sums': {'task': 'arithmetic', 'train_size': 20, 'options': {'operands': 2, 'high': 9}}},
    'cache_dir': str(tmp_path / 'cache'),
  }  # fmt: skip
  datagen.generate(datagen.resolve(found), str(tmp_path / 'mixed'))
  both = read(tmp_path / 'mixed')
  assert len([r for r in both if r['dataset'] == 'sets']) == 3  # all that there is of each, once
  own = {**found, 'data': {**found['data']['mixture']['sums'], 'cache_dir': str(tmp_path / 'cache')}}
  datagen.generate(datagen.resolve(own), str(tmp_path / 'sums'))
  assert [{k: v for k, v in r.items() if k != 'dataset'} for r in both if r['dataset'] == 'sums'] == read(tmp_path / 'sums')


REFUSED = [
  ({'source': 'web'}, "'generate.source': 'web' is none of checkpoint, api, published"),
  ({'keep': 'correct'}, "'generate.keep': 'correct' is for source checkpoint; api gives 'reasoning'"),
  ({'verify': 'maybe'}, "'generate.verify': 'maybe' is none of possible, always, never"),
  ({'temperature': 0.5}, "'generate.temperature' cannot act: it is for generate.source checkpoint, not api"),
  ({'source': 'published'}, "'generate.num_samples' cannot act: it is for generate.source checkpoint, api, not published"),
  ({'ngram': 8}, "'generate.ngram' cannot act without generate.decontaminate"),
  ({'near_duplicates': 1.5}, "'generate.near_duplicates': 1.5 is out of range"),
  ({'decontaminate': {'x': {'task': 'gsm8k', 'weight': 2.0}}}, "'generate.decontaminate.x.weight' cannot act"),
  ({'decontaminate': {'x': {'tusk': 'gsm8k'}}}, "'generate.decontaminate.x.tusk' is unknown; did you mean 'generate.decontaminate.x.task'"),
  ({'api.url': ''}, "'generate.api.url' is empty"),
  ({'api.url': 'localhost'}, 'write it like'),
  ({'api.model': ''}, "'generate.api.model' is empty"),
  ({'api.template': 'Q'}, "'generate.api.template': 'Q' has no {prompt}"),
  ({'api.options': {'n': 2}}, "'generate.api.options': n cannot be set here"),
  ({'num_samples': 2, 'api.options': {'temperature': 0}}, '0 is greedy, 2 samples would be all equal'),
  ({'api.options': {'max_tokens': 0}, 'api.max_tokens': 5}, 'needs max_tokens'),
  ({'api.max_cost': 1.0}, "'generate.api.prices' has no 'teacher'"),
  ({'api.prices': {'other': {'input': 1.0, 'output': 1.0}}}, "'teacher', is none of other"),
  ({'api.prices': {'teacher': {'input': 1.0}}}, "'generate.api.prices.teacher.output' is missing"),
  ({'api.prices': {'teacher': {'input': -1.0, 'output': 1.0}}}, "'generate.api.prices'"),
  ({'api.max_requests': -1}, "'generate.api.max_requests': -1 is out of range"),
  ({'api.concurrency': 0}, "'generate.api.concurrency': 0 is out of range"),
  ({'api.timeout': 0.0}, "'generate.api.timeout': 0.0 is out of range"),
  ({'api.key_env': 'NO_SUCH_KEY'}, "has no variable 'NO_SUCH_KEY'"),
]  # fmt: skip


@pytest.mark.parametrize('changes, message', REFUSED)
def test_refused(tmp_path, changes, message):
  """Failure: a key that is misspelt, impossible or without effect is ignored, or told after something was bought."""
  with pytest.raises(ConfigError) as caught:
    make('http://127.0.0.1:1/v1', tmp_path, **changes)
  assert message in str(caught.value) and not (tmp_path / 'out').exists()


def test_keys_of_a_policy_are_refused(tmp_path):
  """Failure: a checkpoint or its sampling is named beside a teacher, and nobody is told that it is not asked."""
  found = {
    **settings('http://127.0.0.1:1/v1', tmp_path),
    'rollout': {'max_completion_length': 5},
    'roles': {'policy': {'init': 'x'}},
  }
  with pytest.raises(
    ConfigError, match=r"cannot act beside a section generate:\n  'roles.policy.init'.*\n  'rollout.max_completion_length'"
  ):
    datagen.generate(datagen.resolve(found), str(tmp_path / 'out'))
  problems(tmp_path)
  (tmp_path / 'data' / 'train.jsonl').write_text(json.dumps({'prompt': [{'role': 'user', 'content': 'hi'}]}) + '\n')
  with pytest.raises(ConfigError, match=r"'generate\.api\.template': .* cannot act on a prompt of chat messages"):
    make('http://127.0.0.1:1/v1', tmp_path, **api(template='Q: {prompt}'))


def test_config():
  """Failure: configs/reasoning_data.py does not resolve."""
  spec = 'configs/reasoning_data.py:path=/x,gsm8k=/y,'
  for more in ('licence=MIT', 'source=api,url=http://h/v1,model=m,price_in=1,price_out=2,max_cost=5'):
    datagen.check_job(datagen.resolve(config.read_file(spec + more)))


def test_stage_of_a_pipeline(serve, tmp_path):
  """Failure: a pipeline cannot buy data, or buys it again when it is run again."""
  server = serve(teach)
  stages = {'teach': settings(server, tmp_path, size=4)}
  result = pipeline.run_pipeline(stages, str(tmp_path / 'run'))
  assert (
    result['teach']['rows'] == 4 and pipeline.run_pipeline(stages, str(tmp_path / 'run')) == result and len(server.bodies) == 4
  )
