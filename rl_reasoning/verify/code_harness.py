"""What runs inside the sandboxes of verify/code.py, as the text of `python -c`: standard library only, nothing of this package.

Two processes in two sandboxes share no more than two pipes. The program's process holds the program and answers calls; the judge's holds
the tests and never runs a line of the program. Values cross as plain data (`encode`, `decode`): what the judge compares are exact builtin
types that it built itself, so that no `__eq__`, subclass, frame or patched builtin of the program takes part in a verdict. Arguments are
copies: a test cannot see that the program changed one, and the program cannot change what a test compares with.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # typing itself takes as long to import as all of this
if TYPE_CHECKING:
  from typing import Any

LIMIT = 2**20  # bytes of a message
DEPTH = 64  # of nested containers
CONTAINERS = {list: b'l', tuple: b't', set: b'S', frozenset: b'F'}


class Remote:
  """The judge's view of an object of the program: to be called, passed back or given attributes. Everything else about it is the program's
  own word, so it is equal to nothing but itself, and of its attributes only those can be read that the test has set."""

  __slots__ = ('ask', 'given', 'number')

  def __init__(self, ask, number):
    for name, value in (('ask', ask), ('number', number), ('given', {})):
      object.__setattr__(self, name, value)

  def __getattribute__(self, name):
    if name == '__class__':
      return Remote
    try:
      return object.__getattribute__(self, 'given')[name]
    except KeyError:
      raise AttributeError(f'{name}: attributes of objects of the program cannot be read') from None

  def __call__(self, *args, **kwargs):
    return object.__getattribute__(self, 'ask')('call', self, list(args), kwargs)

  def __setattr__(self, name, value):
    object.__getattribute__(self, 'ask')('set', self, name, value)
    object.__getattribute__(self, 'given')[name] = value


def remote_number(value):
  if type(value) is not Remote:
    raise TypeError(f'a {type(value).__name__} cannot be passed to the program')
  return object.__getattribute__(value, 'number')


def encode(value, refer=remote_number):
  """Plain data as bytes; builtins by name; other objects as the number that `refer` gives them. A subclass of a plain type counts as that
  type, an iterator as what it yields. Raises ValueError past the limits of size and depth."""
  out = bytearray()

  def put(value, depth):
    if len(out) > LIMIT or depth > DEPTH:
      raise ValueError('a value too large or nested too deeply')
    if value is None or value is True or value is False:
      out.extend(b'N' if value is None else b'T' if value else b'-')
    elif isinstance(value, int):
      out.extend(b'i%x;' % value)
    elif isinstance(value, float):
      out.extend(b'f%s;' % float.hex(value).encode())
    elif isinstance(value, complex):
      out.extend(b'c%s;%s;' % (float.hex(value.real).encode(), float.hex(value.imag).encode()))
    elif isinstance(value, str):
      text = value.encode('utf-8', 'surrogatepass')
      out.extend(b's%x;' % len(text) + text)
    elif isinstance(value, (bytes, bytearray)):
      out.extend((b'b' if isinstance(value, bytes) else b'a') + b'%x;' % len(value) + value)
    elif isinstance(value, range):
      out.extend(b'r%x;%x;%x;' % (value.start, value.stop, value.step))
    elif isinstance(value, dict):
      out.extend(b'd%x;' % len(value))
      for key, item in value.items():
        put(key, depth + 1)
        put(item, depth + 1)
    elif kinds := [kind for kind in CONTAINERS if isinstance(value, kind)]:
      out.extend(CONTAINERS[kinds[0]] + b'%x;' % len(value))
      for item in value:
        put(item, depth + 1)
    elif vars(builtins).get(getattr(value, '__name__', '')) is value:
      out.extend(b'g%s;' % value.__name__.encode())
    elif hasattr(value, '__next__'):
      for item in value:
        out.extend(b'+')
        put(item, depth + 1)
      out.extend(b'.')
    else:
      out.extend(b'o%x;' % refer(value))

  put(value, 0)
  if len(out) > LIMIT:
    raise ValueError('a value too large')
  return bytes(out)


def decode(data, resolve) -> Any:
  """The value of bytes that nobody vouches for: exact builtin types, or what `resolve` makes of an object's number or a builtin's name.
  Raises ValueError."""
  at = 0

  def word():
    nonlocal at
    end = data.index(b';', at)
    text, at = data[at:end], end + 1
    return text.decode('ascii')

  def number():
    return int(word(), 16)

  def real():
    return float.fromhex(word())

  def raw():
    nonlocal at
    size = number()
    if not 0 <= size <= len(data) - at:
      raise ValueError('cut short')
    at += size
    return data[at - size : at]

  def get(depth):
    nonlocal at
    tag, at = data[at : at + 1], at + 1
    if depth > DEPTH:
      raise ValueError('nested too deeply')
    match tag:
      case b'N' | b'T' | b'-':
        return {b'N': None, b'T': True, b'-': False}[tag]
      case b'i':
        return number()
      case b'f':
        return real()
      case b'c':
        return complex(real(), real())
      case b's':
        return raw().decode('utf-8', 'surrogatepass')
      case b'b':
        return raw()
      case b'a':
        return bytearray(raw())
      case b'r':
        return range(number(), number(), number())
      case b'd':
        result = {}
        for _ in range(number()):
          key = get(depth + 1)
          result[key] = get(depth + 1)
        return result
      case b'+' | b'.':
        items = []
        while tag == b'+':
          items.append(get(depth + 1))
          tag, at = data[at : at + 1], at + 1
        if tag != b'.':
          raise ValueError('cut short')
        return iter(items)
      case b'o':
        return resolve(number())
      case b'g':
        return resolve(word())
    for kind, mark in CONTAINERS.items():
      if tag == mark:
        return kind([get(depth + 1) for _ in range(number())])
    raise ValueError('no value')

  try:
    value = get(0)
  except (TypeError, OverflowError) as error:  # an unhashable key; a float beyond all
    raise ValueError(str(error)) from None
  if at != len(data):
    raise ValueError('a value and something behind it')
  return value


def send(file, data):
  file.write(len(data).to_bytes(4, 'big') + data)
  file.flush()


def receive(file):
  """The next message. Raises EOFError where there is none, or one of a size that nobody should wait for."""
  head = file.read(4)
  size = int.from_bytes(head, 'big')
  data = file.read(size) if len(head) == 4 and size <= LIMIT else b''
  if not data or len(data) < size:
    raise EOFError
  return data


def program():
  """The program's process: loads it, then answers calls. Whatever the program does to this code, it can only answer something else."""
  requests, replies = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 0)  # the null device
  os.dup2(2, 1)
  objects = []

  def refer(value):
    objects.append(value)
    return len(objects) - 1

  module = type(sys)('solution')
  sys.modules['solution'] = module
  names = module.__dict__
  send(replies, b'ready')
  while True:
    verb, *rest = decode(receive(requests), lambda key: objects[key] if isinstance(key, int) else vars(builtins)[key])
    try:
      match verb:
        case 'load':
          exec(compile(rest[0], 'solution.py', 'exec', dont_inherit=True), names)
          value = None
        case 'name':
          value = names[rest[0]]
        case 'call':
          value = rest[0](*rest[1], **rest[2])
        case 'set':
          value = setattr(*rest)
      reply = encode([True, value], refer)
    except BaseException as error:
      reply = encode([False, type(error).__name__])
    send(replies, reply)


