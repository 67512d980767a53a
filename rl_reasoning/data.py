"""Prompts and demonstrations: written once as ArrayRecord by a TFDS builder (no TensorFlow), read at random through grain.

A batch is a function of (data, seed, cursor): the cursor counts rows consumed, and holds the pass rates that a curriculum has measured.
Nothing else has to be saved to go on exactly.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from rl_reasoning import tasks
from rl_reasoning.config import Component, ConfigError, Data, check, coerce, components, digest
from rl_reasoning.sharding import size_class
from rl_reasoning.structs import DATA, Batch
from rl_reasoning.tasks import TASKS
from rl_reasoning.tokenizer import Tokenizer, after_thinking, render_completion, render_messages, render_prompt


class Source(Sequence):
  """Prepared rows: `len(source)` and `source[i]` -> dict. `name` tells the split and a hash of all that they depend on."""

  def __init__(self, records, name: str = ''):
    self.records, self.name = records, name

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index) -> dict[str, Any]:
    return json.loads(self.records[int(index)]['row'])

  @functools.lru_cache(maxsize=4)  # noqa: B019  sources live as long as a run
  def shuffled(self, seed: int) -> grain.MapDataset:
    # Another order every epoch: grain counts its seed up, so that seed 1 would begin with the second epoch of seed 0.
    return grain.MapDataset.source(self).shuffle(int(digest(seed)[:8], 16)).repeat()


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """One split of JSON texts. A row is free in its columns, which a TFDS schema is not."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, rows: Iterable, **kwargs):
    self.rows = rows
    super().__init__(file_format='array_record', **kwargs)

  def _info(self):
    # Keys are hashed and sorted by default, which would lose the order of a file.
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({'row': tfds.features.Text()}), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {'rows': ((index, {'row': json.dumps(row)}) for index, row in enumerate(self.rows))}

  def _generate_examples(self):
    raise AssertionError('the split generator above already holds the examples')


def content_hash(paths: Sequence) -> str:
  total = hashlib.sha256()
  for path in paths:
    total.update(path.name.encode())
    with path.open('rb') as file:
      while block := file.read(2**20):
        total.update(block)
  return total.hexdigest()


def prepare(rows: Iterable, folder: epath.Path) -> None:
  """Rows as ArrayRecord: written by TFDS into a temporary folder, which is renamed when it is whole."""
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # it prints where the files lie, which nobody asked
    Rows(rows, data_dir=folder).download_and_prepare(file_format='array_record')


def options_of(data: Data) -> dict[str, Any]:
  """`data.options` as keywords of the task's `rows`. Raises ConfigError: unknown task or option, a value of another type."""
  check(data.task in TASKS, f"config key 'data.task': {data.task!r} is none of {', '.join(TASKS)}")
  rows = TASKS[data.task].rows
  known = set(inspect.signature(rows).parameters) - {'split', 'seed', 'size', 'path'}
  for key in data.options:
    text = ', '.join(sorted(known)) or 'no options at all'
    check(key in known, f"config key 'data.options.{key}' is unknown to data.task {data.task!r}, which takes {text}")
  kinds = typing.get_type_hints(rows)
  return {key: coerce(value, kinds[key], f'data.options.{key}') for key, value in data.options.items()}


def check_task(data: Data, made: Collection[str] = ()) -> None:
  """What can be told wrong of `data.task` before it is read. Files of the paths `made` need not be there yet. Raises ConfigError."""
  options = options_of(data)
  if not hasattr(TASKS[data.task], 'files'):
    next(TASKS[data.task].rows('train', 0, 1, **options))
  elif data.path and data.path not in made and not re.fullmatch(r'[\w.-]+/[\w.-]+', data.path):  # which may be the hub's name
    there = pathlib.Path(data.path).expanduser().exists() or '://' in data.path
    check(there, f"config key 'data.path': {data.path!r} does not exist")


