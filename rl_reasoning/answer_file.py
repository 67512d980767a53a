"""What an endpoint has answered, in a file of JSON lines: nothing is asked, or paid for, a second time.

Local files only: a bucket cannot append.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import threading
from typing import Any, NamedTuple

from rl_reasoning.config import ConfigError

# What JSON of another shape than the expected one raises (the last ones: int(1e999), thousands of brackets).
GARBLED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Usage(NamedTuple):
  posts: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0

  def plus(self, other: Usage) -> Usage:
    return Usage(*(a + b for a, b in zip(self, other)))

  def minus(self, other: Usage) -> Usage:
    return Usage(*(a - b for a, b in zip(self, other)))


class Answer(NamedTuple):
  texts: tuple[str, ...]  # one a choice; a server that ignores the option n gives fewer
  reasonings: tuple[str, ...]  # the thinking that a server hands out apart from the text; '' where it does not
  finished: tuple[str, ...]  # finish_reason: 'stop', or 'length' where max_tokens cut it


class Failure(NamedTuple):
  reason: str
  refused: bool = False  # the endpoint will not have this request (4xx); else it did not answer in all attempts


def outcome_of(line: dict[str, Any]) -> Answer | Failure:
  """What a line of the file of answers holds. Raises KeyError, TypeError."""
  return Answer(*map(tuple, line['answer'])) if 'answer' in line else Failure(*line['failure'])


class Cache:
  """The file of answers. One process at a time; in memory are only the places of its lines.

  A last line that was torn (a kill, a full disk) is cut off. Raises ConfigError for a file that holds anything else, naming the line.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.places: dict[str, tuple[int, int]] = {}  # key -> offset and length of its last line
    self.used = Usage()
    self.lock = threading.Lock()
    try:
      self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
      raise ConfigError(f'{self.path}: {error.strerror}') from None
    try:
      fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self.read()
    except BlockingIOError:
      os.close(self.file)
      raise ConfigError(f'{self.path}: another process is using it') from None
    except ConfigError:
      os.close(self.file)
      raise

  def read(self) -> None:
    self.end = 0
    with open(self.file, 'rb', closefd=False) as lines:
      for number, line in enumerate(lines, 1):
        whole = line.endswith(b'\n')
        if not whole and (line.startswith(b'{"key": "') or b'{"key": "'.startswith(line)):
          os.ftruncate(self.file, self.end)
          return
        try:
          found = json.loads(line)
          outcome_of(found)
          self.places[str(found['key'])] = (self.end, len(line))
          self.used = self.used.plus(Usage(*map(int, found['used'])))
        except GARBLED as error:
          raise ConfigError(f'{self.path}:{number}: no line of a file of answers: {type(error).__name__}: {error}') from None
        self.end += len(line)

  def get(self, key: str) -> Answer | Failure | None:
    with self.lock:
      place = self.places.get(key)
    if place is None:
      return None
    return outcome_of(json.loads(os.pread(self.file, place[1], place[0])))

  def put(self, key: str, outcome: Answer | Failure, used: Usage) -> None:
    kind = 'answer' if isinstance(outcome, Answer) else 'failure'
    line = json.dumps({'key': key, 'used': used, kind: outcome}).encode() + b'\n'
    with self.lock:
      try:
        written = 0
        while written < len(line):
          written += os.pwrite(self.file, line[written:], self.end + written)
      except OSError as error:  # whatever was written is beyond `end`: the next line goes over it
        os.ftruncate(self.file, self.end)
        raise ConfigError(f'{self.path}: {error.strerror}; mend it, and the same command goes on') from error
      self.places[key] = self.end, len(line)
      self.used, self.end = self.used.plus(used), self.end + len(line)

  def close(self) -> None:
    os.close(self.file)
