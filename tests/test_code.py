# ruff: noqa: E501  programs in one line
"""Code rewards: honest programs pass as in the published harnesses, and no program decides its own verdict or leaves its sandbox."""

import gzip
import itertools
import json
import math
import os
import pathlib
import random
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest

from rl_reasoning import rule_rewards
from rl_reasoning.config import ConfigError, Rewards
from rl_reasoning.rewards import REWARDS, check_rewards, columns_of
from rl_reasoning.tasks import TASKS, dataset
from rl_reasoning.verify import code
from rl_reasoning.verify.code import Job, Verdict, complete, extract_program
from rl_reasoning.verify.code_harness import LIMIT, Remote, decode, encode

ROOT = pathlib.Path(__file__).parent.parent
HUMANEVAL = ROOT / 'tests' / 'fixtures' / 'humaneval'
MBPP = ROOT.parent / 'shared' / 'data' / 'mbpp'
MARK = f'# {uuid.uuid4()}'  # in the command line of every process of a sandbox of this test run

sandboxed = pytest.mark.skipif(bool(code.refusal(False)), reason=code.refusal(False))
has_mbpp = pytest.mark.skipif(not MBPP.is_dir(), reason=f'no MBPP files in {MBPP}')


@pytest.fixture(autouse=True)
def marked(monkeypatch):
  *command, text = code.python_command()
  monkeypatch.setattr(code, 'python_command', lambda: (*command, f'{text}\n{MARK}\n'))


def alive() -> list[str]:
  """Processes of our sandboxes, given a moment to go."""
  for _ in range(100):
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
      try:
        if MARK.encode() in path.read_bytes():
          found.append(path.parent.name)
      except OSError:
        continue
    if not found:
      return []
    time.sleep(0.05)
  return found


def run(programs, tests, timeout=20.0, **columns):
  """A Verdict for each of the programs; `tests` call f."""
  return code.run([Job(program, tests, 'f', **columns) for program in programs], timeout=timeout)


def rewards_of(rows, completions=None, name='code'):
  completions = [row['completion'] for row in rows] if completions is None else completions
  return REWARDS[name]([row['prompt'] for row in rows], completions, [[]] * len(rows), **columns_of(rows))


# --- values ---------------------------------------------------------------------------------------------------------------------------

PLAIN = [
  None, True, False, 0, -1, 255, 10**5000, -(2**70), 0.0, -0.0, 0.1, math.inf, -math.inf, 1 + 2j, '', 'é\n\0🙂', '\ud800', b'', b'\xff;',
  bytearray(b'a;'), [], [1, [2, (3,)]], (), (1, 'a'), set(), {1, 2}, frozenset({'a'}), {}, {'a': [1], (1, 2): {3: None}}, range(3),
  range(5, -2, -3), int, ValueError, dict,
]  # fmt: skip


def builtin(name):
  return vars(__import__('builtins'))[name]


@pytest.mark.parametrize('value', PLAIN, ids=lambda v: f'{type(v).__name__}-{str(v)[:12]!r}' if v != 10**5000 else 'large')
def test_plain_values_cross_unchanged(value):
  """Failure: a right answer is compared as another value or type."""
  back = decode(encode(value), builtin)
  assert (
    type(back) is type(value) and (back == value) and str(back)[:4000] == str(value)[:4000]
    if value != 10**5000
    else back == value
  )


def test_values_that_are_not_equal_to_themselves():
  """Failure: nan, or what an iterator yields, arrives as something else."""
  assert math.isnan(decode(encode([math.nan]), builtin)[0])
  assert list(decode(encode(x * x for x in range(4)), builtin)) == [0, 1, 4, 9]


def test_subclasses_arrive_as_plain_values():
  """Failure: a class of the program's making takes part in a comparison."""

  class Number(int):
    def __eq__(self, other):
      return True

    __hash__ = int.__hash__

  class Text(str):
    def __eq__(self, other):
      return True

    __hash__ = str.__hash__

  class Items(list):
    def __eq__(self, other):
      return True

  for value, kind in ((Number(3), int), (Text('a'), str), (Items([Number(1)]), list)):
    back = decode(encode(value), builtin)
    assert type(back) is kind and back != 4 and back != 'b' and back != [2]
  assert type(decode(encode(Items([Number(1)])), builtin)[0]) is int


def test_limits_of_values():
  """Failure: a result without end or bottom fills the judge's memory or stack."""
  endless: list = []
  endless.append(endless)
  deep: list = []
  for _ in range(100):
    deep = [deep]
  for value in (endless, deep, 'a' * (LIMIT + 1), [0] * LIMIT, iter(int, 1), 1 << (4 * LIMIT + 4)):
    with pytest.raises(ValueError):
      encode(value)
  with pytest.raises(TypeError, match='cannot be passed'):
    encode(lambda: 0)


def test_decoding_of_hostile_bytes():
  """Failure: bytes that no encoder wrote crash the judge, make it an object that is not plain, or are read as a value."""
  rng = random.Random(0)
  samples = [encode(value) for value in PLAIN if not isinstance(value, int) or abs(value) < 2**80]
  for given in (b'', b'l9;N', b's5;ab', b's-1;', b'i;', b'izz;', b'i1', b'NN', b'S1;l0;', b'd1;l0;N', b'f;', b'x', b'+N', b'r1;2;0;',
                b'f0x1p99999;', b'c1;', b'l' + b'f' * 30 + b';', b'l1;' * 5000, b's3;\xff\xff\xff', b'g\xff;'):  # fmt: skip
    with pytest.raises(ValueError):
      decode(given, builtin)
  allowed = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    set,
    frozenset,
    dict,
    range,
    type(iter([])),
    type,
  )
  read = 0
  for _ in range(20_000):
    data = bytearray(rng.choice(samples) + rng.choice(samples))
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.choice(b'NT-ifcsbartlSFd+.og;0123456789abcdef' + bytes([rng.randrange(256)]))
    try:
      value = decode(bytes(data[: rng.randint(1, len(data))]), lambda key: None)
    except ValueError:
      continue
    read += 1
    assert isinstance(value, allowed)
  assert read > 100


