"""Client for OpenAI-compatible endpoints (BASE_URL/chat/completions; a local vLLM needs no key): retries, budget, resume.

  with Client(Endpoint('http://localhost:8000/v1', 'my-model'), 'answers', Budget(requests=1000)) as client:
    for index, outcome in client.complete(requests): ...      # an Answer or a Failure each, in the order in which they come

Every outcome is appended to a file of JSON lines, under a hash of model, messages and options (not of the URL), before it is handed on:
whoever asks again with the same file asks only for what is missing. Failures are recorded, and asked again. Equal requests are one request:
several samples of one prompt differ in `sample` (not every server has the options n and seed). What was on its way at a kill is
asked again; Ctrl-C waits for it. Local files only: a bucket cannot append.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import hashlib
import json
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import requests
import urllib3

from rl_reasoning.answer_file import GARBLED, Answer, Cache, Failure, Usage
from rl_reasoning.config import ConfigError, check

CONNECT_S = 10.0  # to connect; Endpoint.timeout is for the reply
LONGEST_TIMEOUT = 86400.0  # sockets take no infinity
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # an endpoint that asks for a longer pause (Retry-After) ends the call
MOST_FAILURES = 20  # in a row: then the fault is not with single requests
OWN_OPTIONS = frozenset({'model', 'messages', 'stream', 'n'})  # of a request: set here, and by no config
MOST_SPOILT = 4  # replies without an answer, and no error, to one request: each may cost what an answer costs
TEMPLATE_TOKENS = 256  # what a server's chat template may add to a prompt, in a budget's upper bound


@dataclasses.dataclass(frozen=True)
class Endpoint:
  base_url: str  # with its version: https://api.openai.com/v1, http://localhost:8000/v1
  model: str
  api_key_env: str = ''  # environment variable that holds the key; '': none is sent
  concurrency: int = 8  # requests at once
  timeout: float = 600.0  # seconds without a byte of the reply
  attempts: int = 8  # POSTs for one request: with the default backoff about two minutes of trouble
  backoff: float = 1.0  # seconds before the second attempt, twice as many before each further one, less up to a half at random
  answers_as: str = ''  # the model that replies name, where `model` is an alias of it


@dataclasses.dataclass(frozen=True)
class Request:
  messages: Sequence[Mapping[str, str]]
  options: Mapping[str, Any]  # what else the body holds: temperature, max_tokens, n, seed, ...
  sample: int = 0  # tells requests apart that the endpoint cannot: the nth sample of a prompt


class Again(NamedTuple):
  """An attempt that another one may mend."""

  reason: str
  connected: bool = True  # False: nothing was sent
  hint: str = ''  # of a reply of status 200 that is no answer: what may be wrong where all are


@dataclasses.dataclass(frozen=True)
class Budget:
  """Limits on all that a file of answers has cost, earlier calls included; 0: none. Every POST counts, retries too.

  A limit is passed by nothing but kill -9, which loses what is on its way: before a POST its upper bound is set aside, a token a byte
  of the prompt and max_tokens for each of n choices, and what it did not take is given back with the answer. Of a POST whose reply was
  lost the bound is counted, as it may be on the bill.
  """

  requests: int = 0
  tokens: int = 0  # prompt and completion
  cost: float = 0.0  # in the currency of the prices
  price_in: float = 0.0  # a million prompt tokens
  price_out: float = 0.0  # a million completion tokens

  def __post_init__(self):
    for field in dataclasses.fields(self):
      check(
        0 <= getattr(self, field.name) < float('inf'),
        f'budget: {field.name} {getattr(self, field.name)} is negative or not finite',
      )
    check(not self.cost or self.price_in + self.price_out > 0, 'budget: a limit on the cost needs the prices of tokens')

  def cost_of(self, usage: Usage) -> float:
    return (usage.prompt_tokens * self.price_in + usage.completion_tokens * self.price_out) / 1e6

  def passed(self, usage: Usage) -> str:
    """The limit that this would pass, '' for none."""
    if self.requests and usage.posts > self.requests:
      return f'{self.requests:,} requests'
    if self.tokens and usage.prompt_tokens + usage.completion_tokens > self.tokens:
      return f'{self.tokens:,} tokens'
    return f'a cost of {self.cost:g}' if self.cost and self.cost_of(usage) > self.cost else ''

  def bound(self, request: Request) -> Usage:
    """What one POST can cost at most. Raises ConfigError where a limit needs it and the options leave it open."""
    options = request.options
    longest = options.get('max_completion_tokens') or options.get('max_tokens') or 0
    choices = options.get('n') or 1
    for name, value in (('max_tokens', longest), ('n', choices)):
      check(isinstance(value, int) and value >= 0, f'the option {name} is {value!r}, no whole number')
    check(
      longest > 0 or not (self.tokens or self.cost),
      'a budget of tokens or cost needs max_tokens or max_completion_tokens in the options of every request',
    )
    text = json.dumps(list(request.messages), ensure_ascii=False).encode(errors='surrogatepass')
    return Usage(1, len(text) + TEMPLATE_TOKENS, longest * choices)


def checked_url(base_url: str) -> str:
  """The address of chat completions. Raises ConfigError."""
  # The URL is printed and recorded: no password may be in it.
  host = ''.join(base_url.split('/')[2:3])
  check('@' not in host, 'the base URL holds a user name or password: name a variable that holds the key instead')
  try:
    parts = urllib.parse.urlsplit(base_url)
    requests.Request('POST', base_url).prepare()
    good = parts.scheme in ('http', 'https') and not parts.query and not parts.fragment
  except ValueError:  # of requests too: a host or a port that cannot be
    good = False
  check(good, f'base URL {base_url!r}: write it like http://localhost:8000/v1')
  return base_url.rstrip('/') + '/chat/completions'


def read_key(variable: str) -> str:
  """The key. A file's newline around it is dropped; what no header can hold is refused here, because requests would print it."""
  check(not variable or variable in os.environ, f'the environment has no variable {variable!r} to take the key from')
  key = os.environ.get(variable, '').strip() if variable else ''
  good = key.isascii() and key.isprintable() and ' ' not in key and bool(key) == bool(variable)
  check(good, f'the environment variable {variable!r} is empty or holds what is no key')
  return key


