"""Generated Python, run against tests in a sandbox: bubblewrap (Linux namespaces, no network, a read-only system, an empty home) around
setpriv (a user id of its own, where we are root), a seccomp filter and prlimit. What runs inside is verify/code_harness.py: a judge that
holds the tests and a process that holds the program, in two sandboxes.

Command prefixes only: no fork and no preexec_fn, which are unsafe in a process that runs jax.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import platform
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rl_reasoning.config import ConfigError, check
from rl_reasoning.verify import code_harness
from rl_reasoning.verify.code_harness import decode, encode
from rl_reasoning.verify.math import answer_elements

WALL_SECONDS = 10.0  # of a job, beside 5 of processor time: a program may also sleep
MAX_SLOTS = 64
MAX_PROGRAM = 2**16  # characters; a longer program fails
FIRST_UID, UIDS = 60578, 600  # of ids that systemd's documentation lists as unused (60578 to 61183)
LIMITS = ('--as=1073741824', '--cpu=5', '--fsize=10485760', '--nproc=32', '--nofile=64', '--core=0')
TMPFS_BYTES = 16 * 2**20
TOOLS = {'bwrap': 'bubblewrap', 'setpriv': 'util-linux', 'prlimit': 'util-linux', 'choom': 'util-linux'}
FENCE = re.compile(r' {0,3}(`{3,})[ \t]*([A-Za-z0-9+_.-]*)')
PYTHON = ('python', 'python3', 'py')
# What no program needs and much of the kernel lies behind: (architecture, clone, system calls that are refused). In a user namespace of its
# own a program would be root over mounts of unbounded size.
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWUSER and its kind
MOUNTS = (428, 429, 430, 431, 432, 433, 442)  # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr
REFUSED = {
  # unshare, setns, mount, umount2, pivot_root, ptrace, process_vm_readv, process_vm_writev, add_key, request_key, keyctl, bpf,
  # perf_event_open, userfaultfd, io_uring_setup
  'x86_64': (0xC000003E, 56, (272, 308, 165, 166, 155, 101, 310, 311, 248, 249, 250, 321, 298, 323, 425, *MOUNTS)),
  'aarch64': (0xC00000B7, 220, (97, 268, 40, 39, 41, 117, 270, 271, 217, 218, 219, 280, 241, 282, 425, *MOUNTS)),
}

uids = itertools.cycle(range(FIRST_UID, FIRST_UID + UIDS))
for _ in range(os.getpid() % UIDS):  # two runs on one machine begin at different ids, which share a limit of processes
  next(uids)


class Job(NamedTuple):
  """A program and what it is held to. `tests` are run one by one after `setup`, each of which must end without an exception; a text in
  place of several defines check(candidate), as HumanEval's. `stub` (the code of the prompt) gives tests the helpers it defines."""

  program: str
  tests: tuple[str, ...] | str
  entry_point: str | None = None
  setup: str = ''
  stub: str = ''


class Verdict(NamedTuple):
  passed: int
  total: int


def fenced(text: str) -> list[tuple[str, str]] | None:
  """(language, content) of every ``` block; None where one is never closed."""
  blocks: list[tuple[str, str]] = []
  opened, language, lines = '', '', []
  for line in text.split('\n'):
    match = FENCE.match(line)
    if not opened:
      if match:
        opened, language, lines = match[1], match[2].lower(), []
    elif match and not match[2] and len(match[1]) >= len(opened):
      blocks.append((language, '\n'.join(lines) + '\n'))
      opened = ''
    else:
      lines.append(line)
  return None if opened else blocks


def extract_program(text: str) -> str | None:
  """The one program after the thinking: the one ```python block (else the one block without a language) of the one <answer> element (else
  of the text), or all of a text without blocks. Two of a kind are no program, and neither is a block that was never closed: who may write
  several has not answered."""
  text = text.rpartition('</think>')[2]
  if '<think>' in text:
    return None  # still thinking
  if '<answer>' in text or '</answer>' in text:
    answers = answer_elements(text)
    if len(answers) != 1:
      return None
    text = answers[0]
  blocks = fenced(text)
  if not blocks:
    return text if blocks is not None else None
  found = [content for language, content in blocks if language in PYTHON] or [
    content for language, content in blocks if not language
  ]
  return found[0] if len(found) == 1 else None


def complete(program: str, stub: str, entry_point: str | None) -> str:
  """The stub and what goes on from it: a body (its indented lines; what follows them is left out, as HumanEval's stop words do), or a
  text that defines the entry point anew and may use what the stub imports."""
  if not stub:
    return program
  stub = stub.rstrip('\n') + '\n'
  name = re.escape(entry_point or '')
  if name and re.search(rf'^(?:async\s+def|def|class)\s+{name}\b|^{name}\s*=', program, re.MULTILINE):
    return f'{stub}\n{program}'
  body = itertools.takewhile(lambda line: not line.strip() or line[0] in ' \t', program.split('\n'))
  return stub + '\n'.join(body) + '\n'