def check_tasks(data: Data, made: Collection[str] = ()) -> None:
  """`check_task` of every task of the section."""
  named = {f'data.mixture.{name}': c for name, c in components(data).items()}
  if data.pretrain:
    named['data.pretrain'] = coerce(data.pretrain, Component, 'data.pretrain')
  for where, component in named.items():
    with told_under(where):
      check_task(with_component(data, component), made)
  if not data.mixture:
    check_task(data, made)


def load(data: Data, split: str, seed: int, size: int | None) -> Source:
  """The rows of a split; prepared on first use in `data.cache_dir`, in a folder named by everything that they depend on.

  Raises ConfigError: unknown task or option, malformed row (file and line), empty data set.
  """
  options, task = options_of(data), TASKS[data.task]
  read_from: list[pathlib.Path] = []
  if hasattr(task, 'files'):
    # Both splits: test prompts are kept out of training. The seed plays no part.
    read_from, seed = [f for name in ('train', 'test') for f in task.files(data.path, name)], 0
  else:
    check(not data.path, f"config key 'data.path' cannot act: data.task {data.task!r} reads no file")
    check(bool(size), f"config key 'data.train_size': data.task {data.task!r} makes its rows, say how many")
  code = sorted(pathlib.Path(tasks.__path__[0]).glob('*.py'))
  name = digest(
    {'task': data.task, 'options': options, 'content': content_hash(code + read_from), 'split': split, 'seed': seed, 'size': size}
  )
  folder = epath.Path(os.path.expanduser(data.cache_dir)) / data.task / f'{split}_{name}'
  try:
    prepared = epath.Path(Rows(iter(()), data_dir=folder).data_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"config key 'data.cache_dir': {data.cache_dir!r}: {error}") from None
  if not prepared.exists():
    rows = task.rows(split, seed, size, data.path, **options)
    first = next(rows, None)
    check(first is not None, f'data.task {data.task!r}: the {split} split {f"of {data.path!r} " * bool(data.path)}is empty')
    try:
      prepare(itertools.chain([first], rows), folder)
    except OSError:
      if not prepared.exists():  # else another run has prepared the same meanwhile
        raise
  read: Any = Rows(iter(()), data_dir=folder).as_data_source
  try:
    source = Source(read('rows'), folder.name)
    _ = source[0], source[len(source) - 1]
  except Exception as error:  # a file that was cut or damaged: array_record and TFDS raise all kinds
    raise ConfigError(f'{folder} is damaged (delete it, and it is made again): {type(error).__name__}: {error}') from error
  return source


def taken(source: Source, cursor: int, chosen: Iterable[int], seed: int) -> list[dict]:
  """The rows at `chosen`, counted from the cursor, of an endless stream that is shuffled anew every epoch."""
  stream: Any = source.shuffled(seed)
  return [stream[cursor + int(i)] for i in chosen]


def batch(source: Source, cursor: int, size: int, seed: int) -> tuple[list[dict], int]:
  """(rows, next cursor): the next `size` rows of the stream."""
  return taken(source, cursor, range(size), seed), cursor + size


def with_component(data: Data, component: Component) -> Data:
  return dataclasses.replace(data, task=component.task, path=component.path, options=component.options)