def retry_after(value: str | None) -> float:
  """Seconds of a Retry-After header, which is a number or a date; 0 where there is none or it says nothing."""
  try:
    return max(0.0, float(value or 0))
  except ValueError:
    pass
  try:
    until = email.utils.parsedate_to_datetime(str(value))
    return max(0.0, (until - datetime.datetime.now(until.tzinfo)).total_seconds())
  except (ValueError, TypeError):
    return 0.0


BROKEN_OFF = 'insufficient_system_resource'  # DeepSeek's finish_reason of an answer that the server gave up


def told(text: str) -> str:
  """What the endpoint says is wrong: the message inside its JSON, or the text as it is."""
  try:
    found = json.loads(text)
    for key in ('error', 'message', 'detail'):
      found = found.get(key, found) if isinstance(found, dict) else found
    text = found if isinstance(found, str) else json.dumps(found)
  except (ValueError, RecursionError):
    pass
  return ' '.join(text.split())


def same_model(asked: str, answered: str) -> bool:
  """Whether a reply's `model` is the one that was asked: path and case aside, and a date or ':tag' that an endpoint adds (gpt-4o answers as
  gpt-4o-2024-08-06). Nothing else may follow: gpt-4o-mini is another model."""
  asked, answered = (name.rpartition('/')[2].casefold() for name in (asked, answered))
  return not answered or bool(re.fullmatch(rf'{re.escape(asked)}(?:[-@][0-9][0-9-]*)?(?::[\w.-]+)?', answered))


def blank(answer: Answer) -> bool:
  """Whether an answer says nothing. One that was cut before its text did its work: asked again, it would be cut again."""
  return not any(text.strip() for text in answer.texts) and 'length' not in answer.finished