def parents(paths: Sequence[str]) -> list[str]:
  """Makes the folders above mount points: those that bubblewrap makes by itself only root could enter."""
  found = {str(p) for path in paths for p in pathlib.PurePath(path).parents if str(p) != '/'}
  return [word for path in sorted(found, key=len) for word in ('--perms', '0755', '--dir', path)]


@functools.cache
def python_command() -> tuple[str, ...]:
  """-P -s -S is -I in an empty environment, but for PYTHONHASHSEED: the order of sets must not change a reward from one run to the next."""
  executable = os.path.realpath(getattr(sys, '_base_executable', sys.executable))
  return executable, '-P', '-s', '-S', '-B', '-c', pathlib.Path(code_harness.__file__).read_text(encoding='utf-8')


@functools.cache
def bubblewrap(root: bool) -> tuple[str, ...]:
  """Up to the command: namespaces, and a file system of the interpreter, its libraries and an empty /tmp. No /proc, no /dev."""
  executable, lib = python_command()[0], os.path.join(sys.base_prefix, 'lib')
  system = ['/usr/lib', '/usr/lib64', '/usr/bin', '/usr/share/zoneinfo', '/etc/ld.so.cache']
  python = [p for p in (executable, lib, lib + '64') if not p.startswith(('/usr/lib', '/usr/bin'))]
  command = ['bwrap', '--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts', '--unshare-cgroup-try']
  command += ['--die-with-parent', '--new-session', '--clearenv', '--setenv', 'PYTHONHASHSEED', '0']
  if root:
    command += ['--cap-drop', 'ALL', '--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
  else:
    command += ['--unshare-user']
  command += parents(system + python)
  for path in system + python:
    command += ['--ro-bind-try', path, path]
  for path in ('/lib', '/lib64', '/bin'):  # links into /usr, but for old systems
    command += ['--symlink', os.readlink(path), path] if os.path.islink(path) else ['--ro-bind-try', path, path]
  known = subprocess.run(['bwrap', '--help'], capture_output=True, text=True).stdout
  size = ['--size', str(TMPFS_BYTES)] if '--size ' in known else []  # from 0.7 on
  return *command, '--perms', '1777', *size, '--tmpfs', '/tmp', '--chdir', '/tmp', '--remount-ro', '/'


@functools.cache
def seccomp_filter() -> bytes:
  """A classic BPF program (struct sock_filter): EPERM for what REFUSED lists; b'' on another architecture."""
  if platform.machine() not in REFUSED:
    return b''
  architecture, clone, calls = REFUSED[platform.machine()]
  load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
  allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
  steps = [
    (load, 0, 0, 4),
    (equal, 1, 0, architecture),
    (answer, 0, 0, kill),
  ]  # the system calls of another architecture: its own numbers
  steps += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, eperm)]  # so has x32
  for call in calls:
    steps += [(equal, 0, 1, call), (answer, 0, 0, eperm)]
  steps += [(equal, 0, 1, 435), (answer, 0, 0, enosys)]  # clone3 hides its flags in memory; libraries then fall back to clone
  steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, NEW_NAMESPACES), (answer, 0, 0, eperm), (answer, 0, 0, allow)]
  return b''.join(struct.pack('=HBBI', *step) for step in steps)


def prefix(unsafe: bool, filter_end: int) -> list[str]:
  """The command to put before `python`; `filter_end` is where to read the filter."""
  if unsafe:
    return ['prlimit', *LIMITS]
  root = os.geteuid() == 0
  tools = {name: os.path.realpath(shutil.which(name) or name) for name in TOOLS}
  command = [tools['choom'], '-n', '1000', '--', *bubblewrap(root)]  # where memory ends, the sandbox goes, not the run
  command += ['--seccomp', str(filter_end)] if seccomp_filter() else []
  if root:
    uid = str(next(uids))
    command += [tools['setpriv'], '--reuid', uid, '--regid', uid, '--clear-groups', '--inh-caps=-all']
  return [*command, tools['prlimit'], *LIMITS]


def messages(descriptor: int, deadline: float) -> Iterator[bytes]:
  """The judge's messages, until the pipe's end or the deadline. The judge runs tests of somebody's data set: its output is bounded too."""
  poll, data = select.poll(), b''
  poll.register(descriptor, select.POLLIN | select.POLLHUP)
  while len(data) < 2 * code_harness.LIMIT:
    while len(data) >= 4 and len(data) >= 4 + (size := int.from_bytes(data[:4], 'big')):
      yield data[4 : 4 + size]
      data = data[4 + size :]
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
      return
    more = os.read(descriptor, 65536)
    if not more:
      return
    data += more


