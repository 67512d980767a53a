"""Worker processes: every job its own outcome, whatever the others do, and no process that outlives its parent."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rl_reasoning.verify import pool
from rl_reasoning.verify.pool import GIB, Pool

HERE = 'tests.test_worker'


# Jobs, called in workers by 'tests.test_worker:name'.
def same(value):
  return value


def process():
  return os.getpid()


def later(seconds, value):
  time.sleep(seconds)
  return value


def raises(message):
  raise ValueError(message)


def leaves(code):
  sys.exit(code)


def ends(code):
  os._exit(code)


def killed():
  os.kill(os.getpid(), signal.SIGKILL)


def hogs(gib):
  return len(bytearray(int(gib * GIB)))


def never_lets_go():
  return 9 ** (9**9) > 0  # one C call that holds the interpreter


def noisy(value):
  print('{"value": "print"}')
  sys.stdout.flush()
  os.write(1, b'{"value": "fd 1"}\n')
  os.system('echo \'{"value": "child"}\'')
  sys.stderr.write('{"value": "stderr"}\n')
  return [value, sys.stdin.read() if sys.stdin else '', os.read(0, 10).decode()]


def child_that_stays():
  return subprocess.Popen(['sleep', '600']).pid


def hangs_with_a_child(path):
  pathlib.Path(path).write_text(str(subprocess.Popen(['sleep', '600']).pid))
  time.sleep(600)


def unsayable():
  return object()


def imported():
  return sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'flax', 'tensorflow', 'torch', 'sympy'})


@pytest.fixture
def make():
  """arguments -> Pool, closed afterwards."""
  made = []

  def call(memory=2 * GIB, size=2):
    made.append(Pool(memory, size))
    return made[-1]

  yield call
  for each in made:
    each.close()


def values(outcomes):
  assert all(outcome.status == 'value' for outcome in outcomes), outcomes
  return [outcome.value for outcome in outcomes]


def gone(pid, seconds=5.0):
  """Whether the process ends within the time."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    try:
      if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
        return True
    except psutil.NoSuchProcess:
      return True
    time.sleep(0.02)
  return False


def test_order(make):
  """Failure: a job gets another's outcome, as soon as jobs do not end in the order in which they began."""
  jobs = [{'seconds': 0.2 * (n % 3 == 0), 'value': [n, None, 'é\n', 1.5]} for n in range(12)]
  assert values(make(size=3).map(f'{HERE}:later', jobs, 5.0)) == [job['value'] for job in jobs]
  assert make().map(f'{HERE}:same', [], 1.0) == []


def test_many_jobs_on_few_workers(make):
  """Failure: a worker is started for every job (seconds a batch), or jobs are lost in a long queue."""
  workers = make()
  assert values(workers.map(f'{HERE}:same', [{'value': n} for n in range(500)], 60.0)) == list(range(500))
  seen = {pid for _ in range(2) for pid in values(workers.map(f'{HERE}:process', [{}] * 50, 60.0))}
  assert 1 <= len(seen) <= 2
  assert workers.counts == {'value': 600}


def test_every_failure_is_its_own(make):
  """Failure: a hang, a crash or a death costs another job its outcome, or is taken for a value."""
  workers = make()
  calls = [
    ('raises', {'message': 'a\nb'}, 'crash', 'ValueError: a\nb'), ('same', {'value': 1}, 'value', ''),
    ('later', {'seconds': 60, 'value': 1}, 'timeout', 'not done after 0.5 s'), ('leaves', {'code': 0}, 'crash', 'SystemExit: 0'),
    ('same', {'value': 2}, 'value', ''), ('ends', {'code': 3}, 'crash', 'the worker process died: exit code 3'),
    ('ends', {'code': 0}, 'crash', 'the worker process died: exit code 0'), ('same', {'value': 3}, 'value', ''),
    ('killed', {}, 'crash', 'the worker process died: signal SIGKILL'), ('unsayable', {}, 'crash', 'TypeError: object is no JSON'),
    ('never_lets_go', {}, 'timeout', 'not done after 0.5 s'), ('same', {'wrong': 3}, 'crash', "TypeError: same() got an unexpected"),
    ('no_such', {}, 'crash', "AttributeError: module 'tests.test_worker' has no attribute 'no_such'"), ('same', {'value': 4}, 'value', ''),
  ]  # fmt: skip
  outcomes: dict[int, pool.Outcome] = {}

  def call(n):
    name, job, _, _ = calls[n]
    (outcomes[n],) = workers.map(f'{HERE}:{name}', [job], 0.5)

  threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for n, (_, job, status, message) in enumerate(calls):
    assert outcomes[n].status == status and outcomes[n].message.startswith(message), outcomes[n]
    assert status != 'value' or outcomes[n].value == job['value']
  assert workers.counts == {'value': 4, 'timeout': 2, 'crash': 8}