def test_remote_objects_say_nothing():
  """Failure: an object of the program answers a comparison or an attribute of the judge with what the program wants."""
  asked = []
  one, two = (Remote(lambda *message: asked.append(message), n) for n in (0, 0))
  assert one == one and one != two and one not in (1, 'a', None)
  for name in ('ask', 'number', 'startswith', '__dict__', '__eq__'):
    with pytest.raises(AttributeError):
      getattr(one, name)
  one.left = 5
  assert one.left == 5 and asked == [('set', one, 'left', 5)]


# --- honest programs ------------------------------------------------------------------------------------------------------------------


@sandboxed
def test_humaneval_references():
  """Failure: a right program is not paid, or a wrong one is: the tests do not mean what they say in the published harness."""
  rows = list(TASKS['humaneval'].rows('test', 0, None, str(HUMANEVAL)))
  assert len(rows) == 164
  assert rewards_of(rows) == [1.0] * 164
  some, values = rows[::4], ['None', '[]', '0', "''"]
  wrong = [f'```python\n{row["prompt"]}    return {values[n % 4]}\n```' for n, row in enumerate(some)]
  assert rewards_of(some, wrong, 'code_binary') == [0.0] * 41


@pytest.fixture
def patient(monkeypatch):
  """One of MBPP's references takes seconds: on a slow and busy machine more than its limits. Those have tests of their own."""
  monkeypatch.setattr(code, 'LIMITS', tuple('--cpu=60' if limit == '--cpu=5' else limit for limit in code.LIMITS))
  monkeypatch.setitem(code.run.__kwdefaults__, 'timeout', 60.0)


@sandboxed
@has_mbpp
@pytest.mark.parametrize('sanitized', [False, True], ids=['full', 'sanitized'])
def test_mbpp_references(sanitized, patient):
  """Failure: a reference fails through the proxy (objects as arguments, set-up code, builtins as arguments, modules): no exceptions."""
  file = MBPP / ('sanitized-mbpp.json' if sanitized else 'mbpp.jsonl')
  rows = [TASKS['mbpp'].convert(row, place) for place, row in dataset.read(file)]
  assert len(rows) == (427 if sanitized else 974)
  if sanitized:  # the same tests stand in the full version but for those that were mended
    full = {row['task_id']: (row['completion'], row['tests']) for row in mbpp_rows()}
    rows = [row for row in rows if full[row['task_id']] != (row['completion'], row['tests'])]
    assert len(rows) > 50
  verdicts = rewards_of(rows)
  assert [(row['task_id'], v) for row, v in zip(rows, verdicts, strict=True) if v != 1] == []


def mbpp_rows():
  return [TASKS['mbpp'].convert(row, place) for place, row in dataset.read(MBPP / 'mbpp.jsonl')]


@sandboxed
def test_shares_and_order():
  """Failure: verdicts stand at another row than their program, equal programs share the wrong one, or a share is not that of the tests."""
  programs = [f'def f(x):\n  return x if x < {n} else -1\n' for n in (0, 1, 2, 3, 4, 2, 0)]
  tests = tuple(f'assert f({n}) == {n}' for n in range(4))
  assert run(programs, tests) == [Verdict(n, 4) for n in (0, 1, 2, 3, 4, 2, 0)]


@sandboxed
def test_one_test_does_not_break_the_next():
  """Failure: an exception, or sys.exit inside a function, fails tests that pass by themselves."""
  program = 'import sys\ndef f(x):\n  if x == 1: raise ValueError\n  if x == 2: sys.exit(0)\n  if x == 3: raise KeyboardInterrupt\n  return x\n'
  tests = tuple(f'assert f({n}) == {n}' for n in range(5))
  raises = 'try:\n  f(1)\nexcept ValueError:\n  pass\nelse:\n  assert False'
  assert run([program], (*tests, raises)) == [Verdict(3, 6)]


@sandboxed
def test_what_programs_may_do():
  """Failure: programs that only read and compute are refused: printing, files of their own, threads, the standard library, main blocks."""
  program = """
from __future__ import annotations
import collections, dataclasses, json, math, threading
print('hello')
@dataclasses.dataclass
class Point:
  x: int
def f(kind):
  print('working', flush=True)
  if kind == 'file':
    with open('note.txt', 'w') as file:
      file.write('a')
    return open('note.txt').read()
  if kind == 'thread':
    out = []
    thread = threading.Thread(target=lambda: out.append(3))
    thread.start(); thread.join()
    return out
  if kind == 'counter': return collections.Counter('aab')
  if kind == 'generator': return (n for n in range(3))
  return json.dumps([Point(3).x, math.floor(2.5)])
if __name__ == '__main__':
  input()
"""
  tests = ("assert f('file') == 'a'", "assert f('thread') == [3]", "assert f('counter') == {'a': 2, 'b': 1}",
           "assert list(f('generator')) == [0, 1, 2]", "assert f('generator') != [0, 1, 2]", "assert f('json') == '[3, 2]'")  # fmt: skip
  assert run([program], tests) == [Verdict(6, 6)]


@sandboxed
def test_arguments_are_copies():
  """Failure: a program passes `f(x) == sorted(x)` by emptying x."""
  program = 'def f(x):\n  x.clear()\n  return x\n'
  assert run([program], ('x = [2, 1]\nassert f(x) == sorted(x)', 'x = [2, 1]\nf(x)\nassert x == [2, 1]')) == [Verdict(1, 2)]


@sandboxed
def test_sets_have_one_order():
  """Failure: the reward of a program that depends on the order of a set changes from run to run."""
  orders = list(itertools.permutations(('quick', 'brown', 'fox')))
  program = 'def f(words):\n  return tuple(set(words))\n'
  jobs = [Job(program + '#' * n, (f'assert f({orders[0]}) == {order}',), 'f') for n in range(3) for order in orders]
  passed = [verdict.passed for verdict in code.run(jobs)]
  assert sum(passed) == 3 and passed == passed[:6] * 3


