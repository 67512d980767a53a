"""manifest.json of a pipeline: what each stage was made from and what came of it, by content.

  stages.NAME: kind, config (the keys that decide, `{workdir}` as in the file), config_hash, inputs (config key -> path and identity of what
    lay there), workdir, began; once it is done also output (its identity), metrics, wall_s (of the call that finished it), finished
  files: path -> size, modification time and hash, so that a file is read again only when it has changed

The identity of a run is that of its newest checkpoint's bits and of what else a later stage takes from it; the identity of anything else
is a hash of its files. Nothing here opens a network.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from rl_reasoning import checkpoint, stored, train
from rl_reasoning.config import Config, ConfigError, check, differences, digest, flatten, plain, to_dict
from rl_reasoning.data_settings import Generate

# What a run hands on beside its weights.
INHERITED = (('model', 'arch'), ('objective', 'name'), ('roles', 'policy', 'tokenizer'), ('roles', 'policy', 'template'))
DEFAULTS = flatten({**to_dict(Config()), 'generate': to_dict(Generate())})


def now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """'key: old -> new' of two resolved configs. A key that the old one did not know yet, and that is at its default, is no change."""
  old, new = flatten(plain(old)), flatten(plain(new))
  unknown = {key: value for key, value in new.items() if key in DEFAULTS and value == DEFAULTS[key]}
  return differences({**unknown, **old}, new)


class Manifest:
  """The file, held in memory; what changes it writes it."""

  def __init__(self, workdir: str):
    self.path = epath.Path(workdir) / 'manifest.json'
    found: dict[str, Any] = {}
    if self.path.exists():
      found = train.read_json(self.path)
      good = all(isinstance(found.get(key), dict) for key in ('stages', 'files'))
      check(good, f'{self.path}: damaged: no stages and files; --overwrite starts anew')
    self.stages: dict[str, dict[str, Any]] = found.get('stages', {})
    self.files: dict[str, list] = found.get('files', {})

  def write(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    train.write_atomically(self.path, json.dumps({'stages': self.stages, 'files': self.files}, indent=1))

  def begin(self, name: str, entry: Mapping[str, Any]) -> None:
    """Before a stage writes anything, so that what a kill leaves is known for what it is."""
    self.stages[name] = {**entry, 'began': now()}
    self.write()

  def finish(self, name: str, output: str, metrics: Mapping[str, Any], wall_s: float) -> None:
    self.stages[name] |= {'output': output, 'metrics': dict(metrics), 'wall_s': round(wall_s, 1), 'finished': now()}
    self.write()

  def reopen(self, name: str) -> None:
    for key in ('output', 'metrics', 'wall_s', 'finished'):
      self.stages[name].pop(key, None)
    self.write()

  def forget(self, name: str) -> None:
    self.stages.pop(name, None)
    self.write()

  def file_hash(self, path: pathlib.Path) -> str:
    """SHA-256 of the contents."""
    stat, key = path.stat(), str(path.absolute())
    known = self.files.get(key)
    if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
      return known[2]
    with path.open('rb') as file:
      found = hashlib.file_digest(file, 'sha256').hexdigest()
    self.files[key] = [stat.st_size, stat.st_mtime_ns, found]
    return found

  def identity(self, path: str) -> str:
    """Of a run, a file or a folder; '' where there is nothing that could be read."""
    where = pathlib.Path(path).expanduser()
    if stored.is_run(path):
      try:
        prints, inherited = checkpoint.identity(path), [stored.run_config(path, *keys) for keys in INHERITED]
      except ConfigError:
        return ''
      return digest([prints['params'], prints['rest'], inherited])  # of the optimizer's state nobody takes anything
    if where.is_file():
      return self.file_hash(where)[:12]
    found = sorted(f for f in where.rglob('*') if f.is_file()) if where.is_dir() else []
    return digest([[str(f.relative_to(where)), self.file_hash(f)] for f in found]) if found else ''
