"""Several processes, one run: how they start, agree on small things and end together.

Rows stay where they are: between hosts go numbers of rows (lengths, rewards), and the few groups of completions whose place is elsewhere.
One process is the same code with nobody to ask. Every process calls these functions in the same order.

A trap that this module is there for: under `jax.set_mesh` of all devices an eager operation on numpy arrays is a program of all processes,
and takes it on trust that their arrays are equal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rl_reasoning.config import ConfigError, check, differences

FLAGS = ('distributed', 'coordinator', 'processes', 'process')
HEARTBEAT_S = 40  # without a sign of life, so that a dead process has ended the others within a minute; JAX's default is 100
HANG_S = 600  # without progress: more than a program takes to compile
GOODBYE_S = 5  # that a process which fails leaves the others to tell their own error
TURN_MS = 1000  # of waiting for another process
PIECE = 2**20  # bytes of one message to the coordinator

turns = itertools.count()  # numbers the exchanges, equal on all processes


def client() -> Any:
  """Of the coordination service; None in a run of one process."""
  from jax._src import distributed

  return distributed.global_state.client


def count() -> int:
  """Processes of this run. Unlike jax.process_count it leaves the devices alone."""
  from jax._src import distributed

  return distributed.global_state.num_processes if client() is not None else 1


def index() -> int:
  from jax._src import distributed

  return distributed.global_state.process_id if client() is not None else 0


def is_main() -> bool:
  """Whether this is the process that writes files and tells the user."""
  return index() == 0


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
  """All GPUs of the node where Slurm runs one task a node: JAX would give that task the first one alone. None: as JAX finds."""
  one_a_node = 'SLURM_NTASKS' in environ and environ['SLURM_NTASKS'] == environ.get('SLURM_STEP_NUM_NODES')
  gpus = environ.get('SLURM_GPUS_ON_NODE', '')
  if not one_a_node or not gpus.isdigit() or 'JAX_LOCAL_DEVICE_IDS' in environ:
    return None
  return list(range(int(gpus)))


def whole_number(flags: Mapping[str, str], name: str) -> int:
  check(flags[name].isdigit(), f'--{name}={flags[name]}: not a number')
  return int(flags[name])


def initialize(flags: Mapping[str, str]) -> None:
  """Joins the other processes: those of TPU, Slurm, GKE or MPI with --distributed, else --coordinator=HOST:PORT --processes=N --process=I.
  Nothing without these flags. Before any use of a device. Raises ConfigError."""
  named = [name for name in FLAGS[1:] if name in flags]
  check(not named or len(named) == 3, f'--{named and named[0]}: --coordinator, --processes and --process go together')
  check('distributed' not in flags or not named, '--distributed detects what --coordinator, --processes and --process say')
  check(not flags.get('distributed'), f'--distributed={flags.get("distributed")}: the flag takes no value')
  if 'distributed' not in flags and not named:
    return
  given: dict[str, Any] = {'local_device_ids': slurm_devices(os.environ)}
  if named:  # inside a Slurm job too: what is detected would keep all GPUs but one from the process
    processes, process = whole_number(flags, 'processes'), whole_number(flags, 'process')
    check(process < processes, f'--process={process}: processes are counted from 0, and there are {processes}')
    check(':' in flags['coordinator'], f'--coordinator={flags["coordinator"]}: write HOST:PORT')
    given = {'coordinator_address': flags['coordinator'], 'num_processes': processes, 'process_id': process,
             'cluster_detection_method': 'deactivate'}  # fmt: skip
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself, in C, where Python cannot see it
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_S)
  except (ValueError, RuntimeError) as error:
    raise ConfigError(f'the processes of the run did not find each other: {error}') from None
  jax.config.update('jax_cpu_enable_async_dispatch', False)  # two programs in flight could wait for each other's peers
  Watch(HANG_S).start()


def wait_for(get: Callable[[str, int], Any], key: str) -> Any:
  """What another process sets, however late: who waits for one that died is ended by the heartbeat. In short turns, between which Python
  hears of signals."""
  while True:
    try:
      return get(key, TURN_MS)
    except Exception as error:  # JAX has no kind of its own
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def exchange(name: str, text: str) -> list[str]:
  """What every process says, in their order."""
  if count() == 1:
    return [text]
  kv, key = client(), f'rl_reasoning/{next(turns)}/{name}'
  kv.key_value_set(f'{key}/{index()}', text)
  return [wait_for(kv.blocking_key_value_get, f'{key}/{p}') for p in range(count())]


def check_same(found: Mapping[str, Any]) -> None:
  """Raises ConfigError, on all processes, where one says something else than process 0, naming it and what differs. Values are JSON;
  mappings are told key by key."""
  first, *others = [json.loads(text) for text in exchange('same', json.dumps(dict(found)))]
  told = []
  for process, other in enumerate(others, 1):
    for name, value in other.items():
      if value != first[name]:
        keys = isinstance(value, dict) and '; '.join(differences(first[name], value))
        told.append(f'process {process} runs with another {name} than process 0: {keys or f"{first[name]} and {value}"}')
  check(not told, '\n  '.join(told))


def from_main(function: Callable[[], Any]) -> Any:
  """What process 0 finds (JSON), on all processes; they wait for it. A ConfigError of its is raised by all."""
  if count() == 1:
    return function()
  found: dict[str, Any] = {}
  if is_main():
    try:
      found = {'value': function()}
    except ConfigError as error:
      found = {'error': str(error)}
  found = json.loads(exchange('main', json.dumps(found))[0])
  if 'error' in found:
    raise ConfigError(found['error'])
  return found['value']


def gather(x: Any) -> np.ndarray:
  """[processes, ...]: the array of each, all of one shape and dtype, bit for bit."""
  x = np.asarray(x)
  if count() == 1 or not x.size:
    return np.repeat(x[None], count(), axis=0)
  from jax.experimental import multihost_utils

  raw = np.frombuffer(x.tobytes(), np.uint8)  # as it is, a float64 would arrive as a float32
  return np.frombuffer(np.ascontiguousarray(multihost_utils.process_allgather(raw)).tobytes(), x.dtype).reshape(-1, *x.shape)


def largest(value: int) -> int:
  """Over all processes."""
  return int(gather(np.int64(value)).max())


def move(outgoing: Mapping[int, Mapping[int, Any]], incoming: Sequence[int]) -> dict[int, Any]:
  """Sends `outgoing[process][number]` and returns {number: object} of what the others send under the numbers `incoming`."""
  if count() == 1:
    return {}
  kv, turn = client(), next(turns)
  for process, things in outgoing.items():
    for number, thing in things.items():
      raw, key = pickle.dumps(thing), f'rl_reasoning/{turn}/{process}/{number}'
      pieces = [raw[at : at + PIECE] for at in range(0, len(raw), PIECE)]
      for n, piece in enumerate(pieces):
        kv.key_value_set_bytes(f'{key}/{n}', piece)
      kv.key_value_set(f'{key}/pieces', str(len(pieces)))
  found = {}
  for number in incoming:
    key = f'rl_reasoning/{turn}/{index()}/{number}'
    pieces = int(wait_for(kv.blocking_key_value_get, f'{key}/pieces'))
    found[number] = pickle.loads(b''.join(wait_for(kv.blocking_key_value_get_bytes, f'{key}/{n}') for n in range(pieces)))
    kv.key_value_delete(key)  # with all below it
  return found


progress = ('start', time.monotonic())  # the phase, and when it was last heard of


def mark(phase: str) -> None:
  """Sign of life, for the watch."""
  global progress
  progress = (phase, time.monotonic())


class Watch(threading.Thread):
  """Where nothing has been marked for `seconds`, tells on stderr in which phase that is, and the stack of every thread; once a phase. The
  process goes on waiting: what looks like a hang may be a long compilation, and a peer that died ends it by the heartbeat."""

  def __init__(self, seconds: float):
    super().__init__(daemon=True, name='watch')
    self.seconds = seconds

  def run(self) -> None:
    told = None
    while True:
      time.sleep(min(5.0, self.seconds / 4))
      phase, since = progress
      waited = time.monotonic() - since
      if waited > self.seconds and told != since:
        told = since
        text = f'process {index()} of {count()}: no progress for {waited:.0f} s in {phase}; it goes on waiting. Its threads:'
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


def ended(run: Callable[[], int]) -> int:
  """The exit code of a command, which may be 42 for a clean end before time.

  Among several processes one that fails tells why and is gone: Python's own end would wait for the others, who wait for it in a collective.
  The heartbeat ends them.
  """
  hint = ''
  try:
    code = run()
  except BaseException:
    if count() == 1:
      raise
    traceback.print_exc()
    code, hint = 1, '; where the error is that of a collective, another process has died before: see what that one tells'
  if code in (0, 42) or count() == 1:
    return code
  print(f'process {index()} of {count()} ends with code {code}{hint}', file=sys.stderr, flush=True)
  with contextlib.suppress(Exception):  # where all fail alike, each has told so before the first is gone
    client().wait_at_barrier('rl_reasoning/goodbye', GOODBYE_S * 1000)
  sys.stdout.flush()
  os._exit(code)