@sandboxed
def test_a_test_cannot_swallow_the_end_of_a_program():
  """Failure: a program that ends its process passes what catches every exception, or keeps what it passed before."""
  tests = ('assert f(1) == 1', 'try:\n  f(2)\nexcept BaseException:\n  pass')
  assert run(['import os\ndef f(x):\n  if x == 2: os._exit(0)\n  return x\n'], tests) == [Verdict(0, 2)]
  assert run(['def f(x):\n  if x == 2: raise ValueError\n  return x\n'], tests) == [Verdict(2, 2)]


# --- forged verdicts ------------------------------------------------------------------------------------------------------------------

ALWAYS = """
class Meta(type):
  def __eq__(cls, other): return True
  def __ne__(cls, other): return False
  def __hash__(cls): return 0
class Always(metaclass=Meta):
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  def __lt__(self, other): return True
  __gt__ = __le__ = __ge__ = __contains__ = __eq__
  def __hash__(self): return 0
  def __sub__(self, other): return 0
  __rsub__ = __sub__
  def __getattr__(self, name): return Always()
  def __call__(self, *args, **kwargs): return True
  def __bool__(self): return True
  def __instancecheck__(self, other): return True
"""
FORGED = {
  'always_equal': ALWAYS + 'f = lambda x: Always()',
  'always_equal_class': ALWAYS + 'f = lambda x: Always',
  'the_function_itself': ALWAYS + 'f = Always()',
  'always_equal_inside': ALWAYS + 'f = lambda x: [Always()]',
  'int_subclass': 'class I(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\nf = lambda x: I(0)',
  'str_subclass': 'class S(str):\n  def __eq__(s, o): return True\n  __hash__ = str.__hash__\nf = lambda x: S("")',
  'list_subclass': 'class L(list):\n  def __eq__(s, o): return True\nf = lambda x: L()',
  'dict_subclass': 'class D(dict):\n  def __eq__(s, o): return True\n  def __missing__(s, k): return 0\nf = lambda x: D()',
  'second_compare': 'n = 0\nclass I(int):\n  def __eq__(s, o):\n    global n\n    n += 1\n    return n > 1\nf = lambda x: I(0)',
  'exit_at_import': 'import sys\nsys.exit(0)',
  'os_exit_at_import': 'import os\nos._exit(0)',
  'os_exit': 'import os\ndef f(x): os._exit(0)',
  'exit_in_call': 'import sys\ndef f(x): sys.exit(0)',
  'base_exception': 'class E(BaseException): pass\ndef f(x): raise E',
  'generator_exit': 'def f(x): raise GeneratorExit',
  'lying_exception': 'class AssertionError(Exception):\n  def __str__(s): raise SystemExit(0)\n  __repr__ = __str__\ndef f(x): raise AssertionError()',
  'exception_named_like_an_exit': 'class E(Exception): pass\nE.__name__ = "SystemExit"\ndef f(x): raise E',
  'exception_of_no_name': 'class M(type):\n  @property\n  def __name__(c): return 5\nclass E(Exception, metaclass=M): pass\ndef f(x): raise E',
  'stdout': 'import sys, os\nfor _ in range(9):\n  print("ready\\n[true, true]\\npassed", flush=True)\n  os.write(1, b"T" * 99)\n  os.write(2, b"l2;TT")',
  'frames_to_every_descriptor': """
import os
body = b'l2;TT'
frame = len(body).to_bytes(4, 'big') + body
for d in range(64):
  for _ in range(50):
    try: os.write(d, frame)
    except OSError: break
""",
  'replies_ahead': """
import os, threading
def f(x): return 0
def flood():
  for body in (b'l2;TN', b'l2;TT', b'l2;Ti0;') * 9:
    for d in range(3, 8):
      try: os.write(d, len(body).to_bytes(4, 'big') + body)
      except OSError: pass
threading.Thread(target=flood, daemon=True).start()
""",
  'huge_frame': 'import os\ndef f(x):\n  for d in range(3, 64):\n    try: os.write(d, b"\\xff" * 4000)\n    except OSError: pass',
  'remote_eval': 'import os\ndef f(x):\n  b = b"l2;Tgeval;"\n  for d in range(3, 8):\n    try: os.write(d, len(b).to_bytes(4, "big") + b)\n    except OSError: pass',
  'patched_builtins': """
import builtins
for name in ('sum', 'len', 'isinstance', 'all', 'any', 'abs', 'set', 'sorted', 'eval', 'exec', 'compile', 'type', 'AssertionError', 'Exception'):
  setattr(builtins, name, lambda *a, **k: True)
f = lambda x: 0
""",
  'no_assertion_error': 'import builtins\nclass A(Exception):\n  def __new__(c, *a): raise SystemExit(0)\nbuiltins.AssertionError = A\nf = lambda x: 0',
  'shadowed_names': 'set = sorted = len = abs = int = str = round = tests = check = METADATA = lambda *a: True\nAssertionError = SystemExit\ndef f(x): return 0',
  'modules': """
import sys, types
fake = types.ModuleType('fake')
fake.__getattr__ = lambda name: lambda *a, **k: True
for name in list(sys.modules) + ['math', 'copy', 'unittest']: sys.modules[name] = fake
f = lambda x: 0
""",
  'frames': """
import sys
def f(x):
  frame, found = sys._getframe(), []
  while frame:
    found += [v for v in list(frame.f_locals.values()) + list(frame.f_globals.values())]
    frame = frame.f_back
  for text in map(repr, found):
    for part in text.split('asse' + 'rt')[1:]:
      for word in part.replace(')', ' ').split():
        if word.isdigit() and len(word) > 3: return int(word)
""",
  'every_object': """
import gc, sys
def f(x):
  seen, todo = set(), gc.get_objects() + list(sys.modules.values()) + list(sys._current_frames().values())
  while todo and len(seen) < 200000:
    o = todo.pop()
    if id(o) in seen: continue
    seen.add(id(o))
    if isinstance(o, (str, bytes)):
      text = str(o)
      if 'asse' + 'rt f(' in text or 'candi' + 'date(' in text: return int(text.split('= ')[1].split()[0])
    todo += gc.get_referents(o)
""",
  'harness': """
import __main__, sys
main = sys.modules['__main__']
main.encode = lambda value, refer=None: b'l2;TT'
main.send = lambda file, data: file.write((5).to_bytes(4, 'big') + b'l2;TT') and file.flush()
main.judge = main.Judge = main.Remote = lambda *a: True
f = lambda x: 0
""",
  'arguments_and_environment': """
import os, sys
def f(x):
  text = ' '.join(sys.argv + getattr(sys, 'orig_argv', []) + list(os.environ.values()))
  for part in text.split('asse' + 'rt')[1:]:
    for word in part.replace(')', ' ').split():
      if word.isdigit() and len(word) > 3: return int(word)
""",
  'at_exit': 'import atexit, os\natexit.register(lambda: os._exit(0))\nf = lambda x: 0',
  'closed_descriptors': 'import os\nos.closerange(0, 64)\nf = lambda x: 0',
  'crash': 'import ctypes\ndef f(x): ctypes.string_at(0)',
  'kill_parent': 'import os, signal\nf = lambda x: os.kill(os.getppid(), signal.SIGKILL)',
  'kill_all': 'import os, signal\nf = lambda x: os.kill(-1, signal.SIGKILL)',
  'kill_self': 'import os, signal\nf = lambda x: os.kill(os.getpid(), signal.SIGKILL)',
  'kill_group': 'import os, signal\nf = lambda x: os.killpg(0, signal.SIGKILL)',
  'nested_source': 'f = ' + '(' * 5000 + '0' + ')' * 5000,
  'large_result': 'f = lambda x: [0] * 10**7',
  'large_number': 'f = lambda x: 1 << 10**8',
  'bomb': 'def f(x):\n  a = ["a" * 1000]\n  for _ in range(40): a = [a] * 10\n  return a',
  'endless_iterator': 'import itertools\nf = lambda x: itertools.count()',
  'cyclic_result': 'def f(x):\n  a = []\n  a.append(a)\n  return a',
  'colliding_hashes': 'f = lambda x: {n * (2**61 - 1) for n in range(1, 1000)}',
  'memory': 'def f(x): return len(bytearray(2**31))',
  'syntax': 'def f(x) return 0',
  'null_byte': 'f = lambda x: 0\0',
  'surrogate': 'f = lambda x: "\ud800"',
  'no_function': 'g = lambda x: 0',
  'nothing': '',
  'too_long': 'f = lambda x: 0\n' + '#' * 70_000,
  'imports_the_tests': 'from tests import *\nimport tests\nf = lambda x: tests.f(x)',
}  # fmt: skip
SLOW = {
  'recursion': 'import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)',
  'alarm': 'import signal\ndef g(*a): raise SystemExit(0)\nsignal.signal(signal.SIGALRM, g)\nsignal.setitimer(signal.ITIMER_REAL, .01, .01)\ndef f(x):\n  while True: pass',
  'infinite_loop': 'def f(x):\n  while True: pass',
  'sleep': 'import time\ndef f(x): time.sleep(1000)',
  'deaf_loop': 'import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\nwhile True: pass',
  'swallowing_loop': 'def f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass',
  'fork_bomb': 'import os\ndef f(x):\n  while True:\n    try: os.fork()\n    except OSError: pass',
  'daemon': """
import os, signal, time
if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
    for s in range(1, 32):
      try: signal.signal(s, signal.SIG_IGN)
      except Exception: pass
    os.closerange(0, 64)
    time.sleep(1000)
  os._exit(0)
def f(x): return 0
""",
  'thread_that_stays': 'import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef f(x): return 0',
}
SECRET = (
  'assert f(7) == 90210',
  'assert 31337 == f(8)',
  'assert f(9) in (5150, 5151)',
  'assert not f(3) != [4]',
  'assert abs(f(1) - 77) < 1e-6',
)
CHECK = 'def check(candidate):\n' + ''.join(f'  {test.replace("f(", "candidate(")}\n' for test in SECRET)


