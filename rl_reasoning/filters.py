"""Rows of several files, filtered and joined into one data set for SFT. No network is opened.

A stage of a pipeline with a section `filter` (DeepSeek-R1's cold start and rejection sampling, 2501.12948, are generations and these):

  'filter': {
    'inputs': {'reasoning': '{workdir}/sampled/data.jsonl', 'general': 'general.jsonl'},
    'steps': ({'name': 'language', 'language': 'en', 'least': 0.9}, {'name': 'duplicates'}, {'name': 'per_prompt', 'most': 4}),
    'sizes': {'general': 200_000},
  }

An input is a file as tasks.dataset reads them, or a folder of such files. Rows pass the steps in their order, input by input (by name); the
first step that has something against a row drops it. Of an input that `sizes` names so many of the rows that are left are drawn by the
seed (all of them where there are fewer: summary.json and the log say how many are missing). What is drawn is shuffled by the seed into
data.jsonl, every row as it was read: `prompt` with `completion` (and `chain_of_thought`), or `messages`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import inspect
import json
import pathlib
import random
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from rl_reasoning import data, dedup, tokenizer, train
from rl_reasoning.config import ConfigError, check, coerce, one_line, to_dict
from rl_reasoning.data_kept import at_least
from rl_reasoning.tasks import dataset
from rl_reasoning.verify.math import extract_answer
from rl_reasoning.verify.text import LANGUAGES, RUN, TAG, chain_of_thought, language_share, prose, repeated_share

Row = Mapping[str, Any]
WORDS = re.compile(r'[a-z0-9]+|\S')  # of a text in lower case: every letter of a script without spaces is a word


@dataclasses.dataclass(frozen=True)
class Filter:
  inputs: Mapping[str, str]  # name -> file or folder
  steps: tuple[Mapping[str, Any], ...] = ()  # each a name of FILTERS and its options
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # input -> rows; one that is not named gives all
  seed: int = 0


def text_of(row: Row) -> str:
  """What is imitated."""
  if 'messages' not in row:
    return tokenizer.render_completion(row)
  return '\n'.join(m['content'] for m in row['messages'] if m['role'] == 'assistant')


# Filters: options -> (row -> why it is dropped, '' for one that stays). Each is made anew for a run and sees every row that the steps
# before it have left, once and in order, so it may remember what it has seen. Options are keyword-only; ValueError says what is wrong.


def well_formed() -> Callable[[Row], str]:
  """Only '<think>...</think><answer>...</answer>', with something inside both: R1's readable pattern needs a chain and an answer."""

  def why(row: Row) -> str:
    parts = tokenizer.split_completion(text_of(row))
    if not parts.well_formed:
      return 'no format'
    return 'empty' if not (parts.think or '').strip() or not (parts.answer or '').strip() else ''

  return why


def answered() -> Callable[[Row], str]:
  """Only texts that end in one marked answer, in whatever format (verify.math.extract_answer)."""
  return lambda row: '' if extract_answer(text_of(row)) else 'no answer'


def language(*, language: str = 'en', least: float = 1.0) -> Callable[[Row], str]:
  """No mixed languages: at least this share of the text's letters are of the language's script; a text without letters stays."""
  if language not in LANGUAGES:
    raise ValueError(f'language {language!r} is none of {", ".join(LANGUAGES)}')
  if not 0 < least <= 1:
    raise ValueError(f'least {least} is not in (0, 1]')

  def why(row: Row) -> str:
    text = TAG.sub(' ', text_of(row))
    return 'mixed' if language_share(text, language) < least and RUN.search(prose(text)) else ''

  return why


def length(
  *, min_characters: int = 0, max_characters: int = 0, min_tokens: int = 0, max_tokens: int = 0, tokenizer: str = ''
) -> Callable[[Row], str]:
  """Limits on the text, those included; 0: none. Tokens are those of `tokenizer` ('bytes', a folder or a .gguf file)."""
  if not any((min_characters, max_characters, min_tokens, max_tokens)):
    raise ValueError('no limit is set')
  if min(min_characters, max_characters, min_tokens, max_tokens) < 0:
    raise ValueError('a limit is negative')
  if bool(tokenizer) != bool(min_tokens or max_tokens):
    raise ValueError('tokenizer goes with min_tokens or max_tokens, and they with it')
  loaded: list = []

  def why(row: Row) -> str:
    text = text_of(row)
    sizes = [(len(text), min_characters, max_characters)]
    if tokenizer:
      loaded[:] = loaded or [load_tokenizer(tokenizer)]
      sizes.append((len(loaded[0].encode(text)), min_tokens, max_tokens))
    for size, low, high in sizes:
      if size < low:
        return 'too short'
      if high and size > high:
        return 'too long'
    return ''

  return why


