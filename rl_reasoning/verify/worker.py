"""A worker process: `python -m rl_reasoning.verify.worker MEMORY`, started and fed by verify/pool.py.

One JSON line in is one call {function, job, path}; the lines out are {"begun": true} once the function is imported, then {"value": ...}
or {"crash": message}. Jobs run in the main thread, one after the other, under an address-space limit of MEMORY bytes.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Iterable
from typing import Any

LONGEST = 2000  # characters of a crash's message


def watch(requests: int, on: bool) -> None:
  """While a job runs, the end of `requests` (the parent has died) kills this process: SIGIO, which nothing handles, from the kernel, so
  that a job in a C loop that never lets go of the interpreter dies too. Off between jobs, when the parent may write."""
  flags = fcntl.fcntl(requests, fcntl.F_GETFL)
  fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
  poller = select.poll()
  poller.register(requests, 0)
  if on and poller.poll(0):  # it had died before the flag was set
    os._exit(1)


def load(name: str) -> Any:
  module, _, attribute = name.partition(':')
  return getattr(importlib.import_module(module), attribute)


def plain(value: Any) -> Any:
  """What JSON cannot say: numpy's numbers and arrays by their own `tolist`, iterators by their items."""
  if hasattr(value, 'tolist'):
    return value.tolist()
  if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
    return list(value)
  raise TypeError(f'{type(value).__name__} is no JSON')


def main(memory: int) -> None:
  """Serves until the parent closes the pipe. What jobs print, on whatever level, goes to stderr: stdout is taken from them first."""
  # A scheduler sends SIGTERM to every process of a job: the parent decides. A handler, for SIG_IGN would be handed on to what a job starts.
  signal.signal(signal.SIGTERM, lambda *_: None)
  requests, replies = os.dup(0), os.dup(1)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())

  def reply(text: str) -> None:
    line = text.encode() + b'\n'
    while line:
      line = line[os.write(replies, line) :]

  with os.fdopen(requests, 'rb', closefd=False) as lines:
    for line in lines:
      watch(requests, True)
      request = json.loads(line)
      sys.path[:] = request['path']
      try:
        function = load(request['function'])
        reply('{"begun": true}')
        answer = json.dumps({'value': function(**request['job'])}, default=plain)
      except BaseException as error:  # a sys.exit() of the job's too
        # After a MemoryError libraries may be left half-way: the parent takes another worker.
        crash = f'{type(error).__name__}: {error}'[:LONGEST]
        answer = json.dumps({'crash': crash, 'spent': isinstance(error, MemoryError)})
      watch(requests, False)
      reply(answer)


if __name__ == '__main__':
  main(int(sys.argv[1]))