@sandboxed
@pytest.mark.parametrize('tests', [SECRET, CHECK], ids=['asserts', 'check'])
def test_no_forged_verdict(tests):
  """Failure: a program that solves nothing is paid, or brings the run down with it."""
  verdicts = dict(zip(FORGED, run(FORGED.values(), tests), strict=True))
  wanted = Verdict(0, len(tests) if tests is SECRET else 1)
  assert {name: verdict for name, verdict in verdicts.items() if verdict != wanted} == {}
  assert alive() == []
  honest = 'f = {7: 90210, 8: 31337, 9: 5150, 3: [4], 1: 77.0}.get'
  assert run([honest], tests) == [Verdict(wanted.total, wanted.total)]


@sandboxed
def test_programs_that_do_not_end():
  """Failure: a program outlives its time, is paid, or goes without a verdict, and a policy learns to hang."""
  start = time.monotonic()
  assert run(SLOW.values(), SECRET, timeout=1.5) == [Verdict(0, len(SECRET))] * len(SLOW)
  assert time.monotonic() - start < 30
  assert alive() == []


@sandboxed
def test_helpers_of_the_prompt_are_the_prompt_s():
  """Failure: a program redefines the helper by which the test checks it (encode_cyclic, poly), or the builtins that the test uses."""
  rows = {row['task_id']: row for row in TASKS['humaneval'].rows('test', 0, None, str(HUMANEVAL))}
  gamed = {
    'HumanEval/38': 'def encode_cyclic(s): return s\ndef decode_cyclic(s): return s\n',
    'HumanEval/50': 'def encode_shift(s): return s\ndef decode_shift(s): return s\n',
    'HumanEval/32': 'def poly(xs, x): return 0\ndef find_zero(xs): return 0\n',
  }
  assert rewards_of([rows[name] for name in gamed], list(gamed.values())) == [0.0] * 3
  program = 'set = sorted = lambda x: 0\ndef f(x): return []\n'
  assert run([program], ('assert set(f(1)) == set([4])', 'assert sorted(f(1)) == [4]')) == [Verdict(0, 2)]


