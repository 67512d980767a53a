"""The client for OpenAI-compatible endpoints, against a server in a thread."""

import collections
import contextlib
import dataclasses
import email.utils
import http.server
import itertools
import json
import threading
import time

import pytest

from rl_reasoning import api
from rl_reasoning.api import Answer, Budget, Client, Endpoint, Failure, Request, Usage
from rl_reasoning.config import ConfigError

KEY = 'sk-a-very-secret-key-0123456789'


def chat(*texts, prompt=10, completion=5, finish='stop', **more):
  """A body of /chat/completions."""
  choices = [{'index': i, 'message': {'role': 'assistant', 'content': t}, 'finish_reason': finish} for i, t in enumerate(texts)]
  return {'choices': choices, 'usage': {'prompt_tokens': prompt, 'completion_tokens': completion}, **more}


class Server:
  """`reply(body, headers)` gives a body for status 200, (status, body) or (status, body, headers); a text body goes out as it is, and an
  exception closes the connection. `bodies` are those that came."""

  def __init__(self, reply):
    self.bodies, self.headers, self.now, self.most = [], [], 0, 0
    lock, outer = threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'
      disable_nagle_algorithm = True  # else 40 ms a reply

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with lock:
          outer.bodies.append(body)
          outer.headers.append(dict(self.headers))
          outer.now += 1
          outer.most = max(outer.most, outer.now)
        try:
          found = reply(body, self.headers)
        except ConnectionAbortedError:
          self.close_connection = True
          return
        finally:
          with lock:
            outer.now -= 1
        status, payload, headers = (*found, {})[:3] if isinstance(found, tuple) else (200, found, {})
        payload = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
        with contextlib.suppress(OSError):  # a client that no longer waits
          self.send_response(status)
          for name, value in {'Content-Length': str(len(payload)), **headers}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(payload)

      def log_message(self, *_):
        pass

    class Listener(http.server.ThreadingHTTPServer):
      request_queue_size = 128  # 5 by default: of 64 connections at once most would wait a second for their second try

    self.http = Listener(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
    self.thread = threading.Thread(target=self.http.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
    self.thread.start()

  def close(self):
    self.http.shutdown()
    self.http.server_close()


@pytest.fixture
def serve():
  servers = []

  def start(reply):
    servers.append(Server(reply))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def request(text, **options):
  return Request([{'role': 'user', 'content': text}], options)


def asked(body):
  return body['messages'][-1]['content']


def echo(body, _):
  return chat(asked(body))


def endpoint(server, **changes):
  return Endpoint(**{'base_url': server.url, 'model': 'm', 'backoff': 0.001, 'timeout': 5.0, **changes})


def run(server, path, requests, budget=None, **changes):
  """({index: outcome}, client) of one call with a client of its own."""
  with Client(endpoint(server, **changes), path, budget or Budget()) as client:
    return dict(client.complete(requests)), client


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers(serve, tmp_path):
  """Failure: an answer belongs to another request, an option or a choice is lost, or half a surrogate pair goes into the file."""

  def reply(body, _):
    first = {'message': {'content': 'half \ud83d', 'reasoning_content': 'hm'}, 'finish_reason': 'stop'}
    second = {'message': {'content': None}, 'finish_reason': 'length'}
    return {'choices': [first, second]} if asked(body) == 'two' else chat(asked(body), finish=f'at {body["temperature"]}')

  server = serve(reply)
  texts = [f'question {i}' for i in range(20)] + ['two']
  found, _ = run(server, tmp_path / 'a', (request(t, temperature=0.5, n=2) for t in texts))
  assert found == {i: Answer((t,), ('',), ('at 0.5',)) for i, t in enumerate(texts[:-1])} | {
    20: Answer(('half \ufffd', ''), ('hm', ''), ('stop', 'length'))
  }
  assert all(body['model'] == 'm' and body['n'] == 2 for body in server.bodies)


def test_resume_asks_only_what_is_missing(serve, tmp_path):
  """Failure: an answer is paid for twice, another model's or other settings' answer is taken, or a failure is never asked again."""
  broken = [True]
  server = serve(lambda body, _: (400, {'error': {'message': 'too long'}}) if asked(body) == 'b' and broken[0] else echo(body, _))
  first, _ = run(server, tmp_path / 'a', [request('a'), request('b'), request('a')])
  assert first == {0: (('a',), ('',), ('stop',)), 2: first[0], 1: Failure('400: too long', refused=True)}
  assert sorted(map(asked, server.bodies)) == ['a', 'b']  # equal requests are one, and what is refused is not tried again

  broken[0] = False
  second, client = run(server, tmp_path / 'a', [request('b'), request('a')])
  assert [asked(body) for body in server.bodies[2:]] == ['b'] and second[0].texts == ('b',)
  assert client.cache.used == Usage(3, 20, 10)  # all that the file ever cost
  with Client(endpoint(server), tmp_path / 'a') as client:
    assert client.known(request('b')) == second[0] and client.known(request('c')) is None
  run(server, tmp_path / 'a', [request('a', temperature=1.0)])
  run(server, tmp_path / 'a', [request('a')], model='other')
  assert len(server.bodies) == 5


@pytest.mark.parametrize('trouble', [(429, {}), (500, 'text'), (503, ''), (504, {}), (529, {}), 'cut', 'slow'])
def test_retries(serve, tmp_path, trouble):
  """Failure: a passing trouble costs an answer, or the attempts are not counted."""
  count = itertools.count()

  def reply(body, _):
    if next(count) < 2:
      if trouble == 'cut':
        raise ConnectionAbortedError
      if trouble != 'slow':
        return trouble
      time.sleep(0.3)
    return echo(body, _)

  found, client = run(serve(reply), tmp_path / 'a', [request('a', max_tokens=7)], timeout=0.1)
  assert found[0].texts == ('a',)
  lost = client.budget.bound(request('a', max_tokens=7))  # a reply that was lost may be on the bill
  assert lost.completion_tokens == 7 and lost.prompt_tokens > len('a')
  each = Usage(1, *lost[1:]) if trouble in ('cut', 'slow', (504, {})) else Usage(1)
  assert client.cache.used == each.plus(each).plus(Usage(1, 10, 5))


def test_backoff(monkeypatch):
  """Failure: the pauses do not grow, have no random part, or a Retry-After is not honoured by all."""
  waits = []
  client = object.__new__(Client)
  client.endpoint, client.halted, client.resume_at = Endpoint('', '', backoff=1.0), False, 0.0
  clock = [100.0]
  monkeypatch.setattr(api.time, 'monotonic', lambda: clock[0])

  class Clock:
    def __enter__(self): ...
    def __exit__(self, *_): ...
    def wait(self, seconds):
      waits.append(seconds)
      clock[0] += seconds

  client.changed = Clock()
  for _ in range(50):
    for attempt in range(9):
      client.pause(attempt)
  for attempt, longest in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
    some = waits[attempt::8]
    assert longest / 2 <= min(some) < max(some) <= longest and max(some) > 1.2 * min(some)
  client.resume_at = clock[0] + 30
  client.pause(0)
  assert waits[-1] == pytest.approx(30)
  client.resume_at = clock[0] + 30
  client.pause(2)
  assert 31 <= waits[-1] <= 32


def test_retry_after(serve, tmp_path):
  """Failure: a server that says when to come back is asked sooner, or its date is not understood."""
  assert api.retry_after(None) == api.retry_after('soon') == api.retry_after('-3') == 0
  assert api.retry_after('2.5') == 2.5
  assert 50 < api.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 61
  times = []

  def reply(body, _):
    times.append(time.monotonic())
    return (429, {}, {'Retry-After': '0.3'}) if len(times) == 1 else echo(body, _)

  run(serve(reply), tmp_path / 'a', [request('a'), request('b')], concurrency=1)
  assert times[1] - times[0] >= 0.3
  with pytest.raises(ConfigError, match='it asks to wait 3600 s'):
    run(serve(lambda *_: (429, {}, {'Retry-After': '3600'})), tmp_path / 'b', [request('a')])


def test_concurrency(serve, tmp_path):
  """Failure: more requests at once than allowed, fewer than could be, or the whole list is read into memory ahead."""
  read = []

  def source():
    for i in range(40):
      read.append(i)
      yield request(str(i))

  def reply(body, _):
    time.sleep(0.01)
    return echo(body, _)

  server = serve(reply)
  with Client(endpoint(server, concurrency=4), tmp_path / 'a') as client:
    for count, _ in enumerate(client.complete(source()), 1):
      assert len(read) <= count + 4
  assert count == 40 and server.most == 4


def test_budget_of_requests(serve, tmp_path):
  """Failure: more is asked than allowed, retries and earlier calls are not counted, or what was answered is lost."""
  failed = collections.Counter()

  def reply(body, _):
    failed[asked(body)] += 1
    return (500, {}) if failed[asked(body)] == 1 else echo(body, _)

  server, texts = serve(reply), [request(t) for t in 'abcdef']
  found, client = run(server, tmp_path / 'a', texts, Budget(requests=5), concurrency=1)
  assert len(server.bodies) == 5 and client.stopped == '5 requests' and client.cache.used.posts == 5
  assert [found[i].texts for i in found] == [('a',), ('b',)] and client.unasked == 4

  found, client = run(server, tmp_path / 'a', texts, Budget(requests=5))
  assert len(server.bodies) == 5 and len(found) == 2 and client.unasked == 4  # what is known still comes
  found, client = run(server, tmp_path / 'a', texts, Budget(requests=12))
  assert len(found) == 6 and not client.stopped and client.unasked == 0 and client.cache.used.posts == 12


@pytest.mark.parametrize('concurrency', [1, 8])
@pytest.mark.parametrize('limits', [{'tokens': 2000}, {'cost': 2000 * 3e-6, 'price_in': 3.0, 'price_out': 3.0}])
def test_budget_of_tokens(serve, tmp_path, limits, concurrency):
  """Failure: the limit is passed by what is on its way, or so much is set aside for it that most of the budget is never used."""
  server = serve(lambda body, _: chat('x', prompt=60, completion=40))
  budget = Budget(**limits)
  found, client = run(
    server, tmp_path / 'a', [request(str(i), max_tokens=40) for i in range(40)], budget, concurrency=concurrency
  )
  used, bound = client.cache.used, budget.bound(request('0', max_tokens=40))
  assert client.stopped in ('2,000 tokens', 'a cost of 0.006')
  spent = used.prompt_tokens + used.completion_tokens
  assert spent == 100 * len(found) and 2000 - sum(bound[1:]) < spent <= 2000
  assert budget.cost_of(used) <= 0.006 and client.held == Usage() and client.unasked == 40 - len(found)
  if 'cost' in limits:
    assert budget.cost_of(used) == pytest.approx(spent * 3e-6)


def test_budget_is_told_what_it_needs(serve, tmp_path):
  """Failure: a limit on tokens is promised that nothing bounds, or an answer without a count of tokens is free."""
  server = serve(lambda body, _: {**chat('x'), 'usage': None})
  with pytest.raises(ConfigError, match='needs max_tokens'):
    run(server, tmp_path / 'a', [request('a')], Budget(tokens=1000))
  assert not server.bodies
  for options, most in (({'max_tokens': 9, 'n': 3}, 27), ({'max_completion_tokens': 9}, 9)):
    bound = Budget().bound(request('é' * 50, **options))
    assert bound.completion_tokens == most and bound.prompt_tokens >= 100
  _, client = run(server, tmp_path / 'a', [request('a', max_tokens=9)], Budget(tokens=1000))
  assert client.cache.used == client.budget.bound(request('a', max_tokens=9))
  for wrong in ({'cost': 1.0}, {'tokens': -1}, {'price_in': float('nan')}):
    with pytest.raises(ConfigError, match='budget'):
      Budget(**wrong)


def test_torn_file(serve, tmp_path):
  """Failure: a kill in the middle of a line loses earlier answers, glues the next line to it, or a file of something else is cut."""
  server, path = serve(echo), tmp_path / 'a'
  run(server, path, [request('a'), request('b')], concurrency=1)
  whole = path.read_bytes()
  for cut in (1, 5, 60, len(whole.splitlines()[1])):
    path.write_bytes(whole[:-cut])
    found, _ = run(server, path, [request('a'), request('b')], concurrency=1)
    assert found[1].texts == ('b',) and path.read_bytes() == whole
  assert [asked(body) for body in server.bodies] == ['a', 'b', *'bbbb']

  for torn in ('{"key": "1', '{"ke'):
    path.write_text(torn)
    run(server, path, [])
    assert path.read_text() == ''
  for other, place in (
    ('{"prompt": "x"}\n', 1), ('notes without an end', 1), (whole.decode() + '[]\n', 3),
    ('{"key": "k", "used": [1, 2, 3]}\n', 1), ('{"key": "k", "used": [1e999, 2, 3], "failure": ["x"]}\n', 1),
    ('{"key": "k", "used": ["a", 2, 3], "failure": ["x"]}\n', 1),
  ):  # fmt: skip
    path.write_text(other)
    with pytest.raises(ConfigError, match=f'{path}:{place}: no line of a file of answers'):
      run(server, path, [])
    assert path.read_text() == other


def test_one_process_a_file(serve, tmp_path):
  """Failure: two processes write into one file of answers and pay twice."""
  server = serve(echo)
  with Client(endpoint(server), tmp_path / 'a'), pytest.raises(ConfigError, match='another process is using it'):
    Client(endpoint(server), tmp_path / 'a')
  run(server, tmp_path / 'a', [request('a')])
  with pytest.raises(ConfigError, match='No such file or directory'):
    Client(endpoint(server), tmp_path / 'none' / 'a')


def test_full_disk(serve, tmp_path, monkeypatch):
  """Failure: half a line stays in the file, or a full disk looks like a failure of the endpoint."""
  server, path = serve(echo), tmp_path / 'a'
  run(server, path, [request('a')])
  whole, write = path.read_bytes(), api.os.pwrite
  parts = iter([3])

  def pwrite(file, data, offset):
    if (part := next(parts, None)) is None:
      raise OSError(28, 'No space left on device')
    return write(file, data[:part], offset)

  monkeypatch.setattr(api.os, 'pwrite', pwrite)
  with pytest.raises(ConfigError, match='No space left on device'):
    run(server, path, [request('b')])
  assert path.read_bytes() == whole


def test_leaving_records_what_is_on_its_way(serve, tmp_path):
  """Failure: whoever stops early (Ctrl-C) loses answers that are being paid for, or waits for retries."""

  def reply(body, _):
    if asked(body) == 'never':
      return 500, {}
    time.sleep(0.1 if asked(body) == 'slow' else 0)
    return echo(body, _)

  server = serve(reply)
  with Client(endpoint(server, backoff=30.0), tmp_path / 'a') as client:
    answers = client.complete([request('never'), request('slow'), request('fast')])
    assert next(answers)[1].texts == ('fast',)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 3
    assert client.known(request('slow')).texts == ('slow',)
    assert client.known(request('never')) == Failure('500: {}; left after 1 attempts')
    assert client.cache.used.posts == 3


def test_key(serve, tmp_path, monkeypatch):
  """Failure: the key is not sent, loses against ~/.netrc, or gets into the file of answers, an error or a repr."""
  (tmp_path / 'netrc').write_text('machine 127.0.0.1 login other password wrong\n')
  monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
  monkeypatch.setenv('SOME_KEY', KEY + '\n')
  path = tmp_path / 'a'
  server = serve(lambda body, headers: (int(asked(body)), {'error': {'message': f'no: {headers["Authorization"]}'}}))
  with pytest.raises(ConfigError, match=r'401: no: Bearer .*; the key is that of SOME_KEY') as error:
    run(server, path, [request('401')], api_key_env='SOME_KEY')
  assert server.headers[0]['Authorization'] == f'Bearer {KEY}' and KEY not in str(error.value)
  _, client = run(server, path, [request('400'), request('503')], api_key_env='SOME_KEY', attempts=2)
  long = serve(lambda body, headers: (400, f'{"x" * 280}{headers["Authorization"]}'))
  found, _ = run(long, path, [request('cut')], api_key_env='SOME_KEY')
  assert found[0].reason.endswith('xBearer ***')  # a message is cut after 300 characters: not inside the key
  assert KEY not in path.read_text() and '400: no: Bearer ***' in path.read_text() and KEY not in repr(client.endpoint)
  with pytest.raises(ConfigError, match='no key was sent: name the variable'):
    run(server, path, [request('401')])
  assert 'Authorization' not in server.headers[-1]

  monkeypatch.setenv('EMPTY', ' ')
  monkeypatch.setenv('TWO', f'{KEY} {KEY}')
  for name, message in (('NONE', 'has no variable'), ('EMPTY', 'is empty'), ('TWO', 'holds what is no key')):
    with pytest.raises(ConfigError, match=message) as error:
      run(server, path, [], api_key_env=name)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
  'reply, message',
  [
    ((403, {'error': 'not for you'}), '403: not for you'),
    ((402, {'error': {'message': 'no money'}}), '402: no money'),
    ((429, {'error': {'message': 'no money', 'code': 'insufficient_quota'}}), '429: no money'),
    ((404, {'message': 'The model `m` does not exist.'}), "The model `m` does not exist.; is there a model 'm'"),
    ((404, '<html>\nNot Found</html>'), r'404: <html> Not Found</html>; .* end with its version \(/v1\)'),
    ((302, '', {'Location': '/elsewhere'}), '302: ; is there'),
    ('<html>welcome</html>', 'no chat completion .*<html>welcome</html>; is this the base URL'),
    ('{"choices": [{"message"', 'no chat completion'),
    ({'choices': []}, 'no choices'),
    ({'choices': [{'message': {'content': ['parts']}}]}, 'is no text'),
    ('{"choices": [{"message": {}}], "usage": {"prompt_tokens": 1e999}}', 'no chat completion .OverflowError'),
    ({'error': {'message': 'busy'}}, 'no chat completion .*: busy'),
  ],
)  # fmt: skip
def test_what_no_retry_mends(serve, tmp_path, reply, message):
  """Failure: a wrong URL, model or key is tried again and again, or the user is not told which it is."""
  server = serve(lambda *_: reply)
  with pytest.raises(ConfigError, match=message):
    run(server, tmp_path / 'a', [request('a')])
  found = isinstance(reply, tuple)  # another reply may be well, when the endpoint is not known yet
  assert len(server.bodies) == (1 if found else api.MOST_SPOILT)


def test_after_an_answer_one_bad_reply_is_one_failure(serve, tmp_path):
  """Failure: one garbled or forbidden reply among thousands ends the call."""
  server = serve(lambda body, _: {'bad': '<html>', 'forbidden': (403, 'flagged')}.get(asked(body)) or echo(body, _))
  found, _ = run(server, tmp_path / 'a', map(request, ['a', 'bad', 'forbidden', 'b']), concurrency=1, attempts=2)
  assert 'no chat completion' in found[1].reason and '2 attempts' in found[1].reason
  assert found[2] == Failure('403: flagged', refused=True) and found[3].texts == ('b',)


def test_replies_of_odd_shapes(serve, tmp_path, monkeypatch):
  """Failure: the key comes back in what a reply is told to be, a good answer is thrown away for its usage, an answer that the server broke
  off is kept, or a body of a thousand brackets ends the run."""
  monkeypatch.setenv('SOME_KEY', KEY)

  def reply(body, headers):
    text = asked(body)
    if text == 'list':
      return chat([f'Bearer {KEY}' * 100])
    if text == 'usage':
      return {**chat('good'), 'usage': {'total_tokens': 30}}
    if text == 'deep':
      return '[' * 100_000
    return chat('half', finish='insufficient_system_resource') if len(server.bodies) % 2 else chat('whole')

  path = tmp_path / 'a'
  server = serve(reply)
  found, _ = run(
    server,
    path,
    [request('usage'), request('list'), request('deep')],
    api_key_env='SOME_KEY',
    attempts=2,
    backoff=0,
    concurrency=1,
  )
  assert (
    found[0].texts == ('good',) and 'no chat completion (TypeError' in found[1].reason and 'RecursionError' in found[2].reason
  )
  assert KEY not in path.read_text() and max(map(len, path.read_text().splitlines())) < 2000
  server.bodies.clear()
  found, _ = run(server, path, [request('broken')], api_key_env='SOME_KEY', attempts=2, backoff=0)
  assert found[0].texts == ('whole',) and len(server.bodies) == 2


def test_failures_only(serve, tmp_path):
  """Failure: a server that is down, or options that it does not take, are asked about for every row of the data; or a stretch of long
  prompts ends a call that could go on."""
  server = serve(lambda body, _: echo(body, _) if asked(body) == 'a' else (400 if asked(body)[0] == 'l' else 500, 'no'))
  for text in ('l', 'x'):
    with pytest.raises(ConfigError, match=r'20 requests failed in a row, the last one: .00: no'):
      run(server, tmp_path / text, (request(f'{text}{i}') for i in range(100)), attempts=1)
  found, _ = run(server, tmp_path / 'a', [request('a'), *(request(f'l{i}') for i in range(30))], concurrency=1)
  assert len(found) == 31
  with pytest.raises(ConfigError, match='20 requests failed in a row'):
    run(server, tmp_path / 'b', [request('a'), *(request(f'x{i}') for i in range(30))], concurrency=1, attempts=1)


def test_unreachable(serve, tmp_path, monkeypatch):
  """Failure: a wrong port is retried for minutes; or a server that dies on the way makes a failure of every row left."""
  server = serve(echo)
  with Client(endpoint(server, concurrency=1, attempts=3), tmp_path / 'a') as client:
    answers = client.complete(map(request, 'abc'))
    assert next(answers)[1].texts == ('a',)
    server.close()
    server.http.RequestHandlerClass.do_POST = lambda self: setattr(self, 'close_connection', True)
    with pytest.raises(ConfigError, match=r'can no longer be reached: ConnectionError: .*refused; the same command goes on'):
      list(answers)
    assert client.known(request('b')).reason.endswith('left after 1 attempts')  # which may have cost something
  with pytest.raises(ConfigError, match=r'chat/completions cannot be reached: ConnectionError: .*refused'):
    run(server, tmp_path / 'a', [request('b')], backoff=60.0)
  # A server that is back in time: nothing was sent meanwhile.
  server, post, sent = serve(echo), api.requests.Session.post, itertools.count()

  def away_once(session, url, **more):
    return post(session, 'http://127.0.0.1:1' if next(sent) == 1 else url, **more)

  monkeypatch.setattr(api.requests.Session, 'post', away_once)
  found, client = run(server, tmp_path / 'b', map(request, 'ab'), concurrency=1)
  assert len(found) == 2 and next(sent) == 3 and client.cache.used == Usage(2, 20, 10)


def test_settings(tmp_path):
  """Failure: a URL with a password is printed and recorded, or a setting that cannot work is found out late."""
  for url in (
    'localhost:8000',
    'ftp://x/v1',
    'http:///v1',
    'http://h/v1?key=3',
    'http://[',
    'http://h:99999/v1',
    'http://*.h/v1',
  ):
    with pytest.raises(ConfigError, match='write it like'):
      Client(Endpoint(url, 'm'), tmp_path / 'a')
  for url in ('http://me:hush@h/v1', 'http://me:hush@h:99999/v1', 'http://me:hush@['):
    with pytest.raises(ConfigError, match='holds a user name') as error:
      Client(Endpoint(url, 'm'), tmp_path / 'a')
    assert 'hush' not in str(error.value)
  for wrong in (
    {'concurrency': 0},
    {'attempts': 0},
    {'timeout': 0},
    {'timeout': float('inf')},
    {'timeout': float('nan')},
    {'backoff': -1},
  ):
    with pytest.raises(ConfigError):
      Client(dataclasses.replace(Endpoint('http://h/v1', 'm'), **wrong), tmp_path / 'a')
  assert not (tmp_path / 'a').exists()


def test_the_users_iterator_may_fail(serve, tmp_path):
  """Failure: an error in the data looks like the end of it, or threads stay."""

  def source():
    yield request('a')
    while not server.bodies:
      time.sleep(0.001)
    raise ConfigError('rows.jsonl:2: no JSON')

  server, before = serve(echo), threading.active_count()
  with pytest.raises(ConfigError, match=r'rows\.jsonl:2'):
    run(server, tmp_path / 'a', source(), concurrency=3)
  assert len(lines(tmp_path / 'a')) == 1 and threading.active_count() <= before + 1  # the server's, for the connection
