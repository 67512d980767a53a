"""rl_reasoning.train that sends itself SIGTERM at a moment within a phase, and says when:

  python -m tests.preempted_run PHASE OCCURRENCE SECONDS SAID.json --config=... --workdir=...

PHASE: rollout, update, evaluation or checkpoint. The signal comes in its OCCURRENCE-th pass, after SECONDS, at the latest at its end. That
of `checkpoint` is the end of `checkpoint.save`, when the files are written on behind.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

from rl_reasoning import checkpoint, evaluators, metrics, preemption, train


class Passes:
  """Of the phase that is waited for, and the signal in one of them."""

  def __init__(self, phase: str, occurrence: int, seconds: float, said: pathlib.Path):
    self.phase, self.left, self.seconds, self.said = phase, occurrence, seconds, said
    self.lock = threading.Lock()

  def fire(self) -> None:
    with self.lock:
      if not self.said.exists():
        self.said.write_text(json.dumps({'signal': time.time(), 'after_s': time.perf_counter() - self.began}))
        os.kill(os.getpid(), signal.SIGTERM)

  @contextlib.contextmanager
  def mark(self, phase: str):
    if phase != self.phase:
      yield
      return
    self.began, self.left = time.perf_counter(), self.left - 1
    now = self.left == 0
    if now:
      timer = threading.Timer(self.seconds, self.fire)
      timer.daemon = True
      timer.start()
    try:
      yield
    finally:
      if now:
        self.fire()


def marked(passes: Passes, phase: str, function):
  def wrapped(*arguments, **others):
    with passes.mark(phase):
      return function(*arguments, **others)

  return wrapped


def main() -> int:
  phase, occurrence, seconds, said = sys.argv[1:5]
  passes = Passes(phase, int(occurrence), float(seconds), pathlib.Path(said))
  timed = metrics.PhaseTimer.__call__

  @contextlib.contextmanager
  def timer(self, name):
    with timed(self, name) as found, passes.mark(name):
      yield found

  metrics.PhaseTimer.__call__ = timer
  evaluators.evaluate_all = marked(passes, 'evaluation', evaluators.evaluate_all)
  checkpoint.save = marked(passes, 'checkpoint', checkpoint.save)
  signal.signal(signal.SIGTERM, preemption.leave)
  return train.main(sys.argv[5:])


if __name__ == '__main__':
  sys.exit(main())