# --- what the sandbox keeps in --------------------------------------------------------------------------------------------------------


def probe(body: str) -> str:
  """A program whose f() is 'reached' where the body does not raise."""
  lines = '\n'.join(f'    {line}' for line in body.strip().splitlines())
  return f'import os, sys\ndef f(x):\n  try:\n{lines}\n    return "reached"\n  except (OSError, ImportError, ValueError, AssertionError):\n    return "refused"\n'


@sandboxed
def test_nothing_outside_is_reached(tmp_path, monkeypatch):
  """Failure: generated code reads the user's files, environment or processes, opens a connection, or writes to the machine."""
  canary = tmp_path / 'canary.txt'
  canary.write_text('secret')
  open_to_all = pathlib.Path('/tmp') / f'canary-{uuid.uuid4()}'
  open_to_all.write_text('secret')
  os.chmod(open_to_all, 0o666)
  monkeypatch.setenv('SECRET_TOKEN', 'secret')
  server = socket.create_server(('127.0.0.1', 0))
  local = socket.socket(socket.AF_UNIX)
  local.bind(name := f'\0{uuid.uuid4()}')
  local.listen()
  libc = 'import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n'
  reads = [canary, open_to_all, '/etc/shadow', '/etc/passwd', '/proc/self/environ', '/proc/1/cmdline', '/dev/mem', '/sys/kernel', ROOT / 'README.md',
           pathlib.Path(code.__file__), '/root/.bashrc', pathlib.Path.home() / '.bashrc', f'/proc/{os.getpid()}/mem', '/var/log', '/mnt', '/opt']  # fmt: skip
  writes = ['/note', '/usr/note', '/usr/lib/note', '/usr/bin/note', '/etc/note', ROOT / 'note', f'{sys.base_prefix}/lib/note',
            code.python_command()[0]]  # fmt: skip
  bodies = [
    probe(f'os.stat({str(path)!r})\n(os.listdir if os.path.isdir({str(path)!r}) else open)({str(path)!r})') for path in reads
  ]
  bodies += [probe(f'open({str(path)!r}, "a").write("x")') for path in writes]
  bodies += [
    probe(body)
    for body in (
      f'import socket\nsocket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)',
      'import socket\nsocket.create_connection(("1.1.1.1", 53), 1)', 'import socket\nsocket.getaddrinfo("example.org", 80)',
      f'import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})', 'assert "SECRET_TOKEN" in os.environ or len(os.environ) > 5',
      f'os.symlink({str(canary)!r}, "link")\nopen("link")', 'os.symlink("/", "link")\nopen("link/etc/shadow")',
      f'os.link({str(open_to_all)!r}, "hard")', 'open("../../../../etc/shadow")', 'open("/bin/../etc/shadow")',
      f'os.kill({os.getpid()}, 0)', f'os.kill({os.getppid()}, 0)', 'import subprocess\nassert subprocess.run(["ps"]).returncode == 0',
      'assert len(os.listdir("/home")) >= 0', 'os.chroot("/tmp")', 'os.mknod("device", 0o60666, os.makedev(254, 0))', 'os.nice(-5)',
      'import socket\nsocket.sethostname("other")', 'os.rename("/usr", "/usr2")', 'os.remove("/usr/bin/env")',
      'import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))', 'import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (999, 999))',
      f'{libc}assert libc.ptrace(16, {os.getpid()}, 0, 0) == 0', f'{libc}assert libc.ptrace(16, 1, 0, 0) == 0',
      f'{libc}assert libc.mount(b"/", b"/tmp", b"", 4096, None) == 0', f'{libc}assert libc.unshare(0x20000) == 0',
      f'{libc}assert libc.unshare(0x10000000) == 0', f'{libc}assert libc.setns(0, 0) == 0', f'{libc}assert libc.syscall(56, 0x10000011, 0, 0, 0, 0) >= 0',
      f'{libc}assert libc.syscall(435, 0, 0) != -1 or ctypes.get_errno() != 38',
 'assert any(os.path.exists(f"/proc/{n}") for n in range(99))',
      'for d in range(5, 4096):\n  try: os.fstat(d)\n  except OSError: continue\n  break\nelse: raise OSError',
      'open("/tmp/left-behind", "x").close()\nassert len(os.listdir("/tmp")) > 1',
    )
  ]  # fmt: skip
  bodies += [probe('os.setuid(0)'), probe('os.setgid(0)'), probe('os.setgroups([0])'), probe('assert os.getuid() == 0')] * (
    os.geteuid() == 0
  )
  verdicts = run(bodies, ('assert f(0) == "refused"',))
  server.close()
  local.close()
  reached = [
    body.split('try:')[1].split('return')[0].strip()
    for body, verdict in zip(bodies, verdicts, strict=True)
    if verdict != Verdict(1, 1)
  ]
  assert '\n'.join(reached) == ''
  own = [probe('open("note", "w")'), probe(f'open({str(open_to_all)!r}, "a").write("x")')]  # its /tmp is not ours
  assert run(own, ('assert f(0) == "reached"',)) == [Verdict(1, 1)] * 2
  assert canary.read_text() == open_to_all.read_text() == 'secret' and not (ROOT / 'note').exists()
  assert not pathlib.Path('/tmp/left-behind').exists() and alive() == []
  open_to_all.unlink()


