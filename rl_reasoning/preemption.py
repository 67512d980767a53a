"""SIGTERM, by which a scheduler takes a machine back (Slurm, GKE, spot instances): leave with what is done saved, and exit code 42.

Within `watched()` the signal only sets a flag, and the work asks for it (`check`) where it can be cut: between phases of a step, decode
calls of a rollout, batches of an evaluation. Elsewhere in a command line `leave` is the handler: it ends at once what a kill could end at
any moment. No other signal is listened to: Slurm sends this one, and earlier where a step needs longer (`--signal=TERM@120`, seconds).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

EXIT_CODE = 42
flags = SimpleNamespace(told=False, watching=False)  # plain values: a handler that takes a lock can meet itself


class Preempted(KeyboardInterrupt):
  """The process is to leave. No Exception, so that none of those who catch all errors on the way keeps it."""


def leave(*_: object) -> None:
  """The handler outside `watched`. Once: whoever is leaving is not torn out of that by a second signal."""
  if not flags.told:
    flags.told = True
    raise Preempted('preempted')


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """SIGTERM sets the flag. One that nobody has asked for by the end is handed to the handler that was there before.

  To be entered after jax.distributed.initialize, whose handler in C takes SIGTERM for itself: Python's own is then no longer called, and
  `signal.getsignal` does not tell. Without effect outside the main thread, where Python sets no handlers.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  flags.told = False
  before = signal.signal(signal.SIGTERM, lambda *_: setattr(flags, 'told', True))
  flags.watching = True
  try:
    yield
  finally:
    flags.watching = False
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
  if flags.told:
    flags.told = False
    signal.raise_signal(signal.SIGTERM)


def requested() -> bool:
  """Whether SIGTERM has come to this process, or to another one of the job: a collective where there are several, so that all of them must
  ask at the same places, and then all get the same answer. False outside `watched`."""
  if not flags.watching:
    return False
  import jax

  if jax.process_count() == 1:
    return flags.told
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(flags.told).any())


def check() -> None:
  """Raises Preempted if so `requested`."""
  if requested():
    flags.told = True  # here too, where another process has been told: a signal that follows is no news
    raise Preempted('preempted')