@contextlib.contextmanager
def told_under(where: str) -> Iterator[None]:
  """What is wrong of a task is told under the key that names it."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(re.sub(r'\bdata\.(task|path|options|train_size)\b', rf'{where}.\1', str(error))) from None


def load_component(data: Data, where: str, component: Component, split: str, seed: int, size: int | None) -> Source:
  """`load` of the task under the key `where`."""
  with told_under(where):
    return load(with_component(data, component), split, seed, size)


def tagged(row: dict, name: str) -> dict:
  """A row of the mixture with its column `dataset`."""
  check('dataset' not in row, f"config key 'data.mixture.{name}': its rows have a column 'dataset', a name that a mixture needs")
  return {**row, 'dataset': name}


@dataclasses.dataclass(frozen=True)
class Train:
  """The training rows of a run, and which of them come next: of the one `data.task`, or of the tasks of `data.mixture`.

  Of a mixture every slot of a batch takes the next row of one task, whose own rows come in the order of `batch`. Which task is drawn anew
  for every slot, from a generator seeded by (seed, slots drawn so far), with probability proportional to weight * factor.

  The factor is 1 without a curriculum. With `data.curriculum` 'pass_rate' it is floor + (1 - floor) * 4 p (1 - p), where p is the task's
  pass rate: groups of completions that are all right or all wrong teach nothing, and the variance p (1 - p) of a completion's
  correctness says how seldom they are (Foster et al. 2025, Learning to Reason at the Frontier of Learnability, for single questions). p is
  a moving average of what `observe` is told, p <- decay * p + (1 - decay) * mean, kept in the cursor. It starts at 1/2, the highest factor:
  what is not measured yet is asked. The floor goes on asking what is mastered or still too hard, so that a change in either is seen.
  """

  data: Data
  seed: int
  sources: Mapping[str, Source]  # of the one task: under the name ''
  weights: Mapping[str, float]
  pretrain: Source | None = None  # a second stream, drawn by itself

  def __len__(self) -> int:
    """Rows of all tasks."""
    return sum(len(source) for source in self.sources.values())

  @property
  def mixed(self) -> bool:
    return bool(self.data.mixture)

  @property
  def adapts(self) -> bool:
    return self.mixed and self.data.curriculum == 'pass_rate'

  def first(self) -> dict[str, Any]:
    """The cursor of a run that has read nothing."""
    second = {} if self.pretrain is None else {'pretrain': 0}
    if not self.mixed:
      return {'train': 0, **second}
    rates = {f'pass_rate/{name}': 0.5 for name in self.sources} if self.adapts else {}
    return {**{f'train/{name}': 0 for name in self.sources}, 'drawn': 0, **rates, **second}

  def factor(self, cursor: Mapping[str, Any], name: str) -> float:
    if not self.adapts:
      return 1.0
    floor, p = self.data.curriculum_floor, cursor[f'pass_rate/{name}']
    return floor + (1 - floor) * 4 * p * (1 - p)

  def draw_names(self, cursor: Mapping[str, Any], size: int) -> Iterator[str]:
    """Which tasks the next `size` slots take."""
    names = list(self.sources)
    shares = [self.weights[name] * self.factor(cursor, name) for name in names]
    slots = range(cursor['drawn'], cursor['drawn'] + size)
    return (random.Random(f'mixture/{self.seed}/{slot}').choices(names, shares)[0] for slot in slots)

  def draw(self, cursor: Mapping[str, Any], size: int, chosen: Iterable[int] | None = None) -> tuple[list[dict], dict[str, Any]]:
    """(rows, next cursor). Two draws give what one of their sizes together gives, unless pass rates are observed in between. Of the rows
    only the `chosen` ones are read; the cursor is the same."""
    after, wanted = dict(cursor), range(size) if chosen is None else [int(i) for i in chosen]
    if not self.mixed:
      after['train'] += size
      return taken(self.sources[''], cursor['train'], wanted, self.seed), after
    rows, read = {}, set(wanted)
    for slot, name in enumerate(self.draw_names(cursor, size)):
      if slot in read:
        (row,) = taken(self.sources[name], after[f'train/{name}'], (0,), self.seed)
        rows[slot] = tagged(row, name)
      after[f'train/{name}'] += 1
    after['drawn'] += size
    return [rows[slot] for slot in wanted], after

  def whole(self) -> list[dict]:
    """Every row of every task once, in the order in which it would be drawn of its task."""
    rows = {name: batch(source, 0, len(source), self.seed)[0] for name, source in self.sources.items()}
    return [tagged(row, name) if self.mixed else row for name, some in rows.items() for row in some]

  def draw_pretrain(
    self, cursor: Mapping[str, Any], size: int, chosen: Iterable[int] | None = None
  ) -> tuple[list[dict], dict[str, Any]]:
    """As `draw`, of the second stream."""
    assert self.pretrain is not None
    rows = taken(self.pretrain, cursor['pretrain'], range(size) if chosen is None else chosen, self.seed)
    return rows, {**cursor, 'pretrain': cursor['pretrain'] + size}

  def observe(self, cursor: Mapping[str, Any], rows: Sequence[dict], correct: Sequence[float | None]) -> dict[str, Any]:
    """The cursor with the pass rates after a measurement: `correct` is in [0, 1] for each row (a mean over its completions), or None."""
    if not self.adapts:
      return dict(cursor)
    measured = collections.defaultdict(list)
    for row, value in zip(rows, correct, strict=True):
      if value is not None:
        if not 0 <= value <= 1:
          raise ValueError(f'a pass rate of {value} is not in [0, 1]')
        measured[row['dataset']].append(float(value))
    after, decay = dict(cursor), self.data.curriculum_decay
    for name, values in measured.items():
      key = f'pass_rate/{name}'
      after[key] = decay * cursor[key] + (1 - decay) * math.fsum(values) / len(values)
    return after

  def preview(self, count: int) -> Iterator[dict]:
    """The rows that the first `count` draws of a run read, each once: all rows where a curriculum leaves open which those are."""
    read = {name: len(source) for name, source in self.sources.items()}
    if not self.mixed:
      read[''] = min(count, read[''])
    elif not self.adapts:
      left = dict(read)
      for name in self.draw_names(self.first(), count):
        left[name] = max(0, left[name] - 1)
        if not any(left.values()):  # all are read; a long run has far more slots than its tasks have rows
          break
      read = {name: read[name] - left[name] for name in read}
    for name, source in self.sources.items():
      for position in range(read[name]):
        (row,), _ = batch(source, position, 1, self.seed)
        yield tagged(row, name) if self.mixed else row


def open_train(data: Data, seed: int) -> Train:
  """The training split of `data`; prepared on first use. Raises ConfigError."""
  pretrain = None
  if data.pretrain:
    c = coerce(data.pretrain, Component, 'data.pretrain')
    pretrain = load_component(data, 'data.pretrain', c, 'train', seed, c.train_size or None)
  if not data.mixture:
    return Train(data, seed, {'': load(data, 'train', seed, data.train_size or None)}, {'': 1.0}, pretrain)
  tasks = components(data)
  sources = {}
  for name, c in tasks.items():
    source = sources[name] = load_component(data, f'data.mixture.{name}', c, 'train', seed, c.train_size or None)
    tagged(source[0], name)
  return Train(data, seed, sources, {name: c.weight for name, c in tasks.items()}, pretrain)


def open_test(data: Data, seed: int, size: int) -> list[dict]:
  """The first `size` rows of the test split; of a mixture, rows of every task by its weight, at least one, with their column `dataset`."""
  if not data.mixture:
    source = load(data, 'test', seed, size)
    return [source[i] for i in range(min(size, len(source)))]
  tasks, rows = components(data), []
  total, before = math.fsum(c.weight for c in tasks.values()), 0.0
  for name, c in tasks.items():
    after = before + size * c.weight / total
    count = max(1, round(after) - round(before))  # rounded sums, so that the parts add up to the size
    before = after
    source = load_component(data, f'data.mixture.{name}', c, 'test', seed, count)
    rows += [tagged(source[i], name) for i in range(min(count, len(source)))]
  return rows


def excerpt(value: Any) -> str:
  text = str(value)
  return repr(text if len(text) <= 60 else text[:57] + '...')


def encode_prompts(rows: Sequence[dict], tokenizer: Tokenizer, template: str, max_prompt_length: int) -> list[list[int]]:
  """Token ids of each prompt. Raises ConfigError for one that is longer than the limit: cutting it would change the question."""
  prompts = []
  for row in rows:
    check('prompt' in row, f'a row has no column prompt to roll out from; columns: {", ".join(row)}')
    ids = tokenizer.encode(render_prompt(row['prompt'], template, tokenizer))
    check(len(ids) <= max_prompt_length,
          f"config key 'data.max_prompt_length': {max_prompt_length}, but a prompt has {len(ids)}: {excerpt(row['prompt'])}")  # fmt: skip
    prompts.append(ids)
  return prompts


def encode_row(row: dict, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[int]]:
  """(token ids, 1 where the token is to be imitated). The end token is imitated. A row with only a `text` is imitated whole."""
  if 'text' in row and not row.keys() & {'prompt', 'messages'}:
    ids = tokenizer.encode(row['text']) + [tokenizer.end_id]
    return ids, [1] * len(ids)
  if 'messages' not in row:
    check('prompt' in row and 'completion' in row, f'a row has nothing to imitate; columns: {", ".join(row)}')
    asked = render_prompt(row['prompt'], template, tokenizer)
    answer = after_thinking(asked, render_completion(row))
    prompt, completion = tokenizer.encode(asked), tokenizer.encode(answer) + [tokenizer.end_id]
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)
  try:
    pieces = render_messages(row['messages'], tokenizer)
  except ValueError as error:
    raise ConfigError(f'{error}: {excerpt(row["messages"])}') from None
  tokens, flags = [], []
  for text, imitate in pieces:
    ids = tokenizer.encode(text)
    ends = [n for n, i in enumerate(ids, 1) if imitate and i in tokenizer.end_ids]
    check(bool(ends) or not imitate, f'the chat template ends no assistant turn with an end token: {excerpt(text)}')
    upto = ends[-1] if ends else 0  # templates go on after the end token ('\n'), where no policy ever samples
    tokens += ids
    flags += [1] * upto + [0] * (len(ids) - upto)
  return tokens, flags


def encode_rows(rows: Sequence[dict], tokenizer: Tokenizer, template: str, max_length: int) -> list[tuple[list[int], list[int]]]:
  """`encode_row` of each. Raises ConfigError for a row longer than `max_length`: cutting it would lose its answer."""
  encoded = [encode_row(row, tokenizer, template) for row in rows]
  for row, (ids, _) in zip(rows, encoded, strict=True):
    check(len(ids) <= max_length,
          f"config key 'data.max_length': {max_length}, but a row has {len(ids)} tokens: {excerpt(row.get('prompt', row))}")  # fmt: skip
  return encoded


def pad_rows(encoded: Sequence[tuple[Sequence[int], Sequence[int]]], group_N: np.ndarray) -> Batch:
  """Right-padded numpy rows [N, T] of (token ids, 1 where the token is masked in). A row without tokens is all padding."""
  N, T = len(encoded), size_class(max((len(ids) for ids, _ in encoded), default=0))
  tokens, mask = np.zeros((N, T), np.int32), np.zeros((N, T), np.float32)
  segment, position = np.zeros((N, T), np.int32), np.zeros((N, T), np.int32)
  for n, (ids, flags) in enumerate(encoded):
    end = len(ids)
    tokens[n, :end], segment[n, :end], position[n, :end] = ids, 1, np.arange(end)
    mask[n, 1:end] = flags[1:]  # nothing comes before the first token
  return Batch(
    tokens=tokens, segment_NT=segment, position_NT=position, mask_NT=mask,
    source_N=np.full(N, DATA, np.int32), group_N=group_N.astype(np.int32),
  )  # fmt: skip


def encode_sft(rows: Sequence[dict], tokenizer: Tokenizer, template: str, max_length: int, train_on_prompt: bool) -> Batch:
  encoded = encode_rows(rows, tokenizer, template, max_length)
  if train_on_prompt:
    encoded = [(ids, [1] * len(ids)) for ids, _ in encoded]
  return pad_rows(encoded, np.arange(len(rows)))
