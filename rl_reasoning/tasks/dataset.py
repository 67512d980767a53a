"""Rows from files: JSON lines or an array (.gz too) or Parquet, a file, a folder, or a data set of the Hugging Face hub ('owner/name').

Columns, as users of other trainers know them: `prompt`; `prompt` + `completion`; `messages`; `prompt` + `chain_of_thought` + `completion`;
`prompt` + `answer`; `text` alone, which is imitated whole (pretraining); further columns go to the reward functions.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from rl_reasoning.config import ConfigError, check
from rl_reasoning.tasks.procedural import is_test

ENDINGS = ('.jsonl', '.json', '.parquet', '.jsonl.gz', '.json.gz')


def fetch(path: str) -> pathlib.Path:
  """A file or folder here; else a download of the hub's data set of that name."""
  local = pathlib.Path(path).expanduser()
  if local.exists():
    return local
  check(path.count('/') == 1 and not path.startswith(('.', '/', '~')), f"config key 'data.path': {path!r} does not exist")
  import huggingface_hub

  try:
    patterns = [f'*{ending}' for ending in ENDINGS]
    return pathlib.Path(huggingface_hub.snapshot_download(path, repo_type='dataset', allow_patterns=patterns))
  except Exception as error:  # the hub's errors have no common base
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise ConfigError(f"config key 'data.path': {path!r} is no path here, and the hub gave {reason}") from None


def files(path: str, split: str) -> list[pathlib.Path]:
  """The files of a split: those whose name begins with it ('train.jsonl', 'train-00000-of-00001.parquet'), in any folder below."""
  check(bool(path), "config key 'data.path' is empty: this task reads files")
  where = fetch(path)
  if where.is_file():
    return [where]
  return sorted(f for f in where.rglob(f'{split}*') if f.name.endswith(ENDINGS))


def read(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
  """('file:line', row) of a file; in a .json file that is one array, rows are counted. Raises ConfigError naming the line that is not a
  JSON object."""
  if path.suffix == '.parquet':
    import pyarrow.parquet  # optional: it comes with tensorflow-datasets, and some releases abort at exit

    try:
      found = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
      raise ConfigError(f'{path}: damaged or no Parquet file: {error}') from None
    for index, row in enumerate(found, 1):
      try:
        json.dumps(row)
      except (TypeError, ValueError) as error:
        raise ConfigError(f'{path}:{index}: a column that JSON cannot hold: {error}') from None
      yield f'{path}:{index}', row
    return
  try:
    with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
      array = path.name.endswith(('.json', '.json.gz')) and file.read(100).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b'['
      file.seek(0)
      items = [(1, file.read())] if array else enumerate(file, 1)
      for number, text in items:
        if not text.strip():
          continue
        try:
          found = json.loads(text)  # it finds the encoding, and leaves a byte order mark out
          json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs pass as JSON, and no tokenizer takes them
        except (ValueError, RecursionError) as error:
          raise ConfigError(f'{path}:{number}: not JSON in UTF-8: {error}') from None
        for place, row in enumerate(found, 1) if array else [(number, found)]:
          check(isinstance(row, dict), f'{path}:{place}: not a JSON object')
          yield f'{path}:{place}', row
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ConfigError(f'{path}: damaged or no gzip file: {error}') from None


def identity(row: Mapping) -> str:
  """What two rows share when they ask the same: the prompt, or what a conversation's user says in all, or a whole text; case and
  spaces aside."""
  asked = next(row[column] for column in ('prompt', 'messages', 'text') if column in row)
  turns = [] if isinstance(asked, str) else [m['content'] for m in asked if m['role'] not in ('system', 'assistant')]
  text = asked if isinstance(asked, str) else ' '.join(turns)
  return ' '.join(text.lower().split())


def check_messages(place: str, column: str, messages) -> None:
  good = isinstance(messages, list) and all(
    isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str) for m in messages
  )
  check(good and bool(messages), f'{place}: column {column!r} is not a list of {{"role", "content"}} messages of text')


def check_row(place: str, row: Mapping) -> None:
  known = row.keys() & {'prompt', 'messages', 'text'}
  check(bool(known), f'{place}: no column prompt, messages or text; columns: {", ".join(row)}')
  alone = known == {'text'}
  check(not alone or row['text'] != '', f'{place}: the text is empty')
  for column in ('text',) if alone else ('prompt', 'chain_of_thought', 'completion'):
    value = row.get(column)
    if column == 'prompt' and isinstance(value, list):
      check_messages(place, column, value)
    else:
      check(column not in row or isinstance(value, str), f'{place}: column {column!r} is {type(value).__name__}, not text')
  check(row.get('prompt', True) not in ('', []), f'{place}: the prompt is empty')
  check_names(place, row, ('prompts', 'completions', 'completion_ids'))
  if 'messages' in row:
    check_messages(place, 'messages', row['messages'])


def check_names(place: str, row: Mapping, reserved: Iterable[str]) -> None:
  """Raises ConfigError for a further column whose name reward functions know as something else."""
  for column in reserved:
    check(
      column not in row,
      f'{place}: column {column!r} has the name of what reward functions get; rename it by data.options.columns',
    )


def rename(row: Mapping, place: str, columns: Mapping[str, str]) -> dict:
  """The row with its `columns` {'name in the file': 'our name'} renamed."""
  for theirs in columns:
    check(theirs in row, f"config key 'data.options.columns': {place} has no column {theirs!r}")
  renamed = {columns.get(column, column): value for column, value in row.items()}
  check(len(renamed) == len(row), f"config key 'data.options.columns': {place} has two columns of one new name")
  return renamed


def split_rows(
  split: str, size: int | None, path: str, find: Callable[[str, str], list[pathlib.Path]],
  convert: Callable[[dict, str], dict | None], mixed: Callable[[pathlib.Path], bool] | None = None, share: float = 0.1,
) -> Iterator[dict]:  # fmt: skip
  """The first `size` rows of the files `find(path, split)`, in their order, each through `convert(row, place)`, which gives None for a row
  to leave out.

  Of a file that is `mixed` (default: of a path that is a single file) `share` of the problems, by a hash of what is asked, are the test
  split: a problem stays where it is when the file grows. A training row whose prompt is in the test split is left out.
  """

  def converted(name: str) -> Iterator[dict]:
    for file in find(path, name):
      both = mixed(file) if mixed else is_single(path)
      for place, found in read(file):
        row = convert(found, place)
        if row is not None and (not both or is_test(identity(row), share) == (name == 'test')):
          yield row

  held_out = {identity(row) for row in converted('test')} if split == 'train' and not is_single(path) else set()
  yield from itertools.islice((row for row in converted(split) if identity(row) not in held_out), size)


def is_single(path: str) -> bool:
  """Whether a path names one file, which then holds both splits."""
  return pathlib.Path(path).expanduser().is_file()


def rows(
  split: str, seed: int, size: int | None, path: str = '', *, columns: Mapping[str, str] | None = None, test_share: float = 0.1,
) -> Iterator[dict]:  # fmt: skip
  """Rows of a split, in file order; `columns` renames {'name in the file': 'our name'}.

  Of a single file, `test_share` of the problems (by hash) are the test split. A training row whose prompt is in the test split is left out.
  """

  def renamed(found: dict, place: str) -> dict:
    row = rename(found, place, columns or {})
    check_row(place, row)
    return row

  check(0 <= test_share < 1, f"config key 'data.options.test_share': {test_share} is not in [0, 1)")
  yield from split_rows(split, size, path, files, renamed, share=test_share)
