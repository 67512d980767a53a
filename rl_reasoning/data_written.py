"""What a folder of made data holds beside its settings: data.jsonl, the same rows as ArrayRecord, README.md (a dataset card, with the
head that the Hugging Face hub reads) and summary.json, which is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rl_reasoning import data, dedup, train
from rl_reasoning.config import Data
from rl_reasoning.data_settings import Generate, evaluation_sets

RECORDS = 'array_record'
FILES = ('config.json', 'data.jsonl', 'README.md', 'summary.json')
SOURCES = {
  'checkpoint': 'Sampled from a checkpoint:',
  'api': 'Answers of a model behind an API:',
  'published': 'A published set, converted:',
}
READING = """\
`data.jsonl` has a row a line; the same rows as ArrayRecord (TensorFlow is not needed):

```python
import json
import tensorflow_datasets as tfds

rows = tfds.builder_from_directory('{folder}').as_data_source('rows')
print(json.loads(rows[0]['row']))
```"""


def evaluation_rows(g: Generate, given: Data, seed: int) -> list[dict]:
  """The problems of `generate.decontaminate`. Raises ConfigError."""
  evaluation: list[dict] = []
  for name, component in evaluation_sets(g).items():
    key = f'generate.decontaminate.{name}'
    source = data.load_component(given, key, component, 'test', seed, component.train_size or None)
    evaluation += [source[index] for index in range(len(source))]
  return evaluation


def left_out(rows: Sequence[dict], g: Generate, evaluation: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
  """(rows that remain, counts): without those that evaluations ask, and without near duplicates."""
  kept, dropped = list(rows), {}
  if evaluation:
    kept, found = dedup.decontaminate(kept, evaluation, g.ngram)
    dropped |= found
  if g.near_duplicates:
    kept, found = dedup.near_duplicates(kept, g.near_duplicates)
    dropped |= found
  return kept, dropped


def filters(g: Generate) -> list[str]:
  """What rows have passed, for the card."""
  told = {
    'possible': 'the final answer is the gold answer, where there is one that can be checked (accuracy reward)',
    'always': 'the final answer is the gold answer (accuracy reward)',
    'never': 'answers are not verified',
  }
  found = [told[g.verify]] if g.keep == 'reasoning' else []
  sets = ', '.join(f'{name} ({c.task} {c.path})'.replace(' )', ')') for name, c in evaluation_sets(g).items())
  if sets:
    found.append(f'no {g.ngram} successive words of a prompt of these evaluation sets: {sets}')
  if g.near_duplicates:
    found.append(f'near duplicates (MinHash, Jaccard similarity of {g.near_duplicates:g} or more): the first one stays')
  return found


def listed(lines: Sequence[str]) -> str:
  return '\n'.join(f'- {line}' for line in lines)


def card(
  rows: Sequence[Mapping[str, Any]], g: Generate, told: Mapping[str, Any], about: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
  """README.md of the folder. Nothing in it depends on when the data were made."""
  front = [f'license: {g.licence.lower()}'] * bool(g.licence) + ['configs:', '- config_name: default', '  data_files: data.jsonl']
  source = [*(f'{key}: {value}' for key, value in told.items()), f'licence: {g.licence or "not stated (generate.licence)"}']
  counts = {key: value for key, value in summary.items() if isinstance(value, int) and key not in told}
  counts |= {f'left out, {reason}': count for reason, count in summary['dropped'].items()}
  table = '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value:,} |' for key, value in counts.items())])
  parts = [
    '\n'.join(['---', *front, '---']),
    f'# {len(rows):,} rows ({g.keep})',
    f'{SOURCES[g.source]}\n{listed(source)}',
    f'Columns: {", ".join(sorted(set().union(*rows)))}.',
    f'## Counts\n\n{table}',
    f'## Filters\n\n{listed(filters(g)) or "None beside the kind of data above."}',
    f'## Settings\n\n```json\n{json.dumps(about, indent=1, sort_keys=True)}\n```',
    f'## Reading\n\n{READING.format(folder=f"{RECORDS}/rows/{data.Rows.VERSION}")}',
  ]
  return '\n\n'.join(parts) + '\n'


def write(folder: epath.Path, rows: Sequence[dict], text: str, summary: Mapping[str, Any]) -> None:
  train.write_atomically(folder / 'data.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
  records = folder / RECORDS
  records.rmtree(missing_ok=True)  # of rows that are no longer these, or half written
  data.prepare(rows, records)
  (records / 'downloads').rmtree(missing_ok=True)  # TFDS makes one, empty
  train.write_atomically(folder / 'README.md', text)
  train.write_atomically(folder / 'summary.json', json.dumps(summary, indent=1))