def read_reply(body: bytes) -> tuple[Answer, tuple[int, int] | None, str]:
  """(answer, (prompt tokens, completion tokens) or None, the model's name or '') of a body. Raises GARBLED."""
  found = json.loads(body)
  choices = [(choice['message'], choice.get('finish_reason') or '') for choice in found['choices']]
  if not choices:
    raise ValueError('no choices')
  reasonings = [message.get('reasoning_content') or message.get('reasoning') or '' for message, _ in choices]
  texts = [message.get('content') or '' for message, _ in choices]
  for value in (*texts, *reasonings):
    if not isinstance(value, str):
      raise TypeError(f'{value!r} is no text')
  # JSON can spell halves of surrogate pairs, and no file in UTF-8 holds them.
  texts, reasonings = (
    [t.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') for t in ts] for ts in (texts, reasonings)
  )
  usage = found.get('usage')
  counted = isinstance(usage, dict) and 'prompt_tokens' in usage  # else the answer is good, and its bound is what it has cost
  tokens = (int(usage['prompt_tokens']), int(usage.get('completion_tokens') or 0)) if counted else None
  answer = Answer(tuple(texts), tuple(reasonings), tuple(str(reason) for _, reason in choices))
  return answer, tokens, str(found.get('model') or '')


class Client:
  """One endpoint, one file of answers and one budget. A context manager: leaving it frees the file.

  `stopped` says which limit ended the last `complete`, '' for none; `unasked` counts the requests that it left out.
  """

  def __init__(self, endpoint: Endpoint, cache: str | os.PathLike, budget: Budget = Budget()):
    check(endpoint.concurrency >= 1 and endpoint.attempts >= 1, 'concurrency and attempts are 1 at least')
    check(0 < endpoint.timeout <= LONGEST_TIMEOUT, f'the timeout must be positive, and {LONGEST_TIMEOUT:g} s at most')
    check(endpoint.backoff >= 0, 'the backoff must not be negative')
    self.endpoint, self.budget = endpoint, budget
    self.url, self.key = checked_url(endpoint.base_url), read_key(endpoint.api_key_env)
    self.cache = Cache(cache)
    self.changed = threading.Condition()  # of what follows
    self.held, self.posting = Usage(), 0  # what is set aside or spent and not recorded yet; POSTs on their way
    self.stopped, self.unasked, self.halted = '', 0, False
    self.resume_at = 0.0  # time.monotonic(): nobody posts before it
    self.reached = self.answered = False  # an HTTP reply, an answer has come

  def __enter__(self) -> Client:
    return self

  def __exit__(self, *_: object) -> None:
    self.cache.close()

  def hash(self, request: Request) -> str:
    asked = {'model': self.endpoint.model, 'messages': list(request.messages), 'options': dict(request.options)}
    asked |= {'sample': request.sample} if request.sample else {}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

  def known(self, request: Request) -> Answer | Failure | None:
    """What the file of answers holds, asking nobody."""
    return self.cache.get(self.hash(request))

  def complete(self, asked: Iterable[Request]) -> Iterator[tuple[int, Answer | Failure]]:
    """(index, outcome) of every request as they come; `asked` is read no further than the concurrency allows, so it may be endless.

    Where the budget ends nothing more is asked, and what is known already still comes. Leaving early, by Ctrl-C too, waits for what is on
    its way and records it (a second Ctrl-C does not wait). Raises ConfigError where going on is no use: an endpoint that cannot be reached
    or is none, a key that it does not take, an unknown model, failures only.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    self.stopped, self.unasked, self.halted, self.held = '', 0, False, Usage()
    # Daemons: the end of the program must not wait for a server that hangs.
    threads = [threading.Thread(target=self.work, args=(todo, done), daemon=True) for _ in range(self.endpoint.concurrency)]
    for thread in threads:
      thread.start()
    source, more = enumerate(asked), True
    waiting: dict[str, list[int]] = {}  # what is on its way, with the indices of all its equals
    failures = 0
    try:
      while more or waiting:
        if more and sum(map(len, waiting.values())) < self.endpoint.concurrency:
          index, request = next(source, (0, None))
          if request is None:
            more = False
            continue
          key = self.hash(request)
          if isinstance(found := self.cache.get(key), Answer):
            yield index, found
          elif key in waiting:
            waiting[key].append(index)
          elif self.stopped:
            self.unasked += 1
          else:
            self.budget.bound(request)
            waiting[key] = [index]
            todo.put((key, request))
          continue
        key, outcome = done.get()
        indices = waiting.pop(key)
        if isinstance(outcome, BaseException):
          raise outcome
        if outcome is None:
          self.unasked += len(indices)
          continue
        failures = failures + 1 if isinstance(outcome, Failure) else 0
        # Once something was answered, requests that are refused are the fault of the data: long prompts may stand together.
        if isinstance(outcome, Failure) and failures >= MOST_FAILURES and not (outcome.refused and self.answered):
          raise ConfigError(f'{self.url}: {failures} requests failed in a row, the last one: {outcome.reason}')
        yield from ((index, outcome) for index in indices)
    finally:
      with self.changed:
        self.halted = True
        self.changed.notify_all()
      for _ in threads:
        todo.put(None)
      for thread in threads:
        thread.join()

  def work(self, todo: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
    with requests.Session() as session:
      session.auth = self.authorize  # a header would lose against an entry for the host in ~/.netrc
      while (item := todo.get()) is not None:
        try:
          outcome = self.ask(session, *item)
        except BaseException as error:
          outcome = error
        done.put((item[0], outcome))

  def authorize(self, prepared: requests.PreparedRequest) -> requests.PreparedRequest:
    if self.key:
      prepared.headers['Authorization'] = f'Bearer {self.key}'
    return prepared

  def ask(self, session: requests.Session, key: str, request: Request) -> Answer | Failure | None:
    """The outcome of one request, recorded. None: the budget or the caller's leaving came before an answer."""
    bound, used, spoilt, reply = self.budget.bound(request), Usage(), 0, Again('')
    body = json.dumps({'model': self.endpoint.model, 'messages': list(request.messages), **request.options}).encode()
    for attempt in range(self.endpoint.attempts):
      if not self.pause(attempt) or not self.reserve(bound):
        self.leave(key, reply.reason, used)
        return None
      charged = bound
      try:
        reply, charged = self.post(session, body, bound)
      except ConfigError as error:
        self.leave(key, str(error), used)
        raise
      finally:
        self.settle(bound, charged)
      used = used.plus(charged)
      spoilt += isinstance(reply, Again) and bool(reply.hint)
      if not isinstance(reply, Again) or spoilt == MOST_SPOILT:
        break
    if isinstance(reply, Again):
      if not reply.connected:
        self.leave(key, reply.reason, used)
      check(reply.connected, f'{self.url} can no longer be reached: {reply.reason}; the same command goes on')
      last, reply = reply, Failure(f'{reply.reason}; {used.posts} attempts')
      if last.hint and not self.answered:  # no chance, which would have spared some other request
        self.record(key, reply, used)
        raise ConfigError(f'{self.url}: {last.reason}; {last.hint}')
    self.record(key, reply, used)
    return reply

  def leave(self, key: str, reason: str, used: Usage) -> None:
    """Records what attempts without an answer may have cost."""
    if used.posts:
      self.record(key, Failure(f'{reason}; left after {used.posts} attempts'), used)

  def pause(self, attempt: int) -> bool:
    """Waits out the backoff and what Retry-After told anyone: a limit on the rate is the account's. False: the caller has left."""
    delay = min(LONGEST_BACKOFF, self.endpoint.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1) if attempt else 0.0
    with self.changed:
      until = max(time.monotonic(), self.resume_at) + delay
      while not self.halted and (left := until - time.monotonic()) > 0:
        self.changed.wait(left)
      return not self.halted

  def reserve(self, bound: Usage) -> bool:
    """Sets the bound of one POST aside, once what others give back makes room for it. False: there will be none, or the caller has left."""
    with self.changed:
      while not self.halted and not self.stopped:
        limit = self.budget.passed(self.cache.used.plus(self.held).plus(bound))
        if not limit:
          self.held, self.posting = self.held.plus(bound), self.posting + 1
          return True
        if self.posting:
          self.changed.wait()
        else:
          self.stopped = limit
          self.changed.notify_all()
      return False

  def settle(self, bound: Usage, charged: Usage) -> None:
    with self.changed:
      self.held, self.posting = self.held.minus(bound).plus(charged), self.posting - 1
      self.changed.notify_all()

  def record(self, key: str, outcome: Answer | Failure, used: Usage) -> None:
    with self.changed:
      self.cache.put(key, outcome, used)
      self.held = self.held.minus(used)

  def quote(self, text: str) -> str:
    """Part of an error message: endpoints repeat the key in theirs. (Replaced before the cut, which could leave most of it.)"""
    return (text.replace(self.key, '***') if self.key else text)[:300]

  def post(self, session: requests.Session, body: bytes, bound: Usage) -> tuple[Answer | Failure | Again, Usage]:
    """One POST and what to count for it. Raises ConfigError for what no further request will mend."""
    try:
      # A redirect is not followed: it would turn the POST into a GET.
      response = session.post(self.url, data=body, headers={'Content-Type': 'application/json'}, allow_redirects=False,
                              timeout=(CONNECT_S, self.endpoint.timeout))  # fmt: skip
    except requests.RequestException as error:
      cause = error.args[0] if error.args else error
      # urllib3 gives up only on connecting (there are no retries of its own); what fails later is raised as it is.
      connected = not isinstance(cause, urllib3.exceptions.MaxRetryError)
      reason = self.quote(f'{type(error).__name__}: {cause if connected else cause.reason}')
      check(connected or self.reached, f'{self.url} cannot be reached: {reason}')
      return Again(reason, connected), bound if connected else Usage()
    self.reached, status, tokens = True, response.status_code, None
    if status == 200:
      try:
        answer, tokens, model = read_reply(response.content)
      except GARBLED as error:
        said = self.quote(told(response.text))
        reason = f'the reply is no chat completion ({type(error).__name__}: {self.quote(str(error))}): {said}'
        return Again(reason, hint='is this the base URL of an OpenAI-compatible endpoint?'), bound
      charged, wanted = Usage(1, *tokens) if tokens else bound, self.endpoint.answers_as or self.endpoint.model
      if not same_model(wanted, model):
        reason = f'the reply is of model {self.quote(model)!r}, not of {wanted!r}'
        return Again(reason, hint='if it is an alias, say under which name its answers come'), charged
      if blank(answer):
        return Again(f'the reply is empty ({answer.finished[0]})', hint='do its options leave room for an answer?'), charged
      if BROKEN_OFF in answer.finished:
        return Again(f'the answer was broken off ({BROKEN_OFF})'), charged
      self.answered = True
      return answer, charged
    reason = f'{status}: {self.quote(told(response.text))}'
    # A single request may be forbidden (403) for what it says.
    if status in (401, 402) or (status == 403 and not self.answered) or (status == 429 and 'insufficient_quota' in response.text):
      variable = self.endpoint.api_key_env
      sent = f'the key is that of {variable}' if variable else 'no key was sent: name the variable that holds it'
      raise ConfigError(f'{self.url}: {reason}; {sent}')
    if status in (404, 405) or status < 400:
      hint = f'is there a model {self.endpoint.model!r}, and does the base URL end with its version (/v1)?'
      raise ConfigError(f'{self.url}: {reason}; {hint}')
    if status in (408, 429) or status >= 500:
      wait = retry_after(response.headers.get('Retry-After'))
      check(wait <= LONGEST_WAIT, f'{self.url}: {reason}; it asks to wait {wait:.0f} s: the same command goes on then')
      with self.changed:
        self.resume_at = max(self.resume_at, time.monotonic() + wait) if wait else self.resume_at
      return Again(reason), bound if status == 504 else Usage(1)  # behind a gateway that waits no longer, work may go on
    return Failure(reason, refused=True), Usage(1)


def ask_all(client: Client, asked: Iterable[Request], total: int) -> None:
  """Every outcome into the file of answers, telling how far it is every ten seconds."""
  told_at = time.monotonic()
  for count, _ in enumerate(client.complete(asked), 1):
    if time.monotonic() - told_at > 10:
      told_at = time.monotonic()
      print(f'{count:,} of {total:,} answers', flush=True)
