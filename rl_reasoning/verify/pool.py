"""Worker processes over pipes: calls with a time limit that a hang, a crash or a memory hog cannot hurt.

Plain subprocesses and JSON lines: no fork of a process that runs JAX, no pickle, no main guard in the user's script. Workers start when
first needed, stay warm, and die with this process, however it dies. A pool may be used from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rl_reasoning.verify.worker import plain

GIB = 2**30
MEMORY = {'math': 2 * GIB, 'rewards': 32 * GIB}  # address space of a worker, by kind of pool
MOST = 16  # workers of a pool, however many processors there are
START = 120.0  # seconds for a worker to start and import the function: not part of a job's limit


class Outcome(NamedTuple):
  status: str  # value | timeout | crash
  value: Any = None
  message: str = ''


class Died(Exception):
  """The worker closed its end of the pipe."""


class Worker:
  """One process, with one job at a time."""

  def __init__(self, memory: int):
    # -P: a json.py in the working directory must not stand in for the standard library's. A worker never takes the accelerator.
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(import_path()), 'JAX_PLATFORMS': 'cpu'}
    self.process = subprocess.Popen(
      [sys.executable, '-P', '-m', 'rl_reasoning.verify.worker', str(memory)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True, env=environment,
    )  # fmt: skip
    assert self.process.stdin and self.process.stdout
    self.to, self.back = self.process.stdin.fileno(), self.process.stdout.fileno()
    os.set_blocking(self.to, False)
    os.set_blocking(self.back, False)
    self.spent = False
    self.buffer = b''

  def wait(self, fd: int, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(fd, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(min(left, 3600) * 1000):
      if time.monotonic() >= deadline:
        raise TimeoutError

  def send(self, line: bytes, deadline: float) -> None:
    view = memoryview(line)
    while view:
      self.wait(self.to, select.POLLOUT, deadline)
      try:
        view = view[os.write(self.to, view) :]
      except BlockingIOError:
        continue
      except BrokenPipeError:
        raise Died from None

  def receive(self, deadline: float) -> dict:
    while b'\n' not in self.buffer:
      self.wait(self.back, select.POLLIN, deadline)
      try:
        part = os.read(self.back, 1 << 16)
      except BlockingIOError:
        continue
      if not part:
        raise Died
      self.buffer += part
    line, _, self.buffer = self.buffer.partition(b'\n')
    return json.loads(line)

  def run(self, request: bytes, timeout: float) -> Outcome:
    """The outcome of one job. `timeout` counts from when the function is imported. A worker that is `spent` must be killed."""
    limit = START
    try:
      self.send(request, time.monotonic() + limit)
      reply = self.receive(time.monotonic() + limit)
      if 'begun' in reply:
        limit = timeout
        reply = self.receive(time.monotonic() + limit)
    except TimeoutError:
      self.spent = True
      return Outcome('timeout', message=f'not done after {limit:g} s')
    except Died:
      self.spent = True
      code = self.kill(grace=1.0)
      name = f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
      return Outcome('crash', message=f'the worker process died: {name}')
    if 'value' in reply:
      return Outcome('value', reply['value'])
    self.spent = reply['spent']
    return Outcome('crash', message=reply['crash'])

  def kill(self, grace: float = 0.0) -> int:
    """Ends the process with all that it started; its exit code. One that is ending by itself has `grace` seconds to say how."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group lasts as long as one process in it
      os.killpg(self.process.pid, signal.SIGKILL)
    for pipe in (self.process.stdin, self.process.stdout):
      if pipe:
        pipe.close()
    return self.process.wait()

  def alive(self) -> bool:
    return self.process.poll() is None


def import_path() -> list[str]:
  return [os.path.abspath(entry) for entry in sys.path]


class Pool:
  def __init__(self, memory: int, size: int | None = None):
    """`size` workers (default: one a processor, at most MOST) of `memory` bytes of address space each."""
    self.memory, self.size = memory, size or min(os.cpu_count() or 1, MOST)
    self.owner = os.getpid()
    self.counts: Counter[str] = Counter()  # outcomes by status
    self.lock = threading.Lock()
    self.workers: set[Worker] = set()
    self.slots: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # last in, first out: few jobs use few workers
    for _ in range(self.size):
      self.slots.put(None)
    atexit.register(self.close)

  def map(self, function: str, jobs: Sequence[Mapping[str, Any]], timeout: float) -> list[Outcome]:
    """function(**job) for every job, in order: function is 'module:name', jobs and values are what JSON can say.

    A job that takes longer than `timeout` seconds, or ends its worker, costs only itself. Raises TypeError for jobs that are no JSON.
    """
    path = import_path()
    requests = [json.dumps({'function': function, 'job': job, 'path': path}, default=plain).encode() + b'\n' for job in jobs]
    outcomes: list[Outcome | None] = [None] * len(requests)
    errors: list[BaseException] = []
    todo = iter(range(len(requests)))

    def work() -> None:
      try:
        while not errors:
          with self.lock:
            index = next(todo, None)
          if index is None:
            return
          outcomes[index] = self.one(requests[index], timeout)
      except BaseException as error:
        errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(len(requests), self.size))]
    try:
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    except BaseException as error:  # Ctrl-C: the threads take no further job
      errors.append(error)
      raise
    if errors:
      raise errors[0]
    done = [outcome for outcome in outcomes if outcome is not None]
    with self.lock:
      self.counts.update(outcome.status for outcome in done)
    return done

  def one(self, request: bytes, timeout: float) -> Outcome:
    worker = self.slots.get()
    try:
      if worker is not None and not worker.alive():  # killed from outside since its last job
        self.retire(worker)
        worker = None
      if worker is None:
        worker = Worker(self.memory)
        with self.lock:
          self.workers.add(worker)
      outcome = worker.run(request, timeout)
      if worker.spent:
        self.retire(worker)
        worker = None
      return outcome
    except BaseException:
      if worker is not None:
        self.retire(worker)
        worker = None
      raise
    finally:
      self.slots.put(worker)

  def retire(self, worker: Worker) -> None:
    with self.lock:
      self.workers.discard(worker)
    worker.kill()

  def close(self) -> None:
    """Ends all workers. They start again when needed."""
    if os.getpid() == self.owner:  # a forked child must not end its parent's
      for worker in list(self.workers):
        self.retire(worker)


POOLS: dict[str, Pool] = {}
LOCK = threading.Lock()


def shared(kind: str) -> Pool:
  """The one pool of a kind (of MEMORY) in this process."""
  with LOCK:
    if kind not in POOLS or POOLS[kind].owner != os.getpid():
      POOLS[kind] = Pool(MEMORY[kind])
    return POOLS[kind]