def load_tokenizer(name: str) -> tokenizer.Tokenizer:
  try:
    return tokenizer.load(name)
  except Exception as error:  # transformers raises all kinds
    raise ConfigError(f'filter length: tokenizer {name!r}: {one_line(error)}') from error


def repetition(*, ngram_size: int = 20, most: float = 0.2) -> Callable[[Row], str]:
  """No loops: at most this share of the n-grams of words are repeats of others (verify.text.repeated_share)."""
  if ngram_size < 1:
    raise ValueError(f'ngram_size {ngram_size} is no whole number from 1')
  if not 0 <= most < 1:
    raise ValueError(f'most {most} is not in [0, 1)')

  def why(row: Row) -> str:
    numbers: dict[str, int] = {}
    words = [numbers.setdefault(word, len(numbers)) for word in WORDS.findall(TAG.sub(' ', text_of(row)).lower())]
    return 'repeats' if repeated_share(words, ngram_size) > most else ''

  return why


def paragraphs(*, max_characters: int) -> Callable[[Row], str]:
  """No chain of thought with a long paragraph: what stands between empty lines."""
  if max_characters < 1:
    raise ValueError(f'max_characters {max_characters} must be positive')

  def why(row: Row) -> str:
    pieces = re.split(r'\n\s*\n', chain_of_thought(text_of(row)))
    return 'long' if any(len(piece.strip()) > max_characters for piece in pieces) else ''

  return why


def code_blocks() -> Callable[[Row], str]:
  """No chain of thought with fenced code; an answer may have some."""
  return lambda row: 'has one' if '```' in chain_of_thought(text_of(row)) else ''


def reward(*, least: float) -> Callable[[Row], str]:
  """Only rows whose column `reward` (datagen writes it) is at least that."""

  def why(row: Row) -> str:
    value = row.get('reward')
    return 'none' if value is None else '' if at_least(value, least) else 'too low'

  return why


def duplicates() -> Callable[[Row], str]:
  """Every text of a prompt once, white space aside (and in the prompt case, too)."""
  seen: set[bytes] = set()

  def why(row: Row) -> str:
    both = json.dumps([dataset.identity(row), text_of(row).split()])
    mark = hashlib.sha256(both.encode()).digest()[:16]
    known = mark in seen
    seen.add(mark)
    return 'seen' if known else ''

  return why


def near_duplicates(*, threshold: float = 0.8) -> Callable[[Row], str]:
  """Of rows whose words are that alike (Jaccard similarity, dedup.py) the first."""
  if not 0 < threshold <= 1:
    raise ValueError(f'threshold {threshold} is not in (0, 1]')
  seen: list[Callable[[Row], bool]] = []

  def why(row: Row) -> str:
    seen[:] = seen or [dedup.nearly_seen(threshold)]
    if 'messages' in row:
      row = {'prompt': row['messages']}
    return 'seen' if seen[0](row) else ''

  return why


def per_prompt(*, most: int) -> Callable[[Row], str]:
  """The first so many rows of a prompt."""
  if most < 1:
    raise ValueError(f'most {most} must be at least 1')
  seen: collections.Counter[str] = collections.Counter()

  def why(row: Row) -> str:
    prompt = dataset.identity(row)
    seen[prompt] += 1
    return 'over' if seen[prompt] > most else ''

  return why


FILTERS: dict[str, Callable[..., Callable[[Row], str]]] = {
  'format': well_formed,
  'answered': answered,
  'language': language,
  'length': length,
  'repetition': repetition,
  'paragraphs': paragraphs,
  'code_blocks': code_blocks,
  'reward': reward,
  'duplicates': duplicates,
  'near_duplicates': near_duplicates,
  'per_prompt': per_prompt,
}


def make_filter(step: Mapping[str, Any], key: str) -> tuple[str, Callable[[Row], str]]:
  """(name, the filter). Raises ConfigError naming the option."""
  name = step.get('name')
  check(name in FILTERS, f"config key '{key}.name': {name!r} is none of {', '.join(FILTERS)}")
  make = FILTERS[str(name)]
  known, kinds, options = inspect.signature(make).parameters, typing.get_type_hints(make), {}
  for option, value in step.items():
    if option == 'name':
      continue
    check(option in known, f"config key '{key}.{option}' is unknown: {name} has {', '.join(known) or 'no options'}")
    options[option] = coerce(value, kinds[option], f'{key}.{option}')
  for option, parameter in known.items():
    check(option in options or parameter.default is not parameter.empty, f"config key '{key}.{option}' is missing")
  try:
    return str(name), make(**options)
  except ValueError as error:
    raise ConfigError(f'config key {key!r}: {name}: {error}') from None


def make_filters(f: Filter) -> list[tuple[str, Callable[[Row], str]]]:
  return [make_filter(step, f'filter.steps[{n}]') for n, step in enumerate(f.steps)]