def test_time_out_ends_what_the_job_started(make, tmp_path):
  """Failure: a job that is stopped leaves processes behind, or the limit is not kept."""
  start = time.monotonic()
  (outcome,) = make().map(f'{HERE}:hangs_with_a_child', [{'path': str(tmp_path / 'pid')}], 1.0)
  assert outcome.status == 'timeout' and 1.0 <= time.monotonic() - start < 5
  assert gone(int((tmp_path / 'pid').read_text()))


def test_import_does_not_count(make, tmp_path, monkeypatch):
  """Failure: the seconds that a function's module takes to import are charged to its first job."""
  (tmp_path / 'slow_to_import.py').write_text('import time\ntime.sleep(1.0)\ndef f(): return 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  workers = make()
  values(workers.map(f'{HERE}:same', [{'value': 1}], 5.0))  # the worker is older than the entry of sys.path
  assert values(workers.map('slow_to_import:f', [{}], 0.5)) == [1]
  (outcome,) = workers.map('does_not_exist:f', [{}], 0.5)
  assert outcome == ('crash', None, "ModuleNotFoundError: No module named 'does_not_exist'")


def test_memory(make):
  """Failure: an answer that grows without end takes the machine's memory, or ends the worker for the others."""
  workers = make(memory=GIB // 2, size=1)
  assert values(workers.map(f'{HERE}:hogs', [{'gib': 0.125}], 10.0)) == [GIB // 8]
  (outcome,) = workers.map(f'{HERE}:hogs', [{'gib': 0.625}], 10.0)
  assert outcome.status == 'crash' and outcome.message.startswith('MemoryError')
  assert values(workers.map(f'{HERE}:hogs', [{'gib': 0.125}], 10.0)) == [GIB // 8]
  assert values(make(memory=2 * GIB, size=1).map(f'{HERE}:hogs', [{'gib': 0.625}], 20.0)) == [GIB * 5 // 8]


def test_killed_from_outside(make):
  """Failure: a worker that the system kills hangs its job, or the next job finds a dead worker."""
  workers = make(size=1)
  (pid,) = values(workers.map(f'{HERE}:process', [{}], 5.0))
  timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
  timer.start()
  (outcome,) = workers.map(f'{HERE}:later', [{'seconds': 60, 'value': 1}], 30.0)
  assert outcome == ('crash', None, 'the worker process died: signal SIGKILL')
  (pid,) = values(workers.map(f'{HERE}:process', [{}], 5.0))
  os.kill(pid, signal.SIGKILL)
  assert gone(pid)
  assert values(workers.map(f'{HERE}:same', [{'value': 1}], 5.0)) == [1]


def test_signal_to_all_processes(make):
  """Failure: a scheduler's SIGTERM, which comes to every process of a job, ends workers whose verdicts the parent still wants to have."""
  workers = make(size=1)
  (pid,) = values(workers.map(f'{HERE}:process', [{}], 5.0))
  threading.Timer(0.5, os.kill, (pid, signal.SIGTERM)).start()
  assert values(workers.map(f'{HERE}:later', [{'seconds': 1.0, 'value': 7}], 30.0)) == [7]
  assert values(workers.map(f'{HERE}:process', [{}], 5.0)) == [pid]


def test_output_of_a_job(make, capfd):
  """Failure: what a job prints is read as its result, is lost, or a job that reads stdin eats the next request."""
  workers = make(size=1)
  assert values(workers.map(f'{HERE}:noisy', [{'value': n} for n in range(3)], 5.0)) == [[n, '', ''] for n in range(3)]
  captured = capfd.readouterr()
  assert captured.out == '' and captured.err.count('"stderr"') == 3 == captured.err.count('"child"') == captured.err.count(
    '"fd 1"'
  )


def test_large_jobs_and_values(make):
  """Failure: more than a pipe holds stops both sides for ever."""
  text = 'x' * 5_000_000
  assert values(make().map(f'{HERE}:same', [{'value': text}] * 3, 20.0)) == [text] * 3


def test_jobs_that_are_no_json(make):
  """Failure: a job that cannot be sent hangs, or a worker is lost over it."""
  workers = make(size=1)
  for value in (object(), b'bytes', {1, (2, object())}):
    with pytest.raises(TypeError):
      workers.map(f'{HERE}:same', [{'value': value}], 5.0)
  assert values(workers.map(f'{HERE}:same', [{'value': 1}], 5.0)) == [1]


def test_threads(make):
  """Failure: a pool used by several threads at once mixes their outcomes, or starts more workers than it may."""
  workers, results, seen = make(size=2), {}, set()

  def use(n):
    results[n] = values(workers.map(f'{HERE}:same', [{'value': [n, i]} for i in range(40)], 10.0))
    seen.update(values(workers.map(f'{HERE}:process', [{}] * 5, 10.0)))

  threads = [threading.Thread(target=use, args=(n,)) for n in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert results == {n: [[n, i] for i in range(40)] for n in range(6)} and len(seen) <= 2


def test_workers_are_light(make):
  """Failure: a worker starts slowly or grabs the accelerator, because something imports JAX or sympy before it is needed."""
  assert values(make().map(f'{HERE}:imported', [{}], 5.0)) == [[]]


def test_close(make):
  """Failure: closing a pool leaves processes, or a child that they started."""
  workers = make(size=1)
  pid, child = values(workers.map(f'{HERE}:process', [{}], 5.0) + workers.map(f'{HERE}:child_that_stays', [{}], 5.0))
  workers.close()
  assert gone(pid) and gone(child)
  assert values(workers.map(f'{HERE}:same', [{'value': 1}], 5.0)) == [1]


def test_shared():
  """Failure: every caller starts workers of its own, or mathematics and users' functions share a memory limit."""
  assert pool.shared('math') is pool.shared('math') is not pool.shared('rewards')
  assert 1 <= pool.shared('math').size <= pool.MOST and pool.shared('math').memory == 2 * GIB


def script(tmp_path, body):
  """A script without a main guard that uses a pool at its top level, run in a process of its own."""
  path = tmp_path / 'script.py'
  path.write_text(
    'import os, signal, sys, threading, time\n'
    'from rl_reasoning.verify.pool import Pool, GIB\n'
    f'sys.path.append({str(pathlib.Path(__file__).parent.parent)!r})\n'
    'workers = Pool(2 * GIB, 2)\n' + body
  )
  return [sys.executable, str(path)]


def test_script_without_main_guard(tmp_path):
  """Failure: using a pool at the top level of a script starts the script again (as multiprocessing's spawn does), or its exit hangs."""
  body = 'print([o.value for o in workers.map("tests.test_worker:process", [{}], 5.0)], flush=True)\n'
  done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=30, cwd=tmp_path)
  assert done.returncode == 0 and done.stderr == '' and len(done.stdout.splitlines()) == 1
  assert gone(int(done.stdout.strip('[]\n')))


@pytest.mark.parametrize(
  'job', ['"tests.test_worker:later", [{"seconds": 600, "value": 1}]', '"tests.test_worker:never_lets_go", [{}]', None]
)
def test_parent_killed(tmp_path, job):
  """Failure: a run that is killed (kill -9) leaves workers behind, idle ones or such as are busy in Python or in C for ever."""
  body = 'print(workers.map("tests.test_worker:process", [{}], 5.0)[0].value, flush=True)\n'
  body += f'threading.Thread(target=workers.map, args=({job}, 600.0)).start()\n' if job else ''
  body += 'time.sleep(1.0)\nprint("busy", flush=True)\ntime.sleep(600)\n'
  process = subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, text=True, cwd=tmp_path)
  try:
    assert process.stdout
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == 'busy\n' and psutil.pid_exists(pid)
    process.kill()
    process.wait()
    assert gone(pid)
  finally:
    process.kill()
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


def test_interrupt(tmp_path):
  """Failure: Ctrl-C in a wait for workers is swallowed, goes on with the next job, or leaves workers."""
  body = (
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # what a shell starts in the background ignores it
    'print(workers.map("tests.test_worker:process", [{}], 5.0)[0].value, flush=True)\n'
    'threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n'
    'try:\n  workers.map("tests.test_worker:later", [{"seconds": 600, "value": 1}] * 4, 600.0)\n'
    'except KeyboardInterrupt:\n  print("interrupted", flush=True)\n'
  )
  done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=30, cwd=tmp_path)
  pid, said = done.stdout.split()
  assert said == 'interrupted' and done.returncode == 0 and gone(int(pid))