def kill(process: subprocess.Popen) -> None:
  """With bubblewrap all of its namespace goes at once; without, the process group, and what has left that lives on."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def run_one(job: Job, unsafe: bool, timeout: float, stderr: int = subprocess.DEVNULL) -> Verdict | None:
  """None where the sandbox did not even start. From the moment it has the program, whatever goes wrong is the program's doing.

  Raises ConfigError for tests that are no Python.
  """
  tests = [f'{job.tests}\n\ncheck({job.entry_point})\n'] if isinstance(job.tests, str) else list(job.tests)
  failed = Verdict(0, len(tests))
  if len(job.program) > MAX_PROGRAM:
    return failed
  try:
    given = encode({**job._asdict(), 'tests': tests})
  except ValueError as error:
    raise ConfigError(f'tests of a program: {error}') from None
  deadline = time.monotonic() + timeout
  with contextlib.ExitStack() as stack:
    ends: list[int] = []
    stack.callback(lambda: [os.close(end) for end in ends])

    def start(role: str, pipes: Sequence[int], **streams) -> subprocess.Popen:
      filter_end, write_end = os.pipe()
      ends.append(filter_end)
      with open(write_end, 'wb') as file:
        file.write(seccomp_filter())
      command = [*prefix(unsafe, filter_end), *python_command(), role, *map(str, pipes)]
      env = {'PYTHONHASHSEED': '0', 'PATH': os.environ.get('PATH', os.defpath)}
      process = subprocess.Popen(
        command,
        stderr=stderr,
        start_new_session=True,
        env=env,
        cwd=tempfile.gettempdir(),
        pass_fds=(*pipes, filter_end),
        **streams,
      )
      stack.callback(kill, process)
      return process

    try:
      for _ in range(2):
        ends.extend(os.pipe())
      job_file = stack.enter_context(tempfile.TemporaryFile())
      job_file.write(given)
      job_file.seek(0)
      start('program', (), stdin=ends[0], stdout=ends[3])
      judge = start('judge', (ends[1], ends[2]), stdin=job_file, stdout=subprocess.PIPE)
    except OSError:
      return None
    while ends:  # theirs now: the end of one shows as the end of a pipe
      os.close(ends.pop())
    assert judge.stdout is not None
    stack.enter_context(judge.stdout)
    ready = False
    for message in messages(judge.stdout.fileno(), deadline):
      if not ready and message == b'ready':
        ready = True
        continue
      verdict = decode(message, None)
      check(not isinstance(verdict, str), f'a test that is no Python: {verdict}')
      return Verdict(sum(verdict), len(tests))
  return failed if ready else None


@functools.cache
def refusal(unsafe: bool) -> str:
  """Why nothing can be run here, found out by running something; '' where it can."""
  needed = ['prlimit'] if unsafe else [name for name in TOOLS if name != 'setpriv' or os.geteuid() == 0]
  missing = [name for name in needed if shutil.which(name) is None]
  if missing:
    packages = ' '.join(sorted({TOOLS[name] for name in missing}))
    return f'{", ".join(missing)} not found: install the system packages {packages} (apt-get install {packages})'
  probe = Job('def double(x):\n  return 2 * x\n', ('assert double(2) == 4', 'assert double(2) == 5'), 'double')
  with tempfile.TemporaryFile() as stderr:
    found = run_one(probe, unsafe, 60.0, stderr.fileno())
    stderr.seek(0)
    said = ' '.join(stderr.read(1000).decode(errors='replace').split())
  if found == Verdict(1, 2):
    return ''
  return f'the sandbox does not work here ({said or found}); bubblewrap needs root or unprivileged user namespaces'


def check_sandbox(unsafe: bool = False) -> None:
  """Raises ConfigError where generated code cannot be run."""
  reason = refusal(unsafe)
  hint = '' if unsafe else '; `rewards.options.code.unsafe` (of code_binary: its own) runs programs unprotected, with your rights'
  check(not reason, f'rewards that run code: {reason}{hint}')


def slots() -> int:
  return max(1, min(MAX_SLOTS, len(os.sched_getaffinity(0))))


def run(jobs: Sequence[Job], *, unsafe: bool = False, timeout: float = WALL_SECONDS) -> list[Verdict | None]:
  """A verdict a job, in order: tests passed, of all tests. None where the sandbox failed. Equal jobs are run once.

  `unsafe` runs programs as this user, with limits but no sandbox: they can read files, use the network and forge verdicts.
  Raises ConfigError: no sandbox here, or tests that are no Python.
  """
  check_sandbox(unsafe)
  distinct = list(dict.fromkeys(jobs))
  with ThreadPoolExecutor(slots()) as pool:
    found = dict(zip(distinct, pool.map(lambda job: run_one(job, unsafe, timeout), distinct)))
  return [found[job] for job in jobs]