def resolve(settings: Mapping[str, Any]) -> Filter:
  """The section, checked but for its files. Raises ConfigError."""
  other = sorted(settings.keys() - {'filter'})
  check(not other, f'config keys that cannot act beside a section filter: {", ".join(other)}')
  f = coerce(settings['filter'], Filter, 'filter')
  check(bool(f.inputs), "config key 'filter.inputs' is empty: nothing to filter")
  make_filters(f)
  for name, size in f.sizes.items():
    check(name in f.inputs, f"config key 'filter.sizes.{name}': {name!r} is none of filter.inputs: {', '.join(f.inputs)}")
    check(size >= 1, f"config key 'filter.sizes.{name}': {size} must be at least 1")
  check(f.seed >= 0, f"config key 'filter.seed': {f.seed} must not be negative")
  return f


def files(path: str, name: str) -> list[pathlib.Path]:
  check(bool(path), f"config key 'filter.inputs.{name}' is empty: it names a file or a folder")
  where = pathlib.Path(path).expanduser()
  check(where.exists(), f"config key 'filter.inputs.{name}': {path!r} does not exist")
  found = [where] if where.is_file() else sorted(f for f in where.rglob('*') if f.name.endswith(dataset.ENDINGS))
  check(bool(found), f"config key 'filter.inputs.{name}': {path!r} holds no file that ends in {', '.join(dataset.ENDINGS)}")
  return found


def check_row(place: str, row: Row) -> None:
  dataset.check_row(place, row)
  shown = 'messages' in row or 'completion' in row
  check(shown, f'{place}: a row has nothing to imitate, no column completion or messages; columns: {", ".join(row)}')


def sifted(f: Filter, read: collections.Counter, dropped: collections.Counter) -> Iterator[tuple[str, dict]]:
  """(input, row) of what passes all steps; the others are counted under the step that dropped them and its reason."""
  steps = make_filters(f)
  for name in sorted(f.inputs):
    for file in files(f.inputs[name], name):
      for place, row in dataset.read(file):
        check_row(place, row)
        read[name] += 1
        why = next((f'{step}: {reason}' for step, judge in steps if (reason := judge(row))), '')
        if why:
          dropped[why] += 1
        else:
          yield name, row


def run(f: Filter, workdir: str) -> dict[str, Any]:
  """Writes data.jsonl and the summary that it returns; done already for the same settings and files, it only returns it. Rows are not
  held in memory. Raises ConfigError, also where no row is left."""
  folder = epath.Path(workdir)
  content = {name: data.content_hash(files(path, name))[:12] for name, path in f.inputs.items()}
  about, finished = json.loads(json.dumps({'filter': to_dict(f), 'content': content})), folder / 'summary.json'
  if finished.exists():
    summary = train.read_json(finished)
    if {key: summary.get(key) for key in about} == about:
      return summary
    finished.unlink()
  read, dropped = collections.Counter(dict.fromkeys(sorted(f.inputs), 0)), collections.Counter()
  places: dict[str, list[int]] = {name: [] for name in read}  # where rows begin in the file of what passed
  folder.mkdir(parents=True, exist_ok=True)
  passed, part = folder / 'passed.part', folder / 'data.jsonl.part'
  with passed.open('wb') as file:
    for name, row in sifted(f, read, dropped):
      places[name].append(file.tell())
      file.write(json.dumps(row).encode() + b'\n')
  drawn, random_ = {}, random.Random(f'filter/{f.seed}')
  for name, found in places.items():
    drawn[name] = random_.sample(found, min(f.sizes.get(name, len(found)), len(found)))
  order = [place for found in drawn.values() for place in found]
  check(bool(order), f'the filters leave none of {read.total()} rows: {dict(dropped)}')
  random_.shuffle(order)
  with passed.open('rb') as file, part.open('wb') as out:
    for place in order:
      file.seek(place)
      out.write(file.readline())
  part.replace(folder / 'data.jsonl')
  passed.unlink()
  summary = {
    'rows': len(order),
    'inputs': {name: {'read': read[name], 'passed': len(places[name]), 'rows': len(drawn[name])} for name in places},
    'missing': {name: size - len(drawn[name]) for name, size in f.sizes.items() if size > len(drawn[name])},
    'dropped': dict(sorted(dropped.items())), **about,
  }  # fmt: skip
  train.write_atomically(finished, json.dumps(summary, indent=1))
  return summary


def describe(summary: Mapping[str, Any]) -> str:
  """One line of what came out."""
  why = ', '.join(f'{count} {reason}' for reason, count in summary['dropped'].items())
  short = ', '.join(f'{count} of {name}' for name, count in summary['missing'].items())
  read = sum(n['read'] for n in summary['inputs'].values())
  return (
    f'{summary["rows"]} rows of {read}' + f'; dropped: {why}' * bool(why) + f'; missing for filter.sizes: {short}' * bool(short)
  )