@sandboxed
def test_limits():
  """Failure: a program takes the machine's memory, disk or process table."""
  program = """
import os, time
def f(kind):
  n = 0
  try:
    if kind == 'memory':
      held = []
      while n < 4096:
        held.append(bytearray(2**20)); n += 1
    if kind == 'file':
      with open('big', 'wb', buffering=0) as file:
        while n < 100 and file.write(bytes(2**20)) == 2**20: n += 1
    if kind == 'files':
      os.remove('big')
      for k in range(100):
        with open(f'file{k}', 'wb') as file: file.write(bytes(2**20))
        n += 1
    if kind == 'processes':
      while n < 200:
        if os.fork() == 0: time.sleep(1000)
        n += 1
    if kind == 'descriptors':
      while n < 500:
        os.open('.', os.O_RDONLY); n += 1
  except (OSError, MemoryError):
    pass
  return n
"""
  limits = {'memory': 1024, 'file': 10, 'files': 16, 'descriptors': 64, 'processes': 32}
  sizes = subprocess.run(['bwrap', '--help'], capture_output=True, text=True).stdout
  if '--size ' not in sizes:  # bubblewrap before 0.7
    limits.pop('files')
  tests = tuple(f'assert 0 < f({kind!r}) <= {limit}' for kind, limit in limits.items())
  assert run([program], tests) == [Verdict(len(limits), len(limits))]
  assert alive() == []


@sandboxed
def test_a_job_sees_nothing_of_the_one_before():
  """Failure: one program leaves files or processes to the next."""
  program = 'import os\ndef f(x):\n  seen = os.listdir("/tmp")\n  open("/tmp/left", "w").close()\n  return seen\n'
  assert run([program + '#' * n for n in range(8)], ('assert f(0) == []',)) == [Verdict(1, 1)] * 8


# --- no verdict, refusals -------------------------------------------------------------------------------------------------------------


@sandboxed
def test_failure_of_the_sandbox_is_no_verdict(monkeypatch):
  """Failure: a program is fined because the machine could not start its sandbox."""
  program, tests = 'f = lambda x: x\n', ('assert f(1) == 1',)
  assert run([program], tests) == [Verdict(1, 1)]
  for command in (['false'], ['no-such-command'], ['sleep', '5']):
    monkeypatch.setattr(code, 'prefix', lambda *_, command=command: command)
    assert run([program], tests, timeout=0.3) == [None]
  row = {'prompt': '', 'tests': list(tests), 'entry_point': 'f'}
  assert rewards_of([row], [program]) == [None]


@sandboxed
def test_tests_that_are_no_python():
  """Failure: a broken row of a data set fines every program, silently."""
  good = Job('f = lambda x: x\n', ('assert f(1) == 1',), 'f')
  for bad in (
    good._replace(tests=('assert f(',)),
    good._replace(setup='import'),
    good._replace(stub='def f(x):\n'),
    good._replace(tests='def check('),
  ):
    with pytest.raises(ConfigError, match='no Python'):
      code.run([good, bad])
  for columns in ({'tests': 'def check(c): pass'}, {'tests': [1], 'entry_point': 'f'}, {'tests': ['x'], 'entry_point': 3}):
    with pytest.raises(ConfigError, match=r"column '(tests|entry_point)'"):
      rewards_of([{'prompt': '', **columns}], ['f = 1'])


@pytest.fixture
def without_tools(monkeypatch, tmp_path):
  """A machine without bubblewrap."""
  monkeypatch.setenv('PATH', str(tmp_path))
  code.refusal.cache_clear()
  yield tmp_path
  code.refusal.cache_clear()


def test_refused_without_bubblewrap(without_tools):
  """Failure: generated code runs unprotected, or a run goes on without its rewards, because a package is missing."""
  row = {'prompt': '', 'tests': ['assert f(1) == 1'], 'entry_point': 'f'}
  for name in ('code', 'code_binary', 'accuracy'):
    with pytest.raises(ConfigError, match=r'bwrap.* not found.*apt-get install bubblewrap util-linux.*unsafe'):
      rewards_of([row], ['f = lambda x: x'], name)
  with pytest.raises(ConfigError, match=r'bwrap.* not found'):
    check_rewards(Rewards(functions=('code',)), 8)  # before the run
  assert rewards_of([{'prompt': '', 'answer': '5'}], ['5'], 'code') == [None]  # nothing to run, nothing to refuse


def test_refused_where_namespaces_are(without_tools):
  """Failure: bubblewrap is there but may not make namespaces (as in most containers), and that is found out row by row, or never."""
  for name in code.TOOLS:
    tool = without_tools / name
    tool.write_text('#!/bin/sh\necho "bwrap: No permissions to create new namespace" >&2\nexit 1\n')
    tool.chmod(0o755)
  with pytest.raises(ConfigError, match=r'No permissions to create new namespace.*root or unprivileged user namespaces'):
    code.check_sandbox()


def test_unsafe(monkeypatch):
  """Failure: the option does nothing, takes the sandbox along, or drops the limits too."""
  if code.refusal(True):
    pytest.skip(code.refusal(True))
  monkeypatch.setattr(code, 'bubblewrap', None)
  row = {'prompt': '', 'tests': ['assert f(1) == 1', f'assert f(2) == {os.getuid()}', 'assert f(3) == 2**30'], 'entry_point': 'f'}
  program = 'import os, resource\nf = lambda x: [1, os.getuid(), resource.getrlimit(resource.RLIMIT_AS)[0]][x - 1]'
  assert REWARDS['code']([''], [program], [[]], unsafe=True, **columns_of([row])) == [1.0]
  check_rewards(Rewards(functions=('code',), options={'code': {'unsafe': True}}), 8)
  loop = 'def f(x):\n  while True: pass'
  assert code.run([Job(loop, ('assert f(1) == 1',), 'f')], unsafe=True, timeout=1.0) == [Verdict(0, 1)] and alive() == []