class Died(BaseException):
  """The program's process has ended or talks nonsense. No Exception, so that no test swallows it."""


def free_names(text):
  """The names that a module looks up outside itself, in the functions inside it too."""
  import symtable  # here: the program's process would pay for it too

  def looked_up(table):
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return own.union(*(looked_up(child) for child in table.get_children()))

  table = symtable.symtable(text, 'tests', 'exec')
  return looked_up(table) - {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}


class Judge:
  """Runs the tests of one job."""

  def __init__(self, job, requests, replies):
    self.job, self.requests, self.replies = job, requests, replies
    self.stub_names = None
    self.names = {'__name__': 'tests'}
    self.died = False

  def resolve(self, key):
    if isinstance(key, int):
      return Remote(self.ask, key)
    found = vars(builtins).get(key)
    if not isinstance(found, type):  # never a function: a test may call what it gets
      raise ValueError(f'{key} is no builtin type')
    return found

  def ask(self, *message):
    data = encode(list(message))
    try:
      send(self.requests, data)
      reply = decode(receive(self.replies), self.resolve)
    except (EOFError, OSError, ValueError, RecursionError, MemoryError):
      reply = None
    if type(reply) is not list or len(reply) != 2 or type(reply[0]) is not bool:
      self.died = True  # should a test swallow even this
      raise Died
    if reply[0]:
      return reply[1]
    error = vars(builtins).get(reply[1]) if type(reply[1]) is str else None
    raise error() if isinstance(error, type) and issubclass(error, Exception) else RuntimeError('the program raised')

  def bind(self, text):
    """Gives tests the names they use and do not define: the entry point is the program's; then come builtins, what the stub (the prompt's
    own helpers) defines, modules; the program only has a say in what is none of these."""
    for name in sorted(free_names(text) - self.names.keys()):
      if name == self.job['entry_point']:
        self.names[name] = self.ask('name', name)
      elif name in vars(builtins):
        continue
      else:
        if self.stub_names is None:
          self.stub_names = {'__name__': 'stub'}
          exec(compile(self.job['stub'], 'stub.py', 'exec', dont_inherit=True), self.stub_names)
        if name in self.stub_names:
          self.names[name] = self.stub_names[name]
        elif name in sys.stdlib_module_names:
          self.names[name] = __import__(name)
        else:
          try:
            self.names[name] = self.ask('name', name)
          except Exception:  # the program has no such name either
            continue

  def run(self, text):
    """Whether test code ends without an exception."""
    try:
      self.bind(text)
      exec(compile(text, 'tests', 'exec', dont_inherit=True), self.names)
    except (Exception, SystemExit):
      return False
    return True

  def verdicts(self):
    """One truth value a test; all false where the program does not load, ends its process, or brings the judge to its own limits."""
    failed = [False] * len(self.job['tests'])
    try:
      self.ask('load', self.job['program'])
      passed = [self.run(test) for test in self.job['tests']] if self.run(self.job['setup']) else failed
    except BaseException:
      passed = failed
    return failed if self.died else passed


def judge():
  """The judge's process: the job comes on descriptor 0, the verdict goes to 1; the program's pipes are those named by the arguments."""
  requests, replies = os.fdopen(int(sys.argv[2]), 'wb'), os.fdopen(int(sys.argv[3]), 'rb')
  job = decode(os.fdopen(os.dup(0), 'rb').read(), None)
  verdict = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 0)
  os.dup2(2, 1)
  for part in ('stub', 'setup', 'tests'):
    for text in job[part] if part == 'tests' else [job[part]]:
      try:
        compile(text, part, 'exec', dont_inherit=True)
      except (SyntaxError, ValueError) as error:
        return send(verdict, encode(f'{part}: {type(error).__name__}: {error}'))
  receive(replies)
  send(verdict, b'ready')
  send(verdict, encode(Judge(job, requests, replies).verdicts()))


if __name__ == '__main__':
  {'program': program, 'judge': judge}[sys.argv[1]]()
