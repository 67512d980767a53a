"""Many runs on this machine: every entry of a sweep for every seed, then a report over the seeds.

  python -m launch.sweep --config=FILE.py[:NAME=VALUE,...] --workdir=DIR --seeds=0,1,2 [--jobs=1] [--only=NAME,...] [--dry-run] [--report]

The config file defines, beside get_config, `sweep(base)`: given what get_config returns, it returns a list of dicts of dotted overrides,
  [{'objective.name': 'grpo'}, {'objective.name': 'dapo', 'optim.learning_rate': 3e-4}]    (see also config.product)
with three optional keys of an entry's own: `name` (default: made from the overrides), `arguments` (of get_config, for this entry), and
`report` (False leaves the entry out of the tables: a base). In texts, of entries and of get_config alike, '{workdir}' and '{seed}' stand
for the sweep's folder and the run's seed: 'roles.policy.init': '{workdir}/base/seed{seed}' starts from the run of the entry `base` with
the same seed, which then runs first. The seed goes to get_config where it takes one, else to the key `seed`.

REPORT = (...) in the file names what is compared: 'eval/EVALUATOR/METRIC' is the last evaluation, any other name is one of metrics.jsonl
and means its mean over the last tenth of the logged steps. Default: the accuracy of every evaluator, or else `reward` and `loss`.
COMPARE = [(ENTRY, AGAINST), ...] adds a table of differences, paired by seed: runs of one seed share their base, so that what is common to
them falls out.

A run is one `rl_reasoning.train`, in DIR/NAME/seedS, its output in DIR/NAME/seedS.log, and how it was launched in DIR/NAME/seedS.json. All
configs are checked before anything starts. A failed run does not stop the others, only those that need it. The same command again skips
what is finished and resumes the rest. Ends with DIR/sweep.json, sweep.md and sweep.png (written by --report alone, too).

Exit codes: 0 done, 1 some runs failed (a run that is preempted by itself counts as failed), 2 the user's error, 42 preempted (SIGTERM: the
runs have saved themselves), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from launch.sweep_entries import Run, Sweep, check_unchanged, finished, read_json, read_sweep, select, write_atomically
from launch.sweep_report import cores_here, now, report, this_commit, this_hardware
from rl_reasoning import preemption
from rl_reasoning.config import ConfigError, check, exit_code

EXIT_CODES = {2: "the user's error", 3: 'diverged', 42: 'saved and preempted', 130: 'interrupted'}
STOP_S = 60  # what a child gets to save itself


def check_configs(sweep: Sweep, runs: Sequence[Run], workdir: str) -> None:
  """Asks `train --explain` about one run of every entry that is not finished: it refuses keys that cannot act.

  What does not exist yet cannot be started from, so they are asked in a folder of stand-ins: the resolved config of each entry, from which
  the next ones read their architecture, and no weights.
  """
  print('checking the configs', flush=True)
  with tempfile.TemporaryDirectory() as stand_ins:
    for name in sweep.order:
      left = [run for run in runs if run.name == name and not finished(run, workdir)]
      if left:
        asked = [sys.executable, '-m', 'rl_reasoning.train', *left[0].flags(stand_ins), '--explain=json']
        answer = subprocess.run(asked, capture_output=True, text=True)
        said = answer.stderr.strip().replace(stand_ins, workdir).removeprefix('error: ')
        check(answer.returncode == 0, f'entry {name!r}: {said or f"exit code {answer.returncode}"}')
        config = json.dumps(json.loads(answer.stdout)['config'])
      for run in sweep.of(name):
        if left or finished(run, workdir):
          folder = run.folder(stand_ins)
          (folder / 'checkpoints').mkdir(parents=True)
          (folder / 'config.json').write_text(config if left else (run.folder(workdir) / 'config.json').read_text())


def cores(slot: int, jobs: int) -> list[str]:
  """The prefix that keeps the job of a slot on cores of its own: XLA starts as many threads as it sees cores."""
  every = cores_here()
  if jobs == 1 or len(every) < jobs or not shutil.which('taskset'):
    return []
  return ['taskset', '-c', ','.join(map(str, every[slot * len(every) // jobs : (slot + 1) * len(every) // jobs]))]


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[int]:
  """One sweep at a time in a folder. Children inherit the lock, so it also holds while one left by a killed sweep still writes."""
  try:
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    lock = os.open(pathlib.Path(workdir, 'sweep.lock'), os.O_CREAT | os.O_WRONLY)
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: {error}') from None
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield lock
  except BlockingIOError:
    raise ConfigError(f'--workdir={workdir}: another sweep is at work here, or a run that it left behind') from None
  finally:
    os.close(lock)


def start(run: Run, workdir: str, prefix: Sequence[str], lock: int) -> subprocess.Popen:
  """Writes the launch record and starts the run. In a session of its own: a Ctrl-C is for the sweep, which stops its runs itself."""
  record, command = run.beside(workdir, '.json'), run.command(workdir)
  record.parent.mkdir(parents=True, exist_ok=True)
  began = read_json(record)['starts'] if record.exists() and (run.folder(workdir) / 'config.json').exists() else []
  starts = [*began, {'date': now(), 'commit': this_commit(), 'hardware': this_hardware()}]
  write_atomically(record, json.dumps({'command': shlex.join(command), 'settings': run.settings, 'starts': starts}, indent=1))
  with run.beside(workdir, '.log').open('ab') as log:
    log.write(f'$ {shlex.join(command)}\n'.encode())
    log.flush()
    return subprocess.Popen([*prefix, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True, pass_fds=(lock,))  # fmt: skip


def stop(processes: Sequence[subprocess.Popen]) -> None:
  for process in processes:
    process.terminate()
  deadline = time.monotonic() + STOP_S
  with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
    for process in processes:
      process.wait(max(0.0, deadline - time.monotonic()))
  for process in processes:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def verdict(run: Run, workdir: str, code: int) -> str:
  """'' for a run that is done, else what became of it."""
  if code == 0:
    return '' if finished(run, workdir) else 'exit code 0, but no summary.json'
  what = f'killed by signal {-code}' if code < 0 else f'exit code {code} ({EXIT_CODES.get(code, "crash")})'
  lines = run.beside(workdir, '.log').read_text(errors='replace').strip().split('\n')
  return f'{what}: {lines[-1][:500]}'


def run_all(runs: Sequence[Run], workdir: str, jobs: int, lock: int) -> dict[tuple[str, int], str]:
  """Runs what is not finished, each after what it needs, `jobs` at a time. Returns what failed or was skipped, and why."""
  waiting = [run for run in runs if not finished(run, workdir)]
  for run in runs:
    if run not in waiting:
      print(f'{run}: finished before', flush=True)
  running: dict[int, tuple[Run, subprocess.Popen, float]] = {}
  failed: dict[tuple[str, int], str] = {}
  count, total = 0, len(waiting)
  try:
    while waiting or running:
      for run in list(waiting):
        broken = sorted(run.needs & failed.keys())
        if broken:
          waiting.remove(run)
          failed[run.key] = f'needs {broken[0][0]} seed {broken[0][1]}'
          print(f'{run}: skipped: {failed[run.key]}, which failed', flush=True)
        elif len(running) < jobs and not run.needs & {r.key for r in [*waiting, *(r for r, _, _ in running.values())]}:
          waiting.remove(run)
          count += 1
          slot = min(set(range(jobs)) - running.keys())
          print(f'[{count}/{total}] {run}: {shlex.join(run.command(workdir))}', flush=True)
          running[slot] = run, start(run, workdir, cores(slot, jobs), lock), time.monotonic()
      for slot, (run, process, began) in list(running.items()):
        if process.poll() is not None:
          del running[slot]
          wrong, seconds = verdict(run, workdir, process.returncode), time.monotonic() - began
          if wrong:
            failed[run.key] = wrong
          print(f'{run}: {f"failed after {seconds:.0f} s: {wrong}" if wrong else f"done in {seconds:.0f} s"}', flush=True)
      time.sleep(0.1)
  finally:
    stop([process for _, process, _ in running.values()])
  return failed


def numbers(text: str) -> list[int]:
  found = [int(item) if item.isascii() and item.isdigit() else -1 for item in text.split(',')]
  check(min(found) >= 0, f'--seeds={text}: write whole numbers, as in --seeds=0,1,2')
  check(len(set(found)) == len(found), f'--seeds={text}: a seed is given twice')
  return found


def command(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m launch.sweep', allow_abbrev=False,
                                   description='Runs every entry of a sweep for every seed and compares them.')  # fmt: skip
  parser.add_argument('--config', required=True, metavar='FILE.py[:NAME=VALUE,...]')
  parser.add_argument('--workdir', required=True, metavar='DIR')
  parser.add_argument('--seeds', required=True, metavar='0,1,2')
  parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at once, each on its own cores')
  parser.add_argument('--only', default='', metavar='NAME,...', help='these entries and what they need')
  parser.add_argument('--dry-run', action='store_true', help='check every config and print the commands')
  parser.add_argument('--report', action='store_true', help='only write the report of what is finished')
  flags = parser.parse_args(argv)
  check(flags.jobs >= 1, f'--jobs={flags.jobs}: at least one')
  check(bool(flags.workdir) and '://' not in flags.workdir, f'--workdir={flags.workdir}: a local folder is needed')
  check(not (flags.dry_run and flags.report), '--dry-run and --report: one of them')
  workdir, line = flags.workdir.rstrip('/') or '/', shlex.join(['python', '-m', 'launch.sweep', *argv])
  sweep = read_sweep(flags.config, numbers(flags.seeds))
  runs = select(sweep, [name for name in flags.only.split(',') if name])
  check_unchanged(list(sweep.runs.values()), workdir)
  if flags.report:
    print(report(sweep, workdir, line, {}))
    return 0
  check_configs(sweep, runs, workdir)
  if flags.dry_run:
    for run in runs:
      state = 'finished' if finished(run, workdir) else 'begun' if (run.folder(workdir) / 'config.json').exists() else 'new'
      print(f'{run}: {state}: {shlex.join(run.command(workdir))}')
    return 0
  with locked(workdir) as lock:
    failed = run_all(runs, workdir, flags.jobs, lock)
    if any(finished(run, workdir) and run.name in sweep.reported for run in sweep.runs.values()):
      print(f'\n{report(sweep, workdir, line, failed)}\n{workdir}/sweep.md, {workdir}/sweep.json, {workdir}/sweep.png')
  if failed:
    print(f'{len(failed)} of {len(runs)} runs are not done; the same command tries them again', file=sys.stderr)
  return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
  return exit_code(command, argv)


def interrupt(*_: Any) -> None:
  raise KeyboardInterrupt


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, preemption.leave)
  signal.signal(signal.SIGINT, interrupt)  # a shell starts what it puts in the background with Ctrl-C ignored
  sys.exit(main(sys.argv[1:]))