@sandboxed
def test_from_several_threads():
  """Failure: two callers at once take each other's pipes or verdicts."""
  found = {}

  def ask(n):
    found[n] = run([f'f = lambda x: {n}\n'] * 2 + [f'f = lambda x: {n + 1}\n'], (f'assert f(0) == {n}',))

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {n: [Verdict(1, 1), Verdict(1, 1), Verdict(0, 1)] for n in range(4)}


# --- the program of a completion ------------------------------------------------------------------------------------------------------

BLOCK = '```python\ndef f():\n  pass\n```'


@pytest.mark.parametrize(
  ('text', 'program'),
  [
    ('def f(): pass', 'def f(): pass'), (BLOCK, 'def f():\n  pass\n'), (f'Here:\n{BLOCK}\nDone.', 'def f():\n  pass\n'),
    ('```py\na\n```', 'a\n'), ('```Python3\na\n```', 'a\n'), ('```\na\n```', 'a\n'), ('~ ``` ~', '~ ``` ~'),
    ('```python\n    return x\n```', '    return x\n'), ('````python\n```\na\n````', '```\na\n'),
    (f'```text\nout\n```\n{BLOCK}\n```\nout\n```', 'def f():\n  pass\n'), ('```bash\nls\n```', None),
    (f'{BLOCK}\n{BLOCK}', None), ('```\na\n```\n```\nb\n```', None), ('```python\na', None), (f'{BLOCK}\n```python\nb', None),
    (f'<think>{BLOCK}</think>{BLOCK}', 'def f():\n  pass\n'), (f'<think>{BLOCK}', None), (f'<think>a</think>b</think>{BLOCK}', 'def f():\n  pass\n'),
    (f'<think>a</think><answer>{BLOCK}</answer>', 'def f():\n  pass\n'), (f'<answer>\n{BLOCK}\n</answer>', 'def f():\n  pass\n'), ('<answer>a = 1</answer>', 'a = 1'),
    (f'{BLOCK}<answer>b</answer>', 'b'), ('<answer>a</answer><answer>b</answer>', None), ('<answer>a', None), ('a</answer>', None),
    ('```python\na = "\x0b\u2028"\n```', 'a = "\x0b\u2028"\n'),
  ],
)  # fmt: skip
def test_extraction(text, program):
  """Failure: a completion with several programs gets its best one judged, or an honest one none."""
  assert extract_program(text) == program


def test_extraction_is_linear():
  """Failure: a completion made of fences stalls the run."""
  start = time.monotonic()
  for text in ('```\n' * 100_001, '```python\n' * 100_000, '`' * 400_000, '<answer>' * 50_000, '```python\n' + 'a\n' * 200_000):
    extract_program(text)
  assert time.monotonic() - start < 2


STUB = 'from typing import List\n\ndef helper(x):\n    return x + 1\n\ndef f(x: int) -> List[int]:\n    """Says."""\n'


@sandboxed
def test_completions_of_a_stub():
  """Failure: a body, or a whole function, is not joined to the prompt's code as published harnesses do."""
  given = [
    ('    return [helper(x)]\n', 1), ('\n    y = helper(x)\n\n    return [y]\nprint(1)\nand so on', 1), ('def f(x) -> List[int]:\n    return [helper(x)]\n', 1),
    ('f = lambda x: [helper(x)]', 1), ('# whole\nimport math\n\ndef f(x):\n    return [math.floor(x + 1.5)]\n', 1), ('    return [x]\n', 0),
    ('return [helper(x)]', 0), ('def g(x):\n    return [helper(x)]\n', 0), (STUB + '    return [helper(x)]\n', 1),
  ]  # fmt: skip
  row = {'prompt': STUB, 'tests': 'def check(candidate):\n    assert candidate(1) == [2]\n', 'entry_point': 'f', 'stub': STUB}
  plain = rewards_of([row] * len(given), [text for text, _ in given])
  fenced = rewards_of([row] * len(given), [f'<think>So.</think>\n```python\n{text}\n```' for text, _ in given])
  assert plain == fenced == [float(right) for _, right in given]
  assert complete('x = 1', '', 'f') == 'x = 1'


@sandboxed
def test_rewards():
  """Failure: the two rewards are not the share and the whole, rows without tests get a verdict, or thinking counts as an answer."""
  row = {'prompt': 'q', 'tests': ['assert f(1) == 1', 'assert f(2) == 4'], 'entry_point': 'f', 'setup': None}
  rows = [row, row, row, {'prompt': 'q', 'answer': '4'}, {**row, 'tests': []}, row]
  texts = ['f = lambda x: x * x', 'f = lambda x: x', '', '4', 'f = 1', '<think>f = lambda x: x * x']
  assert rewards_of(rows, texts) == [1.0, 0.5, 0.0, None, None, 0.0]
  assert rewards_of(rows, texts, 'code_binary') == [1.0, 0.0, 0.0, None, None, 0.0]
  assert rewards_of(rows[:4], texts[:4], 'accuracy') == [1.0, 0.0, 0.0, 1.0]
  chat = REWARDS['code'](
    [[{'role': 'user', 'content': 'q'}]], [[{'role': 'assistant', 'content': texts[0]}]], [[]], **columns_of([row])
  )
  assert chat == [1.0]
  opened = REWARDS['code'](['q<think>'], [texts[0]], [[]], **columns_of([row]))
  assert opened == [0.0]
  assert rule_rewards.code([''], [texts[0]], tests=[row['tests']]) == [1.0]  # the name that tests use is enough


@sandboxed
def test_set_up_comes_after_the_program():
  """Failure: set-up code that uses the program's classes fails every program (MBPP 367 and 927)."""
  program = 'class Node:\n  def __init__(s, v): s.v, s.left = v, None\ndef f(n):\n  return n.v + (f(n.left) if n.left else 0)\n'
  setup = 'import math\nroot = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\n'
  assert run([program], ('assert f(root) == 6', 'assert math.sqrt(f(Node(4))) == 2'), setup=setup) == [Verdict(2, 2)]


# --- tasks ----------------------------------------------------------------------------------------------------------------------------


def test_humaneval_task(tmp_path):
  """Failure: the held-out problems are trained on, a row lacks what its reward needs, or packed and unpacked files differ."""
  rows = list(TASKS['humaneval'].rows('test', 0, None, str(HUMANEVAL / 'HumanEval.jsonl.gz')))
  assert [row['task_id'] for row in rows] == [f'HumanEval/{n}' for n in range(164)]
  assert all(row['stub'] == row['prompt'] and row['entry_point'] in row['stub'] and 'def check(' in row['tests'] for row in rows)
  assert not any('answer' in row for row in rows)
  (tmp_path / 'HumanEval.jsonl').write_bytes(gzip.decompress((HUMANEVAL / 'HumanEval.jsonl.gz').read_bytes()))
  assert list(TASKS['humaneval'].rows('test', 0, 7, str(tmp_path))) == rows[:7]
  with pytest.raises(ConfigError, match='evaluation only'):
    next(TASKS['humaneval'].rows('train', 0, None, str(HUMANEVAL)))
  assert TASKS['humaneval'].files(str(HUMANEVAL), 'train') == [HUMANEVAL / 'HumanEval.jsonl.gz']
  (tmp_path / 'HumanEval.jsonl').write_text('{"task_id": "a", "prompt": "b"}\n')
  with pytest.raises(ConfigError, match=r"HumanEval\.jsonl:1: no text column 'entry_point'"):
    next(TASKS['humaneval'].rows('test', 0, None, str(tmp_path)))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='no file HumanEval'):
    TASKS['humaneval'].files(str(tmp_path / 'empty'), 'test')


@has_mbpp
@pytest.mark.parametrize(('sanitized', 'train', 'test'), [(False, 371, 500), (True, 120, 257)])
def test_mbpp_task(sanitized, train, test, patient):
  """Failure: a split is not the published one, a test problem is trained on, or the prompt does not name the function."""
  rows = {split: list(TASKS['mbpp'].rows(split, 0, None, str(MBPP), sanitized=sanitized)) for split in ('train', 'test')}
  assert {split: len(found) for split, found in rows.items()} == {'train': train, 'test': test}
  assert all(601 <= row['task_id'] <= 974 for row in rows['train']) and all(11 <= row['task_id'] <= 510 for row in rows['test'])
  wordings = {split: {row['prompt'].splitlines()[0].lower() for row in found} for split, found in rows.items()}
  assert not wordings['train'] & wordings['test']
  for row in rows['train'] + rows['test']:
    assert row['entry_point'] in row['prompt'] and row['tests'][0].strip() in row['prompt']
    assert row['prompt'].count('assert ') == 1 and 'answer' not in row
    assert '\r' not in row['completion'] and row['entry_point'] in row['completion']
  assert list(TASKS['mbpp'].rows('test', 0, 9, str(MBPP), sanitized=sanitized)) == rows['test'][:9]


@has_mbpp
def test_mbpp_files():
  """Failure: one version is read as the other."""
  with pytest.raises(ConfigError, match=r'data.options.sanitized.*other version'):
    list(TASKS['mbpp'].rows('test', 0, None, str(MBPP / 'mbpp.jsonl'), sanitized=True))
  with pytest.raises(ConfigError, match=r'data.options.sanitized.*other version'):
    list(TASKS['mbpp'].rows('test', 0, None, str(MBPP / 'sanitized-mbpp.json')))
  with pytest.raises(ConfigError, match='no file mbpp'):
    TASKS['mbpp'].files(str(HUMANEVAL), 'test')


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    ({'text': 3}, 'text column'), ({'code': None}, "'code'"), ({'task_id': '11'}, "'task_id'"), ({'test_list': []}, "'test_list'"),
    ({'test_list': ['assert g(1)']}, 'call nothing'), ({'code': 'def f('}, 'in its code or tests'),
  ],
)  # fmt: skip
def test_malformed_mbpp_row(tmp_path, change, reason):
  """Failure: a row that no program could pass is taken."""
  row = {'text': 'Do.', 'code': 'def f(x):\n  return x', 'task_id': 11, 'test_setup_code': '', 'test_list': ['assert f(1) == 1']}
  path = tmp_path / 'mbpp.jsonl'
  path.write_text(json.dumps(row) + '\n' + json.dumps({**row, **change}) + '\n')
  with pytest.raises(ConfigError, match=f'mbpp.jsonl:2: .*{reason}'):
    list(TASKS['mbpp'].rows('test', 0, None, str(path)))


def test_arrays_and_packed_files(tmp_path):
  """Failure: a .json file that is one array, or a .gz, is refused, read partly, or its bad row is not named."""
  rows = [{'prompt': f'é{n}'} for n in range(5)]
  (tmp_path / 'test.json').write_text('\ufeff\n ' + json.dumps(rows, indent=1))
  assert list(dataset.read(tmp_path / 'test.json')) == [(f'{tmp_path}/test.json:{n}', row) for n, row in enumerate(rows, 1)]
  packed = tmp_path / 'train.jsonl.gz'
  packed.write_bytes(gzip.compress('\n'.join(json.dumps(row) for row in rows).encode()))
  assert [row for _, row in dataset.read(packed)] == rows and dataset.files(str(tmp_path), 'train') == [packed]
  for content, reason in ((b'not gzip', 'no gzip file'), (packed.read_bytes()[:-9], 'damaged')):
    packed.write_bytes(content)
    with pytest.raises(ConfigError, match=f'train.jsonl.gz: .*{reason}'):
      list(dataset.read(packed))
  for text, reason in (('[{}, 3]', 'json:2: not a JSON object'), ('[{}', 'json:1: not JSON'), ('["\\ud800"]', 'surrogates')):
    (tmp_path / 'test.json').write_text(text)
    with pytest.raises(ConfigError, match=reason):
      list(dataset.read(tmp_path / 'test.json'))
